# SPDX-License-Identifier: Apache-2.0
"""How keys and tensors are named in the words that cross to the engine."""

from __future__ import annotations

from ..utils.utils import UINT64_MAX
from .llm_types import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex

RAW_ADDRESSES, NORMAL_KEY, PREFIX_KEY, ID_KEY = 0, 1, 2, 3  # kinds of keys
NO_KEY = RAW_ADDRESSES, 0, 0, 0, 0
ALL_TENSORS = -1, 0  # the first one, how many
WORD = (1 << 64) - 1  # bits of a word: a negative number crosses as its two's complement


def engine_key(
    key: CacheKey | CacheKeyByIdAndIndex | BlocksCacheKey,
) -> tuple[int, int, int, int, int]:
    """Return how the engine names a key: kind, id, model id, cache id, batch."""
    if isinstance(key, BlocksCacheKey):
        check_word("cluster_id", key.cluster_id)
        return NORMAL_KEY, UINT64_MAX, check_word("model_id", key.model_id), 0, 0
    if isinstance(key, CacheKeyByIdAndIndex):
        return ID_KEY, 0, 0, key.cache_id, key.batch_index
    if key.prefix_id != UINT64_MAX:
        return PREFIX_KEY, key.prefix_id, key.model_id, 0, 0
    return NORMAL_KEY, key.req_id, key.model_id, 0, 0


def check_word(name: str, value: int) -> int:
    """Check a number of a key or a MemInfo, which has no range of its own: what is no u64 is a TypeError of the native layer."""
    if not 0 <= value <= UINT64_MAX:
        raise TypeError(f"{name} should be in range [0, {UINT64_MAX}], but got {value}")
    return value
