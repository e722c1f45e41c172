# SPDX-License-Identifier: Apache-2.0
"""What the tests of pushes share, above all what has to have arrived at the end that is pushed to."""

from __future__ import annotations

from typing import Any

import numpy as np

from llm_datadist import LayerSynchronizer, LLMStatusCode
from peers import TARGET, pattern

SUCCESS = LLMStatusCode.LLM_SUCCESS
PARAM_INVALID = LLMStatusCode.LLM_PARAM_INVALID
NOT_EXIST = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
NOT_YET_LINK = LLMStatusCode.LLM_NOT_YET_LINK
FAILED = LLMStatusCode.LLM_FAILED
TIMEOUT = LLMStatusCode.LLM_TIMEOUT


def source(number: int, tensor: int, shape: Any) -> np.ndarray:
    """Return the bytes of a tensor with the pattern of number, a row or block of it at each index."""
    return pattern(number, tensor, int(np.prod(shape))).reshape(shape[0], -1)


def arrived(end: Any, name: str, rows: dict[tuple[int, int], Any]) -> None:
    """Check a cache: where rows say so ((tensor, row or block) -> its first bytes) it is new, everywhere else as it was."""
    got = end.content(name)
    description = end.run("result = end.caches[cache].cache_desc.shape", cache=name)
    for tensor, content in enumerate(got):
        wanted = source(TARGET, tensor, (description[0], content.size // description[0])).copy()
        for (at, row), new in rows.items():
            if at == tensor:
                wanted[row, : len(new)] = new
        assert np.array_equal(content, wanted.reshape(-1)), f"tensor {tensor}"


class Ready(LayerSynchronizer):
    """Every layer is there."""

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return True
