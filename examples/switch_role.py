# SPDX-License-Identifier: Apache-2.0
"""Switch roles: two engines change places while they run, and keep their caches.

A serving cluster does so when the load of prefill and decode shifts. Links are taken down first; the new prompt then listens.
"""

from __future__ import annotations

from multiprocessing.connection import Connection

import common

from llm_datadist import BlocksCacheKey, CacheDesc, DataType, LLMConfig, LLMDataDist, LLMRole, Placement

FIRST, SECOND = 1, 2  # cluster ids
DESC = CacheDesc(8, [32, 16, 8, 64], DataType.DT_FLOAT16, Placement.HOST)
MOVED = list(range(8, 24))  # blocks


def listening() -> dict[str, str]:
    config = LLMConfig()
    config.listen_ip_info = "127.0.0.1:0"
    return dict(config.generate_options())


def offer(engine: LLMDataDist, peer: Connection) -> None:
    """Be the prompt until the other end has pulled."""
    peer.send(engine.listen_address)
    peer.recv()


def fetch(engine: LLMDataDist, peer: Connection, of: int, cache: object) -> None:
    """Pull some blocks of the prompt's to the same places here."""
    cluster = common.link(engine, of, peer.recv())
    engine.cache_manager.pull_blocks(BlocksCacheKey(of), cache, MOVED, MOVED)
    engine.unlink_clusters([cluster], timeout=5000)  # switch_role refuses while there is a link
    peer.send("done")


def first(peer: Connection) -> None:
    engine = common.start_engine(LLMRole.PROMPT, FIRST, listen_ip_info="127.0.0.1:0")
    memory = common.random_kv(DESC, seed=FIRST)
    cache = engine.cache_manager.register_blocks_cache(DESC, common.addresses(memory), BlocksCacheKey(FIRST))
    offer(engine, peer)

    engine.switch_role(LLMRole.DECODER)  # stops listening
    for tensor in memory:
        tensor[MOVED] = 0
    fetch(engine, peer, SECOND, cache)
    common.verify("first, as decoder: what had gone out came back", memory, common.random_kv(DESC, seed=FIRST))
    engine.finalize()


def second(peer: Connection) -> None:
    engine = common.start_engine(LLMRole.DECODER, SECOND)
    memory = common.zeros(DESC)
    cache = engine.cache_manager.register_blocks_cache(DESC, common.addresses(memory), BlocksCacheKey(SECOND))
    fetch(engine, peer, FIRST, cache)
    wanted = common.zeros(DESC)
    for tensor, source in zip(wanted, common.random_kv(DESC, seed=FIRST)):
        tensor[MOVED] = source[MOVED]
    common.verify("second, as decoder: blocks of the first", memory, wanted)

    engine.switch_role(LLMRole.PROMPT, listening())
    offer(engine, peer)
    engine.finalize()


if __name__ == "__main__":
    common.run(first, second)
