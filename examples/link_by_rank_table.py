# SPDX-License-Identifier: Apache-2.0
"""Link by a rank table: all members call link() with one name, one map of clusters to ranks and one table, and find each other.

Rank 0 listens on the rendezvous port at its device address; nobody needs listen_ip_info. The call returns before the link is
made: query_register_mem_status says when. Registration comes first, so that caches are there when the link is.
"""

from __future__ import annotations

import json
import sys
import time
from multiprocessing.connection import Connection

import common

from llm_datadist import BlocksCacheKey, CacheDesc, DataType, LLMDataDist, LLMRole, Placement, RegisterMemStatus

PREFILL, DECODE = 1, 2  # cluster ids
DESC = CacheDesc(8, [32, 16, 8, 64], DataType.DT_FLOAT16, Placement.HOST)
SRC, DST = [3, 4, 5, 30], [0, 31, 7, 8]  # blocks
RANKS = {PREFILL: 0, DECODE: 1}
TABLE = json.dumps(
    {
        "status": "completed",
        "version": "1.0",
        "server_count": "1",
        "server_list": [
            {
                "server_id": "127.0.0.1",
                "device": [
                    {"device_id": "0", "device_ip": "127.0.0.1", "rank_id": "0"},
                    {"device_id": "1", "device_ip": "127.0.0.1", "rank_id": "1"},
                ],
            }
        ],
    }
)


def join(engine: LLMDataDist) -> int:
    """Link all members, and return the id by which unlink takes the link down."""
    link_id = engine.link("prefill and decode", RANKS, TABLE)
    while (status := engine.query_register_mem_status(link_id)) == RegisterMemStatus.PREPARING:
        time.sleep(0.01)
    if status != RegisterMemStatus.OK:
        sys.exit(f"link: {status}")
    return link_id


def prefill(decode: Connection) -> None:
    port = common.free_port()  # the default, 16666 + device id, serves one group of processes on a host
    decode.send(port)
    engine = common.start_engine(LLMRole.PROMPT, PREFILL, link_total_time=20, rendezvous_port=port)
    memory = common.random_kv(DESC, seed=1)
    engine.cache_manager.register_blocks_cache(DESC, common.addresses(memory), BlocksCacheKey(PREFILL))
    link_id = join(engine)
    decode.recv()
    engine.unlink(link_id)
    engine.finalize()


def decode(prefill: Connection) -> None:
    engine = common.start_engine(LLMRole.DECODER, DECODE, link_total_time=20, rendezvous_port=prefill.recv())
    memory = common.zeros(DESC)
    cache = engine.cache_manager.register_blocks_cache(DESC, common.addresses(memory))
    link_id = join(engine)
    engine.cache_manager.pull_blocks(BlocksCacheKey(PREFILL), cache, SRC, DST)
    wanted = common.zeros(DESC)
    for tensor, source in zip(wanted, common.random_kv(DESC, seed=1)):
        tensor[DST] = source[SRC]
    common.verify(f"{len(SRC)} blocks over a link by rank table", memory, wanted)
    prefill.send("done")
    engine.unlink(link_id)
    engine.finalize()


if __name__ == "__main__":
    common.run(prefill, decode)
