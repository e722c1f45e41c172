# SPDX-License-Identifier: Apache-2.0
"""LLMDataDist without a peer: init and its options, properties, switch_role, finalize, exit, log."""

from __future__ import annotations

import json
import pickle
import socket
import subprocess
import sys

import pytest

from llm_datadist import CacheKey, LLMDataDist, LLMException, LLMRole, LLMStatusCode, _native
from llm_datadist.v2.cache_manager import CacheManager
from llm_datadist.v2.llm_datadist import _shutdown_handler
from peers import ADDRESS, End, Peer, cluster, desc, options

PARAM_INVALID = LLMStatusCode.LLM_PARAM_INVALID
FEATURE_NOT_ENABLED = LLMStatusCode.LLM_FEATURE_NOT_ENABLED
FAILED = LLMStatusCode.LLM_FAILED

MANAGED = {"llm.EnableCacheManager": "1"}
COMM_RES = {"llm.LocalCommRes": ""}
HIXL = {"llm.TransferBackend": "hixl"}
LISTEN = {"llm.listenIpInfo": ADDRESS}
OLDER = {"ge.exec.deviceId": "0", **LISTEN}
ONE_SIDED = {"llm.EnableRemoteCacheAccessible": "1"}


def engine_with(given):
    engine = LLMDataDist(LLMRole.PROMPT, 1)
    engine.init(given)
    return engine


def refused(given, error=LLMException, code=PARAM_INVALID, text=""):
    """Check that init refuses the options, leaves nothing initialised, and that the same object can be initialised after."""
    engine = LLMDataDist(LLMRole.PROMPT, 1)
    with pytest.raises(error) as failure:
        engine.init(given)
    assert type(failure.value) is error
    assert text in str(failure.value)
    if error is LLMException:
        assert failure.value.status_code is code
    assert LLMDataDist.llm_engine_instance is None
    with pytest.raises(RuntimeError, match="not initialized"):
        _ = engine.cache_manager
    engine.finalize()
    engine.init(MANAGED)
    assert engine.cache_manager is not None
    engine.finalize()
    return failure.value


# --- construction


@pytest.mark.parity("engine.new")
@pytest.mark.parametrize(
    ("role", "cluster_id", "error"),
    [
        (1, 1, TypeError),
        ("Prompt", 1, TypeError),
        (LLMRole.PROMPT, None, TypeError),
        (LLMRole.PROMPT, "1", TypeError),
        (LLMRole.PROMPT, -1, ValueError),
        (LLMRole.PROMPT, 2**64, ValueError),
        ("Prompt", -1, TypeError),  # the role is looked at first
    ],
)
def test_constructor_refuses(role, cluster_id, error):
    with pytest.raises(error):
        LLMDataDist(role, cluster_id)


@pytest.mark.parity("engine.new", "engine.cluster_id", "engine.instance")
def test_several_objects_may_wait_to_be_initialised():
    first, second = LLMDataDist(LLMRole.MIX, 0), LLMDataDist(LLMRole.MIX, 2**64 - 1)
    assert (first.cluster_id, second.cluster_id) == (0, 2**64 - 1)
    assert LLMDataDist.llm_engine_instance is None


def test_no_role_passes_the_constructor_and_fails_in_init():
    with pytest.raises(KeyError):
        LLMDataDist(None, 1).init(MANAGED)
    assert LLMDataDist.llm_engine_instance is None


@pytest.mark.parity("engine.cache_manager", "engine.kv_cache_manager")
@pytest.mark.parametrize(
    "use",
    [
        lambda engine: engine.cache_manager,
        lambda engine: engine.kv_cache_manager,
        lambda engine: engine.listen_address,
        lambda engine: engine.explain(1),
        lambda engine: engine.link_clusters("not looked at", "not looked at"),
        lambda engine: engine.unlink_clusters("not looked at", "not looked at", "not looked at"),
        lambda engine: engine.switch_role("not looked at"),
    ],
)
@pytest.mark.parametrize("finalized", [False, True])
def test_use_before_init_or_after_finalize_is_a_runtime_error(use, finalized):
    engine = LLMDataDist(LLMRole.MIX, 1)
    if finalized:
        engine.init(MANAGED)
        engine.finalize()
    with pytest.raises(RuntimeError) as failure:
        use(engine)
    assert type(failure.value) is RuntimeError


# --- what init accepts


@pytest.mark.parity("engine.init")
def test_init_again_is_silent_whatever_the_options():
    engine = engine_with(MANAGED)
    manager = engine.cache_manager
    for given in (MANAGED, {"llm.TransferBackend": "no"}, None, 3):
        engine.init(given)
    assert engine.cache_manager is manager
    engine.finalize()


@pytest.mark.parity("engine.init", "engine.instance")
def test_a_process_has_one_engine():
    engine = engine_with(MANAGED)
    second = LLMDataDist(LLMRole.PROMPT, 2)
    for given in (MANAGED, None):  # the engine that lives counts before the type of the options
        with pytest.raises(LLMException) as failure:
            second.init(given)
        assert failure.value.status_code is FAILED
    assert LLMDataDist.llm_engine_instance is engine
    engine.finalize()
    second.init(MANAGED)
    assert LLMDataDist.llm_engine_instance is second
    second.finalize()
    engine.init(MANAGED)
    engine.finalize()


def test_the_callers_options_stay_as_they_were():
    given = {**COMM_RES, **LISTEN, "unknown": "ignored"}
    before = dict(given)
    engine = engine_with(given)
    assert given == before
    engine.finalize()


@pytest.mark.parity("engine.cache_manager", "engine.kv_cache_manager")
@pytest.mark.parametrize("role", LLMRole)
def test_any_role_has_a_cache_manager(role):
    engine = LLMDataDist(role, 1)
    engine.init({**MANAGED, **LISTEN})
    assert isinstance(engine.cache_manager, CacheManager)
    assert engine.cache_manager is engine.cache_manager
    with pytest.raises(LLMException) as failure:
        _ = engine.kv_cache_manager
    assert failure.value.status_code is PARAM_INVALID
    engine.finalize()


@pytest.mark.parity("engine.cache_manager", "engine.kv_cache_manager")
@pytest.mark.parametrize("given", [{}, {"llm.EnableCacheManager": "0"}, {"llm.EnableCacheManager": "true"}])
def test_without_cache_manager_mode_there_is_the_older_manager(given):
    engine = engine_with({**OLDER, **given})
    assert engine.kv_cache_manager.is_initialized()
    assert engine.kv_cache_manager is engine.kv_cache_manager
    with pytest.raises(LLMException) as failure:
        _ = engine.cache_manager
    assert failure.value.status_code is PARAM_INVALID
    engine.finalize()


def test_port_0_is_read_back():
    engine = engine_with({**MANAGED, **LISTEN})
    ip, port = engine.listen_address.split(":")
    assert ip == "127.0.0.1" and int(port) > 0
    with socket.create_connection((ip, int(port)), 10):
        pass
    engine.finalize()


def test_without_listen_info_there_is_no_listener():
    engine = engine_with(MANAGED)
    assert engine.listen_address is None
    engine.finalize()


ACCEPTED = [
    *[{"llm.EnableRemoteCacheAccessible": flag} for flag in "01"],
    {"ge.exec.deviceId": "7", "ge.session_device_id": "7"},
    {"llm.SyncKvCacheWaitTime": "1"},
    {"llm.SyncKvCacheWaitTime": "2147483647"},
    {"llm.RdmaTrafficClass": "0", "llm.RdmaServiceLevel": "4294967295"},
    {"llm.LinkTotalTime": "0"},
    {"llm.LinkRetryCount": "1"},
    {"llm.LinkRetryCount": "100"},
    {"llm.GlobalResourceConfig": "anything"},
    {"ge.flowGraphMemMaxSize": "1024"},
    {"llm.MemPoolConfig": ""},
    {"no.such.option": "ignored", "OPEN.Transport": "ignored", "open": "ignored"},
    COMM_RES,
    {"llm.LocalCommRes": "{ this is not looked at before a link"},
    {"llm.LocalCommRes": "", "llm.EnableRemoteCacheAccessible": "0"},
    {**HIXL, **LISTEN},
    {**HIXL, **LISTEN, **ONE_SIDED},
    {**HIXL, **LISTEN, **COMM_RES},
    {"open.Device": "auto"},
    {"open.Device": "host"},
    {"open.Transport": "auto"},
    {"open.Transport": "shm"},
    {"open.Transport": "tcp"},
    {"open.CopyThreads": "1"},
    {"open.CopyThreads": "64"},
    {"open.TcpConnections": "16"},
    {"open.PeerDeadMillis": "100"},
    {"open.SpinMicros": "1000000"},
    {"open.MultipleEngines": "0", "open.SpinMicros": "0", "open.Relink": "0", "open.Integrity": "off"},
]


@pytest.mark.parity("engine.init")
@pytest.mark.parametrize("given", ACCEPTED, ids=str)
def test_init_accepts(given):
    engine = engine_with({**MANAGED, **given})
    engine.cache_manager.unregister_cache(1)
    engine.finalize()


def test_a_local_comm_res_implies_cache_manager_and_one_sided_mode():
    engine = engine_with(COMM_RES)
    with pytest.raises(TypeError):  # one-sided mode has no pull by key
        engine.cache_manager.pull_cache(CacheKey(1, req_id=1), None)
    engine.finalize()


def test_a_transfer_backend_implies_one_sided_mode():
    engine = engine_with({**MANAGED, **HIXL, **LISTEN})
    with pytest.raises(TypeError):
        engine.cache_manager.pull_cache(CacheKey(1, req_id=1), None)
    engine.finalize()


# --- what init refuses


@pytest.mark.parametrize("given", [None, [], "llm.EnableCacheManager", 3])
def test_options_are_a_dict(given):
    refused(given, TypeError)


@pytest.mark.parity("engine.init")
@pytest.mark.parametrize("given", [{1: "1"}, {"llm.LinkRetryCount": 1}, {"key": None}, {"key": b"1"}], ids=str)
def test_options_are_strings(given):
    refused({**MANAGED, **given}, TypeError)


@pytest.mark.parametrize("value", [1024, None, 1.5])
def test_graph_memory_is_a_string(value):
    refused({**MANAGED, "ge.flowGraphMemMaxSize": value}, TypeError)


@pytest.mark.parametrize("value", ["1,2", ",", "-1", "1.23", "", "+1", "1 ", "one"])
def test_graph_memory_is_one_number(value):
    refused({**MANAGED, "ge.flowGraphMemMaxSize": value}, text="ge.flowGraphMemMaxSize")


# Each row breaks the rule that is named and every rule after it.
BROKEN_AFTER = {"llm.TransferBackend": "no", "llm.listenIpInfo": "no colon", "llm.LinkRetryCount": "0"}
ORDER = [
    ({"ge.flowGraphMemMaxSize": "1,2", **COMM_RES, "llm.EnableCacheManager": "0"}, "ge.flowGraphMemMaxSize"),
    ({**COMM_RES, "llm.EnableCacheManager": "0", **BROKEN_AFTER}, "LocalCommRes"),
    (
        {"llm.TransferBackend": "no", "llm.EnableRemoteCacheAccessible": "0", "llm.LinkRetryCount": "0"},
        "EnableCacheManager",
    ),
    ({**MANAGED, "llm.TransferBackend": "no", "llm.EnableRemoteCacheAccessible": "0"}, "EnableRemoteCacheAccessible"),
    ({**MANAGED, "llm.TransferBackend": "", "llm.EnableRemoteCacheAccessible": "2"}, "EnableRemoteCacheAccessible"),
    ({**MANAGED, "llm.TransferBackend": "no", "llm.LinkRetryCount": "0"}, "listenIpInfo"),
    ({**MANAGED, **BROKEN_AFTER}, "ip:port"),
    ({**MANAGED, **LISTEN, "llm.TransferBackend": "no"}, "TransferBackend"),
]


@pytest.mark.parity("engine.init")
@pytest.mark.parametrize(("given", "text"), ORDER)
def test_the_first_broken_rule_is_named(given, text):
    refused(given, text=text)


@pytest.mark.parametrize("given", [*("127.0.0.1", "1:2:3", "[::1]:80", "::1", ""), "127.0.0.1:no", "127.0.0.1:"])
def test_listen_info_is_ip_and_port(given):
    error = ValueError if given.startswith("127.0.0.1:") else LLMException
    refused({**MANAGED, "llm.listenIpInfo": given}, error)


BAD_OPTIONS = [
    *[{"llm.EnableRemoteCacheAccessible": flag} for flag in ("", "2", "true", "01")],
    *[{"ge.exec.deviceId": text} for text in ("0;1", "0,1", "", "x", "-1", "1.0")],
    *[{**LISTEN, "llm.TransferBackend": name} for name in ("", "HIXL", "nixl")],
    *[{"llm.SyncKvCacheWaitTime": text} for text in ("", "-1", "1.5", "1s", "0x10", "99999999999999999999")],
    *[{"llm.RdmaTrafficClass": text} for text in ("", "-1", "4294967296", "x")],
    *[{"llm.RdmaServiceLevel": text} for text in ("", "-1", "4294967296", "x")],
    *[{"llm.LinkTotalTime": text} for text in ("", "x")],
    *[{"llm.LinkRetryCount": text} for text in ("", "0", "101", "x")],
    *[{"open.CopyThreads": text} for text in ("0", "65", "", "x", "1.0")],
    *[{"open.TcpConnections": text} for text in ("0", "17", "x")],
    *[{"open.PeerDeadMillis": text} for text in ("0", "-1", "x")],
    {"open.Device": "gpu"},
    {"open.Device": ""},
    {"open.Transport": "rdma"},
    {"open.Fabric": "net"},
    {"open.MultipleEngines": "2"},
    {"open.Relink": "yes"},
    {"open.Integrity": "on"},
    *[{"open.RendezvousPort": value} for value in ("0", "65536", "-1", "")],
    {"open.NoSuchOption": "1"},
    {"open.transport": "tcp"},
    {"open.": ""},
]


@pytest.mark.parity("engine.init")
@pytest.mark.parametrize("given", BAD_OPTIONS, ids=str)
def test_a_bad_option_is_refused(given):
    failure = refused({**MANAGED, **given})
    assert failure.operation == "init" and failure.stage == "check"
    assert next(reversed(given)) in failure.cause


NOT_BUILT = [
    {"open.Transport": "ucx"},
    {"open.Relink": "1"},
    {"open.Integrity": "sampled"},
    {"open.Integrity": "always"},
    {"open.AuthSecretFile": "/etc/hostname"},
    {"open.TlsCertFile": "/etc/hostname"},
    {"open.TlsKeyFile": "/etc/hostname"},
    {"open.TlsCaFile": "/etc/hostname"},
    {"open.MetricsAddress": ADDRESS},
]


@pytest.mark.parametrize("given", NOT_BUILT, ids=str)
def test_an_option_that_is_not_built_is_not_ignored(given):
    refused({**MANAGED, **given}, code=FEATURE_NOT_ENABLED)


@pytest.mark.parametrize("given", [{"open.Device": "cann"}, {"open.Transport": "cann"}], ids=str)
def test_what_needs_a_library_that_is_not_there_is_refused(given):
    assert refused({**MANAGED, **given}, code=FEATURE_NOT_ENABLED).hint is not None


# --- memory pools

GOOD_POOLS = [
    '{"memory_size": 102428800}',
    '{"memory_size": 1024, "page_shift": 10}',
    '{"memory_size": 65536}',
    '{"memory_size": 65537, "page_shift": 16, "other": [1]}',
    '{"memory_size": 1073741824, "page_shift": 30}',
]
BAD_POOLS = [
    "{",
    "no json",
    "[]",
    "null",
    "3",
    "{}",
    '{"page_shift": 16}',
    '{"MEMORY_SIZE": 65536}',
    '{"memory_size": "65536"}',
    '{"memory_size": 65536.0}',
    '{"memory_size": 1e6}',
    '{"memory_size": -1}',
    '{"memory_size": null}',
    '{"memory_size": true}',
    '{"memory_size": 18446744073709551616}',
    '{"memory_size": 0}',
    '{"memory_size": 65535}',
    '{"memory_size": 65536, "page_shift": 17}',
    '{"memory_size": 65536, "page_shift": 9}',
    '{"memory_size": 4294967296, "page_shift": 31}',
    '{"memory_size": 65536, "page_shift": "16"}',
    '{"memory_size": 65536, "page_shift": -1}',
    '{"memory_size": 65536, "page_shift": 10.5}',
    '{"memory_size": 65536, "page_shift": null}',
    '{"memory_size": 4398046511104, "page_shift": 10}',
    '{"memory_size": 65536} trailing',
]
POOL_OPTIONS = ("llm.MemPoolConfig", "llm.HostMemPoolConfig")


@pytest.mark.parametrize("text", GOOD_POOLS)
@pytest.mark.parametrize("option", POOL_OPTIONS)
def test_a_pool_is_accepted(option, text):
    engine_with({**MANAGED, option: text}).finalize()


@pytest.mark.parametrize("text", BAD_POOLS)
@pytest.mark.parametrize("option", POOL_OPTIONS)
def test_a_bad_pool_is_refused(option, text):
    refused({**MANAGED, option: text})


@pytest.mark.parametrize("option", POOL_OPTIONS)
def test_a_pool_that_can_not_be_had_is_out_of_memory(option):
    text = json.dumps({"memory_size": 1 << 60, "page_shift": 30})
    refused({**MANAGED, option: text}, code=LLMStatusCode.LLM_OUT_OF_MEMORY)


# --- the listener


def test_a_port_in_use_is_a_failure_and_init_may_be_repeated():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        given = {**MANAGED, "llm.listenIpInfo": f"127.0.0.1:{taken.getsockname()[1]}"}
        failure = refused(given, code=FAILED, text="address already in use")
        assert failure.operation == "init"
    engine = engine_with(given)
    assert engine.listen_address == given["llm.listenIpInfo"]
    engine.finalize()


@pytest.mark.parametrize("address", ["203.0.113.7:0", "22:33:", "no.such.host.invalid:0", "127.0.0.1:65536", "127.0.0.1:-1"])
def test_an_address_that_is_not_ours_is_a_failure(address):
    if address.count(":") != 1:
        refused({**MANAGED, "llm.listenIpInfo": address})
        return
    refused({**MANAGED, "llm.listenIpInfo": address}, code=FAILED)


def test_a_listener_ends_with_its_engine():
    engine = engine_with({**MANAGED, **LISTEN})
    address = engine.listen_address
    engine.finalize()
    ip, port = address.split(":")
    with socket.socket() as probe:
        assert probe.connect_ex((ip, int(port))) != 0
    engine.init({**MANAGED, "llm.listenIpInfo": address})
    assert engine.listen_address == address
    engine.finalize()


# --- switch_role


@pytest.fixture
def mixed():
    engine = LLMDataDist(LLMRole.MIX, 1)
    engine.init({**MANAGED, **LISTEN})
    yield engine
    engine.finalize()


@pytest.mark.parity("engine.switch_role")
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((1,), TypeError),
        ((None,), TypeError),
        (("Prompt", []), TypeError),
        ((LLMRole.PROMPT, []), TypeError),
        ((LLMRole.PROMPT, "x"), TypeError),
        ((LLMRole.PROMPT, {"llm.listenIpInfo": "no colon"}), LLMException),
        ((LLMRole.PROMPT, {"llm.listenIpInfo": "127.0.0.1:x"}), ValueError),
    ],
)
def test_switch_role_refuses_and_changes_nothing(mixed, arguments, error):
    before = mixed.listen_address
    with pytest.raises(error):
        mixed.switch_role(*arguments)
    assert (mixed._role, mixed.listen_address) == (LLMRole.MIX, before)


@pytest.mark.parity("engine.switch_role")
def test_switch_role_without_an_address_stops_listening(mixed):
    for given in (None, {}, {"llm.listenIp": "x", "open.NoSuchOption": "ignored here"}):
        mixed.switch_role(LLMRole.DECODER, given)
        assert mixed.listen_address is None
        assert mixed._role is LLMRole.DECODER


@pytest.mark.parity("engine.switch_role")
def test_switch_role_with_an_address_listens_there(mixed):
    first = mixed.listen_address
    mixed.switch_role(LLMRole.DECODER)
    mixed.switch_role(LLMRole.PROMPT, options(ADDRESS))  # clients pass all their options
    second = mixed.listen_address
    assert second is not None
    mixed.switch_role(LLMRole.PROMPT, {"llm.listenIpInfo": first})
    assert mixed.listen_address == first
    with socket.socket() as probe:
        ip, port = second.split(":")
        assert (first == second) or probe.connect_ex((ip, int(port))) != 0


def test_switch_role_to_the_same_role_and_port_changes_nothing(mixed):
    before = mixed.listen_address
    port = before.split(":")[1]
    for address in (before, f"127.0.0.2:{port}"):
        mixed.switch_role(LLMRole.MIX, {"llm.listenIpInfo": address})
        assert mixed.listen_address == before


def test_switch_role_to_a_port_in_use_is_a_failure_and_may_be_repeated(mixed):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(LLMException) as failure:
            mixed.switch_role(LLMRole.PROMPT, {"llm.listenIpInfo": address})
    assert failure.value.status_code is FAILED
    assert mixed._role is LLMRole.MIX
    mixed.switch_role(LLMRole.PROMPT, {"llm.listenIpInfo": address})
    assert mixed.listen_address == address


def test_switch_role_keeps_caches_and_ids(mixed):
    cache = mixed.cache_manager.register_cache(desc([2, 4]), [1])
    mixed.switch_role(LLMRole.DECODER)
    assert cache.cache_id == 1
    assert mixed.cache_manager.register_cache(desc([2, 4]), [1]).cache_id == 2


def test_on_hixl_the_listen_address_is_that_of_init():
    engine = engine_with({**MANAGED, **HIXL, **LISTEN})
    before = engine.listen_address
    for given in (None, {}, LISTEN):
        engine.switch_role(LLMRole.DECODER, given)
        assert engine.listen_address == before
    with pytest.raises(LLMException) as failure:
        engine.switch_role(LLMRole.MIX, {"llm.listenIpInfo": "127.0.0.1:1"})
    assert failure.value.status_code is FEATURE_NOT_ENABLED
    assert engine._role is LLMRole.DECODER
    engine.finalize()


# --- environment: the Go runtime reads it once, so each case has a process of its own


@pytest.mark.parametrize(
    ("env", "given", "code"),
    [
        ({"LLM_DATADIST_TRANSPORT": "tcp", "LLM_DATADIST_COPY_THREADS": "2"}, {}, None),
        ({"LLM_DATADIST_TRANSPORT": "shm"}, {}, None),
        ({"LLM_DATADIST_TRANSPORT": "rdma"}, {}, PARAM_INVALID),
        ({"LLM_DATADIST_TRANSPORT": ""}, {}, PARAM_INVALID),
        ({"LLM_DATADIST_COPY_THREADS": "0"}, {}, PARAM_INVALID),
        ({"LLM_DATADIST_PEER_DEAD_MILLIS": "soon"}, {}, PARAM_INVALID),
        ({"LLM_DATADIST_INTEGRITY": "always"}, {}, FEATURE_NOT_ENABLED),
        ({"LLM_DATADIST_TRANSPORT": "rdma", "LLM_DATADIST_INTEGRITY": "?"}, {"transport": "tcp", "integrity": "off"}, None),
    ],
)
def test_environment_counts_where_the_option_is_not_set(env, given, code):
    with Peer(env) as peer:
        if code is None:
            peer.open(1, **given)
            return
        with pytest.raises(LLMException) as failure:
            peer.open(1, **given)
        assert failure.value.status_code is code
        assert next(iter(env)) in failure.value.cause


# --- finalize and exit


@pytest.mark.parity("engine.finalize", "engine.instance")
def test_finalize_may_be_repeated_and_needs_no_init():
    engine = LLMDataDist(LLMRole.MIX, 1)
    engine.finalize()
    engine.init(MANAGED)
    engine.finalize()
    engine.finalize()
    assert LLMDataDist.llm_engine_instance is None
    assert _native.held() == 0


def test_ids_start_again_with_a_new_engine():
    engine = LLMDataDist(LLMRole.MIX, 1)
    for _ in range(3):
        engine.init(MANAGED)
        assert engine.cache_manager.register_cache(desc([2, 4]), [1]).cache_id == 1
        engine.finalize()


@pytest.mark.parity("kv_manager.is_initialized")
def test_finalize_marks_the_managers():
    engine = engine_with({**MANAGED})
    manager = engine.cache_manager
    engine.finalize()
    assert not manager._initialized
    engine = engine_with(OLDER)
    manager = engine.kv_cache_manager
    engine.finalize()
    assert not manager.is_initialized()


@pytest.mark.parity("module.shutdown_handler")
def test_the_shutdown_handler_finalizes_what_is_left():
    _shutdown_handler()
    engine = engine_with(MANAGED)
    _shutdown_handler()
    assert LLMDataDist.llm_engine_instance is None
    with pytest.raises(RuntimeError):
        _ = engine.cache_manager


@pytest.mark.parity("module.shutdown_handler")
@pytest.mark.parametrize(("error", "swallowed"), [(LLMException("no"), True), (OSError("no"), False)])
def test_the_shutdown_handler_swallows_only_our_own_failures(monkeypatch, error, swallowed):
    class Failing:
        def finalize(self):
            raise error

    monkeypatch.setattr(LLMDataDist, "llm_engine_instance", Failing())
    if swallowed:
        _shutdown_handler()
    else:
        with pytest.raises(OSError):
            _shutdown_handler()


@pytest.mark.parity("module.import")
def test_a_process_that_forgets_finalize_ends_quietly():
    code = (
        "from llm_datadist import *\n"
        "engine = LLMDataDist(LLMRole.MIX, 1)\n"
        "engine.init({'llm.EnableCacheManager': '1', 'llm.listenIpInfo': '127.0.0.1:0'})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- log and failures


def test_the_engines_lines_reach_the_log(lines):
    end = End()
    end.open(5)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        end.engine.link_clusters([cluster(address, 77)], 1000)
    end.close()  # what is waiting is written before it returns
    assert any(level == "INFO" and "DEVICE memory is host memory" in text for level, text in lines)
    failures = [text for level, text in lines if level in ("WARNING", "ERROR") and "cluster 77" in text]
    assert len(failures) == 1 and address in failures[0] and "refused" in failures[0], lines


def test_a_failed_init_says_why_in_every_form():
    failure = refused({**MANAGED, "llm.LinkRetryCount": "0"})
    assert str(failure).startswith("init failed, error code is LLMStatusCode.LLM_PARAM_INVALID")
    assert "llm.LinkRetryCount" in failure.cause
    again = pickle.loads(pickle.dumps(failure))
    assert (str(again), again.status_code, again.operation, again.stage, again.cause) == (
        str(failure),
        PARAM_INVALID,
        "init",
        "check",
        failure.cause,
    )
