# SPDX-License-Identifier: Apache-2.0
"""Status codes and the exception: the objects of llm_datadist, so that one except clause catches both packages'."""

from __future__ import annotations

from llm_datadist.status import (
    LLMException,
    LLMStatusCode,
    Status,
    code_2_status,
    handle_llm_status,
    raise_if_false,
    raise_if_true,
)

__all__ = [
    "LLMStatusCode",
    "LLMException",
    "Status",
    "code_2_status",
    "handle_llm_status",
    "raise_if_false",
    "raise_if_true",
]
