# SPDX-License-Identifier: Apache-2.0
"""The two children of the benchmark: an owner that offers its caches, and a puller that takes the time of its pulls."""

from __future__ import annotations

import argparse
import collections
import ctypes
import os
import random
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKeyByIdAndIndex,
    DataType,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
)

from .bench import WORKLOADS, Workload
from .demo import Reporter
from .pattern import Bytes, Expectation, Pattern

_OWNER, _PULLER = 1, 2  # cluster ids
_POOL_PAGE = 64 << 10  # of a memory pool, as LLMConfig.mem_pool_cfg has it where it says nothing
_WARMUP = 4  # one in so many calls more before those of a round that count
_SEED = 20240  # the blocks of a run are those of every other


def run(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Play the role that the arguments name."""
    play = _owner if arguments.role == "owner" else _puller
    try:
        play(arguments, reporter)
    except LLMException as exc:
        reporter.send("failed", text=f"{exc.status_code}: {exc}")
        return 1
    except MemoryError as exc:
        reporter.send("failed", text=f"out of memory: {exc}")
        return 1
    return 0


def _engine(arguments: argparse.Namespace, role: LLMRole, cluster: int) -> LLMDataDist:
    config = LLMConfig()
    config.enable_cache_manager = True
    config.sync_kv_timeout = max(1, int(arguments.timeout * 1000))
    if arguments.memory == ["pool"]:
        config.mem_pool_cfg = f'{{"memory_size": {sum(map(_pool_bytes, _workloads(arguments)))}}}'
    if cluster == _OWNER:
        config.listen_ip_info = "127.0.0.1:0"
    if arguments.transport:
        config.transport = arguments.transport
    engine = LLMDataDist(role, cluster)
    engine.init(config.generate_options())
    return engine


def _workloads(arguments: argparse.Namespace) -> list[Workload]:
    return [WORKLOADS[name] for name in arguments.workloads]


def _pool_bytes(workload: Workload) -> int:
    """Return what a workload's cache takes of a pool: each tensor has whole pages."""
    return workload.tensors * -(-workload.tensor_bytes // _POOL_PAGE) * _POOL_PAGE


@dataclass
class _Memory:
    """A workload's cache, and its tensors as arrays."""

    cache: Cache
    tensors: list[Bytes]

    @classmethod
    def of(cls, engine: LLMDataDist, workload: Workload, pool: bool, key: BlocksCacheKey | None = None) -> _Memory:
        """Take a cache from the pool, or register memory that numpy has. A row has no key: its id names it."""
        manager = engine.cache_manager
        desc = CacheDesc(workload.tensors, [workload.blocks, workload.block_bytes], DataType.DT_INT8)
        if pool:
            cache = manager.allocate_cache(desc) if workload.is_row else manager.allocate_blocks_cache(desc, key)
            bytes_ = ctypes.c_uint8 * workload.tensor_bytes
            return cls(cache, [np.ctypeslib.as_array(bytes_.from_address(addr)) for addr in cache.tensor_addrs])
        tensors = list(np.empty((workload.tensors, workload.tensor_bytes), dtype=np.uint8))
        addrs = [tensor.ctypes.data for tensor in tensors]
        if workload.is_row:
            return cls(manager.register_cache(desc, addrs), tensors)
        return cls(manager.register_blocks_cache(desc, addrs, key), tensors)


def _key(model: int) -> BlocksCacheKey:
    return BlocksCacheKey(_OWNER, model)


def _pattern(workload: Workload, model: int) -> Pattern:
    return Pattern(workload.tensor_bytes, model + 1)


def _owner(arguments: argparse.Namespace, reporter: Reporter) -> None:
    engine = _engine(arguments, LLMRole.PROMPT, _OWNER)
    kept = []  # registered memory must stay as long as its cache
    for model, workload in enumerate(_workloads(arguments)):
        memory = _Memory.of(engine, workload, arguments.memory == ["pool"], _key(model))
        pattern = _pattern(workload, model)
        for index, tensor in enumerate(memory.tensors):
            tensor[:] = pattern.tensor(index)
        kept.append(memory)
    ids = ",".join(str(memory.cache.cache_id) for memory in kept)
    reporter.send("ready", address=f"{engine.listen_address}/{ids}")
    while os.read(0, 1):  # until the parent has what it wants, or is gone
        pass
    engine.finalize()


def _puller(arguments: argparse.Namespace, reporter: Reporter) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    engine = _engine(arguments, LLMRole.DECODER, _PULLER)
    address, ids = arguments.address.split("/")
    transport = _link(engine, address, arguments.timeout)
    for model, (workload, owner_id) in enumerate(zip(_workloads(arguments), map(int, ids.split(",")))):
        bench = _Bench(engine, workload, arguments.memory == ["pool"], model, owner_id)
        wrong = bench.first_wrong()
        pulls, copies = bench.measure(arguments.rounds)
        wrong = wrong or bench.first_wrong()
        bench.release()
        figures = _figures(workload, pulls, copies)
        reporter.send("row", workload=workload.name, memory=arguments.memory[0], transport=transport, wrong=wrong, **figures)
    engine.finalize()
    reporter.send("end")


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    _told_to_end.wait(_UNHEARD_SECONDS)
    os._exit(1)  # it has not ended by itself


_told_to_end = threading.Event()  # never set: the process ends meanwhile
_UNHEARD_SECONDS = 4


def _link(engine: LLMDataDist, address: str, timeout: float) -> str:
    """Link to the owner and return the transport of the link."""
    host, port = address.rsplit(":", 1)
    cluster = LLMClusterInfo()
    cluster.remote_cluster_id = _OWNER
    cluster.append_local_ip_info(host, 0)
    cluster.append_remote_ip_info(host, int(port))
    code, _ = engine.link_clusters([cluster], timeout=int(timeout * 1000))
    explained = engine.explain(_OWNER)
    if code != LLMStatusCode.LLM_SUCCESS:
        raise LLMException(f"link_clusters failed: {explained}", status_code=code)
    said = dict(line.split(": ", 1) for line in explained.splitlines() if ": " in line)
    return said.get("transport", "unknown")


_Blocks = tuple[list[int], list[int]]  # those of the owner, and where they go


class _Bench:
    """One workload at the puller: the cache that is pulled into, and a copy of the owner's to take plain copies from."""

    def __init__(self, engine: LLMDataDist, workload: Workload, pool: bool, model: int, owner_id: int) -> None:
        self._manager = engine.cache_manager
        self._workload = workload
        self._pool = pool
        self._memory = _Memory.of(engine, workload, pool)
        self._source = list(np.ones((workload.tensors, workload.tensor_bytes), dtype=np.uint8))  # touched, as the owner's is
        self._pattern = _pattern(workload, model)
        self._row, self._blocks = CacheKeyByIdAndIndex(_OWNER, owner_id), _key(model)
        self._random = random.Random(_SEED)

    def _draw(self) -> _Blocks:
        every, count = range(self._workload.blocks), self._workload.per_call
        return self._random.sample(every, count), self._random.sample(every, count)

    def first_wrong(self) -> str | None:
        """Pull once, over bytes that are all wrong, and compare every byte of the cache."""
        sources, targets = blocks = self._draw()
        tensors = self._memory.tensors
        every = {index: index for index in range(len(tensors))}
        expectation = Expectation(self._pattern, every, self._workload.block_bytes, (sources, targets))
        expectation.poison(tensors)
        self._pull(blocks)
        return expectation.first_wrong(tensors)

    def measure(self, rounds: int) -> tuple[list[int], list[int]]:
        """Let copies and pulls take turns, and return the nanoseconds of each call of both."""
        pulls: list[int] = []
        copies: list[int] = []
        calls = self._workload.calls
        for _ in range(rounds):
            for call, into in ((self._copy, copies), (self._pull, pulls)):
                drawn = [self._draw() for _ in range(calls + -(-calls // _WARMUP))]
                into += [call(blocks) for blocks in drawn][-calls:]
        return pulls, copies

    def _pull(self, blocks: _Blocks) -> int:
        manager, cache, clock = self._manager, self._memory.cache, time.perf_counter_ns
        if self._workload.is_row:
            started = clock()
            manager.pull_cache(self._row, cache)
            return clock() - started
        sources, targets = blocks
        started = clock()
        manager.pull_blocks(self._blocks, cache, sources, targets)
        return clock() - started

    def _copy(self, blocks: _Blocks) -> int:
        sources = list(self._addresses(blocks[0], self._source))
        targets = list(self._addresses(blocks[1], self._memory.tensors))
        sizes = [self._workload.block_bytes] * len(sources)
        started = time.perf_counter_ns()
        collections.deque(map(ctypes.memmove, targets, sources, sizes), maxlen=0)  # the fastest loop that Python has
        return time.perf_counter_ns() - started

    def _addresses(self, blocks: list[int], tensors: list[Bytes]) -> Iterator[int]:
        size = self._workload.block_bytes
        for tensor in tensors:
            base = tensor.ctypes.data
            yield from (base + block * size for block in blocks)

    def release(self) -> None:
        """Give the cache back before its arrays go."""
        cache = self._memory.cache
        if not self._pool:
            self._manager.unregister_cache(cache.cache_id)
        elif self._workload.is_row:
            self._manager.deallocate_cache(cache)
        else:
            self._manager.deallocate_blocks_cache(cache)


def _figures(workload: Workload, pulls: list[int], copies: list[int]) -> dict[str, float | int]:
    pull, copy = statistics.median(pulls), statistics.median(copies)
    return {
        "segments": workload.segments,
        "bytes": workload.call_bytes,
        "calls": len(pulls),
        "p50_us": pull / 1e3,
        "p99_us": float(np.quantile(pulls, 0.99)) / 1e3,
        "gb_per_s": workload.call_bytes / pull,
        "copy_p50_us": copy / 1e3,
        "copy_gb_per_s": workload.call_bytes / copy,
        "ratio": copy / pull,
    }
