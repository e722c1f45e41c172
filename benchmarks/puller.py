# SPDX-License-Identifier: Apache-2.0
"""The process that pulls, and takes the time. It waits for commands; each names a workload by its fields."""

from __future__ import annotations

import random
import sys
import threading
import time
from typing import Any, Callable

from ends import OWNER, PULLER, Setting, Talk, begin, cpu_seconds, desc_of, private_tensors
from workloads import Shape, Workload, first_wrong

from llm_datadist import BlocksCacheKey, CacheKeyByIdAndIndex, LLMClusterInfo, LLMDataDist, LLMRole, LLMStatusCode

_UNTOUCHED = 0xEEEEEEEEEEEEEEEE
_LINK_MILLIS = 10000
_BOUNDARY_CALLS = 20000

Blocks = tuple[list[int], list[int]]  # those of the owner, and where they go


def main() -> None:
    setting, talk = Setting.load(sys.argv[1]), Talk()
    engine = begin(setting, talk, LLMRole.DECODER, PULLER)
    if engine is None:
        return
    talk.say(ready=True)
    commands = talk.commands()
    offered = next(commands)
    link(engine, offered["address"])
    targets = [Target(engine, shape, model, offered["ids"][model]) for model, shape in enumerate(setting.shapes)]
    talk.say(explain=engine.explain(OWNER))
    for command in commands:
        talk.say(**answer(targets, command))
    engine.finalize()


def link(engine: LLMDataDist, address: str) -> None:
    ip, port = address.split(":")
    cluster = LLMClusterInfo()
    cluster.remote_cluster_id = OWNER
    cluster.append_local_ip_info(ip, 0)
    cluster.append_remote_ip_info(ip, int(port))
    code, _ = engine.link_clusters([cluster], _LINK_MILLIS)
    if code != LLMStatusCode.LLM_SUCCESS:
        sys.exit(f"link_clusters: {code}: {engine.explain(OWNER)}")


def answer(targets: list[Target], command: dict[str, Any]) -> dict[str, Any]:
    """Do what a command says and return what it asks for."""
    verb = command.pop("do")
    if verb == "cpu":
        return {"cpu": cpu_seconds()}
    target: Target = targets[int(command.pop("model"))]
    if verb == "boundary":
        return {"micros": target.boundary()}
    callers = command.pop("callers", None)
    workload = Workload(**{**command, "shape": target.shape})
    if verb == "verify":
        return {"wrong": target.first_wrong(workload)}
    return target.round(workload) if callers is None else target.together(workload, callers)


class Target:
    """A cache of this process's, and the name of the owner's cache that is pulled into it."""

    def __init__(self, engine: LLMDataDist, shape: Shape, model: int, owner_id: int) -> None:
        self.shape = shape
        self._manager = engine.cache_manager
        self._tensors = private_tensors(shape)
        for words in self._tensors:
            words.fill(_UNTOUCHED)
        addrs = [words.ctypes.data for words in self._tensors]
        register = self._manager.register_cache if shape.is_row else self._manager.register_blocks_cache
        self._cache = register(desc_of(shape), addrs)
        self._row, self._blocks = CacheKeyByIdAndIndex(OWNER, owner_id), BlocksCacheKey(OWNER, model)
        self._random = random.Random(1)

    def draw(self, workload: Workload, caller: int = 0, callers: int = 1) -> Blocks:
        """Draw the blocks of a call. No two callers write to the same one."""
        own = self.shape.blocks // callers
        return (
            self._random.sample(range(self.shape.blocks), workload.per_call),
            self._random.sample(range(caller * own, (caller + 1) * own), workload.per_call),
        )

    def caller(self, workload: Workload) -> Callable[[Blocks], int]:
        """Return a function that makes one call and returns the nanoseconds that it took."""
        clock, cache = time.perf_counter_ns, self._cache
        pull_row, pull, row, key = self._manager.pull_cache, self._manager.pull_blocks, self._row, self._blocks

        def call_row(_: Blocks) -> int:
            started = clock()
            pull_row(row, cache)
            return clock() - started

        def call_all(blocks: Blocks) -> int:
            sources, targets = blocks
            started = clock()
            pull(key, cache, sources, targets)
            return clock() - started

        some = range(workload.tensors)

        def call_some(blocks: Blocks) -> int:
            sources, targets = blocks
            started = clock()
            pull(key, cache, sources, targets, src_layer_range=some, dst_layer_range=some, tensor_num_per_layer=1)
            return clock() - started

        if self.shape.is_row:
            return call_row
        return call_some if workload.tensors else call_all

    def round(self, workload: Workload) -> dict[str, Any]:
        """Make the calls of a round. Blocks are drawn before."""
        call = self.caller(workload)
        drawn = [self.draw(workload) for _ in range(workload.warmup + workload.calls)]
        started = time.perf_counter()
        nanos = [call(blocks) for blocks in drawn]
        return {"nanos": nanos[workload.warmup :], "seconds": time.perf_counter() - started}

    def together(self, workload: Workload, callers: int) -> dict[str, Any]:
        """Make the calls of a round from each of so many threads, all at once. Warm-up calls come before and are not counted."""
        call = self.caller(workload)
        for _ in range(workload.warmup):
            call(self.draw(workload))
        drawn = [[self.draw(workload, caller, callers) for _ in range(workload.calls)] for caller in range(callers)]
        return together(call, drawn)

    def first_wrong(self, workload: Workload) -> str | None:
        """Overwrite this side, pull once and compare what has arrived."""
        for words in self._tensors:
            words.fill(_UNTOUCHED)
        blocks = self.draw(workload)
        self.caller(workload)(blocks)
        return first_wrong(workload, self._tensors, *blocks)

    def boundary(self) -> float:
        """Return the microseconds of a one-block pull_blocks without its transfer: checks, packing, crossing and back."""
        engine = self._manager._engine
        pull, engine._pull = engine._pull, engine._native.pyext_PullNothing
        try:
            call = self.caller(Workload("boundary", self.shape, 1, 0, _BOUNDARY_CALLS))
            nanos = sorted(call(([index & 511], [index & 255])) for index in range(_BOUNDARY_CALLS))
        finally:
            engine._pull = pull
        return nanos[len(nanos) // 2] / 1e3


def together(call: Callable[[Blocks], int], drawn: list[list[Blocks]]) -> dict[str, Any]:
    """Make calls from a thread for each list."""
    nanos: list[list[int]] = [[] for _ in drawn]
    begun = threading.Barrier(len(drawn) + 1)

    def run(index: int) -> None:
        begun.wait()
        nanos[index] = [call(blocks) for blocks in drawn[index]]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(drawn))]
    for thread in threads:
        thread.start()
    begun.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if not all(nanos):
        sys.exit("a caller has failed, see above")
    return {"nanos": [one for each in nanos for one in each], "seconds": seconds}


if __name__ == "__main__":
    main()
