# SPDX-License-Identifier: Apache-2.0
"""Links, roles and options of the older API, in both packages."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest

import llm_datadist
import llm_datadist_v1
from llm_datadist import CacheKey, LLMClusterInfo, LLMException, LLMRole, LLMStatusCode, _native
from llm_datadist.v2.config import ClusterConfig, EngineConfig
from older import (
    DECODER,
    KEY,
    NOT_YET_LINK,
    OFFER,
    PARAM_INVALID,
    PROMPT,
    SERVE,
    SUCCESS,
    content,
    opened,
    settings,
    several,
)
from peers import ADDRESS, Background, Peer, cluster, desc, pattern, refused, wait_until

ALREADY = LLMStatusCode.LLM_ALREADY_LINK
BUSY = LLMStatusCode.LLM_LINK_BUSY
ENABLED = LLMStatusCode.LLM_FEATURE_NOT_ENABLED
EXIST_LINK = LLMStatusCode.LLM_EXIST_LINK
FAILED = LLMStatusCode.LLM_FAILED
LINK_FAILED = LLMStatusCode.LLM_LINK_FAILED
NOT_TOLD = LLMStatusCode.LLM_NOTIFY_PROMPT_UNLINK_FAILED
REPEAT = LLMStatusCode.LLM_REPEAT_REQUEST
TOO_MANY = LLMStatusCode.LLM_CLUSTER_NUM_EXCEED_LIMIT
UNLINK_FAILED = LLMStatusCode.LLM_UNLINK_FAILED
WAIT_TIMEOUT = LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT
NOBODY = "127.0.0.1:1"

PACKAGES = pytest.mark.parametrize("package", [llm_datadist, llm_datadist_v1], ids=lambda package: package.__name__)


@pytest.fixture
def address(remote):
    """Where the prompt listens."""
    yield remote.run(SERVE)
    remote.run("del end.kv_caches[:]")


# --- link_clusters


def test_a_call_as_a_whole_is_refused(decoder):
    two_locals = cluster(NOBODY, 5)
    two_locals.append_local_ip_info("127.0.0.1", 0)
    another_local = cluster(NOBODY, 6, local="127.0.0.2")
    for clusters in (
        [],
        [cluster(NOBODY, 5, local=None)],
        [two_locals],
        [several([NOBODY, NOBODY])],
        [cluster(NOBODY, 5), another_local],
    ):
        assert decoder.link_clusters(clusters, 5000) == (PARAM_INVALID, [])
    many = [cluster(NOBODY, number) for number in range(17)]
    assert decoder.link_clusters(many, 5000) == (TOO_MANY, [])
    assert decoder.unlink_clusters(many, 5000) == (TOO_MANY, [])
    assert decoder.unlink_clusters([], 5000) == (PARAM_INVALID, [])


def test_only_a_decoder_links():
    engine = opened(LLMRole.PROMPT)
    assert engine.link_clusters([cluster(NOBODY, 5)], 5000) == (PARAM_INVALID, [])
    refused(engine.check_link_status, 5)
    engine.finalize()


@pytest.mark.parity("engine.link_clusters", "engine.check_link_status")
def test_each_entry_has_its_code(process, address, decoder, quiet):
    good, bad = cluster(address, PROMPT), cluster(NOBODY, 9)
    assert decoder.link_clusters([good, bad, good], 5000) == (LINK_FAILED, [SUCCESS, LINK_FAILED, REPEAT])
    assert decoder.link_clusters([good], 5000) == (SUCCESS, [ALREADY])
    assert decoder.link_clusters((good, bad), 5000) == (LINK_FAILED, [ALREADY, LINK_FAILED])
    assert decoder.check_link_status(PROMPT) is None
    refused(decoder.check_link_status, 9, code=NOT_YET_LINK)


@pytest.mark.parity("engine.link_clusters")
@pytest.mark.parametrize("decoder", [{"fabric": "loopback"}], indirect=True)
def test_there_are_512_links_at_most(decoder):
    clusters = [cluster(NOBODY, 100 + number) for number in range(513)]
    for first in range(0, 512, 16):
        assert decoder.link_clusters(clusters[first : first + 16], 10_000) == (SUCCESS, [SUCCESS] * 16)
    assert decoder.link_clusters(clusters[512:], 10_000) == (PARAM_INVALID, [])
    assert decoder.link_clusters([clusters[0], clusters[512]], 10_000) == (PARAM_INVALID, [])
    assert decoder.link_clusters([clusters[0]], 10_000) == (SUCCESS, [ALREADY])  # which makes none more
    refused(decoder.check_link_status, 612, code=NOT_YET_LINK)
    assert decoder.check_link_status(611) is None
    assert decoder.unlink_clusters([clusters[5]], 10_000) == (SUCCESS, [SUCCESS])  # every address leads to the loopback fabric
    assert decoder.link_clusters(clusters[512:], 10_000) == (SUCCESS, [SUCCESS])


def test_one_call_links_at_a_time(process, address, decoder, quiet):
    with process.stopped():
        first = Background(decoder.link_clusters, [cluster(address, PROMPT)], 2000)
        wait_until(decoder._llm_datadist._turn.locked, "the first call is under way")
        assert decoder.link_clusters([cluster(address, PROMPT)], 100) == (LLMStatusCode.LLM_PROCESSING_LINK, [])
        assert first.result() == (LINK_FAILED, [WAIT_TIMEOUT])
    assert decoder.link_clusters([cluster(address, PROMPT)], 10_000) == (SUCCESS, [SUCCESS])


# --- unlink_clusters


@pytest.mark.parity("engine.unlink_clusters")
def test_a_decoder_unlinks(process, address, decoder):
    good, other = cluster(address, PROMPT), cluster(NOBODY, 9)
    assert decoder.unlink_clusters([good], 5000) == (SUCCESS, [NOT_YET_LINK])
    decoder.link_clusters([good], 5000)
    assert decoder.unlink_clusters([cluster(NOBODY, PROMPT)], 5000) == (UNLINK_FAILED, [PARAM_INVALID])
    no_address = LLMClusterInfo()
    no_address.remote_cluster_id = PROMPT
    assert decoder.unlink_clusters([no_address], 5000) == (UNLINK_FAILED, [PARAM_INVALID])
    assert decoder.unlink_clusters([other, good], 5000) == (SUCCESS, [NOT_YET_LINK, SUCCESS])
    decoder.link_clusters([good], 5000)
    assert decoder.unlink_clusters([no_address], 5000, True) == (SUCCESS, [SUCCESS])
    assert decoder.link_clusters([good], 5000) == (SUCCESS, [SUCCESS])


def test_a_cluster_id_that_was_never_set_is_that_of_the_prompt(process, address, decoder):
    process.run(OFFER, described=desc([1, 8]), keys=[KEY], number=1)
    assert decoder.link_clusters([cluster(address, None)], 5000) == (SUCCESS, [SUCCESS])
    cache = decoder.kv_cache_manager.allocate_cache(desc([1, 8]))
    decoder.kv_cache_manager.pull_cache(KEY, cache)
    assert np.array_equal(content(cache), pattern(1, 0, 8))
    refused(decoder.unlink_clusters, [cluster(address, None)], 5000, error=TypeError)
    assert decoder.unlink_clusters([cluster(address, PROMPT)], 5000) == (SUCCESS, [SUCCESS])


@pytest.mark.usefixtures("transport", "quiet")
def test_a_prompt_that_vanished_is_unlinked_by_its_id_and_its_successor_linked_again_on_the_same_objects():
    by_id = LLMClusterInfo()
    by_id.remote_cluster_id = PROMPT
    engine, address = llm_datadist.LLMDataDist(LLMRole.DECODER, DECODER), ADDRESS
    for life in range(3):
        engine.init(settings())
        code, codes = engine.unlink_clusters([by_id], 5000, True)  # not linked yet
        assert (code, codes) == (SUCCESS, [NOT_YET_LINK])
        for restart in range(2):
            number = 2 * life + restart
            with Peer() as process:
                address = process.run(SERVE.replace(ADDRESS, address))
                process.run(OFFER, described=desc([1, 8]), keys=[KEY], number=number)
                assert engine.link_clusters([cluster(address, PROMPT)], 5000) == (SUCCESS, [SUCCESS])
                cache = engine.kv_cache_manager.allocate_cache(desc([1, 8]))
                engine.kv_cache_manager.pull_cache(KEY, cache)
                assert np.array_equal(content(cache), pattern(number, 0, 8))
                process.kill()
            assert engine.unlink_clusters([by_id], 5000, True)[0] is SUCCESS
        engine.finalize()


def test_a_prompt_that_does_not_answer_has_not_been_told(process, address, decoder, quiet):
    good = cluster(address, PROMPT)
    decoder.link_clusters([good], 5000)
    with process.stopped():
        assert decoder.unlink_clusters([good], 300) == (UNLINK_FAILED, [NOT_TOLD])
    assert decoder.unlink_clusters([good], 10_000)[0] is SUCCESS  # it may have read the message meanwhile


@pytest.mark.parametrize("decoder", [{"sync_kv_timeout": 3000}], indirect=True)
def test_a_link_in_use_is_busy_at_the_deadline(process, address, decoder, quiet):
    good = cluster(address, PROMPT)
    process.run(OFFER, described=desc([1, 8]), keys=[KEY], number=1)
    decoder.link_clusters([good], 5000)
    cache = decoder.kv_cache_manager.allocate_cache(desc([1, 8]))
    idle = _native.held()
    with process.stopped():
        pull = Background(decoder.kv_cache_manager.pull_cache, KEY, cache)
        wait_until(lambda: _native.held() > idle, "the pull is under way")
        assert decoder.unlink_clusters([good], 200) == (UNLINK_FAILED, [BUSY])
    assert pull.result() is None
    assert decoder.unlink_clusters([good], 10_000) == (SUCCESS, [SUCCESS])


@pytest.mark.parity("kv_manager.pulls", "engine.check_link_status")
@pytest.mark.parametrize("decoder", [{"sync_kv_timeout": 300}], indirect=True)
def test_a_link_that_is_being_unlinked_is_busy_at_the_deadline_of_a_pull(process, address, decoder, quiet):
    good = cluster(address, PROMPT)
    process.run(OFFER, described=desc([1, 8]), keys=[KEY], number=1)
    decoder.link_clusters([good], 5000)
    cache = decoder.kv_cache_manager.allocate_cache(desc([1, 8]))
    with process.stopped():
        unlink = Background(decoder.unlink_clusters, [good], 20_000)
        wait_until(lambda: "being unlinked" in decoder.explain(PROMPT), "the unlink is under way")
        call = Background(decoder.kv_cache_manager.pull_cache, KEY, cache)
        failure = refused(call.result, code=BUSY)
        assert (failure.operation, failure.peer, failure.address) == ("pull_cache", PROMPT, address)
        assert 0.2 < call.seconds < 0.3 + 1
        refused(decoder.check_link_status, PROMPT, code=BUSY)
    assert unlink.result() == (SUCCESS, [SUCCESS])
    refused(decoder.kv_cache_manager.pull_cache, KEY, cache, code=NOT_YET_LINK)


@pytest.mark.parity("kv_manager.pulls")
@pytest.mark.parametrize("decoder", [{"sync_kv_timeout": 10_000}], indirect=True)
def test_a_pull_that_waits_for_an_unlink_goes_on_where_the_link_stays(process, address, decoder, quiet):
    good, keys = cluster(address, PROMPT), [KEY, CacheKey(PROMPT, 2)]
    process.run(OFFER, described=desc([2, 8]), keys=keys, number=1)
    decoder.link_clusters([good], 5000)
    manager = decoder.kv_cache_manager
    caches = [manager.allocate_cache(desc([1, 8])) for _ in keys]
    idle = _native.held()
    with process.stopped():
        first = Background(manager.pull_cache, keys[0], caches[0])
        wait_until(lambda: _native.held() > idle, "the first pull is under way")
        unlink = Background(decoder.unlink_clusters, [good], 1000)
        wait_until(lambda: "being unlinked" in decoder.explain(PROMPT), "the unlink is under way")
        second = Background(manager.pull_cache, keys[1], caches[1])
        assert unlink.result() == (UNLINK_FAILED, [BUSY])
        assert first.running() and second.running()
    for row, call in enumerate((first, second)):
        assert call.result() is None
        assert np.array_equal(content(caches[row]), pattern(1, 0, 16)[8 * row : 8 * row + 8])
    assert decoder.unlink_clusters([good], 10_000) == (SUCCESS, [SUCCESS])


def test_a_prompt_unlinks_by_the_address_that_a_decoder_came_from(process, address, decoder):
    unlink = "result = end.engine.unlink_clusters([info], 5000)"
    assert decoder.link_clusters([cluster(address, PROMPT)], 5000) == (SUCCESS, [SUCCESS])
    wrong = cluster("127.0.0.2:0", DECODER)
    assert process.run(unlink, info=wrong) == (UNLINK_FAILED, [PARAM_INVALID])
    assert process.run(unlink, info=cluster("127.0.0.1:0", 77)) == (SUCCESS, [NOT_YET_LINK])
    assert process.run(unlink, info=cluster("127.0.0.1:0", DECODER)) == (SUCCESS, [SUCCESS])
    wait_until(lambda: decoder.unlink_clusters([cluster(address, PROMPT)], 5000)[1] == [NOT_YET_LINK], "the decoder sees it")


# --- check_link_status


@pytest.mark.parity("engine.check_link_status")
@pytest.mark.parametrize("decoder", [{"sync_kv_timeout": 300}], indirect=True)
def test_a_peer_that_does_not_answer_is_a_timeout(process, address, decoder):
    decoder.link_clusters([cluster(address, PROMPT)], 5000)
    with process.stopped():
        failure = refused(decoder.check_link_status, PROMPT, code=WAIT_TIMEOUT)
    assert (failure.operation, failure.peer) == ("check_link_status", PROMPT)
    decoder.check_link_status(PROMPT)


@pytest.mark.parity("engine.check_link_status")
@pytest.mark.parametrize("decoder", [{"sync_kv_timeout": 3000}], indirect=True)
def test_a_check_waits_until_nothing_is_under_way(process, address, decoder):
    process.run(OFFER, described=desc([2, 8]), keys=[KEY, CacheKey(PROMPT, 2)], number=1)
    decoder.link_clusters([cluster(address, PROMPT)], 5000)
    manager = decoder.kv_cache_manager
    cache = manager.allocate_cache(desc([2, 8]))
    idle = _native.held()
    with process.stopped():
        first = Background(manager.pull_cache, KEY, cache)
        wait_until(lambda: _native.held() == idle + 1, "the pull is under way")
        check = Background(decoder.check_link_status, PROMPT)
        wait_until(lambda: _native.held() == idle + 2, "the check is under way")
        later = time.monotonic() + 1
        wait_until(lambda: time.monotonic() > later, "the second pull will end well after the check")
        second = Background(manager.pull_cache, CacheKey(PROMPT, 2), cache, 1)
        refused(check.result, code=BUSY)
        for pull in (first, second):
            refused(pull.result, code=WAIT_TIMEOUT)
    decoder.check_link_status(PROMPT)


@pytest.mark.parity("engine.check_link_status")
def test_check_link_status_is_not_there_in_cache_manager_mode():
    engine = llm_datadist.LLMDataDist(LLMRole.DECODER, DECODER)
    with pytest.raises(RuntimeError):
        engine.check_link_status(1)
    engine.init({"llm.EnableCacheManager": "1"})
    refused(engine.check_link_status, 1)
    engine.finalize()


# --- switch_role


@pytest.mark.parity("engine.switch_role")
@PACKAGES
def test_a_role_is_switched_there_and_back(package):
    engine = package.LLMDataDist(LLMRole.DECODER, 1)
    engine.init(settings(enable_switch_role=True))
    refused(engine.switch_role, LLMRole.DECODER)
    refused(engine.switch_role, "Prompt", error=TypeError)
    refused(engine.switch_role, LLMRole.PROMPT, {})
    refused(engine.switch_role, LLMRole.PROMPT, [], error=TypeError)
    refused(engine.switch_role, LLMRole.PROMPT, error=LLMException if package is llm_datadist else TypeError)
    assert engine.listen_address is None
    engine.switch_role(LLMRole.PROMPT, {"llm.listenIpInfo": ADDRESS})
    assert engine.listen_address.startswith("127.0.0.1:")
    engine.kv_cache_manager.allocate_cache(desc([1, 8]), [KEY])
    engine.switch_role(LLMRole.DECODER)
    assert engine.listen_address is None
    refused(engine.kv_cache_manager.allocate_cache, desc([1, 8]), [KEY])
    engine.finalize()


def test_a_role_is_switched_where_that_was_asked_for(decoder):
    refused(decoder.switch_role, LLMRole.PROMPT, {"llm.listenIpInfo": ADDRESS}, code=ENABLED)
    assert decoder._role is LLMRole.DECODER


@pytest.mark.parity("engine.switch_role", "failure.live_links")
@pytest.mark.parametrize("decoder", [{"enable_switch_role": True}], indirect=True)
def test_a_role_is_not_switched_while_there_is_a_link(process, address, decoder):
    decoder.link_clusters([cluster(address, PROMPT)], 5000)
    refused(decoder.switch_role, LLMRole.PROMPT, {"llm.listenIpInfo": ADDRESS}, code=EXIST_LINK)
    assert decoder._role is LLMRole.DECODER


@PACKAGES
def test_the_native_object_is_called_by_its_names(package):
    engine = package.LLMDataDist(LLMRole.DECODER, 1)
    engine.init(settings())
    real, native = engine._llm_datadist, MagicMock()
    engine._llm_datadist = native
    native.switch_role.return_value = native.check_link_status.return_value = 0
    native.link_clusters.return_value = native.unlink_clusters.return_value = (int(LINK_FAILED), [int(FAILED)])
    engine.switch_role(LLMRole.PROMPT, {"llm.listenIpInfo": "1.2.0.0:26000"})
    native.switch_role.assert_called_once()
    name, options = native.switch_role.call_args.args
    assert name == "Prompt"
    assert (options["llm.ListenIp"], options["llm.ListenPort"]) == ("513", "26000")
    assert engine.kv_cache_manager._role is LLMRole.PROMPT
    assert engine.check_link_status(7) is None
    native.check_link_status.assert_called_once_with(7)
    assert engine.link_clusters([cluster(NOBODY, 5)], 10) == (LINK_FAILED, [FAILED])
    assert engine.unlink_clusters([cluster(NOBODY, 5)], 10, True) == (LINK_FAILED, [FAILED])
    assert native.link_clusters.call_args.args[1:] == (10,)
    assert native.unlink_clusters.call_args.args[1:] == (10, True)
    native.check_link_status.return_value = native.switch_role.return_value = int(BUSY)
    refused(engine.check_link_status, 7, code=BUSY)
    refused(engine.switch_role, LLMRole.DECODER, code=BUSY)
    assert engine._role is LLMRole.PROMPT
    engine.finalize()
    native.finalize.assert_called_once_with()
    real.finalize()


# --- init


def test_the_older_package_adds_to_the_options_that_it_is_given():
    options = {"ge.exec.deviceId": "0", "llm.listenIpInfo": "127.0.0.1:0"}
    engine = llm_datadist_v1.LLMDataDist(LLMRole.PROMPT, 3)
    engine.init(options)
    assert options["llm.Role"] == "Prompt"
    listen = {"ip": 0x0100007F, "port": 0}
    info = {"cluster_id": 3, "logic_device_id": ["0:0:0:0"], "listen_ip_info": [listen]}
    assert json.loads(options["llm.ClusterInfo"]) == info
    assert os.path.exists(options["ge.resourceConfigPath"])
    for name in ("cache_manager", "link", "unlink", "query_register_mem_status"):
        assert not hasattr(engine, name)
    other = llm_datadist.LLMDataDist(LLMRole.DECODER, 4)
    refused(other.init, settings(), code=FAILED)
    engine.finalize()
    other.init(settings())
    refused(engine.init, dict(options), code=FAILED)
    other.finalize()
    engine.init(options)  # with what the first one has added
    assert engine.listen_address.startswith("127.0.0.1:")
    llm_datadist_v1.llm_datadist._shutdown_handler()
    assert llm_datadist_v1.LLMDataDist.llm_engine_instance is None


def test_the_older_package_has_no_other_engine_in_cache_manager_mode():
    engine = llm_datadist_v1.LLMDataDist(LLMRole.DECODER, 3)
    engine.init({**settings(), "llm.EnableCacheManager": "1"})
    for call in (lambda: engine.kv_cache_manager, lambda: engine.check_link_status(1), lambda: engine.unlink_clusters([])):
        refused(call)
    for clusters in ([], [cluster(NOBODY, 5, local=None)]):
        assert engine.link_clusters(clusters, 5000) == (PARAM_INVALID, [])
    engine.finalize()


@PACKAGES
def test_what_init_needs(package, monkeypatch):
    def starts(given, role=LLMRole.PROMPT):
        package.LLMDataDist(role, 1).init(given)

    refused(starts, {}, error=KeyError)
    refused(starts, {"ge.exec.deviceId": "0"})
    refused(starts, {"ge.exec.deviceId": "0", "llm.listenIpInfo": "1.2.3.4"})
    refused(starts, {"ge.exec.deviceId": "0;1", "llm.listenIpInfo": ADDRESS})
    refused(starts, {"ge.exec.deviceId": "a"}, role=LLMRole.DECODER)
    refused(starts, {"ge.exec.deviceId": "0", "llm.MemoryUtilization": "much"}, role=LLMRole.DECODER, error=ValueError)
    refused(starts, {"llm.ClusterInfo": "[]"}, role=LLMRole.DECODER)
    for buffers in (
        "{",
        '{"buf_cfg": [{"total_size": 2097152}]}',
        '{"buf_cfg": [{"total_size": 2097152, "blk_size": 3, "max_buf_size": 1024}]}',
        '{"buf_cfg": [{"total_size": 1000, "blk_size": 256, "max_buf_size": 512}]}',
        '{"buf_cfg": [{"total_size": 2097152, "blk_size": 256, "max_buf_size": 128}]}',
    ):
        refused(starts, {"ge.exec.deviceId": "0", "llm.BufPoolCfg": buffers}, role=LLMRole.DECODER)


# --- EngineConfig


@pytest.mark.parity("module.v2_config")
def test_the_devices_of_an_engine():
    engine = llm_datadist.LLMDataDist(LLMRole.PROMPT, 1)
    engine.init({**settings(LLMRole.PROMPT, device_id=1), "ge.exec.rankId": "1"})
    for config in (engine._cluster_config(), EngineConfig.from_engine_options(True, engine._engine_options).cluster_config):
        assert isinstance(config, ClusterConfig) and config.rank_id_to_device_id == {1: 1}
    engine.finalize()
    engine = llm_datadist.LLMDataDist(LLMRole.DECODER, 1)
    engine.init(settings(device_id=[4, 2]))
    assert engine._cluster_config().rank_id_to_device_id == {0: 4, 1: 2}
    engine.finalize()


@pytest.mark.parity("module.v2_config")
def test_resources_may_be_given(monkeypatch, tmp_path):
    path = tmp_path / "resources.json"
    path.write_text(EngineConfig.gen_numa_config("7", "/deploy"))
    monkeypatch.setenv("RESOURCE_CONFIG_PATH", str(path))
    options = {"ge.exec.deviceId": "7"}
    EngineConfig.gen_cluster_info_if_not_exist(5, LLMRole.MIX, options)
    assert options["ge.resourceConfigPath"] == str(path)
    given = {"ge.exec.deviceId": "7", "ge.resourceConfigPath": "/given"}
    EngineConfig.gen_cluster_info_if_not_exist(5, LLMRole.MIX, given)
    assert given["ge.resourceConfigPath"] == "/given" and "llm.ClusterInfo" in given
    assert EngineConfig.from_engine_options(False, options).cluster_config.rank_id_to_device_id == {0: 7}
    refused(EngineConfig.from_engine_options, False, {"llm.ClusterInfo": options["llm.ClusterInfo"]})
    refused(EngineConfig.from_engine_options, False, {"ge.resourceConfigPath": str(path)})
    path.write_text(path.read_text().replace("true", "false"))
    refused(EngineConfig.from_engine_options, False, options)
    before = dict(options)
    EngineConfig.gen_cluster_info_if_not_exist(6, LLMRole.PROMPT, options)
    assert options == before


def test_resources_never_follow_a_link_that_somebody_left(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    path = "/tmp/stub_numa_config_decoder_987654.json"
    os.symlink(victim, path)
    try:
        EngineConfig.gen_cluster_info_if_not_exist(1, LLMRole.DECODER, {"ge.exec.deviceId": "987654"})
        assert victim.read_text() == "as it was"
        resources = json.loads(Path(path).read_text())
        assert resources["cluster"][0]["cluster_nodes"][0]["item_list"] == [{"item_id": 987654}]
    finally:
        os.unlink(path)


@pytest.mark.parity("module.v2_config")
def test_listen_addresses_are_integers():
    assert EngineConfig.parse_listen_ip_info("1.2.0.0:26000") == (513, 26000)
    refused(EngineConfig.parse_listen_ip_info, "1.2.0.0")
    refused(EngineConfig.parse_listen_ip_info, "1.2.0.0:x", error=ValueError)
