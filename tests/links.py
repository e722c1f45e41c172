# SPDX-License-Identifier: Apache-2.0
"""Links between two ends, and what the tests of links and of groups share."""

from __future__ import annotations

import json
import socket
from typing import Any

import peers
from llm_datadist import CacheKeyByIdAndIndex, LLMException, LLMStatusCode, RegisterMemStatus

PREPARING = RegisterMemStatus.PREPARING

THEIRS, OURS = 1, 2  # cluster ids: of an owner, and of the end that pulls from it or pushes to it


def by_id(cache_id: int, batch: int = 0) -> CacheKeyByIdAndIndex:
    """Return the key of an owner's cache."""
    return CacheKeyByIdAndIndex(THEIRS, cache_id, batch)


def link(initiator: Any, owner: Any, **settings: Any) -> str:
    """Open two ends with the same settings, link the initiator to the owner, and return the owner's address."""
    address: str = owner.open(THEIRS, **settings)
    initiator.open(OURS, listen=None, **settings)
    code = initiator.link(address, THEIRS)
    assert code is LLMStatusCode.LLM_SUCCESS, code
    return address


def link_over_shm(initiator: Any, owner: Any, **settings: Any) -> str:
    """As link, and see that the two, which are free to choose, share memory."""
    address = link(initiator, owner, **settings)
    told = initiator.told(THEIRS)
    assert told["transport"] == "shm", told
    return address


def refused(call: Any, *args: Any, code: LLMStatusCode = LLMStatusCode.LLM_NOT_YET_LINK) -> LLMException:
    """As peers.refused, for want of a link where nothing else is said."""
    return peers.refused(call, *args, code=code)


def refused_address() -> tuple[socket.socket, str]:
    """An address where nobody listens, kept from others until the socket is closed."""
    held = socket.socket()
    held.bind(("127.0.0.1", 0))
    return held, f"127.0.0.1:{held.getsockname()[1]}"


def table(count: int, ip: str = "127.0.0.1") -> str:
    """A rank table of count members."""
    devices = [{"device_id": "0", "device_ip": ip, "rank_id": str(rank)} for rank in range(count)]
    servers = [{"server_id": "server", "device": devices}]
    return json.dumps({"version": "1.0", "status": "completed", "server_count": "1", "server_list": servers})


def join(end: Any, *clusters: int, name: str = "group", text: str | None = None) -> Any:
    return end.ask("link", name, {cluster: rank for rank, cluster in enumerate(clusters)}, text or table(len(clusters)))


def become(end: Any, comm_id: int, wanted: RegisterMemStatus) -> None:
    def prepared() -> Any:
        state = end.ask("query_register_mem_status", comm_id)
        return state is not PREPARING and state

    assert peers.wait_until(prepared, "it is prepared") is wanted
