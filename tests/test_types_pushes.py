# SPDX-License-Identifier: Apache-2.0
"""What push_cache, push_blocks and remap_registered_memory make of their arguments, without an engine."""

from __future__ import annotations

import itertools

import pytest

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LLMException,
    LLMStatusCode,
    MemInfo,
    Memtype,
)
from llm_datadist.v2.cache_manager import CacheManager

np = pytest.importorskip("numpy")

U64MAX = 2**64 - 1
TENSORS = 10
DESC = CacheDesc(TENSORS, [4, 4], DataType.DT_INT8)
ROW = Cache(3, DESC, [1] * TENSORS, None, True, False)
OF_BLOCKS = Cache(4, DESC, [1] * TENSORS, None, True, True)
ONE_TENSOR = Cache(5, CacheDesc(1, [4, 4], DataType.DT_INT8), [1], None, True, False)
BY_ID = CacheKeyByIdAndIndex(9, 7, 2)
BLOCKS = BlocksCacheKey(9, 6)
ONE_SIDED = {"llm.EnableRemoteCacheAccessible": "1"}
PARAMETERS = 14


class Engine:
    """Notes what is pushed and how often memory is remapped."""

    def __init__(self):
        self.pushes = []
        self.remaps = 0

    def push(self, operation, words, src_count, dst_count, addr_count):
        words = memoryview(words).cast("B").cast("q").tolist()
        src, dst = PARAMETERS + src_count, PARAMETERS + src_count + dst_count
        assert len(words) == dst + addr_count
        self.pushes.append((operation, words[:PARAMETERS], words[PARAMETERS:src], words[src:dst], words[dst:]))

    def memory_remap(self):
        self.remaps += 1


def pushed(call, *args, **kwargs):
    engine = Engine()
    assert getattr(CacheManager(engine, ONE_SIDED), call)(*args, **kwargs) is None
    (push,) = engine.pushes
    assert push[0] == call
    return push[1:]


def refused(error, text, call, *args, options=ONE_SIDED, **kwargs):
    engine = Engine()
    with pytest.raises(error, match=text) as failure:
        getattr(CacheManager(engine, options), call)(*args, **kwargs)
    assert type(failure.value) is error
    if error is LLMException:
        assert failure.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert engine.pushes == [] and engine.remaps == 0


# --- the words that cross

EVERY = 0, TENSORS


@pytest.mark.parity("manager.push_cache")
@pytest.mark.parametrize(
    ("args", "kwargs", "ends", "layers"),
    [
        ((BY_ID, ROW), {}, (7, 2, 3, 0), (*EVERY, *EVERY, 2)),
        ((BY_ID, ROW, 3), {}, (7, 2, 3, 3), (*EVERY, *EVERY, 2)),
        ((BY_ID, ROW, 0, range(1, 3), range(2, 4)), {}, (7, 2, 3, 0), (2, 4, 4, 4, 2)),
        ((BY_ID, ROW), {"src_layer_range": range(5), "size": -1}, (7, 2, 3, 0), (*EVERY, *EVERY, 2)),
        ((BY_ID, ROW), {"tensor_num_per_layer": 3}, (7, 2, 3, 0), (0, 9, 0, 9, 3)),
        ((BY_ID, ROW), {"dst_layer_range": range(4, 6), "src_layer_range": range(2), "tensor_num_per_layer": 1}, (7, 2, 3, 0),
         (0, 2, 4, 2, 1)),
        ((CacheKeyByIdAndIndex(9, 0), ROW), {}, (0, 0, 3, 0), (*EVERY, *EVERY, 2)),
        ((CacheKeyByIdAndIndex(9, -(2**63), 2**32 - 1), ROW, 2**32 - 1), {}, (-(2**63), 2**32 - 1, 3, 2**32 - 1),
         (*EVERY, *EVERY, 2)),
    ],
)  # fmt: skip
def test_push_cache_is_one_push_of_all_layers(args, kwargs, ends, layers):
    assert pushed("push_cache", *args, **kwargs) == ([9, 3, 0, 0, *ends, *layers, 0], [], [], [])


@pytest.mark.parity("manager.push_blocks")
@pytest.mark.parametrize("form", [list, tuple, np.array])
def test_push_blocks_is_one_push_of_all_layers(form):
    words = [9, 1, -1, 6, 0, 0, 4, 0, 2, 6, 0, 6, 2, 0]
    assert pushed("push_blocks", BLOCKS, OF_BLOCKS, form([1, 3]), form([2, 0]), range(1, 4), range(3)) == (
        words,
        [1, 3],
        [2, 0],
        [],
    )


def test_an_unsigned_cluster_id_crosses_with_its_bits():
    assert pushed("push_cache", CacheKeyByIdAndIndex(U64MAX, 7), ROW)[0][0] == -1


def test_a_cache_of_fewer_tensors_than_a_layer_has_nothing_to_push():
    engine = Engine()
    CacheManager(engine, ONE_SIDED).push_cache(BY_ID, ONE_TENSOR)
    assert engine.pushes == []


# --- the checks, in their order: of two wrong arguments the earlier check is heard

PUSH_CACHE = [
    ({"options": {}}, LLMException, "enable_remote_cache_accessible"),
    ({"dst_cache_key": None}, TypeError, "dst_cache_key only support CacheKeyByIdAndIndex"),
    ({"dst_cache_key": BLOCKS}, TypeError, "dst_cache_key only support"),
    ({"dst_cache_key": CacheKey(1, 2)}, TypeError, "dst_cache_key only support"),
    ({"src_cache": None}, TypeError, "src_cache only support Cache"),
    ({"src_cache": 3}, TypeError, "src_cache only support Cache"),
    ({"src_batch_index": None}, TypeError, "src_batch_index only support"),
    ({"src_batch_index": -1}, ValueError, "src_batch_index should be in range"),
    ({"src_batch_index": 2**32}, ValueError, "src_batch_index should be in range"),
    ({"src_cache": OF_BLOCKS}, LLMException, "does not take a blocks cache"),
    ({"tensor_num_per_layer": 2.0}, TypeError, "tensor_num_per_layer only support"),
    ({"tensor_num_per_layer": "x"}, TypeError, "tensor_num_per_layer only support"),
    ({"tensor_num_per_layer": None}, TypeError, "tensor_num_per_layer only support"),
    ({"tensor_num_per_layer": -1}, ValueError, "tensor_num_per_layer should be in range"),
    ({"tensor_num_per_layer": 0}, LLMException, "tensor_num_per_layer should be positive"),
    ({"src_layer_range": [0, 1]}, TypeError, "src_layer_range only support range"),
    ({"src_layer_range": range(0, 5, 2)}, LLMException, "step of src_layer_range"),
    ({"src_layer_range": range(0)}, LLMException, "src_layer_range should not be empty"),
    ({"src_layer_range": range(-1, 4)}, LLMException, "src_layer_range should not be empty and not start below 0"),
    ({"dst_layer_range": 5}, TypeError, "dst_layer_range only support range"),
    ({"dst_layer_range": range(5, 0, -1)}, LLMException, "step of dst_layer_range"),
    ({"dst_layer_range": range(3, 3)}, LLMException, "dst_layer_range should not be empty"),
    ({"dst_layer_range": range(6)}, LLMException, "equally long"),
    ({"src_layer_range": range(2)}, LLMException, "equally long"),
    ({"src_layer_range": range(1 << 70)}, LLMException, "equally long"),
    ({"size": None}, TypeError, "size only support"),
    ({"size": 2**63}, ValueError, "size should be in range"),
    ({"size": 0}, LLMException, "size should be -1"),
    ({"size": 16}, LLMException, "size should be -1"),
    ({"src_layer_range": range(2**31, 2**31 + 5)}, ValueError, "last tensor index of src_layer_range"),
    ({"dst_layer_range": range(2**31, 2**31 + 5)}, ValueError, "last tensor index of dst_layer_range"),
    ({"src_layer_range": range(1 << 70), "dst_layer_range": range(1 << 70)}, ValueError, "last tensor index of src_layer_range"),
]
PUSH_BLOCKS = [
    ({"options": {}}, LLMException, "enable_remote_cache_accessible"),
    ({"dst_cache_key": BY_ID}, TypeError, "dst_cache_key only support BlocksCacheKey"),
    ({"src_cache": 3}, TypeError, "src_cache only support Cache"),
    ({"src_blocks": None}, TypeError, "src_blocks only support"),
    ({"src_blocks": [1.0]}, TypeError, "src_blocks inner type only support"),
    ({"src_blocks": [-1]}, TypeError, "src_blocks elements should be in range"),
    ({"src_blocks": [2**63]}, LLMException, "src_blocks elements should be in range"),
    ({"dst_blocks": {0: 1}}, TypeError, "dst_blocks only support"),
    ({"dst_blocks": [2**64]}, TypeError, "dst_blocks elements should be in range"),
    ({"src_cache": ROW}, LLMException, "takes a blocks cache only"),
    ({"dst_blocks": []}, LLMException, "dst_blocks should not be empty"),
    *PUSH_CACHE[10:25],
]
CALLS = {
    "push_cache": ({"dst_cache_key": BY_ID, "src_cache": ROW}, PUSH_CACHE),
    "push_blocks": ({"dst_cache_key": BLOCKS, "src_cache": OF_BLOCKS, "src_blocks": [1], "dst_blocks": [2]}, PUSH_BLOCKS),
}


@pytest.mark.parametrize("call", [pytest.param(call, marks=pytest.mark.parity(f"manager.{call}")) for call in CALLS])
def test_pushes_are_checked_in_order(call):
    good, checks = CALLS[call]
    for wrong, error, text in checks:
        refused(error, text, call, **{**good, **wrong})
    for (first, error, text), (second, _, _) in itertools.combinations(checks, 2):
        if first.keys() != second.keys() and not all("layer" in name for name in {*first, *second}):  # ranges go by pairs
            refused(error, text, call, **{**good, **second, **first})


def test_blocks_keys_of_no_number_are_no_destination():
    for key in (BlocksCacheKey(-1), BlocksCacheKey(2**64), BlocksCacheKey(1, -1)):
        refused(TypeError, "should be in range", "push_blocks", key, OF_BLOCKS, [1], [2])


# --- remap_registered_memory

INFO = MemInfo(Memtype.MEM_TYPE_DEVICE, 1234, 1)


@pytest.mark.parity("manager.remap_registered_memory")
@pytest.mark.parametrize("infos", [INFO, [INFO], [INFO, MemInfo(Memtype.MEM_TYPE_DEVICE, U64MAX, U64MAX)]])
def test_memory_is_remapped_by_one_call(infos):
    engine = Engine()
    assert CacheManager(engine, {}).remap_registered_memory(infos) is None
    assert engine.remaps == 1


@pytest.mark.parity("manager.remap_registered_memory")
@pytest.mark.parametrize(
    ("infos", "error", "text"),
    [
        (None, LLMException, "should be a MemInfo or a list"),
        ((INFO,), LLMException, "should be a MemInfo or a list"),
        (1234, LLMException, "should be a MemInfo or a list"),
        ([INFO, None], LLMException, "should hold MemInfo only"),
        ([(1234, 1)], LLMException, "should hold MemInfo only"),
        ([MemInfo(Memtype.MEM_TYPE_HOST, 1234, 1)], LLMException, "should be MEM_TYPE_DEVICE"),
        (MemInfo(Memtype.MEM_TYPE_DEVICE, 0, 1), LLMException, "addr of .* should not be 0"),
        (MemInfo(Memtype.MEM_TYPE_DEVICE, 1, 0), LLMException, "size of .* should be positive"),
        (MemInfo(Memtype.MEM_TYPE_DEVICE, 1, -1), LLMException, "size of .* should be positive"),
        ([], LLMException, "should not be empty"),
        (MemInfo(Memtype.MEM_TYPE_DEVICE, -1, 1), TypeError, "addr should be in range"),
        (MemInfo(Memtype.MEM_TYPE_DEVICE, 2**64, 1), TypeError, "addr should be in range"),
        ([INFO, MemInfo(Memtype.MEM_TYPE_DEVICE, 1, 2**64)], TypeError, "size should be in range"),
    ],
)
def test_memory_that_can_not_be_remapped_is_refused(infos, error, text):
    refused(error, text, "remap_registered_memory", infos)
