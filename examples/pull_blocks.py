# SPDX-License-Identifier: Apache-2.0
"""Pull caches of blocks, as paged attention keeps them: from one prefill process into one decode process; --many: from 2 into 3.

Every process registers one cache of blocks, numpy arrays, which are HOST memory. A sequence has blocks anywhere in it, others in
the decode process than in the prefill, and the two caches have different numbers of blocks. Pulls never release the key of a
cache of blocks.
"""

from __future__ import annotations

import argparse
from multiprocessing.connection import Connection

import common
import numpy as np

from llm_datadist import BlocksCacheKey, CacheDesc, DataType, LLMRole, Placement

TENSORS, BLOCK = 8, (16, 8, 64)  # 4 layers of K and V; tokens, heads and dimensions of a head in a block
PREFILL_BLOCKS, DECODE_BLOCKS = 96, 64
HERE = CacheDesc(TENSORS, [PREFILL_BLOCKS, *BLOCK], DataType.DT_FLOAT16, Placement.HOST)  # a prefill's cache
THERE = CacheDesc(TENSORS, [DECODE_BLOCKS, *BLOCK], DataType.DT_FLOAT16, Placement.HOST)
PREFILLS_AT, DECODES_AT = 1, 101  # cluster ids of the first of each kind


def prefill(number: int, decodes: list[Connection]) -> None:
    cluster_id = PREFILLS_AT + number
    engine = common.start_engine(LLMRole.PROMPT, cluster_id, listen_ip_info="127.0.0.1:0")
    memory = common.random_kv(HERE, seed=cluster_id)
    cache = engine.cache_manager.register_blocks_cache(HERE, common.addresses(memory), BlocksCacheKey(cluster_id))
    for decode in decodes:
        decode.send(engine.listen_address)
    for decode in decodes:
        decode.recv()
    engine.cache_manager.unregister_cache(cache.cache_id)
    engine.finalize()


def decode(number: int, prefills: list[Connection]) -> None:
    engine = common.start_engine(LLMRole.DECODER, DECODES_AT + number)
    clusters = [common.link(engine, PREFILLS_AT + each, prefill.recv()) for each, prefill in enumerate(prefills)]
    memory = common.zeros(THERE)
    wanted = common.zeros(THERE)
    manager = engine.cache_manager
    cache = manager.register_blocks_cache(THERE, common.addresses(memory))

    # Sequence i comes from prefill i: which blocks it has there and which here, the schedulers would tell.
    random = np.random.default_rng(number)
    free = random.permutation(DECODE_BLOCKS)
    for each in range(len(prefills)):
        src = random.permutation(PREFILL_BLOCKS)[:24]
        dst = free[24 * each : 24 * (each + 1)]
        manager.pull_blocks(BlocksCacheKey(PREFILLS_AT + each), cache, src, dst)
        for tensor, source in zip(wanted, common.random_kv(HERE, seed=PREFILLS_AT + each)):
            tensor[dst] = source[src]
    common.verify(f"decode {number}: 24 blocks of each of {len(prefills)} prefills", memory, wanted)

    manager.unregister_cache(cache.cache_id)
    engine.unlink_clusters(clusters, timeout=5000)
    for each in prefills:
        each.send("done")
    engine.finalize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--many", action="store_true", help="two prefill processes and three decode processes")
    common.run_many(prefill, decode, *((2, 3) if parser.parse_args().many else (1, 1)))
