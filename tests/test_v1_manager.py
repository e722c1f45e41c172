# SPDX-License-Identifier: Apache-2.0
"""KvCacheManager, the manager outside cache-manager mode: a PROMPT that binds keys and a DECODER that pulls."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import numpy as np
import pytest

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    KvCache,
    KvCacheManager,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Placement,
)
from llm_datadist.v2.cache_manager import CacheManager
from older import (
    BUDGET,
    DECODER,
    FILL_THE_BUDGET,
    KEY,
    NOT_EXIST,
    NOT_YET_LINK,
    OFFER,
    OFFER_BLOCKS,
    PARAM_INVALID,
    PLACEHOLDER,
    PROMPT,
    SERVE,
    SUCCESS,
    TRY_TO_ALLOCATE,
    U64MAX,
    content,
    fill,
    opened,
)
from peers import ADDRESS, Background, Peer, cluster, desc, pattern, refused


@pytest.fixture
def prompt(remote):
    """The prompt's process and the address where it listens."""
    yield remote, remote.run(SERVE)
    remote.run("del end.kv_caches[:]")


@pytest.fixture
def solo():
    """A manager without a peer, of the role that is asked for."""
    engines = []

    def make(role, **given):
        engines.append(opened(role, **given))
        return engines[-1].kv_cache_manager

    yield make
    for engine in engines:
        engine.finalize()


# --- between two processes


@pytest.mark.parity("kv_manager.owning", "kv_manager.pulls")
def test_the_documented_example(prompt):
    process, address = prompt
    described = CacheDesc(4, [4, 256], DataType.DT_FLOAT16)
    process.run(OFFER, described=described, keys=[CacheKey(PROMPT, n) for n in range(4)], number=1)

    decoder = LLMDataDist(LLMRole.DECODER, DECODER)
    decoder.init({"ge.exec.deviceId": "0"})
    assert decoder.link_clusters([cluster(address, PROMPT)], 5000) == (SUCCESS, [SUCCESS])
    cache = decoder.kv_cache_manager.allocate_cache(described)
    decoder.kv_cache_manager.pull_cache(CacheKey(PROMPT, 2), cache, 1)
    for tensor in range(4):
        assert np.array_equal(content(cache, tensor)[512:1024], pattern(1, tensor, 2048)[1024:1536])
    assert decoder.unlink_clusters([cluster(address, PROMPT)], 5000) == (SUCCESS, [SUCCESS])
    refused(decoder.kv_cache_manager.pull_cache, CacheKey(PROMPT, 3), cache, code=NOT_YET_LINK)
    decoder.finalize()
    assert not decoder._is_initialized


@pytest.mark.parity("kv_manager.pulls")
def test_a_pull_releases_its_key_and_a_prefix_key_stays(prompt, decoder):
    process, address = prompt
    prefix = CacheKey(PROMPT, req_id=U64MAX, prefix_id=7)
    process.run(OFFER, described=desc([2, 8]), keys=[KEY], number=1)
    cache_id = process.run(OFFER, described=desc([2, 8]), keys=[PLACEHOLDER, prefix], number=2)
    assert decoder.link_clusters([cluster(address, PROMPT)], 5000)[0] is SUCCESS
    manager = decoder.kv_cache_manager
    cache = manager.allocate_cache(desc([2, 8]))
    manager.pull_cache(KEY, cache, 0)
    assert np.array_equal(content(cache)[:8], pattern(1, 0, 16)[:8])
    refused(manager.pull_cache, KEY, cache, code=NOT_EXIST)
    for _ in range(2):
        manager.pull_cache(prefix, cache, 1)
        manager.pull_cache(CacheKeyByIdAndIndex(PROMPT, cache_id, 1), cache, 1)
    assert np.array_equal(content(cache)[8:], pattern(2, 0, 16)[8:])


@pytest.mark.parity("kv_manager.pulls")
@pytest.mark.parametrize(("seq_len_dim", "moved"), [(-1, 8), (0, 8), (1, 5)])
def test_a_pull_by_key_moves_the_whole_row_unless_the_sequence_is_behind_the_batch(prompt, decoder, seq_len_dim, moved):
    process, address = prompt
    described = CacheDesc(1, [2, 8], DataType.DT_INT8, seq_len_dim_index=seq_len_dim)
    cache_id = process.run(OFFER, described=described, keys=[PLACEHOLDER, KEY], number=1)
    assert decoder.link_clusters([cluster(address, PROMPT)], 5000)[0] is SUCCESS
    manager = decoder.kv_cache_manager
    cache = manager.allocate_cache(desc([2, 10]))
    fill(cache, 50)
    expected = pattern(50, 0, 20)
    manager.pull_cache(CacheKeyByIdAndIndex(PROMPT, cache_id, 0), cache, 0, 5)  # by id: what is asked for
    expected[:5] = pattern(1, 0, 16)[:5]
    assert np.array_equal(content(cache), expected)
    manager.pull_cache(KEY, cache, 1, 5)
    expected[10 : 10 + moved] = pattern(1, 0, 16)[8 : 8 + moved]
    assert np.array_equal(content(cache), expected)


def test_a_whole_row_that_does_not_fit_moves_nothing(prompt, decoder):
    process, address = prompt
    process.run(OFFER, described=desc([1, 8]), keys=[KEY], number=1)
    assert decoder.link_clusters([cluster(address, PROMPT)], 5000)[0] is SUCCESS
    cache = decoder.kv_cache_manager.allocate_cache(desc([1, 6]))
    fill(cache, 50)
    refused(decoder.kv_cache_manager.pull_cache, KEY, cache, 0, 4)
    assert np.array_equal(content(cache), pattern(50, 0, 6))


@pytest.mark.parity("kv_manager.pulls")
def test_offsets_move_what_they_say_and_release_nothing(prompt, decoder):
    process, address = prompt
    process.run(OFFER, described=desc([2, 16], 3), keys=[PLACEHOLDER, KEY], number=1)
    assert decoder.link_clusters([cluster(address, PROMPT)], 5000)[0] is SUCCESS
    manager = decoder.kv_cache_manager
    cache = manager.allocate_cache(desc([3, 12], 3))
    fill(cache, 50)
    expected = [pattern(50, tensor, 36) for tensor in range(3)]
    for offsets, size, src, dst, moved in [
        ({"src_cache_offset": 3, "dst_cache_offset": 2}, 7, 3, 2, 7),
        ({"dst_cache_offset": 9}, -1, 0, 9, 3),
        ({"src_cache_offset": 4}, -1, 4, 0, 12),
        ({"src_cache_offset": 0}, 1, 0, 0, 1),  # an offset of 0 counts as given
    ]:
        manager.pull_cache(KEY, cache, 2, size, **offsets)
        for tensor in range(3):
            expected[tensor][24 + dst : 24 + dst + moved] = pattern(1, tensor, 32)[16 + src : 16 + src + moved]
            assert np.array_equal(content(cache, tensor), expected[tensor])
    for offsets, size in [
        ({"dst_cache_offset": 12}, -1),
        ({"dst_cache_offset": 2**63 - 1}, -1),
        ({"dst_cache_offset": 5}, 8),
        ({"src_cache_offset": 5}, -1),
        ({"src_cache_offset": 16}, 1),
        ({"src_cache_offset": 2**63 - 1}, 1),
    ]:
        refused(manager.pull_cache, KEY, cache, 2, size, **offsets)
    manager.pull_cache(KEY, manager.allocate_cache(desc([1, 16], 3)))  # which releases it
    refused(manager.pull_cache, KEY, cache, 2, 1, src_cache_offset=0, code=NOT_EXIST)
    for tensor in range(3):
        assert np.array_equal(content(cache, tensor), expected[tensor])


def test_a_pull_by_id_with_offsets_keeps_the_key_that_one_without_releases(prompt, decoder):
    process, address = prompt
    cache_id = process.run(OFFER, described=desc([1, 8]), keys=[KEY], number=1)
    assert decoder.link_clusters([cluster(address, PROMPT)], 5000)[0] is SUCCESS
    manager = decoder.kv_cache_manager
    cache = manager.allocate_cache(desc([1, 8]))
    by_id = CacheKeyByIdAndIndex(PROMPT, cache_id)
    manager.pull_cache(by_id, cache, size=1, src_cache_offset=0)
    manager.pull_cache(by_id, cache)
    refused(manager.pull_cache, KEY, cache, code=NOT_EXIST)
    assert np.array_equal(content(cache), pattern(1, 0, 8))


def test_keys_of_one_allocation_are_looked_at_together(prompt, decoder):
    process, address = prompt
    keys = [CacheKey(PROMPT, 1, 5), CacheKey(PROMPT, 2, 6), CacheKey(PROMPT, 1, 7)]
    process.run(OFFER, described=desc([3, 8]), keys=keys, number=1)
    assert decoder.link_clusters([cluster(address, PROMPT)], 5000)[0] is SUCCESS
    manager = decoder.kv_cache_manager
    cache = manager.allocate_cache(desc([1, 8]))
    refused(manager.pull_cache, CacheKey(PROMPT, 2, 6), cache, code=NOT_EXIST)  # all have the first one's model
    for key, row in ((CacheKey(PROMPT, 1, 5), 2), (CacheKey(PROMPT, 2, 5), 1)):  # the last row of a repeated key
        manager.pull_cache(key, cache)
        assert np.array_equal(content(cache), pattern(1, 0, 24)[8 * row : 8 * row + 8])
    prefixes = [CacheKey(PROMPT, 3), CacheKey(PROMPT, U64MAX, prefix_id=4)]
    process.run(OFFER, described=desc([2, 8]), keys=prefixes, number=2)
    refused(manager.pull_cache, CacheKey(PROMPT, 3), cache, code=NOT_EXIST)  # all are prefix keys, as the last one is
    manager.pull_cache(CacheKey(PROMPT, U64MAX, prefix_id=3), cache)
    assert np.array_equal(content(cache), pattern(2, 0, 16)[:8])


@pytest.mark.parity("kv_manager.owning", "kv_manager.pulls")
def test_blocks_are_pulled_by_key_and_by_id(prompt, decoder):
    process, address = prompt
    cache_id = process.run(OFFER_BLOCKS, described=desc([6, 4], 2), key=BlocksCacheKey(PROMPT, 3), number=1)
    assert decoder.link_clusters([cluster(address, PROMPT)], 5000)[0] is SUCCESS
    manager = decoder.kv_cache_manager
    cache = manager.allocate_blocks_cache(desc([4, 4], 2))
    fill(cache, 50)
    expected = [pattern(50, tensor, 16).reshape(4, 4) for tensor in range(2)]
    for key, src, dst in [(BlocksCacheKey(PROMPT, 3), [5, 1], [0, 3]), (CacheKeyByIdAndIndex(PROMPT, cache_id), [0], [1])]:
        for _ in range(2):  # which releases nothing
            manager.pull_blocks(key, cache, src, dst)
        for tensor in range(2):
            expected[tensor][dst] = pattern(1, tensor, 24).reshape(6, 4)[src]
            assert np.array_equal(content(cache, tensor).reshape(4, 4), expected[tensor])
    refused(manager.pull_blocks, BlocksCacheKey(PROMPT, 3), cache, [6], [0])
    refused(manager.pull_blocks, BlocksCacheKey(PROMPT, 4), cache, [0], [0], code=NOT_EXIST)


def test_both_ends_may_have_the_same_cluster_id(transport):
    with Peer() as process:
        address = process.run(SERVE.replace("LLMRole.PROMPT, 1", "LLMRole.PROMPT, 0"))
        process.run(OFFER, described=desc([1, 8]), keys=[CacheKey(0, 1)], number=1)
        decoder = opened(LLMRole.DECODER, 0)
        manager = decoder.kv_cache_manager
        cache = manager.allocate_cache(desc([1, 8]))
        refused(manager.pull_cache, CacheKey(0, 1), cache, code=NOT_YET_LINK)
        assert decoder.link_clusters([cluster(address, 0)], 5000) == (SUCCESS, [SUCCESS])
        manager.pull_cache(CacheKey(0, 1), cache)
        assert np.array_equal(content(cache), pattern(1, 0, 8))
        decoder.finalize()
        process.run("del end.kv_caches[:]")


def test_memory_is_there_again_as_soon_as_a_peer_has_pulled(prompt, decoder):
    process, address = prompt
    process.run(FILL_THE_BUDGET, described=desc([1, 15 << 16]), keys=[KEY], number=1)
    assert process.run(TRY_TO_ALLOCATE, described=desc([1, 15 << 16])) is LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY
    assert decoder.link_clusters([cluster(address, PROMPT)], 5000)[0] is SUCCESS
    cache = decoder.kv_cache_manager.allocate_cache(desc([1, 15 << 16]))
    decoder.kv_cache_manager.pull_cache(KEY, cache)
    assert process.run(TRY_TO_ALLOCATE, described=desc([1, 15 << 16])) is SUCCESS
    assert np.array_equal(content(cache), pattern(1, 0, 15 << 16))


RETRY = """
import threading
from llm_datadist import LLMException, LLMStatusCode
end.refusals, end.kept = threading.Event(), []

def retry():
    while not end.kept:
        try:
            end.kept.append(end.engine.kv_cache_manager.allocate_cache(described))
        except LLMException as exc:
            if exc.status_code is not LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY:
                raise
            end.refusals.set()

end.retrying = threading.Thread(target=retry, daemon=True)
end.retrying.start()
assert end.refusals.wait(30)
"""


def test_a_loop_that_waits_for_memory_goes_on_as_soon_as_a_peer_has_pulled(prompt, decoder):
    """The pull releases the key, and the prompt's next attempt has the memory, whatever else it does meanwhile."""
    process, address = prompt
    whole = desc([1, 15 << 16])
    process.run(FILL_THE_BUDGET, described=whole, keys=[KEY], number=1)
    assert decoder.link_clusters([cluster(address, PROMPT)], 5000)[0] is SUCCESS
    cache = decoder.kv_cache_manager.allocate_cache(whole)
    process.run(RETRY, described=whole)
    assert process.run("result = (end.retrying.is_alive(), len(end.kept))") == (True, 0)
    decoder.kv_cache_manager.pull_cache(KEY, cache)
    assert process.run("end.retrying.join(30); result = (end.retrying.is_alive(), len(end.kept))") == (False, 1)
    assert np.array_equal(content(cache), pattern(1, 0, 15 << 16))
    process.run("end.kept.clear()")


def test_layers_are_pulled_one_by_one(prompt, decoder):
    process, address = prompt
    process.run(OFFER, described=desc([1, 8], 4), keys=[KEY], number=1)
    assert decoder.link_clusters([cluster(address, PROMPT)], 5000)[0] is SUCCESS
    manager = decoder.kv_cache_manager
    cache = manager.allocate_cache(desc([1, 8], 4))
    for layer in (1, 0):
        one = range(layer, layer + 1)
        manager.pull_cache(KEY, cache, src_layer_range=one, dst_layer_range=one)
    for tensor in range(4):
        assert np.array_equal(content(cache, tensor), pattern(1, tensor, 8))
    refused(manager.pull_cache, KEY, cache, code=NOT_EXIST)


def test_pull_into_a_deallocated_cache_is_not_exist(prompt, decoder):
    process, address = prompt
    process.run(OFFER, described=desc([1, 8]), keys=[KEY], number=1)
    assert decoder.link_clusters([cluster(address, PROMPT)], 5000)[0] is SUCCESS
    cache = decoder.kv_cache_manager.allocate_cache(desc([1, 8]))
    decoder.kv_cache_manager.deallocate_cache(cache)
    refused(decoder.kv_cache_manager.pull_cache, KEY, cache, code=NOT_EXIST)


@pytest.mark.parametrize("decoder", [{"sync_kv_timeout": 300}], indirect=True)
def test_a_deadline_is_the_older_code(prompt, decoder):
    process, address = prompt
    process.run(OFFER, described=desc([1, 8]), keys=[KEY], number=1)
    assert decoder.link_clusters([cluster(address, PROMPT)], 5000)[0] is SUCCESS
    manager = decoder.kv_cache_manager
    cache = manager.allocate_cache(desc([1, 8]))
    with process.stopped():
        call = Background(manager.pull_cache, KEY, cache)
        failure = refused(call.result, code=LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT)
        assert (failure.operation, failure.peer) == ("pull_cache", PROMPT)
        assert 0.2 < call.seconds < 0.3 + 1
    manager.pull_cache(KEY, cache)
    assert np.array_equal(content(cache), pattern(1, 0, 8))


@pytest.mark.parity("kv_manager.owning")
def test_a_removed_key_can_not_be_pulled(prompt, decoder):
    process, address = prompt
    process.run(OFFER, described=desc([1, 8]), keys=[KEY], number=1)
    assert decoder.link_clusters([cluster(address, PROMPT)], 5000)[0] is SUCCESS
    process.run("end.engine.kv_cache_manager.remove_cache_key(key)", key=KEY)
    cache = decoder.kv_cache_manager.allocate_cache(desc([1, 8]))
    refused(decoder.kv_cache_manager.pull_cache, KEY, cache, code=NOT_EXIST)


def test_a_cache_that_goes_out_of_scope_answers_until_its_key_is_released(prompt, decoder):
    process, address = prompt
    process.run(OFFER, described=desc([1, 8]), keys=[KEY], number=1)
    process.run(
        "import gc; del end.kv_caches[:]; gc.collect(); end.engine.kv_cache_manager.remove_cache_key(other)",
        other=CacheKey(1, 99),
    )
    assert decoder.link_clusters([cluster(address, PROMPT)], 5000)[0] is SUCCESS
    cache = decoder.kv_cache_manager.allocate_cache(desc([1, 8]))
    decoder.kv_cache_manager.pull_cache(KEY, cache)
    assert np.array_equal(content(cache), pattern(1, 0, 8))
    refused(decoder.kv_cache_manager.pull_cache, KEY, cache, code=NOT_EXIST)


# --- roles and arguments


@pytest.mark.parity("kv_manager.owning")
@pytest.mark.parametrize("role", [LLMRole.DECODER, LLMRole.MIX])
def test_only_a_prompt_allocates_with_keys_or_removes_them(solo, role):
    manager = solo(role)
    refused(manager.allocate_cache, desc([1, 8]), [KEY])
    refused(manager.remove_cache_key, KEY)
    refused(manager.remove_cache_key, "the role is looked at first")
    assert manager.allocate_cache(desc([1, 8])).per_device_tensor_addrs


@pytest.mark.parity("kv_manager.pulls")
@pytest.mark.parametrize("role", [LLMRole.PROMPT, LLMRole.MIX])
def test_only_a_decoder_pulls(solo, role):
    manager = solo(role)
    refused(manager.pull_cache, KEY, manager.allocate_cache(desc([1, 8])))
    refused(manager.pull_cache, "the role is looked at first", None)


def test_a_role_may_be_switched_by_the_engine(solo):
    manager = solo(LLMRole.DECODER)
    manager._switch_role(LLMRole.PROMPT)
    manager.allocate_cache(desc([1, 8]), [KEY])
    manager.remove_cache_key(KEY)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((3, 3), TypeError),
        ((desc([1, 8], tensors=0), 3), TypeError),
        ((desc([1, 8], tensors=0), [BlocksCacheKey(1)]), TypeError),
        ((desc([1, 8], tensors=0, placement=Placement.HOST),), LLMException),
        ((desc([1, 8], placement=Placement.HOST),), LLMException),
        ((desc([0, 8]),), LLMException),
        ((desc([1, 8]), [KEY, CacheKey(1, 2)]), LLMException),
    ],
)
def test_allocate_refuses(solo, arguments, error):
    refused(solo(LLMRole.PROMPT).allocate_cache, *arguments, error=error)


PULLS = [
    ((BlocksCacheKey(1), "cache"), {}, TypeError, None),
    ((KEY, 3), {}, TypeError, None),
    ((KEY, "host", -1, "1"), {}, LLMException, PARAM_INVALID),
    ((KEY, "cache", -1, "1"), {}, TypeError, None),
    ((KEY, "cache", -1, 0), {}, ValueError, None),
    ((KEY, "cache", 1.0), {}, TypeError, None),
    ((KEY, "cache", 0, 0), {}, LLMException, PARAM_INVALID),
    ((KEY, "cache", 0, -2), {}, LLMException, PARAM_INVALID),
    ((CacheKey(1, U64MAX), "cache"), {}, LLMException, PARAM_INVALID),
    ((CacheKey(1, 1, prefix_id=1), "cache"), {}, LLMException, PARAM_INVALID),
    ((KEY, "cache"), {"tensor_num_per_layer": 0}, LLMException, PARAM_INVALID),
    ((KEY, "cache"), {"tensor_num_per_layer": -1}, ValueError, None),
    ((KEY, "cache"), {"tensor_num_per_layer": "2"}, TypeError, None),
    ((KEY, "cache"), {"src_layer_range": [0]}, TypeError, None),
    ((KEY, "cache", 1), {}, LLMException, PARAM_INVALID),
    ((KEY, "cache", 0, 9), {}, LLMException, PARAM_INVALID),
    ((KEY, "cache"), {}, LLMException, NOT_YET_LINK),
    ((CacheKey(DECODER, 1), "cache"), {}, LLMException, NOT_YET_LINK),
    ((KEY, "cache", 0, 9), {"src_cache_offset": -1}, ValueError, None),
    ((KEY, "cache", 0, 0), {"src_cache_offset": -1}, LLMException, PARAM_INVALID),
    ((CacheKey(1, U64MAX), "cache"), {"dst_cache_offset": 2**63}, ValueError, None),
    ((KEY, "cache"), {"dst_cache_offset": "0"}, TypeError, None),
    ((KEY, "cache"), {"dst_cache_offset": 8}, LLMException, PARAM_INVALID),
    ((KEY, "cache"), {"src_cache_offset": None}, LLMException, NOT_YET_LINK),
]


@pytest.mark.parametrize(("arguments", "kwargs", "error", "code"), PULLS)
def test_pull_refuses_before_a_byte_moves(solo, arguments, kwargs, error, code):
    manager = solo(LLMRole.DECODER)
    cache = manager.allocate_cache(desc([1, 8]))
    fill(cache, 50)
    host = KvCache.create_cpu_cache(desc([1, 8], placement=Placement.HOST), [1])
    named = {"cache": cache, "host": host}
    given = [named.get(each, each) if isinstance(each, str) and each in named else each for each in arguments]
    refused(manager.pull_cache, *given, error=error, code=code, **kwargs)
    assert np.array_equal(content(cache), pattern(50, 0, 8))


@pytest.mark.parametrize(
    "manager",
    [
        pytest.param(CacheManager, marks=pytest.mark.parity("manager.check_cache_key")),
        pytest.param(KvCacheManager, marks=pytest.mark.parity("kv_manager.check_cache_key")),
    ],
)
def test_check_cache_key(manager):
    for good in (KEY, CacheKey(1, U64MAX, prefix_id=1)):
        manager.check_cache_key(good)
    for bad in (CacheKey(1, U64MAX), CacheKey(1, 1, prefix_id=1)):
        refused(manager.check_cache_key, bad)


# --- memory


@pytest.mark.parity("kv_manager.owning")
def test_the_budget_is_what_the_options_say(solo):
    manager = solo(LLMRole.PROMPT, budget=BUDGET, mem_utilization=0.5)
    caches = [manager.allocate_cache(desc([1, 1 << 16])) for _ in range(8)]
    failure = refused(manager.allocate_cache, desc([1]), code=LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY)
    assert failure.operation == "allocate_cache" and failure.hint
    manager.deallocate_cache(caches.pop())
    assert manager.allocate_cache(desc([1])).cache_id


def test_the_default_budget_is_there():
    engine = LLMDataDist(LLMRole.DECODER, 1)
    engine.init({"ge.exec.deviceId": "0"})
    manager = engine.kv_cache_manager
    cache = manager.allocate_cache(desc([1, 64 << 20]))
    assert len(cache.per_device_tensor_addrs) == 1
    engine.finalize()
    assert not manager.is_initialized()


@pytest.mark.parity("kv_manager.owning")
def test_a_deallocated_cache_is_empty_and_unknown(solo):
    manager = solo(LLMRole.PROMPT)
    cache = manager.allocate_cache(desc([1, 8], 3))
    assert repr(cache) == "KvCache(cache_id = 1, num_devices = 1)"
    assert len(cache.per_device_tensor_addrs[0]) == 3
    manager.deallocate_cache(cache)
    assert cache.per_device_tensor_addrs == []
    refused(manager.deallocate_cache, cache, code=NOT_EXIST)
    refused(manager.deallocate_cache, 3, error=TypeError)
    refused(manager.deallocate_cache, KvCache.create_cpu_cache(desc([1], placement=Placement.HOST), [1]))


@pytest.mark.parity("type.kv_cache_del")
def test_a_cache_that_goes_out_of_scope_is_freed_by_the_next_call(solo):
    manager = solo(LLMRole.PROMPT)
    whole = desc([1, 15 << 16])
    for _ in range(10):
        cache = manager.allocate_cache(whole)
        del cache
        gc.collect()
        assert len(manager._released.ids) == 1  # only queued: __del__ may run anywhere
    manager.remove_cache_key(KEY)
    assert not manager._released.ids


def test_a_cache_may_go_out_of_scope_on_any_thread(solo):
    manager = solo(LLMRole.PROMPT)
    whole = desc([1, 15 << 16])
    for _ in range(5):
        box = [manager.allocate_cache(whole)]
        thread = threading.Thread(target=box.clear)
        thread.start()
        thread.join()
    assert manager.allocate_cache(whole).cache_id == 6


def test_a_deallocated_cache_is_not_freed_again_when_it_goes_out_of_scope(solo):
    manager = solo(LLMRole.PROMPT)
    cache = manager.allocate_cache(desc([1, 8]))
    manager.deallocate_cache(cache)
    del cache
    gc.collect()
    assert not manager._released.ids


def test_a_copy_of_a_cache_object_does_no_harm_to_the_call_that_frees_it(solo):
    manager = solo(LLMRole.PROMPT)
    whole = desc([1, 15 << 16])
    both = [manager.allocate_cache(whole)]
    both.append(copy.copy(both[0]))
    both.clear()
    gc.collect()
    assert list(manager._released.ids) == [1, 1]
    kept = manager.allocate_cache(whole)
    assert kept.cache_id == 2
    assert not manager._released.ids


@pytest.mark.parity("type.kv_cache_del")
def test_a_cache_may_outlive_its_engine():
    engine = opened(LLMRole.PROMPT)
    manager = engine.kv_cache_manager
    cache = manager.allocate_cache(desc([1, 8]))
    engine.finalize()
    refused(manager.deallocate_cache, cache)
    del cache
    gc.collect()
    assert not manager._released.ids
    refused(manager.allocate_cache, desc([1, 8]), code=LLMStatusCode.LLM_FAILED)


def test_a_cache_does_not_keep_its_engine():
    engine = opened(LLMRole.PROMPT)
    cache = engine.kv_cache_manager.allocate_cache(desc([1, 8]))
    alive = [weakref.ref(each) for each in (engine._llm_datadist, engine._llm_datadist.native, engine.kv_cache_manager)]
    engine.finalize()
    del engine
    gc.collect()
    assert [each() for each in alive] == [None] * 3
    assert cache.cache_id == 1


def test_several_listen_addresses_are_aliases_of_the_first():
    engine = LLMDataDist(LLMRole.PROMPT, 1)
    engine.init({"ge.exec.deviceId": "0;1", "llm.listenIpInfo": f"{ADDRESS};127.0.0.1:1"})
    assert engine.listen_address.startswith("127.0.0.1:")
    engine.finalize()
