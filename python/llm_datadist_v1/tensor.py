# SPDX-License-Identifier: Apache-2.0
"""Tensors: numpy arrays with a described type and shape. numpy is imported when the first tensor is made."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llm_datadist.v2.llm_utils import calc_tensor_size

from . import data_type as types
from .data_type import DataType, get_python_dtype_from_wrapper_dtype
from .utils.utils import check_isinstance, check_uint64

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Tensor", "TensorDesc"]


class TensorDesc:
    """Type and shape of a tensor."""

    def __init__(self, dtype: DataType, shape: Sequence[int]) -> None:
        self._dtype = check_isinstance("dtype", dtype, DataType, allow_none=False)
        self._shape = list(check_isinstance("shape", shape, [list, tuple], int, allow_none=False))

    @property
    def dtype(self) -> DataType:
        return self._dtype

    @property
    def shape(self) -> list[int]:
        return self._shape

    def __repr__(self) -> str:
        return f"TensorDesc(dtype={self._dtype}, shape={self._shape})"


class Tensor:
    """A tensor with a copy of an array's or another tensor's elements, or a look at a cache's.

    An int as data is what the manager passes for a tensor of a cache: the address of the elements, which belong to
    the cache. Such a tensor needs a description, and must not be read when the cache has been deallocated.
    """

    def __init__(self, data: npt.NDArray[Any] | Tensor | int, tensor_desc: TensorDesc | None = None) -> None:
        import numpy as np

        check_isinstance("data", data, [np.ndarray, Tensor, int], allow_none=False)
        check_isinstance("tensor_desc", tensor_desc, TensorDesc)
        if isinstance(data, np.ndarray):
            self._desc = _described(data, tensor_desc)
            self._array: npt.NDArray[Any] = data.copy()
        elif isinstance(data, int):
            if tensor_desc is None:
                raise RuntimeError("a tensor made of an address needs a tensor_desc")
            self._desc = tensor_desc
            self._array = _array_at(data, tensor_desc)
        else:
            self._desc = data._desc
            self._array = data._array.copy()

    @staticmethod
    def from_tensor_tuple(tensor_tuple: tuple[int, int, Sequence[int]]) -> Tensor:
        """Make a tensor of (address, number of the data type, shape)."""
        address, dtype, shape = tensor_tuple
        return Tensor(address, TensorDesc(get_python_dtype_from_wrapper_dtype(dtype), shape))

    def numpy(self, copy: bool = False) -> npt.NDArray[Any]:
        """Return the elements: a view of the tensor's own memory, or with copy an array independent of it.

        DT_FLOAT16 comes flat. DT_BF16 comes flat and widened to float32. DT_STRING needs copy.
        """
        check_isinstance("copy", copy, bool, allow_none=False)
        dtype = self._desc.dtype
        if dtype is DataType.DT_STRING:
            if not copy:
                raise RuntimeError("a tensor of DT_STRING can only be copied: call numpy(copy=True)")
            return _decoded(self._array).reshape(self._desc.shape)
        if dtype is DataType.DT_BF16:
            return _widened(self._array)
        array = self._array.reshape(-1) if dtype is DataType.DT_FLOAT16 else self._array
        return array.copy() if copy else array

    def __repr__(self) -> str:
        text = self.numpy(copy=self._desc.dtype is DataType.DT_STRING)
        return f"Tensor({text},tensor_desc={self._desc})"


def _described(array: npt.NDArray[Any], desc: TensorDesc | None) -> TensorDesc:
    """Return the description of array: desc if it fits, else the one that follows from array."""
    if not array.flags.c_contiguous:
        raise RuntimeError("data should be C-contiguous")
    is_text = array.dtype.kind in "US"
    if desc is None:
        dtype = DataType.DT_STRING if is_text else types.np_dtype_to_dtype.get(array.dtype)
        if dtype is None:
            raise RuntimeError(f"dtype {array.dtype} is not supported")
        return TensorDesc(dtype, array.shape)
    if list(array.shape) != desc.shape:
        raise RuntimeError(f"shape of data {list(array.shape)} is not that of tensor_desc {desc.shape}")
    wanted = types.dtype_to_np_dtype[desc.dtype]
    if is_text if desc.dtype is DataType.DT_STRING else array.dtype == wanted:
        return desc
    raise RuntimeError(f"dtype of data {array.dtype} is not that of tensor_desc {desc.dtype}")


def _array_at(address: int, desc: TensorDesc) -> npt.NDArray[Any]:
    """Return a view of the memory at address. The manager vouches for the address; nothing here could check it."""
    import numpy as np

    check_uint64("data", address)
    if address == 0 or desc.dtype is DataType.DT_STRING:
        raise RuntimeError(f"there is no tensor of {desc.dtype} at address {address}")
    memory = (ctypes.c_ubyte * calc_tensor_size(desc.shape, desc.dtype)).from_address(address)
    array: npt.NDArray[Any] = np.ctypeslib.as_array(memory).view(types.dtype_to_np_dtype[desc.dtype])
    return array.reshape(desc.shape)


def _decoded(array: npt.NDArray[Any]) -> npt.NDArray[np.str_]:
    import numpy as np

    return np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array.copy()


def _widened(array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return bfloat16 bits as float32, whose upper half they are."""
    import numpy as np

    return (array.reshape(-1).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
