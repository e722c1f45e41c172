# SPDX-License-Identifier: Apache-2.0
"""The two children of the demo: a prompt that offers its caches, and a decoder that pulls them and checks every byte."""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    DataType,
    LLMClusterInfo,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
)
from llm_datadist.v2.cache_manager import CacheManager

from . import roles
from .children import Reporter
from .demo import DTYPES
from .pattern import Expectation, Pattern

PROMPT, DECODER = 1, 2  # cluster ids
REQUEST, NO_REQUEST = 1, 404  # ids of a request that the prompt has, and of one that it has not

_PER_LAYER = 2  # tensors: keys and values
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

    @property
    def roomy(self) -> int:
        """Blocks of the decoder's cache."""
        return self.blocks + -(-self.blocks // _SPARE_BLOCKS)

    def row(self) -> CacheDesc:
        return CacheDesc(self.tensors, [1, self.tokens, *self.shape], self.data_type)

    def paged(self, blocks: int) -> CacheDesc:
        return CacheDesc(self.tensors, [blocks, self.block_tokens, *self.shape], self.data_type)

    def pool(self, mode: str, blocks: int) -> int:
        """Bytes of a memory pool that holds what a mode needs: the contiguous cache, one of so many blocks, or both."""
        row = 0 if mode == "blocks" else roles.whole_pages(self.tensors, self.row_bytes)
        paged = 0 if mode == "contiguous" else roles.whole_pages(self.tensors, blocks * self.block_bytes)
        return row + paged

    def some_layers(self) -> tuple[range, range]:
        """A quarter of the layers at the source, and where they go: other layers of the destination."""
        count = max(1, self.layers // 4)
        return range(self.layers // 4, self.layers // 4 + count), range(self.layers - count, self.layers)


def run(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Play the role that the arguments name."""
    return roles.play({"prompt": _prompt, "decoder": _decoder}, arguments, reporter)


# The two caches of the prompt have different contents.
_ROW_SEED, _PAGED_SEED = 1, 2


def _prompt(arguments: argparse.Namespace, reporter: Reporter) -> None:
    model = Model.of(arguments)
    pool = model.pool(arguments.mode, model.blocks)
    engine = roles.start_engine(arguments, LLMRole.PROMPT, PROMPT, device_pool=pool, listens=True)
    manager = engine.cache_manager
    if arguments.mode != "blocks":
        cache = manager.allocate_cache(model.row(), [CacheKey(PROMPT, req_id=REQUEST)])
        _fill(manager, cache, _ROW_SEED)
        reporter.send("say", text=f"allocated and filled {_size(model, model.row_bytes)} in rows of {model.tokens} tokens")
    if arguments.mode != "contiguous":
        cache = manager.allocate_blocks_cache(model.paged(model.blocks), BlocksCacheKey(PROMPT))
        _fill(manager, cache, _PAGED_SEED)
        size = _size(model, cache.cache_desc.size)
        reporter.send("say", text=f"allocated and filled {size} in {model.blocks} blocks of {model.block_tokens} tokens")
    address = engine.listen_address
    reporter.send("ready", address=address, text=f"process {os.getpid()} is cluster {PROMPT} and listens at {address}")
    roles.wait_for_end()
    engine.finalize()


def _fill(manager: CacheManager, cache: Cache, seed: int) -> None:
    tensors = roles.own_memory(cache.cache_desc)
    Pattern(cache.cache_desc.size, seed).fill(tensors)
    roles.write(manager, cache, tensors)


def _size(model: Model, tensor_bytes: int) -> str:
    return f"{model.tensors * tensor_bytes / (1 << 20):.4g} MiB ({model.layers} layers, K and V)"


def _decoder(arguments: argparse.Namespace, reporter: Reporter) -> None:
    model = Model.of(arguments)
    pool = model.pool(arguments.mode, model.roomy)
    engine = roles.start_engine(arguments, LLMRole.DECODER, DECODER, device_pool=pool)
    cluster = _link(engine, arguments, reporter)
    steps = _Steps(engine, model, reporter)
    if arguments.mode != "blocks":
        steps.contiguous()
    if arguments.mode != "contiguous":
        steps.blocks()
    code, _ = engine.unlink_clusters([cluster], timeout=roles.timeout_millis(arguments))
    if code != LLMStatusCode.LLM_SUCCESS:
        raise LLMException("unlink_clusters failed", status_code=code)
    engine.finalize()
    reporter.send("end", text="unlinked")


def _link(engine: LLMDataDist, arguments: argparse.Namespace, reporter: Reporter) -> LLMClusterInfo:
    started = time.perf_counter()
    cluster = roles.link(arguments, engine, PROMPT, arguments.address)
    seconds = time.perf_counter() - started
    reporter.send("say", text=f"process {os.getpid()} is cluster {DECODER}, linked in {seconds * 1e3:.1f} ms")
    for line in engine.explain(PROMPT).splitlines()[1:]:
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
        pattern = Pattern(model.row_bytes, _ROW_SEED)
        key = CacheKey(PROMPT, req_id=REQUEST)
        src, dst = model.some_layers()
        self._pull(
            f"row by key, layers {_layers(src)} to {_layers(dst)}",
            cache,
            Expectation(pattern, _tensor_map(src, dst)),
            len(src) * _PER_LAYER * model.row_bytes,
            lambda: self._manager.pull_cache(key, cache, src_layer_range=src, dst_layer_range=dst),
        )
        every = range(model.layers)
        self._pull(
            "row by key, all layers",
            cache,
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
        cache = self._manager.allocate_blocks_cache(model.paged(model.roomy))
        pattern = Pattern(model.blocks * model.block_bytes, _PAGED_SEED)
        key = BlocksCacheKey(PROMPT)
        scatter = random.Random(_SEED)
        sources = scatter.sample(range(model.blocks), model.blocks)
        targets = scatter.sample(range(model.roomy), model.blocks)
        every = range(model.layers)
        self._pull(
            f"{len(sources)} scattered blocks, all layers",
            cache,
            Expectation(pattern, _tensor_map(every, every), model.block_bytes, (sources, targets)),
            model.tensors * len(sources) * model.block_bytes,
            lambda: self._manager.pull_blocks(key, cache, sources, targets),
        )
        half = -(-len(sources) // 2)
        some, there = sources[:half], targets[half - 1 :: -1]
        src, dst = model.some_layers()
        self._pull(
            f"{len(some)} scattered blocks, layers {_layers(src)} to {_layers(dst)}",
            cache,
            Expectation(pattern, _tensor_map(src, dst), model.block_bytes, (some, there)),
            len(src) * _PER_LAYER * len(some) * model.block_bytes,
            lambda: self._manager.pull_blocks(key, cache, some, there, src_layer_range=src, dst_layer_range=dst),
        )
        missing = BlocksCacheKey(PROMPT, model_id=NO_REQUEST)
        self._pull_missing(
            "blocks by a key that does not exist", lambda: self._manager.pull_blocks(missing, cache, [0], [0])
        )
        self._manager.deallocate_blocks_cache(cache)

    def _pull(self, what: str, cache: Cache, expectation: Expectation, size: int, pull: Callable[[], None]) -> None:
        tensors = roles.own_memory(cache.cache_desc)
        expectation.poison(tensors)
        roles.write(self._manager, cache, tensors)
        started = time.perf_counter()
        pull()
        seconds = time.perf_counter() - started
        roles.read(self._manager, cache, tensors)
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
