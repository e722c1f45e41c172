# SPDX-License-Identifier: Apache-2.0
"""Pull contiguous caches: by key, by cache id, and some layers of one.

The prefill process allocates a cache of two rows from its pool, one row for each request. The decode process registers numpy
arrays, which are HOST memory, and pulls a row into them. A pull by key releases the key of an allocated cache: the request has
moved.
"""

from __future__ import annotations

import sys
from multiprocessing.connection import Connection

import common

from llm_datadist import (
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Placement,
)

PREFILL, DECODE = 1, 2  # cluster ids
LAYERS = 4
ROWS = CacheDesc(2 * LAYERS, [2, 256, 8, 64], DataType.DT_FLOAT16)  # K and V: requests, tokens, heads, dimensions of a head
ROW = CacheDesc(2 * LAYERS, [1, 256, 8, 64], DataType.DT_FLOAT16, Placement.HOST)


def prefill(decode: Connection) -> None:
    engine = common.start_engine(LLMRole.PROMPT, PREFILL, listen_ip_info="127.0.0.1:0", mem_pool_cfg=common.POOL)
    manager = engine.cache_manager
    cache = manager.allocate_cache(ROWS, [CacheKey(PREFILL, req_id=10), CacheKey(PREFILL, req_id=11)])
    common.write(manager, cache, common.random_kv(ROWS, seed=1))
    decode.send((engine.listen_address, cache.cache_id))
    decode.recv()  # the decode process has all it wants
    manager.deallocate_cache(cache)
    engine.finalize()


def decode(prefill: Connection) -> None:
    address, cache_id = prefill.recv()
    engine = common.start_engine(LLMRole.DECODER, DECODE)
    cluster = common.link(engine, PREFILL, address)
    manager = engine.cache_manager
    sent = common.random_kv(ROWS, seed=1)

    memory = common.zeros(ROW)
    cache = manager.register_cache(ROW, common.addresses(memory))
    manager.pull_cache(CacheKeyByIdAndIndex(PREFILL, cache_id, batch_index=0), cache)
    common.verify("row 0 by cache id", memory, [tensor[:1] for tensor in sent])

    # Layers 2 and 3 of the prefill go to layers 0 and 1 here; 2 and 3 stay as they are.
    before = [tensor.copy() for tensor in memory]
    manager.pull_cache(CacheKey(PREFILL, req_id=11), cache, src_layer_range=range(2, 4), dst_layer_range=range(2))
    common.verify("two layers of row 1", memory, [tensor[1:] for tensor in sent[4:]] + before[4:])

    manager.pull_cache(CacheKey(PREFILL, req_id=11), cache)
    common.verify("row 1 by key", memory, [tensor[1:] for tensor in sent])
    try:
        manager.pull_cache(CacheKey(PREFILL, req_id=11), cache)
    except LLMException as exe:
        print(f"row 1 again: {exe.status_code}, as the pull has released the key")
        if exe.status_code != LLMStatusCode.LLM_KV_CACHE_NOT_EXIST:
            sys.exit(str(exe))
    else:
        sys.exit("a released key was pulled again")

    manager.unregister_cache(cache.cache_id)  # before the arrays go
    engine.unlink_clusters([cluster], timeout=5000)
    prefill.send("done")
    engine.finalize()


if __name__ == "__main__":
    common.run(prefill, decode)
