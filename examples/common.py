# SPDX-License-Identifier: Apache-2.0
"""What the examples share: their processes, an engine, a link, numpy arrays, and how these get into DEVICE caches and back.

The processes of an example tell each other what a serving framework sends by ways of its own (addresses, lists of blocks, "done")
over the connections of multiprocessing; the KV cache itself moves through llm_datadist only.
"""

from __future__ import annotations

import multiprocessing
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from llm_datadist import Cache, CacheDesc, LLMClusterInfo, LLMConfig, LLMDataDist, LLMRole, LLMStatusCode, Placement
from llm_datadist.v2.cache_manager import CacheManager

POOL = '{"memory_size": 67108864}'  # mem_pool_cfg: bytes of DEVICE memory that caches are allocated from
_DEADLINE_SECONDS = 90

# Processes are started anew and not forked: an engine does not live on in a forked child.
_processes = multiprocessing.get_context("spawn")


def run(prefill: Callable[..., None], decode: Callable[..., None], *args: Any) -> None:
    """Call the two functions in two processes, each with a connection to the other one, and args."""
    ends = _processes.Pipe()
    _together([(prefill, (ends[0], *args)), (decode, (ends[1], *args))], ends)


def run_many(
    prefill: Callable[[int, list[Connection]], None], decode: Callable[[int, list[Connection]], None], prefills: int, decodes: int
) -> None:
    """Run several processes of each kind. Each gets its number and its connections to all of the other kind, by their numbers."""
    pipes = [[_processes.Pipe() for _ in range(decodes)] for _ in range(prefills)]
    calls: list[Any] = [(prefill, (number, [ends[0] for ends in pipes[number]])) for number in range(prefills)]
    calls += [(decode, (number, [row[number][1] for row in pipes])) for number in range(decodes)]
    _together(calls, [end for row in pipes for ends in row for end in ends])


def _together(calls: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], connections: Sequence[Connection]) -> None:
    """Call each function in a process of its own and wait for all. Where one fails, the others are killed: the example fails."""
    processes = [_processes.Process(target=function, args=args) for function, args in calls]
    for process in processes:
        process.start()
    for connection in connections:
        connection.close()  # the children have theirs: with ours open they would not see one another end
    good = _all_end_well(processes)
    for process in processes:
        process.kill()
        process.join()
    name = Path(sys.argv[0]).name
    if not good:
        sys.exit(f"{name}: FAILED")
    print(f"{name}: everything was verified", flush=True)


def _all_end_well(processes: Sequence[Any]) -> bool:
    running = {process.sentinel: process for process in processes}
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while running:
        ended = wait(list(running), deadline - time.monotonic())
        for process in [running.pop(sentinel) for sentinel in ended]:
            process.join()
            if process.exitcode != 0:
                return False
        if not ended:
            return False
    return True


def start_engine(role: LLMRole, cluster_id: int, **settings: Any) -> LLMDataDist:
    """Return an engine that is initialized. settings are further properties of LLMConfig."""
    config = LLMConfig()
    config.device_id = 0
    config.enable_cache_manager = True
    config.sync_kv_timeout = 10_000  # ms that one transfer may take
    for name, value in settings.items():
        setattr(config, name, value)
    engine = LLMDataDist(role, cluster_id)
    engine.init(config.generate_options())
    return engine


def cluster(cluster_id: int, address: str) -> LLMClusterInfo:
    """Return how the engine that listens at an address ("ip:port") is linked to."""
    ip, port = address.split(":")
    info = LLMClusterInfo()
    info.remote_cluster_id = cluster_id
    info.append_local_ip_info("127.0.0.1", 0)
    info.append_remote_ip_info(ip, int(port))
    return info


def link(engine: LLMDataDist, cluster_id: int, address: str) -> LLMClusterInfo:
    """Link to an engine, or end the process with what explain knows. Return what unlink_clusters needs."""
    info = cluster(cluster_id, address)
    code, _ = engine.link_clusters([info], timeout=10_000)
    if code != LLMStatusCode.LLM_SUCCESS:
        sys.exit(f"link_clusters: {code}: {engine.explain(cluster_id)}")
    return info


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def random_kv(desc: CacheDesc, seed: int) -> list[np.ndarray]:
    """Return arrays of float16 for the tensors of a cache, with the content that belongs to seed."""
    random = np.random.default_rng(seed)
    return [random.standard_normal(desc.shape, np.float32).astype(np.float16) for _ in range(desc.num_tensors)]


def zeros(desc: CacheDesc) -> list[np.ndarray]:
    """Return arrays of float16 zeros for the tensors of a cache."""
    return [np.zeros(desc.shape, np.float16) for _ in range(desc.num_tensors)]


def addresses(arrays: list[np.ndarray]) -> list[int]:
    """Return where arrays are. They must stay alive as long as they are registered: the engine has only their addresses."""
    return [array.ctypes.data for array in arrays]


def write(
    manager: CacheManager, cache: Cache, arrays: list[np.ndarray], first: int = 0, blocks: Sequence[int] | None = None
) -> None:
    """Copy arrays into the tensors of a DEVICE cache from number first on: all blocks or rows of them, or those that are listed.

    Only the engine can do that: DEVICE memory may be an NPU's, which this process can't touch.
    """
    host, device = _as_blocks(cache, arrays, first)
    manager.swap_blocks(host, device, {block: block for block in (_every_block(cache) if blocks is None else blocks)})


def read(manager: CacheManager, cache: Cache) -> list[np.ndarray]:
    """Return a copy of what lies in a DEVICE cache."""
    arrays = zeros(cache.cache_desc)
    host, device = _as_blocks(cache, arrays, 0)
    manager.swap_blocks(device, host, {block: block for block in _every_block(cache)})
    return arrays


def _every_block(cache: Cache) -> range:
    return range(cache.cache_desc.shape[0])


def _as_blocks(cache: Cache, arrays: list[np.ndarray], first: int) -> tuple[Cache, Cache]:
    """Return arrays, and as many tensors of a cache, for swap_blocks. It goes by addresses alone, and takes rows for blocks."""
    desc = cache.cache_desc
    host = CacheDesc(len(arrays), desc.shape, desc.data_type, Placement.HOST)
    device = CacheDesc(len(arrays), desc.shape, desc.data_type)
    tensors = cache.tensor_addrs[first : first + len(arrays)]
    return Cache.create_cpu_cache(host, addresses(arrays)), Cache(cache.cache_id, device, tensors, None, False, True)


def verify(what: str, found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> None:
    """Compare shapes, types and every byte of arrays, and print that they agree or end the process."""
    forms = [[(array.shape, array.dtype) for array in arrays] for arrays in (found, wanted)]
    if forms[0] != forms[1]:
        sys.exit(f"{what}: WRONG, {forms[0]} are not {forms[1]}")
    wrong = sum(int(np.count_nonzero(a.view(np.uint8) != b.view(np.uint8))) for a, b in zip(found, wanted))
    if wrong:
        sys.exit(f"{what}: WRONG, {wrong} bytes differ")
    print(f"{what}: {sum(array.nbytes for array in wanted):,} bytes verified", flush=True)
