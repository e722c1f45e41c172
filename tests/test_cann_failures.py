# SPDX-License-Identifier: Apache-2.0
"""What fails on NPUs: the vendor's library and its runtime refuse, stall and answer late, as is planned, between two processes.

A failure that is planned for the library's call and shows in ours proves as well that the library moves the bytes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from links import OURS, THEIRS, link
from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKeyByIdAndIndex,
    DataType,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Placement,
)
from peers import SOURCE, TARGET, Peer, desc, free_port, pattern, refused, wait_until

pytestmark = pytest.mark.timeout(300)

SUCCESS = LLMStatusCode.LLM_SUCCESS
FAILED = LLMStatusCode.LLM_FAILED
TIMEOUT = LLMStatusCode.LLM_TIMEOUT
NOT_EXIST = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
NOT_YET_LINK = LLMStatusCode.LLM_NOT_YET_LINK
LINK_FAILED = LLMStatusCode.LLM_LINK_FAILED
NOT_ENABLED = LLMStatusCode.LLM_FEATURE_NOT_ENABLED
PARAM_INVALID = LLMStatusCode.LLM_PARAM_INVALID
OUT_OF_MEMORY = LLMStatusCode.LLM_OUT_OF_MEMORY

ROWS, ROW = 2, 100  # of caches with rows; bytes
BLOCKS, BLOCK = 8, 32  # of caches with blocks; bytes
POOL_BYTES = 1 << 20
POOL = f'{{"memory_size": {POOL_BYTES}}}'
STALL = 120_000  # ms, longer than any test waits
SYNC = 300  # ms, sync_kv_timeout where calls are to outlive it
# A call ends 0.1 s after its deadline at the latest, and finalize waits 1 s longer than a pull may take. Ten times that is for
# machines that are busy.
CALL_SECONDS = 10 * (SYNC / 1000 + 0.1)
FINALIZE_SECONDS = 10 * (SYNC / 1000 + 1)
SOON = 10.0  # what ends at once, on a busy machine; far from STALL


@pytest.fixture(scope="module")
def npus(libraries: Path) -> dict[str, str]:
    """The environment of a process whose device is an NPU, and that says all of what it does."""
    return {"LLM_DATADIST_DEVICE": "cann", "LD_LIBRARY_PATH": str(libraries), "ASCEND_GLOBAL_LOG_LEVEL": "1"}


# ---- two processes, and pulls between them


def control(peer: Peer, code: str, **names: Any) -> Any:
    """Call a function of faults.py in a process."""
    return peer.run("import faults; result = faults." + code, **names)


def plan(peer: Peer, *faults: str) -> None:
    control(peer, "plan(text)", text=" ".join(faults))


class Pair(NamedTuple):
    """Two processes: one that pulls, and the owner of what it pulls, which it knows under a cluster id."""

    puller: Peer
    owner: Peer
    cluster_id: int = THEIRS

    def link(self, **settings: Any) -> str:
        return link(self.puller, self.owner, mem_pool_cfg=POOL, host_mem_pool_cfg=None, **settings)

    def reversed(self) -> Pair:
        return Pair(self.owner, self.puller, OURS + THEIRS - self.cluster_id)

    def close(self) -> None:
        """End both engines, which keep nothing, and see that all that was planned has come to pass."""
        unused = [control(peer, "forget()") for peer in (self.puller, self.owner)]
        for peer in (self.puller, self.owner):
            peer.run("import devices; devices.drop(end)")
            peer.close()
            peer.run("import peers; peers.wait_until(lambda: end.held() == 0, 'the engine has kept nothing')")
        assert unused == [0, 0]


@pytest.fixture(scope="module")
def processes(npus: dict[str, str]) -> Iterator[Pair]:
    with Peer(npus) as puller, Peer(npus) as owner:
        yield Pair(puller, owner)


@pytest.fixture
def pair(processes: Pair) -> Iterator[Pair]:
    """Two processes without engines."""
    yield processes
    processes.close()


@pytest.fixture
def linked(pair: Pair) -> Pair:
    pair.link()
    return pair


@pytest.fixture
def hasty(pair: Pair) -> Pair:
    """Two that are linked, whose calls have little time."""
    pair.link(sync_kv_timeout=SYNC)
    return pair


def add(peer: Peer, name: str, kind: str, number: int, keys: Any = (), *, blocks: bool = False) -> int:
    """Make a cache with the pattern of number."""
    given = {"blocks": blocks, "accessible": None}
    what = (name, kind, [BLOCKS, BLOCK] if blocks else [ROWS, ROW], number, keys)
    cache_id: int = peer.run("import devices; result = devices.add(end, *what, **given)", what=what, given=given)
    return cache_id


def content(peer: Peer, name: str) -> list[np.ndarray]:
    tensors: list[np.ndarray] = peer.run("import devices; result = devices.content(end, cache)", cache=name)
    return tensors


class Pull:
    """A pull by one call of the library's, between two caches that are made for it: row 1 to row 0, or some blocks."""

    def __init__(self, pair: Pair, entry: str = "PullKvCache", name: str = "", target: str = "device registered") -> None:
        self.pair, self.blocks, self.target = pair, entry == "PullKvBlocks", f"target{name}"
        self.number = SOURCE + len(name)
        key = BlocksCacheKey(pair.cluster_id, model_id=4 + len(name))
        keys = key if self.blocks else ()
        self.source_id = add(pair.owner, f"source{name}", "device pool", self.number, keys, blocks=self.blocks)
        self.target_id = add(pair.puller, self.target, target, TARGET, blocks=self.blocks)
        self.call: tuple[Any, ...] = ("pull_blocks", key, self.target, [5, 6, 1], [0, 1, 3])
        if not self.blocks:
            self.call = ("pull_cache", CacheKeyByIdAndIndex(pair.cluster_id, self.source_id, 1), self.target, 0)

    def __call__(self) -> None:
        self.pair.puller.manage(*self.call)

    def refused(self, code: LLMStatusCode, text: str = "") -> None:
        failure = refused(self.pair.puller.manage, *self.call, code=code)
        assert text in failure.cause, failure

    def begin(self) -> None:
        """Begin the pull, and wait until the library's call stalls."""
        control(self.pair.puller, "begin(end, *call)", call=self.call)
        control(self.pair.puller, "await_waiting()")

    def result(self) -> None:
        control(self.pair.puller, "result()")

    def brought(self, *, everything: bool = True) -> None:
        """Check each byte of the target: what was pulled is there, or nothing is, and the rest is as it was."""
        for tensor, found in enumerate(content(self.pair.puller, self.target)):
            wanted = pattern(TARGET, tensor, found.size)
            given = pattern(self.number, tensor, found.size)
            if everything and self.blocks:
                for src, dst in zip([5, 6, 1], [0, 1, 3]):
                    wanted[dst * BLOCK :][:BLOCK] = given[src * BLOCK :][:BLOCK]
            elif everything:
                wanted[:ROW] = given[ROW:]
            np.testing.assert_array_equal(found, wanted, f"tensor {tensor}")

    def brought_nothing(self) -> None:
        self.brought(everything=False)


def made_anew_for(pull: Pull) -> None:
    """Make a pull, and see that the library's link is made anew before."""
    plan(pull.pair.puller, f"LinkLlmClusters=stall:0:{STALL}")
    pull.begin()
    control(pull.pair.puller, "release()")
    pull.result()
    pull.brought()


# ---- what the library's pulls answer

ENTRIES = pytest.mark.parametrize("entry", ["PullKvCache", "PullKvBlocks"])
SUSPECT = LLMStatusCode.LLM_SUSPECT_REMOTE_ERROR
HIDDEN = [NOT_EXIST, NOT_YET_LINK, SUSPECT]  # once
# The documented statuses, by their numbers: what a pull answers where it answers them once.
DOCUMENTED = [code for code in LLMStatusCode if code not in (SUCCESS, LLMStatusCode.LLM_UNKNOWN_ERROR, *HIDDEN)]
UNDOCUMENTED = [0x12345, 0x5010B014, 0x5010B015, 0x5010B016, 0x5010B017, 507054]
ANSWERS = [(code.value, code) for code in DOCUMENTED] + [(number, FAILED) for number in UNDOCUMENTED]
RELINKED = [TIMEOUT, FAILED, LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT, SUSPECT]


@ENTRIES
@pytest.mark.parametrize(("status", "code"), ANSWERS, ids=[f"0x{status:X}" for status, _ in ANSWERS])
def test_a_status_of_the_library_is_the_code_of_the_pull(linked: Pair, entry: str, status: int, code: LLMStatusCode) -> None:
    pull = Pull(linked, entry)
    plan(linked.puller, f"{entry}=fail:{status}")
    pull.refused(code, f"(0x{status:08X})")
    pull.brought_nothing()
    pull()
    pull.brought()


@ENTRIES
@pytest.mark.parametrize("status", HIDDEN)
def test_want_of_a_cache_or_of_a_link_is_hidden_once(linked: Pair, entry: str, status: LLMStatusCode) -> None:
    pull = Pull(linked, entry)
    plan(linked.puller, f"{entry}=fail:{status.value}")
    made_anew_for(pull)


@ENTRIES
@pytest.mark.parametrize("status", [NOT_EXIST, SUSPECT])
def test_what_the_library_misses_twice_is_the_code_of_the_pull(linked: Pair, entry: str, status: LLMStatusCode) -> None:
    pull = Pull(linked, entry)
    plan(linked.puller, *[f"{entry}=fail:{status.value}"] * 2)
    pull.refused(status, entry)
    pull.brought_nothing()
    pull()
    pull.brought()


@ENTRIES
def test_a_link_of_the_library_that_is_lost_twice_is_no_want_of_ours(linked: Pair, entry: str) -> None:
    pull = Pull(linked, entry)
    plan(linked.puller, *[f"{entry}=fail:{NOT_YET_LINK.value}"] * 2)
    pull.refused(FAILED, "the vendor's library has lost its link again")
    pull.brought_nothing()
    made_anew_for(pull)


@pytest.mark.parametrize("status", RELINKED)
def test_the_library_links_anew_after_a_failure_of_its_link(linked: Pair, status: LLMStatusCode) -> None:
    pull = Pull(linked)
    plan(linked.puller, *[f"PullKvCache=fail:{status.value}"] * (2 if status is SUSPECT else 1))
    pull.refused(status)
    made_anew_for(pull)


def test_pulls_are_streamed_where_the_library_can_not_link_anew(linked: Pair) -> None:
    pull = Pull(linked)
    plan(linked.puller, f"PullKvCache=fail:{NOT_EXIST.value} link=fail:{LINK_FAILED.value}")
    pull()
    pull.brought()
    assert "LinkLlmClusters: LLM_LINK_FAILED" in linked.puller.ask("explain", THEIRS)


def test_the_librarys_own_time_out_leaves_a_link_that_works(hasty: Pair) -> None:
    """The stand-in's link is broken after it, as the vendor's is: only another one helps."""
    pull = Pull(hasty)
    plan(hasty.owner, f"serve=stall:0:{STALL}")
    pull.refused(TIMEOUT)
    pull.brought_nothing()
    control(hasty.owner, "release()")
    pull()
    pull.brought()


@pytest.mark.parametrize("reverse", [False, True], ids=["the end that dialed", "the end that was dialed"])
def test_what_was_registered_after_the_first_pull_is_pulled(linked: Pair, reverse: bool) -> None:
    pair = linked.reversed() if reverse else linked
    for name in ("", "'", "''", "'''"):
        pull = Pull(pair, name=name)
        pull()
        pull.brought()


# ---- calls that do not return

OUTLIVED = "has outlived its deadline"


def outlive(pull: Pull) -> None:
    """Make a pull whose call of the library does not return."""
    plan(pull.pair.puller, f"PullKvCache=stall:0:{STALL}")
    began = time.monotonic()
    pull.refused(TIMEOUT)
    assert SYNC / 1000 <= time.monotonic() - began < CALL_SECONDS
    control(pull.pair.puller, "await_waiting()")
    pull.brought_nothing()


def usable(pull: Pull) -> None:
    """Wait until a pull's target may be used again, and pull."""
    wait_until(lambda: OUTLIVED not in attempt(pull), "the target may be used")
    pull.brought()


def attempt(pull: Pull) -> str:
    """Pull, and return why that is refused, if it is."""
    code = """
from llm_datadist import LLMException
result = ""
try:
    end.manage(*call)
except LLMException as failure:
    result = failure.cause
"""
    cause: str = pull.pair.puller.run(code, call=pull.call)
    return cause


def test_a_call_that_outlives_its_deadline_keeps_its_target(hasty: Pair) -> None:
    puller = hasty.puller
    pull, other = Pull(hasty), Pull(hasty, name="'")
    outlive(pull)
    pull.refused(FAILED, f"a transfer into cache {pull.target_id} {OUTLIVED}")
    for copy in [("copy_cache", pull.target, other.target), ("copy_cache", other.target, pull.target)]:
        assert OUTLIVED in refused(puller.manage, *copy, code=FAILED).cause
    back = CacheKeyByIdAndIndex(OURS, pull.target_id, 0)
    assert OUTLIVED in refused(hasty.owner.manage, "pull_cache", back, "source'", 0, code=FAILED).cause
    other.refused(TIMEOUT)  # transfers over one link go one after the other

    control(puller, "release()")
    usable(pull)
    other()
    other.brought()
    puller.manage("copy_cache", other.target, pull.target)
    hasty.owner.manage("pull_cache", back, "source'", 0)
    for peer, cache in ((puller, other.target), (hasty.owner, "source'")):
        for tensor, found in enumerate(content(peer, cache)):
            np.testing.assert_array_equal(found[:ROW], pattern(pull.number, tensor, found.size)[ROW:])


PRESS = """
import os, signal, threading
import faults

def press():
    faults.await_waiting()
    os.kill(os.getpid(), signal.SIGINT)

before = signal.signal(signal.SIGINT, signal.default_int_handler)
presser = threading.Thread(target=press)
presser.start()
try:
    end.manage(*call)
except KeyboardInterrupt:
    result = "interrupted"
finally:
    presser.join()
    signal.signal(signal.SIGINT, before)
"""


def test_ctrl_c_ends_a_pull_whose_call_does_not_return(pair: Pair) -> None:
    pair.link(sync_kv_timeout=STALL)
    pull = Pull(pair)
    plan(pair.puller, f"PullKvCache=stall:0:{STALL}")
    began = time.monotonic()
    assert pair.puller.run(PRESS, call=pull.call) == "interrupted"
    assert time.monotonic() - began < SOON
    assert OUTLIVED in attempt(pull)
    control(pair.puller, "release()")
    usable(pull)


def test_a_call_that_does_not_return_keeps_nobody_from_another_peer(hasty: Pair, npus: dict[str, str]) -> None:
    pull = Pull(hasty)
    with Peer(npus) as third:
        address = third.open(7, mem_pool_cfg=POOL)
        assert hasty.puller.link(address, 7) is SUCCESS
        outlive(pull)
        other = Pull(Pair(hasty.puller, third, 7), name="'")
        other()
        other.brought()
        control(hasty.puller, "release()")
        third.run("import devices; devices.drop(end)")


def test_unregistering_the_target_of_a_call_that_does_not_return_times_out(hasty: Pair) -> None:
    pull = Pull(hasty)
    outlive(pull)
    began = time.monotonic()
    failure = refused(hasty.puller.manage, "unregister_cache", pull.target_id, code=TIMEOUT)
    assert SYNC / 1000 <= time.monotonic() - began < CALL_SECONDS
    assert "still in use" in failure.cause
    pull.refused(NOT_EXIST)  # it is gone all the same
    control(hasty.puller, "release()")
    again = Pull(hasty, name="'")
    again()
    again.brought()


def test_deallocating_the_target_of_a_call_that_does_not_return_leaves_its_memory(hasty: Pair) -> None:
    whole = CacheDesc(1, [POOL_BYTES], DataType.DT_INT8, Placement.DEVICE)
    pull = Pull(hasty, target="device pool")
    outlive(pull)
    hasty.puller.drop(pull.target)
    failure = refused(hasty.puller.manage, "allocate_cache", whole, code=OUT_OF_MEMORY)
    assert failure.operation == "allocate_cache"
    control(hasty.puller, "release()")
    code = """
from llm_datadist import LLMException, LLMStatusCode
try:
    end.manager.deallocate_cache(end.manager.allocate_cache(whole))
    result = True
except LLMException as failure:
    assert failure.status_code is LLMStatusCode.LLM_OUT_OF_MEMORY, failure
"""
    wait_until(lambda: hasty.puller.run(code, whole=whole), "the whole pool is free")
    again = Pull(hasty, name="'", target="device pool")
    again()
    again.brought()


def test_a_peer_that_dies_ends_the_call_at_once(processes: Pair, npus: dict[str, str]) -> None:
    address = f"127.0.0.1:{free_port()}"
    puller = processes.puller
    puller.open(OURS, listen=None, mem_pool_cfg=POOL)
    try:
        with Peer(npus) as owner:
            owner.open(THEIRS, listen=address, mem_pool_cfg=POOL)
            assert puller.link(address, THEIRS) is SUCCESS
            pull = Pull(Pair(puller, owner))
            plan(puller, f"PullKvCache=stall:0:{STALL}")
            pull.begin()
            began = time.monotonic()
            owner.kill()
            assert "peer died" in refused(pull.result, code=FAILED).cause
            assert time.monotonic() - began < SOON
        with Peer(npus) as owner:
            owner.open(THEIRS, listen=address, mem_pool_cfg=POOL)
            assert puller.link(address, THEIRS) is SUCCESS
            other = Pull(Pair(puller, owner), name="'")
            other()
            other.brought()
            assert OUTLIVED in attempt(pull)
            control(puller, "release()")
            pull.call = ("pull_cache", CacheKeyByIdAndIndex(THEIRS, other.source_id, 1), pull.target, 0)
            pull.number = other.number
            usable(pull)
            owner.run("import devices; devices.drop(end)")
    finally:
        control(puller, "release()")
        puller.run("import devices; devices.drop(end)")
        puller.close()


@pytest.mark.parametrize("how", ["stall", "late"])
def test_a_cache_that_its_owner_unregisters_under_the_call_does_not_exist(linked: Pair, how: str) -> None:
    pull = Pull(linked)
    source = add(linked.owner, "lent", "device registered", SOURCE)
    pull.call = ("pull_cache", CacheKeyByIdAndIndex(THEIRS, source, 1), pull.target, 0)
    plan(linked.puller, f"PullKvCache={how}:0:{STALL}")
    pull.begin()
    linked.owner.manage("unregister_cache", source)
    control(linked.puller, "release()")
    refused(pull.result, code=NOT_EXIST)


@pytest.mark.parametrize("how", ["stall", "late"])
def test_a_cache_that_its_owner_frees_under_the_call_is_pulled_whole(linked: Pair, how: str) -> None:
    pull = Pull(linked)
    if how == "stall":
        pull()  # the library knows the cache
    plan(linked.puller, f"PullKvCache={how}:0:{STALL}")
    pull.begin()
    linked.owner.drop("source")
    rest = [CacheDesc(1, [POOL_BYTES // 4], DataType.DT_INT8, Placement.DEVICE)] * 3
    for number, description in enumerate(rest):  # what is not kept is somebody else's soon
        linked.owner.run("end.caches[rest] = end.manager.allocate_cache(given)", rest=f"rest{number}", given=description)
    control(linked.puller, "release()")
    pull.result()
    pull.brought()
    pull.refused(NOT_EXIST)


def test_a_link_that_the_library_does_not_make_in_time_is_no_link(pair: Pair) -> None:
    pair.owner.open(THEIRS, mem_pool_cfg=POOL)
    pair.puller.open(OURS, listen=None, mem_pool_cfg=POOL)
    address = pair.owner.ask("listen_address")
    plan(pair.puller, f"LinkLlmClusters=stall:0:{STALL}")
    began = time.monotonic()
    assert pair.puller.link(address, THEIRS, SYNC) is TIMEOUT
    assert time.monotonic() - began < CALL_SECONDS
    control(pair.puller, "release()")
    assert pair.puller.link(address, THEIRS) is SUCCESS
    assert pair.puller.told(THEIRS)["transport"] == "cann"
    pull = Pull(pair)
    pull()
    pull.brought()


def test_finalize_does_not_wait_for_a_call_that_does_not_return(hasty: Pair) -> None:
    puller = hasty.puller
    pull = Pull(hasty)
    plan(puller, f"PullKvCache=stall:0:{STALL}")
    pull.begin()
    began = time.monotonic()
    puller.close()
    assert time.monotonic() - began < FINALIZE_SECONDS
    with pytest.raises(LLMException) as failure:
        pull.result()
    assert failure.value.status_code in (FAILED, TIMEOUT)  # by finalize or by the deadline, whichever came first
    wait_until(lambda: "a call of the vendor's library has not returned" in puller.written(), "the log says so")
    control(puller, "release()")


# ---- links and caches that the library refuses


@pytest.mark.parametrize("entry", ["link", "LinkLlmClusters"])
def test_a_link_that_the_library_refuses_goes_over_tcp(pair: Pair, entry: str, npus: dict[str, str]) -> None:
    pair.owner.open(THEIRS, mem_pool_cfg=POOL)
    pair.puller.open(OURS, listen=None, mem_pool_cfg=POOL)
    plan(pair.puller, f"{entry}=fail:{LLMStatusCode.LLM_LINK_BUSY.value}")
    assert pair.puller.link(pair.owner.ask("listen_address"), THEIRS) is SUCCESS
    told = pair.puller.told(THEIRS)
    assert told["transport"] == "tcp"
    assert told["not taken"].startswith("cann: ")
    assert "LLM_LINK_BUSY" in told["not taken"]
    for each in (pair, pair.reversed()):
        pull = Pull(each, name="'" if each is pair else "")
        pull()
        pull.brought()


@pytest.mark.parametrize("entry", ["link", "LinkLlmClusters"])
def test_a_link_that_the_library_refuses_fails_where_cann_is_required(pair: Pair, entry: str) -> None:
    pair.owner.open(THEIRS, mem_pool_cfg=POOL)
    pair.puller.open(OURS, listen=None, mem_pool_cfg=POOL, transport="cann")
    plan(pair.puller, f"{entry}=fail:{LLMStatusCode.LLM_LINK_BUSY.value}")
    address = pair.owner.ask("listen_address")
    assert pair.puller.link(address, THEIRS) is LINK_FAILED
    assert "LLM_LINK_BUSY" in pair.puller.ask("explain", THEIRS)
    assert pair.puller.link(address, THEIRS) is SUCCESS
    assert pair.puller.told(THEIRS)["transport"] == "cann"


@pytest.mark.parametrize("end", ["puller", "owner"])
@ENTRIES
def test_a_cache_that_the_library_refuses_is_streamed(linked: Pair, end: str, entry: str) -> None:
    plan(getattr(linked, end), "RegisterKvCache=fail:0x12345")
    pull = Pull(linked, entry)
    plan(linked.puller, f"{entry}=fail:0x12345")  # which is not called
    pull()
    pull.brought()
    cache_id = pull.target_id if end == "puller" else pull.source_id
    line = f"cache {cache_id} is streamed, since the vendor's library does not register it"

    def said() -> list[str]:
        return [text for text in getattr(linked, end).written().splitlines() if line in text]

    last = wait_until(said, "the log says so")[-1]
    assert last.startswith("[WARNING]")
    assert "(0x00012345)" in last
    known = Pull(linked, entry, name="'")
    known.refused(FAILED, "(0x00012345)")


def test_a_cache_that_the_library_does_not_let_go_of_is_gone(linked: Pair) -> None:
    owner = linked.owner
    pull = Pull(linked)
    pull()
    plan(owner, "UnregisterKvCache=fail:0x12345")
    owner.drop("source")
    warning = "the vendor's library keeps a registration"
    wait_until(
        lambda: any(warning in line and "(0x00012345)" in line for line in owner.written().splitlines()), "the log says so"
    )
    pull.refused(NOT_EXIST)
    again = Pull(linked, name="'")
    again()
    again.brought()


def test_what_the_owners_library_refuses_is_the_code_of_the_pull(linked: Pair) -> None:
    pull = Pull(linked)
    plan(linked.owner, f"serve=fail:{LLMStatusCode.LLM_DEVICE_MEM_ERROR.value}")
    pull.refused(LLMStatusCode.LLM_DEVICE_MEM_ERROR)
    pull.brought_nothing()
    pull()
    pull.brought()


# ---- copies


RUNTIME_ERRORS = [
    (507053, LLMStatusCode.LLM_DEVICE_MEM_ERROR),
    (507057, LLMStatusCode.LLM_SUSPECT_REMOTE_ERROR),
    (107002, FAILED),
]


@pytest.mark.parametrize(("number", "code"), RUNTIME_ERRORS)
def test_a_copy_that_the_runtime_refuses_can_be_made_again(linked: Pair, number: int, code: LLMStatusCode) -> None:
    puller = linked.puller
    for cache, kind, pattern_number, blocks in [
        ("a", "device pool", SOURCE, False),
        ("b", "device pool", TARGET, False),
        ("c", "device registered", SOURCE, True),
        ("d", "host registered", TARGET, True),
    ]:
        add(puller, cache, kind, pattern_number, blocks=blocks)
    for copy in [("copy_cache", "b", "a"), ("swap_blocks", "c", "d", {block: block for block in range(BLOCKS)})]:
        plan(puller, f"aclrtMemcpy=fail:{number}")
        failure = refused(puller.manage, *copy, code=code)
        assert f"aclrtMemcpy: the runtime's error {number}" in failure.cause
        puller.manage(*copy)
    for tensor, (copied, swapped) in enumerate(zip(content(puller, "b"), content(puller, "d"))):
        np.testing.assert_array_equal(copied[:ROW], pattern(SOURCE, tensor, copied.size)[:ROW])
        np.testing.assert_array_equal(swapped, pattern(SOURCE, tensor, swapped.size))


# ---- init

NOWHERE = {"LD_LIBRARY_PATH": "", "ASCEND_HOME_PATH": "", "ASCEND_TOOLKIT_HOME": "", "ASCEND_GLOBAL_LOG_LEVEL": "1"}
ON_HOST, ON_NPU = "DEVICE memory is host memory: ", "DEVICE memory is that of NPU 0, by way of "


def refusal(env: dict[str, str], code: LLMStatusCode, **settings: Any) -> str:
    """Return why init is refused in a process, which keeps nothing of it."""
    with Peer(env) as peer:
        cause: str = refused(peer.open, 1, code=code, **settings).cause
        return cause


def chosen(env: dict[str, str], **settings: Any) -> str:
    """Return what the log of a process says of its device."""
    with Peer(env) as peer:
        peer.open(1, **settings)

        def said() -> Any:
            return [text for text in peer.written().splitlines() if "DEVICE memory is" in text]

        [line] = wait_until(said, "the log says what was chosen")
    assert line.startswith("[INFO]")
    return str(line)


def test_a_device_without_libraries_is_refused_and_each_place_named(tmp_path: Path) -> None:
    cause = refusal({**NOWHERE, "ASCEND_TOOLKIT_HOME": str(tmp_path)}, NOT_ENABLED, device="cann")
    assert "libllm_datadist.so was not found" in cause
    for place in ("LD_LIBRARY_PATH", "$ASCEND_HOME_PATH", f"{tmp_path}/lib64/libllm_datadist.so"):
        assert place in cause


def test_auto_takes_the_host_where_there_are_no_libraries() -> None:
    assert ON_HOST + "libllm_datadist.so was not found" in chosen(NOWHERE)


def test_auto_takes_the_npu_where_there_is_one(libraries: Path) -> None:
    said = chosen({**NOWHERE, "LD_LIBRARY_PATH": str(libraries)})
    assert f"{ON_NPU}{libraries}/libllm_datadist.so" in said


def test_the_libraries_are_taken_from_the_folder_that_is_named(libraries: Path, tmp_path: Path) -> None:
    assert f"{ON_NPU}{libraries}/libllm_datadist.so" in chosen(NOWHERE, cann_path=str(libraries))
    found = {**NOWHERE, "LD_LIBRARY_PATH": str(libraries)}
    assert str(tmp_path / "libllm_datadist.so") in refusal(found, NOT_ENABLED, device="cann", cann_path=str(tmp_path))
    assert ON_HOST + "libllm_datadist.so was not found" in chosen(found, cann_path=str(tmp_path))


def test_auto_takes_the_host_where_a_library_is_broken(libraries: Path, tmp_path: Path) -> None:
    (tmp_path / "libllm_datadist.so").write_text("no library")
    for name in ("libmetadef.so", "libacl_rt.so", "libascendcl.so"):
        (tmp_path / name).symlink_to(libraries / name)
    said = chosen({**NOWHERE, "LD_LIBRARY_PATH": str(tmp_path)})
    assert ON_HOST in said
    assert f"{tmp_path}/libllm_datadist.so" in said
    refusal({**NOWHERE, "LD_LIBRARY_PATH": str(tmp_path)}, NOT_ENABLED, device="cann")


def test_a_library_of_another_version_is_refused(libraries: Path, tmp_path: Path) -> None:
    for name in ("libmetadef.so", "libacl_rt.so", "libascendcl.so"):
        (tmp_path / name).symlink_to(libraries / name)
    (tmp_path / "libllm_datadist.so").symlink_to(libraries / "libmetadef.so")
    assert ON_HOST in chosen(NOWHERE, cann_path=str(tmp_path))
    assert "LlmDataDist" in refusal(NOWHERE, NOT_ENABLED, device="cann", cann_path=str(tmp_path))


def test_a_device_that_is_not_there_is_refused(npus: dict[str, str]) -> None:
    assert refusal(npus, PARAM_INVALID, device_id=2) == "there is no device 2: the vendor's runtime has 2"


@pytest.mark.parametrize(
    "fault", [{"STANDIN_FAULTS": "aclrtMalloc=fail:207001"}, {"STANDIN_DEVICE_BYTES": "4096"}], ids=["refused", "too small"]
)
def test_a_pool_that_the_device_has_no_memory_for_is_refused(npus: dict[str, str], fault: dict[str, str]) -> None:
    assert "aclrtMalloc" in refusal({**npus, **fault}, OUT_OF_MEMORY)


def test_an_object_that_the_library_refuses_is_done_without_or_an_error(npus: dict[str, str]) -> None:
    refusing = {**npus, "STANDIN_FAULTS": f"Initialize=fail:{PARAM_INVALID.value}"}
    assert "Initialize: LLM_PARAM_INVALID" in refusal(refusing, PARAM_INVALID, transport="cann")
    with Peer(refusing) as puller, Peer(npus) as owner:
        pair = Pair(puller, owner)
        pair.link()
        assert puller.told(THEIRS)["transport"] == "tcp"
        pull = Pull(pair)
        pull()
        pull.brought()
        wait_until(lambda: "the vendor's library is not offered to peers" in puller.written(), "the log says so")
        for peer in (puller, owner):
            peer.run("import devices; devices.drop(end)")


# ---- the older mode

OLDER = {"ge.exec.deviceId": "0", "ge.flowGraphMemMaxSize": str(POOL_BYTES)}


def test_the_older_mode_has_one_npu(npus: dict[str, str]) -> None:
    with Peer(npus) as peer:
        raw = {**OLDER, "ge.exec.deviceId": "0;1"}
        cause = refused(peer.open, 1, role=LLMRole.DECODER, raw=raw, code=NOT_ENABLED).cause
        assert cause == "one engine has one NPU, and several ids were given"


def test_the_older_mode_has_no_views_of_an_npus_memory(npus: dict[str, str]) -> None:
    with Peer(npus) as peer:
        peer.open(1, role=LLMRole.DECODER, raw=OLDER)
        code = """
manager = end.engine.kv_cache_manager
cache = manager.allocate_cache(described)
try:
    manager.get_cache_tensors(cache)
finally:
    manager.deallocate_cache(cache)
"""
        refused(peer.run, code, described=desc([2, 8]), code=NOT_ENABLED)


# ---- over time

ROUNDS = 20
WARM = 3  # rounds after which a runtime has opened what it keeps
SPARE = 8  # threads that the Go runtime may make because others wait; one for each round would be more


def test_engines_that_come_and_go_leave_nothing(npus: dict[str, str]) -> None:
    held = 2 * POOL_BYTES  # room for one pool and what a test's own caches take, and not for a second pool
    counted = {**npus, "STANDIN_DEVICE_BYTES": str(held - 1)}
    with Peer(counted) as puller, Peer(counted) as owner:
        pair = Pair(puller, owner)
        counts: list[dict[Peer, tuple[int, int]]] = []
        for _ in range(ROUNDS):
            pair.link()
            for pull in (Pull(pair), Pull(pair, "PullKvBlocks", name="'")):
                pull()
                pull.brought()
            pair.close()
            counts.append({peer: (control(peer, "descriptors()"), control(peer, "threads()")) for peer in (puller, owner)})
        for peer in (puller, owner):
            descriptors, threads = zip(*(each[peer] for each in counts[WARM:]))
            assert max(descriptors) == descriptors[0], descriptors
            assert threads[-1] <= threads[0] + SPARE, threads
            control(peer, f"lend_on_device({held - 1})")
