# SPDX-License-Identifier: Apache-2.0
"""KvCacheManager: the caches of the older API, a policy on the engine of llm_datadist.

A process may have several devices. A cache then has its tensors once for each: to the engine it is one cache, in which
device k has the tensors from k times num_tensors on.
"""

from __future__ import annotations

import weakref
from array import array
from collections import deque
from collections.abc import Sequence
from itertools import chain
from typing import Any, Callable

from llm_datadist import _options
from llm_datadist._blocks import pack_blocks
from llm_datadist.status import LLMException, LLMStatusCode, raise_if_false, raise_if_true
from llm_datadist.utils.utils import (
    UINT64_MAX,
    check_int32,
    check_int64,
    check_isinstance,
    check_list_uint64,
    check_positive_or_set_default,
    check_uint32,
    check_uint64,
)
from llm_datadist.v2.cache_manager import CacheManager, check_swap, pack_addrs, pack_offsets, per_layer_of
from llm_datadist.v2.llm_types import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    KvCache,
    LayerSynchronizer,
    Placement,
    TransferConfig,
)
from llm_datadist.v2.llm_utils import is_valid_id
from llm_datadist.v2.transfer import transfer_cache_async

from .configs import LLMRole
from .engine import OLDER_TIMEOUT, Engine, older_codes
from .llm_types import CacheTask
from .llm_utils import build_npu_tensors
from .tensor import Tensor
from .utils.utils import check_dict

__all__ = ["KvCacheManager"]

_NO_MEMORY = {LLMStatusCode.LLM_OUT_OF_MEMORY: LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY}
_UNEVEN = {LLMStatusCode.LLM_PARAM_INVALID: LLMStatusCode.LLM_FAILED}


class _Released:
    """The ids of caches that went out of scope: all that a cache knows of its manager, so that none keeps an engine alive."""

    def __init__(self, manager: KvCacheManager) -> None:
        self._manager = weakref.ref(manager)
        self.ids: deque[int] = deque()

    def is_initialized(self) -> bool:
        manager = self._manager()
        return manager is not None and manager.is_initialized()

    def _release_later(self, cache_id: int) -> None:
        """Take an id; the manager's next call frees it. Called from __del__: does nothing else."""
        self.ids.append(cache_id)


class KvCacheManager:
    """The caches of one LLMDataDist in the older mode: a PROMPT binds keys, a DECODER pulls. Made by LLMDataDist."""

    def __init__(self, llm_engine: Engine, role: LLMRole) -> None:
        self._llm_engine = llm_engine
        self._role = role
        self._native = llm_engine.native
        self._caches = CacheManager(self._native, {_options.DEVICE_POOL: "the budget"})
        self._released = _Released(self)
        self._initialized = True

    def is_initialized(self) -> bool:
        """Tell whether the engine lives."""
        return self._initialized

    def _switch_role(self, role: LLMRole) -> None:
        self._role = role

    def _drain(self) -> bool:
        """Free what went out of scope, and tell whether there was something."""
        count = 0
        while True:
            try:
                released = self._released.ids.popleft()
            except IndexError:  # also where another thread has taken the last one
                return count > 0
            try:
                self._native.deallocate("deallocate_cache", released, False)
                count += 1
            except LLMException as exc:
                if exc.status_code != LLMStatusCode.LLM_KV_CACHE_NOT_EXIST:  # a copy of the object has freed it before
                    raise

    def allocate_cache(self, cache_desc: CacheDesc, cache_keys: Sequence[CacheKey] = ()) -> KvCache:
        """Allocate a contiguous cache on each device; on a PROMPT, key i is bound to batch row i.

        A req_id of 2**64 - 1 leaves a row without a key. Of a key that is there twice the last row counts; all have the
        model id of the first one, and are prefix keys where the last one is. Raises LLMException: LLM_DEVICE_OUT_OF_MEMORY
        where the budget is used up (try again when peers have pulled), LLM_FAILED for a key that is in use.
        """
        check_isinstance("cache_desc", cache_desc, CacheDesc, allow_none=False)
        check_isinstance("cache_keys", cache_keys, [list, tuple], CacheKey)
        _check_allocation(cache_desc)
        raise_if_true(cache_keys and self._role != LLMRole.PROMPT, "only a PROMPT allocates with cache_keys")
        keys = _keys_of_rows(cache_keys)
        return self._allocate(cache_desc, lambda desc: self._caches.allocate_cache(desc, keys))

    def allocate_blocks_cache(self, cache_desc: CacheDesc, blocks_cache_key: BlocksCacheKey | None = None) -> KvCache:
        """Allocate a cache of blocks (the first dimension) on each device. A DECODER gives no key. Raises as allocate_cache."""
        check_isinstance("cache_desc", cache_desc, CacheDesc, allow_none=False)
        check_isinstance("blocks_cache_key", blocks_cache_key, BlocksCacheKey)
        _check_allocation(cache_desc)
        raise_if_true(blocks_cache_key and self._role == LLMRole.DECODER, "a DECODER allocates without blocks_cache_key")
        return self._allocate(cache_desc, lambda desc: self._caches.allocate_blocks_cache(desc, blocks_cache_key))

    def _allocate(self, desc: CacheDesc, allocate: Callable[[CacheDesc], Cache]) -> KvCache:
        count = desc.num_tensors
        whole = _on_devices(desc, self._llm_engine.devices)
        self._drain()
        while True:
            try:
                with older_codes(_NO_MEMORY):
                    cache = allocate(whole)
                break
            except LLMException as exc:
                full = exc.status_code == LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY
                if not (full and self._drain()):  # what another thread has dropped meanwhile
                    raise
        addrs = [cache.tensor_addrs[first : first + count] for first in range(0, whole.num_tensors, count)]
        made = KvCache(cache.cache_id, desc, addrs, self._released)
        made._is_blocks_cache = cache.is_blocks_cache
        return made

    def deallocate_cache(self, cache: KvCache) -> None:
        """Give up a cache. A contiguous one answers pulls until its last key is released.

        Raises LLMException: LLM_KV_CACHE_NOT_EXIST for one that is unknown or was given up before.
        """
        check_isinstance("cache", cache, KvCache, allow_none=False)
        _check_device("cache", cache)
        raise_if_false(
            cache._valid,
            "cache {} was deallocated before",
            cache.cache_id,
            status_code=LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
        )
        self._drain()
        self._native.deallocate("deallocate_cache", cache.cache_id, cache._is_blocks_cache)
        cache._per_device_tensor_addrs = []
        cache._valid = False

    def remove_cache_key(self, cache_key: CacheKey) -> None:
        """Release a key. An unknown key is a success. PROMPT only."""
        raise_if_false(self._role == LLMRole.PROMPT, "only a PROMPT removes cache keys")
        check_isinstance("cache_key", cache_key, CacheKey, allow_none=False)
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

        By key all of the prompt's row comes, unless the prompt described its cache with seq_len_dim_index 1; then, by id and
        with offsets it is size bytes of each tensor, -1 for what is left of the local row. A success releases a key that is
        no prefix key. Keywords: src_cache_offset and dst_cache_offset (bytes from the starts of the rows; such a pull
        releases nothing), src_layer_range, dst_layer_range (of each device's tensors), tensor_num_per_layer (2). Raises
        LLMException as CacheManager.pull_cache does, with LLM_WAIT_PROCESS_TIMEOUT for a deadline; LLM_LINK_BUSY where the
        link is being unlinked until then.
        """
        raise_if_false(self._role == LLMRole.DECODER, "only a DECODER pulls")
        check_isinstance("cache_key", cache_key, [CacheKey, CacheKeyByIdAndIndex], allow_none=False)
        check_isinstance("kv_cache", kv_cache, KvCache, allow_none=False)
        _check_device("kv_cache", kv_cache)
        check_int64("size", size)
        check_uint32("batch_index", batch_index)
        raise_if_false(size == -1 or size > 0, "size should be -1 or positive, but got {}", size)
        offsets = [
            check_positive_or_set_default(name, kwargs.get(name)) for name in ("src_cache_offset", "dst_cache_offset")
        ]
        if isinstance(cache_key, CacheKey):
            self.check_cache_key(cache_key)
        exact = max(offsets) >= 0
        src_offset, dst_offset = (max(0, offset) for offset in offsets)
        self._pull(
            "pull_cache", cache_key, kv_cache, batch_index, size, kwargs, b"", b"", (src_offset, dst_offset, exact)
        )

    def pull_blocks(
        self,
        prompt_cache_key: BlocksCacheKey | CacheKeyByIdAndIndex,
        decoder_kv_cache: KvCache,
        prompt_blocks: list[int],
        decoder_blocks: list[int],
        **kwargs: Any,
    ) -> None:
        """Pull block prompt_blocks[i] of the prompt's cache into block decoder_blocks[i], in every tensor. DECODER only.

        Keywords: src_layer_range, dst_layer_range, tensor_num_per_layer (2). Raises as pull_cache.
        """
        raise_if_false(self._role == LLMRole.DECODER, "only a DECODER pulls")
        keys = [BlocksCacheKey, CacheKeyByIdAndIndex]
        check_isinstance("prompt_cache_key", prompt_cache_key, keys, allow_none=False)
        check_isinstance("decoder_kv_cache", decoder_kv_cache, KvCache, allow_none=False)
        check_isinstance("prompt_blocks", prompt_blocks, list, int, allow_none=False)
        check_isinstance("decoder_blocks", decoder_blocks, list, int, allow_none=False)
        _check_device("decoder_kv_cache", decoder_kv_cache)
        src, dst = pack_blocks("prompt_blocks", prompt_blocks), pack_blocks("decoder_blocks", decoder_blocks)
        raise_if_false(src and dst, "prompt_blocks and decoder_blocks should not be empty")
        raise_if_false(len(src) == len(dst), "prompt_blocks and decoder_blocks should be equally long")
        self._pull("pull_blocks", prompt_cache_key, decoder_kv_cache, 0, -1, kwargs, src, dst)

    def _pull(
        self,
        operation: str,
        key: CacheKey | CacheKeyByIdAndIndex | BlocksCacheKey,
        cache: KvCache,
        batch_index: int,
        size: int,
        kwargs: dict[str, Any],
        src: bytes,
        dst: bytes,
        offsets: tuple[int, int, bool] = (0, 0, False),
    ) -> None:
        per_layer = per_layer_of(kwargs)
        words = pack_offsets(*offsets, self._llm_engine.devices)
        self._drain()
        local = Cache(cache.cache_id, cache.cache_desc, [], self._caches, False, cache._is_blocks_cache)
        with older_codes(OLDER_TIMEOUT):
            self._caches._pull(operation, key, local, batch_index, size, per_layer, kwargs, src, dst, words)

    def copy_cache(
        self,
        dst: KvCache,
        src: KvCache,
        dst_batch_index: int = 0,
        src_batch_index: int = 0,
        offset: int = 0,
        size: int = -1,
        req_id: int | None = None,
    ) -> None:
        """Copy size bytes (-1: to the end of src's row) from a row of src to a row of dst, from offset in both. Local.

        Raises LLMException: LLM_KV_CACHE_NOT_EXIST, LLM_FAILED where the caches have different numbers of tensors,
        LLM_PARAM_INVALID. req_id is checked and not used.
        """
        for name, cache in (("dst", dst), ("src", src)):
            check_isinstance(name, cache, KvCache, allow_none=False)
            _check_device(name, cache)
        check_uint32("dst_batch_index", dst_batch_index)
        check_uint32("src_batch_index", src_batch_index)
        check_uint64("offset", offset)
        check_int64("size", size)
        raise_if_false(size == -1 or size > 0, "size should be -1 or positive, but got {}", size)
        check_isinstance("req_id", req_id, int)
        self._drain()
        even = dst.cache_desc.num_tensors == src.cache_desc.num_tensors
        with older_codes({} if even else _UNEVEN):
            self._native.copy_cache(dst.cache_id, src.cache_id, dst_batch_index, src_batch_index, offset, size)

    def copy_blocks(self, cache: KvCache, copy_block_info: dict[int, list[int]]) -> None:
        """Copy each block src to the blocks of copy_block_info[src], in every tensor, in the order of the dict. Local."""
        check_isinstance("cache", cache, KvCache, allow_none=False)
        check_isinstance("copy_block_info", copy_block_info, dict, allow_none=False)
        check_dict("copy_block_info", copy_block_info, int, list, int)
        _check_device("cache", cache)
        pairs = [block for src, targets in copy_block_info.items() for dst in targets for block in (src, dst)]
        check_list_uint64("copy_block_info", pairs)
        self._drain()
        self._native.copy_blocks(cache.cache_id, array("Q", pairs))

    def swap_blocks(self, src: KvCache, dst: KvCache, src_to_dst: dict[int, int]) -> None:
        """Copy blocks between a host and a device cache, by the addresses inside the objects. Local.

        Raises LLMException: LLM_PARAM_INVALID for blocks out of range and memory that is not mapped.
        """
        check_isinstance("src", src, KvCache, allow_none=False)
        check_isinstance("dst", dst, KvCache, allow_none=False)
        block_bytes, pairs = check_swap(src.cache_desc, dst.cache_desc, src_to_dst)
        from_addrs, to_addrs = (pack_addrs([*chain.from_iterable(each.per_device_tensor_addrs)]) for each in (src, dst))
        raise_if_false(
            len(from_addrs) == len(to_addrs), "the caches have {} and {} addresses", len(from_addrs), len(to_addrs)
        )
        placements = (dst.cache_desc.placement, src.cache_desc.placement)
        self._native.swap_blocks(to_addrs, from_addrs, placements, block_bytes, pairs)

    def transfer_cache_async(
        self,
        src_cache: KvCache,
        layer_synchronizer: LayerSynchronizer,
        transfer_configs: Sequence[TransferConfig],
        src_block_indices: Sequence[int] | None = None,
        dst_block_indices: Sequence[int] | None = None,
        dst_block_memory_size: int | None = None,
    ) -> CacheTask:
        """Push a cache layer by layer (two tensors each) in the background, each when the synchronizer says that it is there.

        As CacheManager.transfer_cache_async, with TransferConfig only and without indices for a contiguous cache. The
        addresses have to lie in caches that the receiver has allocated. PROMPT only; LLM_FEATURE_NOT_ENABLED with several
        devices. The task's code of a timeout is LLM_WAIT_PROCESS_TIMEOUT.
        """
        raise_if_false(self._role == LLMRole.PROMPT, "only a PROMPT transfers")
        check_isinstance("src_cache", src_cache, KvCache, allow_none=False)
        _check_device("src_cache", src_cache)
        raise_if_true(
            self._llm_engine.devices > 1,
            "transfer_cache_async needs one device, there are {}",
            self._llm_engine.devices,
            status_code=LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
        )
        raise_if_true(
            dst_block_indices is not None and not src_cache._is_blocks_cache,
            "dst_block_indices should be None for a contiguous cache",
        )
        self._drain()
        task = transfer_cache_async(
            self._native,
            src_cache,
            layer_synchronizer,
            transfer_configs,
            src_block_indices,
            dst_block_indices,
            dst_block_memory_size,
            config_class=TransferConfig,
            task_class=CacheTask,
        )
        assert isinstance(task, CacheTask)
        return task

    def get_cache_tensors(self, cache: KvCache, tensor_index: int = 0) -> list[Tensor]:
        """Return a tensor of a cache, once for each device: a look at the cache's memory, which lasts as long as the cache.

        LLM_FEATURE_NOT_ENABLED where the memory is a device's that the host can't touch.
        """
        check_isinstance("cache", cache, KvCache, allow_none=False)
        check_int32("tensor_index", tensor_index)
        desc = cache.cache_desc
        raise_if_false(
            0 <= tensor_index < desc.num_tensors,
            "tensor_index should be in range [0, {}), but got {}",
            desc.num_tensors,
            tensor_index,
        )
        raise_if_true(
            desc.placement == Placement.DEVICE and self._native.device_is_apart(),
            "the tensors would be views of memory of a device that the host can't touch: swap_blocks reads and writes it",
            status_code=LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
        )
        devices = range(len(cache.per_device_tensor_addrs))
        return [build_npu_tensors(cache, device)[tensor_index] for device in devices]

    @staticmethod
    def check_cache_key(cache_key: CacheKey) -> None:
        """Raise LLMException unless exactly one of req_id and prefix_id is valid."""
        CacheManager.check_cache_key(cache_key)


def _check_allocation(desc: CacheDesc) -> None:
    raise_if_false(desc.num_tensors > 0, "num_tensors should be positive")
    raise_if_false(
        desc.placement == Placement.DEVICE, "placement should be Placement.DEVICE, but got {!s}", desc.placement
    )


def _check_device(name: str, cache: KvCache) -> None:
    raise_if_true(cache.cache_desc.placement == Placement.HOST, "{} should not be Placement.HOST", name)


def _keys_of_rows(keys: Sequence[CacheKey]) -> tuple[CacheKey, ...]:
    """Return what is bound to each row, of keys that are documented to be looked at together."""
    if not keys:
        return ()
    model_id, prefixed = keys[0].model_id, is_valid_id(keys[-1].prefix_id)
    ids = [key.prefix_id if is_valid_id(key.prefix_id) else key.req_id for key in keys]
    last = {key_id: row for row, key_id in enumerate(ids)}
    none = CacheKey(0, UINT64_MAX, model_id)

    def bound(row: int, key_id: int) -> CacheKey:
        if last[key_id] != row:
            return none
        return CacheKey(0, UINT64_MAX, model_id, key_id) if prefixed else CacheKey(0, key_id, model_id)

    return tuple(bound(row, key_id) for row, key_id in enumerate(ids))


def _on_devices(desc: CacheDesc, devices: int) -> CacheDesc:
    """Return the description of a cache that has the tensors of desc once for each device."""
    if devices == 1:
        return desc
    return CacheDesc(
        desc.num_tensors * devices,
        desc.shape,
        desc.data_type,
        desc.placement,
        desc.batch_dim,
        desc.seq_len_dim_index,
        desc.kv_tensor_format,
    )
