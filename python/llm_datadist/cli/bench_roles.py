# SPDX-License-Identifier: Apache-2.0
"""The two children of the benchmark: an owner that offers its caches, and a puller that takes the time of its pulls.

All caches are HOST memory, which plain copies can be measured in too, whatever DEVICE memory is.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import random
import statistics
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
    LLMDataDist,
    LLMRole,
    Placement,
)

from . import roles
from .bench import WORKLOADS
from .children import Reporter
from .pattern import Bytes, Expectation, Pattern
from .workloads import Workload

_OWNER, _PULLER = 1, 2  # cluster ids
_SEED = 20240  # the blocks of a run are those of every other


def run(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Play the role that the arguments name."""
    return roles.play({"owner": _owner, "puller": _puller}, arguments, reporter)


def _engine(arguments: argparse.Namespace, role: LLMRole, cluster: int, listens: bool = False) -> LLMDataDist:
    shapes = [workload.shape for workload in _workloads(arguments)] if _in_pool(arguments) else []
    pool = sum(roles.whole_pages(shape.tensors, shape.tensor_bytes) for shape in shapes)
    return roles.start_engine(arguments, role, cluster, host_pool=pool, listens=listens)


def _workloads(arguments: argparse.Namespace) -> list[Workload]:
    return [WORKLOADS[name] for name in arguments.workloads]


def _in_pool(arguments: argparse.Namespace) -> bool:
    return bool(arguments.memory == ["pool"])


@dataclass
class _Memory:
    """A workload's cache, and its tensors as arrays."""

    cache: Cache
    tensors: list[Bytes]

    @classmethod
    def of(cls, engine: LLMDataDist, workload: Workload, pool: bool, key: BlocksCacheKey | None = None) -> _Memory:
        """Take a cache from the pool, or register memory that numpy has. A row has no key: its id names it."""
        manager, shape = engine.cache_manager, workload.shape
        desc = CacheDesc(shape.tensors, [shape.blocks, shape.block_bytes], DataType.DT_INT8, Placement.HOST)
        if pool:
            cache = manager.allocate_cache(desc) if shape.is_row else manager.allocate_blocks_cache(desc, key)
            return cls(cache, [_array_at(addr, desc.size) for addr in cache.tensor_addrs])
        tensors = roles.own_memory(desc)
        addrs = roles.addresses(tensors)
        if shape.is_row:
            return cls(manager.register_cache(desc, addrs), tensors)
        return cls(manager.register_blocks_cache(desc, addrs, key), tensors)


def _array_at(addr: int, size: int) -> Bytes:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(addr))


def _key(model: int) -> BlocksCacheKey:
    return BlocksCacheKey(_OWNER, model)


def _pattern(workload: Workload, model: int) -> Pattern:
    return Pattern(workload.shape.tensor_bytes, model + 1)


def _owner(arguments: argparse.Namespace, reporter: Reporter) -> None:
    engine = _engine(arguments, LLMRole.PROMPT, _OWNER, listens=True)
    kept = []  # registered memory must stay as long as its cache
    for model, workload in enumerate(_workloads(arguments)):
        memory = _Memory.of(engine, workload, _in_pool(arguments), _key(model))
        _pattern(workload, model).fill(memory.tensors)
        kept.append(memory)
    ids = ",".join(str(memory.cache.cache_id) for memory in kept)
    reporter.send("ready", address=f"{engine.listen_address}/{ids}")
    roles.wait_for_end()
    engine.finalize()


def _puller(arguments: argparse.Namespace, reporter: Reporter) -> None:
    engine = _engine(arguments, LLMRole.DECODER, _PULLER)
    address, ids = arguments.address.split("/")
    roles.link(arguments, engine, _OWNER, address)
    transport = _transport(engine)
    for model, (workload, owner_id) in enumerate(zip(_workloads(arguments), map(int, ids.split(",")))):
        bench = _Bench(engine, workload, _in_pool(arguments), model, owner_id)
        wrong = bench.first_wrong()
        pulls, copies = bench.measure(arguments.rounds)
        wrong = wrong or bench.first_wrong()
        bench.release()
        figures = _figures(workload, pulls, copies)
        reporter.send("row", workload=workload.name, memory=arguments.memory[0], transport=transport, wrong=wrong, **figures)
    engine.finalize()
    reporter.send("end")


def _transport(engine: LLMDataDist) -> str:
    """Return the transport of the link to the owner."""
    said = dict(line.split(": ", 1) for line in engine.explain(_OWNER).splitlines() if ": " in line)
    return said.get("transport", "unknown")


_Blocks = tuple[list[int], list[int]]  # those of the owner, and where they go


class _Bench:
    """One workload at the puller: the cache that is pulled into, and a copy of the owner's to take plain copies from."""

    def __init__(self, engine: LLMDataDist, workload: Workload, pool: bool, model: int, owner_id: int) -> None:
        shape = workload.shape
        self._manager = engine.cache_manager
        self._workload = workload
        self._shape = shape
        self._pool = pool
        self._memory = _Memory.of(engine, workload, pool)
        self._source = list(np.ones((shape.tensors, shape.tensor_bytes), dtype=np.uint8))  # touched, as the owner's is
        self._pattern = _pattern(workload, model)
        self._row, self._blocks = CacheKeyByIdAndIndex(_OWNER, owner_id), _key(model)
        self._random = random.Random(_SEED)

    def _draw(self) -> _Blocks:
        every, count = range(self._shape.blocks), self._workload.per_call
        return self._random.sample(every, count), self._random.sample(every, count)

    def first_wrong(self) -> str | None:
        """Pull once, over bytes that are all wrong, and compare every byte of the cache."""
        sources, targets = blocks = self._draw()
        tensors = self._memory.tensors
        every = {index: index for index in range(len(tensors))}
        expectation = Expectation(self._pattern, every, self._shape.block_bytes, (sources, targets))
        expectation.poison(tensors)
        self._pull(blocks)
        return expectation.first_wrong(tensors)

    def measure(self, rounds: int) -> tuple[list[int], list[int]]:
        """Let copies and pulls take turns, and return the nanoseconds of each call of both."""
        pulls: list[int] = []
        copies: list[int] = []
        warmup, calls = self._workload.warmup, self._workload.calls
        for _ in range(rounds):
            for call, into in ((self._copy, copies), (self._pull, pulls)):
                drawn = [self._draw() for _ in range(warmup + calls)]
                into += [call(blocks) for blocks in drawn][-calls:]
        return pulls, copies

    def _pull(self, blocks: _Blocks) -> int:
        manager, cache, clock = self._manager, self._memory.cache, time.perf_counter_ns
        if self._shape.is_row:
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
        sizes = [self._shape.block_bytes] * len(sources)
        started = time.perf_counter_ns()
        collections.deque(map(ctypes.memmove, targets, sources, sizes), maxlen=0)  # the fastest loop that Python has
        return time.perf_counter_ns() - started

    def _addresses(self, blocks: list[int], tensors: list[Bytes]) -> Iterator[int]:
        size = self._shape.block_bytes
        for tensor in tensors:
            base = tensor.ctypes.data
            yield from (base + block * size for block in blocks)

    def release(self) -> None:
        """Give the cache back before its arrays go."""
        cache = self._memory.cache
        if not self._pool:
            self._manager.unregister_cache(cache.cache_id)
        elif self._shape.is_row:
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
