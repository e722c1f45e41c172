# SPDX-License-Identifier: Apache-2.0
"""Small pure functions around descriptions, ids, layer ranges and options."""

from __future__ import annotations

from ..data_type import DataType
from ..status import LLMStatusCode, raise_if_false, raise_if_true
from ..utils.utils import UINT64_MAX, check_isinstance, check_uint32
from .llm_types import CacheDesc, Placement, calc_tensor_size
from .transfer import TransferAsyncThread, TransferCacheJob, TransferCacheParameters, transfer_cache_async

__all__ = [
    "CacheDescParser",
    "TransferAsyncThread",
    "TransferCacheJob",
    "TransferCacheParameters",
    "calc_tensor_size",
    "clone_cache_desc",
    "is_invalid_id",
    "is_valid_id",
    "layer_range_to_tensor_indices",
    "parse_listen_ip_info",
    "to_data_type",
    "transfer_cache_async",
    "verify_cache_shape",
]


def clone_cache_desc(cache_desc: CacheDesc) -> CacheDesc:
    """Return an equal description with a shape of its own."""
    return CacheDesc(
        cache_desc.num_tensors,
        cache_desc.shape[:],
        cache_desc.data_type,
        cache_desc.placement,
        cache_desc.batch_dim,
        cache_desc.seq_len_dim_index,
        cache_desc.kv_tensor_format,
    )


def verify_cache_shape(shape: list[int]) -> None:
    """Check a shape whose dimensions may be -1 (not known yet)."""
    raise_if_false(shape, "shape should not be empty")
    for dim in shape:
        raise_if_true(dim == 0, "shape {} should not contain 0", shape)
        raise_if_true(
            dim < -1,
            "dimensions of shape {} should be positive or -1",
            shape,
            status_code=LLMStatusCode.LLM_SUCCESS,  # as documented
        )


def to_data_type(text: str) -> DataType:
    """Return the data type whose number stands in text."""
    by_text = {str(dtype.value): dtype for dtype in DataType}
    raise_if_false(text in by_text, "data type {!r} is not supported", text)
    return by_text[text]


def is_invalid_id(value: int) -> bool:
    """Tell whether value stands for "no id"."""
    return value < 0 or value == UINT64_MAX


def is_valid_id(value: int) -> bool:
    return not is_invalid_id(value)


def layer_range_to_tensor_indices(
    src_layer_range: range | None, dst_layer_range: range | None, tensor_num_per_layer: int = 2
) -> tuple[list[int], list[int]]:
    """Return the indices of the tensors of the source's and of the destination's layers."""
    return (
        _tensor_indices("src_layer_range", src_layer_range, tensor_num_per_layer),
        _tensor_indices("dst_layer_range", dst_layer_range, tensor_num_per_layer),
    )


def _tensor_indices(name: str, layers: range | None, tensor_num_per_layer: int) -> list[int]:
    check_isinstance(name, layers, range)
    if layers is None:
        return []
    raise_if_false(layers.step == 1, "step of {} should be 1, but got {}", name, layers.step)
    if not layers:
        return []
    raise_if_false(layers.start >= 0, "{} should not start below 0, but got {}", name, layers)
    first, end = layers.start * tensor_num_per_layer, layers.stop * tensor_num_per_layer
    check_uint32(f"first tensor index of {name}", first)
    check_uint32(f"last tensor index of {name}", end - 1)
    return list(range(first, end))


def parse_listen_ip_info(listen_ip_info: str) -> tuple[str, int]:
    """Split "ip:port". The ip is not looked at."""
    parts = listen_ip_info.split(":")
    raise_if_false(len(parts) == 2, "listen ip info should be ip:port, but got {!r}", listen_ip_info)
    return parts[0], int(parts[1])


class CacheDescParser:
    """Reads a description from an options dict."""

    SHAPES = "llm.RefInputShapes"
    DTYPES = "llm.RefInputDtypes"
    SEQ_LEN_DIM_INDEX = "llm.RefInputSeqLenDimIndex"
    TENSOR_FORMAT = "llm.kvTensorFormat"

    @classmethod
    def parse_by_options(cls, options: dict[str, str]) -> CacheDesc:
        """Return the description of the reference inputs; LLMException where it is missing or does not fit together."""
        shapes = [_parse_shape(text) for text in cls._required(options, cls.SHAPES).split(";")]
        dtypes = [to_data_type(text) for text in cls._required(options, cls.DTYPES).split(";")]
        raise_if_false(len(shapes) == len(dtypes), "{} shapes do not fit {} data types", len(shapes), len(dtypes))
        shape, dtype = shapes[0], dtypes[0]
        raise_if_false(all(other == shape for other in shapes), "{} should all be the same", cls.SHAPES)
        raise_if_false(all(other is dtype for other in dtypes), "{} should all be the same", cls.DTYPES)
        return CacheDesc(
            len(shapes),
            shape,
            dtype,
            Placement.DEVICE,
            0,
            cls._seq_len_dim_index(options, shape),
            options.get(cls.TENSOR_FORMAT),
        )

    @staticmethod
    def _required(options: dict[str, str], key: str) -> str:
        raise_if_false(key in options, "option {} is required", key)
        return options[key]

    @classmethod
    def _seq_len_dim_index(cls, options: dict[str, str], shape: list[int]) -> int:
        text = options.get(cls.SEQ_LEN_DIM_INDEX)
        if text is not None:
            index = _parse_int(cls.SEQ_LEN_DIM_INDEX, text)
            raise_if_false(0 <= index < len(shape), "{} is out of range: {}", cls.SEQ_LEN_DIM_INDEX, index)
            return index
        unknown = [index for index, dim in enumerate(shape) if index > 0 and dim == -1]
        raise_if_true(len(unknown) > 1, "shape {} should have at most one -1 behind the batch", shape)
        return unknown[0] if unknown else -1


def _parse_shape(text: str) -> list[int]:
    shape = [_parse_int(CacheDescParser.SHAPES, dim) for dim in text.split(",") if text]
    verify_cache_shape(shape)
    return shape


def _parse_int(key: str, text: str) -> int:
    digits = text.strip()
    raise_if_false(digits.lstrip("-").isdecimal() and digits.count("-") <= 1, "{} has no number: {!r}", key, text)
    return int(digits)
