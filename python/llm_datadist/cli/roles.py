# SPDX-License-Identifier: Apache-2.0
"""What the children of all verbs do alike: how a role is played to its end, its engine, its link, the memory of its caches."""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable, Mapping

import numpy as np

from llm_datadist import (
    Cache,
    CacheDesc,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Placement,
)
from llm_datadist.v2.cache_manager import CacheManager

from .children import Reporter
from .pattern import Bytes

Role = Callable[[argparse.Namespace, Reporter], None]

_LISTEN = "127.0.0.1:0"  # at any port; both children are on this machine
_POOL_PAGE = 64 << 10  # of a memory pool, as LLMConfig.mem_pool_cfg has it where it says nothing
_UNHEARD_SECONDS = 4  # who was told to end and does not by then is made to; less than the parent waits


def play(roles: Mapping[str, Role], arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Play the role that the arguments name, report where it fails, and return the exit status."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        roles[arguments.role](arguments, reporter)
    except LLMException as exc:
        reporter.send("failed", text=f"{exc.status_code}: {exc}")
        return 1
    except MemoryError as exc:
        reporter.send("failed", text=f"out of memory: {exc}")
        return 1
    return 0


_told_to_end = threading.Event()


def wait_for_end() -> None:
    """Wait until the parent has what it wants, or is gone."""
    _told_to_end.wait()


def _end_with_parent() -> None:
    """Wait for the end of standard input, which is how the parent tells, or is found to be gone."""
    while os.read(0, 1):  # not sys.stdin: its lock would be held at exit
        pass
    _told_to_end.set()
    time.sleep(_UNHEARD_SECONDS)
    os._exit(1)  # whoever is busy for so long does not end by itself


def start_engine(
    arguments: argparse.Namespace,
    role: LLMRole,
    cluster_id: int,
    *,
    device_pool: int = 0,
    host_pool: int = 0,
    listens: bool = False,
) -> LLMDataDist:
    """Return an engine that is initialized: with each memory pool whose bytes are not 0."""
    config = LLMConfig()
    config.device_id = 0
    config.enable_cache_manager = True
    config.sync_kv_timeout = timeout_millis(arguments)
    if device_pool:
        config.mem_pool_cfg = f'{{"memory_size": {device_pool}}}'
    if host_pool:
        config.host_mem_pool_cfg = f'{{"memory_size": {host_pool}}}'
    if listens:
        config.listen_ip_info = _LISTEN
    if arguments.transport:
        config.transport = arguments.transport
    engine = LLMDataDist(role, cluster_id)
    engine.init(config.generate_options())
    return engine


def timeout_millis(arguments: argparse.Namespace) -> int:
    """Return what one step may take. It is at least 1, as --timeout is at least 0.001."""
    return int(arguments.timeout * 1000)


def link(arguments: argparse.Namespace, engine: LLMDataDist, cluster_id: int, address: str) -> LLMClusterInfo:
    """Link to the cluster that listens at an address. The exception where that fails tells what explain knows."""
    host, port = address.rsplit(":", 1)
    cluster = LLMClusterInfo()
    cluster.remote_cluster_id = cluster_id
    cluster.append_local_ip_info(host, 0)
    cluster.append_remote_ip_info(host, int(port))
    code, _ = engine.link_clusters([cluster], timeout=timeout_millis(arguments))
    if code != LLMStatusCode.LLM_SUCCESS:
        raise LLMException(f"link_clusters failed: {engine.explain(cluster_id)}", status_code=code)
    return cluster


def whole_pages(tensors: int, tensor_bytes: int) -> int:
    """Return the bytes that a cache takes of a pool: each tensor has whole pages."""
    return tensors * -(-tensor_bytes // _POOL_PAGE) * _POOL_PAGE


def own_memory(desc: CacheDesc) -> list[Bytes]:
    """Return arrays for a cache: to be registered as HOST memory, which they have to outlive, or to be copied to and from it."""
    return list(np.empty((desc.num_tensors, desc.size), dtype=np.uint8))


def write(manager: CacheManager, cache: Cache, tensors: list[Bytes]) -> None:
    """Copy arrays into a DEVICE cache. Nothing else than the engine may: it may be memory that the host can't touch."""
    every, host, device = _to_swap(cache, tensors)
    manager.swap_blocks(host, device, every)


def read(manager: CacheManager, cache: Cache, tensors: list[Bytes]) -> None:
    """Copy a DEVICE cache into arrays."""
    every, host, device = _to_swap(cache, tensors)
    manager.swap_blocks(device, host, every)


def _to_swap(cache: Cache, tensors: list[Bytes]) -> tuple[dict[int, int], Cache, Cache]:
    """Return what swap_blocks takes. It goes by addresses alone: the row of a contiguous cache is a block as any other."""
    desc = cache.cache_desc
    on_host = CacheDesc(desc.num_tensors, desc.shape, desc.data_type, Placement.HOST)
    device = Cache(cache.cache_id, desc, cache.tensor_addrs, None, False, True)
    return {index: index for index in range(desc.shape[0])}, Cache.create_cpu_cache(on_host, addresses(tensors)), device


def addresses(tensors: list[Bytes]) -> list[int]:
    return [tensor.ctypes.data for tensor in tensors]
