# SPDX-License-Identifier: Apache-2.0
"""The cluster description of the older API: the objects of llm_datadist."""

from __future__ import annotations

from llm_datadist.v2.config import ClusterConfig, EngineConfig

__all__ = ["ClusterConfig", "EngineConfig"]
