# SPDX-License-Identifier: Apache-2.0
"""Push blocks: the prefill process puts a sequence's blocks where the decode process wants them, from several threads at once.

Pushes by key need one-sided mode (enable_remote_cache_accessible) at both ends. The decode process has linked; the prefill pushes
over that link, from its device to HOST memory there. When a push has returned, its bytes are there.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import common
import numpy as np

from llm_datadist import BlocksCacheKey, CacheDesc, DataType, LLMRole, Placement

PREFILL, DECODE = 1, 2  # cluster ids
TENSORS, BLOCK = 8, (16, 8, 64)  # 4 layers of K and V; tokens, heads and dimensions of a head in a block
HERE = CacheDesc(TENSORS, [96, *BLOCK], DataType.DT_FLOAT16)  # the prefill's cache
THERE = CacheDesc(TENSORS, [64, *BLOCK], DataType.DT_FLOAT16, Placement.HOST)
THREADS, SEQUENCES, SEQUENCE_BLOCKS = 4, 8, 6


def sequences(seed: int, desc: CacheDesc) -> list[np.ndarray]:
    """Return the blocks of each sequence, as the scheduler of one side gives them."""
    blocks = np.random.default_rng(seed).permutation(desc.shape[0])[: SEQUENCES * SEQUENCE_BLOCKS]
    return list(blocks.reshape(SEQUENCES, SEQUENCE_BLOCKS))


def prefill(decode: Connection) -> None:
    engine = common.start_engine(
        LLMRole.PROMPT, PREFILL, listen_ip_info="127.0.0.1:0", mem_pool_cfg=common.POOL, enable_remote_cache_accessible=True
    )
    manager = engine.cache_manager
    cache = manager.allocate_blocks_cache(HERE)
    common.write(manager, cache, common.random_kv(HERE, seed=1))
    decode.send(engine.listen_address)
    wanted_at = decode.recv()  # the decode process has linked

    def push(src: np.ndarray, dst: np.ndarray) -> None:
        manager.push_blocks(BlocksCacheKey(DECODE), cache, src_blocks=src, dst_blocks=dst)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(push, sequences(1, HERE), wanted_at))
    decode.send("pushed")
    decode.recv()
    manager.deallocate_blocks_cache(cache)
    engine.finalize()


def decode(prefill: Connection) -> None:
    engine = common.start_engine(LLMRole.DECODER, DECODE, enable_remote_cache_accessible=True)
    manager = engine.cache_manager
    memory = common.zeros(THERE)
    manager.register_blocks_cache(THERE, common.addresses(memory), BlocksCacheKey(DECODE), remote_accessible=True)
    cluster = common.link(engine, PREFILL, prefill.recv())
    prefill.send(sequences(2, THERE))
    prefill.recv()

    wanted = common.zeros(THERE)
    for tensor, source in zip(wanted, common.random_kv(HERE, seed=1)):
        for src, dst in zip(sequences(1, HERE), sequences(2, THERE)):
            tensor[dst] = source[src]
    common.verify(f"{SEQUENCES} sequences of {SEQUENCE_BLOCKS} blocks", memory, wanted)
    engine.unlink_clusters([cluster], timeout=5000)
    prefill.send("done")
    engine.finalize()


if __name__ == "__main__":
    common.run(prefill, decode)
