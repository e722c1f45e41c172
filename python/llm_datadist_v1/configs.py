# SPDX-License-Identifier: Apache-2.0
"""Roles and clusters of llm_datadist, and the older config: without the link and backend options."""

from __future__ import annotations

from llm_datadist.configs import BaseConfig, LLMClusterInfo, LLMRole, Option, output_max_size, trans_str_ip

__all__ = ["LLMClusterInfo", "LLMConfig", "LLMRole", "LlmConfig", "trans_str_ip"]


class LlmConfig(BaseConfig):
    """The options of an engine."""

    output_max_size: Option[int | str] = output_max_size(unset="")


LLMConfig = LlmConfig
