# SPDX-License-Identifier: Apache-2.0
"""What pull_cache and pull_blocks make of their arguments, without an engine: the words that cross, or the exception.

Ordinary calls are packed in few steps, past the checks. Every call has to end as if it had gone through them one by one, which is
what the functions here named after the calls do.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LLMException,
    LLMStatusCode,
)
from llm_datadist._blocks import pack_blocks
from llm_datadist.status import raise_if_false
from llm_datadist.utils.utils import check_int64, check_isinstance, check_uint32
from llm_datadist.v2 import cache_manager
from llm_datadist.v2.cache_manager import CacheManager

np = pytest.importorskip("numpy")

U64MAX = 2**64 - 1
DESC = CacheDesc(1, [4, 4], DataType.DT_INT8)
NORMAL, PREFIX, BY_ID = 1, 2, 3  # kinds of keys
ALL = -1, 0
NO_OFFSETS = [0, 0, 0, 1]  # of one device
ONE_SIDED = {"llm.EnableRemoteCacheAccessible": "1"}


# --- the calls, a check at a time in the order of the specification (8.5.1)


def pull_cache(one_sided, key, cache, batch_index=0, size=-1, **kwargs):
    check_isinstance("cache_key", key, CacheKeyByIdAndIndex if one_sided else [CacheKey, CacheKeyByIdAndIndex])
    check_isinstance("cache", cache, Cache)
    check_uint32("batch_index", batch_index)
    check_int64("size", size)
    raise_if_false(not cache.is_blocks_cache, "pull_cache does not take a blocks cache")
    raise_if_false(size == -1 or size > 0, "size should be -1 or positive, but got {}", size)
    per_layer = tensors_per_layer(kwargs)
    check_key(key)
    layers = [*tensors("src_layer_range", kwargs, per_layer), *tensors("dst_layer_range", kwargs, per_layer), per_layer]
    return "pull_cache", [*name(key), cache.cache_id, batch_index, size, *layers], [], []


def pull_blocks(one_sided, key, cache, src=(), dst=(), **kwargs):
    check_isinstance("src_cache_key", key, [CacheKey, CacheKeyByIdAndIndex, BlocksCacheKey])
    check_isinstance("dst_cache", cache, Cache)
    src, dst = unpack(pack_blocks("src_blocks", src)), unpack(pack_blocks("dst_blocks", dst))
    raise_if_false(cache.is_blocks_cache, "pull_blocks takes a blocks cache only")
    raise_if_false(dst, "dst_blocks should not be empty")
    per_layer = tensors_per_layer(kwargs)
    if isinstance(key, BlocksCacheKey):
        raise_if_false(src, "src_blocks should not be empty with a BlocksCacheKey")
    else:
        check_key(key)
        raise_if_false(not src, "src_blocks should be empty unless the key is a BlocksCacheKey")
    layers = [*tensors("src_layer_range", kwargs, per_layer), *tensors("dst_layer_range", kwargs, per_layer), per_layer]
    return "pull_blocks", [*name(key), cache.cache_id, 0, -1, *layers], src, dst


def check_key(key):
    if isinstance(key, CacheKey):
        by_request, by_prefix = (0 <= number < U64MAX for number in (key.req_id, key.prefix_id))
        raise_if_false(by_request != by_prefix, "exactly one of req_id and prefix_id of {} should be valid", repr(key))


def tensors_per_layer(kwargs):
    per_layer = kwargs.get("tensor_num_per_layer", 2)
    check_uint32("tensor_num_per_layer", per_layer)
    raise_if_false(per_layer > 0, "tensor_num_per_layer should be positive")
    return per_layer


def tensors(name, kwargs, per_layer):
    layers = kwargs.get(name)
    check_isinstance(name, layers, range)
    if layers is None:
        return ALL
    raise_if_false(layers.step == 1, "step of {} should be 1, but got {}", name, layers.step)
    if len(layers) == 0:
        return ALL
    raise_if_false(layers.start >= 0, "{} should not start below 0, but got {}", name, layers)
    check_uint32(f"last tensor index of {name}", layers.stop * per_layer - 1)
    return layers.start * per_layer, len(layers) * per_layer


def name(key):
    if isinstance(key, BlocksCacheKey):
        for part in ("cluster_id", "model_id"):
            value = getattr(key, part)
            if not 0 <= value <= U64MAX:
                raise TypeError(f"{part} should be in range [0, {U64MAX}], but got {value}")
        return key.cluster_id, NORMAL, U64MAX, key.model_id, 0, 0
    if isinstance(key, CacheKeyByIdAndIndex):
        return key.cluster_id, BY_ID, 0, 0, key.cache_id, key.batch_index
    if key.prefix_id != U64MAX:
        return key.cluster_id, PREFIX, key.prefix_id, key.model_id, 0, 0
    return key.cluster_id, NORMAL, key.req_id, key.model_id, 0, 0


# --- how a call ends


class Engine:
    """Notes the words of a pull."""

    def pull(self, operation, words, src_count, dst_count):
        words = unpack(words)
        blocks = words[14 + len(NO_OFFSETS) :]
        assert words[14 : 14 + len(NO_OFFSETS)] == NO_OFFSETS
        assert len(blocks) == src_count + dst_count
        self.pulled = operation, words[:14], blocks[:src_count], blocks[src_count:]


def unpack(packed):
    return memoryview(packed).cast("B").cast("q").tolist()


def signed(word):
    return (int(word) & U64MAX ^ 1 << 63) - (1 << 63)


def ending(call, *args, **kwargs):
    """What a call returns, or its exception as data."""
    try:
        return call(*args, **kwargs)
    except Exception as exc:
        return type(exc), str(exc), getattr(exc, "status_code", None), getattr(exc, "stage", None)


def pulled(options, call, args, kwargs):
    engine = Engine()
    getattr(CacheManager(engine, options), call)(*args, **kwargs)
    return engine.pulled


def ends_as_checked(options, call, args, kwargs):
    expected = ending(globals()[call], bool(options), *args, **kwargs)
    if expected[0] == call:
        expected = call, [signed(word) for word in expected[1]], *expected[2:]
    assert ending(pulled, options, call, args, kwargs) == expected


# --- arguments: what is right, what is nearly right, and what is not


class Some(IntEnum):
    NEGATIVE = -1
    ONE = 1


class Number(int):
    """A class of a caller's own."""


class OwnBlocksKey(BlocksCacheKey):
    model_id = property(lambda _: 5)


class OwnCacheKey(CacheKey):
    cluster_id = property(lambda _: -5)  # no number that CacheKey would have taken


class OwnCache(Cache):
    pass


EDGES = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, U64MAX, 2**64, 2**80]
NUMBERS = [*EDGES, *(-edge for edge in EDGES), -(2**63) - 1]
OTHERS = [None, True, False, Some.ONE, Some.NEGATIVE, Number(3), Number(2**63), 1.0, "1", b"1", [1], {0: 1}, np.int64(1)]
ROW = Cache(3, DESC, [1], None, True, False)
OF_BLOCKS = Cache(4, DESC, [1], None, True, True)

# Each is right for some argument of some call, or for none.
UNUSUAL = [
    *NUMBERS,
    *OTHERS,
    ROW,
    OF_BLOCKS,
    OwnCache(5, DESC, [1], None, True, False),
    OwnCache(6, DESC, [1], None, True, True),
    Cache(-1, DESC, [1], None, True, True),
    *(CacheKey(1, *ids) for ids in ((2,), (2, 6), (U64MAX,), (U64MAX, 6, 2), (2, 6, 7), (U64MAX, 0, 2**63))),
    *(CacheKeyByIdAndIndex(1, *ids) for ids in ((7,), (-7, 2), (2**63 - 1, 2**32 - 1))),
    *(BlocksCacheKey(*ids) for ids in ((1,), (U64MAX, 2**63), (-1,), (2**64,), (None,), (True, Some.ONE))),
    *(BlocksCacheKey(1, model_id) for model_id in (-1, 2**64, None)),
    OwnBlocksKey(1),
    OwnBlocksKey(-1),
    OwnCacheKey(1, 2),
    *([value] for value in (*NUMBERS, *OTHERS)),
    *((value,) for value in (1, -1, 1.0)),
    *([1, value] for value in (0, 2**63 - 1, 2**63, -1, True, 1.0)),
    [],
    (),
    *(np.array([1], dtype) for dtype in ("int64", "int32", "uint64", "int8", "float64")),
    np.array([[1]]),
]


@pytest.mark.parametrize("options", [{}, ONE_SIDED], ids=["two-sided", "one-sided"])
@pytest.mark.parametrize("kwargs", [{}, {"tensor_num_per_layer": 3}, {"src_layer_range": range(1, 3)}, {"unknown": 1}], ids=repr)
@pytest.mark.parametrize(
    ("call", "ordinary"),
    [
        ("pull_cache", (CacheKey(1, req_id=2), ROW, 0, -1)),
        ("pull_cache", (CacheKeyByIdAndIndex(1, 7, 2), ROW, 2**32 - 1, 2**63 - 1)),
        ("pull_blocks", (BlocksCacheKey(1), OF_BLOCKS, [5], [0])),
        ("pull_blocks", (CacheKey(1, U64MAX, 6, 2), OF_BLOCKS, [], [0])),
    ],
)
def test_one_unusual_argument_ends_the_call_as_its_check_does(options, kwargs, call, ordinary):
    for position in range(len(ordinary)):
        for value in UNUSUAL:
            args = (*ordinary[:position], value, *ordinary[position + 1 :])
            ends_as_checked(options, call, args, kwargs)


# --- all arguments at once

INTEGERS = st.sampled_from(NUMBERS) | st.integers(-3, 2**65)
ANY = st.sampled_from(UNUSUAL)
UINT64 = st.integers(0, U64MAX) | st.sampled_from([0, 2**63, U64MAX])
INT64 = st.integers(-(2**63), 2**63 - 1)
UINT32 = st.integers(0, 2**32 - 1)

ROW_KEYS = st.one_of(
    st.builds(CacheKey, UINT64, UINT64),
    st.builds(CacheKey, UINT64, st.just(U64MAX), UINT64, UINT64),
    st.builds(CacheKey, UINT64, UINT64, UINT64, UINT64),
    st.builds(CacheKeyByIdAndIndex, UINT64, INT64, UINT32),
)
BLOCKS_KEYS = st.builds(BlocksCacheKey, UINT64, UINT64) | st.builds(
    BlocksCacheKey, INTEGERS | st.sampled_from([None, True]), INTEGERS | st.sampled_from([None, Number(7)])
)
KEYS = ROW_KEYS | BLOCKS_KEYS | ANY
SMALL = st.integers(0, 9)
BLOCKS = st.one_of(
    st.lists(SMALL, min_size=1, max_size=1),
    st.lists(INTEGERS | ANY, max_size=3),
    st.builds(np.array, st.lists(st.integers(-1, 9), max_size=2), st.sampled_from(["int64", "int32"])),
    ANY,
)
RANGES = st.none() | st.builds(range, st.integers(-1, 3), st.integers(0, 4)) | st.just(range(0, 4, 2)) | ANY
KEYWORDS = st.just({}) | st.fixed_dictionaries(
    {},
    optional={
        "src_layer_range": RANGES,
        "dst_layer_range": RANGES,
        "tensor_num_per_layer": st.integers(1, 3) | INTEGERS | ANY,
    },
)


def caches(is_blocks_cache):
    return st.builds(Cache, INT64, st.just(DESC), st.just([1]), st.none(), st.just(True), st.just(is_blocks_cache)) | ANY


OPTIONS = st.sampled_from([{}, {}, ONE_SIDED])


@settings(max_examples=300)
@given(OPTIONS, KEYS, caches(False), SMALL | UINT32 | ANY, st.just(-1) | INT64 | ANY, KEYWORDS)
def test_pull_cache_ends_as_its_checks_do(options, key, cache, batch_index, size, kwargs):
    ends_as_checked(options, "pull_cache", (key, cache, batch_index, size), kwargs)


@settings(max_examples=300)
@given(OPTIONS, KEYS, caches(True), BLOCKS, BLOCKS, KEYWORDS)
def test_pull_blocks_ends_as_its_checks_do(options, key, cache, src, dst, kwargs):
    ends_as_checked(options, "pull_blocks", (key, cache, src, dst), kwargs)


# --- the short ways, where they have to be taken

FOUR = [0, 0, 4, 0, -1, *ALL, *ALL, 2]  # the words behind the key


@pytest.fixture
def no_long_way(monkeypatch):
    def refuse(*args: Any) -> None:
        raise AssertionError("an ordinary call went through the checks")

    monkeypatch.setattr(CacheManager, "_pull", refuse)
    monkeypatch.setattr(cache_manager, "check_isinstance", refuse)


@pytest.mark.parametrize(
    ("call", "args", "words"),
    [
        ("pull_cache", (CacheKey(1, req_id=2), ROW), [1, NORMAL, 2, 0, 0, 0, 3, 0, -1, *ALL, *ALL, 2]),
        ("pull_cache", (CacheKey(1, U64MAX, 6, 2), ROW, 5, 8), [1, PREFIX, 2, 6, 0, 0, 3, 5, 8, *ALL, *ALL, 2]),
        ("pull_cache", (CacheKeyByIdAndIndex(1, 7, 2), ROW, 4), [1, BY_ID, 0, 0, 7, 2, 3, 4, -1, *ALL, *ALL, 2]),
        ("pull_blocks", (BlocksCacheKey(1), OF_BLOCKS, [0], [9]), [1, NORMAL, -1, 0, *FOUR]),
        ("pull_blocks", (BlocksCacheKey(U64MAX, 2**63), OF_BLOCKS, [5], [0]), [-1, 1, -1, -(2**63), *FOUR]),
    ],
)
def test_ordinary_calls_take_the_short_way(no_long_way, call, args, words):
    blocks = args[2:] if call == "pull_blocks" else ([], [])
    assert pulled({}, call, args, {}) == (call, words, *blocks)


def test_the_engine_s_failure_is_that_of_the_call():
    class Failing:
        def pull(self, *args: Any) -> None:
            raise LLMException("no link", status_code=LLMStatusCode.LLM_NOT_YET_LINK)

    manager = CacheManager(Failing(), {})
    for call, args in (("pull_cache", (CacheKey(1, 2), ROW)), ("pull_blocks", (BlocksCacheKey(1), OF_BLOCKS, [0], [0]))):
        with pytest.raises(LLMException, match="no link"):
            getattr(manager, call)(*args)
