# SPDX-License-Identifier: Apache-2.0
"""A connector at work: thousands of requests, every byte compared, while the prefill process is killed, restarted and stopped.

Run as a program with the name of a file, this records the pulls of a shorter run there, one JSON object a line, which
core/engine/replay_test.go replays under the race detector: ``python test_connector.py data/connector.jsonl``.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from connector import GROUPS, THREADS, DecodeWorker, Request, requests
from llm_datadist import LLMRole, LLMStatusCode
from peers import Background, Peer, wait_until

REQUESTS = 2000
SEED = 5
RECORDED = 120


class Prefill:
    """The prefill worker's process, and its successor on the same addresses."""

    def __init__(self, one_sided: bool) -> None:
        self._one_sided = one_sided
        self._incarnation = 0
        self.where: tuple[str, int] = ("127.0.0.1:0", 0)
        self.process: Any = None
        self.start()

    def start(self) -> None:
        self._incarnation += 1
        self.process = Peer()
        self.where = self.process.run(
            "import connector; end.worker = connector.PrefillWorker(*where); result = end.worker.where()",
            where=(*self.where, self._incarnation, self._one_sided),
        )

    def restart(self) -> None:
        """Kill the process in whatever it does, and start another one in its place."""
        self.process.kill()
        self.start()


@contextlib.contextmanager
def workers(transport: str, one_sided: bool, record: Callable[[dict[str, Any]], None] | None = None) -> Iterator[Any]:
    prefill = Prefill(one_sided)
    try:
        decode = DecodeWorker(*prefill.where, one_sided, transport, record)
        try:
            yield prefill, decode
        finally:
            decode.close()
        prefill.process.run("end.worker.close()")
        prefill.process.leave()
    finally:
        prefill.process.kill()


def serve_through_a_restart(prefill: Prefill, decode: DecodeWorker, wanted: list[Request]) -> Background:
    serving = Background(decode.serve_all, wanted)
    wait_until(lambda: decode.finished >= len(wanted) // 3 or not serving.running(), "a third of the requests are served")
    prefill.restart()
    return serving


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("one_sided", [False, True], ids=["two-sided", "one-sided"])
def test_every_request_gets_its_bytes_though_the_prefill_process_is_killed_and_stopped(transport: str, one_sided: bool) -> None:
    with workers(transport, one_sided) as (prefill, decode):
        serving = serve_through_a_restart(prefill, decode, requests(REQUESTS, SEED))
        wait_until(lambda: decode.finished >= REQUESTS // 2 or not serving.running(), "half of the requests are served")
        if transport == "tcp":  # over shm a stopped owner is not needed
            with prefill.process.stopped():
                wait_until(lambda: decode.ends[LLMStatusCode.LLM_TIMEOUT] or not serving.running(), "a pull times out")
            assert decode.ends[LLMStatusCode.LLM_TIMEOUT]
        serving.result()
        assert sum(decode.served.values()) == REQUESTS
        assert set(decode.served) == {1, 2}
        assert decode.ends[LLMStatusCode.LLM_NOT_YET_LINK] + decode.ends[LLMStatusCode.LLM_FAILED] > 0
        assert decode.links == 2


def record(path: Path) -> None:
    """Write the sizes of the caches, then each pull of a run of RECORDED requests."""
    sizes = [
        {
            "tensors": group.tensors,
            "per_layer": group.per_layer,
            "block_bytes": group.content(0, 0, 0, 1).size,
            "prefill_blocks": group.counts[LLMRole.PROMPT],
            "decode_blocks": group.counts[LLMRole.DECODER],
        }
        for group in GROUPS
    ]
    lines: list[dict[str, Any]] = [{"threads": THREADS, "groups": sizes}]
    with workers("tcp", False, lines.append) as (prefill, decode):
        serve_through_a_restart(prefill, decode, requests(RECORDED, SEED)).result()
    path.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))


if __name__ == "__main__":
    record(Path(sys.argv[1]))
