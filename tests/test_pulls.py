# SPDX-License-Identifier: Apache-2.0
"""pull_cache and pull_blocks between two processes: which bytes arrive where, what is refused, which keys are released."""

from __future__ import annotations

import pickle
from array import array

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from links import OURS, THEIRS, by_id, link
from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheKey,
    CacheKeyByIdAndIndex,
    LLMException,
    LLMStatusCode,
    Placement,
)
from peers import SOURCE, TARGET, Background, desc, moved, pattern, refused

SUCCESS = LLMStatusCode.LLM_SUCCESS
PARAM_INVALID = LLMStatusCode.LLM_PARAM_INVALID
NOT_EXIST = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
NOT_YET_LINK = LLMStatusCode.LLM_NOT_YET_LINK

U64MAX = 2**64 - 1
BY_BLOCKS = BlocksCacheKey(THEIRS)


def key(n, model_id=0):
    return CacheKey(THEIRS, req_id=n, model_id=model_id)


def prefix(n, model_id=0):
    return CacheKey(THEIRS, req_id=U64MAX, model_id=model_id, prefix_id=n)


@pytest.fixture
def ends(owner, local):
    """The end that pulls, here, and the owner, in another process; two-sided."""
    link(local, owner)
    return local, owner


@pytest.fixture
def one_sided(owner, local):
    link(local, owner, one_sided=True)
    return local, owner


def tensors(number, shape, count=1):
    size = int(np.prod(shape))
    return [pattern(number, tensor, size) for tensor in range(count)]


def refused_unchanged(local, name, call, *args, **kwargs):
    """As refused, and no byte of a cache has changed."""
    before = local.checksum(name)
    failure = refused(local.manage, call, *args, **kwargs)
    assert local.checksum(name) == before
    return failure


# --- worked examples of the specification, each with every way to hold the memory


@pytest.mark.parity("manager.pull_cache")
def test_a_part_of_a_row_goes_to_the_row_that_is_named(ends, owned):
    local, owner = ends
    owner.add("s", desc([2, 4]), SOURCE, [key(0), key(1)], owned=owned)
    local.add("d", desc([3, 4]), TARGET, owned=owned)
    local.manage("pull_cache", key(1), "d", 2, 3)
    moved(local, "d", {8: tensors(SOURCE, [2, 4])[0][4:7]})


def test_the_local_row_decides_how_much_is_pulled(ends, owned):
    local, owner = ends
    owner.add("s", desc([2, 6]), SOURCE, [key(0), key(1)], owned=owned)
    local.add("d", desc([2, 4]), TARGET, owned=owned)
    local.manage("pull_cache", key(1), "d", 0)
    moved(local, "d", {0: tensors(SOURCE, [2, 6])[0][6:10]})


@pytest.mark.parity("manager.pull_cache", "failure.remote_bounds")
def test_a_local_row_that_is_longer_than_the_remote_one_is_refused(ends, owned):
    local, owner = ends
    owner.add("s", desc([2, 4]), SOURCE, [key(0)], owned=owned)
    local.add("d", desc([2, 6]), TARGET, owned=owned)
    refused_unchanged(local, "d", "pull_cache", key(0), "d")
    local.manage("pull_cache", key(0), "d", 1, 4)  # not released by what failed
    moved(local, "d", {6: tensors(SOURCE, [2, 4])[0][:4]})


@pytest.mark.parity("manager.pull_blocks")
def test_a_row_goes_to_blocks_in_pieces(ends, owned):
    local, owner = ends
    owner.add("s", desc([2, 8]), SOURCE, [key(0), key(1)], owned=owned)
    local.add("d", desc([4, 4]), TARGET, blocks=True, owned=owned)
    local.manage("pull_blocks", key(1), "d", [], [3, 0])
    source = tensors(SOURCE, [2, 8])[0]
    moved(local, "d", {12: source[8:12], 0: source[12:16]})


def test_the_last_piece_of_a_row_may_be_a_part_of_a_block(ends, owned):
    local, owner = ends
    owner.add("s", desc([1, 10]), SOURCE, [key(0)], owned=owned)
    local.add("d", desc([4, 4]), TARGET, blocks=True, owned=owned)
    local.manage("pull_blocks", key(0), "d", [], [2, 0, 1])
    source = tensors(SOURCE, [1, 10])[0]
    moved(local, "d", {8: source[:4], 0: source[4:8], 4: source[8:10]})


def test_pieces_before_the_tail_are_whole(ends, owned):
    """The original gives the last listed block only the remainder; §8.5.4 decides for the whole piece."""
    local, owner = ends
    owner.add("s", desc([1, 10]), SOURCE, [key(0)], owned=owned)
    local.add("d", desc([4, 4]), TARGET, blocks=True, owned=owned)
    local.manage("pull_blocks", key(0), "d", [], [2, 0])
    source = tensors(SOURCE, [1, 10])[0]
    moved(local, "d", {8: source[:4], 0: source[4:8]})


@pytest.mark.parity("manager.pull_blocks")
def test_no_piece_begins_beyond_the_row(ends, owned):
    local, owner = ends
    owner.add("s", desc([2, 8]), SOURCE, [key(0)], owned=owned)
    local.add("d", desc([4, 4]), TARGET, blocks=True, owned=owned)
    refused_unchanged(local, "d", "pull_blocks", key(0), "d", [], [3, 0, 1])
    local.manage("pull_blocks", key(0), "d", [], [1])
    moved(local, "d", {4: tensors(SOURCE, [2, 8])[0][:4]})


@pytest.mark.parity("manager.pull_blocks")
def test_blocks_go_to_blocks(ends, owned):
    local, owner = ends
    owner.add("s", desc([8, 4]), SOURCE, BY_BLOCKS, blocks=True, owned=owned)
    local.add("d", desc([4, 4]), TARGET, blocks=True, owned=owned)
    local.manage("pull_blocks", BY_BLOCKS, "d", [5, 6, 1], [0, 1, 3])
    source = tensors(SOURCE, [8, 4])[0]
    moved(local, "d", {0: source[20:28], 12: source[4:8]})


@pytest.mark.parity("manager.pull_cache")
def test_layers_go_to_other_layers(ends, owned):
    local, owner = ends
    owner.add("s", desc([2, 4], tensors=4), SOURCE, [key(0)], owned=owned)
    local.add("d", desc([2, 4], tensors=4), TARGET, owned=owned)
    local.manage("pull_cache", key(0), "d", src_layer_range=range(1), dst_layer_range=range(1, 2))
    source = tensors(SOURCE, [2, 4], 4)
    moved(local, "d", {}, 0)
    moved(local, "d", {}, 1)
    moved(local, "d", {0: source[0][:4]}, 2)
    moved(local, "d", {0: source[1][:4]}, 3)


# --- layers


def test_only_one_range_goes_where_the_counts_match(ends):
    local, owner = ends
    cache = owner.add("four", desc([1, 4], tensors=4), SOURCE)
    two = owner.add("two", desc([1, 4], tensors=2), SOURCE)
    local.add("d", desc([1, 4], tensors=2), TARGET)
    local.add("six", desc([1, 4], tensors=6), TARGET)
    local.manage("pull_cache", by_id(cache), "d", src_layer_range=range(1, 2))
    source = tensors(SOURCE, [4], 4)
    moved(local, "d", {0: source[2]}, 0)
    moved(local, "d", {0: source[3]}, 1)
    local.manage("pull_cache", by_id(two), "six", dst_layer_range=range(2, 3))
    moved(local, "six", {0: source[0]}, 4)
    moved(local, "six", {0: source[1]}, 5)
    for n in range(4):
        moved(local, "six", {}, n)
    refused_unchanged(local, "six", "pull_cache", by_id(cache), "six", dst_layer_range=range(2, 3))
    refused_unchanged(local, "six", "pull_cache", by_id(cache), "six", src_layer_range=range(2))


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"src_layer_range": range(1), "dst_layer_range": range(1)}, LLMException),  # 1 tensor is no multiple of 2
        ({"src_layer_range": range(1), "dst_layer_range": range(1), "tensor_num_per_layer": 1}, None),
        ({"tensor_num_per_layer": 7}, None),  # not looked at without a range
        ({"src_layer_range": range(0), "dst_layer_range": range(5, 5)}, None),  # empty is all
        ({"src_layer_range": None, "dst_layer_range": None, "no such keyword": 3}, None),
        ({"src_layer_range": range(1, 2), "tensor_num_per_layer": 1}, LLMException),
        ({"dst_layer_range": range(1, 2), "tensor_num_per_layer": 1}, LLMException),
        ({"src_layer_range": range(2), "tensor_num_per_layer": 1}, LLMException),
        ({"src_layer_range": range(2**32), "tensor_num_per_layer": 1}, LLMException),
        ({"src_layer_range": range(2**32 + 1), "tensor_num_per_layer": 1}, ValueError),
    ],
)
def test_layer_ranges_of_a_cache_of_one_tensor(ends, kwargs, error):
    local, owner = ends
    cache = owner.add("s", desc([1, 4]), SOURCE)
    local.add("d", desc([1, 4]), TARGET)
    if error is None:
        local.manage("pull_cache", by_id(cache), "d", 0, 4, **kwargs)
        moved(local, "d", {0: tensors(SOURCE, [4])[0]})
    else:
        refused_unchanged(local, "d", "pull_cache", by_id(cache), "d", 0, 4, error=error, **kwargs)


@pytest.mark.parity("manager.pull_blocks")
def test_layers_of_a_pull_into_blocks(ends):
    local, owner = ends
    owner.add("s", desc([4, 4], tensors=6), SOURCE, BY_BLOCKS, blocks=True)
    rows = owner.add("rows", desc([2, 8], tensors=6), SOURCE + 1)
    local.add("d", desc([4, 4], tensors=3), TARGET, blocks=True)
    layers = {"src_layer_range": range(1, 2), "dst_layer_range": range(1), "tensor_num_per_layer": 3}
    local.manage("pull_blocks", BY_BLOCKS, "d", [3], [0], **layers)
    local.manage("pull_blocks", by_id(rows, 1), "d", [], [2, 3], **layers)
    for tensor in range(3):
        source = pattern(SOURCE, tensor + 3, 16), pattern(SOURCE + 1, tensor + 3, 16)
        moved(local, "d", {0: source[0][12:], 8: source[1][8:]}, tensor)


# --- validation in Python, in its order: each row breaks the rule at its place and rules behind it


class Wrong:
    """Stands for the object of another class."""


BAD_RANGES = [
    ([0, 1], TypeError),
    ((0, 1), TypeError),
    (1, TypeError),
    (range(0, 4, 2), LLMException),
    (range(4, 0, -1), LLMException),
    (range(-1, 1), LLMException),
    (range(2**33), ValueError),
]
BAD_PER_LAYER = [(-1, ValueError), (2**32, ValueError), (0, LLMException), (1.0, TypeError), ("x", TypeError), (None, TypeError)]
NO_KEY = CacheKey(THEIRS, req_id=U64MAX)
BOTH_KEYS = CacheKey(THEIRS, req_id=1, prefix_id=1)

PULL_CACHE = [
    ((Wrong(), Wrong(), "0", "0"), {}, TypeError),
    ((BY_BLOCKS, "d", 0, -1), {}, TypeError),
    ((key(0), Wrong(), -1, "0"), {}, TypeError),
    ((key(0), "blocks", 1.0, -2), {}, TypeError),
    ((key(0), "blocks", -1, -2), {}, ValueError),
    ((key(0), "blocks", 2**32, -2), {}, ValueError),
    ((key(0), "blocks", 0, "1"), {}, TypeError),
    ((key(0), "blocks", 0, None), {}, TypeError),
    ((key(0), "blocks", 0, 2**63), {}, ValueError),
    ((key(0), "blocks", 0, -1), {"tensor_num_per_layer": -1}, LLMException),
    ((key(0), "d", 0, 0), {"tensor_num_per_layer": -1}, LLMException),
    ((key(0), "d", 0, -2), {"tensor_num_per_layer": -1}, LLMException),
    *[((NO_KEY, "d"), {"tensor_num_per_layer": value, "src_layer_range": 1}, error) for value, error in BAD_PER_LAYER],
    ((NO_KEY, "d"), {"src_layer_range": 1}, LLMException),
    ((BOTH_KEYS, "d"), {"src_layer_range": 1}, LLMException),
    *[((key(0), "d"), {"src_layer_range": value, "dst_layer_range": 1.5}, error) for value, error in BAD_RANGES],
    *[((key(0), "d"), {"dst_layer_range": value}, error) for value, error in BAD_RANGES],
    ((None, "d"), {}, AttributeError),
    ((key(0), None), {}, AttributeError),
]


@pytest.fixture
def refusing(ends):
    """Ends with caches that any right call could use."""
    local, owner = ends
    owner.add("s", desc([2, 4], tensors=2), SOURCE, [key(0), key(1)], owned=True)
    owner.add("s blocks", desc([4, 4], tensors=2), SOURCE, BY_BLOCKS, blocks=True)
    local.add("d", desc([2, 4], tensors=2), TARGET)
    local.add("blocks", desc([4, 4], tensors=2), TARGET, blocks=True)
    return ends


def nothing_moves(local, call, args, kwargs, error):
    before = [local.checksum(name) for name in ("d", "blocks")]
    failure = refused(local.manage, call, *args, error=error, **kwargs)
    assert [local.checksum(name) for name in ("d", "blocks")] == before
    return failure


@pytest.mark.parity("manager.pull_cache")
@pytest.mark.parametrize(("args", "kwargs", "error"), PULL_CACHE)
def test_pull_cache_checks_before_a_byte_moves(refusing, args, kwargs, error):
    local, _ = refusing
    nothing_moves(local, "pull_cache", args, kwargs, error)
    local.manage("pull_cache", key(0), "d")  # still bound


PULL_BLOCKS = [
    ((Wrong(), Wrong(), 3, 3), {}, TypeError),
    ((key(0), Wrong(), 3, 3), {}, TypeError),
    ((BY_BLOCKS, "d", 3, []), {}, TypeError),
    ((BY_BLOCKS, "d", None, []), {}, TypeError),
    ((BY_BLOCKS, "d", {0}, []), {}, TypeError),
    ((BY_BLOCKS, "d", "01", []), {}, TypeError),
    ((BY_BLOCKS, "d", b"\0", []), {}, TypeError),
    ((BY_BLOCKS, "d", [0.0], []), {}, TypeError),
    ((BY_BLOCKS, "d", ["0"], []), {}, TypeError),
    ((BY_BLOCKS, "d", [None], []), {}, TypeError),
    ((BY_BLOCKS, "d", [0], 3), {}, TypeError),
    ((BY_BLOCKS, "d", [0], [0, 1.5]), {}, TypeError),
    ((BY_BLOCKS, "blocks", [-1], [0]), {}, TypeError),
    ((BY_BLOCKS, "blocks", [0], [-1]), {}, TypeError),
    ((BY_BLOCKS, "blocks", [2**64], [0]), {}, TypeError),
    (
        (
            BY_BLOCKS,
            "blocks",
            [0],
            [0],
        ),
        {"tensor_num_per_layer": -1},
        ValueError,
    ),
    ((BY_BLOCKS, "blocks", [2**63], [0]), {}, LLMException),
    ((BY_BLOCKS, "blocks", [0], [2**63]), {}, LLMException),
    ((BY_BLOCKS, "d", [0], [0]), {"tensor_num_per_layer": -1}, LLMException),
    ((BY_BLOCKS, "blocks", [0], []), {"tensor_num_per_layer": -1}, LLMException),
    *[((NO_KEY, "blocks", [0], [0]), {"tensor_num_per_layer": value}, error) for value, error in BAD_PER_LAYER],
    ((BY_BLOCKS, "blocks", [], [0]), {"src_layer_range": 1}, LLMException),
    ((NO_KEY, "blocks", [0], [0]), {"src_layer_range": 1}, LLMException),
    ((BOTH_KEYS, "blocks", [], [0]), {"src_layer_range": 1}, LLMException),
    ((key(0), "blocks", [0], [0]), {"src_layer_range": 1}, LLMException),
    ((by_id(1), "blocks", [0], [0]), {"src_layer_range": 1}, LLMException),
    *[((BY_BLOCKS, "blocks", [0], [0]), {"src_layer_range": value}, error) for value, error in BAD_RANGES],
    *[((BY_BLOCKS, "blocks", [0], [0]), {"dst_layer_range": value}, error) for value, error in BAD_RANGES],
    *[
        ((bad, "blocks", [0], [0]), {}, TypeError)
        for bad in (BlocksCacheKey(2**64 + THEIRS), BlocksCacheKey(-1), BlocksCacheKey(THEIRS, -1), BlocksCacheKey(THEIRS, 2**64))
    ],
    ((None, "blocks", [], [0]), {}, AttributeError),
    ((BY_BLOCKS, None, [0], [0]), {}, AttributeError),
]


@pytest.mark.parity("manager.pull_blocks")
@pytest.mark.parametrize(("args", "kwargs", "error"), PULL_BLOCKS)
def test_pull_blocks_checks_before_a_byte_moves(refusing, args, kwargs, error):
    local, _ = refusing
    nothing_moves(local, "pull_blocks", args, kwargs, error)


def test_one_sided_pull_cache_takes_ids_only(one_sided):
    local, owner = one_sided
    owner.add("s", desc([2, 4]), SOURCE, [key(0)])
    local.add("d", desc([2, 4]), TARGET)
    refused_unchanged(local, "d", "pull_cache", key(0), "d", error=TypeError)
    refused_unchanged(local, "d", "pull_cache", NO_KEY, "d", error=TypeError)


# --- checks of the engine: (call, arguments, code, stage)

NATIVE = [
    ("pull_cache", (CacheKeyByIdAndIndex(OURS, 1), "unknown"), PARAM_INVALID, "check"),
    ("pull_cache", (CacheKey(OURS, req_id=1), "d"), PARAM_INVALID, "check"),
    ("pull_cache", (CacheKeyByIdAndIndex(77, 1), "unknown"), NOT_EXIST, "check"),
    ("pull_cache", (CacheKeyByIdAndIndex(77, 1), "d", 2), PARAM_INVALID, "check"),
    ("pull_cache", (CacheKeyByIdAndIndex(77, 1), "d", 2**32 - 1), PARAM_INVALID, "check"),
    ("pull_cache", (CacheKeyByIdAndIndex(77, 1), "d", 0, 5), PARAM_INVALID, "check"),
    ("pull_cache", (CacheKeyByIdAndIndex(77, 1), "d", 0, 2**63 - 1), PARAM_INVALID, "check"),
    ("pull_blocks", (BlocksCacheKey(77), "blocks", [0, 1], [0]), PARAM_INVALID, "check"),
    ("pull_blocks", (BlocksCacheKey(77), "blocks", [0], [4]), PARAM_INVALID, "check"),
    ("pull_blocks", (BlocksCacheKey(77), "blocks", [0, 0, 0], [0, 2**62, 1]), PARAM_INVALID, "check"),
    ("pull_blocks", (CacheKeyByIdAndIndex(77, 1), "blocks", [], [0, 4]), PARAM_INVALID, "check"),
    ("pull_cache", (CacheKeyByIdAndIndex(77, 1), "d"), NOT_YET_LINK, "check"),
    ("pull_blocks", (BlocksCacheKey(77), "blocks", [99], [0]), NOT_YET_LINK, "check"),
    ("pull_cache", (key(99), "d"), NOT_EXIST, "lookup"),
    ("pull_cache", (key(0, model_id=1), "d"), NOT_EXIST, "lookup"),
    ("pull_cache", (prefix(0), "d"), NOT_EXIST, "lookup"),
    ("pull_cache", (by_id(99), "d"), NOT_EXIST, "lookup"),
    ("pull_cache", (by_id(0), "d"), NOT_EXIST, "lookup"),
    ("pull_cache", (by_id(1, 2), "d"), NOT_EXIST, "lookup"),
    ("pull_cache", (by_id(1, 2**32 - 1), "d"), NOT_EXIST, "lookup"),
    ("pull_cache", (by_id(2), "d"), PARAM_INVALID, "lookup"),  # blocks without source blocks
    ("pull_cache", (by_id(2, 1), "d"), NOT_EXIST, "lookup"),
    ("pull_cache", (by_id(-1), "d"), PARAM_INVALID, "lookup"),  # stands for the blocks cache of model 0
    ("pull_blocks", (BlocksCacheKey(THEIRS, 1), "blocks", [0], [0]), NOT_EXIST, "lookup"),
    ("pull_blocks", (BY_BLOCKS, "blocks", [4], [0]), PARAM_INVALID, "lookup"),
    ("pull_blocks", (BY_BLOCKS, "blocks", [0, 2**62], [0, 1]), PARAM_INVALID, "lookup"),
    ("pull_blocks", (BY_BLOCKS, "one tensor", [0], [0]), PARAM_INVALID, "lookup"),
    ("pull_blocks", (by_id(2), "blocks", [], [0]), PARAM_INVALID, "lookup"),
    ("pull_blocks", (key(0), "blocks", [], [0, 1]), PARAM_INVALID, "lookup"),
    ("pull_blocks", (BY_BLOCKS, "large blocks", [2], [0]), PARAM_INVALID, "lookup"),  # beyond the remote tensor
]


@pytest.mark.parity(
    "failure.unknown_local_cache",
    "failure.unknown_remote",
    "failure.local_bounds",
    "failure.remote_bounds",
    "failure.own_cluster",
    "failure.not_linked",
)
@pytest.mark.parametrize(("call", "args", "code", "stage"), NATIVE)
def test_the_engine_checks_before_a_byte_moves(refusing, call, args, code, stage):
    local, _ = refusing
    local.add("one tensor", desc([4, 4]), TARGET, blocks=True)
    local.add("large blocks", desc([4, 8], tensors=2), TARGET, blocks=True)
    local.caches["unknown"] = Cache(999, desc([2, 4]), [1], local.manager, True, False)
    failure = refused(local.manage, call, *args, code=code)
    assert (failure.operation, failure.stage) == (call, stage)
    assert failure.cause
    for name in ("d", "blocks", "one tensor", "large blocks"):
        moved(local, name, {})
    local.manage("pull_cache", key(0), "d")  # the link and the key are as they were


def test_the_kind_of_the_local_cache_is_that_of_the_engine(refusing):
    """A Cache object that says otherwise than the engine's table."""
    local, _ = refusing
    rows, blocks = local.caches["d"], local.caches["blocks"]
    lies = Cache(blocks.cache_id, desc([4, 4]), [1], local.manager, True, False)
    refused(local.manager.pull_cache, by_id(1), lies)
    lies = Cache(rows.cache_id, desc([2, 4]), [1], local.manager, True, True)
    refused(local.manager.pull_blocks, BY_BLOCKS, lies, [0], [0])
    refused(local.manager.pull_blocks, by_id(1), lies, [], [0])
    moved(local, "d", {})
    moved(local, "blocks", {})


def test_a_request_beyond_a_control_frame_is_refused(refusing):
    local, _ = refusing
    for call, count in ((refused_unchanged, 1 << 20), (None, 100_000)):
        blocks = [1] * count
        if call:
            failure = call(local, "blocks", "pull_blocks", BY_BLOCKS, "blocks", blocks, blocks)
            assert "split" in failure.hint
        else:
            local.manage("pull_blocks", BY_BLOCKS, "blocks", blocks, blocks)
            moved(local, "blocks", {4: tensors(SOURCE, [4, 4])[0][4:8]})


def test_a_failure_says_who_where_and_why_and_survives_pickling(local, owner):
    address = link(local, owner)
    local.add("d", desc([2, 4]), TARGET)
    failure = refused(local.manage, "pull_cache", key(3), "d", code=NOT_EXIST)
    fields = ("status_code", "operation", "peer", "address", "stage", "cause", "hint", "args")
    assert (failure.operation, failure.peer, failure.address, failure.stage) == ("pull_cache", THEIRS, address, "lookup")
    assert "no cache has the key" in failure.cause
    assert str(failure).startswith("pull_cache failed, error code is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST, peer 1 at ")
    again = pickle.loads(pickle.dumps(failure))
    assert type(again) is LLMException
    assert [getattr(again, name) for name in fields] == [getattr(failure, name) for name in fields]


# --- block lists


@pytest.mark.parametrize(
    "form",
    [
        list,
        tuple,
        lambda ids: np.array(ids, np.int64),
        lambda ids: np.array(ids, np.uint64),
        lambda ids: np.array(ids, np.int32),
        lambda ids: np.repeat(np.array(ids, np.int64), 2)[::2],  # not contiguous
        lambda ids: array("q", ids),
        lambda ids: memoryview(array("Q", ids)),
    ],
    ids=["list", "tuple", "int64", "uint64", "int32", "strided", "array", "memoryview"],
)
def test_block_lists_may_be_buffers(ends, form):
    local, owner = ends
    owner.add("s", desc([8, 4]), SOURCE, BY_BLOCKS, blocks=True)
    rows = owner.add("rows", desc([2, 8]), SOURCE + 1)
    local.add("d", desc([8, 4]), TARGET, blocks=True)
    local.manage("pull_blocks", BY_BLOCKS, "d", form([7, 0, 7]), form([1, 2, 5]))
    local.manage("pull_blocks", by_id(rows), "d", form([]), form([7, 6]))
    source, row = tensors(SOURCE, [8, 4])[0], tensors(SOURCE + 1, [2, 8])[0]
    moved(local, "d", {4: source[28:], 8: source[:4], 20: source[28:], 28: row[:4], 24: row[4:8]})


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint32, np.float64, np.bool_, object])
def test_other_arrays_are_no_block_lists(refusing, dtype):
    local, _ = refusing
    nothing_moves(local, "pull_blocks", (BY_BLOCKS, "blocks", np.array([0], dtype), [0]), {}, TypeError)
    nothing_moves(local, "pull_blocks", (BY_BLOCKS, "blocks", [0], np.array([[0]])), {}, TypeError)
    nothing_moves(local, "pull_blocks", (BY_BLOCKS, "blocks", [0], np.array([-1])), {}, TypeError)


def test_a_list_that_changes_after_the_call_changes_nothing(ends):
    local, owner = ends
    owner.add("s", desc([4, 4]), SOURCE, BY_BLOCKS, blocks=True)
    local.add("d", desc([4, 4]), TARGET, blocks=True)
    src, dst = [3], [0]
    local.manage("pull_blocks", BY_BLOCKS, "d", src, dst)
    assert (src, dst) == ([3], [0])


# --- placements


@pytest.mark.parametrize("theirs", Placement)
@pytest.mark.parametrize("ours", Placement)
def test_every_pair_of_placements_moves(ends, theirs, ours, owned):
    local, owner = ends
    owner.add("s", desc([2, 4], placement=theirs), SOURCE, [key(0)], owned=owned)
    owner.add("s blocks", desc([4, 4], placement=theirs), SOURCE, BY_BLOCKS, blocks=True, owned=owned)
    local.add("d", desc([2, 4], placement=ours), TARGET, owned=owned)
    local.add("d blocks", desc([4, 4], placement=ours), TARGET, blocks=True, owned=owned)
    local.manage("pull_cache", key(0), "d", 1)
    moved(local, "d", {4: tensors(SOURCE, [2, 4])[0][:4]})
    local.manage("pull_blocks", BY_BLOCKS, "d blocks", [1, 3], [0, 2])
    source = tensors(SOURCE, [4, 4])[0]
    moved(local, "d blocks", {0: source[4:8], 8: source[12:]})


# --- keys: what a pull releases


@pytest.fixture
def keyed(ends):
    """An owned cache of three rows: a normal key, a prefix key, another normal key."""
    local, owner = ends
    owner.add("s", desc([4, 4], tensors=4), SOURCE, [key(1), prefix(1), key(2)], owned=True)
    local.add("d", desc([4, 4], tensors=4), TARGET)
    local.add("blocks", desc([4, 4], tensors=4), TARGET, blocks=True)
    return ends


def has(local, wanted):
    """Tell whether a key is bound, without releasing it."""
    local.add("longer", desc([1, 4096], tensors=4), TARGET)
    with pytest.raises(LLMException) as failure:
        local.manage("pull_cache", wanted, "longer")
    local.drop("longer")
    assert failure.value.status_code in (PARAM_INVALID, NOT_EXIST), failure.value
    return failure.value.status_code is PARAM_INVALID


RELEASES = {
    "by key": (("pull_cache", key(1), "d"), True),
    "by key, in part": (("pull_cache", key(1), "d", 0, 1), True),
    "by key, into blocks": (("pull_blocks", key(1), "blocks", [], [2]), True),
    "by id and row": (("pull_cache", by_id(1, 0), "d"), True),
    "by id and row, into blocks": (("pull_blocks", by_id(1, 0), "blocks", [], [2]), True),
    "by id and a row with a prefix key": (("pull_cache", by_id(1, 1), "d"), False),
    "by id and a row without a key": (("pull_cache", by_id(1, 3), "d"), False),
    "by the prefix key": (("pull_cache", prefix(1), "d"), False),
    "by the prefix key, into blocks": (("pull_blocks", prefix(1), "blocks", [], [0]), False),
    "too large": (("pull_cache", key(1), "d", 0, 5), False),
    "local row out of range": (("pull_cache", key(1), "d", 4), False),
    "too many blocks": (("pull_blocks", key(1), "blocks", [], [0, 1]), False),
}


@pytest.mark.parity("manager.pull_cache")
@pytest.mark.parametrize("name", RELEASES)
def test_a_pull_releases_its_own_key_or_none(keyed, name):
    local, _ = keyed
    call, releases = RELEASES[name]
    if name in ("too large", "local row out of range", "too many blocks"):
        refused(local.manage, *call)
    else:
        local.manage(*call)
    assert has(local, key(1)) is not releases
    assert has(local, prefix(1)) and has(local, key(2))
    if releases:
        before = local.checksum("d")
        refused(local.manage, "pull_cache", key(1), "d", code=NOT_EXIST)
        assert local.checksum("d") == before
        local.manage("pull_cache", by_id(1, 0), "d")  # the cache is still there


def layers(src, **kwargs):
    return {"src_layer_range": src, "tensor_num_per_layer": 1, **kwargs}


def test_a_key_is_released_when_all_its_layers_have_been_pulled(keyed):
    local, _ = keyed
    for src in (range(2), range(3, 4), range(2), range(1, 2)):
        local.manage("pull_cache", key(1), "d", **layers(src, dst_layer_range=src))
        assert has(local, key(1))
    local.manage("pull_cache", key(1), "d", **layers(range(2, 3), dst_layer_range=range(2, 3)))
    assert not has(local, key(1))
    assert np.array_equal(np.array(local.content("d"))[:, :4], np.array(tensors(SOURCE, [4, 4], 4))[:, :4])


def test_layers_are_counted_for_each_key(keyed):
    local, _ = keyed
    local.manage("pull_cache", key(1), "d", **layers(range(2), dst_layer_range=range(2)))
    local.manage("pull_cache", key(2), "d", **layers(range(2, 4), dst_layer_range=range(2, 4)))
    assert has(local, key(1)) and has(local, key(2))
    local.manage("pull_cache", key(2), "d")  # without a range: at once
    assert has(local, key(1)) and not has(local, key(2))
    local.manage("pull_cache", key(1), "d", **layers(range(2, 4), dst_layer_range=range(2, 4)))
    assert not has(local, key(1))


def test_layers_that_fail_do_not_count(keyed):
    local, _ = keyed
    local.manage("pull_cache", key(1), "d", **layers(range(3), dst_layer_range=range(3)))
    refused(local.manage, "pull_cache", key(1), "d", 0, 5, **layers(range(3, 4), dst_layer_range=range(3, 4)))
    assert has(local, key(1))


def test_a_pull_by_id_and_row_counts_layers_for_the_key_there(keyed):
    local, _ = keyed
    local.manage("pull_cache", by_id(1, 2), "d", **layers(range(3), dst_layer_range=range(3)))
    assert has(local, key(2))
    local.manage("pull_cache", key(2), "d", **layers(range(3, 4), dst_layer_range=range(3, 4)))
    assert not has(local, key(2))


def test_blocks_keys_and_registered_caches_are_never_released(ends):
    local, owner = ends
    owner.add("blocks", desc([4, 4]), SOURCE, BY_BLOCKS, blocks=True, owned=True)
    cache = owner.add("s", desc([4, 4]), SOURCE, [key(1)])
    local.add("d", desc([4, 4]), TARGET)
    local.add("into", desc([4, 4]), TARGET, blocks=True)
    for _ in range(3):
        local.manage("pull_blocks", BY_BLOCKS, "into", [0, 1, 2, 3], [0, 1, 2, 3])
        local.manage("pull_cache", key(1), "d")
        local.manage("pull_cache", by_id(cache), "d")
        local.manage("pull_blocks", key(1), "into", [], [0])


def test_of_two_that_pull_one_key_at_once_it_is_released_once(ends):
    local, owner = ends
    for name in ("one", "two"):
        local.add(name, desc([1, 1 << 20]), TARGET)
    for n in range(20):
        owner.add("s", desc([1, 1 << 20]), n, [key(1)], owned=True)
        calls = [Background(local.manage, "pull_cache", key(1), name) for name in ("one", "two")]
        ended = []
        for call, name in zip(calls, ("one", "two")):
            try:
                call.result()
                assert np.array_equal(local.content(name)[0], pattern(n, 0, 1 << 20))
                ended.append(SUCCESS)
            except LLMException as exc:
                ended.append(exc.status_code)
        assert SUCCESS in ended and set(ended) <= {SUCCESS, NOT_EXIST}, ended
        refused(local.manage, "pull_cache", key(1), "one", code=NOT_EXIST)
        owner.drop("s")


def test_a_released_key_can_be_bound_again_and_gives_the_new_bytes(ends):
    local, owner = ends
    local.add("d", desc([1, 300]), TARGET)
    for n in range(10):
        owner.add("s", desc([1, 300]), n, [key(1)], owned=True)
        local.manage("pull_cache", key(1), "d")
        assert np.array_equal(local.content("d")[0], pattern(n, 0, 300))
        owner.drop("s")


# --- one-sided mode


@pytest.mark.parity("manager.pull_cache", "manager.pull_blocks")
def test_one_sided_pulls_by_id_honour_the_row_and_the_remote_stride(one_sided):
    local, owner = one_sided
    cache = owner.add("s", desc([3, 8]), SOURCE)
    local.add("d", desc([2, 4]), TARGET)
    local.add("blocks", desc([4, 4]), TARGET, blocks=True)
    source = tensors(SOURCE, [3, 8])[0]
    local.manage("pull_cache", by_id(cache, 2), "d", 1, 3)
    moved(local, "d", {4: source[16:19]})
    local.manage("pull_blocks", by_id(cache, 1), "blocks", [], [3, 1])
    moved(local, "blocks", {12: source[8:12], 4: source[12:16]})


def test_one_sided_pulls_by_key_honour_the_row_and_release_nothing(one_sided):
    local, owner = one_sided
    owner.add("s", desc([2, 8]), SOURCE, [key(0), key(1)], owned=True)
    local.add("d", desc([4, 4]), TARGET, blocks=True)
    for _ in range(3):
        local.manage("pull_blocks", key(1), "d", [], [0, 2])
    source = tensors(SOURCE, [2, 8])[0]
    moved(local, "d", {0: source[8:12], 8: source[12:]})
    owner.manage("remove_cache_key", key(1))
    refused_unchanged(local, "d", "pull_blocks", key(1), "d", [], [0, 2], code=NOT_EXIST)


def test_one_sided_pulls_by_id_release_nothing(one_sided):
    local, owner = one_sided
    cache = owner.add("s", desc([2, 4]), SOURCE, [key(0)], owned=True)
    local.add("d", desc([2, 4]), TARGET)
    local.add("blocks", desc([2, 4]), TARGET, blocks=True)
    for _ in range(3):
        local.manage("pull_cache", by_id(cache), "d")
    local.manage("pull_blocks", key(0), "blocks", [], [0])


def test_one_sided_the_kind_of_the_remote_cache_is_not_looked_at(one_sided):
    local, owner = one_sided
    blocks = owner.add("blocks", desc([4, 8]), SOURCE, BY_BLOCKS, blocks=True)
    owner.add("rows", desc([2, 8]), SOURCE + 1, [key(0)])
    local.add("d", desc([2, 8]), TARGET)
    local.add("into", desc([4, 4]), TARGET, blocks=True)
    source = tensors(SOURCE, [4, 8])[0]
    local.manage("pull_cache", by_id(blocks), "d", 1)  # from the base of a cache of blocks
    moved(local, "d", {8: source[:8]})
    local.manage("pull_blocks", BY_BLOCKS, "into", [7, 0], [0, 1])  # in blocks of the local size
    moved(local, "into", {0: source[28:32], 4: source[:4]})
    refused_unchanged(local, "into", "pull_blocks", BY_BLOCKS, "into", [8], [0])
    refused_unchanged(local, "into", "pull_blocks", BY_BLOCKS, "into", [6, 7, 8], [0, 1, 2])  # the end of a run


def test_one_sided_ids_that_are_none_are_not_the_key_0(one_sided):
    local, owner = one_sided
    owner.add("s", desc([4, 4]), SOURCE, [key(0)])
    local.add("d", desc([2, 4]), TARGET)
    for cache_id in (0, -1):
        refused_unchanged(local, "d", "pull_cache", by_id(cache_id), "d", code=NOT_EXIST)


def test_one_sided_ids_that_are_none_are_the_blocks_cache_of_model_0(one_sided):
    local, owner = one_sided
    owner.add("s", desc([4, 4]), SOURCE, BY_BLOCKS, blocks=True)
    local.add("d", desc([2, 4]), TARGET)
    source = tensors(SOURCE, [4, 4])[0]
    for row, cache_id in enumerate((0, -1)):
        local.manage("pull_cache", by_id(cache_id), "d", row)
    moved(local, "d", {0: source[:4], 4: source[:4]})


def test_one_sided_prefix_keys_are_the_blocks_cache_of_their_model(one_sided):
    local, owner = one_sided
    local.add("into", desc([4, 4]), TARGET, blocks=True)
    refused_unchanged(local, "into", "pull_blocks", prefix(3), "into", [], [0], code=NOT_EXIST)
    owner.add("s", desc([4, 4]), SOURCE, BlocksCacheKey(THEIRS, 7), blocks=True)
    refused_unchanged(local, "into", "pull_blocks", prefix(3), "into", [], [0], code=NOT_EXIST)
    local.manage("pull_blocks", prefix(3, model_id=7), "into", [], [2])
    moved(local, "into", {8: tensors(SOURCE, [4, 4])[0][:4]})


@pytest.mark.parity("failure.unknown_remote", "failure.remote_bounds")
@pytest.mark.parametrize(
    ("args", "kwargs", "code"),
    [
        ((by_id(1, 2), "d"), {}, NOT_EXIST),
        ((by_id(1, 2**32 - 1), "d"), {}, NOT_EXIST),
        ((by_id(9), "d"), {}, NOT_EXIST),
        ((by_id(1), "d"), layers(range(1, 3), dst_layer_range=range(2)), PARAM_INVALID),
        ((by_id(1), "d"), layers(range(2, 4), dst_layer_range=range(2)), PARAM_INVALID),
        ((by_id(1), "d"), layers(range(1)), PARAM_INVALID),
        ((by_id(1), "d", 0, 5), {}, PARAM_INVALID),
        ((by_id(1), "wide"), {}, PARAM_INVALID),
        ((by_id(1), "one tensor"), {}, PARAM_INVALID),
    ],
)
def test_one_sided_checks(one_sided, args, kwargs, code):
    local, owner = one_sided
    owner.add("s", desc([2, 4], tensors=2), SOURCE)
    local.add("d", desc([2, 4], tensors=2), TARGET)
    local.add("wide", desc([2, 8], tensors=2), TARGET)
    local.add("one tensor", desc([2, 4]), TARGET)
    refused_unchanged(local, args[1], "pull_cache", *args, code=code, **kwargs)


def test_one_sided_the_directory_is_live(one_sided):
    local, owner = one_sided
    local.add("d", desc([1, 300]), TARGET)
    first = owner.add("s", desc([1, 300]), 1)
    local.manage("pull_cache", by_id(first), "d")
    second = owner.add("later", desc([1, 300]), 2, owned=True)
    local.manage("pull_cache", by_id(second), "d")
    assert np.array_equal(local.content("d")[0], pattern(2, 0, 300))
    for name, cache in (("s", first), ("later", second)):
        owner.drop(name)
        refused_unchanged(local, "d", "pull_cache", by_id(cache), "d", code=NOT_EXIST)
    third = owner.add("s", desc([1, 300]), 3, owned=True)
    refused_unchanged(local, "d", "pull_cache", by_id(second), "d", code=NOT_EXIST)
    local.manage("pull_cache", by_id(third), "d")
    assert np.array_equal(local.content("d")[0], pattern(3, 0, 300))


def test_one_sided_a_key_that_is_rebound_leads_to_the_new_cache(one_sided):
    local, owner = one_sided
    local.add("into", desc([4, 4]), TARGET, blocks=True)
    for n in range(3):
        owner.add("s", desc([4, 4]), n, BY_BLOCKS, blocks=True)
        local.manage("pull_blocks", BY_BLOCKS, "into", [3, 2, 1, 0], [0, 1, 2, 3])
        assert np.array_equal(local.content("into")[0].reshape(4, 4), tensors(n, [4, 4])[0].reshape(4, 4)[::-1])


# --- large ones, and many at once


def test_a_large_pull_of_many_scattered_blocks(ends):
    local, owner = ends
    blocks, size = 512, 1 << 16
    owner.add("s", desc([blocks, size], tensors=2), SOURCE, BY_BLOCKS, blocks=True)
    local.add("d", desc([blocks, size], tensors=2), TARGET, blocks=True)
    rng = np.random.default_rng(3)
    src, dst = rng.integers(0, blocks, 300), rng.permutation(blocks)[:300]
    local.manage("pull_blocks", BY_BLOCKS, "d", src, dst)
    for tensor in range(2):
        wanted = pattern(TARGET, tensor, blocks * size).reshape(blocks, size)
        wanted[dst] = pattern(SOURCE, tensor, blocks * size).reshape(blocks, size)[src]
        assert np.array_equal(local.content("d")[tensor].reshape(blocks, size), wanted)


def test_pulls_from_many_threads_do_not_mix(ends):
    local, owner = ends
    numbers = range(8)
    for n in numbers:
        owner.add(f"s{n}", desc([4, 5000], tensors=2), n, BlocksCacheKey(THEIRS, n), blocks=True)
        local.add(f"d{n}", desc([4, 5000], tensors=2), TARGET, blocks=True)

    def repeat(n):
        for _ in range(20):
            local.fill(f"d{n}", TARGET)
            local.manage("pull_blocks", BlocksCacheKey(THEIRS, n), f"d{n}", [3, 1], [0, 3])
            for tensor in range(2):
                wanted = pattern(TARGET, tensor, 20_000).reshape(4, 5000)
                wanted[[0, 3]] = pattern(n, tensor, 20_000).reshape(4, 5000)[[3, 1]]
                assert np.array_equal(local.content(f"d{n}")[tensor].reshape(4, 5000), wanted)

    for call in [Background(repeat, n) for n in numbers]:
        call.result()


# --- any request against an oracle

dims = st.integers(1, 7)


@st.composite
def requests(draw):
    """A source, a destination and a pull between them; most are right, some are not."""
    kind = draw(st.sampled_from(["rows", "row to blocks", "blocks"]))
    element = draw(st.sampled_from([1, 1, 3, 11, 700]))
    stride = draw(dims) * element
    their_stride = draw(st.sampled_from([stride, stride, draw(dims) * element]))
    if kind == "blocks":
        their_stride = stride  # equality is assumed by the original, §8.5.4
    src_shape = [draw(dims), their_stride]
    dst_shape = [draw(dims), stride]
    per_layer = draw(st.integers(1, 3))
    their_layers, our_layers = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    count = draw(st.integers(1, min(their_layers, our_layers)))
    src_from, dst_from = draw(st.integers(0, their_layers - count)), draw(st.integers(0, our_layers - count))
    kwargs = {"tensor_num_per_layer": per_layer}
    if count < their_layers or draw(st.booleans()):
        kwargs["src_layer_range"] = range(src_from, src_from + count)
    else:
        src_from, count = 0, their_layers
    if count < our_layers or draw(st.booleans()):
        kwargs["dst_layer_range"] = range(dst_from, dst_from + count)
    else:
        dst_from = 0
    return {
        "kind": kind,
        "src": (src_shape, their_layers * per_layer),
        "dst": (dst_shape, our_layers * per_layer),
        "pairs": [(src_from * per_layer + i, dst_from * per_layer + i) for i in range(count * per_layer)],
        "kwargs": kwargs,
        "row": draw(st.integers(0, src_shape[0] - 1)),
        "to row": draw(st.integers(0, dst_shape[0])),
        "size": draw(st.sampled_from([-1, -1, draw(st.integers(1, stride + 1))])),
        "src blocks": draw(st.lists(st.integers(0, src_shape[0]), min_size=1, max_size=dst_shape[0])),
        "dst order": draw(st.permutations(range(dst_shape[0]))),
        "pieces": draw(st.integers(1, dst_shape[0])),
        "owned": (draw(st.booleans()), draw(st.booleans())),
        "by key": draw(st.booleans()),
    }


def oracle(request):
    """Return the moves of one tensor, (source offset, destination offset, bytes), or None where the request is refused."""
    (rows, src_stride), (our_rows, stride) = request["src"][0], request["dst"][0]
    start = request["row"] * src_stride
    if request["kind"] == "rows":
        size = request["size"] if request["size"] > 0 else stride
        if request["to row"] >= our_rows or size > stride or size > src_stride:
            return None
        return [(start, request["to row"] * stride, size)]
    if request["kind"] == "row to blocks":
        pieces = request["dst order"][: request["pieces"]]
        if (len(pieces) - 1) * stride >= src_stride:
            return None
        return [(start + j * stride, d * stride, min(stride, src_stride - j * stride)) for j, d in enumerate(pieces)]
    src, dst = request["src blocks"], request["dst order"][: len(request["src blocks"])]
    if len(src) != len(dst) or max(src) >= rows:
        return None
    return [(s * stride, d * stride, stride) for s, d in zip(src, dst)]


def issue(local, cache_id, request):
    if request["kind"] == "rows":
        named = key(request["row"]) if request["by key"] else by_id(cache_id, request["row"])
        local.manage("pull_cache", named, "d", request["to row"], request["size"], **request["kwargs"])
    elif request["kind"] == "row to blocks":
        named = key(request["row"]) if request["by key"] else by_id(cache_id, request["row"])
        local.manage("pull_blocks", named, "d", (), request["dst order"][: request["pieces"]], **request["kwargs"])
    else:
        src = request["src blocks"]
        local.manage("pull_blocks", BY_BLOCKS, "d", src, request["dst order"][: len(src)], **request["kwargs"])


@pytest.mark.parity("manager.pull_cache", "manager.pull_blocks")
@given(requests())
@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_pull_moves_what_the_oracle_says(ends, request_made):
    local, owner = ends
    (src_shape, src_count), (dst_shape, dst_count) = request_made["src"], request_made["dst"]
    blocks = request_made["kind"] == "blocks"
    keys = BY_BLOCKS if blocks else [key(n) for n in range(src_shape[0])]
    owned_there, owned_here = request_made["owned"]
    cache_id = owner.add("s", desc(src_shape, tensors=src_count), SOURCE, keys, blocks=blocks, owned=owned_there)
    local.add("d", desc(dst_shape, tensors=dst_count), TARGET, blocks=request_made["kind"] != "rows", owned=owned_here)
    try:
        source, wanted = tensors(SOURCE, src_shape, src_count), tensors(TARGET, dst_shape, dst_count)
        moves = oracle(request_made)
        if moves is None:
            refused(issue, local, cache_id, request_made)
        else:
            for src, dst in request_made["pairs"]:
                for start, to, size in moves:
                    wanted[dst][to : to + size] = source[src][start : start + size]
            issue(local, cache_id, request_made)
        for got, want in zip(local.content("d"), wanted):
            assert np.array_equal(got, want)
    finally:
        local.drop("d")
        owner.manage("unregister_cache", cache_id)
        owner.run("end.caches.pop('s'); end.memory.pop('s', None)")
