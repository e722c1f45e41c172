# SPDX-License-Identifier: Apache-2.0
"""copy_cache, copy_blocks and swap_blocks: inside one process, without a link."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_datadist import Cache, CacheKey, LLMException, LLMStatusCode, Placement
from peers import SOURCE, TARGET, desc, moved, pattern, refused

PARAM_INVALID = LLMStatusCode.LLM_PARAM_INVALID
NOT_EXIST = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
HOST, DEVICE = Placement.HOST, Placement.DEVICE


@pytest.fixture
def end(local):
    local.open(1, listen=None)
    return local


def rows(end, name, number, shape, count=1, **kwargs):
    end.add(name, desc(shape, tensors=count, placement=kwargs.pop("placement", DEVICE)), number, **kwargs)


# --- copy_cache


@pytest.mark.parity("manager.copy_cache")
@pytest.mark.parametrize(
    ("arguments", "moves"),
    [
        ((), {0: (0, 8)}),
        ((1, 2), {8: (16, 24)}),
        ((2, 0, 3), {19: (3, 8)}),
        ((0, 1, 0, 5), {0: (8, 13)}),
        ((0, 1, 7, 1), {7: (15, 16)}),
        ((0, 1, 7), {7: (15, 16)}),
        ((2, 2, 1, 7, 99), {17: (17, 24)}),
    ],
)
@pytest.mark.parametrize("src_placement", Placement)
@pytest.mark.parametrize("dst_placement", Placement)
def test_copy_cache_copies_part_of_a_row_in_every_tensor(end, owned, src_placement, dst_placement, arguments, moves):
    rows(end, "s", SOURCE, [3, 8], 2, owned=owned, placement=src_placement)
    rows(end, "d", TARGET, [3, 8], 2, owned=owned, placement=dst_placement)
    end.manage("copy_cache", "d", "s", *arguments)
    for tensor in range(2):
        source = pattern(SOURCE, tensor, 24)
        moved(end, "d", {start: source[first:last] for start, (first, last) in moves.items()}, tensor)
        moved(end, "s", {}, tensor, SOURCE)


def test_copy_cache_uses_the_stride_of_each_side(end):
    rows(end, "s", SOURCE, [3, 8])
    rows(end, "d", TARGET, [2, 10])
    end.manage("copy_cache", "d", "s", 1, 2, 2)
    moved(end, "d", {12: pattern(SOURCE, 0, 24)[18:24]})


def test_copy_cache_from_one_row_to_another_of_the_same_cache(end, owned):
    rows(end, "s", SOURCE, [3, 8], owned=owned)
    end.manage("copy_cache", "s", "s", 2, 0, 1)
    moved(end, "s", {17: pattern(SOURCE, 0, 24)[1:8]}, number=SOURCE)
    end.manage("copy_cache", "s", "s", 1, 1)  # onto itself


class Wrong:
    """Stands for the object of another class."""


COPY_CACHE = [
    ((Wrong(), Wrong(), "0", "0", "0", "0"), TypeError),
    (("d", Wrong(), "0", "0", "0", "0"), TypeError),
    (("blocks", "blocks", 1.0, -1), TypeError),
    (("blocks", "blocks", -1, 1.0), ValueError),
    (("blocks", "blocks", 0, 2**32, -1), ValueError),
    (("blocks", "blocks", 0, 0, -1, "1"), ValueError),
    (("blocks", "blocks", 0, 0, 2**64), ValueError),
    (("blocks", "blocks", 0, 0, None), TypeError),
    (("blocks", "blocks", 0, 0, 0, "1"), TypeError),
    (("blocks", "blocks", 0, 0, 0, 2**63), ValueError),
    (("d", "blocks", 0, 0, 0, 0, -1), LLMException),
    (("blocks", "s", 0, 0, 0, 0, -1), LLMException),
    (("d", "s", 0, 0, 0, 0, -1), LLMException),
    (("d", "s", 0, 0, 0, -2, -1), LLMException),
    (("d", "s", 0, 0, 0, -1, -1), ValueError),
    (("d", "s", 0, 0, 0, -1, "1"), TypeError),
    (("d", "s", 0, 3), LLMException),
    (("d", "s", 3, 0), LLMException),
    (("d", "s", 0, 0, 8), LLMException),
    (("d", "s", 0, 0, 2**64 - 1), LLMException),
    (("d", "s", 0, 0, 0, 9), LLMException),
    (("d", "s", 0, 0, 4, 5), LLMException),
    (("d", "s", 0, 0, 1, 2**63 - 1), LLMException),
    (("narrow", "s"), LLMException),  # a whole source row does not fit
    (("narrow", "s", 0, 0, 4, 1), LLMException),
    (("s", "narrow", 0, 0, 4, 1), LLMException),
    (("two tensors", "s"), LLMException),
    (("s", "two tensors"), LLMException),
]


@pytest.mark.parity("manager.copy_cache")
@pytest.mark.parametrize(("arguments", "error"), COPY_CACHE)
def test_copy_cache_checks_before_a_byte_moves(end, arguments, error):
    for name, number, shape, count in (
        ("s", 1, [3, 8], 1),
        ("d", 2, [3, 8], 1),
        ("narrow", 3, [3, 4], 1),
        ("two tensors", 4, [3, 8], 2),
    ):
        rows(end, name, number, shape, count)
    rows(end, "blocks", 5, [3, 8], blocks=True)
    before = {name: end.checksum(name) for name in end.caches}
    refused(end.manage, "copy_cache", *arguments, error=error)
    assert {name: end.checksum(name) for name in end.caches} == before


@pytest.mark.parity("manager.copy_cache", "failure.unknown_local_cache")
def test_copy_cache_needs_both_caches(end):
    rows(end, "s", SOURCE, [3, 8])
    gone = Cache(99, desc([3, 8]), [1], end.manager, True, False)
    for pair in ((gone, end.caches["s"]), (end.caches["s"], gone)):
        failure = refused(end.manager.copy_cache, *pair, code=NOT_EXIST)
        assert (failure.operation, failure.stage) == ("copy_cache", "check")


def test_a_deallocated_cache_can_be_copied_by_id_while_it_has_keys(end):
    rows(end, "s", SOURCE, [3, 8], owned=True, keys=[CacheKey(1, req_id=1)])
    rows(end, "d", TARGET, [3, 8])
    source = end.caches["s"]
    end.manager.deallocate_cache(source)
    end.manager.copy_cache(end.caches["d"], source)
    moved(end, "d", {0: pattern(SOURCE, 0, 24)[:8]})
    end.manager.remove_cache_key(CacheKey(1, req_id=1))
    refused(end.manager.copy_cache, end.caches["d"], source, code=NOT_EXIST)


def test_memory_that_is_not_mapped_is_refused_and_the_process_lives(end):
    rows(end, "good", SOURCE, [3, 8])
    rows(end, "good blocks", SOURCE, [3, 8], blocks=True)
    bad = end.manager.register_cache(desc([3, 8]), [1])
    bad_blocks = end.manager.register_blocks_cache(desc([3, 8]), [1])
    good = end.caches["good"]
    refused(end.manager.copy_cache, bad, good)
    refused(end.manager.copy_cache, good, bad)
    refused(end.manager.copy_blocks, bad_blocks, {0: [1]})
    host = Cache.create_cpu_cache(desc([3, 8], placement=HOST), [1])
    refused(end.manager.swap_blocks, end.caches["good blocks"], host, {0: 1})
    refused(end.manager.swap_blocks, host, end.caches["good blocks"], {0: 1})
    moved(end, "good", {}, number=SOURCE)


def test_a_copy_reads_memory_that_can_only_be_read(end):
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ) as page:
        address = np.frombuffer(page, np.uint8).ctypes.data
        zeros = end.manager.register_cache(desc([2, 8]), [address])
        rows(end, "d", TARGET, [2, 8])
        end.manager.copy_cache(end.caches["d"], zeros, 1, 0)
        moved(end, "d", {8: np.zeros(8, np.uint8)})
        refused(end.manager.copy_cache, zeros, end.caches["d"])
        end.manager.unregister_cache(zeros.cache_id)


# --- copy_blocks


@pytest.mark.parity("manager.copy_blocks")
def test_copy_blocks_copies_a_block_to_others_in_every_tensor(end, owned):
    rows(end, "b", TARGET, [5, 8], 3, blocks=True, owned=owned)
    end.manage("copy_blocks", "b", {0: [2, 4], 3: [1]})
    for tensor in range(3):
        old = pattern(TARGET, tensor, 40)
        moved(end, "b", {16: old[:8], 32: old[:8], 8: old[24:32]}, tensor)


def test_copy_blocks_follows_the_order_of_the_dict(end, owned):
    rows(end, "b", TARGET, [4, 8], blocks=True, owned=owned)
    end.manage("copy_blocks", "b", {0: [1], 1: [2, 3], 2: [0]})
    old = pattern(TARGET, 0, 32)
    moved(end, "b", {0: old[:8], 8: old[:8], 16: old[:8], 24: old[:8]})


@pytest.mark.parametrize("nothing", [{}, {0: []}, {1: [1]}, {0: [], 3: [3, 3]}])
def test_copy_blocks_of_nothing_changes_nothing(end, nothing):
    rows(end, "b", TARGET, [4, 8], blocks=True)
    end.manage("copy_blocks", "b", nothing)
    moved(end, "b", {})


COPY_BLOCKS = [
    ((Wrong(), 3), TypeError),
    (("rows", 3), TypeError),
    (("rows", None), TypeError),
    (("rows", [(0, 1)]), TypeError),
    (("rows", {"0": [1]}), TypeError),
    (("rows", {0: (1,)}), TypeError),
    (("rows", {0: 1}), TypeError),
    (("rows", {0: [1.0]}), TypeError),
    (("rows", {0: [1]}), LLMException),
    (("b", {-1: [1]}), TypeError),
    (("b", {0: [-1]}), TypeError),
    (("b", {2**64: [1]}), TypeError),
    (("b", {0: [1], 4: [1]}), LLMException),
    (("b", {0: [1, 4]}), LLMException),
    (("b", {0: [1, 2**64 - 1]}), LLMException),
]


@pytest.mark.parity("manager.copy_blocks")
@pytest.mark.parametrize(("arguments", "error"), COPY_BLOCKS)
def test_copy_blocks_checks_before_a_byte_moves(end, arguments, error):
    rows(end, "rows", SOURCE, [4, 8])
    rows(end, "b", TARGET, [4, 8], blocks=True)
    refused(end.manage, "copy_blocks", *arguments, error=error)
    moved(end, "b", {})
    moved(end, "rows", {}, number=SOURCE)


def test_copy_blocks_needs_the_cache(end):
    gone = Cache(99, desc([3, 8]), [1], end.manager, True, True)
    for info in ({0: [1]}, {0: [77]}):
        refused(end.manager.copy_blocks, gone, info, code=NOT_EXIST)


# --- swap_blocks


@pytest.fixture
def swapping(end, owned):
    rows(end, "device", SOURCE, [6, 8], 2, blocks=True, owned=owned)
    rows(end, "host", TARGET, [4, 8], 2, blocks=True, owned=owned, placement=HOST)
    return end


@pytest.mark.parity("manager.swap_blocks")
def test_swap_blocks_copies_out_and_in(swapping):
    end = swapping
    end.manage("swap_blocks", "device", "host", {5: 0, 1: 3})
    for tensor in range(2):
        source = pattern(SOURCE, tensor, 48)
        moved(end, "host", {0: source[40:], 24: source[8:16]}, tensor)
        moved(end, "device", {}, tensor, SOURCE)
    end.manage("swap_blocks", "host", "device", {1: 5, 0: 0})
    for tensor in range(2):
        source, target = pattern(SOURCE, tensor, 48), pattern(TARGET, tensor, 32)
        moved(end, "device", {40: target[8:16], 0: source[40:]}, tensor, SOURCE)


@pytest.mark.parity("manager.swap_blocks", "type.create_cpu_cache")
def test_swap_blocks_uses_the_addresses_of_cpu_caches(end):
    rows(end, "device", SOURCE, [4, 8], 2, blocks=True)
    memory = np.zeros((2, 32), np.uint8)
    host = Cache.create_cpu_cache(desc([4, 8], 2, placement=HOST), [row.ctypes.data for row in memory])
    assert host.cache_id == -1
    end.manager.swap_blocks(end.caches["device"], host, {0: 3, 2: 1})
    for tensor in range(2):
        source = pattern(SOURCE, tensor, 32)
        assert np.array_equal(memory[tensor], np.concatenate([np.zeros(8), source[16:24], np.zeros(8), source[:8]]))
    end.manager.swap_blocks(host, end.caches["device"], {0: 1})
    moved(end, "device", {8: np.zeros(8, np.uint8)}, 1, SOURCE)


def test_swap_blocks_of_nothing_changes_nothing(swapping):
    swapping.manage("swap_blocks", "device", "host", {})
    moved(swapping, "host", {})


def test_many_blocks_are_swapped(end):
    blocks, size = 256, 4096
    rows(end, "device", SOURCE, [blocks, size], 2, blocks=True)
    rows(end, "host", TARGET, [blocks, size], 2, blocks=True, placement=HOST)
    order = np.random.default_rng(1).permutation(blocks)
    end.manage("swap_blocks", "device", "host", {n: int(to) for n, to in enumerate(order)})
    for tensor in range(2):
        wanted = np.empty((blocks, size), np.uint8)
        wanted[order] = pattern(SOURCE, tensor, blocks * size).reshape(blocks, size)
        assert np.array_equal(end.content("host")[tensor].reshape(blocks, size), wanted)


SWAP_BLOCKS = [
    ((Wrong(), Wrong(), 3), TypeError),
    (("device", Wrong(), 3), TypeError),
    (("rows", "rows", 3), LLMException),
    (("device", "rows", 3), LLMException),
    (("device", "host", 3), TypeError),
    (("device", "host", None), TypeError),
    (("device", "other size", {"0": 1}), TypeError),
    (("device", "host", {0: "1"}), TypeError),
    (("device", "other size", {-1: 0}), LLMException),
    (("device", "one tensor", {-1: 0}), LLMException),
    (("device", "device", {-1: 0}), LLMException),
    (("device", "host", {6: 0}), LLMException),
    (("device", "host", {0: 4}), LLMException),
    (("device", "host", {0: 0, 1: -1}), LLMException),
    (("device", "device", {0: 1}), LLMException),
    (("host", "host", {0: 1}), LLMException),
]


@pytest.mark.parity("manager.swap_blocks")
@pytest.mark.parametrize(("arguments", "error"), SWAP_BLOCKS)
def test_swap_blocks_checks_before_a_byte_moves(swapping, arguments, error):
    end = swapping
    rows(end, "rows", 3, [6, 8], 2)
    rows(end, "one tensor", 4, [6, 8], blocks=True, placement=HOST)
    rows(end, "other size", 5, [6, 9], 2, blocks=True, placement=HOST)
    refused(end.manage, "swap_blocks", *arguments, error=error)
    for tensor in range(2):
        moved(end, "device", {}, tensor, SOURCE)
        moved(end, "host", {}, tensor)


# --- any copy against an oracle


@pytest.mark.parity("manager.copy_cache")
@given(
    shapes=st.tuples(st.integers(1, 5), st.integers(1, 400), st.integers(1, 5), st.integers(1, 400), st.integers(1, 3)),
    batches=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    offset=st.integers(0, 40),
    size=st.one_of(st.just(-1), st.integers(1, 400)),
    placements=st.tuples(st.sampled_from(Placement), st.sampled_from(Placement), st.booleans(), st.booleans()),
)
@settings(
    max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_copy_cache_does_what_the_oracle_says(end, shapes, batches, offset, size, placements):
    src_rows, src_stride, dst_rows, dst_stride, count = shapes
    dst_batch, src_batch = batches
    rows(end, "s", SOURCE, [src_rows, src_stride], count, placement=placements[0], owned=placements[2])
    rows(end, "d", TARGET, [dst_rows, dst_stride], count, placement=placements[1], owned=placements[3])
    length = size if size > 0 else src_stride - offset
    fits = src_batch < src_rows and dst_batch < dst_rows and length > 0 and offset + length <= min(src_stride, dst_stride)
    try:
        if fits:
            end.manage("copy_cache", "d", "s", dst_batch, src_batch, offset, size)
        else:
            refused(end.manage, "copy_cache", "d", "s", dst_batch, src_batch, offset, size)
        for tensor in range(count):
            start = src_batch * src_stride + offset
            source = pattern(SOURCE, tensor, src_rows * src_stride)[start : start + length]
            moved(end, "d", {dst_batch * dst_stride + offset: source} if fits else {}, tensor)
    finally:
        end.drop("s")
        end.drop("d")
