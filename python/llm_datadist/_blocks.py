# SPDX-License-Identifier: Apache-2.0
"""Packs a list of block ids into one array of int64, so that it crosses to the engine as an address and a count.

What was checked is what is sent: the ids are copied, so a caller who changes the list meanwhile changes nothing.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable
from typing import Any

from .status import LLMException, LLMStatusCode
from .utils.utils import INT64_MAX, UINT64_MAX, check_inner

_ID_BYTES = 8
# Where the byte with the sign bit lies in an integer.
_TOP = {8: 7, 4: 3} if sys.byteorder == "little" else {8: 0, 4: 0}
# Codes of the struct module for native integers of 8 and 4 bytes; the size decides between two meanings of "l".
_SIGNED, _UNSIGNED = frozenset("qlin"), frozenset("QLN")
_NATIVE_ORDER = "@=" + ("<" if sys.byteorder == "little" else ">")


class PackedBlocks:
    """Block ids as int64 at an address, which is good for as long as this object lives."""

    __slots__ = ("address", "count", "owner")

    def __init__(self, owner: array[int]) -> None:
        self.owner = owner
        self.count = len(owner)
        self.address = owner.buffer_info()[0] if owner else 0

    def __len__(self) -> int:
        return self.count


def pack_blocks(name: str, value: Any) -> PackedBlocks:
    """Pack a list or tuple of int, or a one-dimensional buffer of int64, uint64 or int32 (a numpy array).

    TypeError for anything else and for an id below 0 or beyond uint64, which no native call could take; LLMException
    (LLM_PARAM_INVALID) for an id beyond int64, which no cache has.
    """
    if isinstance(value, (list, tuple)):
        return PackedBlocks(_pack_integers(name, value))
    try:
        view = memoryview(value)
    except (TypeError, ValueError, BufferError):  # numpy refuses to export some types with the latter two
        raise _not_supported(name, type(value).__name__) from None
    with view:
        return PackedBlocks(_pack_buffer(name, view))


def _pack_integers(name: str, value: Any) -> array[int]:
    blocks = tuple(value)
    check_inner(name, blocks, int)
    try:
        content = struct.pack(f"{len(blocks)}q", *blocks)  # a quarter faster than array("q", blocks)
    except struct.error:
        raise _out_of_range(name, blocks) from None
    if _any_top_bit(content, _ID_BYTES):
        raise _out_of_range(name, blocks)
    return array("q", content)


def _pack_buffer(name: str, view: memoryview) -> array[int]:
    code = view.format.lstrip(_NATIVE_ORDER)
    signed = code in _SIGNED and view.itemsize in _TOP
    if view.ndim != 1 or not (signed or (code in _UNSIGNED and view.itemsize == _ID_BYTES)):
        raise _not_supported(name, f"{view.ndim} dimensional buffer of format {view.format!r}")
    content = view.tobytes()
    if _any_top_bit(content, view.itemsize):
        raise _out_of_range(name, _as_integers(content, view.itemsize, signed))
    return array("q", content if view.itemsize == _ID_BYTES else _widen(content))


def _any_top_bit(content: bytes, itemsize: int) -> bool:
    """Tell whether any integer is negative, or beyond int64 if unsigned, at the speed of C and without numpy."""
    return not content[_TOP[itemsize] :: itemsize].isascii()


def _as_integers(content: bytes, itemsize: int, signed: bool) -> memoryview:
    return memoryview(content).cast("i" if itemsize != _ID_BYTES else "q" if signed else "Q")


def _widen(content: bytes) -> bytearray:
    """Make int64 of int32 that are not negative: the upper halves are zero."""
    wide = bytearray(2 * len(content))
    low_half = 0 if sys.byteorder == "little" else 1
    if content:
        memoryview(wide).cast("i")[low_half::2] = memoryview(content).cast("i")
    return wide


def _not_supported(name: str, got: str) -> TypeError:
    return TypeError(
        f"{name} only support list or tuple of int or one dimensional buffer of int64, uint64 or int32, but got {got}"
    )


def _out_of_range(name: str, blocks: Iterable[int]) -> Exception:
    """Return the exception for the worst of blocks: what can't be converted counts before what is merely too large."""
    bad = [block for block in blocks if not 0 <= block <= INT64_MAX]
    unconvertible = [block for block in bad if not 0 <= block <= UINT64_MAX]
    text = f"{name} elements should be in range [0, {INT64_MAX}], but got {(unconvertible or bad)[0]}"
    if unconvertible:
        return TypeError(text)
    return LLMException(text, status_code=LLMStatusCode.LLM_PARAM_INVALID)
