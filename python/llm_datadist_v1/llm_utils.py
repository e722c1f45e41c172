# SPDX-License-Identifier: Apache-2.0
"""The helpers of llm_datadist, and the tensors of a cache."""

from __future__ import annotations

from llm_datadist.status import raise_if_false
from llm_datadist.utils.utils import check_int32, check_isinstance
from llm_datadist.v2.llm_types import KvCache
from llm_datadist.v2.llm_utils import (
    CacheDescParser,
    TransferCacheJob,
    TransferCacheParameters,
    calc_tensor_size,
    clone_cache_desc,
    is_invalid_id,
    is_valid_id,
    layer_range_to_tensor_indices,
    parse_listen_ip_info,
    to_data_type,
    verify_cache_shape,
)

from .tensor import Tensor, TensorDesc

__all__ = [
    "CacheDescParser",
    "TransferCacheJob",
    "TransferCacheParameters",
    "build_npu_tensors",
    "calc_tensor_size",
    "clone_cache_desc",
    "is_invalid_id",
    "is_valid_id",
    "layer_range_to_tensor_indices",
    "parse_listen_ip_info",
    "to_data_type",
    "verify_cache_shape",
]


def build_npu_tensors(kv_cache: KvCache, device_index: int = 0) -> list[Tensor]:
    """Return the tensors of a cache on one device: looks at the cache's memory, which last as long as the cache."""
    check_isinstance("kv_cache", kv_cache, KvCache, allow_none=False)
    check_int32("device_index", device_index)
    per_device = kv_cache.per_device_tensor_addrs
    raise_if_false(
        0 <= device_index < len(per_device),
        "device_index should be in range [0, {}), but got {}",
        len(per_device),
        device_index,
    )
    described = TensorDesc(kv_cache.cache_desc.data_type, kv_cache.cache_desc.shape)
    return [Tensor(addr, described) for addr in per_device[device_index]]
