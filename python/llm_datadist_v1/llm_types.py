# SPDX-License-Identifier: Apache-2.0
"""The types of llm_datadist; only a CacheTask reports a timeout with another code here."""

from __future__ import annotations

from llm_datadist.v2.llm_types import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    KvCache,
    LayerSynchronizer,
    MemInfo,
    Memtype,
    Placement,
    PushType,
    RegisterMemStatus,
    TransferConfig,
    TransferWithCacheKeyConfig,
    check_layer_range,
    int_to_mem_status_dict,
)
from llm_datadist.v2.llm_types import CacheTask as _CacheTask

from .status import LLMStatusCode

__all__ = [
    "BlocksCacheKey",
    "Cache",
    "CacheDesc",
    "CacheKey",
    "CacheKeyByIdAndIndex",
    "CacheTask",
    "KvCache",
    "LayerSynchronizer",
    "MemInfo",
    "Memtype",
    "Placement",
    "PushType",
    "RegisterMemStatus",
    "TransferConfig",
    "TransferWithCacheKeyConfig",
    "check_layer_range",
    "int_to_mem_status_dict",
]


class CacheTask(_CacheTask):
    """A layer-wise transfer in the background."""

    _TIMEOUT_CODE = LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT
