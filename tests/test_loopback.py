# SPDX-License-Identifier: Apache-2.0
"""The loopback fabric (open.Fabric): one process stands for its peers, as in a user's unit tests of a connector."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kinds import pull_each_kind, push_each_kind
from llm_datadist import (
    CacheKey,
    CacheKeyByIdAndIndex,
    LLMException,
    LLMRole,
    LLMStatusCode,
    RegisterMemStatus,
    TransferWithCacheKeyConfig,
)
from peers import End, Peer, cluster, desc, pattern, refused
from pushes import Ready

SUCCESS = LLMStatusCode.LLM_SUCCESS
ALREADY_LINK = LLMStatusCode.LLM_ALREADY_LINK
LINK_FAILED = LLMStatusCode.LLM_LINK_FAILED
NOT_YET_LINK = LLMStatusCode.LLM_NOT_YET_LINK
PARAM_INVALID = LLMStatusCode.LLM_PARAM_INVALID
EXIST_LINK = LLMStatusCode.LLM_EXIST_LINK

OURS, OTHER = 3, 2  # cluster ids; there is no engine of the other one
NOWHERE = "127.0.0.1:1"
GUIDE = Path(__file__).resolve().parent.parent / "docs" / "guide.md"


@pytest.fixture
def opened():
    """A function that opens the end under test, which is closed after it."""
    end = End()

    def open_end(**settings):
        end.open(OURS, **{"fabric": "loopback", **settings})
        return end

    yield open_end
    end.close()


@pytest.fixture(params=[False, True], ids=["two-sided", "one-sided"])
def linked(request, opened):
    end = opened(one_sided=request.param)
    assert end.link(NOWHERE, OTHER) is SUCCESS
    end.one_sided = request.param
    return end


# --- links


def test_a_link_to_any_cluster_succeeds_at_once(opened, quiet):
    end = opened(listen=None)
    clusters = [cluster(NOWHERE, cluster_id) for cluster_id in (OTHER, 77, 2**64 - 1)]
    assert end.engine.link_clusters(clusters, 1) == (SUCCESS, [SUCCESS] * 3)
    assert end.engine.link_clusters(clusters[:1]) == (ALREADY_LINK, [ALREADY_LINK])
    assert end.told(OTHER)["transport"] == "loopback"
    assert end.told(OTHER)["cluster 2"].startswith("linked")
    assert end.told(OTHER)["same host"].startswith("shown")


def test_live_links_count(linked):
    refused(linked.engine.switch_role, LLMRole.DECODER, code=EXIST_LINK)
    assert linked.unlink(OTHER, NOWHERE) is SUCCESS
    linked.engine.switch_role(LLMRole.DECODER)


@pytest.mark.parametrize("address", [None, NOWHERE], ids=["by force", "in good order"])
def test_an_unlinked_cluster_has_no_link(linked, address):
    cache_id = linked.add("give", desc([1, 8]), 1)
    linked.add("take", desc([1, 8]), 2)
    key = CacheKeyByIdAndIndex(OTHER, cache_id)
    linked.manage("pull_cache", key, "take")
    for _ in range(2):
        assert linked.unlink(OTHER, address) is SUCCESS
    refused(linked.manage, "pull_cache", key, "take", code=NOT_YET_LINK)
    assert linked.link(NOWHERE, OTHER) is SUCCESS
    linked.manage("pull_cache", key, "take")


def test_a_link_to_the_own_cluster_goes_over_sockets_and_is_no_source(opened):
    end = opened()
    assert end.link(end.engine.listen_address, OURS) is SUCCESS
    assert "transport" not in end.told(OURS)
    cache_id = end.add("any", desc([1, 8]), 1)
    refused(end.manage, "pull_cache", CacheKeyByIdAndIndex(OURS, cache_id), "any")


def test_what_is_wrong_with_a_cluster_info_is_refused_all_the_same(opened, quiet):
    end = opened(listen=None)
    twice = cluster(NOWHERE, OTHER)
    twice.append_remote_ip_info("127.0.0.1", 2)
    assert end.engine.link_clusters([twice]) == (PARAM_INVALID, [PARAM_INVALID])
    assert end.link(NOWHERE, None) is LINK_FAILED  # whom it means is only known over the network
    with pytest.raises(LLMException, match="local_ip_info_list is empty"):
        end.engine.link_clusters([cluster(NOWHERE, OTHER, local=None)])


def test_a_peer_that_is_real_is_linked_as_ever(linked):
    with Peer() as peer:
        address = peer.open(OTHER, one_sided=linked.one_sided)
        assert linked.unlink(OTHER) is SUCCESS
        assert peer.link(linked.engine.listen_address, OURS) is SUCCESS
        assert linked.told(OTHER)["transport"] != "loopback"
        assert linked.link(address, OTHER) is ALREADY_LINK
        pull_each_kind(linked, peer, OTHER, linked.one_sided)


def test_groups_as_the_originals_tests_have_them(opened):
    end = opened(listen=None)
    table = '{"server_list":[{"device":[{}]}]}'
    for comm_id, name in ((1, "link"), (2, "link2")):
        assert end.engine.link(name, {OURS: 0, OTHER: 1}, table) == comm_id
        assert end.engine.query_register_mem_status(comm_id) is RegisterMemStatus.OK
    end.engine.unlink(1)
    pull_each_kind(end, end, OTHER)
    push_each_kind(end, end, OTHER)
    end.engine.unlink(2)
    cache_id = end.add("any", desc([1, 8]), 1)
    refused(end.manage, "pull_cache", CacheKeyByIdAndIndex(OTHER, cache_id), "any", code=NOT_YET_LINK)
    refused(end.engine.unlink, 2, code=NOT_YET_LINK)


# --- pulls


def test_every_kind_of_pull_finds_this_processs_own_caches(linked):
    for _ in range(2):
        pull_each_kind(linked, linked, OTHER, linked.one_sided)


def test_a_row_that_was_allocated_after_the_link_is_pulled_once(opened):
    end = opened()
    assert end.link(NOWHERE, OTHER) is SUCCESS
    key = CacheKey(OTHER, req_id=1)
    end.add("give", desc([2, 8], 2), 1, [CacheKey(OTHER, req_id=0), key], owned=True)
    end.add("take", desc([2, 8], 2), 2, owned=True)
    end.manage("pull_cache", key, "take", 1)
    for tensor, got in enumerate(end.content("take")):
        wanted = np.concatenate([pattern(2, tensor, 16)[:8], pattern(1, tensor, 16)[8:]])
        assert np.array_equal(got, wanted)
    refused(end.manage, "pull_cache", key, "take", code=LLMStatusCode.LLM_KV_CACHE_NOT_EXIST)


def test_tensors_per_layer_as_the_originals_tests_have_them(linked):
    small, large = linked.add("small", desc([1, 8]), 1), linked.add("large", desc([1, 8], 10), 2)
    layers = {"src_layer_range": range(1), "dst_layer_range": range(1)}
    linked.add("take one", desc([1, 8]), 3)
    linked.add("take ten", desc([1, 8], 10), 4)
    refused(linked.manage, "pull_cache", CacheKeyByIdAndIndex(OTHER, small), "take one", **layers)
    linked.manage("pull_cache", CacheKeyByIdAndIndex(OTHER, small), "take one", size=4)
    linked.manage("pull_cache", CacheKeyByIdAndIndex(OTHER, large), "take ten", **layers)
    assert np.array_equal(linked.content("take one")[0][:4], pattern(1, 0, 8)[:4])
    for tensor, got in enumerate(linked.content("take ten")):
        assert np.array_equal(got, pattern(2 if tensor < 2 else 4, tensor, 8))


# --- pushes


def test_every_kind_of_push_finds_this_processs_own_caches(linked):
    for _ in range(2):
        push_each_kind(linked, linked, OTHER, linked.one_sided)


def test_a_push_to_the_id_0_goes_to_the_key_0(opened):
    """As the original's tests have it, in one-sided mode."""
    end = opened(one_sided=True)
    assert end.link(NOWHERE, OTHER) is SUCCESS
    end.add("take", desc([1, 64], 2), 1, [CacheKey(OTHER, req_id=0, model_id=0)], owned=True)
    end.add("give", desc([1, 64], 2), 2, owned=True)
    end.manage("push_cache", CacheKeyByIdAndIndex(OTHER, 0), "give")
    for tensor, got in enumerate(end.content("take")):
        assert np.array_equal(got, pattern(2, tensor, 64))


@pytest.mark.parity("failure.not_linked")
def test_a_layerwise_transfer_to_a_cluster_without_a_link(opened):
    end = opened(one_sided=True)
    cache_id = end.add("give", desc([1, 64], 2), 1)
    config = TransferWithCacheKeyConfig(CacheKeyByIdAndIndex(OTHER, cache_id), range(1), range(1))
    task = end.manager.transfer_cache_async(end.caches["give"], Ready(), [config])
    assert task.synchronize(10_000) is NOT_YET_LINK


# --- how it is switched on


def test_it_is_off_unless_it_is_asked_for(quiet):
    end = End()
    end.open(OURS, listen=None)
    assert end.link(NOWHERE, OTHER) is LINK_FAILED
    end.close()


def test_the_environment_switches_it_on(monkeypatch):
    monkeypatch.setenv("LLM_DATADIST_FABRIC", "loopback")
    end = End()
    end.open(OURS, listen=None)
    assert end.link(NOWHERE, OTHER) is SUCCESS
    end.close()


def test_another_value_is_refused(opened):
    failure = refused(opened, fabric="memory")
    assert "open.Fabric" in failure.cause


def test_the_log_says_so_once(lines, opened):
    opened().close()
    said = [level for level, text in lines if "open.Fabric is loopback" in text]
    assert said == ["WARNING"]


def test_the_example_of_the_guide():
    (program,) = re.findall(r"^```python\n(# one_end.py\n.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "LLMStatusCode.LLM_SUCCESS\n[0. 1. 2. 3. 4. 5. 6. 7.]\n"
