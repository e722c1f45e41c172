# SPDX-License-Identifier: Apache-2.0
"""link, unlink and query_register_mem_status between processes: groups that come together by a rank table."""

from __future__ import annotations

import logging
import time

import numpy as np
import pytest

from links import PREPARING, become, join, refused, table
from llm_datadist import CacheKeyByIdAndIndex, LLMException, LLMRole, LLMStatusCode, MemInfo, Memtype
from llm_datadist.utils import log
from llm_datadist.v2.llm_types import RegisterMemStatus
from peers import ADDRESS, Peer, desc, free_port, pattern, wait_until

PARAM_INVALID = LLMStatusCode.LLM_PARAM_INVALID
LINK_FAILED = LLMStatusCode.LLM_LINK_FAILED
NOT_YET_LINK = LLMStatusCode.LLM_NOT_YET_LINK
NOT_ENABLED = LLMStatusCode.LLM_FEATURE_NOT_ENABLED
OK, FAILED = RegisterMemStatus.OK, RegisterMemStatus.FAILED

pytestmark = pytest.mark.usefixtures("quiet")  # groups fail here, on purpose

SIZE = 100_003
OURS, THEIRS, THIRD = 2, 1, 3  # cluster ids
UNKNOWN = '{"server_list":[{"device":[{}]}]}'


@pytest.fixture
def port():
    return free_port()


def start(end, cluster_id, port, **settings):
    end.open(cluster_id, listen=None, rendezvous_port=port, **settings)
    end.add("give", desc([1, SIZE]), cluster_id)
    end.add("take", desc([1, SIZE]), 99)


def pulls(end, source):
    """Check that end pulls every byte that the end with the id source gives."""
    end.fill("take", 99)
    end.manage("pull_cache", CacheKeyByIdAndIndex(source, 1), "take")
    assert np.array_equal(end.content("take")[0], pattern(source, 0, SIZE))


def ready(end):
    """An engine that link refuses for its arguments alone."""
    end.open(OURS, listen=None)
    return end.engine


@pytest.mark.parity("engine.link", "engine.unlink", "engine.query_register_mem_status")
@pytest.mark.parametrize("clusters", [(THEIRS, OURS), (OURS, THEIRS)], ids=["they are rank 0", "we are rank 0"])
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_both_ends_pull_when_a_group_is_linked(local, remote, port, clusters, first):
    start(local, OURS, port)
    start(remote, THEIRS, port)
    ends = [local, remote] if first == "ours" else [remote, local]
    for end in ends:
        assert join(end, *clusters) == 1
    for end in ends:
        become(end, 1, OK)
    pulls(local, THEIRS)
    pulls(remote, OURS)
    for end in ends:
        end.ask("unlink", 1)
        refused(end.ask, "unlink", 1)
        refused(end.ask, "query_register_mem_status", 1)
    refused(pulls, local, THEIRS)


def test_members_whose_ids_have_64_bits(local, remote, port):
    most, high = 2**64 - 1, 2**63
    for end, cluster_id, number in ((local, most, 1), (remote, high, 2)):
        end.open(cluster_id, listen=None, rendezvous_port=port)
        end.add("give", desc([1, SIZE]), number)
        end.add("take", desc([1, SIZE]), 99)
        join(end, high, most)
    for end, other, number in ((local, high, 2), (remote, most, 1)):
        become(end, 1, OK)
        end.manage("pull_cache", CacheKeyByIdAndIndex(other, 1), "take")
        assert np.array_equal(end.content("take")[0], pattern(number, 0, SIZE))


@pytest.mark.parity("engine.link")
def test_three_members(local, remote, port):
    with Peer() as third:
        ends = {OURS: local, THEIRS: remote, THIRD: third}
        for cluster_id, end in ends.items():
            start(end, cluster_id, port)
            join(end, THEIRS, OURS, THIRD)
        for end in ends.values():
            become(end, 1, OK)
        for cluster_id, end in ends.items():
            for source in ends.keys() - {cluster_id}:
                pulls(end, source)


def test_the_older_of_two_groups_leaves_the_link_to_the_newer(local, remote, port):
    for end, cluster_id in ((local, OURS), (remote, THEIRS)):
        start(end, cluster_id, port)
    for comm_id, name in enumerate(("first", "second"), 1):
        for end in (local, remote):
            assert join(end, THEIRS, OURS, name=name) == comm_id
        for end in (local, remote):
            become(end, comm_id, OK)
    local.ask("unlink", 1)
    remote.ask("unlink", 1)
    pulls(local, THEIRS)
    pulls(remote, OURS)
    local.ask("unlink", 2)
    refused(pulls, local, THEIRS)


@pytest.mark.parity("engine.query_register_mem_status")
def test_a_member_that_never_comes_fails_the_group(local, port, caplog):
    local.open(OURS, listen=None, rendezvous_port=port, link_total_time=1)
    logger = log.get_logger()
    logger.addHandler(caplog.handler)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        began = time.monotonic()
        for clusters, cause in (((OURS, THEIRS), "cluster 1 (rank 1)"), ((THEIRS, OURS), "refused")):
            comm_id = join(local, *clusters)
            assert local.ask("query_register_mem_status", comm_id) is PREPARING
            become(local, comm_id, FAILED)
            assert cause in local.engine.explain(THEIRS)
            wait_until(lambda cause=cause: cause in caplog.text, "the log tells the cause")
            assert local.ask("query_register_mem_status", comm_id) is FAILED
            local.ask("unlink", comm_id)
        assert time.monotonic() - began < 20
    finally:
        logger.setLevel(level)
        logger.removeHandler(caplog.handler)


@pytest.mark.parity("engine.unlink")
def test_unlink_ends_a_preparation(local, port):
    start(local, OURS, port)
    comm_id = join(local, OURS, THEIRS)
    local.ask("unlink", comm_id)
    assert refused(local.ask, "unlink", comm_id).operation == "unlink"
    assert join(local, OURS, THEIRS) == comm_id + 1  # and finalize ends this one


def test_unlink_of_a_peer_that_is_gone(local, port):
    start(local, OURS, port)
    with Peer() as peer:
        start(peer, THEIRS, port)
        for end in (local, peer):
            join(end, THEIRS, OURS)
        for end in (local, peer):
            become(end, 1, OK)
        peer.kill()
        wait_until(lambda: "dead" in local.engine.explain(THEIRS), "its death is seen")
        assert local.ask("query_register_mem_status", 1) is OK  # for good
        local.ask("unlink", 1)


@pytest.mark.parametrize("text", [UNKNOWN, "{}", "null", '{"server_list": null}', '{"server_list": [null, {"device": [null]}]}'])
def test_a_table_without_ranks_fails_the_group(local, text):
    engine = ready(local)
    comm_id = engine.link("link", {3: 0, OURS: 1}, text)
    become(local, comm_id, FAILED)
    assert "the rank table has no device" in engine.explain(3)


@pytest.mark.parity("manager.set_is_call_linked")
def test_only_link_changes_what_registrations_are_by_default(local, remote, port):
    start(local, OURS, port)
    link_info = local.manager._is_call_linked
    assert link_info is False
    local.link(remote.open(THEIRS, LLMRole.MIX, ADDRESS), THEIRS)
    assert local.manager._is_call_linked is False
    refused(local.ask, "link", "group", {7: 0, 8: 1}, table(2), code=PARAM_INVALID)
    assert local.manager._is_call_linked is False
    join(local, OURS, THEIRS)
    with pytest.raises(LLMException, match="link"):
        local.add("late", desc([1, 8]), 1, accessible=True)
    local.add("late", desc([1, 8]), 1)


NAMES = {1: 0, OURS: 1}

BAD_LINKS = [
    ((None, NAMES, ""), TypeError),
    ((1, [], 1), TypeError),
    (("", [], 1), LLMException),
    (("n" * 128, [], 1), LLMException),
    (("n", None, 1), TypeError),
    (("n", [1, OURS], 1), TypeError),
    (("n", {"1": 0, OURS: 1}, 1), TypeError),
    (("n", {1: "0", OURS: 1}, 1), TypeError),
    (("n", {1: None, OURS: 1}, 1), TypeError),
    (("n", {-1: 0, 2: 1, 3: 2, 4: 3, 5: 4}, 1), LLMException),
    (("n", {-1: 0, OURS: 1}, 1), ValueError),
    (("n", {1 << 64: 0, OURS: 1}, 1), ValueError),
    (("n", {1: -1, OURS: 1}, 1), ValueError),
    (("n", {1: 1 << 32, OURS: 1}, 1), ValueError),
    (("n", {OURS: 0}, 1), TypeError),
    (("n", {OURS: 0}, None), TypeError),
    (("n", {OURS: 0}, ""), LLMException),
    (("n", {}, ""), LLMException),
    (("n", {3: 1, OURS: 0}, ""), LLMException),
]


@pytest.mark.parity("engine.link")
@pytest.mark.parametrize(("arguments", "raised"), BAD_LINKS, ids=str)
def test_arguments_of_link(local, arguments, raised):
    with pytest.raises(raised):
        ready(local).link(*arguments)
    assert not local.manager._is_call_linked


BAD_GROUPS = [
    ({7: 0, 8: 1}, table(2), PARAM_INVALID),
    ({1: 0, OURS: 0}, table(2), PARAM_INVALID),
    (NAMES, "", LINK_FAILED),
    (NAMES, "no JSON", LINK_FAILED),
    (NAMES, "[" * 20_000 + "]" * 20_000, LINK_FAILED),
    (NAMES, " " * (4 << 20) + "{}", LINK_FAILED),
    *[(NAMES, text, LINK_FAILED) for text in ("[]", "1", '"text"', "\ud800", "{}\0")],
    *[(NAMES, f'{{"server_list": {servers}}}', LINK_FAILED) for servers in ("{}", "[1]")],
    (NAMES, '{"version": 1.0}', LINK_FAILED),
    (NAMES, '{"version": "1.3"}', LINK_FAILED),
    (NAMES, '{"server_list": [{"device": {}}]}', LINK_FAILED),
    (NAMES, '{"server_list": [{"server_id": 1, "device": []}]}', LINK_FAILED),
    (NAMES, '{"server_list": [{"device": [{"rank_id": 0}]}]}', LINK_FAILED),
    (NAMES, '{"server_list": [{"device": [{"rank_id": "-1"}]}]}', LINK_FAILED),
    (NAMES, '{"server_list": [{"device": [{"rank_id": "4294967296"}]}]}', LINK_FAILED),
    (NAMES, '{"server_list": [{"device": [{"rank_id": "0", "device_ip": 1}]}]}', LINK_FAILED),
    (NAMES, '{"server_list": [{"device": [{"rank_id": "0"}]}, {"device": [{"rank_id": "00"}]}]}', LINK_FAILED),
    (NAMES, '{"server_list": [{"device": [{"rank_id": "1"}, {"rank_id": "1"}]}]}', LINK_FAILED),
]


@pytest.mark.parametrize(("members", "text", "code"), BAD_GROUPS, ids=range(len(BAD_GROUPS)))
def test_groups_that_can_not_be(local, members, text, code):
    failure = refused(ready(local).link, "n", members, text, code=code)
    assert failure.operation == "link" and failure.cause


@pytest.mark.parity("engine.unlink", "engine.query_register_mem_status")
@pytest.mark.parametrize("call", ["unlink", "query_register_mem_status"])
def test_arguments_of_unlink_and_query(local, call):
    with pytest.raises(RuntimeError):
        getattr(new_engine(), call)(1)
    method = getattr(ready(local), call)
    for given, raised in ((None, TypeError), ("1", TypeError), (1.0, TypeError), (-1, ValueError), (1 << 64, ValueError)):
        with pytest.raises(raised):
            method(given)
    for unknown in (0, 1, (1 << 64) - 1):
        refused(method, unknown)


def new_engine():
    from llm_datadist import LLMDataDist

    return LLMDataDist(LLMRole.MIX, OURS)


def test_link_needs_an_engine_in_cache_manager_mode():
    with pytest.raises(RuntimeError):
        new_engine().link(None, None, None)
    engine = new_engine()
    engine.init({"ge.exec.deviceId": "0"})
    try:
        with pytest.raises(LLMException):
            engine.link(None, None, None)
        refused(engine.unlink, 1)
        refused(engine.query_register_mem_status, 1)
    finally:
        engine.finalize()


@pytest.mark.parity("failure.not_enabled")
def test_the_hixl_backend_has_no_groups(local):
    local.open(OURS, one_sided=True, transfer_backend="hixl")
    refused(local.engine.link, "n", NAMES, table(2), code=NOT_ENABLED)
    refused(local.engine.unlink, 1, code=NOT_ENABLED)
    refused(local.engine.query_register_mem_status, 1, code=NOT_ENABLED)
    assert not local.manager._is_call_linked


@pytest.mark.parity("manager.remap_registered_memory")
def test_remap_needs_a_live_link(local, remote, port):
    info = MemInfo(Memtype.MEM_TYPE_DEVICE, 1234, 1)
    start(local, OURS, port)
    assert refused(local.manager.remap_registered_memory, info).operation == "remap_registered_memory"
    start(remote, THEIRS, port)
    for end in (local, remote):
        join(end, OURS, THEIRS)
    become(local, 1, OK)
    assert local.manager.remap_registered_memory(info) is None
    local.ask("unlink", 1)
    refused(local.manager.remap_registered_memory, [info])


@pytest.mark.parity("manager.remap_registered_memory")
def test_remap_with_a_link_of_link_clusters(local, remote):
    info = MemInfo(Memtype.MEM_TYPE_DEVICE, 1234, 1)
    local.open(OURS)
    assert local.link(remote.open(THEIRS), THEIRS) is LLMStatusCode.LLM_SUCCESS
    for given in (info, [info, info]):
        assert local.manager.remap_registered_memory(given) is None
    assert local.unlink(THEIRS) is LLMStatusCode.LLM_SUCCESS
    refused(local.manager.remap_registered_memory, info)
