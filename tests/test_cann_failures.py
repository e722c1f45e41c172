# SPDX-License-Identifier: Apache-2.0
"""What becomes of a call where the vendor's library or its device fail, as planned in the stand-in (native/standin.h)."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from links import OURS, THEIRS, link
from llm_datadist import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex, LLMStatusCode
from peers import SOURCE, TARGET, Peer, pattern, refused, wait_until

pytestmark = pytest.mark.timeout(300)

SUCCESS = LLMStatusCode.LLM_SUCCESS
FAILED = LLMStatusCode.LLM_FAILED
PARAM_INVALID = LLMStatusCode.LLM_PARAM_INVALID
NOT_EXIST = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
NOT_ENABLED = LLMStatusCode.LLM_FEATURE_NOT_ENABLED
TIMEOUT = LLMStatusCode.LLM_TIMEOUT
TENSORS, ROW = 4, 500


@pytest.fixture(scope="module")
def npus(libraries: Path) -> dict[str, str]:
    return {"LLM_DATADIST_DEVICE": "cann", "LD_LIBRARY_PATH": str(libraries), "LLM_DATADIST_TRANSPORT": "auto"}


@contextlib.contextmanager
def linked(env: dict[str, str], **settings: Any) -> Iterator[tuple[Peer, Peer]]:
    with Peer(env) as puller, Peer(env) as owner:
        link(puller, owner, **settings)
        yield puller, owner


@pytest.fixture(scope="module")
def pair(npus: dict[str, str]) -> Iterator[tuple[Peer, Peer]]:
    with linked(npus) as ends:
        yield ends


def plan(peer: Peer, faults: str) -> None:
    """Plan failures in the stand-in of a process that has loaded it."""
    code = "import ctypes; result = ctypes.CDLL('libacl_rt.so').standin_plan(faults.encode())"
    assert peer.run(code, faults=faults) == 0


def allocate(peer: Peer, name: str, number: int, keys: Any = (), *, blocks: bool = False) -> int:
    """Allocate a DEVICE cache with the pattern of a number, and return its id."""
    code = "import devices; result = devices.add(end, *what, keys, blocks=blocks, accessible=None)"
    cache_id: int = peer.run(code, what=(name, "device pool", [2, ROW], number), keys=keys, blocks=blocks)
    return cache_id


def content(peer: Peer, name: str) -> list[np.ndarray]:
    tensors: list[np.ndarray] = peer.run("import devices; result = devices.content(end, cache)", cache=name)
    return tensors


def drop(*peers: Peer) -> None:
    for peer in peers:
        peer.run("import devices; devices.drop(end)")


def requires(peer: Peer, name: str, number: int, rows: tuple[int, ...] = (0,)) -> None:
    """Compare every byte: these rows are of the pattern of a number, the others are what they were."""
    for tensor, got in enumerate(content(peer, name)):
        wanted = pattern(TARGET, tensor, 2 * ROW)
        for row in rows:
            wanted[row * ROW : (row + 1) * ROW] = pattern(number, tensor, 2 * ROW)[row * ROW : (row + 1) * ROW]
        np.testing.assert_array_equal(got, wanted, f"tensor {tensor}")


KEYS = {"pull_cache": "PullKvCache", "pull_blocks": "PullKvBlocks"}


def pull(peer: Peer, call: str, source: int) -> None:
    if call == "pull_cache":
        peer.manage("pull_cache", CacheKeyByIdAndIndex(THEIRS, source, 0), "target", 0)
    else:
        peer.manage("pull_blocks", BlocksCacheKey(THEIRS, 3), "target", [0], [0])


CODES = {
    0x5010B001: LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT,
    0x5010B005: PARAM_INVALID,
    0x5010B00E: LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY,
    0x5010B019: NOT_ENABLED,
    0x5010B01A: TIMEOUT,
    0x5010B01B: LLMStatusCode.LLM_LINK_BUSY,
    0x5010B01C: LLMStatusCode.LLM_OUT_OF_MEMORY,
    0xFFFFFFFF: FAILED,
    507053: LLMStatusCode.LLM_DEVICE_MEM_ERROR,
    0x5010B014: FAILED,
    0x12345: FAILED,
}


@pytest.mark.parametrize("call", KEYS)
@pytest.mark.parametrize(("status", "code"), CODES.items(), ids=[f"{status:#x}" for status in CODES])
def test_a_status_of_the_library_is_the_code_of_the_exception(pair: Any, call: str, status: int, code: LLMStatusCode) -> None:
    puller, owner = pair
    blocks = call == "pull_blocks"
    source = allocate(owner, "source", SOURCE, BlocksCacheKey(THEIRS, 3) if blocks else (), blocks=blocks)
    allocate(puller, "target", TARGET, blocks=blocks)
    pull(puller, call, source)  # so that what is planned is not met by the making of a link
    plan(puller, f"{KEYS[call]}=fail:{status}")
    failure = refused(pull, puller, call, source, code=code)
    assert f"0x{status:08X}" in failure.cause and failure.stage == "transfer" and failure.peer == THEIRS
    pull(puller, call, source)
    requires(puller, "target", SOURCE)
    drop(puller, owner)


MISSED = {0x5010B002: NOT_EXIST, 0x5010B007: FAILED, 507057: LLMStatusCode.LLM_SUSPECT_REMOTE_ERROR}


@pytest.mark.parametrize(("status", "code"), MISSED.items(), ids=[f"{status:#x}" for status in MISSED])
def test_a_cache_and_a_link_that_the_library_misses_are_found_again(pair: Any, status: int, code: LLMStatusCode) -> None:
    puller, owner = pair
    source = allocate(owner, "source", SOURCE)
    allocate(puller, "target", TARGET)
    plan(puller, f"PullKvCache=fail:{status}")
    pull(puller, "pull_cache", source)
    requires(puller, "target", SOURCE)
    plan(puller, f"PullKvCache=fail:{status} PullKvCache=fail:{status}")
    refused(pull, puller, "pull_cache", source, code=code)
    pull(puller, "pull_cache", source)
    drop(puller, owner)


def test_what_is_registered_after_the_first_pull_is_pulled_from_both_ends(pair: Any) -> None:
    for number in range(3):
        for puller, owner, cluster_id in ((*pair, THEIRS), (*pair[::-1], OURS)):
            allocate(owner, "source", SOURCE + number, [CacheKey(cluster_id, req_id=1), CacheKey(cluster_id, req_id=2)])
            allocate(puller, "target", TARGET)
            for row in (0, 1):
                puller.manage("pull_cache", CacheKey(cluster_id, req_id=row + 1), "target", row)
            requires(puller, "target", SOURCE + number, rows=(0, 1))
            drop(puller, owner)


SHORT, STALL = 200, 2000  # ms: the deadline, and what the library takes


def test_a_call_that_outlives_its_deadline_keeps_its_destination(npus: dict[str, str]) -> None:
    with linked(npus, sync_kv_timeout=SHORT) as (puller, owner):
        source = allocate(owner, "source", SOURCE)
        allocate(puller, "target", TARGET)
        pull(puller, "pull_cache", source)
        plan(puller, f"PullKvCache=stall:0:{STALL}")
        code = "import time; began = time.monotonic(); " + (
            "import peers; from llm_datadist import *; "
            "failure = peers.refused(end.manage, 'pull_cache', key, 'target', code=LLMStatusCode.LLM_TIMEOUT); "
            "result = time.monotonic() - began"
        )
        assert puller.run(code, key=CacheKeyByIdAndIndex(THEIRS, source, 0)) < STALL / 1000
        for again in (
            lambda: pull(puller, "pull_cache", source),
            lambda: puller.manage("copy_cache", "target", "target", 1, 0),
        ):
            assert "outlived its deadline" in refused(again, code=FAILED).cause
        cache_id = puller.run("result = end.caches['target'].cache_id")
        pulled_from = CacheKeyByIdAndIndex(OURS, cache_id, 0)
        allocate(owner, "other", TARGET)
        assert "outlived its deadline" in refused(owner.manage, "pull_cache", pulled_from, "other", code=FAILED).cause

        def usable() -> bool:
            try:
                pull(puller, "pull_cache", source)
            except Exception as failure:
                assert getattr(failure, "status_code", None) in (FAILED, TIMEOUT), failure
                return False
            return True

        wait_until(usable, "the library has returned")
        requires(puller, "target", SOURCE)
        drop(puller, owner)


def test_a_peer_that_dies_while_the_library_waits_ends_the_pull(npus: dict[str, str]) -> None:
    with Peer(npus) as puller:
        with Peer(npus) as owner:
            link(puller, owner, sync_kv_timeout=30_000)
            source = allocate(owner, "source", SOURCE)
            allocate(puller, "target", TARGET)
            allocate(puller, "spare", TARGET)
            pull(puller, "pull_cache", source)
            plan(puller, f"PullKvCache=stall:0:{STALL}")
            begin = "import peers; peers.under_way = peers.Background(end.manage, 'pull_cache', key, 'target', 1)"
            puller.run(begin, key=CacheKeyByIdAndIndex(THEIRS, source, 1))
            wait_until(lambda: stalled(puller), "the library is in the middle of it")
            owner.kill()
            assert "peer died" in refused(puller.run, "import peers; peers.under_way.result()", code=FAILED).cause
            assert stalled(puller)
        with Peer(npus) as owner:
            address = owner.open(THEIRS)
            source = allocate(owner, "source", SOURCE + 1)
            assert puller.link(address, THEIRS) is SUCCESS
            puller.manage("pull_cache", CacheKeyByIdAndIndex(THEIRS, source, 0), "spare", 0)
            requires(puller, "spare", SOURCE + 1)
            drop(owner)
            drop(puller)  # what the call of the dead link may still write stays until it has returned


def stalled(peer: Peer) -> bool:
    waiting: int = peer.run("import ctypes; result = ctypes.CDLL('libacl_rt.so').standin_waiting()")
    return waiting > 0


def test_a_link_that_the_library_refuses_goes_over_tcp_or_fails_where_cann_is_required(npus: dict[str, str]) -> None:
    env = {**npus, "STANDIN_FAULTS": "link=fail:0x5010B009"}
    with Peer(env) as puller, Peer(npus) as owner:
        link(puller, owner)
        told = puller.ask("explain", THEIRS)
        assert "transport: tcp" in told and "not taken: cann: " in told and "0x5010B009" in told
        for end, other, cluster_id in ((puller, owner, THEIRS), (owner, puller, OURS)):
            source = allocate(other, "source", SOURCE)
            allocate(end, "target", TARGET)
            end.manage("pull_cache", CacheKeyByIdAndIndex(cluster_id, source, 1), "target", 1)
            requires(end, "target", SOURCE, rows=(1,))
            drop(puller, owner)
    with Peer({**env, "LLM_DATADIST_TRANSPORT": "cann"}) as puller, Peer(npus) as owner:
        address = owner.open(THEIRS)
        puller.open(OURS, listen=None)
        assert puller.link(address, THEIRS) is LLMStatusCode.LLM_LINK_FAILED
        assert "0x5010B009" in puller.ask("explain", THEIRS)
        assert puller.link(address, THEIRS) is SUCCESS  # the failure was planned once


def test_a_cache_that_the_library_does_not_register_is_streamed(pair: Any) -> None:
    puller, owner = pair
    source = allocate(owner, "source", SOURCE)
    plan(puller, "RegisterKvCache=fail:0x5010B01C PullKvCache=fail:0x12345")
    allocate(puller, "target", TARGET)
    pull(puller, "pull_cache", source)
    requires(puller, "target", SOURCE)
    allocate(puller, "spare", TARGET)
    failure = refused(puller.manage, "pull_cache", CacheKeyByIdAndIndex(THEIRS, source, 0), "spare", code=FAILED)
    assert "0x00012345" in failure.cause  # it was not the library that moved the other one
    drop(puller, owner)


def test_a_copy_that_the_device_fails(pair: Any) -> None:
    puller, _ = pair
    allocate(puller, "target", TARGET)
    plan(puller, "aclrtMemcpy=fail:507053")
    refused(puller.manage, "copy_cache", "target", "target", 1, 0, code=LLMStatusCode.LLM_DEVICE_MEM_ERROR)
    plan(puller, "aclrtMemcpy=fail:107000")
    assert "107000" in refused(puller.manage, "copy_cache", "target", "target", 1, 0, code=FAILED).cause
    requires(puller, "target", TARGET)
    drop(puller)


# ---- init


@pytest.mark.parametrize(
    ("faults", "settings", "code", "words"),
    [
        ("", {"device_id": 99}, PARAM_INVALID, "there is no device 99"),
        ("aclrtMalloc=fail:207001", {}, LLMStatusCode.LLM_OUT_OF_MEMORY, "207001"),
        ("Initialize=fail:0x5010B005", {"transport": "cann"}, PARAM_INVALID, "0x5010B005"),
        ("aclrtGetDeviceCount=fail:100000", {}, FAILED, "100000"),
    ],
    ids=["no such device", "no memory", "the library refuses", "no answer"],
)
def test_init_says_what_the_device_lacks(
    npus: dict[str, str], faults: str, settings: dict[str, Any], code: LLMStatusCode, words: str
) -> None:
    with Peer({**npus, **({"STANDIN_FAULTS": faults} if faults else {})}) as peer:
        failure = refused(peer.open, OURS, code=code, **settings)
        assert words in failure.cause and failure.operation == "init"
        if faults:
            peer.open(OURS, **settings)  # it was planned once


def test_an_engine_of_the_older_mode_has_one_npu(npus: dict[str, str]) -> None:
    with Peer(npus) as peer:
        given = {"ge.exec.deviceId": "0;1", "ge.flowGraphMemMaxSize": "16777216"}
        failure = refused(peer.open, OURS, raw=given, code=NOT_ENABLED)
        assert "several ids" in failure.cause


SAYS = """
import os
os.environ["ASCEND_GLOBAL_LOG_LEVEL"] = "1"
from llm_datadist import *
config = LLMConfig()
config.enable_cache_manager, config.device_id, config.device = True, 0, "auto"
if os.environ.get("CANN"):
    config.cann_path = os.environ["CANN"]
engine = LLMDataDist(LLMRole.MIX, 1)
engine.init(config.generate_options())
engine.finalize()
"""


def said(**env: str) -> str:
    """What the log of an engine says whose device is chosen by itself."""
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("LLM_DATADIST_")}
    done = subprocess.run([sys.executable, "-c", SAYS], env={**surroundings, **env}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_device_is_chosen_where_it_can_be_had_and_the_log_says_so(libraries: Path, tmp_path: Path) -> None:
    assert "DEVICE memory is that of NPU 0" in said(LD_LIBRARY_PATH=str(libraries))
    assert f"{libraries}/libllm_datadist.so" in said(CANN=str(libraries))
    (tmp_path / "lib64").symlink_to(libraries)
    assert "DEVICE memory is that of NPU 0" in said(ASCEND_HOME_PATH=str(tmp_path))
    nothing = said()
    assert "DEVICE memory is host memory: libllm_datadist.so was not found" in nothing and "ASCEND_HOME_PATH" in nothing
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "libllm_datadist.so").write_text("no library")
    broken = said(CANN=str(tmp_path / "broken"))
    assert "DEVICE memory is host memory: " in broken and "libllm_datadist.so" in broken


def test_a_device_that_is_asked_for_and_not_there_is_an_error(tmp_path: Path) -> None:
    with Peer({"LLM_DATADIST_DEVICE": "cann"}) as peer:
        failure = refused(peer.open, OURS, code=NOT_ENABLED)
        assert "libllm_datadist.so" in failure.cause and "LD_LIBRARY_PATH" in failure.cause
        assert str(tmp_path) in refused(peer.open, OURS, code=NOT_ENABLED, cann_path=str(tmp_path)).cause
        peer.open(OURS, device="host")


VIEWS = """
import pickle
from llm_datadist import *
config = LLMConfig()
config.device_id, config.ge_options = 0, {"ge.flowGraphMemMaxSize": "16777216"}
config.listen_ip_info = "127.0.0.1:0"
engine = LLMDataDist(LLMRole.PROMPT, 1)
engine.init(config.generate_options())
cache = engine.kv_cache_manager.allocate_cache(CacheDesc(2, [1, 8], DataType.DT_INT8))
try:
    engine.kv_cache_manager.get_cache_tensors(cache)
except LLMException as exc:
    print(exc.status_code)
engine.finalize()
"""


def test_views_of_memory_that_the_host_cannot_touch_are_refused(npus: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", VIEWS], env={**os.environ, **npus}, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1:] == ["LLMStatusCode.LLM_FEATURE_NOT_ENABLED"], done.stdout + done.stderr


def test_engines_that_come_and_go_leave_nothing(npus: dict[str, str]) -> None:
    with Peer(npus) as puller, Peer(npus) as owner:
        seen = []
        for _ in range(8):
            link(puller, owner)
            source = allocate(owner, "source", SOURCE)
            allocate(puller, "target", TARGET)
            pull(puller, "pull_cache", source)
            requires(puller, "target", SOURCE)
            drop(puller, owner)
            for end in (puller, owner):
                end.close()
            seen.append(puller.run("import os; result = len(os.listdir('/proc/self/fd'))"))
        assert seen[-1] <= seen[1], seen
