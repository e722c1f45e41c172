# SPDX-License-Identifier: Apache-2.0
"""Data types: the objects of llm_datadist, numpy tables included."""

from __future__ import annotations

from typing import Any

from llm_datadist import data_type as _base
from llm_datadist.data_type import DataType, get_python_dtype_from_wrapper_dtype, python_dtype_2_dwrapper_dtype

__all__ = ["DataType", "get_python_dtype_from_wrapper_dtype", "python_dtype_2_dwrapper_dtype"]


def __getattr__(name: str) -> Any:
    if name in _base.NUMPY_TABLES:
        return getattr(_base, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
