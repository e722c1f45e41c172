# SPDX-License-Identifier: Apache-2.0
"""Pull a contiguous row into blocks: the prefill keeps a request in one piece, the decode process pages it.

The row is cut into pieces as long as a block here; piece i goes to the i-th of the listed blocks. The row is HOST memory, the
blocks are DEVICE memory.
"""

from __future__ import annotations

from multiprocessing.connection import Connection

import common

from llm_datadist import CacheDesc, CacheKey, DataType, LLMRole, Placement

PREFILL, DECODE = 1, 2  # cluster ids
TENSORS, TOKENS, BLOCK_TOKENS, TOKEN = 8, 250, 16, (8, 64)
ROW = CacheDesc(TENSORS, [1, TOKENS, *TOKEN], DataType.DT_FLOAT16, Placement.HOST)
BLOCKS = CacheDesc(TENSORS, [40, BLOCK_TOKENS, *TOKEN], DataType.DT_FLOAT16)


def prefill(decode: Connection) -> None:
    engine = common.start_engine(LLMRole.PROMPT, PREFILL, listen_ip_info="127.0.0.1:0")
    memory = common.random_kv(ROW, seed=1)
    cache = engine.cache_manager.register_cache(ROW, common.addresses(memory), [CacheKey(PREFILL, req_id=7)])
    decode.send(engine.listen_address)
    decode.recv()
    engine.cache_manager.unregister_cache(cache.cache_id)
    engine.finalize()


def decode(prefill: Connection) -> None:
    engine = common.start_engine(LLMRole.DECODER, DECODE, mem_pool_cfg=common.POOL)
    cluster = common.link(engine, PREFILL, prefill.recv())
    manager = engine.cache_manager
    cache = manager.allocate_blocks_cache(BLOCKS)
    common.write(manager, cache, common.zeros(BLOCKS))

    table = list(range(30, 30 - -(-TOKENS // BLOCK_TOKENS), -1))  # 16 blocks, from block 30 downwards
    manager.pull_blocks(CacheKey(PREFILL, req_id=7), cache, dst_blocks=table)

    wanted = common.zeros(BLOCKS)
    for tensor, row in zip(wanted, common.random_kv(ROW, seed=1)):
        for piece, block in enumerate(table):
            tokens = row[0, piece * BLOCK_TOKENS :][:BLOCK_TOKENS]  # the last piece is shorter
            tensor[block, : len(tokens)] = tokens
    common.verify(f"a row of {TOKENS} tokens in {len(table)} blocks", common.read(manager, cache), wanted)

    manager.deallocate_blocks_cache(cache)
    engine.unlink_clusters([cluster], timeout=5000)
    prefill.send("done")
    engine.finalize()


if __name__ == "__main__":
    common.run(prefill, decode)
