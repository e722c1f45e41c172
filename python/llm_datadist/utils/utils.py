# SPDX-License-Identifier: Apache-2.0
"""Argument checks. A wrong type is a TypeError, an integer out of range a ValueError; each names the argument.

Every check returns the value that it was given. A bool is an int here, as it is in Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Callable, TypeVar, Union

T = TypeVar("T")
Classes = Union[type, Sequence[type]]
Accepts = Callable[[Any, tuple[type, ...]], bool]

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
UINT8_MAX, UINT16_MAX, UINT32_MAX, UINT64_MAX = 2**8 - 1, 2**16 - 1, 2**32 - 1, 2**64 - 1


def check_isinstance(
    arg_name: str,
    value: T,
    classes: Classes,
    inner_class: Classes | None = None,
    extra_fmt: str = "",
    allow_none: bool = True,
    *,
    accepts: Accepts = isinstance,
) -> T:
    """Check that value is an instance of one of classes, and each element (each key of a dict) one of inner_class.

    None passes unless allow_none is False. accepts decides what counts as an instance.
    """
    if value is None and allow_none:
        return value
    wanted = _as_tuple(classes)
    if not accepts(value, wanted):
        raise TypeError(f"{arg_name} only support {_names(wanted)}, but got {type(value).__name__}{_more(extra_fmt)}")
    if inner_class is not None:
        check_inner(arg_name, value, inner_class, extra_fmt, accepts=accepts)  # type: ignore[arg-type]
    return value


def check_inner(
    arg_name: str,
    value: Iterable[Any],
    inner_class: Classes,
    extra_fmt: str = "",
    *,
    accepts: Accepts = isinstance,
) -> Iterable[Any]:
    """Check that each element of value is an instance of one of inner_class."""
    wanted = _as_tuple(inner_class)
    # The usual case at the speed of C: block lists have thousands of elements.
    if set(map(type, value)).issubset(wanted):
        return value
    for element in value:
        if not accepts(element, wanted):
            got = type(element).__name__
            raise TypeError(f"{arg_name} inner type only support {_names(wanted)}, but got {got}{_more(extra_fmt)}")
    return value


def check_dict(
    arg_name: str,
    d: dict[Any, Any],
    k_class: Classes,
    v_class: Classes,
    v_inner_class: Classes | None = None,
    *,
    accepts: Accepts = isinstance,
) -> dict[Any, Any]:
    """Check a dict, each of its keys and each of its values (and the elements of the values)."""
    check_isinstance(arg_name, d, dict)
    for key, value in d.items():
        check_isinstance(f"{arg_name} key", key, k_class, allow_none=False, accepts=accepts)
        check_isinstance(f"{arg_name} value", value, v_class, v_inner_class, allow_none=False, accepts=accepts)
    return d


def check_uint8(arg_name: str, value: int) -> int:
    return _check_integer(arg_name, value, 0, UINT8_MAX)


def check_uint16(arg_name: str, value: int) -> int:
    return _check_integer(arg_name, value, 0, UINT16_MAX)


def check_uint32(arg_name: str, value: int) -> int:
    return _check_integer(arg_name, value, 0, UINT32_MAX)


def check_uint64(arg_name: str, value: int) -> int:
    return _check_integer(arg_name, value, 0, UINT64_MAX)


def check_int32(arg_name: str, value: int) -> int:
    return _check_integer(arg_name, value, INT32_MIN, INT32_MAX)


def check_int64(arg_name: str, value: int) -> int:
    return _check_integer(arg_name, value, INT64_MIN, INT64_MAX)


def check_list_int32(arg_name: str, values: Sequence[int]) -> Sequence[int]:
    return _check_integers(arg_name, values, INT32_MIN, INT32_MAX)


def check_list_int64(arg_name: str, values: Sequence[int]) -> Sequence[int]:
    return _check_integers(arg_name, values, INT64_MIN, INT64_MAX)


def check_list_uint64(arg_name: str, values: Sequence[int]) -> Sequence[int]:
    return _check_integers(arg_name, values, 0, UINT64_MAX)


def check_positive_or_set_default(name: str, v: int | None, default: int = -1) -> int:
    """Return default for None, otherwise v, which must be an int64 that is not negative."""
    return default if v is None else _check_integer(name, v, 0, INT64_MAX)


def _check_integer(arg_name: str, value: int, low: int, high: int) -> int:
    check_isinstance(arg_name, value, int, allow_none=False)
    if not low <= value <= high:
        raise ValueError(f"{arg_name} should be in range [{low}, {high}], but got {value}")
    return value


def _check_integers(arg_name: str, values: Sequence[int], low: int, high: int) -> Sequence[int]:
    check_isinstance(arg_name, values, [list, tuple], int, allow_none=False)
    if values and not (low <= min(values) and max(values) <= high):
        bad = next(value for value in values if not low <= value <= high)
        raise ValueError(f"{arg_name} elements should be in range [{low}, {high}], but got {bad}")
    return values


def _as_tuple(classes: Classes) -> tuple[type, ...]:
    return (classes,) if isinstance(classes, type) else tuple(classes)


def _names(classes: tuple[type, ...]) -> str:
    return " or ".join(cls.__name__ for cls in classes)


def _more(extra_fmt: str) -> str:
    return f", {extra_fmt}" if extra_fmt else ""
