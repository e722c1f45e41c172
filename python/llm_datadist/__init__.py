# SPDX-License-Identifier: Apache-2.0
"""Move KV cache between language-model processes: the LLM-DataDist Python API, openly implemented.

Importing the package loads neither the native engine nor numpy; ``LLMDataDist.init`` loads the engine. ``Tensor``,
``TensorDesc`` and ``KvCacheManager`` belong to the older package llm_datadist_v1, which is imported when one of them
is first asked for.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from typing import TYPE_CHECKING, Any

from .configs import LLMClusterInfo, LLMConfig, LlmConfig, LLMRole
from .data_type import DataType
from .status import LLMException, LLMStatusCode, Status
from .utils import log
from .v2.llm_datadist import LLMDataDist
from .v2.llm_types import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    CacheTask,
    KvCache,
    LayerSynchronizer,
    MemInfo,
    Memtype,
    Placement,
    RegisterMemStatus,
    TransferConfig,
    TransferWithCacheKeyConfig,
)

if TYPE_CHECKING:
    from llm_datadist_v1 import KvCacheManager, Tensor, TensorDesc

__version__ = "0.1.0"

__all__ = [
    "LLMClusterInfo",
    "LLMStatusCode",
    "LLMException",
    "LLMRole",
    "LlmConfig",
    "LLMConfig",
    "DataType",
    "Status",
    "CacheDesc",
    "CacheKey",
    "CacheKeyByIdAndIndex",
    "KvCache",
    "Cache",
    "BlocksCacheKey",
    "LLMDataDist",
    "Placement",
    "RegisterMemStatus",
    "LayerSynchronizer",
    "TransferConfig",
    "CacheTask",
    "TransferWithCacheKeyConfig",
    "Memtype",
    "MemInfo",
    "TensorDesc",
    "Tensor",
    "KvCacheManager",
]

_v1_list = __all__[-3:]
v2_list = __all__[:-3]

os.environ.setdefault("AUTO_USE_UC_MEMORY", "0")  # documented; for the vendor's runtime


def __getattr__(name: str) -> Any:
    if name in _v1_list:
        return getattr(importlib.import_module("llm_datadist_v1"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# The vendor's distribution, llm_datadist or llm-datadist, and not ours, llm-datadist-open.
_VENDOR_METADATA = re.compile(r"llm[-_.]+datadist(-\d.*)?\.(dist|egg)-info", re.IGNORECASE)


def _vendor_metadata() -> str | None:
    """Return where the vendor's package of the same name is installed, if it is.

    Reads the directories of sys.path by itself, which takes well under a millisecond each; importlib.metadata would
    cost more to import than the rest of this package.
    """
    for directory in sys.path:
        try:
            names = os.listdir(directory or os.curdir)
        except OSError:
            continue
        for name in names:
            if _VENDOR_METADATA.fullmatch(name):
                return os.path.join(directory, name)
    return None


def _warn_if_vendor_is_beside() -> None:
    vendor = _vendor_metadata()
    if vendor is not None:
        log.warn(
            "two packages named llm_datadist are installed; in use is llm-datadist-open %s at %s, not that of %s",
            __version__,
            os.path.dirname(__file__),
            vendor,
        )


_warn_if_vendor_is_beside()
