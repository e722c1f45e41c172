# SPDX-License-Identifier: Apache-2.0
"""What the tests of links and of groups share."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from llm_datadist import LLMException, LLMStatusCode, RegisterMemStatus
from peers import wait_until

PREPARING = RegisterMemStatus.PREPARING


def refused(call: Any, *args: Any, code: LLMStatusCode = LLMStatusCode.LLM_NOT_YET_LINK) -> LLMException:
    with pytest.raises(LLMException) as failure:
        call(*args)
    assert failure.value.status_code is code, failure.value
    return failure.value


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
    state = wait_until(lambda: (now := end.ask("query_register_mem_status", comm_id)) is not PREPARING and now, "it is prepared")
    assert state is wanted
