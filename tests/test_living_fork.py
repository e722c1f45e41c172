# SPDX-License-Identifier: Apache-2.0
"""A forked child can't use its parent's engine, is told so at once, and keeps nothing of it open."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

import living_host
from living_host import SOON, inside
from peers import Peer

OTHER_UID = 12345
# What Go's own network poller keeps open. It holds no other descriptor, and no peer sees it.
GO_POLLER = Counter({"anon_inode:[eventpoll]": 1, "anon_inode:[eventfd]": 1})


@pytest.fixture(scope="module")
def owner() -> Iterator[Any]:
    with Peer() as owner:
        owner.address = owner.open(living_host.PEER_ID, sync_kv_timeout=10_000, peer_dead_millis=600_000)
        inside(owner, living_host.serve_big)
        yield owner


@pytest.fixture(scope="module")
def linked(owner: Any) -> Iterator[Any]:
    with Peer() as host:
        host.ours = inside(host, living_host.open_and_link, owner.address)["ours"]
        yield host


@pytest.fixture
def host(owner: Any, linked: Any) -> Iterator[Any]:
    """A process with a linked engine, which is unharmed after each test."""
    yield linked
    owner.process.send_signal(signal.SIGCONT)
    assert inside(linked, living_host.pull_all), "the parent can't pull any more"


@pytest.mark.parametrize("leave_normally", [False, True], ids=["_exit", "exit"])
def test_every_call_in_a_child_says_at_once_what_to_do(host: Any, leave_normally: bool) -> None:
    found, code = inside(host, living_host.calls_in_child, leave_normally)
    assert isinstance(found, dict), found
    wrong = {name: got for name, got in found.items() if got["code"] != "LLM_FAILED" or "spawn" not in (got["hint"] or "")}
    assert wrong == {}
    assert max(got["seconds"] for got in found.values()) < SOON
    assert code == 0


def test_finalize_and_garbage_collection_do_nothing_in_a_child(owner: Any, host: Any) -> None:
    assert inside(host, living_host.finalize_in_child) == ("done", 0)


def test_a_child_needs_no_lock_that_a_thread_of_the_parent_held(host: Any) -> None:
    assert inside(host, living_host.fork_with_locks_held) == ("done", 0)


def test_a_child_that_is_forked_in_the_middle_of_the_load_is_told_so() -> None:
    with Peer() as host:
        got, code = inside(host, living_host.fork_during_load)
    assert isinstance(got, dict), got
    assert (got["code"], code) == ("LLM_FAILED", 0)


@pytest.mark.parametrize("by_exit", [False, True], ids=["returns", "exits"])
def test_a_child_that_a_handler_forks_in_the_middle_of_a_pull_does_not_hang(owner: Any, host: Any, by_exit: bool) -> None:
    parent, child = inside(host, living_host.child_of_a_handler, owner.process.pid, by_exit)
    assert (parent, child) == (0, 3 if by_exit else 4)


def test_no_descriptor_of_the_engine_is_open_in_a_child(host: Any) -> None:
    kinds = {name.split("[")[0].split(":")[0] for _, name in host.ours}
    assert {"socket", "anon_inode", "/memfd"} <= kinds, host.ours
    left = [name for fd, name in inside(host, living_host.open_in_child) if [fd, name] in host.ours]
    assert Counter(left) - GO_POLLER == Counter()


def test_a_child_closes_no_descriptor_that_is_somebody_elses(host: Any) -> None:
    assert inside(host, living_host.descriptor_of_another_file_in_child) is True


def test_a_started_program_gets_no_descriptor_of_the_engine(host: Any) -> None:
    inherited = inside(host, living_host.open_in_program)
    assert [entry for entry in inherited if list(entry) in host.ours] == []


def test_peer_of_a_dead_parent_sees_it_die_while_its_child_lives(owner: Any) -> None:
    dies_while_its_child_lives(owner, 3, "same host: shown")


@pytest.mark.skipif(os.getuid() != 0, reason="needs to change its uid")
def test_peer_that_is_not_shown_to_be_on_this_host_sees_it_too(owner: Any) -> None:
    """With another uid there is no pidfd, and only the sockets can tell."""
    dies_while_its_child_lives(owner, 4, "same host: not shown", OTHER_UID)


def dies_while_its_child_lives(owner: Any, cluster_id: int, proof: str, uid: int = 0) -> None:
    with Peer() as host:
        if uid:
            inside(host, living_host.become, uid)
        opened = inside(host, living_host.open_and_link, owner.address, cluster_id, 600_000)
        assert opened["code"] == "LLM_SUCCESS"
        assert proof in owner.ask("explain", cluster_id)
        child = inside(host, living_host.fork_a_child_that_stays)
        try:
            got = inside(owner, living_host.pull_from_a_dying_process, cluster_id, host.process.pid)
            assert living_host.process_state(child) in "SR", "the child has died too"
        finally:
            os.kill(child, signal.SIGKILL)
            host.kill()
    assert got["code"] == "LLM_FAILED" and "peer died" in got["cause"]
    assert got["seconds"] < SOON


def test_forking_before_init_is_fine(owner: Any) -> None:
    with Peer() as host:
        (in_child, status), own = inside(host, living_host.fork_before_init, owner.address)
    assert (in_child, status) == (["LLM_SUCCESS", True, 0], 0)
    assert own == ["LLM_SUCCESS", True, 0]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_of_multiprocessing(owner: Any, host: Any, method: str) -> None:
    assert inside(host, living_host.multiprocess, method, owner.address) == 0
