# SPDX-License-Identifier: Apache-2.0
"""Several engines in one process (open.MultipleEngines): who may be beside whom, transfers among them, and their ends."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import living_host
from kinds import pull_each_kind, push_each_kind
from links import become, join
from llm_datadist import CacheKey, LLMDataDist, LLMException, LLMRole, LLMStatusCode, RegisterMemStatus, _native
from peers import Background, End, Peer, desc, free_port, options, pattern, wait_until

SUCCESS = LLMStatusCode.LLM_SUCCESS
FAILED = LLMStatusCode.LLM_FAILED
NOT_YET_LINK = LLMStatusCode.LLM_NOT_YET_LINK

ONE = {"llm.EnableCacheManager": "1"}
SEVERAL = {**ONE, "open.MultipleEngines": "1"}


@pytest.fixture
def opened():
    """A function that opens an end beside others, which is closed after the test."""
    ends = []

    def open_end(cluster_id, **settings):
        end = End()
        end.address = end.open(cluster_id, multiple_engines=True, **settings)
        end.id = cluster_id
        ends.append(end)
        return end

    yield open_end
    for end in ends:
        end.close()


@pytest.fixture
def three(transport, opened):
    """Three ends, all linked to each other, which is how each two of them are."""
    return linked([opened(cluster_id) for cluster_id in (1, 2, 3)], transport)


def linked(ends, transport):
    for at, end in enumerate(ends):
        for earlier in ends[:at]:
            assert end.link(earlier.address, earlier.id) is SUCCESS
            told = end.told(earlier.id)
            assert told["transport"] == transport
            assert told.get("private memory", "read").startswith("read")  # a process may read its own, whatever Yama says
    return ends


def pairs(ends):
    return [(local, owner) for local in ends for owner in ends if local is not owner]


# --- the rule


@pytest.mark.parametrize("first", [ONE, {**SEVERAL, "open.MultipleEngines": "0"}, SEVERAL])
@pytest.mark.parametrize("second", [ONE, SEVERAL, None], ids=str)
def test_both_have_to_say_that_they_may_be_beside_each_other(first, second):
    engines = [LLMDataDist(LLMRole.MIX, cluster_id) for cluster_id in (1, 2)]
    engines[0].init(first)
    if first == second == SEVERAL:
        engines[1].init(second)
    else:
        with pytest.raises(LLMException, match=r"open\.MultipleEngines") as refused:
            engines[1].init(second)
        assert refused.value.status_code is FAILED
    engines[0].finalize()
    engines[1].init(second or ONE)
    engines[1].finalize()


def test_the_documented_attribute_has_only_an_engine_that_is_alone():
    engines = [LLMDataDist(LLMRole.MIX, cluster_id) for cluster_id in (1, 2)]
    for engine in engines:
        engine.init(SEVERAL)
        assert LLMDataDist.llm_engine_instance is None
    for engine in engines:
        engine.finalize()
    engines[0].init(ONE)
    assert LLMDataDist.llm_engine_instance is engines[0]
    engines[0].finalize()


# --- transfers


@pytest.mark.parity(
    "manager.pull_cache",
    "manager.pull_blocks",
    "manager.push_cache",
    "manager.push_blocks",
    "manager.transfer_cache_async",
)
@pytest.mark.parametrize("one_sided", [False, True], ids=["two-sided", "one-sided"])
def test_every_kind_of_transfer_between_each_two_of_three(transport, opened, one_sided):
    ends = linked([opened(cluster_id, one_sided=one_sided) for cluster_id in (1, 2, 3)], transport)
    for local, owner in pairs(ends):
        pull_each_kind(local, owner, owner.id, one_sided)
        push_each_kind(local, owner, owner.id, one_sided)


def test_engines_of_one_process_and_a_peer_in_another(transport, opened):
    local = linked([opened(cluster_id) for cluster_id in (1, 2)], transport)
    with Peer() as peer:
        address = peer.open(9)
        for end in local:
            assert end.link(address, 9) is SUCCESS
        for end in local:
            pull_each_kind(end, peer, 9)
            push_each_kind(end, peer, 9)
            assert peer.told(end.id)["transport"] == transport
        local[0].close()
        pull_each_kind(local[1], peer, 9)


def test_a_group_of_engines_of_one_process(opened):
    port = free_port()
    ends = [opened(cluster_id, listen=None, rendezvous_port=port) for cluster_id in (1, 2, 3)]
    comm_ids = [join(end, 1, 2, 3) for end in ends]
    for end, comm_id in zip(ends, comm_ids):
        become(end, comm_id, RegisterMemStatus.OK)
    for local, owner in pairs(ends):
        pull_each_kind(local, owner, owner.id)


def test_threads_of_several_engines(three):
    size, rounds = 300_000, 20
    for end in three:
        end.add("give", desc([1, size], 2), end.id, [CacheKey(end.id, req_id=1)])
    for local, owner in pairs(three):
        local.add(f"from {owner.id}", desc([1, size], 2), 0)

    def pull(local, owner):
        name = f"from {owner.id}"
        for _ in range(rounds):
            local.fill(name, 0)
            local.manage("pull_cache", CacheKey(owner.id, req_id=1), name)
            for tensor, got in enumerate(local.content(name)):
                assert np.array_equal(got, pattern(owner.id, tensor, size))

    for call in [Background(pull, *pair) for pair in pairs(three)]:
        call.result()


def test_engines_are_opened_and_closed_in_threads():
    def live(cluster_id):
        for _ in range(5):
            end = End()
            end.open(cluster_id, multiple_engines=True)
            end.add("own", desc([1, 100]), 1, owned=True)
            end.close()

    for call in [Background(live, cluster_id) for cluster_id in range(1, 9)]:
        call.result()


# --- ends


def test_finalizing_one_leaves_the_others(three, opened, quiet):
    first, second, third = three
    first.close()
    for end in (second, third):
        end.add("any", desc([1, 8]), 1)
        with pytest.raises(LLMException) as dead:
            wait_until(lambda end=end: end.manage("pull_cache", CacheKey(1, req_id=1), "any"), "the link is dead")
        assert dead.value.status_code in (FAILED, NOT_YET_LINK)
        end.drop("any")
    pull_each_kind(second, third, 3)
    pull_each_kind(third, second, 2)
    successor = opened(1)
    for end in (second, third):
        wait_until(lambda end=end: "dead" in end.engine.explain(1), "it is known to be dead")
        assert end.link(successor.address, 1) is SUCCESS
        pull_each_kind(end, successor, 1)


def test_an_engine_that_was_dropped_is_closed_with_the_next_call_of_its_kind(opened, quiet):
    held = _native.held()
    kept = opened(1)
    dropped = LLMDataDist(LLMRole.MIX, 2)
    dropped.init(options("127.0.0.1:0", multiple_engines=True))
    assert kept.link(dropped.listen_address, 2) is SUCCESS
    manager = dropped.cache_manager
    del dropped
    gc.collect()
    opened(3).close()
    assert "dead" not in kept.engine.explain(2)
    cache = manager.allocate_cache(desc([1, 8]))  # what is in use keeps it
    manager.deallocate_cache(cache)
    del manager, cache
    gc.collect()
    opened(3).close()
    wait_until(lambda: "dead" in kept.engine.explain(2), "the peer sees it end")
    assert _native.held() == held + 1


def test_one_without_the_option_may_follow_those_that_were_dropped():
    for cluster_id in (1, 2):
        LLMDataDist(LLMRole.MIX, cluster_id).init(SEVERAL)
    gc.collect()
    engine = LLMDataDist(LLMRole.MIX, 3)
    engine.init(ONE)
    assert _native.held() == 1
    engine.finalize()


EXIT = """
import atexit
@atexit.register  # before the import, so it runs after the package's own handler
def report():
    print(_native.held(), flush=True)
from llm_datadist import LLMDataDist, LLMRole, _native
from peers import cluster, options
engines = [LLMDataDist(LLMRole.MIX, cluster_id) for cluster_id in (1, 2, 3)]
for engine in engines:
    engine.init(options("127.0.0.1:0", multiple_engines=True))
    codes = engine.link_clusters([cluster(engines[0].listen_address, 1)])[1]
    assert [int(code) for code in codes] == [0], codes
"""


@pytest.mark.parametrize("leave", ["", "engines = engine = None", "engines[1].finalize()", "raise SystemExit(0)"])
def test_a_process_that_finalizes_none_of_them_ends_quietly(leave):
    here = Path(__file__).resolve().parent
    done = subprocess.run([sys.executable, "-c", EXIT + leave], cwd=here, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


FORK = """
import living_host
from peers import End
ends = []
for cluster_id in (1, 2, 3):
    each = End()
    address = each.open(cluster_id, multiple_engines=True)
    for earlier in ends:
        assert each.link(earlier.engine.listen_address, earlier.engine.cluster_id).name == "LLM_SUCCESS"
    ends.append(each)
before = living_host.targets()

def child():
    calls = [living_host.failure(lambda: each.engine.listen_address) for each in ends]
    for each in ends:
        each.close()
    own = [name for fd, name in living_host.targets().items() if before.get(fd) == name]
    return [[call["code"] for call in calls], [name for name in own if name.startswith(("socket", "/memfd"))]]

from kinds import pull_each_kind
result = living_host.in_child(child)
for local in ends:
    for owner in ends:
        if local is not owner:
            pull_each_kind(local, owner, owner.engine.cluster_id)
for each in ends:
    each.close()
"""


def test_a_forked_child_has_none_of_them_and_the_parent_all():
    with Peer() as host:
        answer, code = host.run(FORK)
    assert answer == [["LLM_FAILED"] * 3, []]
    assert code == 0


INTERRUPT = """
import os, signal
import living_host
from kinds import pull_each_kind
from peers import End
other = End()
given = other.open(3, multiple_engines=True)
end.open(2, multiple_engines=True)
for address, cluster_id in ((owner, living_host.PEER_ID), (given, 3)):
    assert end.link(address, cluster_id).name == "LLM_SUCCESS"
living_host.add_destinations(end)
result = living_host.interrupted_pull(end, pid, False)["ending"]
pull_each_kind(end, other, 3)
pull_each_kind(other, end, 2)
os.kill(pid, signal.SIGCONT)
assert living_host.pull_all(end)
other.close()
"""


def test_ctrl_c_in_a_call_of_one_hurts_no_other():
    with Peer() as owner, Peer() as host:
        address = owner.open(living_host.PEER_ID)
        living_host.inside(owner, living_host.serve_big)
        assert host.run(INTERRUPT, owner=address, pid=owner.process.pid) == "KeyboardInterrupt"
        host.close()


# --- the log


def test_a_line_of_the_log_says_whose_it_is(lines, opened):
    first, second = opened(71), opened(72)
    assert first.link(second.address, 72) is SUCCESS
    for end in (first, second):
        end.close()
    texts = [text for _, text in lines]
    assert any(text.startswith("engine 71: cluster 72: linked") for text in texts), texts
    assert any(text.startswith("engine 72: cluster 71: linked") for text in texts), texts
