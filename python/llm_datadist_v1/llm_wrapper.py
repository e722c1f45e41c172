# SPDX-License-Identifier: Apache-2.0
"""Status values under the names that the original's native module has."""

from __future__ import annotations

from llm_datadist.llm_datadist_wrapper import *  # noqa: F403
