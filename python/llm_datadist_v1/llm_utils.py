# SPDX-License-Identifier: Apache-2.0
"""The helpers of llm_datadist."""

from __future__ import annotations

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

__all__ = [
    "CacheDescParser",
    "TransferCacheJob",
    "TransferCacheParameters",
    "calc_tensor_size",
    "clone_cache_desc",
    "is_invalid_id",
    "is_valid_id",
    "layer_range_to_tensor_indices",
    "parse_listen_ip_info",
    "to_data_type",
    "verify_cache_shape",
]
