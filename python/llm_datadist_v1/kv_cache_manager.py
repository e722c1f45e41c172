# SPDX-License-Identifier: Apache-2.0
"""KvCacheManager: the caches of the older API, a policy on the engine of llm_datadist."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Sequence
from typing import Any

from llm_datadist.status import LLMException, LLMStatusCode, raise_if_false, raise_if_true
from llm_datadist.utils.utils import check_int64, check_isinstance, check_uint32
from llm_datadist.v2.cache_manager import CacheManager
from llm_datadist.v2.llm_types import Cache, CacheDesc, CacheKey, CacheKeyByIdAndIndex, KvCache, Placement
from llm_datadist.v2.llm_utils import parse_listen_ip_info

from .configs import LLMRole

__all__ = ["KvCacheManager"]

_POOL = "llm.MemPoolConfig"
_GRAPH_MEMORY = "ge.flowGraphMemMaxSize"
_UTILIZATION = "llm.MemoryUtilization"
_LISTEN_INFO = "llm.listenIpInfo"


def native_options(options: dict[str, str]) -> dict[str, str]:
    """Return the engine's options for the older API: its memory budget as a pool, its first listen address."""
    out = dict(options)
    budget = int(float(_budget(options)) * float(options.get(_UTILIZATION, "0.95")))
    out[_POOL] = json.dumps({"memory_size": budget})
    if _LISTEN_INFO in options:
        ip, port = parse_listen_ip_info(options[_LISTEN_INFO].split(";")[0])
        out["llm.ListenIp"], out["llm.ListenPort"] = ip, str(port)
    return out


def _budget(options: dict[str, str]) -> int:
    """Bytes for KV cache: half of the machine's memory where nothing is said; reserved, not committed."""
    if _GRAPH_MEMORY in options:
        return int(options[_GRAPH_MEMORY])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


class KvCacheManager:
    """The caches of one LLMDataDist in the older mode: a PROMPT binds keys, a DECODER pulls. Made by LLMDataDist."""

    def __init__(self, llm_engine: Any, role: LLMRole) -> None:
        self._llm_engine = llm_engine
        self._role = role
        self._caches = CacheManager(llm_engine, {_POOL: "budget"})
        self._released: deque[int] = deque()
        self._initialized = True

    def is_initialized(self) -> bool:
        """Tell whether the engine lives."""
        return self._initialized

    def _switch_role(self, role: LLMRole) -> None:
        self._role = role

    def _release_later(self, cache_id: int) -> None:
        """Take the id of a cache that went out of scope; the next call frees it. Called from __del__: does nothing else."""
        self._released.append(cache_id)

    def _drain(self) -> None:
        while self._released:
            self._llm_engine.deallocate("deallocate_cache", self._released.popleft(), False)

    def allocate_cache(self, cache_desc: CacheDesc, cache_keys: Sequence[CacheKey] = ()) -> KvCache:
        """Allocate a contiguous cache; on a PROMPT, key i is bound to batch row i.

        Raises LLMException: LLM_DEVICE_OUT_OF_MEMORY where the budget is used up.
        """
        check_isinstance("cache_desc", cache_desc, CacheDesc)
        check_isinstance("cache_keys", cache_keys, [list, tuple], CacheKey)
        raise_if_false(cache_desc.num_tensors > 0, "num_tensors should be positive")
        raise_if_false(
            cache_desc.placement == Placement.DEVICE,
            "placement should be Placement.DEVICE, but got {!s}",
            cache_desc.placement,
        )
        raise_if_true(cache_keys and self._role != LLMRole.PROMPT, "only a PROMPT allocates with cache_keys")
        self._drain()
        try:
            cache = self._caches.allocate_cache(cache_desc, tuple(cache_keys))
        except LLMException as exc:
            raise _older(exc, {LLMStatusCode.LLM_OUT_OF_MEMORY: LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY}) from exc
        return KvCache(cache.cache_id, cache_desc, [cache.tensor_addrs], self)

    def deallocate_cache(self, cache: KvCache) -> None:
        """Give up a cache. It answers pulls until its last key is released.

        Raises LLMException: LLM_KV_CACHE_NOT_EXIST for one that was given up before.
        """
        check_isinstance("cache", cache, KvCache)
        _check_device("cache", cache)
        raise_if_false(
            cache._valid,
            "cache {} was deallocated before",
            cache.cache_id,
            status_code=LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
        )
        self._drain()
        self._llm_engine.deallocate("deallocate_cache", cache.cache_id, False)
        cache._per_device_tensor_addrs = []
        cache._valid = False

    def remove_cache_key(self, cache_key: CacheKey) -> None:
        """Release a key. An unknown key is a success. PROMPT only."""
        raise_if_false(self._role == LLMRole.PROMPT, "only a PROMPT removes cache keys")
        check_isinstance("cache_key", cache_key, CacheKey)
        self._drain()
        self._caches.remove_cache_key(cache_key)

    def pull_cache(
        self,
        cache_key: CacheKey | CacheKeyByIdAndIndex,
        kv_cache: KvCache,
        batch_index: int = 0,
        size: int = -1,
        **kwargs: Any,
    ) -> None:
        """Pull a row of the prompt's cache into row batch_index of a local one. DECODER only.

        Keywords: src_layer_range, dst_layer_range, tensor_num_per_layer. Raises LLMException as CacheManager.pull_cache
        does, with LLM_WAIT_PROCESS_TIMEOUT for a deadline. src_cache_offset and dst_cache_offset are LLM_FEATURE_NOT_ENABLED.
        """
        raise_if_false(self._role == LLMRole.DECODER, "only a DECODER pulls")
        check_isinstance("cache_key", cache_key, [CacheKey, CacheKeyByIdAndIndex])
        check_isinstance("kv_cache", kv_cache, KvCache)
        _check_device("kv_cache", kv_cache)
        check_int64("size", size)
        check_uint32("batch_index", batch_index)
        raise_if_false(size == -1 or size > 0, "size should be -1 or positive, but got {}", size)
        for name in ("src_cache_offset", "dst_cache_offset"):
            raise_if_true(
                kwargs.get(name) is not None,
                "{} is not available in this version",
                name,
                status_code=LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
            )
        self._drain()
        addrs = [addr for device in kv_cache.per_device_tensor_addrs for addr in device]
        local = Cache(kv_cache.cache_id, kv_cache.cache_desc, addrs, self._caches, False, False)
        try:
            self._caches.pull_cache(cache_key, local, batch_index, size, **kwargs)
        except LLMException as exc:
            raise _older(exc, {LLMStatusCode.LLM_TIMEOUT: LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT}) from exc

    @staticmethod
    def check_cache_key(cache_key: CacheKey) -> None:
        """Raise LLMException unless exactly one of req_id and prefix_id is valid."""
        CacheManager.check_cache_key(cache_key)


def _check_device(name: str, cache: KvCache) -> None:
    raise_if_true(cache.cache_desc.placement == Placement.HOST, "{} should not be Placement.HOST", name)


def _older(exc: LLMException, codes: dict[LLMStatusCode, LLMStatusCode]) -> LLMException:
    """Return a failure with the code that the older API has for it."""
    if exc.status_code not in codes:
        return exc
    return LLMException(
        *exc.args,
        status_code=codes[exc.status_code],
        operation=exc.operation,
        peer=exc.peer,
        address=exc.address,
        stage=exc.stage,
        cause=exc.cause,
        hint=exc.hint,
    )
