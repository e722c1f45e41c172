# SPDX-License-Identifier: Apache-2.0
"""The process that the benchmark pulls from: owns caches until its standard input ends. None of its Python runs in a pull."""

from __future__ import annotations

import sys

from ends import OWNER, Setting, Talk, begin, cpu_seconds, desc_of, pool_tensors, private_tensors
from workloads import Shape, Words, fill

from llm_datadist import BlocksCacheKey, Cache, LLMDataDist, LLMRole


def main() -> None:
    setting, talk = Setting.load(sys.argv[1]), Talk()
    engine = begin(setting, talk, LLMRole.PROMPT, OWNER)
    if engine is None:
        return
    kept = [offer(engine, shape, model, setting.pool) for model, shape in enumerate(setting.shapes)]
    talk.say(address=engine.listen_address, ids=[cache.cache_id for cache, _ in kept])
    for _ in talk.commands():  # there is one only
        talk.say(cpu=cpu_seconds())
    engine.finalize()


def offer(engine: LLMDataDist, shape: Shape, model: int, pool: bool) -> tuple[Cache, list[Words]]:
    """Make a cache and fill it. Blocks are known by their model id, a row by the cache's id, which no pull releases."""
    manager, desc, key = engine.cache_manager, desc_of(shape), BlocksCacheKey(OWNER, model)
    if pool:
        cache = manager.allocate_cache(desc) if shape.is_row else manager.allocate_blocks_cache(desc, key)
        tensors = pool_tensors(cache.tensor_addrs, shape)
    else:
        tensors = private_tensors(shape)
    for index, words in enumerate(tensors):
        fill(index, words)
    if not pool:
        addrs = [words.ctypes.data for words in tensors]
        cache = manager.register_cache(desc, addrs) if shape.is_row else manager.register_blocks_cache(desc, addrs, key)
    return cache, tensors


if __name__ == "__main__":
    main()
