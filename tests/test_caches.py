# SPDX-License-Identifier: Apache-2.0
"""Registering, allocating and freeing caches: ids, keys, pools, and what is left when they are gone."""

from __future__ import annotations

import json

import numpy as np
import pytest

from links import THEIRS, link
from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Placement,
)
from peers import ADDRESS, POOL, desc, options, pattern, refused

SUCCESS = LLMStatusCode.LLM_SUCCESS
PARAM_INVALID = LLMStatusCode.LLM_PARAM_INVALID
OUT_OF_MEMORY = LLMStatusCode.LLM_OUT_OF_MEMORY
NOT_EXIST = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
FEATURE_NOT_ENABLED = LLMStatusCode.LLM_FEATURE_NOT_ENABLED
FAILED = LLMStatusCode.LLM_FAILED

OWNER = THEIRS  # cluster id
U64MAX = 2**64 - 1
PAGE = 1 << 16
HOST = Placement.HOST
ONE_TENSOR = desc([2, 4])
KEY = CacheKey(OWNER, req_id=1)


@pytest.fixture
def manager():
    """The manager of an engine without peers."""
    engine = LLMDataDist(LLMRole.MIX, OWNER)
    engine.init(options(mem_pool_cfg=json.dumps({"memory_size": 16 * PAGE})))
    yield engine.cache_manager
    engine.finalize()


@pytest.fixture
def pair(local, remote):
    """An owner here, and an asker elsewhere that has a cache "take" of 4 rows of 4 bytes."""
    link(remote, local)
    remote.add("take", desc([4, 4]), 50)
    return local, remote


@pytest.fixture
def one_sided(local, remote):
    """An owner here, and an asker elsewhere, without caches."""
    link(remote, local, one_sided=True)
    return local, remote


def asks(asker, key, row=0, tensors="take"):
    """Pull by key into a row and return the bytes of the row."""
    asker.manage("pull_cache", key, tensors, row)
    return asker.content(tensors)[0][4 * row : 4 * row + 4]


def bound(asker, key):
    """Tell whether the owner has the key, without releasing it: a pull that asks for too much fails behind the look-up."""
    asker.add("too large", desc([1, 4096]), 60)
    failure = refused_with_any_code(asker.manage, "pull_cache", key, "too large")
    asker.drop("too large")
    assert failure.status_code in (PARAM_INVALID, NOT_EXIST), failure
    return failure.status_code is PARAM_INVALID


def refused_with_any_code(call, *args):
    with pytest.raises(LLMException) as failure:
        call(*args)
    return failure.value


def allocate(owner, name, number, keys=(), shape=(2, 4), **kwargs):
    return owner.add(name, desc(shape), number, keys, owned=True, **kwargs)


# --- arguments, in the order in which they are looked at

REGISTER = [
    (([1], [1]), {}, TypeError),  # desc
    ((ONE_TENSOR, (1,)), {}, TypeError),
    ((ONE_TENSOR, 1), {}, TypeError),
    ((ONE_TENSOR, ["1"]), {}, TypeError),
    ((ONE_TENSOR, [1.0]), {}, TypeError),
    ((ONE_TENSOR, [1]), {"remote_accessible": 1}, TypeError),
    ((ONE_TENSOR, []), {"remote_accessible": "yes"}, TypeError),  # before the empty list
    ((ONE_TENSOR, []), {}, LLMException),
    ((ONE_TENSOR, [1, 2]), {}, LLMException),
    ((desc([2, 4], tensors=2), [1]), {}, LLMException),
    ((ONE_TENSOR, [2**64]), {}, TypeError),
    ((ONE_TENSOR, [-1]), {}, TypeError),
    ((ONE_TENSOR, [0]), {}, LLMException),
    ((desc([0, 4]), [1]), {}, LLMException),
    ((desc([2, -1]), [1]), {}, LLMException),
    ((desc([2**62, 2**62]), [1]), {}, LLMException),
    ((desc([1] * 32), [1]), {}, LLMException),
]


@pytest.mark.parity("manager.register_cache", "manager.register_blocks_cache")
@pytest.mark.parametrize(("args", "kwargs", "error"), REGISTER)
@pytest.mark.parametrize("call", ["register_cache", "register_blocks_cache"])
def test_register_refuses(manager, call, args, kwargs, error):
    refused(getattr(manager, call), *args, error=error, **kwargs)


@pytest.mark.parity("manager.register_cache", "manager.allocate_cache")
@pytest.mark.parametrize("keys", [KEY, [3], {KEY}, [BlocksCacheKey(1)], [KEY, None]])
@pytest.mark.parametrize("call", ["register_cache", "allocate_cache"])
def test_the_keys_of_a_contiguous_cache_are_a_list_of_cache_keys(manager, call, keys):
    given = ([],) if call == "register_cache" else ()  # types before anything else
    refused(getattr(manager, call), ONE_TENSOR, *given, keys, error=TypeError)


@pytest.mark.parity("manager.register_blocks_cache", "manager.allocate_blocks_cache")
@pytest.mark.parametrize("key", [KEY, [BlocksCacheKey(1)], 3])
@pytest.mark.parametrize("call", ["register_blocks_cache", "allocate_blocks_cache"])
def test_the_key_of_a_blocks_cache_is_one_blocks_cache_key(manager, call, key):
    given = ([],) if call == "register_blocks_cache" else ()
    refused(getattr(manager, call), ONE_TENSOR, *given, key, error=TypeError)


@pytest.mark.parametrize("model_id", [-1, 2**64])
def test_a_blocks_key_beyond_64_bits_is_a_type_error(manager, model_id):
    refused(manager.allocate_blocks_cache, ONE_TENSOR, BlocksCacheKey(1, model_id), error=TypeError)
    refused(manager.register_blocks_cache, ONE_TENSOR, [1], BlocksCacheKey(1, model_id), error=TypeError)


@pytest.mark.parity("manager.allocate_cache", "manager.allocate_blocks_cache")
@pytest.mark.parametrize("call", ["allocate_cache", "allocate_blocks_cache"])
def test_allocate_refuses(manager, call):
    allocation = getattr(manager, call)
    refused(allocation, 3, error=TypeError)
    refused(allocation, desc([2, 4], tensors=0))
    for shape in ([0, 4], [2, -1], [2**62, 2**62], [1] * 32):
        refused(allocation, desc(shape))
    for shape in ([2**31, 2**31], [1 << 30]):
        refused(allocation, desc(shape), code=OUT_OF_MEMORY)
    for tensors in (17, 1 << 20, 2**32 - 1):  # neither time nor memory grow with it
        refused(allocation, desc([1, 1], tensors=tensors), code=OUT_OF_MEMORY)


@pytest.mark.parametrize("call", ["allocate_cache", "allocate_blocks_cache"])
def test_a_shape_has_1_to_31_dimensions(manager, call):
    for shape in ([1], [1] * 31):
        assert getattr(manager, call)(desc(shape)).tensor_addrs


@pytest.mark.parametrize("call", ["unregister_cache"])
def test_unregister_takes_an_int64(manager, call):
    for bad in (None, "1", 1.0, ONE_TENSOR):
        refused(manager.unregister_cache, bad, error=TypeError)
    for bad in (2**63, -(2**63) - 1):
        refused(manager.unregister_cache, bad, error=ValueError)


def test_deallocate_takes_a_cache_of_its_kind(manager):
    rows, blocks = manager.allocate_cache(ONE_TENSOR), manager.allocate_blocks_cache(ONE_TENSOR)
    for call, other in ((manager.deallocate_cache, blocks), (manager.deallocate_blocks_cache, rows)):
        refused(call, 3, error=TypeError)
        refused(call, other)
    refused(manager.remove_cache_key, BlocksCacheKey(1), error=TypeError)
    refused(manager.remove_cache_key, 3, error=TypeError)


# --- ids


def test_ids_count_from_1_over_all_kinds(manager):
    memory = np.zeros(8, np.int8)
    made = [
        manager.allocate_cache(ONE_TENSOR),
        manager.register_cache(ONE_TENSOR, [memory.ctypes.data]),
        manager.allocate_blocks_cache(ONE_TENSOR),
        manager.register_blocks_cache(ONE_TENSOR, [memory.ctypes.data]),
    ]
    assert [cache.cache_id for cache in made] == [1, 2, 3, 4]
    assert [cache.is_blocks_cache for cache in made] == [False, False, True, True]
    manager.unregister_cache(4)
    assert manager.register_cache(ONE_TENSOR, [1]).cache_id == 5  # never used again


FAILED_ATTEMPTS = {
    "shape without a size": (lambda m: refused(m.register_cache, desc([0, 4]), [1]), True),
    "pool exhausted": (lambda m: refused(m.allocate_cache, desc([1 << 30]), code=OUT_OF_MEMORY), True),
    "key in use": (lambda m: refused(m.allocate_cache, ONE_TENSOR, [KEY, KEY]), True),
    "Python says no": (lambda m: refused(m.register_cache, ONE_TENSOR, [0]), False),
    "rank": (lambda m: refused(m.register_cache, desc([1] * 32), [1]), False),
    "address count": (lambda m: refused(m.register_blocks_cache, ONE_TENSOR, [1, 2]), False),
}


@pytest.mark.parametrize("name", FAILED_ATTEMPTS)
def test_an_id_is_used_up_by_attempts_that_reach_the_counter(manager, name):
    attempt, uses_up = FAILED_ATTEMPTS[name]
    attempt(manager)
    assert manager.register_cache(ONE_TENSOR, [1]).cache_id == (2 if uses_up else 1)


# --- what a Cache is


@pytest.mark.parity("manager.allocate_cache", "manager.allocate_blocks_cache")
@pytest.mark.parametrize("placement", Placement)
@pytest.mark.parametrize("blocks", [False, True])
def test_an_allocated_cache_has_memory_of_its_own(manager, placement, blocks):
    allocation = manager.allocate_blocks_cache if blocks else manager.allocate_cache
    made = [allocation(desc([2, 100], tensors=3, placement=placement)) for _ in range(2)]
    addrs = sorted(addr for cache in made for addr in cache.tensor_addrs)
    assert len(addrs) == 6 and all(after - before >= 200 for before, after in zip(addrs, addrs[1:]))
    assert repr(made[0]) == f"Cache(cache_id = 1, device_tensor_addrs = 3, is_blocks_cache = {blocks})"
    assert made[0].cache_desc.placement is placement


def test_the_kind_belongs_to_the_call_and_not_to_the_desc(pair):
    owner, asker = pair
    shared = desc([2, 4])
    owner.add("blocks", shared, 1, blocks=True, owned=True)
    owner.add("rows", shared, 2, [CacheKey(OWNER, req_id=9)], owned=True)
    assert np.array_equal(asks(asker, CacheKey(OWNER, req_id=9)), pattern(2, 0, 8)[:4])


def test_addresses_are_not_looked_at_when_registered(manager):
    for placement in Placement:
        described = desc([2, 4], placement=placement)
        for accessible in (None, True, False):
            assert manager.register_cache(described, [1], (), accessible).tensor_addrs == [1]
            assert manager.register_blocks_cache(described, [1], None, accessible).tensor_addrs == [1]
            assert manager.register_cache(described, [2**64 - 1], (), accessible).tensor_addrs == [2**64 - 1]
            assert manager.register_blocks_cache(described, [2**64 - 1], None, accessible).tensor_addrs == [2**64 - 1]


def test_a_blocks_cache_that_peers_can_not_access_may_have_address_0(manager):
    refused(manager.register_blocks_cache, ONE_TENSOR, [0], None, True)
    assert manager.register_blocks_cache(ONE_TENSOR, [0], None, False).tensor_addrs == [0]
    assert manager.register_blocks_cache(desc([2, 4], placement=HOST), [0]).tensor_addrs == [0]


# --- keys


@pytest.mark.parity("manager.allocate_cache")
def test_key_i_is_row_i(pair):
    owner, asker = pair
    keys = [CacheKey(OWNER, req_id=7), CacheKey(OWNER, req_id=0), CacheKey(OWNER, req_id=3, model_id=2)]
    allocate(owner, "give", 1, keys, shape=(4, 4))
    rows = pattern(1, 0, 16)
    for row, key in enumerate(keys):
        assert np.array_equal(asks(asker, key), rows[4 * row : 4 * row + 4])
    refused(asks, asker, CacheKey(OWNER, req_id=3), code=NOT_EXIST)  # another model


def test_fewer_keys_than_rows_are_fine_and_more_are_not(pair):
    owner, _ = pair
    allocate(owner, "give", 1, [KEY])
    more = [CacheKey(OWNER, req_id=10 + n) for n in range(3)]
    refused(allocate, owner, "too many", 1, more)
    owner.add("registered", ONE_TENSOR, 1, more)  # not checked there


def test_a_key_that_is_bound_is_refused_by_allocate_and_nothing_is_kept(pair):
    owner, asker = pair
    fresh = CacheKey(OWNER, req_id=2)
    allocate(owner, "give", 1, [KEY])
    refused(allocate, owner, "again", 2, [fresh, KEY])
    assert not bound(asker, fresh)
    allocate(owner, "other", 2, [fresh, CacheKey(OWNER, req_id=1, model_id=1)])  # another model is another key
    assert np.array_equal(asks(asker, KEY), pattern(1, 0, 8)[:4])
    assert np.array_equal(asks(asker, CacheKey(OWNER, req_id=1, model_id=1)), pattern(2, 0, 8)[4:])


def test_the_cluster_id_of_a_bound_key_is_not_looked_at(pair):
    owner, asker = pair
    allocate(owner, "give", 1, [CacheKey(777, req_id=1)])
    refused(allocate, owner, "again", 2, [CacheKey(888, req_id=1)])
    assert np.array_equal(asks(asker, KEY), pattern(1, 0, 8)[:4])


@pytest.mark.parametrize("key", [CacheKey(OWNER, req_id=5), CacheKey(OWNER, req_id=U64MAX, prefix_id=5)])
def test_a_real_key_twice_in_one_allocation_is_refused(pair, key):
    owner, asker = pair
    refused(allocate, owner, "give", 1, [key, key])
    assert not bound(asker, key)
    allocate(owner, "give", 1, [key])


def test_placeholders_take_a_row_and_may_repeat(pair):
    owner, asker = pair
    unused = CacheKey(OWNER, req_id=U64MAX)
    allocate(owner, "give", 1, [unused, unused, KEY, unused], shape=(4, 4))
    assert np.array_equal(asks(asker, KEY), pattern(1, 0, 16)[8:12])
    refused(asker.manage, "pull_cache", unused, "take")  # nobody can ask for it


def test_a_normal_and_a_prefix_key_of_one_number_are_two_keys(pair):
    owner, asker = pair
    normal, prefix = CacheKey(OWNER, req_id=5), CacheKey(OWNER, req_id=U64MAX, prefix_id=5)
    other_model = CacheKey(OWNER, req_id=5, model_id=1)
    allocate(owner, "give", 1, [normal, prefix, other_model], shape=(4, 4))
    rows = pattern(1, 0, 16)
    assert np.array_equal(asks(asker, prefix), rows[4:8])
    assert np.array_equal(asks(asker, normal), rows[:4])
    refused(asks, asker, normal, code=NOT_EXIST)  # released; the others are not
    assert np.array_equal(asks(asker, prefix), rows[4:8])
    assert np.array_equal(asks(asker, other_model), rows[8:12])


def test_a_registered_contiguous_cache_leaves_a_bound_key_where_it_is(pair):
    owner, asker = pair
    owner.add("old", ONE_TENSOR, 1, [KEY])
    new = owner.add("new", ONE_TENSOR, 2, [KEY, CacheKey(OWNER, req_id=2)])
    assert np.array_equal(asks(asker, KEY), pattern(1, 0, 8)[:4])
    assert np.array_equal(asks(asker, CacheKey(OWNER, req_id=2)), pattern(2, 0, 8)[4:])
    assert np.array_equal(asks(asker, CacheKeyByIdAndIndex(OWNER, new)), pattern(2, 0, 8)[:4])
    owner.drop("old")
    refused(asks, asker, KEY, code=NOT_EXIST)


@pytest.mark.parity("manager.register_cache")
def test_a_key_twice_in_one_registration_is_its_last_row(pair):
    owner, asker = pair
    owner.add("give", ONE_TENSOR, 1, [KEY, KEY])
    assert np.array_equal(asks(asker, KEY), pattern(1, 0, 8)[4:])


@pytest.mark.parity("manager.register_blocks_cache")
def test_a_registered_blocks_cache_takes_a_key_over(pair):
    owner, asker = pair
    asker.add("blocks", desc([4, 4]), 60, blocks=True)
    for name, number in (("old", 1), ("new", 2)):
        owner.add(name, ONE_TENSOR, number, BlocksCacheKey(OWNER), blocks=True)
        asker.manage("pull_blocks", BlocksCacheKey(OWNER), "blocks", [1], [3])
        assert np.array_equal(asker.content("blocks")[0][12:], pattern(number, 0, 8)[4:])
    owner.drop("old")
    asker.manage("pull_blocks", BlocksCacheKey(OWNER), "blocks", [0], [0])
    owner.drop("new")
    refused(asker.manage, "pull_blocks", BlocksCacheKey(OWNER), "blocks", [0], [0], code=NOT_EXIST)


def test_a_blocks_key_is_refused_by_allocate_while_it_is_bound(pair):
    owner, _ = pair
    key = BlocksCacheKey(OWNER, 3)
    allocate(owner, "give", 1, key, blocks=True)
    refused(allocate, owner, "again", 2, key, blocks=True)
    owner.drop("give")
    allocate(owner, "again", 2, key, blocks=True)
    allocate(owner, "another model", 3, BlocksCacheKey(OWNER, 4), blocks=True)


# --- pools


def test_a_tensor_takes_whole_pages(manager):
    made = [manager.allocate_cache(desc([1, PAGE + 1])) for _ in range(8)]  # of 16 pages, 2 each
    refused(manager.allocate_cache, desc([1]), code=OUT_OF_MEMORY)
    manager.deallocate_cache(made.pop())
    assert manager.allocate_cache(desc([1, 2 * PAGE])).tensor_addrs


@pytest.mark.parity("failure.out_of_memory")
def test_an_allocation_that_fails_gives_everything_back(manager):
    for _ in range(50):
        refused(manager.allocate_cache, desc([1], tensors=17), code=OUT_OF_MEMORY)
        refused(manager.allocate_cache, desc([1, PAGE], tensors=16), [KEY, KEY])
        refused(manager.allocate_blocks_cache, desc([1, 5 * PAGE], tensors=4), code=OUT_OF_MEMORY)
    assert len(manager.allocate_cache(desc([1, PAGE], tensors=16)).tensor_addrs) == 16


def test_freed_memory_can_be_used_at_once(manager):
    for _ in range(50):
        manager.deallocate_cache(manager.allocate_cache(desc([16, PAGE])))
        manager.deallocate_blocks_cache(manager.allocate_blocks_cache(desc([16, PAGE])))


def test_host_and_device_have_pools_of_their_own(manager):
    manager.allocate_cache(desc([16, PAGE]))
    refused(manager.allocate_cache, desc([1]), code=OUT_OF_MEMORY)
    assert manager.allocate_cache(desc([1], placement=HOST)).tensor_addrs
    refused(manager.allocate_cache, desc([1 << 25], placement=HOST), code=OUT_OF_MEMORY)


def test_a_page_of_the_pool_may_be_larger_or_smaller():
    for shift, caches in ((10, 64), (16, 1), (14, 4)):
        engine = LLMDataDist(LLMRole.MIX, 1)
        engine.init(options(mem_pool_cfg=json.dumps({"memory_size": PAGE, "page_shift": shift})))
        manager = engine.cache_manager
        for _ in range(caches):
            manager.allocate_cache(desc([1]))
        refused(manager.allocate_cache, desc([1]), code=OUT_OF_MEMORY)
        engine.finalize()


@pytest.mark.parity("failure.no_pool")
@pytest.mark.parametrize(
    ("pools", "works"),
    [
        ({}, ()),
        ({"llm.MemPoolConfig": POOL}, (Placement.DEVICE,)),
        ({"llm.HostMemPoolConfig": POOL}, (HOST,)),
        ({"llm.MemPoolConfig": ""}, ()),
    ],
)
def test_an_allocation_needs_a_pool_of_its_placement(pools, works):
    engine = LLMDataDist(LLMRole.MIX, 1)
    engine.init({"llm.EnableCacheManager": "1", **pools})
    manager = engine.cache_manager
    for placement in Placement:
        for call in (manager.allocate_cache, manager.allocate_blocks_cache):
            if placement in works:
                call(desc([1], placement=placement))
            else:
                refused(call, desc([1], placement=placement))
    rows, blocks = manager.register_cache(ONE_TENSOR, [1]), manager.register_blocks_cache(ONE_TENSOR, [1])
    for call, argument in (
        (manager.deallocate_cache, rows),
        (manager.deallocate_blocks_cache, blocks),
        (manager.remove_cache_key, KEY),
    ):
        if works:
            call(argument)
        else:
            refused(call, argument, code=FEATURE_NOT_ENABLED)
    engine.finalize()


# --- freeing


@pytest.mark.parity("manager.deallocate_cache", "manager.remove_cache_key")
def test_a_deallocated_cache_answers_until_its_last_key_is_released(pair):
    owner, asker = pair
    keys = [CacheKey(OWNER, req_id=n) for n in (1, 2)]
    cache_id = allocate(owner, "give", 1, keys, shape=(4, 4))
    cache = owner.caches["give"]
    owner.drop("give")
    assert cache.tensor_addrs == []
    rows = pattern(1, 0, 16)
    for row in (2, 3, 2):
        assert np.array_equal(asks(asker, CacheKeyByIdAndIndex(OWNER, cache_id, row)), rows[4 * row : 4 * row + 4])
    assert np.array_equal(asks(asker, keys[0]), rows[:4])
    assert np.array_equal(asks(asker, CacheKeyByIdAndIndex(OWNER, cache_id, 3)), rows[12:])
    owner.manager.remove_cache_key(keys[1])
    refused(asks, asker, keys[1], code=NOT_EXIST)
    refused(asks, asker, CacheKeyByIdAndIndex(OWNER, cache_id, 3), code=NOT_EXIST)


@pytest.mark.parity("manager.deallocate_cache", "manager.remove_cache_key")
def test_the_last_key_of_a_deallocated_cache_frees_its_memory(manager):
    for release in ("remove_cache_key", "unregister_cache"):
        cache = manager.allocate_cache(desc([16, PAGE]), [KEY, CacheKey(OWNER, req_id=U64MAX, prefix_id=1)])
        manager.deallocate_cache(cache)
        refused(manager.allocate_cache, desc([1]), code=OUT_OF_MEMORY)
        if release == "unregister_cache":
            manager.unregister_cache(cache.cache_id)
        else:
            manager.remove_cache_key(KEY)
            refused(manager.allocate_cache, desc([1]), code=OUT_OF_MEMORY)
            manager.remove_cache_key(CacheKey(OWNER, req_id=U64MAX, prefix_id=1))
        manager.deallocate_cache(manager.allocate_cache(desc([16, PAGE])))


def test_the_last_pull_of_a_deallocated_cache_frees_its_memory(pair):
    owner, asker = pair
    whole = desc([1, 16 << 20])
    keys = [CacheKey(OWNER, req_id=n) for n in range(3)]
    for key in keys:
        owner.add("give", whole, 1, [key], owned=True)
        owner.drop("give")
        refused(owner.manager.allocate_cache, desc([1]), code=OUT_OF_MEMORY)
        assert np.array_equal(asker_row(asker, key), pattern(1, 0, 16 << 20)[:4])
    owner.add("give", whole, 1, owned=True)


def asker_row(asker, key):
    asker.manage("pull_cache", key, "take")
    return asker.content("take")[0][:4]


@pytest.mark.parity("manager.deallocate_cache", "manager.deallocate_blocks_cache")
def test_deallocating_twice_or_what_is_not_there_is_fine(manager):
    rows, blocks = manager.allocate_cache(ONE_TENSOR), manager.allocate_blocks_cache(ONE_TENSOR)
    for _ in range(2):
        manager.deallocate_cache(rows)
        manager.deallocate_blocks_cache(blocks)
    unknown = Cache(12345, ONE_TENSOR, [], manager, False, False)
    manager.deallocate_cache(unknown)
    cpu = Cache.create_cpu_cache(desc([2, 4], placement=HOST), [1])
    manager.deallocate_blocks_cache(cpu)


def test_registered_caches_are_not_freed_and_keep_their_keys(pair):
    owner, asker = pair
    cache_id = owner.add("give", ONE_TENSOR, 1, [KEY])
    owner.add("blocks", ONE_TENSOR, 2, BlocksCacheKey(OWNER), blocks=True)
    owner.manager.deallocate_cache(owner.caches["give"])
    owner.manager.deallocate_blocks_cache(owner.caches["blocks"])
    owner.manager.remove_cache_key(KEY)
    asker.add("into", desc([2, 4]), 60, blocks=True)
    for _ in range(3):  # no pull releases them either
        assert np.array_equal(asks(asker, KEY), pattern(1, 0, 8)[:4])
        assert np.array_equal(asks(asker, CacheKeyByIdAndIndex(OWNER, cache_id, 1)), pattern(1, 0, 8)[4:])
        asker.manage("pull_blocks", BlocksCacheKey(OWNER), "into", [0, 1], [0, 1])
        assert np.array_equal(asker.content("into")[0], pattern(2, 0, 8))


@pytest.mark.parity("manager.deallocate_blocks_cache")
def test_a_blocks_cache_goes_at_once_with_its_key(pair):
    owner, asker = pair
    allocate(owner, "give", 1, BlocksCacheKey(OWNER), blocks=True)
    asker.add("into", desc([2, 4]), 60, blocks=True)
    asker.manage("pull_blocks", BlocksCacheKey(OWNER), "into", [0], [0])
    owner.drop("give")
    refused(asker.manage, "pull_blocks", BlocksCacheKey(OWNER), "into", [0], [0], code=NOT_EXIST)


@pytest.mark.parity("manager.unregister_cache", "manager.remove_cache_key")
def test_an_unknown_id_or_key_is_nothing_to_free(manager):
    for unknown in (0, -1, 12345, 2**63 - 1, -(2**63), True):
        manager.unregister_cache(unknown)
    manager.remove_cache_key(CacheKey(OWNER, req_id=12345))
    manager.remove_cache_key(CacheKey(OWNER, req_id=U64MAX, prefix_id=3))


@pytest.mark.parity("manager.unregister_cache")
def test_an_unregistered_cache_is_gone_at_once(pair):
    owner, asker = pair
    for owned in (False, True):
        cache_id = owner.add("give", ONE_TENSOR, 1, [KEY], owned=owned)
        by_id = CacheKeyByIdAndIndex(OWNER, cache_id, 1)
        assert np.array_equal(asks(asker, by_id), pattern(1, 0, 8)[4:])
        before = asker.content("take")[0]
        owner.manager.unregister_cache(cache_id)
        for key in (KEY, by_id):
            refused(asks, asker, key, code=NOT_EXIST)
        assert np.array_equal(asker.content("take")[0], before)


def test_a_key_can_be_bound_again_once_it_is_free(pair):
    owner, asker = pair
    for number in range(5):
        allocate(owner, "give", number, [KEY])
        assert np.array_equal(asks(asker, KEY), pattern(number, 0, 8)[:4])  # released
        owner.drop("give")


def test_another_cluster_id_in_a_removed_key_is_not_looked_at(pair):
    owner, asker = pair
    allocate(owner, "give", 1, [KEY])
    owner.manager.remove_cache_key(CacheKey(777, req_id=1))
    assert not bound(asker, KEY)


# --- remote_accessible, where it counts: in one-sided mode


@pytest.mark.parity(
    "manager.register_cache",
    "manager.register_blocks_cache",
    "manager.set_is_call_linked",
    "failure.not_accessible",
)
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(
    ("placement", "given", "called_link", "reachable"),
    [
        (Placement.DEVICE, None, False, True),
        (Placement.DEVICE, True, False, True),
        (Placement.DEVICE, False, False, False),
        (HOST, None, False, False),
        (HOST, True, False, True),
        (HOST, False, False, False),
        (Placement.DEVICE, None, True, False),
        (HOST, None, True, False),
        (Placement.DEVICE, False, True, False),
    ],
)
def test_remote_accessible(one_sided, blocks, placement, given, called_link, reachable):
    owner, asker = one_sided
    asker.add("take", desc([2, 4]), 50)
    asker.add("hidden", desc([2, 4]), 51, accessible=False)
    if called_link:
        owner.manager.set_is_call_linked()
        for call in ("register_cache", "register_blocks_cache"):
            refused(getattr(owner.manager, call), ONE_TENSOR, [1], remote_accessible=True)
    cache_id = owner.add("give", desc([2, 4], placement=placement), 1, blocks=blocks, accessible=given)
    key = CacheKeyByIdAndIndex(OWNER, cache_id)
    if reachable:
        assert np.array_equal(asks(asker, key), pattern(1, 0, 8)[:4])
    else:
        refused(asks, asker, key)
    refused(asker.manage, "pull_cache", key, "hidden")  # the flag counts on both ends


def test_in_two_sided_mode_the_flag_is_not_looked_at(pair):
    owner, asker = pair
    owner.add("give", desc([2, 4], placement=HOST), 1, [KEY], accessible=False)
    assert np.array_equal(asks(asker, KEY), pattern(1, 0, 8)[:4])


def test_allocated_caches_are_always_accessible(one_sided):
    owner, asker = one_sided
    asker.add("take", desc([2, 4], placement=HOST), 50, owned=True)
    owner.manager.set_is_call_linked()
    cache_id = owner.add("give", desc([2, 4], placement=HOST), 1, owned=True)
    assert np.array_equal(asks(asker, CacheKeyByIdAndIndex(OWNER, cache_id)), pattern(1, 0, 8)[:4])


# --- after finalize


def test_after_finalize_each_call_has_its_code():
    engine = LLMDataDist(LLMRole.MIX, 1)
    engine.init(options(ADDRESS))
    manager = engine.cache_manager
    rows, blocks = manager.allocate_cache(ONE_TENSOR, [KEY]), manager.allocate_blocks_cache(ONE_TENSOR)
    host = manager.allocate_blocks_cache(desc([2, 4], placement=HOST))
    engine.finalize()
    by_id = CacheKeyByIdAndIndex(5, 1)
    for call, args, code in (
        (manager.allocate_cache, (ONE_TENSOR,), FAILED),
        (manager.allocate_blocks_cache, (ONE_TENSOR,), FAILED),
        (manager.register_cache, (ONE_TENSOR, [1]), FAILED),
        (manager.register_blocks_cache, (ONE_TENSOR, [1]), FAILED),
        (manager.unregister_cache, (1,), FAILED),
        (manager.pull_cache, (by_id, rows), PARAM_INVALID),
        (manager.pull_blocks, (BlocksCacheKey(5), blocks, [0], [0]), PARAM_INVALID),
        (manager.copy_cache, (rows, rows), PARAM_INVALID),
        (manager.copy_blocks, (blocks, {0: [1]}), PARAM_INVALID),
        (manager.swap_blocks, (blocks, host, {0: 1}), PARAM_INVALID),
        (manager.deallocate_cache, (rows,), PARAM_INVALID),
        (manager.deallocate_blocks_cache, (blocks,), PARAM_INVALID),
        (manager.remove_cache_key, (KEY,), PARAM_INVALID),
    ):
        refused(call, *args, code=code)


def test_a_second_engine_does_not_know_the_caches_of_the_first():
    engine = LLMDataDist(LLMRole.MIX, 1)
    engine.init(options())
    stale = engine.cache_manager.allocate_cache(ONE_TENSOR)
    first = engine.cache_manager
    engine.finalize()
    engine.init(options())
    assert engine.cache_manager is not first
    refused(engine.cache_manager.copy_cache, stale, stale, code=NOT_EXIST)
    refused(first.copy_cache, stale, stale)
    engine.finalize()


@pytest.mark.parametrize("dtype", [dtype for dtype in DataType if dtype is not DataType.DT_STRING])
def test_sizes_follow_the_data_type(pair, dtype):
    owner, asker = pair
    described = CacheDesc(1, [2, 4], dtype)
    owner.add("give", described, 1, [KEY], owned=True)
    asker.add("into", described, 60)
    asker.manage("pull_cache", KEY, "into", 1)
    row = described.size // 2
    assert np.array_equal(asker.content("into")[0][row:], pattern(1, 0, described.size)[:row])
    assert np.array_equal(asker.content("into")[0][:row], pattern(60, 0, described.size)[:row])
