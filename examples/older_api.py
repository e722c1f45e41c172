# SPDX-License-Identifier: Apache-2.0
"""The older API, llm_datadist_v1: a prompt that listens and binds keys, and a decoder that links and pulls.

Caches live in DEVICE memory of the engine's, of which ge.flowGraphMemMaxSize says how much there is. A pull releases its key, and
with the last one the memory of a cache that was deallocated.
"""

from __future__ import annotations

import sys
from multiprocessing.connection import Connection

import common
import numpy as np

from llm_datadist_v1 import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    DataType,
    KvCache,
    KvCacheManager,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Placement,
)

PROMPT, DECODER = 0, 0  # cluster ids; in this API both ends may have the same
ROWS = CacheDesc(8, [2, 128, 8, 64], DataType.DT_FLOAT16)
BLOCKS = CacheDesc(8, [16, 16, 8, 64], DataType.DT_FLOAT16)
SRC, DST = [2, 3, 5, 7], [15, 14, 13, 0]
MEMORY_BYTES = 64 << 20


def start(role: LLMRole, cluster_id: int, listen: str | None = None) -> LLMDataDist:
    config = LLMConfig()
    config.device_id = 0
    config.sync_kv_timeout = 10_000  # ms
    config.ge_options = {"ge.flowGraphMemMaxSize": str(MEMORY_BYTES)}
    if listen:
        config.listen_ip_info = listen
    engine = LLMDataDist(role, cluster_id)
    engine.init(config.generate_options())
    return engine


def write(manager: KvCacheManager, cache: KvCache, arrays: list[np.ndarray]) -> None:
    """Copy arrays into a cache. swap_blocks calls rows blocks too."""
    manager.swap_blocks(on_host(cache.cache_desc, arrays), cache, {block: block for block in range(cache.cache_desc.shape[0])})


def read(manager: KvCacheManager, cache: KvCache) -> list[np.ndarray]:
    """Return a copy of what lies in a cache."""
    arrays = common.zeros(cache.cache_desc)
    manager.swap_blocks(cache, on_host(cache.cache_desc, arrays), {block: block for block in range(cache.cache_desc.shape[0])})
    return arrays


def on_host(desc: CacheDesc, arrays: list[np.ndarray]) -> KvCache:
    return KvCache.create_cpu_cache(
        CacheDesc(desc.num_tensors, desc.shape, desc.data_type, Placement.HOST), common.addresses(arrays)
    )


def prompt(decoder: Connection) -> None:
    address = f"127.0.0.1:{common.free_port()}"
    engine = start(LLMRole.PROMPT, PROMPT, listen=address)
    manager = engine.kv_cache_manager
    rows = manager.allocate_cache(ROWS, [CacheKey(PROMPT, req_id=1), CacheKey(PROMPT, req_id=2)])
    blocks = manager.allocate_blocks_cache(BLOCKS, BlocksCacheKey(PROMPT, model_id=1))
    for cache, seed in ((rows, 1), (blocks, 2)):
        write(manager, cache, common.random_kv(cache.cache_desc, seed))
    decoder.send(address)
    decoder.recv()
    manager.deallocate_cache(rows)
    manager.deallocate_cache(blocks)
    engine.finalize()


def decoder(prompt: Connection) -> None:
    address = prompt.recv()
    ip, port = address.split(":")
    engine = start(LLMRole.DECODER, DECODER)
    cluster = LLMClusterInfo()
    cluster.remote_cluster_id = PROMPT
    cluster.append_local_ip_info("127.0.0.1", 0)
    cluster.append_remote_ip_info(ip, int(port))
    code, _ = engine.link_clusters([cluster], 10_000)
    if code != LLMStatusCode.LLM_SUCCESS:
        sys.exit(f"link_clusters: {code}")
    engine.check_link_status(PROMPT)  # raises where the link is not usable

    manager = engine.kv_cache_manager
    rows = manager.allocate_cache(ROWS)
    manager.pull_cache(CacheKey(PROMPT, req_id=2), rows, 0)
    manager.pull_cache(CacheKey(PROMPT, req_id=1), rows, 1)
    common.verify("two rows, exchanged", read(manager, rows), [tensor[::-1] for tensor in common.random_kv(ROWS, seed=1)])
    try:
        manager.pull_cache(CacheKey(PROMPT, req_id=1), rows, 0)
    except LLMException as exe:
        if exe.status_code != LLMStatusCode.LLM_KV_CACHE_NOT_EXIST:
            raise
        print(f"row 1 again: {exe.status_code}, as the pull has released the key")
    else:
        sys.exit("a released key was pulled again")

    blocks = manager.allocate_blocks_cache(BLOCKS)
    wanted = read(manager, blocks)
    manager.pull_blocks(BlocksCacheKey(PROMPT, model_id=1), blocks, SRC, DST)
    manager.copy_blocks(blocks, {DST[0]: [1, 2]})
    for tensor, source in zip(wanted, common.random_kv(BLOCKS, seed=2)):
        tensor[DST] = source[SRC]
        tensor[[1, 2]] = source[SRC[0]]
    common.verify("four blocks, and two copies of the first", read(manager, blocks), wanted)

    manager.deallocate_cache(rows)
    manager.deallocate_cache(blocks)
    engine.unlink_clusters([cluster], 5000)
    prompt.send("done")
    engine.finalize()


if __name__ == "__main__":
    common.run(prompt, decoder)
