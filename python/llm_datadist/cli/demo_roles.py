# SPDX-License-Identifier: Apache-2.0
"""The two children of the demo: a prompt that offers its caches, and a decoder that pulls them and checks every byte."""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    DataType,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
)

from .demo import DTYPES, Reporter
from .pattern import Bytes, Expectation, Pattern

PROMPT, DECODER = 1, 2  # cluster ids
REQUEST, NO_REQUEST = 1, 404  # ids of a request that the prompt has, and of one that it has not

_PER_LAYER = 2  # tensors: keys and values
_POOL_PAGE = 64 << 10  # of a memory pool, as LLMConfig.mem_pool_cfg has it where it says nothing
_SPARE_BLOCKS = 8  # one in so many blocks more at the decoder, which no pull may touch
_SEED = 20240  # the scattered block lists are the same in every run


@dataclass
class Model:
    """What the options say of the caches."""

    layers: int
    token_bytes: int  # of one tensor
    tokens: int
    block_tokens: int
    shape: tuple[int, int]  # of a token
    data_type: DataType

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Model:
        name, element_bytes = DTYPES[arguments.dtype]
        shape = (arguments.kv_heads, arguments.head_dim)
        return cls(
            arguments.layers,
            shape[0] * shape[1] * element_bytes,
            arguments.tokens,
            arguments.block_tokens,
            shape,
            DataType[name],
        )

    @property
    def tensors(self) -> int:
        return _PER_LAYER * self.layers

    @property
    def row_bytes(self) -> int:
        return self.tokens * self.token_bytes

    @property
    def block_bytes(self) -> int:
        return self.block_tokens * self.token_bytes

    @property
    def blocks(self) -> int:
        return -(-self.tokens // self.block_tokens)

    def row(self) -> CacheDesc:
        return CacheDesc(self.tensors, [1, self.tokens, *self.shape], self.data_type)

    def paged(self, blocks: int) -> CacheDesc:
        return CacheDesc(self.tensors, [blocks, self.block_tokens, *self.shape], self.data_type)

    def pool(self) -> int:
        """Bytes of a memory pool that holds the contiguous cache."""
        return self.tensors * -(-self.row_bytes // _POOL_PAGE) * _POOL_PAGE

    def some_layers(self) -> tuple[range, range]:
        """A quarter of the layers at the source, and where they go: other layers of the destination."""
        count = max(1, self.layers // 4)
        return range(self.layers // 4, self.layers // 4 + count), range(self.layers - count, self.layers)


def run(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Play the role that the arguments name."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    play = _prompt if arguments.role == "prompt" else _decoder
    try:
        play(arguments, Model.of(arguments), reporter)
    except LLMException as exc:
        reporter.send("failed", text=f"{exc.status_code}: {exc}")
        return 1
    except MemoryError as exc:
        reporter.send("failed", text=f"out of memory: {exc}")
        return 1
    return 0


_told_to_end = threading.Event()
_UNHEARD_SECONDS = 4


def _end_with_parent() -> None:
    """Wait for the end of standard input: the parent has what it wants, or is gone."""
    while os.read(0, 1):  # not sys.stdin: its lock would be held at exit
        pass
    _told_to_end.set()
    time.sleep(_UNHEARD_SECONDS)
    os._exit(1)  # whoever is busy for so long does not end by itself


def _engine(arguments: argparse.Namespace, role: LLMRole, cluster_id: int, model: Model, listen: str = "") -> LLMDataDist:
    config = LLMConfig()
    config.device_id = 0
    config.enable_cache_manager = True
    config.sync_kv_timeout = max(1, int(arguments.timeout * 1000))
    if arguments.mode != "blocks":
        config.mem_pool_cfg = f'{{"memory_size": {model.pool()}}}'
    if listen:
        config.listen_ip_info = listen
    if arguments.transport:
        config.transport = arguments.transport
    engine = LLMDataDist(role, cluster_id)
    engine.init(config.generate_options())
    return engine


def _pool_memory(cache: Cache) -> list[Bytes]:
    """Return the tensors of an allocated cache as arrays."""
    size = cache.cache_desc.size
    return [np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(addr)) for addr in cache.tensor_addrs]


def _own_memory(desc: CacheDesc) -> list[Bytes]:
    """Return arrays for a cache that is to be registered."""
    return list(np.empty((desc.num_tensors, desc.size), dtype=np.uint8))


def _addresses(tensors: list[Bytes]) -> list[int]:
    return [tensor.ctypes.data for tensor in tensors]


# The two caches of the prompt have different contents.
_ROW_SEED, _PAGED_SEED = 1, 2


def _prompt(arguments: argparse.Namespace, model: Model, reporter: Reporter) -> None:
    engine = _engine(arguments, LLMRole.PROMPT, PROMPT, model, "127.0.0.1:0")
    kept = []  # registered memory must stay as long as its cache
    if arguments.mode != "blocks":
        cache = engine.cache_manager.allocate_cache(model.row(), [CacheKey(PROMPT, req_id=REQUEST)])
        _fill(_pool_memory(cache), Pattern(model.row_bytes, _ROW_SEED))
        reporter.send("say", text=f"allocated and filled {_size(model, model.row_bytes)} in rows of {model.tokens} tokens")
    if arguments.mode != "contiguous":
        desc = model.paged(model.blocks)
        tensors = _own_memory(desc)
        _fill(tensors, Pattern(desc.size, _PAGED_SEED))
        engine.cache_manager.register_blocks_cache(desc, _addresses(tensors), BlocksCacheKey(PROMPT))
        kept.append(tensors)
        text = f"registered and filled {_size(model, desc.size)} in {model.blocks} blocks of {model.block_tokens} tokens"
        reporter.send("say", text=text)
    address = engine.listen_address
    reporter.send("ready", address=address, text=f"process {os.getpid()} is cluster {PROMPT} and listens at {address}")
    _told_to_end.wait()
    engine.finalize()


def _fill(tensors: list[Bytes], pattern: Pattern) -> None:
    for index, tensor in enumerate(tensors):
        tensor[:] = pattern.tensor(index)


def _size(model: Model, tensor_bytes: int) -> str:
    return f"{model.tensors * tensor_bytes / (1 << 20):.4g} MiB ({model.layers} layers, K and V)"


def _decoder(arguments: argparse.Namespace, model: Model, reporter: Reporter) -> None:
    engine = _engine(arguments, LLMRole.DECODER, DECODER, model)
    cluster = _link(engine, arguments, reporter)
    steps = _Steps(engine, model, reporter)
    if arguments.mode != "blocks":
        steps.contiguous()
    if arguments.mode != "contiguous":
        steps.blocks()
    code, _ = engine.unlink_clusters([cluster], timeout=int(arguments.timeout * 1000))
    if code != LLMStatusCode.LLM_SUCCESS:
        raise LLMException("unlink_clusters failed", status_code=code)
    engine.finalize()
    reporter.send("end", text="unlinked")


def _link(engine: LLMDataDist, arguments: argparse.Namespace, reporter: Reporter) -> LLMClusterInfo:
    host, port = arguments.address.rsplit(":", 1)
    cluster = LLMClusterInfo()
    cluster.remote_cluster_id = PROMPT
    cluster.append_local_ip_info(host, 0)
    cluster.append_remote_ip_info(host, int(port))
    started = time.perf_counter()
    code, _ = engine.link_clusters([cluster], timeout=int(arguments.timeout * 1000))
    seconds = time.perf_counter() - started
    explained = engine.explain(PROMPT)
    if code != LLMStatusCode.LLM_SUCCESS:
        raise LLMException(f"link_clusters failed: {explained}", status_code=code)
    reporter.send("say", text=f"process {os.getpid()} is cluster {DECODER}, linked in {seconds * 1e3:.1f} ms")
    for line in explained.splitlines()[1:]:
        reporter.send("say", text=f"  {line}")
    return cluster


class _Steps:
    """What the decoder pulls, one after the other. Each destination is poisoned before, and every byte of it compared after."""

    def __init__(self, engine: LLMDataDist, model: Model, reporter: Reporter) -> None:
        self._manager = engine.cache_manager
        self._model = model
        self._reporter = reporter

    def contiguous(self) -> None:
        """Pull layers of a row, then the whole row, which releases its key; then by keys that are not there."""
        model = self._model
        cache = self._manager.allocate_cache(model.row())
        tensors = _pool_memory(cache)
        pattern = Pattern(model.row_bytes, _ROW_SEED)
        key = CacheKey(PROMPT, req_id=REQUEST)
        src, dst = model.some_layers()
        self._pull(
            f"row by key, layers {_layers(src)} to {_layers(dst)}",
            tensors,
            Expectation(pattern, _tensor_map(src, dst)),
            len(src) * _PER_LAYER * model.row_bytes,
            lambda: self._manager.pull_cache(key, cache, src_layer_range=src, dst_layer_range=dst),
        )
        every = range(model.layers)
        self._pull(
            "row by key, all layers",
            tensors,
            Expectation(pattern, _tensor_map(every, every)),
            model.tensors * model.row_bytes,
            lambda: self._manager.pull_cache(key, cache),
        )
        self._pull_missing("row by the same key: it was released", lambda: self._manager.pull_cache(key, cache))
        missing = CacheKey(PROMPT, req_id=NO_REQUEST)
        self._pull_missing("row by a key that does not exist", lambda: self._manager.pull_cache(missing, cache))
        self._manager.deallocate_cache(cache)

    def blocks(self) -> None:
        """Pull all blocks, scattered on both sides, then some layers of half of them; then by a key that is not there."""
        model = self._model
        desc = model.paged(model.blocks + -(-model.blocks // _SPARE_BLOCKS))
        tensors = _own_memory(desc)
        cache = self._manager.register_blocks_cache(desc, _addresses(tensors))
        pattern = Pattern(model.blocks * model.block_bytes, _PAGED_SEED)
        key = BlocksCacheKey(PROMPT)
        scatter = random.Random(_SEED)
        sources = scatter.sample(range(model.blocks), model.blocks)
        targets = scatter.sample(range(desc.shape[0]), model.blocks)
        every = range(model.layers)
        self._pull(
            f"{len(sources)} scattered blocks, all layers",
            tensors,
            Expectation(pattern, _tensor_map(every, every), model.block_bytes, (sources, targets)),
            model.tensors * len(sources) * model.block_bytes,
            lambda: self._manager.pull_blocks(key, cache, sources, targets),
        )
        half = -(-len(sources) // 2)
        some, there = sources[:half], targets[half - 1 :: -1]
        src, dst = model.some_layers()
        self._pull(
            f"{len(some)} scattered blocks, layers {_layers(src)} to {_layers(dst)}",
            tensors,
            Expectation(pattern, _tensor_map(src, dst), model.block_bytes, (some, there)),
            len(src) * _PER_LAYER * len(some) * model.block_bytes,
            lambda: self._manager.pull_blocks(key, cache, some, there, src_layer_range=src, dst_layer_range=dst),
        )
        missing = BlocksCacheKey(PROMPT, model_id=NO_REQUEST)
        self._pull_missing(
            "blocks by a key that does not exist", lambda: self._manager.pull_blocks(missing, cache, [0], [0])
        )
        self._manager.unregister_cache(cache.cache_id)  # before the arrays go

    def _pull(
        self, what: str, tensors: list[Bytes], expectation: Expectation, size: int, pull: Callable[[], None]
    ) -> None:
        expectation.poison(tensors)
        started = time.perf_counter()
        pull()
        seconds = time.perf_counter() - started
        wrong = expectation.first_wrong(tensors)
        self._step(f"pulled {what}", what, wrong, "every byte", bytes=size, seconds=seconds)

    def _pull_missing(self, what: str, pull: Callable[[], None]) -> None:
        started = time.perf_counter()
        try:
            pull()
        except LLMException as exe:
            code = exe.status_code
        else:
            code = LLMStatusCode.LLM_SUCCESS
        seconds = time.perf_counter() - started
        wrong = None if code == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST else f"ended with {code}"
        self._step(f"tried {what}", what, wrong, str(code), bytes=0, seconds=seconds)

    def _step(self, done: str, what: str, wrong: str | None, good: str, **figures: Any) -> None:
        text = f"{done}: {'verified, ' + good if wrong is None else 'WRONG, ' + wrong}"
        self._reporter.send("step", text=text, what=what, wrong=wrong, good=good, **figures)


def _layers(layers: range) -> str:
    return f"{layers.start}..{layers.stop - 1}"


def _tensor_map(src: range, dst: range) -> dict[int, int]:
    """Return which tensor of the source goes to a tensor of the destination."""
    return {
        _PER_LAYER * to + part: _PER_LAYER * of + part for of, to in zip(src, dst) for part in range(_PER_LAYER)
    }
