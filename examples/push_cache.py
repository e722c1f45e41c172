# SPDX-License-Identifier: Apache-2.0
"""Push a contiguous cache: the prefill process puts rows into a cache of the decode process. Both lie on the device.

Pushes by cache id need one-sided mode (enable_remote_cache_accessible) at both ends. It does not matter which end has linked:
here it is the decode process, and the prefill pushes over that link.
"""

from __future__ import annotations

from multiprocessing.connection import Connection

import common

from llm_datadist import CacheDesc, CacheKeyByIdAndIndex, DataType, LLMRole

PREFILL, DECODE = 1, 2  # cluster ids
LAYERS = 4
ROWS = CacheDesc(2 * LAYERS, [2, 256, 8, 64], DataType.DT_FLOAT16)  # K and V: requests, tokens, heads, dimensions of a head


def prefill(decode: Connection) -> None:
    engine = common.start_engine(
        LLMRole.PROMPT, PREFILL, listen_ip_info="127.0.0.1:0", mem_pool_cfg=common.POOL, enable_remote_cache_accessible=True
    )
    manager = engine.cache_manager
    cache = manager.allocate_cache(ROWS)
    common.write(manager, cache, common.random_kv(ROWS, seed=1))
    decode.send(engine.listen_address)
    cache_id = decode.recv()  # the decode process has linked

    # Row 0 goes to row 1 there; of row 1 the first two layers go to the last two of row 0.
    manager.push_cache(CacheKeyByIdAndIndex(DECODE, cache_id, batch_index=1), cache)
    manager.push_cache(
        CacheKeyByIdAndIndex(DECODE, cache_id, batch_index=0),
        cache,
        src_batch_index=1,
        src_layer_range=range(2),
        dst_layer_range=range(2, 4),
    )
    decode.send("pushed")
    decode.recv()
    manager.deallocate_cache(cache)
    engine.finalize()


def decode(prefill: Connection) -> None:
    engine = common.start_engine(LLMRole.DECODER, DECODE, mem_pool_cfg=common.POOL, enable_remote_cache_accessible=True)
    manager = engine.cache_manager
    cache = manager.allocate_cache(ROWS)
    common.write(manager, cache, common.zeros(ROWS))
    cluster = common.link(engine, PREFILL, prefill.recv())
    prefill.send(cache.cache_id)
    prefill.recv()

    wanted = common.zeros(ROWS)
    sent = common.random_kv(ROWS, seed=1)
    for tensor in range(ROWS.num_tensors):
        wanted[tensor][1] = sent[tensor][0]
    for tensor in range(4):
        wanted[4 + tensor][0] = sent[tensor][1]
    common.verify("a row, and two layers of another one", common.read(manager, cache), wanted)
    engine.unlink_clusters([cluster], timeout=5000)
    prefill.send("done")
    engine.finalize()


if __name__ == "__main__":
    common.run(prefill, decode)
