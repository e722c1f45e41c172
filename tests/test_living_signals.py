# SPDX-License-Identifier: Apache-2.0
"""A long call sees signals; an interrupted one has let go when it raises; failures find the call they belong to."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import living_host
from living_host import SOON, inside
from peers import Peer

FAILURES_KEPT = 1024  # mostFailures in pyext/backend


@pytest.fixture(scope="module")
def owner(transport: str) -> Iterator[Any]:
    with Peer() as owner:
        owner.address = owner.open(living_host.PEER_ID, sync_kv_timeout=10_000)
        inside(owner, living_host.serve_big)
        yield owner


@pytest.fixture(scope="module")
def linked(owner: Any) -> Iterator[Any]:
    with Peer() as host:
        assert inside(host, living_host.open_and_link, owner.address)["code"] == "LLM_SUCCESS"
        yield host


@pytest.fixture
def host(owner: Any, linked: Any) -> Iterator[Any]:
    """A process whose engine is linked to the owner's, over the same link for all tests of the module."""
    yield linked
    owner.process.send_signal(signal.SIGCONT)
    assert inside(linked, living_host.pull_all), "the link does not serve any more"
    assert linked.held() == 1


# --- failures


def test_a_failure_is_read_once(host: Any) -> None:
    kept, cause, again, left = inside(host, living_host.failure_is_read_once)
    assert (kept, cause, again, left) == (1, "the engine was finalized", "", 0)


def test_failures_that_nobody_reads_are_bounded() -> None:
    with Peer() as host:
        host.open(5, listen=None)
        kept, last_is_there = inside(host, living_host.unread_failures, 3 * FAILURES_KEPT)
        assert kept == FAILURES_KEPT and last_is_there
        host.kill()  # leave() would count them


def test_failures_in_many_threads_keep_their_own_peer_operation_and_cause(host: Any) -> None:
    assert inside(host, living_host.failures_in_threads, 16, 100) == []


# --- interrupts


@pytest.mark.parametrize("midway", [False, True], ids=["before the first byte", "midway"])
def test_ctrl_c_ends_a_pull_and_nothing_arrives_after(owner: Any, host: Any, transport: str, midway: bool) -> None:
    """The owner is stopped at that point, but where bytes move without it."""
    got = inside(host, living_host.interrupted_pull, owner.process.pid, midway, not midway or transport == "tcp")
    assert got["ending"] == "KeyboardInterrupt" and not got["too late"]
    assert got["seconds"] < SOON
    assert got["held"] == 0, "the operation is still there"
    owner.process.send_signal(signal.SIGCONT)
    assert inside(host, living_host.changes_within, got["checksum"], 2.0) == 0, "bytes have arrived after the call"


@pytest.mark.parametrize(
    ("strikes", "raised"),
    [
        (1, living_host.Interrupted),
        pytest.param(
            5,
            living_host.Interrupted,
            marks=pytest.mark.skipif(
                sys.version_info < (3, 10), reason="looks for signals between any two instructions, the first of an except too"
            ),
        ),
        (1, living_host.LLMException),  # a handler that calls the engine itself may well raise one
    ],
    ids=["once a round", "again and again", "an exception of ours"],
)
def test_a_storm_of_interrupts_loses_no_operation(host: Any, strikes: int, raised: type[BaseException]) -> None:
    got = inside(host, living_host.storm, strikes, 500, raised)
    assert got["interrupted"] > 100, "the storm has hit nothing"
    assert got["lost"] == 0


def test_letting_go_goes_on_through_further_interrupts(owner: Any, host: Any) -> None:
    got = inside(host, living_host.interrupts_while_letting_go, owner.process.pid, 5)
    assert got == {"ending": "KeyboardInterrupt", "left": 0, "held": 0}


def test_a_handler_that_returns_does_not_disturb_a_pull(owner: Any, host: Any) -> None:
    got = inside(host, living_host.pull_under_quiet_signals, owner.process.pid, 3)
    assert got["handled"] >= 3 and got["right"]


def test_other_threads_run_while_a_pull_waits(owner: Any, host: Any) -> None:
    """Between two waits alone, a thread would make one step in 100 ms, and the pull would run into its deadline."""
    got = inside(host, living_host.work_during_a_blocked_pull, owner.process.pid, 300)
    assert got["code"] == "none" and got["right"]


def test_other_threads_run_during_big_pulls(host: Any) -> None:
    longest, right = inside(host, living_host.longest_pause_during_big_pulls, 4)
    assert right
    assert longest < SOON


def test_ctrl_c_during_init_leaves_no_engine() -> None:
    with Peer() as host:
        host.open(6, listen=None)
        host.close()
        got = inside(host, living_host.interrupted_init)
    assert got == {"ending": "KeyboardInterrupt", "held": 0, "log threads": 0}


def test_ctrl_c_during_finalize_is_raised_when_the_engine_is_gone() -> None:
    with Peer() as host:
        host.open(6)
        got = inside(host, living_host.interrupted_finalize)
    assert got == {"ending": "KeyboardInterrupt", "held": 0, "log threads": 0}
