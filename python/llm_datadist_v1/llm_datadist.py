# SPDX-License-Identifier: Apache-2.0
"""LLMDataDist of the older package: always with the engine of the older API, and with the caller's own options."""

from __future__ import annotations

import atexit

from llm_datadist.utils.utils import check_isinstance
from llm_datadist.v2.llm_datadist import BaseDataDist, shut_down

from .engine import utilization

__all__ = ["LLMDataDist"]


class LLMDataDist(BaseDataDist):
    """One end of the transfer of KV cache: a PROMPT listens and binds keys, a DECODER links and pulls.

    init adds to the dict that it is given: llm.Role, llm.ClusterInfo, ge.resourceConfigPath.
    """

    llm_engine_instance: BaseDataDist | None = None

    @staticmethod
    def _package() -> type[BaseDataDist]:
        return LLMDataDist

    @staticmethod
    def _options_of_its_own(options: dict[str, str]) -> dict[str, str]:
        utilization(options)  # ValueError before anything is changed
        return options

    @staticmethod
    def _check_listens(switch_options: dict[str, str] | None) -> None:
        check_isinstance("switch_options", switch_options, dict, allow_none=False)
        BaseDataDist._check_listens(switch_options)


def _shutdown_handler() -> None:
    shut_down(LLMDataDist.llm_engine_instance)


atexit.register(_shutdown_handler)
