# SPDX-License-Identifier: Apache-2.0
"""Caches of the older API: copies within a process, several devices, transfers layer by layer."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from llm_datadist import (
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    KvCache,
    LayerSynchronizer,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Placement,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from llm_datadist_v1 import CacheTask
from llm_datadist_v1.llm_utils import build_npu_tensors
from older import (
    DECODER,
    KEY,
    NOT_EXIST,
    NOT_YET_LINK,
    OFFER,
    PARAM_INVALID,
    PROMPT,
    SERVE,
    SUCCESS,
    content,
    fill,
    opened,
    several,
)
from peers import ADDRESS, cluster, desc, pattern, refused

ENABLED = LLMStatusCode.LLM_FEATURE_NOT_ENABLED
FAILED = LLMStatusCode.LLM_FAILED
WAIT_TIMEOUT = LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT
HOST = Placement.HOST

TWO_DEVICES = SERVE.replace("= 0, \"127.0.0.1:0\"", "= [0, 1], \"127.0.0.1:0;127.0.0.1:0\"")
OFFER_ON_BOTH = """
from peers import memory_at, pattern
cache = end.engine.kv_cache_manager.allocate_cache(described, keys)
for device, addrs in enumerate(cache.per_device_tensor_addrs):
    for tensor, addr in enumerate(addrs):
        view = memory_at(addr, described.size)
        view[:] = pattern(number + device, tensor, view.size)
end.kv_caches.append(cache)
result = cache.cache_id
"""
OFFER_BLOCKS_ON_BOTH = OFFER_ON_BOTH.replace("allocate_cache(described, keys)", "allocate_blocks_cache(described, key)")
# A decoder in a process of its own, linked to the prompt in the test's.
DECODE = """
from llm_datadist import *
from peers import cluster, memory_at, pattern
config = LLMConfig()
config.device_id = 0
config.ge_options = {"ge.flowGraphMemMaxSize": str(1 << 20)}
end.engine = LLMDataDist(LLMRole.DECODER, 2)
end.engine.init(config.generate_options())
result = end.engine.link_clusters([cluster(address, 1)], 10_000)
"""
RECEIVE = """
from peers import memory_at, pattern
manager = end.engine.kv_cache_manager
end.kv_cache = (manager.allocate_blocks_cache if blocks else manager.allocate_cache)(described)
for tensor, addr in enumerate(end.kv_cache.per_device_tensor_addrs[0]):
    view = memory_at(addr, described.size)
    view[:] = pattern(50, tensor, view.size)
result = end.kv_cache.per_device_tensor_addrs[0]
"""
RECEIVED = """
from peers import memory_at
size = end.kv_cache.cache_desc.size
result = [bytes(memory_at(addr, size)) for addr in end.kv_cache.per_device_tensor_addrs[0]]
"""


@pytest.fixture
def engine(request):
    """An engine without a peer, a DECODER unless something else is asked for."""
    given = dict(getattr(request, "param", {}))
    engine = opened(given.pop("role", LLMRole.DECODER), **given)
    yield engine
    engine.finalize()


@pytest.fixture
def manager(engine):
    return engine.kv_cache_manager


def filled(cache, number):
    fill(cache, number)
    return cache


# --- within a process


@pytest.mark.parity("kv_manager.copies")
def test_rows_are_copied(manager):
    src = filled(manager.allocate_cache(desc([3, 8], 2)), 1)
    dst = filled(manager.allocate_cache(desc([2, 6], 2)), 2)
    expected = [pattern(2, tensor, 12) for tensor in range(2)]
    manager.copy_cache(dst, src, 1, 2, 2, 3, 77)
    for tensor in range(2):
        expected[tensor][8:11] = pattern(1, tensor, 24)[18:21]
        assert np.array_equal(content(dst, tensor), expected[tensor])
    manager.copy_cache(src, src, 0, 1)
    assert np.array_equal(content(src)[:8], pattern(1, 0, 24)[8:16])


@pytest.mark.parity("kv_manager.copies")
def test_copy_cache_refuses(manager):
    cache, other = manager.allocate_cache(desc([2, 8])), manager.allocate_cache(desc([2, 8], 2))
    host = KvCache.create_cpu_cache(desc([2, 8], placement=HOST), [1])
    refused(manager.copy_cache, 1, host, error=TypeError)
    refused(manager.copy_cache, host, 1)
    refused(manager.copy_cache, cache, 1, error=TypeError)
    refused(manager.copy_cache, cache, host, -1)
    refused(manager.copy_cache, cache, cache, -1, "0", error=ValueError)
    refused(manager.copy_cache, cache, cache, 0, 2**32, error=ValueError)
    refused(manager.copy_cache, cache, cache, 0, 1, -1, error=ValueError)
    refused(manager.copy_cache, cache, cache, 0, 1, 0, 1.0, error=TypeError)
    refused(manager.copy_cache, cache, cache, 0, 1, 0, 0)
    refused(manager.copy_cache, cache, cache, 0, 1, 0, -1, "1", error=TypeError)
    refused(manager.copy_cache, cache, other, code=FAILED)
    refused(manager.copy_cache, cache, cache, 0, 2)
    refused(manager.copy_cache, cache, cache, 0, 1, 9)
    manager.deallocate_cache(other)
    refused(manager.copy_cache, cache, other, code=NOT_EXIST)


@pytest.mark.parity("kv_manager.copies")
def test_blocks_are_copied(manager):
    cache = filled(manager.allocate_blocks_cache(desc([5, 4], 2)), 1)
    manager.copy_blocks(cache, {0: [3, 4], 4: [1]})
    for tensor in range(2):
        before = pattern(1, tensor, 20).reshape(5, 4)
        assert np.array_equal(content(cache, tensor).reshape(5, 4), before[[0, 0, 2, 0, 0]])
    manager.copy_blocks(cache, {})
    refused(manager.copy_blocks, cache, {5: [0]})
    assert "only support" in str(refused(manager.copy_blocks, cache, [1], error=TypeError))
    assert "inner type only support" in str(refused(manager.copy_blocks, cache, {1: ["0"]}, error=TypeError))
    refused(manager.copy_blocks, cache, {1: 0}, error=TypeError)
    refused(manager.copy_blocks, cache, {-1: [0]}, error=ValueError)
    refused(manager.copy_blocks, cache, {1: [2**64]}, error=ValueError)
    refused(manager.copy_blocks, KvCache.create_cpu_cache(desc([5, 4], placement=HOST), [1]), {})
    refused(manager.copy_blocks, 1, {}, error=TypeError)


@pytest.mark.parity("kv_manager.copies")
def test_blocks_are_swapped_out_and_in(manager):
    device = filled(manager.allocate_blocks_cache(desc([4, 8], 2)), 1)
    memory = [pattern(2, tensor, 24) for tensor in range(2)]
    host = KvCache.create_cpu_cache(desc([3, 8], 2, placement=HOST), [each.ctypes.data for each in memory])
    manager.swap_blocks(device, host, {3: 0, 1: 2})
    for tensor in range(2):
        assert np.array_equal(memory[tensor].reshape(3, 8)[[0, 2]], pattern(1, tensor, 32).reshape(4, 8)[[3, 1]])
        assert np.array_equal(memory[tensor][8:16], pattern(2, tensor, 24)[8:16])
    manager.swap_blocks(host, device, {1: 0})
    for tensor in range(2):
        expected = pattern(1, tensor, 32)
        expected[:8] = pattern(2, tensor, 24)[8:16]
        assert np.array_equal(content(device, tensor), expected)
    refused(manager.swap_blocks, device, device, {0: 1})
    refused(manager.swap_blocks, device, host, {4: 0})
    refused(manager.swap_blocks, device, host, [], error=TypeError)
    refused(manager.swap_blocks, 1, host, {}, error=TypeError)
    below = KvCache.create_cpu_cache(desc([3, 8], 2, placement=HOST), [-1, 8])
    refused(manager.swap_blocks, device, below, {0: 0}, error=TypeError)


@pytest.mark.parity("kv_manager.get_cache_tensors", "type.tensor")
def test_tensors_look_at_the_memory_of_a_cache(manager):
    cache = filled(manager.allocate_cache(desc([2, 3], 2, DataType.DT_INT16)), 1)
    [tensor] = manager.get_cache_tensors(cache, 1)
    assert np.array_equal(tensor.numpy(), pattern(1, 1, 12).view(np.int16).reshape(2, 3))
    tensor.numpy()[1, 2] = 77
    assert content(cache, 1)[10] == 77
    assert [each.numpy().shape for each in build_npu_tensors(cache)] == [(2, 3)] * 2
    for index in (-1, 2):
        refused(manager.get_cache_tensors, cache, index)
    refused(manager.get_cache_tensors, cache, "0", error=TypeError)
    refused(manager.get_cache_tensors, 1, error=TypeError)
    refused(build_npu_tensors, cache, 1)


@pytest.mark.parity("kv_manager.owning")
def test_an_unknown_cache_can_not_be_deallocated(manager):
    refused(manager.deallocate_cache, KvCache(77, desc([1, 8]), [[1]], None), code=NOT_EXIST)


@pytest.mark.parity("kv_manager.owning")
@pytest.mark.parametrize("engine", [{"role": LLMRole.PROMPT}], indirect=True)
def test_a_key_in_use_is_the_older_failure(manager):
    cache = manager.allocate_cache(desc([1, 8]), [KEY])
    refused(manager.allocate_cache, desc([1, 8]), [KEY], code=FAILED)
    blocks = manager.allocate_blocks_cache(desc([1, 8]), BlocksCacheKey(PROMPT, 1))
    refused(manager.allocate_blocks_cache, desc([1, 8]), BlocksCacheKey(PROMPT, 1), code=FAILED)
    manager.deallocate_cache(blocks)
    manager.allocate_blocks_cache(desc([1, 8]), BlocksCacheKey(PROMPT, 1))
    manager.deallocate_cache(cache)
    manager.remove_cache_key(KEY)
    manager.allocate_cache(desc([1, 8]), [KEY])


def test_allocate_blocks_cache_refuses(manager):
    refused(manager.allocate_blocks_cache, 1, error=TypeError)
    refused(manager.allocate_blocks_cache, desc([1, 8], placement=HOST), KEY, error=TypeError)
    refused(manager.allocate_blocks_cache, desc([1, 8], tensors=0))
    refused(manager.allocate_blocks_cache, desc([1, 8], placement=HOST))
    refused(manager.allocate_blocks_cache, desc([1, 8]), BlocksCacheKey(DECODER))


@pytest.mark.parity("kv_manager.pulls")
def test_pull_blocks_refuses(manager):
    cache, key = manager.allocate_blocks_cache(desc([4, 8])), BlocksCacheKey(PROMPT)
    host = KvCache.create_cpu_cache(desc([4, 8], placement=HOST), [1])
    refused(manager.pull_blocks, KEY, cache, [0], [0], error=TypeError)
    refused(manager.pull_blocks, key, 1, [0], [0], error=TypeError)
    refused(manager.pull_blocks, key, cache, (0,), [0], error=TypeError)
    refused(manager.pull_blocks, key, cache, [0], (0,), error=TypeError)
    refused(manager.pull_blocks, key, host, [0], [0])
    refused(manager.pull_blocks, key, cache, [], [])
    refused(manager.pull_blocks, key, cache, [0], [0, 1])
    refused(manager.pull_blocks, key, cache, [0], [4])
    refused(manager.pull_blocks, key, cache, [0], [0], tensor_num_per_layer=0)
    refused(manager.pull_blocks, key, cache, [0], [0], code=NOT_YET_LINK)
    manager._role = LLMRole.PROMPT
    refused(manager.pull_blocks, 1, 1, 1, 1)


# --- several devices


@pytest.mark.parity("kv_manager.owning")
@pytest.mark.parametrize("engine", [{"device_id": [0, 1]}], indirect=True)
def test_each_device_gets_its_tensors(remote, engine, manager):
    address = remote.run(TWO_DEVICES)
    cache_id = remote.run(OFFER_ON_BOTH, described=desc([2, 8], 3), keys=[KEY], number=1)
    assert engine.link_clusters([cluster(address, PROMPT)], 5000) == (PARAM_INVALID, [])
    assert engine.link_clusters([several([address, "127.0.0.1:1"])], 10_000) == (SUCCESS, [SUCCESS])
    cache = manager.allocate_cache(desc([1, 8], 3))
    assert repr(cache) == f"KvCache(cache_id = {cache.cache_id}, num_devices = 2)"
    assert [len(addrs) for addrs in cache.per_device_tensor_addrs] == [3, 3]
    for key, row in ((KEY, 0), (CacheKeyByIdAndIndex(PROMPT, cache_id, 1), 1)):
        manager.pull_cache(key, cache)
        for device in range(2):
            for tensor in range(3):
                expected = pattern(1 + device, tensor, 16)[8 * row : 8 * row + 8]
                assert np.array_equal(content(cache, tensor, device), expected)
    one = range(1)
    refused(manager.pull_cache, KEY, cache, src_layer_range=one, dst_layer_range=one)  # a device's 3 tensors are no layers of 2
    assert [each.numpy().ctypes.data for each in manager.get_cache_tensors(cache, 2)] == [
        addrs[2] for addrs in cache.per_device_tensor_addrs
    ]
    other = manager.allocate_cache(desc([1, 8], 3))
    manager.copy_cache(other, cache)
    assert np.array_equal(content(other, 2, 1), content(cache, 2, 1))
    manager._role = LLMRole.PROMPT
    refused(manager.transfer_cache_async, cache, Ready(), [TransferConfig(PROMPT, [1])], code=ENABLED)
    refused(engine.switch_role, LLMRole.PROMPT, {"llm.listenIpInfo": ADDRESS}, code=ENABLED)
    remote.run("del end.kv_caches[:]")


@pytest.mark.parity("kv_manager.pulls")
@pytest.mark.parametrize("engine", [{"device_id": [0, 1]}], indirect=True)
def test_layers_are_those_of_each_device(process, engine, manager):
    address = process.run(TWO_DEVICES)
    process.run(OFFER_ON_BOTH, described=desc([1, 8], 8), keys=[KEY], number=1)
    assert engine.link_clusters([several([address, "127.0.0.1:1"])], 10_000) == (SUCCESS, [SUCCESS])
    cache = manager.allocate_cache(desc([1, 8], 4))  # 2 layers on each device, of the prompt's 4
    before = pattern(50, 0, 8)
    expected = {(device, tensor): before for device in range(2) for tensor in range(4)}
    for device, tensor in expected:
        content(cache, tensor, device)[:] = before
    for src, dst in ((range(4, 5), range(1)), (range(3, 5), range(2)), (range(1), range(2, 3)), (range(2), range(1))):
        refused(manager.pull_cache, KEY, cache, src_layer_range=src, dst_layer_range=dst)
    refused(manager.pull_cache, KEY, cache, src_layer_range=range(2), dst_layer_range=range(2), tensor_num_per_layer=3)
    assert all(np.array_equal(content(cache, tensor, device), before) for device, tensor in expected)
    for src, dst in ((3, 0), (1, 1), (0, 0), (2, 1)):
        layers = {"src_layer_range": range(src, src + 1), "dst_layer_range": range(dst, dst + 1)}
        manager.pull_cache(KEY, cache, **layers)
        for device in range(2):
            for tensor in range(2):
                expected[device, 2 * dst + tensor] = pattern(1 + device, 2 * src + tensor, 8)
        for (device, tensor), each in expected.items():
            assert np.array_equal(content(cache, tensor, device), each)
    refused(manager.pull_cache, KEY, cache, src_layer_range=range(1), dst_layer_range=range(1), code=NOT_EXIST)  # pulled whole
    process.run("del end.kv_caches[:]")
    process.close()


@pytest.mark.parity("kv_manager.pulls")
@pytest.mark.parametrize("engine", [{"device_id": [0, 1]}], indirect=True)
def test_layers_of_blocks_are_those_of_each_device(process, engine, manager):
    address = process.run(TWO_DEVICES)
    process.run(OFFER_BLOCKS_ON_BOTH, described=desc([4, 8], 6), key=BlocksCacheKey(PROMPT), number=1)
    assert engine.link_clusters([several([address, "127.0.0.1:1"])], 10_000) == (SUCCESS, [SUCCESS])
    cache = manager.allocate_blocks_cache(desc([3, 8], 2))
    manager.pull_blocks(BlocksCacheKey(PROMPT), cache, [3, 0], [0, 2], src_layer_range=range(1, 2))  # into all there are
    for device in range(2):
        for tensor in range(2):
            got = content(cache, tensor, device).reshape(3, 8)
            assert np.array_equal(got[[0, 2]], pattern(1 + device, 2 + tensor, 32).reshape(4, 8)[[3, 0]])
            assert not got[1].any()
    process.run("del end.kv_caches[:]")
    process.close()


# --- transfers


class Ready(LayerSynchronizer):
    def __init__(self, event=None, answer=True):
        self.event, self.answer, self.seen = event, answer, []

    def synchronize_layer(self, layer_index, timeout_in_millis):
        if self.event is not None:
            self.event.wait(30)
        self.seen.append(layer_index)
        return self.answer


@pytest.fixture
def prompt(remote):
    """The manager of a prompt to which the remote end is linked as a decoder."""
    engine = opened(LLMRole.PROMPT, PROMPT, sync_kv_timeout=10_000)
    assert remote.run(DECODE, address=engine.listen_address) == (SUCCESS, [SUCCESS])
    yield engine.kv_cache_manager
    remote.run("end.kv_cache = None")
    engine.finalize()


def received(remote, size):
    return [np.frombuffer(each, np.uint8)[:size] for each in remote.run(RECEIVED)]


@pytest.mark.parity("kv_manager.transfer_cache_async")
def test_rows_are_transferred_layer_by_layer(remote, prompt):
    addrs = remote.run(RECEIVE, described=desc([2, 8], 4), blocks=False)
    cache = filled(prompt.allocate_cache(desc([3, 8], 4)), 1)
    ready = Ready()
    config = TransferConfig(DECODER, [addr + 8 for addr in addrs], None, 2)  # to row 1
    task = prompt.transfer_cache_async(cache, ready, (config,))
    assert isinstance(task, CacheTask)
    assert task.synchronize() is SUCCESS and task.get_results() == [SUCCESS]
    assert ready.seen == [0, 1] and config.src_layer_range == range(2)
    for tensor, got in enumerate(received(remote, 16)):
        expected = pattern(50, tensor, 16)
        expected[8:] = pattern(1, tensor, 24)[16:]
        assert np.array_equal(got, expected)


@pytest.mark.parity("kv_manager.transfer_cache_async")
def test_blocks_are_transferred(remote, prompt):
    addrs = remote.run(RECEIVE, described=desc([4, 8], 2), blocks=True)
    cache = filled(prompt.allocate_blocks_cache(desc([3, 8], 2)), 1)
    config = TransferConfig(DECODER, addrs)
    assert prompt.transfer_cache_async(cache, Ready(), [config], [2, 0], [1, 3], 8).synchronize() is SUCCESS
    for tensor, got in enumerate(received(remote, 32)):
        expected = pattern(50, tensor, 32).reshape(4, 8)
        expected[[1, 3]] = pattern(1, tensor, 24).reshape(3, 8)[[2, 0]]
        assert np.array_equal(got, expected.reshape(-1))
    task = prompt.transfer_cache_async(cache, Ready(), [config], [0], [0], 4)
    assert task.synchronize() is PARAM_INVALID  # not the size of a block


@pytest.mark.parity("kv_manager.transfer_cache_async")
def test_addresses_outside_the_caches_of_the_receiver_are_refused(remote, prompt):
    addrs = remote.run(RECEIVE, described=desc([1, 8], 2), blocks=False)
    cache = filled(prompt.allocate_cache(desc([1, 8], 2)), 1)
    for bad in ([addrs[0], addrs[1] + 1], [0x1000, addrs[1]]):
        task = prompt.transfer_cache_async(cache, Ready(), [TransferConfig(DECODER, bad)])
        assert task.get_results() == [PARAM_INVALID]
    assert prompt.transfer_cache_async(cache, Ready(), [TransferConfig(77, addrs)]).synchronize() is NOT_YET_LINK
    for tensor, got in enumerate(received(remote, 8)):
        assert np.array_equal(got, pattern(50, tensor, 8))


@pytest.mark.parity("kv_manager.transfer_cache_async", "type.task_synchronize", "type.task_get_results")
def test_a_task_waits_with_the_older_code(remote, prompt):
    addrs = remote.run(RECEIVE, described=desc([1, 8], 2), blocks=False)
    cache = filled(prompt.allocate_cache(desc([1, 8], 2)), 1)
    gate = threading.Event()
    task = prompt.transfer_cache_async(cache, Ready(gate), [TransferConfig(DECODER, addrs)])
    try:
        assert task.synchronize(0) is WAIT_TIMEOUT
        assert task.get_results(0) == [WAIT_TIMEOUT]
    finally:
        gate.set()
    assert task.synchronize() is SUCCESS
    task = prompt.transfer_cache_async(cache, Ready(answer=False), [TransferConfig(DECODER, addrs)])
    assert task.get_results() == [PARAM_INVALID]


@pytest.mark.parity("kv_manager.transfer_cache_async")
@pytest.mark.parametrize("engine", [{"role": LLMRole.PROMPT}], indirect=True)
def test_transfer_cache_async_refuses(manager):
    rows, blocks = manager.allocate_cache(desc([1, 8], 2)), manager.allocate_blocks_cache(desc([2, 8], 2))
    config = TransferConfig(DECODER, [1, 2])
    by_key = TransferWithCacheKeyConfig(BlocksCacheKey(DECODER), range(1), range(1))
    host = KvCache.create_cpu_cache(desc([1, 8], 2, placement=HOST), [1, 2])
    for arguments, error in [
        ((None, Ready(), [config]), TypeError),
        ((host, Ready(), [config]), LLMException),
        ((rows, Ready(), [config], None, []), LLMException),
        ((rows, Ready(), [config], None, [0], 8), LLMException),
        ((blocks, Ready(), [config], [0]), LLMException),
        ((blocks, None, [config]), TypeError),
        ((blocks, Ready(), [by_key]), TypeError),
        ((blocks, Ready(), [config], None, None, 8), LLMException),
        ((blocks, Ready(), [TransferConfig(DECODER, [1])]), LLMException),
    ]:
        refused(manager.transfer_cache_async, *arguments, error=error)
    manager._role = LLMRole.DECODER
    refused(manager.transfer_cache_async, rows, Ready(), [config])


def test_layers_go_to_a_cache_with_fewer_of_them(remote, engine, manager):
    address = remote.run(SERVE)
    remote.run(OFFER, described=desc([1, 8], 4), keys=[KEY], number=1)
    assert engine.link_clusters([cluster(address, PROMPT)], 5000) == (SUCCESS, [SUCCESS])
    cache = filled(manager.allocate_cache(desc([1, 8], 2)), 50)
    manager.pull_cache(KEY, cache, src_layer_range=range(1, 2), dst_layer_range=range(1))
    for tensor in range(2):
        assert np.array_equal(content(cache, tensor), pattern(1, tensor + 2, 8))
    refused(manager.pull_cache, KEY, cache, src_layer_range=range(2, 3), dst_layer_range=range(1))
    refused(manager.pull_cache, CacheKey(PROMPT, 9), cache, src_layer_range=range(1), code=NOT_EXIST)
    remote.run("del end.kv_caches[:]")
