# SPDX-License-Identifier: Apache-2.0
"""Packs a list of block ids as int64, as they cross to the engine.

What was checked is what is sent: the ids are copied, so a caller who changes the list meanwhile changes nothing.
"""

from __future__ import annotations

import functools
import struct
import sys
from array import array
from collections.abc import Iterable
from typing import Any, Callable

from .status import LLMException, LLMStatusCode
from .utils.utils import INT64_MAX, UINT64_MAX, check_inner

ID_BYTES = 8
# Where the byte with the sign bit lies in an integer.
_TOP = {8: 7, 4: 3} if sys.byteorder == "little" else {8: 0, 4: 0}
_LOW_HALF = 0 if sys.byteorder == "little" else 1  # which int32 of an int64
# Codes of the struct module for native integers of 8 and 4 bytes; the size decides between two meanings of "l".
_SIGNED, _UNSIGNED = frozenset("qlin"), frozenset("QLN")
_NATIVE_ORDER = "@=" + ("<" if sys.byteorder == "little" else ">")
# Gives an int of any class as a plain one and refuses all else with TypeError: a check at the speed of C.
_plain = int.conjugate
_KEPT_PACKERS = 256  # one for each number of ids that came up


def pack_blocks(name: str, value: Any) -> bytes:
    """Pack a list or tuple of int, or a one-dimensional buffer of int64, uint64 or int32 (a numpy array).

    TypeError for anything else and for an id below 0 or beyond uint64, which no native call could take; LLMException
    (LLM_PARAM_INVALID) for an id beyond int64, which no cache has.
    """
    if isinstance(value, (list, tuple)):
        return _pack_integers(name, tuple(value))
    try:
        view = memoryview(value)
    except (TypeError, ValueError, BufferError):  # numpy refuses to export some types with the latter two
        raise _not_supported(name, type(value).__name__) from None
    with view:
        return _pack_buffer(name, view)


def _pack_integers(name: str, blocks: tuple[Any, ...]) -> bytes:
    try:
        plain = tuple(map(_plain, blocks))
    except TypeError:
        check_inner(name, blocks, int)
        plain = blocks  # with one that isinstance takes for an int
    try:
        content = _packer(len(plain))(*plain)
    except struct.error:
        raise _out_of_range(name, blocks) from None
    if _any_top_bit(content, ID_BYTES):
        raise _out_of_range(name, blocks)
    return content


@functools.lru_cache(maxsize=_KEPT_PACKERS)
def _packer(count: int) -> Callable[..., bytes]:
    return struct.Struct(f"{count}q").pack  # twice as fast as struct.pack, which copies its arguments


def _pack_buffer(name: str, view: memoryview) -> bytes:
    code = view.format.lstrip(_NATIVE_ORDER)
    signed = code in _SIGNED and view.itemsize in _TOP
    if view.ndim != 1 or not (signed or (code in _UNSIGNED and view.itemsize == ID_BYTES)):
        raise _not_supported(name, f"{view.ndim} dimensional buffer of format {view.format!r}")
    content = view.tobytes()
    if _any_top_bit(content, view.itemsize):
        raise _out_of_range(name, _as_integers(content, view.itemsize, signed))
    return content if view.itemsize == ID_BYTES else _widen(content)


def _any_top_bit(content: bytes, itemsize: int) -> bool:
    """Tell whether any integer is negative, or beyond int64 if unsigned, at the speed of C and without numpy."""
    return not content[_TOP[itemsize] :: itemsize].isascii()


def _as_integers(content: bytes, itemsize: int, signed: bool) -> memoryview:
    return memoryview(content).cast("i" if itemsize != ID_BYTES else "q" if signed else "Q")


def _widen(content: bytes) -> bytes:
    """Make int64 of int32 that are not negative: the upper halves are zero."""
    numpy = sys.modules.get("numpy")
    if numpy is not None:  # as with most callers who have int32; three times as fast
        wide: bytes = numpy.frombuffer(content, numpy.int32).astype(numpy.int64).tobytes()
        return wide
    halves = array("i", [0]) * (len(content) // 2)
    halves[_LOW_HALF::2] = array("i", content)
    return halves.tobytes()


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
