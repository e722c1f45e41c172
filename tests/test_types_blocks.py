# SPDX-License-Identifier: Apache-2.0
"""Packing of block lists."""

from __future__ import annotations

import ctypes
import sys
from array import array
from enum import IntEnum
from unittest.mock import MagicMock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_datadist import LLMException, LLMStatusCode
from llm_datadist._blocks import pack_blocks

np = pytest.importorskip("numpy")

IDS = st.lists(st.integers(0, 2**63 - 1))


def read_back(packed: bytes) -> list[int]:
    """What the engine would read."""
    return memoryview(packed).cast("q").tolist()


@given(IDS, st.sampled_from([list, tuple, lambda ids: array("q", ids), lambda ids: array("Q", ids)]))
def test_ids_arrive_as_they_were_given(ids, form):
    assert read_back(pack_blocks("blocks", form(ids))) == ids


@given(IDS, st.sampled_from(["int64", "uint64"]))
def test_numpy_ids_arrive_as_they_were_given(ids, dtype):
    assert read_back(pack_blocks("blocks", np.array(ids, dtype))) == ids


@given(st.lists(st.integers(0, 2**31 - 1)))
def test_int32_ids_are_widened(ids):
    assert read_back(pack_blocks("blocks", np.array(ids, np.int32))) == ids


def test_int32_ids_are_widened_without_numpy(monkeypatch):
    ids = array("i", [0, 7, 2**31 - 1])
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert read_back(pack_blocks("blocks", ids)) == list(ids)


@given(st.lists(st.integers(-(2**65), 2**65), min_size=1))
def test_any_integers_are_packed_or_refused_by_their_range(ids):
    if all(0 <= block < 2**63 for block in ids):
        assert read_back(pack_blocks("blocks", ids)) == ids
    elif all(0 <= block < 2**64 for block in ids):
        with pytest.raises(LLMException) as failure:
            pack_blocks("blocks", ids)
        assert failure.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    else:
        with pytest.raises(TypeError, match="blocks elements should be in range"):
            pack_blocks("blocks", ids)


@given(st.lists(st.integers(-(2**31), 2**31 - 1)), st.sampled_from(["int64", "int32"]))
def test_negative_buffer_elements_are_a_type_error(ids, dtype):
    if all(block >= 0 for block in ids):
        assert read_back(pack_blocks("blocks", np.array(ids, dtype))) == ids
    else:
        with pytest.raises(TypeError, match=str(next(block for block in ids if block < 0))):
            pack_blocks("blocks", np.array(ids, dtype))


def test_uint64_beyond_int64_is_param_invalid():
    with pytest.raises(LLMException) as failure:
        pack_blocks("blocks", np.array([1, 2**63], np.uint64))
    assert failure.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert str(2**63) in str(failure.value)


def test_what_can_not_be_converted_counts_before_what_is_too_large():
    with pytest.raises(TypeError, match="-1"):
        pack_blocks("blocks", [2**63, -1])


class Colour(IntEnum):
    RED = 7
    NONE = -1
    WHITE = 2**64

    def __str__(self) -> str:
        return "colour " + self.name.lower()

    def __format__(self, spec: str) -> str:
        return str(self)


@pytest.mark.parametrize("colour", [Colour.NONE, Colour.WHITE])
def test_a_refused_id_is_named_as_its_class_writes_it(colour):
    with pytest.raises(TypeError, match=f"but got colour {colour.name.lower()}"):
        pack_blocks("blocks", [Colour.RED, colour])


@pytest.mark.parametrize(
    "value",
    [
        np.arange(10)[::3],
        np.arange(4, dtype="=i8"),
        (ctypes.c_int64 * 3)(1, 2, 3),
        (ctypes.c_int32 * 3)(1, 2, 3),
        memoryview(array("q", [5, 6])),
        memoryview(array("q", [5, 6])).toreadonly(),
        [True],
        [True, Colour.RED, 3],
        [MagicMock(spec=int), 3],  # isinstance takes it for an int
        np.array([], np.int64),
        np.array([], np.int32),
        [],
    ],
)
def test_also_accepted(value):
    assert read_back(pack_blocks("blocks", value)) == [int(block) for block in value]


def test_read_only_arrays_are_accepted():
    blocks = np.arange(5)
    blocks.flags.writeable = False
    assert read_back(pack_blocks("blocks", blocks)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "value",
    [
        None,
        3,
        "12",
        b"12345678",
        bytearray(8),
        [1, 2.0],
        [1, None],
        ["1"],
        [np.int64(1)],
        {1, 2},
        range(3),
        {1: 2},
        np.zeros((2, 2), np.int64),
        np.array(3),
        np.zeros(3),
        np.zeros(3, np.uint32),
        np.zeros(3, np.int16),
        np.zeros(3, bool),
        np.zeros(3, ">i8"),
        np.zeros(3, "M8[s]"),
        np.zeros(3, object),
        array("d", [1.0]),
    ],
    ids=repr,
)
def test_other_values_are_a_type_error(value):
    with pytest.raises(TypeError, match=r"blocks (inner type )?only support"):
        pack_blocks("blocks", value)


@pytest.mark.parametrize("blocks", [[1, 2], np.array([1, 2]), np.array([1, 2], np.int32), array("q", [1, 2])])
def test_later_changes_by_the_caller_do_not_arrive(blocks):
    packed = pack_blocks("blocks", blocks)
    blocks[0] = 99
    assert read_back(packed) == [1, 2]


def test_a_packed_array_array_can_still_be_resized_by_its_owner():
    blocks = array("q", [1, 2])
    packed = pack_blocks("blocks", blocks)
    blocks.append(3)  # a buffer that is still exported would forbid this
    assert read_back(packed) == [1, 2]
