# SPDX-License-Identifier: Apache-2.0
"""transfer_cache_async without an engine: its checks, the order of its pushes, and what the task tells."""

from __future__ import annotations

import itertools
import logging
import threading

import pytest

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKeyByIdAndIndex,
    CacheTask,
    DataType,
    LayerSynchronizer,
    LLMException,
    LLMStatusCode,
    Placement,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from llm_datadist.utils import log
from llm_datadist.v2 import llm_utils, transfer
from llm_datadist.v2.cache_manager import CacheManager

np = pytest.importorskip("numpy")

OK = LLMStatusCode.LLM_SUCCESS
PARAM_INVALID = LLMStatusCode.LLM_PARAM_INVALID
NOT_YET_LINK = LLMStatusCode.LLM_NOT_YET_LINK
TIMEOUT = LLMStatusCode.LLM_TIMEOUT
ONE_SIDED = {"llm.EnableRemoteCacheAccessible": "1"}
SECONDS = 30_000  # ms; no transfer here takes a thousandth of it
TENSORS, LAYERS = 6, 3
SHAPE = [4, 4]
CACHE = Cache(3, CacheDesc(TENSORS, SHAPE, DataType.DT_INT8), [1] * TENSORS, None, True, False)
UNEVEN = Cache(3, CacheDesc(3, SHAPE, DataType.DT_INT8), [1] * 3, None, True, False)
ON_HOST = Cache(3, CacheDesc(TENSORS, SHAPE, DataType.DT_INT8, Placement.HOST), [1] * TENSORS, None, True, False)


class Ready(LayerSynchronizer):
    """Says at once that a layer is there, and notes what it was asked."""

    def __init__(self, answer=lambda _: True):
        self.asked = []
        self._answer = answer

    def synchronize_layer(self, layer_index, timeout_in_millis):
        self.asked.append((layer_index, timeout_in_millis))
        return self._answer(layer_index)


class Engine:
    """Notes what is pushed, and fails where it is told to: (cluster, first tensor of the source) -> code."""

    def __init__(self, failures=None):
        self.pushes = []
        self._failures = failures or {}

    def push(self, operation, words, src_count, dst_count, addr_count):
        words = memoryview(words).cast("B").cast("q").tolist()
        assert operation == "transfer_cache_async" and len(words) == 14 + src_count + dst_count + addr_count
        src, dst = 14 + src_count, 14 + src_count + dst_count
        self.pushes.append((words[:14], words[14:src], words[src:dst], words[dst:]))
        code = self._failures.get((words[0], words[8]))
        if code is not None:
            raise LLMException("it failed", status_code=code)


def raw(cluster=1, layers=None, addrs=None, batch=0):
    count = len(layers or range(LAYERS)) * 2
    return TransferConfig(cluster, addrs or list(range(100, 100 + count)), layers, batch)


def keyed(key=None, src=range(LAYERS), dst=None, batch=0):
    return TransferWithCacheKeyConfig(key or CacheKeyByIdAndIndex(1, 7, 2), src, dst or src, batch)


def start(engine, configs, *args, options=None, synchronizer=None, cache=CACHE):
    return CacheManager(engine, options or {}).transfer_cache_async(cache, synchronizer or Ready(), configs, *args)


def pushes(configs, *args, options=None):
    """Return the pushes of a transfer that succeeds."""
    engine = Engine()
    task = start(engine, configs, *args, options=options)
    assert task.synchronize(SECONDS) is OK
    assert task.get_results() == [OK] * len(configs)
    return engine.pushes


@pytest.fixture
def lines():
    """The text of what is logged."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(handler.format(record))
    log.get_logger().addHandler(handler)
    yield records
    log.get_logger().removeHandler(handler)


# --- the words that cross


@pytest.mark.parity("manager.transfer_cache_async")
def test_addresses_go_with_their_layer():
    layers = range(1, 3)
    got = pushes([raw(9, layers, [10, 11, 12, 2**64 - 1], 3)])
    head = [9, 0, 0, 0, 0, 0, 3, 3]
    assert got == [
        ([*head, 2, 2, -1, 0, 2, 0], [], [], [10, 11]),
        ([*head, 4, 2, -1, 0, 2, 0], [], [], [12, -1]),
    ]


@pytest.mark.parity("manager.transfer_cache_async")
def test_layers_of_the_destination_count_from_its_own_first():
    got = pushes([keyed(src=range(1, 3), dst=range(5, 7), batch=3)], options=ONE_SIDED)
    head = [1, 3, 0, 0, 7, 2, 3, 3]
    assert [words for words, *_ in got] == [[*head, 2, 2, 10, 2, 2, 0], [*head, 4, 2, 12, 2, 2, 0]]


def test_a_blocks_key_is_row_0_of_both_sides():
    config = keyed(BlocksCacheKey(1, 6), range(1))
    assert pushes([config], options=ONE_SIDED) == [([1, 1, -1, 6, 0, 0, 3, 0, 0, 2, 0, 2, 2, 0], [], [], [])]
    config = keyed(src=range(1), batch=3)
    config.cache_key = BlocksCacheKey(1, 6)
    assert pushes([config], options=ONE_SIDED)[0][0][7] == 0


@pytest.mark.parity("manager.transfer_cache_async")
@pytest.mark.parametrize("form", [list, tuple, np.array])
def test_blocks_go_along_with_each_layer(form):
    config = raw(layers=range(1))
    assert pushes([config], form([1, 3]), form([2, 0])) == [
        ([1, 0, 0, 0, 0, 0, 3, 0, 0, 2, -1, 0, 2, 0], [1, 3], [2, 0], [100, 101])
    ]
    assert pushes([config], None, form([2, 0]), 8) == [
        ([1, 0, 0, 0, 0, 0, 3, 0, 0, 2, -1, 0, 2, 8], [], [2, 0], [100, 101])
    ]
    assert pushes([config], [], [], 0) == pushes([config], (), ()) == pushes([config])


def test_what_was_given_is_copied():
    engine, go = Engine(), threading.Event()
    config, addrs, blocks = raw(), [*range(100, 106)], [1]
    config.dst_addrs = addrs
    task = start(engine, [config], blocks, blocks, synchronizer=Ready(lambda _: go.wait(30)))
    config.src_layer_range, config.dst_cluster_id = range(1), 5
    addrs[:] = [0] * 6
    blocks[:] = [0]
    go.set()
    assert task.synchronize(SECONDS) is OK
    assert [(words[0], src, dst, given) for words, src, dst, given in engine.pushes] == [
        (1, [1], [1], [100 + 2 * layer, 101 + 2 * layer]) for layer in range(LAYERS)
    ]


# --- the thread


@pytest.mark.parity("manager.transfer_cache_async", "type.layer_synchronizer")
def test_each_layer_is_asked_for_once_and_goes_to_the_configs_in_order():
    synchronizer, engine = Ready(), Engine()
    configs = (raw(1, range(2)), raw(2, range(1, 2)), raw(3, range(1)))
    task = start(engine, configs, synchronizer=synchronizer)
    assert task.get_results(SECONDS) == [OK] * 3
    assert synchronizer.asked == [(0, None), (1, None)]  # nobody wants layer 2
    assert [(words[0], words[8]) for words, *_ in engine.pushes] == [(1, 0), (3, 0), (1, 2), (2, 2)]


def test_a_config_without_layers_gets_all_of_them():
    config = raw()
    assert len(pushes([config])) == LAYERS
    assert config.src_layer_range == range(LAYERS)
    config = keyed()
    config.src_layer_range = None
    assert len(pushes([config], options=ONE_SIDED)) == LAYERS
    assert config.src_layer_range == range(LAYERS)


def test_no_configs_are_a_transfer_of_nothing():
    synchronizer = Ready()
    task = start(Engine(), [], synchronizer=synchronizer)
    assert task.synchronize(SECONDS) is OK
    assert task.get_results() == [] and synchronizer.asked == []


@pytest.mark.parity("manager.transfer_cache_async", "type.task_get_results")
def test_a_layer_that_does_not_come_ends_the_transfer():
    engine = Engine()
    configs = [raw(1, range(1)), raw(2, range(2)), raw(3, range(2, 3))]
    task = start(engine, configs, synchronizer=Ready(lambda layer: layer < 1))
    assert task.synchronize(SECONDS) is PARAM_INVALID
    assert task.get_results() == [OK, PARAM_INVALID, None]
    assert [(words[0], words[8]) for words, *_ in engine.pushes] == [(1, 0), (2, 0)]


@pytest.mark.parity("manager.transfer_cache_async", "type.task_synchronize")
def test_a_push_that_fails_ends_the_transfer(lines):
    engine = Engine({(2, 2): NOT_YET_LINK})
    configs = [raw(1), raw(2), raw(3)]
    task = start(engine, configs)
    assert task.synchronize(SECONDS) is NOT_YET_LINK
    assert task.get_results() == [None, NOT_YET_LINK, None]
    assert [words[0] for words, *_ in engine.pushes] == [1, 2, 3, 1, 2]
    assert any("layer 1 to cluster 2: it failed" in line for line in lines)


def test_configs_of_one_cluster_share_their_result():
    configs = [raw(1, range(1)), raw(1, range(2))]
    task = start(Engine({(1, 2): TIMEOUT}), configs)
    assert task.synchronize(SECONDS) is TIMEOUT
    assert task.get_results() == [TIMEOUT, TIMEOUT]


@pytest.mark.parametrize("raised", [ZeroDivisionError, SystemExit, LLMException])
def test_an_exception_of_the_synchronizer_ends_the_transfer_without_results(raised, lines):
    def fail(layer):
        raise raised("no such layer")

    engine = Engine()
    task = start(engine, [raw(1), raw(2)], synchronizer=Ready(fail))
    assert task.get_results(SECONDS) == [None, None]
    assert task.synchronize() is OK and engine.pushes == []
    assert any("transfer_cache_async" in line and "no such layer" in line for line in lines)


def test_a_synchronizer_can_not_wait_for_its_own_transfer():
    refusals, tasks, ready = [], [], threading.Event()

    def wait(layer):
        assert ready.wait(30)
        for call in (tasks[0].synchronize, tasks[0].get_results, lambda: tasks[0].synchronize(SECONDS)):
            with pytest.raises(RuntimeError, match="inside its own synchronizer") as refusal:
                call()
            refusals.append(refusal.value)
        assert tasks[0].synchronize(0) is TIMEOUT  # only looks
        return True

    tasks.append(start(Engine(), [raw(layers=range(1))], synchronizer=Ready(wait)))
    ready.set()
    assert tasks[0].get_results(SECONDS) == [OK]
    assert len(refusals) == 3


def test_the_source_is_kept_until_the_end():
    kept, go = threading.Event(), threading.Event()

    class Going(Cache):
        def __del__(self):
            kept.set()

    cache = Going(3, CACHE.cache_desc, [1] * TENSORS, None, True, False)
    task = start(Engine(), [raw()], cache=cache, synchronizer=Ready(lambda _: go.wait(30)))
    del cache
    assert not kept.is_set()
    go.set()
    assert task.synchronize(SECONDS) is OK
    assert kept.is_set()


def test_the_thread_is_waited_for_at_exit_whoever_started_it():
    go = threading.Event()
    tasks = []

    def begin():
        tasks.append(start(Engine(), [raw()], synchronizer=Ready(lambda _: go.wait(30))))

    starter = threading.Thread(target=begin, daemon=True)
    starter.start()
    starter.join()
    (running,) = [thread for thread in threading.enumerate() if isinstance(thread, transfer.TransferAsyncThread)]
    assert not running.daemon
    assert tasks[0].get_results(0) == [TIMEOUT] and tasks[0].synchronize(1) is TIMEOUT
    go.set()
    assert tasks[0].synchronize(SECONDS) is OK


@pytest.mark.parity("module.llm_utils")
def test_the_code_of_a_timeout_is_the_tasks():
    older = LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT

    class Older(CacheTask):
        _TIMEOUT_CODE = older

    def begin(engine):
        classes = {"config_class": TransferConfig, "task_class": Older}
        return llm_utils.transfer_cache_async(
            engine, CACHE, Ready(lambda _: go.wait(30)), [raw(), raw(2)], None, None, None, **classes
        )

    go = threading.Event()
    tasks = begin(Engine()), begin(Engine({(2, 4): TIMEOUT}))
    assert [task.synchronize(0) for task in tasks] == [older, older]
    go.set()
    assert [task.synchronize(SECONDS) for task in tasks] == [OK, older]
    assert tasks[1].get_results() == [OK, older]


# --- the checks, in their order: of two wrong arguments the earlier check is heard


def other_length():
    config = keyed()
    config.dst_layer_range = range(2)
    return config


def no_destination():
    config = keyed()
    config.dst_layer_range = None
    return config


GOOD = {
    "src_cache": CACHE,
    "layer_synchronizer": Ready(),
    "transfer_configs": [raw()],
    "src_block_indices": [1],
    "dst_block_indices": [2],
}
CHECKS = [
    ({"src_cache": None}, TypeError, "src_cache only support Cache"),
    ({"src_cache": ON_HOST}, LLMException, "should not be Placement.HOST"),
    ({"dst_block_indices": 5}, TypeError, "dst_block_indices only support"),
    ({"dst_block_indices": [1.0]}, TypeError, "dst_block_indices inner type only support"),
    ({"dst_block_indices": [-1]}, ValueError, "dst_block_indices elements should be in range"),
    ({"dst_block_indices": [2**64]}, ValueError, "dst_block_indices elements should be in range"),
    ({"dst_block_indices": [2**63]}, LLMException, "dst_block_indices elements should be in range"),
    ({"src_block_indices": "1"}, TypeError, "src_block_indices only support"),
    ({"src_block_indices": [-1]}, ValueError, "src_block_indices elements should be in range"),
    ({"dst_block_memory_size": "1"}, TypeError, "dst_block_memory_size only support"),
    ({"dst_block_memory_size": -1}, ValueError, "dst_block_memory_size should be in range"),
    ({"dst_block_memory_size": 2**64}, ValueError, "dst_block_memory_size should be in range"),
    ({"dst_block_indices": None}, LLMException, "transfer from blocks to cache is not supported"),
    ({"dst_block_indices": []}, LLMException, "transfer from blocks to cache is not supported"),
    ({"src_block_indices": [1, 2]}, LLMException, "equally long"),
    ({"src_block_indices": None}, LLMException, "dst_block_memory_size is needed"),
    ({"src_block_indices": []}, LLMException, "dst_block_memory_size is needed"),
    ({"layer_synchronizer": None}, TypeError, "layer_synchronizer only support LayerSynchronizer"),
    ({"layer_synchronizer": lambda *_: True}, TypeError, "layer_synchronizer only support LayerSynchronizer"),
    ({"transfer_configs": None}, TypeError, "transfer_configs only support"),
    ({"transfer_configs": raw()}, TypeError, "transfer_configs only support"),
    ({"transfer_configs": [raw(), keyed()]}, TypeError, "transfer_configs inner type only support TransferConfig"),
    ({"transfer_configs": [None]}, TypeError, "transfer_configs inner type only support"),
    ({"src_cache": UNEVEN}, LLMException, "num_tensors should be even"),
    ({"transfer_configs": [raw(batch=1)]}, LLMException, "src_batch_index should be 0"),
    ({"transfer_configs": [raw(), raw(layers=range(2, 4))]}, LLMException, "should be inside"),
    ({"transfer_configs": [raw(layers=range(2), addrs=[1, 2, 3])]}, LLMException, "3 dst_addrs do not fit"),
]


def refused(error, text, options=None, **arguments):
    engine = Engine()
    with pytest.raises(error, match=text) as failure:
        CacheManager(engine, options or {}).transfer_cache_async(**arguments)
    assert type(failure.value) is error
    if error is LLMException:
        assert failure.value.status_code is PARAM_INVALID
    assert engine.pushes == []


@pytest.mark.parity("manager.transfer_cache_async")
def test_transfers_are_checked_in_order():
    for wrong, error, text in CHECKS:
        refused(error, text, **{**GOOD, **wrong})
    for (first, error, text), (second, _, _) in itertools.combinations(CHECKS, 2):
        if first.keys() != second.keys() and not all("block_indices" in name for name in {*first, *second}):
            refused(error, text, **{**GOOD, **second, **first})


def test_a_size_of_blocks_needs_blocks():
    size = {"src_block_indices": None, "dst_block_indices": None, "dst_block_memory_size": 8}
    refused(LLMException, "dst_block_memory_size needs dst_block_indices", **{**GOOD, **size})
    refused(LLMException, "dst_block_memory_size needs dst_block_indices", **{**GOOD, **size, "src_cache": UNEVEN})
    refused(TypeError, "transfer_configs only support", **{**GOOD, **size, "transfer_configs": 1})


@pytest.mark.parity("manager.transfer_cache_async")
@pytest.mark.parametrize("configs", [[raw()], [keyed(), raw()]])
def test_one_sided_mode_takes_keys_only(configs):
    refused(TypeError, "only support TransferWithCacheKeyConfig", ONE_SIDED, **{**GOOD, "transfer_configs": configs})


@pytest.mark.parametrize("config", [other_length(), no_destination()])
def test_the_setters_of_a_config_can_not_make_ranges_differ(config):
    refused(LLMException, "equally long", ONE_SIDED, **{**GOOD, "transfer_configs": [config]})


def test_a_destination_that_is_no_number_is_refused():
    config = keyed(BlocksCacheKey(-1))
    refused(TypeError, "cluster_id should be in range", ONE_SIDED, **{**GOOD, "transfer_configs": [config]})
    config = keyed()
    config.dst_cluster_id = -1
    refused(ValueError, "dst_cluster_id should be in range", ONE_SIDED, **{**GOOD, "transfer_configs": [config]})
