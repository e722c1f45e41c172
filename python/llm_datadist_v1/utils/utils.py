# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the older package.

Those of llm_datadist, except that a class is also known by its name: some names stand for one class here and for
another in llm_datadist, and objects of either are accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, Union

from llm_datadist.utils import utils as _base
from llm_datadist.utils.utils import (
    check_int32,
    check_int64,
    check_list_int32,
    check_list_int64,
    check_list_uint64,
    check_positive_or_set_default,
    check_uint8,
    check_uint16,
    check_uint32,
    check_uint64,
)

__all__ = [
    "check_dict",
    "check_inner",
    "check_int32",
    "check_int64",
    "check_isinstance",
    "check_list_int32",
    "check_list_int64",
    "check_list_uint64",
    "check_positive_or_set_default",
    "check_type",
    "check_uint8",
    "check_uint16",
    "check_uint32",
    "check_uint64",
]

T = TypeVar("T")
Classes = Union[type, Sequence[type]]


def check_type(value: Any, classes: Classes) -> bool:
    """Tell whether value is an instance of one of classes, or of a class of the same name."""
    wanted = (classes,) if isinstance(classes, type) else tuple(classes)
    return isinstance(value, wanted) or not {cls.__name__ for cls in type(value).__mro__}.isdisjoint(
        cls.__name__ for cls in wanted
    )


def check_isinstance(
    arg_name: str,
    value: T,
    classes: Classes,
    inner_class: Classes | None = None,
    extra_fmt: str = "",
    allow_none: bool = True,
) -> T:
    """As in llm_datadist, with classes known by name."""
    return _base.check_isinstance(arg_name, value, classes, inner_class, extra_fmt, allow_none, accepts=check_type)


def check_inner(arg_name: str, value: Any, inner_class: Classes, extra_fmt: str = "") -> Any:
    """As in llm_datadist, with classes known by name."""
    return _base.check_inner(arg_name, value, inner_class, extra_fmt, accepts=check_type)


def check_dict(
    arg_name: str, d: dict[Any, Any], k_class: Classes, v_class: Classes, v_inner_class: Classes | None = None
) -> dict[Any, Any]:
    """As in llm_datadist, with classes known by name."""
    return _base.check_dict(arg_name, d, k_class, v_class, v_inner_class, accepts=check_type)
