# SPDX-License-Identifier: Apache-2.0
"""LLMConfig, LLMClusterInfo and address conversion."""

from __future__ import annotations

import json
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

import llm_datadist_v1
from llm_datadist import LLMClusterInfo, LLMConfig, LlmConfig, LLMException, LLMRole, LLMStatusCode
from llm_datadist.configs import trans_str_ip

BOTH = pytest.mark.parametrize("config_class", [LLMConfig, llm_datadist_v1.LLMConfig], ids=["v2", "v1"])

U32 = 2**32 - 1
INT32 = 2**31 - 1
V2_ONLY = {"link_total_time", "link_retry_count", "transfer_backend", "global_resource_config"}

# property: (default, [(value, emitted entries)])
GOOD = {
    "device_id": (
        None,
        [
            (3, {"ge.exec.deviceId": "3", "ge.session_device_id": "3"}),
            (0, {"ge.exec.deviceId": "0", "ge.session_device_id": "0"}),
            ([2, 1], {"ge.exec.deviceId": "2;1", "ge.session_device_id": "2"}),
            ((INT32,), {"ge.exec.deviceId": "2147483647", "ge.session_device_id": "2147483647"}),
            (True, {"ge.exec.deviceId": "True", "ge.session_device_id": "True"}),
        ],
    ),
    "sync_kv_timeout": (
        None,
        [(1, "1"), ("3000", "3000"), (INT32, str(INT32)), (str(INT32), str(INT32))],
    ),
    "deploy_res_path": ("", [("/tmp/a", "/tmp/a"), ("", {}), (None, {})]),
    "ge_options": ({}, [({"a": "b", "c": ""}, {"a": "b", "c": ""}), ({}, {})]),
    "output_max_size": (None, [(5, "5"), (-5, "-5"), (None, {})]),
    "mem_utilization": (0.95, [(0.0, "0.0"), (1.0, "1.0"), (0.5, "0.5")]),
    "buf_pool_cfg": ("", [("{}", "{}"), ("", {})]),
    "mem_pool_cfg": ("", [('{"memory_size": 1}', '{"memory_size": 1}'), ("", {}), (None, {})]),
    "host_mem_pool_cfg": ("", [("not json", "not json"), ("", {})]),
    "listen_ip_info": ("", [("0.0.0.0:26000", "0.0.0.0:26000"), ("", {})]),
    "enable_switch_role": (False, [(True, "1"), (False, {}), (None, {})]),
    "enable_cache_manager": (False, [(True, "1"), (False, "0"), (None, {})]),
    "enable_remote_cache_accessible": (False, [(True, "1"), (False, "0"), (None, {})]),
    "link_total_time": (0, [(0, "0"), (U32, str(U32))]),
    "link_retry_count": (1, [(1, "1"), (100, "100")]),
    "rdma_traffic_class": (None, [(0, "0"), (100, "100"), (U32, str(U32))]),
    "rdma_service_level": (None, [(100, "100")]),
    "local_comm_res": ("", [("{}", "{}"), ("", ""), (None, {})]),
    "transfer_backend": ("", [("hixl", "hixl"), ("", ""), (None, {})]),
    "global_resource_config": ("", [("{}", "{}"), ("", ""), (None, {})]),
    "device": (None, [("host", "host"), ("anything", "anything"), ("", ""), (None, {})]),
    "cann_path": (None, [("/there", "/there"), (None, {})]),
    "transport": (None, [("tcp", "tcp"), (None, {})]),
    "fabric": (None, [("loopback", "loopback"), (None, {})]),
    "multiple_engines": (None, [(True, "1"), (False, "0"), (None, {})]),
    "rendezvous_port": (None, [(16666, "16666"), (None, {})]),
    "copy_threads": (None, [(64, "64"), (0, "0"), (None, {})]),
    "tcp_connections": (None, [(2, "2"), (None, {})]),
    "spin_micros": (None, [(0, "0"), (None, {})]),
    "peer_dead_millis": (None, [(5000, "5000"), (None, {})]),
    "relink": (None, [(True, "1"), (False, "0"), (None, {})]),
    "integrity": (None, [("always", "always"), (None, {})]),
    "auth_secret_file": (None, [("/s", "/s"), (None, {})]),
    "tls_cert_file": (None, [("/c", "/c"), (None, {})]),
    "tls_key_file": (None, [("/k", "/k"), (None, {})]),
    "tls_ca_file": (None, [("/a", "/a"), (None, {})]),
    "metrics_address": (None, [("127.0.0.1:9100", "127.0.0.1:9100"), (None, {})]),
}

KEYS = {
    "sync_kv_timeout": "llm.SyncKvCacheWaitTime",
    "deploy_res_path": "llm.deployResPath",
    "output_max_size": "llm.OutputMaxSize",
    "mem_utilization": "llm.MemoryUtilization",
    "buf_pool_cfg": "llm.BufPoolCfg",
    "mem_pool_cfg": "llm.MemPoolConfig",
    "host_mem_pool_cfg": "llm.HostMemPoolConfig",
    "listen_ip_info": "llm.listenIpInfo",
    "enable_switch_role": "llm.EnableSwitchRole",
    "enable_cache_manager": "llm.EnableCacheManager",
    "enable_remote_cache_accessible": "llm.EnableRemoteCacheAccessible",
    "link_total_time": "llm.LinkTotalTime",
    "link_retry_count": "llm.LinkRetryCount",
    "rdma_traffic_class": "llm.RdmaTrafficClass",
    "rdma_service_level": "llm.RdmaServiceLevel",
    "local_comm_res": "llm.LocalCommRes",
    "transfer_backend": "llm.TransferBackend",
    "global_resource_config": "llm.GlobalResourceConfig",
    "device": "open.Device",
    "cann_path": "open.CannPath",
    "transport": "open.Transport",
    "fabric": "open.Fabric",
    "multiple_engines": "open.MultipleEngines",
    "rendezvous_port": "open.RendezvousPort",
    "copy_threads": "open.CopyThreads",
    "tcp_connections": "open.TcpConnections",
    "spin_micros": "open.SpinMicros",
    "peer_dead_millis": "open.PeerDeadMillis",
    "relink": "open.Relink",
    "integrity": "open.Integrity",
    "auth_secret_file": "open.AuthSecretFile",
    "tls_cert_file": "open.TlsCertFile",
    "tls_key_file": "open.TlsKeyFile",
    "tls_ca_file": "open.TlsCaFile",
    "metrics_address": "open.MetricsAddress",
}

STRINGS = [name for name, (default, _) in GOOD.items() if default == "" or name in ("device", "transport", "fabric")]
STRINGS += ["cluster_info", "integrity", "auth_secret_file", "tls_cert_file", "tls_key_file", "tls_ca_file"]
STRINGS += ["metrics_address", "cann_path"]
NUMBERS = ["rendezvous_port", "copy_threads", "tcp_connections", "spin_micros", "peer_dead_millis"]
FLAGS = ["enable_switch_role", "enable_cache_manager", "enable_remote_cache_accessible", "multiple_engines", "relink"]

BAD = [
    *((name, value, TypeError) for name in STRINGS for value in (1, b"x", ["x"])),
    *((name, value, TypeError) for name in NUMBERS for value in ("1", 1.0, True)),
    *((name, value, TypeError) for name in FLAGS for value in (1, "1", 0)),
    *(("device_id", value, TypeError) for value in ("0", 1.0, None, [None], ["0"], {1})),
    *(("device_id", value, LLMException) for value in (-1, [0, -1], (-(2**40),), [], ())),
    *(("device_id", value, ValueError) for value in (INT32 + 1, [0, INT32 + 1])),
    *(("sync_kv_timeout", value, TypeError) for value in (1.0, None, [1])),
    *(
        ("sync_kv_timeout", value, LLMException)
        for value in (0, -1, "0", "-1", "+1", "1.5", "", "1s", "\u0661", "\xb2")
    ),
    *(("sync_kv_timeout", value, ValueError) for value in (INT32 + 1, str(INT32 + 1))),
    *(("ge_options", value, TypeError) for value in ("a", {"a": 1}, {1: "a"}, {"a": None}, [("a", "b")])),
    ("ge_options", None, AttributeError),
    ("cluster_info", None, TypeError),
    ("cluster_info", "{", json.JSONDecodeError),
    ("cluster_info", "", json.JSONDecodeError),
    ("cluster_info", '{"listen_ip_info": [{"ip": "no ip"}]}', RuntimeError),
    *(("output_max_size", value, TypeError) for value in ("1", 1.0)),
    *(("mem_utilization", value, TypeError) for value in (1, 0, "0.5", None)),
    *(("mem_utilization", value, LLMException) for value in (-0.01, 1.01, float("nan"), float("inf"))),
    *((name, value, TypeError) for name in ("link_total_time", "link_retry_count") for value in ("1", 1.0, None)),
    *(("link_total_time", value, LLMException) for value in (-1, U32 + 1)),
    *(("link_retry_count", value, LLMException) for value in (0, 101, -1)),
    *((name, value, TypeError) for name in ("rdma_traffic_class", "rdma_service_level") for value in (None, "1", 1.0)),
    *((name, value, ValueError) for name in ("rdma_traffic_class", "rdma_service_level") for value in (-1, U32 + 1)),
]


def cases(name, pairs):
    for value, emitted in pairs:
        yield name, value, {KEYS[name]: emitted} if isinstance(emitted, str) else emitted


def proof(name):
    """The mark of a test that proves the row of a documented property; our own have no row."""
    row = "rdma" if name.startswith("rdma_") else name
    return () if KEYS.get(name, "").startswith("open.") else pytest.mark.parity(f"config.{row}")


def with_classes(rows):
    """Each row once for each config class that has the property."""
    for row in rows:
        for config_class in (LLMConfig,) if row[0] in V2_ONLY else (LLMConfig, llm_datadist_v1.LLMConfig):
            yield pytest.param(config_class, *row, marks=proof(row[0]))


@BOTH
@pytest.mark.parametrize("name", GOOD)
def test_default(config_class, name):
    if config_class is not LLMConfig and name in V2_ONLY:
        assert not hasattr(config_class(), name)
        return
    expected = "" if config_class is not LLMConfig and name == "output_max_size" else GOOD[name][0]
    assert getattr(config_class(), name) == expected
    assert type(getattr(config_class(), name)) is type(expected)


@pytest.mark.parametrize(
    ("config_class", "name", "value", "emitted"),
    with_classes(case for name, (_, pairs) in GOOD.items() for case in cases(name, pairs)),
)
def test_good_value_is_kept_and_emitted(config_class, name, value, emitted):
    config = config_class()
    setattr(config, name, value)
    if value is not None:
        assert getattr(config, name) == value
    assert config.generate_options() == {"llm.MemoryUtilization": "0.95", **emitted}


@pytest.mark.parametrize(("config_class", "name", "value", "error"), with_classes(BAD))
def test_bad_value_is_refused_and_changes_nothing(config_class, name, value, error):
    config = config_class()
    before = getattr(config, name)
    with pytest.raises(error) as failure:
        setattr(config, name, value)
    assert type(failure.value) is error
    if error is LLMException:
        assert failure.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert getattr(config, name) == before
    assert config.generate_options() == {"llm.MemoryUtilization": "0.95"}


def test_assigning_none_unsets_again():
    config = LLMConfig()
    config.local_comm_res = "{}"
    config.enable_cache_manager = True
    config.mem_pool_cfg = "{}"
    config.local_comm_res = config.enable_cache_manager = config.mem_pool_cfg = None
    assert (config.local_comm_res, config.enable_cache_manager, config.mem_pool_cfg) == ("", False, None)
    assert config.generate_options() == {"llm.MemoryUtilization": "0.95"}


@pytest.mark.parity("config.generate_options", "config.mem_utilization")
@BOTH
def test_minimal_emission(config_class):
    config = config_class()
    config.device_id = 0
    assert config.generate_options() == {
        "ge.exec.deviceId": "0",
        "ge.session_device_id": "0",
        "llm.MemoryUtilization": "0.95",
    }


@pytest.mark.parity("config.generate_options", "config.options")
@BOTH
def test_options_are_one_dict_that_accumulates(config_class):
    config = config_class()
    options = config.options
    assert options == {}
    config.transport = "tcp"
    assert config.generate_options() is config.gen_options() is config.options is options
    options["my.key"] = "mine"
    config.transport = None
    config.generate_options()
    assert options == {"llm.MemoryUtilization": "0.95", "open.Transport": "tcp", "my.key": "mine"}
    with pytest.raises(AttributeError):
        config.options = {}
    assert config_class().options == {}


@pytest.mark.parity("config.ge_options")
def test_properties_overwrite_ge_options():
    config = LLMConfig()
    config.device_id = 1
    config.ge_options = {"ge.exec.deviceId": "9", "other": "x"}
    assert config.generate_options()["ge.exec.deviceId"] == "1"
    assert config.options["other"] == "x"


@pytest.mark.parity("config.ge_options")
def test_ge_options_may_be_changed_in_place():
    config = LLMConfig()
    config.ge_options["ge.exec.rankId"] = "1"
    assert config.generate_options()["ge.exec.rankId"] == "1"
    config.ge_options = {"other": "x"}
    config.ge_options["other"] = "y"
    config.ge_options.update({"ge.flowGraphMemMaxSize": "1024"})
    assert config.generate_options() == {
        "llm.MemoryUtilization": "0.95",
        "ge.exec.rankId": "1",
        "other": "y",
        "ge.flowGraphMemMaxSize": "1024",
    }


def test_ge_options_are_not_shared_between_configs():
    LLMConfig().ge_options["a"] = "b"
    assert LLMConfig().ge_options == {}


def test_backing_fields_may_be_assigned():
    config = LLMConfig()
    config._enable_remote_cache_accessible = True
    assert config.enable_remote_cache_accessible is True
    assert config.generate_options()["llm.EnableRemoteCacheAccessible"] == "1"


@pytest.mark.parity("config.cluster_info")
def test_cluster_info_has_its_addresses_converted():
    config = LLMConfig()
    config.cluster_info = json.dumps(
        {"cluster_id": 1, "listen_ip_info": [{"ip": "1.2.3.4", "port": 5}, {"ip": 16777343, "port": 6}]}
    )
    expected = {"cluster_id": 1, "listen_ip_info": [{"ip": 0x04030201, "port": 5}, {"ip": 16777343, "port": 6}]}
    assert json.loads(config.generate_options()["llm.ClusterInfo"]) == expected
    assert config.cluster_info == config.options["llm.ClusterInfo"]
    config.cluster_info = '{"cluster_id": 2}'
    assert json.loads(config.cluster_info) == {"cluster_id": 2}


@pytest.mark.parity("module.config_alias", "config.new")
def test_config_names():
    assert LLMConfig is LlmConfig
    assert llm_datadist_v1.LLMConfig is llm_datadist_v1.LlmConfig is not LLMConfig
    with pytest.raises(TypeError):
        LLMConfig(1)
    assert "open.Relink" in LLMConfig.relink.__doc__


# --- addresses


@pytest.mark.parity("module.trans_str_ip")
@pytest.mark.parametrize(
    ("text", "number"),
    [("127.0.0.1", 16777343), ("1.2.3.4", 0x04030201), ("127.1", 16777343), ("1", 0x01000000), ("0x7f.1", 16777343)],
)
def test_trans_str_ip(text, number):
    assert trans_str_ip(text) == number


@pytest.mark.parity("module.trans_str_ip")
@given(st.integers(0, U32))
def test_trans_str_ip_is_inet_ntoa_backwards(number):
    dotted = socket.inet_ntoa(number.to_bytes(4, "little"))
    assert trans_str_ip(dotted) == number
    assert trans_str_ip(number) == number


@pytest.mark.parity("module.trans_str_ip")
@pytest.mark.parametrize("text", ["", "256.1.1.1", "localhost", "::1", "1.2.3.4.5", "1.2.3.4\0", "\ud800"])
def test_trans_str_ip_refuses(text):
    with pytest.raises(RuntimeError) as failure:
        trans_str_ip(text)
    assert type(failure.value) is RuntimeError


# --- cluster info


@pytest.mark.parity("cluster.new")
def test_cluster_info_starts_empty():
    info = LLMClusterInfo()
    assert (info.remote_cluster_id, info.remote_role_type) == (None, None)
    assert info.local_ip_info_list == info.remote_ip_info_list == []


@pytest.mark.parity("cluster.append_ip_info", "cluster.ip_info_lists")
@pytest.mark.parametrize("side", ["local", "remote"])
def test_append_ip_info(side):
    info = LLMClusterInfo()
    live = getattr(info, f"{side}_ip_info_list")
    append = getattr(info, f"append_{side}_ip_info")
    append("127.0.0.1", 0)
    append(5, 65535)
    append(None, 1)
    assert live == [(16777343, 0), (5, 65535), (None, 1)]
    other = "remote" if side == "local" else "local"
    assert getattr(info, f"{other}_ip_info_list") == []
    for ip, port, error in [
        (1.0, 1, TypeError),
        (b"1", 1, TypeError),
        ("127.0.0.1", "1", TypeError),
        ("127.0.0.1", None, TypeError),
        ("127.0.0.1", -1, ValueError),
        ("127.0.0.1", 65536, ValueError),
        ("nowhere", 1, RuntimeError),
    ]:
        with pytest.raises(error):
            append(ip, port)
    assert len(live) == 3


@pytest.mark.parity("cluster.remote_cluster_id")
@pytest.mark.parametrize(
    ("value", "error"), [(None, TypeError), ("1", TypeError), (-1, ValueError), (2**64, ValueError)]
)
def test_remote_cluster_id(value, error):
    info = LLMClusterInfo()
    info.remote_cluster_id = 2**64 - 1
    with pytest.raises(error):
        info.remote_cluster_id = value
    assert info.remote_cluster_id == 2**64 - 1


@pytest.mark.parity("cluster.remote_role_type")
def test_remote_role_type():
    info = LLMClusterInfo()
    for value in (LLMRole.PROMPT, 7, None):
        info.remote_role_type = value
        assert info.remote_role_type is value
    with pytest.raises(TypeError):
        info.remote_role_type = "PROMPT"


@pytest.mark.parity("enum.role")
@pytest.mark.parametrize(("name", "value"), [("PROMPT", 1), ("DECODER", 2), ("MIX", 3)])
def test_roles(name, value):
    assert LLMRole[name] == value and str(LLMRole[name]) == f"LLMRole.{name}"
    assert len(LLMRole) == 3
