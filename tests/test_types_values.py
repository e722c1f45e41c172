# SPDX-License-Identifier: Apache-2.0
"""Descriptions, keys, caches and transfer configs."""

from __future__ import annotations

import gc
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    CacheTask,
    DataType,
    KvCache,
    LayerSynchronizer,
    LLMException,
    LLMStatusCode,
    MemInfo,
    Memtype,
    Placement,
    RegisterMemStatus,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from llm_datadist.v2 import llm_types
from llm_datadist.v2.llm_types import PushType, check_layer_range, int_to_mem_status_dict

U64MAX = 2**64 - 1
INT8 = DataType.DT_INT8


def refused(error, make, *args, text="", code=LLMStatusCode.LLM_PARAM_INVALID, **kwargs):
    with pytest.raises(error) as failure:
        make(*args, **kwargs)
    assert type(failure.value) is error
    assert text in str(failure.value)
    if error is LLMException:
        assert failure.value.status_code is code


def refuses_assignment(value, *names):
    for name in names:
        with pytest.raises(AttributeError):
            setattr(value, name, 1)


# --- enums


@pytest.mark.parity("enum.placement", "enum.register_mem_status", "enum.memtype")
@pytest.mark.parametrize(
    ("enum", "members"),
    [
        (Placement, {"HOST": 0, "DEVICE": 1}),
        (RegisterMemStatus, {"OK": 0, "PREPARING": 1, "FAILED": 2}),
        (Memtype, {"MEM_TYPE_DEVICE": 0, "MEM_TYPE_HOST": 1}),
        (PushType, {"NO_CACHE_KEY": 0, "BLOCKS_CACHE_KEY": 1, "CACHE_KEY_BY_ID": 2}),
    ],
)
def test_enum(enum, members):
    assert {name: member.value for name, member in enum.__members__.items()} == members
    assert [str(member) for member in enum] == [f"{enum.__name__}.{name}" for name in members]


def test_mem_status_dict():
    assert int_to_mem_status_dict == {
        0: RegisterMemStatus.OK,
        1: RegisterMemStatus.PREPARING,
        2: RegisterMemStatus.FAILED,
    }


def test_exported_names():
    assert llm_types.__all__ == [
        "CacheDesc",
        "CacheKey",
        "CacheKeyByIdAndIndex",
        "KvCache",
        "BlocksCacheKey",
        "Placement",
        "CacheTask",
        "TransferConfig",
        "LayerSynchronizer",
        "Cache",
    ]


# --- MemInfo


@pytest.mark.parity("type.mem_info")
def test_mem_info():
    info = MemInfo(Memtype.MEM_TYPE_DEVICE, 1234, 1)
    assert (info.mem_type, info.addr, info.size) == (Memtype.MEM_TYPE_DEVICE, 1234, 1)
    assert repr(info) == str(info) == "MemInfo(mem_type=Memtype.MEM_TYPE_DEVICE, addr=1234, size=1)"
    assert (MemInfo(Memtype.MEM_TYPE_HOST, -1, 0).addr, MemInfo(None, None, None).size) == (-1, None)
    for args in ((0, 1, 1), (Memtype.MEM_TYPE_HOST, "1", 1), (Memtype.MEM_TYPE_HOST, 1, 1.0)):
        refused(TypeError, MemInfo, *args, text="only support")


# --- CacheDesc


@pytest.mark.parity("type.cache_desc_fields")
def test_desc_properties():
    shape = [2, 4]
    desc = CacheDesc(1, shape, DataType.DT_FLOAT16, Placement.HOST, 1, 0, "ND")
    assert desc.shape is shape
    assert (desc.num_tensors, desc.data_type, desc.placement) == (1, DataType.DT_FLOAT16, Placement.HOST)
    assert (desc.batch_dim, desc.batch_size, desc.seq_len_dim_index, desc.kv_tensor_format) == (1, 4, 0, "ND")
    assert desc.size == 16
    refuses_assignment(desc, "num_tensors", "shape", "data_type", "placement", "batch_dim", "batch_size", "size")
    refuses_assignment(desc, "seq_len_dim_index", "kv_tensor_format")


@pytest.mark.parity("type.cache_desc_text")
def test_desc_repr():
    assert repr(CacheDesc(1, [2, 4], INT8)) == (
        "CacheDesc(num_tensors=1, shape=[2, 4], data_type=DataType.DT_INT8, placement=Placement.DEVICE, "
        "batch_dim_index=0, seq_len_dim_index=-1,kv_tensor_format=None)"
    )
    assert "shape=(2,), data_type=DataType.DT_BOOL, placement=Placement.HOST, batch_dim_index=0" in str(
        CacheDesc(0, (2,), DataType.DT_BOOL, Placement.HOST)
    )


@pytest.mark.parity("type.cache_desc")
@pytest.mark.parametrize(
    ("args", "error"),
    [
        ((-1, [1], INT8), ValueError),
        ((2**32, [1], INT8), ValueError),
        (("1", [1], INT8), TypeError),
        ((None, [1], INT8), TypeError),
        ((1, {1}, INT8), TypeError),
        ((1, None, INT8), TypeError),
        ((1, [1.0], INT8), TypeError),
        ((1, [None], INT8), TypeError),
        ((1, [1], 2), TypeError),
        ((1, [1], INT8, 1), TypeError),
        ((1, [1], INT8, Placement.HOST, "0"), TypeError),
        ((1, [1], INT8, Placement.HOST, None), TypeError),
        ((1, [1], INT8, Placement.HOST, 0, None), TypeError),
        ((1, [1], INT8, Placement.HOST, 0, "0"), TypeError),
        ((1, [1], INT8, Placement.HOST, 0, 2**31), ValueError),
        ((1, [1], INT8, Placement.HOST, 0, 0, 1), TypeError),
        ((1, [], INT8), LLMException),
        ((1, [1], INT8, Placement.HOST, 1), LLMException),
        ((1, [1], INT8, Placement.HOST, -1), LLMException),
        ((1, [1], INT8, Placement.HOST, 0, 1), LLMException),
        ((1, [1], INT8, Placement.HOST, 0, -2), LLMException),
        ((1, [2**63], INT8), ValueError),
        ((1, [1, -(2**63) - 1], INT8), ValueError),
        # the first check that fails decides
        ((-1, "x", None), ValueError),
        ((1, [2**63], INT8, Placement.HOST, 5), LLMException),
        ((1, [1], INT8, Placement.HOST, 5, 2**31), ValueError),
    ],
)
def test_desc_refuses(args, error):
    refused(error, CacheDesc, *args)


@pytest.mark.parity("type.cache_desc_size")
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=5), st.sampled_from([(INT8, 1), (DataType.DT_STRING, 16)]))
def test_desc_size_is_the_product(shape, dtype):
    size = dtype[1]
    for dim in shape:
        size *= dim
    assert CacheDesc(1, shape, dtype[0]).size == size


@pytest.mark.parity("type.cache_desc_size")
@pytest.mark.parametrize("shape", [[0], [2, -1], [2**62, 2], [2**40, 2**40]])
def test_desc_without_size(shape):
    desc = CacheDesc(1, shape, INT8)
    with pytest.raises(LLMException) as failure:
        desc.size  # noqa: B018
    assert failure.value.status_code is LLMStatusCode.LLM_SUCCESS


@pytest.mark.parity("type.cache_desc_update_dim")
def test_update_dim():
    desc = CacheDesc(1, [2, 4], INT8)
    assert desc.size == 8
    desc.update_dim(0, 5)
    assert (desc.shape, desc.size, desc.batch_size) == ([5, 4], 20, 2)
    refused(TypeError, CacheDesc(1, (2,), INT8).update_dim, 0, 1)


# --- caches


def host_desc(num_tensors=2):
    return CacheDesc(num_tensors, [2], INT8, Placement.HOST)


@pytest.mark.parity("type.cache", "type.cache_text")
def test_cache():
    desc, addrs = host_desc(), [10, 20]
    cache = Cache(1, desc, addrs, None, False, True)
    assert (cache.cache_id, cache.is_blocks_cache) == (1, True)
    assert cache.cache_desc is desc and cache.tensor_addrs is addrs is cache._tensor_addrs
    assert cache._valid is True
    assert repr(Cache(1, desc, addrs, None, True, False)) == (
        "Cache(cache_id = 1, device_tensor_addrs = 2, is_blocks_cache = False)"
    )
    assert str(cache).endswith("is_blocks_cache = True)")
    refused(TypeError, Cache, "1", desc, [], None, False, False)
    refused(ValueError, Cache, 2**63, desc, [], None, False, False)
    assert not hasattr(Cache, "__del__")
    refuses_assignment(cache, "cache_id", "cache_desc", "tensor_addrs", "is_blocks_cache")


@pytest.mark.parity("type.create_cpu_cache")
def test_cpu_cache():
    cache = Cache.create_cpu_cache(host_desc(), [1, 2])
    assert (cache.cache_id, cache.tensor_addrs, cache.is_blocks_cache) == (-1, [1, 2], True)
    assert cache._is_registered is False


@pytest.mark.parity("type.create_cpu_cache")
@pytest.mark.parametrize(
    ("args", "error"),
    [
        ((1, [1, 2]), TypeError),
        ((None, [1, 2]), AttributeError),
        ((host_desc(), (1, 2)), TypeError),
        ((host_desc(), None), TypeError),
        ((host_desc(), [1, "2"]), TypeError),
        ((host_desc(), [1]), LLMException),
        ((CacheDesc(1, [1], INT8), [1]), LLMException),
        ((CacheDesc(1, [1], INT8), "x"), TypeError),
    ],
)
def test_cpu_cache_refuses(args, error):
    refused(error, Cache.create_cpu_cache, *args)


@pytest.mark.parity("type.kv_cache", "type.kv_cache_text")
def test_kv_cache():
    desc = host_desc()
    cache = KvCache(1, desc, [[1, 2]], None)
    assert (cache.cache_id, cache.per_device_tensor_addrs) == (1, [[1, 2]]) and cache.cache_desc is desc
    assert repr(cache) == str(cache) == "KvCache(cache_id = 1, num_devices = 1)"
    refused(ValueError, KvCache, 2**63, desc, [], None)
    refuses_assignment(cache, "cache_id", "cache_desc", "per_device_tensor_addrs")


@pytest.mark.parity("type.kv_cache_create_cpu")
@pytest.mark.parametrize(
    ("addrs", "expected"), [([1, 2], [[1, 2]]), ([[1, 2]], [[1, 2]]), ([[1, 2], [3, 4]], [[1, 2], [3, 4]])]
)
def test_cpu_kv_cache(addrs, expected):
    cache = KvCache.create_cpu_cache(host_desc(), addrs)
    assert (cache.cache_id, cache.per_device_tensor_addrs) == (-1, expected)
    assert cache._kv_cache_manager is None


@pytest.mark.parity("type.kv_cache_create_cpu")
@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((1, [1, 2]), TypeError, "only support"),
        ((None, [1, 2]), AttributeError, ""),
        ((CacheDesc(1, [1], INT8), "x"), LLMException, "placement"),
        ((host_desc(), (1, 2)), TypeError, "only support"),
        ((host_desc(), []), LLMException, "empty"),
        ((host_desc(), [1, "2"]), TypeError, "inner type only support"),
        ((host_desc(), [["1", 2]]), TypeError, "inner type only support"),
        ((host_desc(), [[1]]), LLMException, "num_tensors"),
        ((host_desc(), [1]), LLMException, "num_tensors"),
        ((host_desc(), [[1, 2], 3]), LLMException, "should be consistent"),
        ((host_desc(), [3, [1, 2]]), LLMException, "should be consistent"),
    ],
)
def test_cpu_kv_cache_refuses(args, error, text):
    refused(error, KvCache.create_cpu_cache, *args, text=text)


class KvManager:
    def __init__(self, initialized=True):
        self.initialized, self.queue = initialized, []

    def is_initialized(self):
        return self.initialized

    def _release_later(self, cache_id):
        self.queue.append(cache_id)


@pytest.mark.parametrize(("valid", "initialized", "queued"), [(True, True, [7]), (False, True, []), (True, False, [])])
def test_a_dropped_kv_cache_only_queues_its_id(valid, initialized, queued):
    manager = KvManager(initialized)
    cache = KvCache(7, host_desc(), [], manager)
    cache._valid = valid
    del cache
    gc.collect()
    assert manager.queue == queued


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_dropping_a_kv_cache_never_raises():
    KvCache(7, host_desc(), [], None)
    refused(TypeError, KvCache, "no id", host_desc(), [], KvManager())
    KvCache.__new__(KvCache)
    gc.collect()


# --- keys


@pytest.mark.parity("type.blocks_cache_key")
@pytest.mark.parametrize(
    ("args", "kwargs", "fields", "text"),
    [
        ((1,), {}, (1, 0), "BlocksCacheKey(cluster_id=1, model_id=0)"),
        ((1, 2), {}, (1, 2), "BlocksCacheKey(cluster_id=1, model_id=2)"),
        ((), {"cluster_id": 1}, (1, 0), "BlocksCacheKey(cluster_id=1, model_id=0)"),
        ((), {"prompt_cluster_id": 1, "model_id": 3}, (1, 3), "BlocksCacheKey(prompt_cluster_id=1, model_id=3)"),
        ((), {"prompt_cluster_id": 1, "cluster_id": 2}, (2, 0), "BlocksCacheKey(cluster_id=2, model_id=0)"),
        ((1,), {"cluster_id": 9}, (1, 0), "BlocksCacheKey(cluster_id=1, model_id=0)"),
        ((1,), {"prompt_cluster_id": 9}, (1, 0), "BlocksCacheKey(cluster_id=1, model_id=0)"),
        ((-1, 2**70), {}, (-1, 2**70), f"BlocksCacheKey(cluster_id=-1, model_id={2**70})"),
        ((None, None), {}, (None, None), "BlocksCacheKey(cluster_id=None, model_id=None)"),
    ],
)
def test_blocks_key(args, kwargs, fields, text):
    key = BlocksCacheKey(*args, **kwargs)
    assert (key.cluster_id, key.model_id) == fields and key.prompt_cluster_id == key.cluster_id
    assert repr(key) == text


@pytest.mark.parity("type.blocks_cache_key")
@pytest.mark.parametrize(
    ("args", "kwargs", "error", "text"),
    [
        ((1, 2, 3), {}, LLMException, "at most 2"),
        ((1, 2), {"model_id": 3}, LLMException, "at most 2"),
        ((), {}, LLMException, "cluster_id is required"),
        ((), {"model_id": 1}, LLMException, "cluster_id is required"),
        ((), {"other": 1}, LLMException, "cluster_id is required"),
        ((1,), {"other": 1}, LLMException, "Unsupported"),
        ((1,), {"req_id": 1}, LLMException, "Unsupported"),
        (("1",), {}, TypeError, "only support"),
        ((1, 1.0), {}, TypeError, "only support"),
    ],
)
def test_blocks_key_refuses(args, kwargs, error, text):
    refused(error, BlocksCacheKey, *args, text=text, **kwargs)


@pytest.mark.parity("type.cache_key")
@pytest.mark.parametrize(
    ("args", "kwargs", "fields"),
    [
        ((1, 2), {}, (1, 2, 0, U64MAX)),
        ((1, 2, 3, 4), {}, (1, 2, 3, 4)),
        ((1,), {"req_id": U64MAX, "prefix_id": 5}, (1, U64MAX, 0, 5)),
        ((), {"prompt_cluster_id": 1, "req_id": 2, "model_id": 3}, (1, 2, 3, U64MAX)),
        ((1, 2), {"cluster_id": 8, "req_id": 9}, (1, 2, 0, U64MAX)),
    ],
)
def test_cache_key(args, kwargs, fields):
    key = CacheKey(*args, **kwargs)
    assert (key.cluster_id, key.req_id, key.model_id, key.prefix_id) == fields
    assert key.prompt_cluster_id == key.cluster_id
    assert (
        repr(key)
        == f"CacheKey(cluster_id={fields[0]}, req_id={fields[1]}, prefix_id={fields[3]}, model_id={fields[2]})"
    )


@pytest.mark.parity("type.cache_key")
@pytest.mark.parametrize(
    ("args", "kwargs", "error", "text"),
    [
        ((1, 2, 3, 4, 5), {}, LLMException, "at most 4"),
        ((), {}, LLMException, "cluster_id is required"),
        ((1,), {}, LLMException, "req_id is required"),
        ((), {"cluster_id": 1, "x": 1}, LLMException, "req_id is required"),
        ((1, 2), {"x": 1}, LLMException, "Unsupported"),
        (("1", 2), {}, TypeError, "only support"),
        ((1, None), {}, TypeError, "only support"),
        ((-1, 2), {}, ValueError, "cluster_id"),
        ((1, 2**64), {}, ValueError, "req_id"),
        ((1, 2, 2**64), {}, ValueError, "model_id"),
        ((1, 2, 3, -1), {}, ValueError, "prefix_id"),
    ],
)
def test_cache_key_refuses(args, kwargs, error, text):
    refused(error, CacheKey, *args, text=text, **kwargs)


@pytest.mark.parity("type.cache_key_by_id")
def test_key_by_id():
    key = CacheKeyByIdAndIndex(1, 1)
    assert repr(key) == str(key) == "CacheKeyByIdAndIndex(cluster_id=1, cache_id=1, batch_index=0)"
    key = CacheKeyByIdAndIndex(U64MAX, -(2**63), 2**32 - 1)
    assert (key.cluster_id, key.cache_id, key.batch_index) == (U64MAX, -(2**63), 2**32 - 1)
    for args, error in [
        ((-1, 1), ValueError),
        ((1, 2**63), ValueError),
        ((1, 1, 2**32), ValueError),
        ((None, 1), TypeError),
        ((1, "1"), TypeError),
        ((1, 1, 0.0), TypeError),
    ]:
        refused(error, CacheKeyByIdAndIndex, *args)


@pytest.mark.parametrize(
    "make", [lambda: BlocksCacheKey(1), lambda: CacheKey(1, 2), lambda: CacheKeyByIdAndIndex(1, 2)]
)
def test_keys_have_identity_semantics(make):
    assert make() != make()
    assert len({make(), make()}) == 2


# --- transfers


@pytest.mark.parametrize("layers", [range(1), range(3, 9), range(1 << 70)])
def test_layer_range_is_accepted(layers):
    check_layer_range("r", layers)


@pytest.mark.parametrize(
    ("layers", "error"),
    [
        ([0, 1], TypeError),
        ((0, 1), TypeError),
        (3, TypeError),
        (range(0, 4, 2), LLMException),
        (range(4, 0, -1), LLMException),
        (range(0), LLMException),
        (range(-1, 3), LLMException),
        (range(3, 1), LLMException),
        (range(0, 1 << 70, 2), LLMException),
    ],
)
def test_layer_range_is_refused(layers, error):
    refused(error, check_layer_range, "r", layers)


def test_layer_range_none():
    check_layer_range("r", None)
    refused(TypeError, check_layer_range, "r", None, False)


BLOCKS, BY_ID = BlocksCacheKey(4, 1), CacheKeyByIdAndIndex(5, 6)
R1, R2 = range(1), range(2)


@pytest.mark.parity("type.transfer_with_key_config")
def test_transfer_with_key():
    config = TransferWithCacheKeyConfig(BlocksCacheKey(1), R1, R1)
    assert (
        repr(config)
        == str(config)
        == (
            "TransferWithCacheKeyConfig(cache_key=BlocksCacheKey(cluster_id=1, model_id=0), "
            "src_layer_range=range(0, 1), dst_layer_range=range(0, 1), src_batch_index=0)"
        )
    )
    config = TransferWithCacheKeyConfig(BY_ID, range(2), range(3, 5), 7)
    assert (config.cache_key, config.src_layer_range, config.dst_layer_range) == (BY_ID, R2, range(3, 5))
    assert (config.src_batch_index, config.dst_cluster_id) == (7, 5)
    config.cache_key = BlocksCacheKey(99)
    assert config.dst_cluster_id == 5
    config.src_layer_range = None
    config.dst_layer_range = R1
    assert (config.src_layer_range, config.dst_layer_range) == (None, R1)


@pytest.mark.parity("type.transfer_with_key_config")
@pytest.mark.parametrize(
    ("args", "error"),
    [
        ((None, R1, R1), TypeError),
        ((CacheKey(1, 2), R1, R1), TypeError),
        ((BLOCKS,), TypeError),
        ((BLOCKS, None, R1), TypeError),
        ((BLOCKS, R1), TypeError),
        ((BLOCKS, [0], R1), TypeError),
        ((BLOCKS, R1, R2), LLMException),
        ((BLOCKS, range(0), range(0)), LLMException),
        ((BY_ID, range(1 << 70), range(1)), LLMException),
        ((BY_ID, R1, R1, -1), ValueError),
        ((BY_ID, R1, R1, None), TypeError),
        ((BLOCKS, R1, R1, 1), LLMException),
        ((BLOCKS, R1, R1, 2**32), ValueError),
    ],
)
def test_transfer_with_key_refuses(args, error):
    refused(error, TransferWithCacheKeyConfig, *args)


@pytest.mark.parity("type.transfer_with_key_config")
@pytest.mark.parametrize(
    ("key", "name", "value", "error"),
    [
        (BY_ID, "cache_key", None, TypeError),
        (BY_ID, "src_layer_range", [0], TypeError),
        (BY_ID, "dst_layer_range", range(0), LLMException),
        (BY_ID, "src_batch_index", "1", TypeError),
        (BY_ID, "src_batch_index", 2**32, ValueError),
        (BLOCKS, "src_batch_index", 1, LLMException),
        (BLOCKS, "src_batch_index", "1", LLMException),
    ],
)
def test_transfer_with_key_setters_refuse(key, name, value, error):
    config = TransferWithCacheKeyConfig(key, R1, R1)
    before = getattr(config, name)
    refused(error, setattr, config, name, value)
    assert getattr(config, name) is before


@pytest.mark.parity("type.transfer_config")
def test_transfer_config():
    config = TransferConfig(1, [2, 3], range(3))
    assert (
        repr(config)
        == str(config)
        == ("TransferConfig(dst_cluster_id=1, dst_addrs=[2, 3], src_layer_range=range(0, 3), src_batch_index=0)")
    )
    assert config.dst_layer_range is None
    config.dst_cluster_id, config.dst_addrs, config.src_layer_range, config.src_batch_index = U64MAX, (U64MAX,), None, 4
    assert (config.dst_cluster_id, config.dst_addrs) == (U64MAX, (U64MAX,))
    assert (config.src_layer_range, config.src_batch_index) == (None, 4)
    assert TransferConfig(1, []).dst_addrs == []


@pytest.mark.parity("type.transfer_config")
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("dst_cluster_id", None, TypeError),
        ("dst_cluster_id", "1", TypeError),
        ("dst_cluster_id", -1, ValueError),
        ("dst_addrs", None, TypeError),
        ("dst_addrs", {1}, TypeError),
        ("dst_addrs", ["1"], TypeError),
        ("dst_addrs", [-1], ValueError),
        ("dst_addrs", [0, 2**64], ValueError),
        ("src_layer_range", 1, TypeError),
        ("src_layer_range", range(0), LLMException),
        ("src_batch_index", None, TypeError),
        ("src_batch_index", -1, ValueError),
    ],
)
def test_transfer_config_refuses(name, value, error):
    arguments = {"dst_cluster_id": 1, "dst_addrs": [2], "src_layer_range": R1, "src_batch_index": 0}
    config = TransferConfig(**arguments)
    refused(error, setattr, config, name, value)
    assert getattr(config, name) == arguments[name]
    refused(error, TransferConfig, **{**arguments, name: value})


@pytest.mark.parity("type.layer_synchronizer")
def test_layer_synchronizer_is_abstract():
    refused(TypeError, LayerSynchronizer)

    class Ready(LayerSynchronizer):
        def synchronize_layer(self, layer_index, timeout_in_millis):
            return True

    assert Ready().synchronize_layer(0, None) is True


# --- tasks

OK, FAILED, TIMEOUT = LLMStatusCode.LLM_SUCCESS, LLMStatusCode.LLM_LINK_BUSY, LLMStatusCode.LLM_TIMEOUT


class Transfer(threading.Thread):
    def __init__(self, results):
        super().__init__()
        self.go = threading.Event()
        self._results, self._shown = results, [None] * len(results)

    def run(self):
        self.go.wait(30)
        self._shown = self._results

    def get_results(self):
        return self._shown


@pytest.mark.parity("type.task_synchronize", "type.task_get_results")
@pytest.mark.parametrize(
    ("results", "code"),
    [
        ([OK, OK], OK),
        ([None, None], OK),
        ([], OK),
        ([OK, FAILED, LLMStatusCode.LLM_FAILED], FAILED),
        ([None, FAILED], FAILED),
    ],
)
def test_task_reports_timeout_and_then_results(results, code):
    transfer = Transfer(results)
    transfer.start()
    task = CacheTask(transfer)
    assert task.get_results(0) == task.get_results(1) == [TIMEOUT] * len(results)
    assert task.synchronize(0) is TIMEOUT
    transfer.go.set()
    assert task.synchronize(30_000) is task.synchronize() is code
    assert task.get_results() == task.get_results(0) == results


@pytest.mark.parity("type.task_synchronize", "type.task_get_results")
@pytest.mark.parametrize(
    ("timeout", "error"), [("1", TypeError), (1.0, TypeError), (-1, ValueError), (2**32, ValueError)]
)
def test_task_refuses(timeout, error):
    transfer = Transfer([OK])
    transfer.go.set()
    transfer.start()
    refused(error, CacheTask(transfer).synchronize, timeout)
    refused(error, CacheTask(transfer).get_results, timeout)
    transfer.join()
