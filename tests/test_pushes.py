# SPDX-License-Identifier: Apache-2.0
"""push_cache and push_blocks between two processes: which bytes arrive where, what is refused, how a push ends."""

from __future__ import annotations

import time

import numpy as np
import pytest

from links import OURS, THEIRS, by_id, link
from llm_datadist import BlocksCacheKey, Cache, CacheKey, CacheKeyByIdAndIndex, LLMException
from peers import SOURCE, TARGET, Background, Peer, desc, ramp, refused, wait_until
from pushes import (
    FAILED,
    NOT_EXIST,
    NOT_YET_LINK,
    PARAM_INVALID,
    SUCCESS,
    TIMEOUT,
    arrived,
    source,
)

BLOCKS = BlocksCacheKey(THEIRS)


@pytest.fixture
def ends(owner, local):
    """The end that pushes, here, and the one that is pushed to, in another process; one-sided."""
    link(local, owner, one_sided=True)
    return local, owner


# --- which bytes arrive


def test_a_row_goes_to_the_row_that_is_named(ends, owned):
    local, owner = ends
    local.add("s", desc([2, 4], tensors=4), SOURCE, owned=owned)
    to = owner.add("d", desc([3, 6], tensors=4), TARGET, owned=owned)
    local.manage("push_cache", by_id(to, 2), "s", 1)
    arrived(owner, "d", {(tensor, 2): source(SOURCE, tensor, (2, 4))[1] for tensor in range(4)})
    local.manage("push_cache", by_id(to), "s", size=-1)
    arrived(
        owner,
        "d",
        {(tensor, row): source(SOURCE, tensor, (2, 4))[of] for tensor in range(4) for row, of in ((2, 1), (0, 0))},
    )


def test_id_0_is_the_key_0(ends, owned):
    local, owner = ends
    local.add("s", desc([1, 4], tensors=2), SOURCE)
    refused(local.manage, "push_cache", by_id(0), "s", code=NOT_EXIST)
    owner.add("d", desc([2, 4], tensors=2), TARGET, [CacheKey(THEIRS, req_id=0)], owned=owned)
    local.manage("push_cache", by_id(0, 1), "s")
    arrived(owner, "d", {(tensor, 1): source(SOURCE, tensor, (1, 4))[0] for tensor in range(2)})
    local.manage("push_cache", by_id(0, 0), "s")  # nothing was consumed


def test_layers_go_to_other_layers(ends, owned):
    local, owner = ends
    local.add("s", desc([1, 4], tensors=6), SOURCE, owned=owned)
    to = owner.add("d", desc([2, 4], tensors=10), TARGET, owned=owned)
    local.manage("push_cache", by_id(to, 1), "s", 0, range(1, 3), range(3, 5))
    rows = {(6 + n, 1): source(SOURCE, 2 + n, (1, 4))[0] for n in range(4)}
    arrived(owner, "d", rows)
    local.manage("push_cache", by_id(to), "s", dst_layer_range=range(2, 5))
    rows.update({(4 + n, 0): source(SOURCE, n, (1, 4))[0] for n in range(6)})
    arrived(owner, "d", rows)


def test_a_layer_has_as_many_tensors_as_the_caller_says(ends):
    local, owner = ends
    local.add("s", desc([1, 4], tensors=6), SOURCE)
    to = owner.add("d", desc([1, 4], tensors=9), TARGET)
    local.manage("push_cache", by_id(to), "s", 0, range(1, 2), range(2, 3), tensor_num_per_layer=3)
    arrived(owner, "d", {(6 + n, 0): source(SOURCE, 3 + n, (1, 4))[0] for n in range(3)})


@pytest.mark.parametrize(("src", "dst"), [([0, 1, 2, 3], [0, 1, 2, 3]), ([3, 1], [0, 5]), ([2, 2], [1, 0]), ([1, 2], [4, 5])])
def test_blocks_go_to_blocks(ends, owned, src, dst):
    local, owner = ends
    local.add("s", desc([4, 4], tensors=2), SOURCE, blocks=True, owned=owned)
    owner.add("d", desc([6, 4], tensors=2), TARGET, BLOCKS, blocks=True, owned=owned)
    local.manage("push_blocks", BLOCKS, "s", src, dst)
    arrived(
        owner,
        "d",
        {(tensor, to): source(SOURCE, tensor, (4, 4))[of] for tensor in range(2) for of, to in zip(src, dst)},
    )


def test_layers_of_blocks_go_to_other_layers(ends):
    local, owner = ends
    local.add("s", desc([4, 4], tensors=6), SOURCE, blocks=True)
    owner.add("d", desc([2, 4], tensors=8), TARGET, BLOCKS, blocks=True)
    local.manage("push_blocks", BLOCKS, "s", np.array([3]), np.array([1]), range(2, 3), range(3, 4))
    arrived(owner, "d", {(6 + n, 1): source(SOURCE, 4 + n, (4, 4))[3] for n in range(2)})


def test_a_large_push_of_many_scattered_blocks(ends):
    local, owner = ends
    count, size = 300, 40_000
    local.add("s", desc([count, size], tensors=2), SOURCE, blocks=True)
    owner.add("d", desc([count, size], tensors=2), TARGET, BLOCKS, blocks=True)
    order = np.random.default_rng(3).permutation(count)
    src, dst = order[:200].tolist(), order[::-1][:200].tolist()
    local.manage("push_blocks", BLOCKS, "s", src, dst)
    blocks = [source(SOURCE, tensor, (count, size)) for tensor in range(2)]
    arrived(owner, "d", {(tensor, to): blocks[tensor][of] for tensor in range(2) for of, to in zip(src, dst)})


def test_a_push_goes_over_a_link_that_the_receiver_has_made(local, owner):
    address = local.open(OURS, one_sided=True)
    owner.open(THEIRS, listen=None, one_sided=True)
    assert owner.link(address, OURS) is SUCCESS
    local.add("s", desc([4, 4], tensors=2), SOURCE, blocks=True)
    owner.add("d", desc([4, 4], tensors=2), TARGET, BLOCKS, blocks=True)
    local.manage("push_blocks", BLOCKS, "s", [0, 3], [1, 2])
    rows = {(tensor, to): source(SOURCE, tensor, (4, 4))[of] for tensor in range(2) for of, to in ((0, 1), (3, 2))}
    arrived(owner, "d", rows)


def test_pushes_from_many_threads_do_not_mix(ends):
    local, owner = ends
    numbers = range(12)
    for n in numbers:
        local.add(f"s{n}", desc([4, 5000], tensors=2), n, blocks=True)
        owner.add(f"d{n}", desc([4, 5000], tensors=2), TARGET, BlocksCacheKey(THEIRS, n), blocks=True)

    def repeat(n):
        for _ in range(10):
            local.manage("push_blocks", BlocksCacheKey(THEIRS, n), f"s{n}", [3, 1], [0, 3])

    for call in [Background(repeat, n) for n in numbers]:
        call.result()
    for n in numbers:
        arrived(
            owner,
            f"d{n}",
            {(tensor, to): source(n, tensor, (4, 5000))[of] for tensor in range(2) for of, to in ((3, 0), (1, 3))},
        )


def test_what_has_no_layers_is_pushed_without_a_peer(ends):
    local, _ = ends
    local.add("s", desc([1, 4]), SOURCE)
    assert local.manage("push_cache", CacheKeyByIdAndIndex(77, 1), "s") is None


# --- what is refused

REFUSED = [
    # the call, its arguments, keywords, the code and the stage
    ("push_cache", (by_id(1), "unknown"), {}, NOT_EXIST, "check"),
    ("push_cache", (CacheKeyByIdAndIndex(OURS, 1), "s"), {}, PARAM_INVALID, "check"),
    ("push_cache", (CacheKeyByIdAndIndex(77, 1), "s"), {}, NOT_YET_LINK, "check"),
    ("push_blocks", (BlocksCacheKey(77), "blocks", [0], [0]), {}, NOT_YET_LINK, "check"),
    ("push_cache", (by_id(1), "private"), {}, PARAM_INVALID, "check"),
    ("push_cache", (by_id(1), "s", 2), {}, PARAM_INVALID, "check"),
    ("push_cache", (by_id(1), "s", 2**32 - 1), {}, PARAM_INVALID, "check"),
    ("push_cache", (by_id(1), "s", 0, range(2, 3), range(1)), {}, PARAM_INVALID, "check"),
    ("push_cache", (by_id(1), "s"), {"tensor_num_per_layer": 3}, PARAM_INVALID, "check"),
    ("push_blocks", (BLOCKS, "blocks", [4], [0]), {}, PARAM_INVALID, "check"),
    ("push_blocks", (BLOCKS, "blocks", [2**62], [0]), {}, PARAM_INVALID, "check"),
    ("push_blocks", (BLOCKS, "blocks", [0, 1], [0]), {}, PARAM_INVALID, "check"),
    ("push_blocks", (BLOCKS, "blocks", [], [0]), {}, PARAM_INVALID, "check"),
    ("push_cache", (by_id(99), "s"), {}, NOT_EXIST, "lookup"),
    ("push_cache", (by_id(0), "s"), {}, NOT_EXIST, "lookup"),
    ("push_blocks", (BlocksCacheKey(THEIRS, 9), "blocks", [0], [0]), {}, NOT_EXIST, "lookup"),
    ("push_cache", (by_id(3), "s"), {}, PARAM_INVALID, "lookup"),  # not remote accessible
    ("push_blocks", (BlocksCacheKey(THEIRS, 1), "blocks", [0], [0]), {}, PARAM_INVALID, "lookup"),
    ("push_cache", (by_id(1, 2), "s"), {}, PARAM_INVALID, "check"),
    ("push_cache", (by_id(1), "s", 0, range(1), range(2, 3)), {}, PARAM_INVALID, "check"),
    ("push_cache", (by_id(1), "long"), {}, PARAM_INVALID, "check"),
    ("push_blocks", (BLOCKS, "blocks", [0], [4]), {}, PARAM_INVALID, "check"),
    ("push_blocks", (BLOCKS, "blocks", [0, 1], [0, 2**62]), {}, PARAM_INVALID, "check"),
    ("push_blocks", (BLOCKS, "large blocks", [0], [0]), {}, PARAM_INVALID, "check"),
    ("push_cache", (by_id(1), "unmapped"), {}, PARAM_INVALID, None),
    ("push_cache", (by_id(5), "s"), {}, PARAM_INVALID, None),
]


@pytest.fixture
def refusing(ends):
    local, owner = ends
    shape = desc([2, 4], tensors=4)
    local.add("s", shape, SOURCE)
    local.add("private", shape, SOURCE, accessible=False)
    local.add("long", desc([2, 8], tensors=4), SOURCE)
    local.add("blocks", desc([4, 4], tensors=4), SOURCE, blocks=True)
    local.add("large blocks", desc([4, 8], tensors=4), SOURCE, blocks=True)
    local.caches["unmapped"] = local.manager.register_cache(shape, [4096] * 4)
    local.caches["unknown"] = Cache(999, shape, [1] * 4, local.manager, True, False)
    owner.add("d", shape, TARGET)
    owner.add("blocks", desc([4, 4], tensors=4), TARGET, BLOCKS, blocks=True)
    owner.add("private", shape, TARGET, accessible=False)
    owner.add("private blocks", desc([4, 4], tensors=4), TARGET, BlocksCacheKey(THEIRS, 1), blocks=True, accessible=False)
    owner.manage("register_cache", shape, [4096] * 4)
    return local, owner


@pytest.mark.parity(
    "manager.push_cache",
    "manager.push_blocks",
    "failure.unknown_local_cache",
    "failure.unknown_remote",
    "failure.local_bounds",
    "failure.remote_bounds",
    "failure.not_accessible",
    "failure.not_linked",
)
def test_what_can_not_be_pushed_is_refused_and_moves_nothing(refusing):
    local, owner = refusing
    for call, args, kwargs, code, stage in REFUSED:
        failure = refused(local.manage, call, *args, code=code, **kwargs)
        assert failure.operation == call and failure.cause
        assert stage in (None, failure.stage), (call, args, failure)
    for name in ("d", "blocks", "private", "private blocks"):
        arrived(owner, name, {})
    local.manage("push_cache", by_id(1), "s")  # the link is as it was
    arrived(owner, "d", {(tensor, 0): source(SOURCE, tensor, (2, 4))[0] for tensor in range(4)})


def test_two_sided_mode_has_no_pushes(local, owner):
    link(local, owner)
    to = owner.add("d", desc([2, 4], tensors=2), TARGET)
    owner.add("blocks", desc([2, 4], tensors=2), TARGET, BLOCKS, blocks=True)
    local.add("s", desc([2, 4], tensors=2), SOURCE)
    local.add("blocks", desc([2, 4], tensors=2), SOURCE, blocks=True)
    assert "enable_remote_cache_accessible" in str(refused(local.manage, "push_cache", by_id(to), "s"))
    assert "enable_remote_cache_accessible" in str(refused(local.manage, "push_blocks", BLOCKS, "blocks", [0], [0]))
    arrived(owner, "d", {})
    arrived(owner, "blocks", {})


def test_after_finalize_a_push_is_invalid(ends):
    local, owner = ends
    local.add("s", desc([1, 4], tensors=2), SOURCE)
    to = owner.add("d", desc([1, 4], tensors=2), TARGET)
    manager, cache = local.manager, local.caches["s"]
    local.close()
    refused(manager.push_cache, by_id(to), cache)


def test_a_destination_that_is_gone_is_not_written(ends):
    local, owner = ends
    local.add("s", desc([1, 4], tensors=2), SOURCE)
    to = owner.add("d", desc([1, 4], tensors=2), TARGET)
    owner.run("end.kept = end.caches['d']; end.manager.unregister_cache(end.kept.cache_id)")
    refused(local.manage, "push_cache", by_id(to), "s", code=NOT_EXIST)
    arrived(owner, "d", {})


# --- how a push ends

SIZE = 1 << 26
LATE = 10 * 0.1  # seconds: ten times the 100 ms promised after the second in which a receiver may confirm


@pytest.mark.parity("failure.deadline")
def test_a_stopped_receiver_has_not_confirmed_and_later_calls_wait_for_it(local, owner):
    timeout = 0.5
    link(local, owner, one_sided=True, sync_kv_timeout=int(timeout * 1000))
    local.add("s", desc([2, 4096], tensors=2), SOURCE)
    local.add("t", desc([1, 4096], tensors=2), TARGET)
    to = owner.add("d", desc([2, 4096], tensors=2), TARGET)
    with owner.stopped():
        push = Background(local.manage, "push_cache", by_id(to), "s")
        failure = refused(push.result, code=TIMEOUT)
        assert failure.cause == "receiver has not confirmed"
        assert timeout + 0.9 < push.seconds < timeout + 1 + LATE
        began = time.monotonic()
        refused(local.manage, "pull_cache", by_id(to), "t", code=TIMEOUT)
        refused(local.manage, "push_cache", by_id(to), "s", code=TIMEOUT)
        assert time.monotonic() - began < 2 * timeout + LATE  # they have sent nothing that needs to be confirmed

    def pushed():  # the link serves as soon as the receiver has let go
        try:
            return local.manage("push_cache", by_id(to, 1), "s", 1) is None
        except LLMException as exc:
            assert exc.status_code is TIMEOUT, exc

    wait_until(pushed, "the receiver has confirmed")
    got = owner.content("d")
    for tensor in range(2):
        assert np.array_equal(got[tensor][4096:], source(SOURCE, tensor, (2, 4096))[1])


def test_a_receiver_that_is_killed_ends_the_push(local, transport):
    local.open(OURS, listen=None, one_sided=True)
    local.add("s", desc([1, SIZE], tensors=2), SOURCE, content=ramp)
    with Peer() as owner:
        address = owner.open(THEIRS, one_sided=True)
        to = owner.add("d", desc([1, SIZE], tensors=2), TARGET, content=ramp)
        assert local.link(address, THEIRS) is SUCCESS
        first = int(ramp(SOURCE, 0, 8)[0])
        owner.run("end.tensors('d')[0][0] = byte", byte=~first & 0xFF)
        with owner.watched("d") as byte:
            pushes = Background.until_it_fails(local.manage, "push_cache", by_id(to), "s")
            wait_until(lambda: byte(0) == first or not pushes.running(), "bytes arrive")
            owner.kill()
    with pytest.raises(LLMException) as failure:
        pushes.result()
    assert failure.value.status_code in (FAILED, NOT_YET_LINK) and "peer died" in failure.value.cause, failure.value
    refused(local.manage, "push_cache", by_id(to), "s", code=NOT_YET_LINK)


def test_an_unlink_during_a_push_ends_it(ends):
    local, owner = ends
    local.add("s", desc([1, SIZE], tensors=2), SOURCE, content=ramp)
    to = owner.add("d", desc([1, SIZE], tensors=2), TARGET, content=ramp)
    pushes = Background.until_it_fails(local.manage, "push_cache", by_id(to), "s")
    wait_until(lambda: local.held() > 1 or not pushes.running(), "the engine knows of one")
    assert local.unlink(THEIRS) is SUCCESS
    with pytest.raises(LLMException) as failure:
        pushes.result()
    assert failure.value.status_code in (FAILED, NOT_YET_LINK), failure.value
    wait_until(lambda: "dead" in owner.ask("explain", OURS), "the receiver has seen it")
    settled = owner.checksum("d")
    refused(local.manage, "push_cache", by_id(to), "s", code=NOT_YET_LINK)
    assert owner.checksum("d") == settled
