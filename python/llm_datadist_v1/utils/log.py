# SPDX-License-Identifier: Apache-2.0
"""The logger of the older package: that of llm_datadist under another name."""

from __future__ import annotations

from llm_datadist.utils.log import LOG_FORMAT, PackageLog, _find_caller

__all__ = ["LOG_FORMAT", "_find_caller", "error", "get_logger", "info", "warn"]

_log = PackageLog("LLM_ENGINE")
get_logger = _log.get_logger
info = _log.info
warn = _log.warn
error = _log.error
