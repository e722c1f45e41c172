# SPDX-License-Identifier: Apache-2.0
"""Data types of tensor elements, their sizes, and their numpy counterparts.

The three numpy tables are built when they are first asked for: importing this module does not import numpy.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from . import metadef_wrapper as native


class DataType(Enum):
    """Type of a tensor's elements."""

    DT_FLOAT = native.DT_FLOAT
    DT_FLOAT16 = native.DT_FLOAT16
    DT_BF16 = native.DT_BF16
    DT_INT8 = native.DT_INT8
    DT_INT16 = native.DT_INT16
    DT_UINT16 = native.DT_UINT16
    DT_UINT8 = native.DT_UINT8
    DT_INT32 = native.DT_INT32
    DT_INT64 = native.DT_INT64
    DT_UINT32 = native.DT_UINT32
    DT_UINT64 = native.DT_UINT64
    DT_BOOL = native.DT_BOOL
    DT_DOUBLE = native.DT_DOUBLE
    DT_STRING = native.DT_STRING


ELEMENT_BYTES: dict[int, int] = {
    native.DT_FLOAT: 4,
    native.DT_FLOAT16: 2,
    native.DT_BF16: 2,
    native.DT_INT8: 1,
    native.DT_INT16: 2,
    native.DT_UINT16: 2,
    native.DT_UINT8: 1,
    native.DT_INT32: 4,
    native.DT_INT64: 8,
    native.DT_UINT32: 4,
    native.DT_UINT64: 8,
    native.DT_BOOL: 1,
    native.DT_DOUBLE: 8,
    native.DT_STRING: 16,  # the documented size of a string's head, not of its text
}

python_dtype_2_dwrapper_dtype: dict[DataType, int] = {dtype: dtype.value for dtype in DataType}
_dwrapper_dtype_to_python_dtype: dict[int, DataType] = {dtype.value: dtype for dtype in DataType}


def get_python_dtype_from_wrapper_dtype(wrapper_dtype: int) -> DataType:
    """Return the member with this number; ValueError if there is none."""
    dtype = _dwrapper_dtype_to_python_dtype.get(wrapper_dtype)
    if dtype is None:
        raise ValueError(f"unsupported data type {wrapper_dtype}")
    return dtype


NUMPY_TABLES = ("dtype_to_np_dtype", "valid_np_dtypes", "np_dtype_to_dtype")


def __getattr__(name: str) -> Any:
    if name not in NUMPY_TABLES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals().update(_numpy_tables())
    return globals()[name]


def _numpy_tables() -> dict[str, Any]:
    import numpy as np

    dtype_to_np_dtype = {
        DataType.DT_FLOAT: np.float32,
        DataType.DT_FLOAT16: np.float16,
        DataType.DT_BF16: np.float16,  # same width; the bits are taken as bfloat16
        DataType.DT_INT8: np.int8,
        DataType.DT_INT16: np.int16,
        DataType.DT_UINT16: np.uint16,
        DataType.DT_UINT8: np.uint8,
        DataType.DT_INT32: np.int32,
        DataType.DT_INT64: np.int64,
        DataType.DT_UINT32: np.uint32,
        DataType.DT_UINT64: np.uint64,
        DataType.DT_BOOL: np.bool_,
        DataType.DT_DOUBLE: np.double,
        DataType.DT_STRING: np.bytes_,
    }
    return {
        "dtype_to_np_dtype": dtype_to_np_dtype,
        "valid_np_dtypes": list(dtype_to_np_dtype.values()),
        "np_dtype_to_dtype": {
            np.dtype(np_dtype): dtype for dtype, np_dtype in dtype_to_np_dtype.items() if dtype is not DataType.DT_BF16
        },
    }
