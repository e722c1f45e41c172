# SPDX-License-Identifier: Apache-2.0
"""CacheManager: registers, allocates, pulls, pushes and copies caches.

Every argument is checked and packed here; what is named, moved and refused is the engine's. A call that waits gives up the
GIL, ends within its deadline, and touches nothing any more when it has returned or raised.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from typing import Any

from .. import _options
from .._blocks import ID_BYTES, pack_blocks
from ..llm_datadist_wrapper import calc_tensor_size
from ..status import LLMStatusCode, raise_if_false, raise_if_true
from ..utils.utils import (
    UINT32_MAX,
    UINT64_MAX,
    check_dict,
    check_int64,
    check_isinstance,
    check_uint32,
    check_uint64,
)
from .keys import ALL_TENSORS, NORMAL_KEY, WORD, check_word, engine_key
from .llm_types import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    CacheTask,
    LayerSynchronizer,
    MemInfo,
    Memtype,
    Placement,
    TransferConfig,
    TransferWithCacheKeyConfig,
    check_layer_range,
    layer_count,
)
from .llm_utils import is_valid_id
from .transfer import TransferCacheParameters, transfer_cache_async

__all__ = ["CacheManager"]

_CONTIGUOUS, _BLOCKS = 1, 2  # kinds of caches
_DEFAULT_PER_LAYER = 2
_KEYS = (CacheKey, CacheKeyByIdAndIndex, BlocksCacheKey)
# What pyext.PullStart takes, in its order: the ends (key, local cache, row and size), layers, offsets and devices, blocks.
_pack_ends = struct.Struct("QqQQ5q").pack  # ids are unsigned
_pack_ends_as_bits = struct.Struct("9Q").pack
_pack_layers = struct.Struct("5q").pack
# Of the source and of the destination in bytes, 1 where they were given, and how many devices have a part of each cache.
pack_offsets = struct.Struct("4q").pack
_pack_two_blocks = struct.Struct("2q").pack
_NO_OFFSETS = pack_offsets(0, 0, 0, 1)
_ALL_LAYERS = _pack_layers(*ALL_TENSORS, *ALL_TENSORS, _DEFAULT_PER_LAYER)
_ORDINARY = _ALL_LAYERS + _NO_OFFSETS
# Their addresses come back in an array that is made before the pool is asked: 128 MiB, for a pool of 16 GiB at least.
_MOST_TENSORS = 1 << 24


class CacheManager:
    """The caches of one LLMDataDist. Made by it, not by callers."""

    def __init__(self, llm_datadist: Any, options: dict[str, str]) -> None:
        self._engine = llm_datadist
        self._enable_mem_pool = bool(options.get(_options.DEVICE_POOL))
        self._enable_host_mem_pool = bool(options.get(_options.HOST_POOL))
        self._enable_remote_cache_accessible = options.get(_options.ONE_SIDED) == "1"
        self._is_call_linked = False
        self._initialized = True

    def set_is_call_linked(self) -> None:
        """Mark that link() was called: registrations are then not remote accessible unless they were made before."""
        self._is_call_linked = True

    def allocate_cache(self, cache_desc: CacheDesc, cache_keys: list[CacheKey] | tuple[CacheKey, ...] = ()) -> Cache:
        """Allocate a contiguous cache from the pool of its placement; key i is bound to batch row i.

        Raises LLMException: LLM_OUT_OF_MEMORY where the pool has no room, LLM_PARAM_INVALID where there is no pool, for a key
        that is bound already, for more keys than rows and for a shape that has no size. The content is not initialised.
        """
        check_isinstance("cache_desc", cache_desc, CacheDesc)
        check_isinstance("cache_keys", cache_keys, [list, tuple], CacheKey)
        return self._allocate("allocate_cache", cache_desc, _CONTIGUOUS, _pack_keys(cache_keys))

    def allocate_blocks_cache(self, cache_desc: CacheDesc, blocks_cache_key: BlocksCacheKey | None = None) -> Cache:
        """Allocate a cache of blocks (the first dimension) from the pool of its placement. Raises as allocate_cache."""
        check_isinstance("cache_desc", cache_desc, CacheDesc)
        check_isinstance("blocks_cache_key", blocks_cache_key, BlocksCacheKey)
        return self._allocate("allocate_blocks_cache", cache_desc, _BLOCKS, _pack_blocks_key(blocks_cache_key))

    def _allocate(self, operation: str, desc: CacheDesc, kind: int, keys: array[int]) -> Cache:
        raise_if_false(desc.num_tensors > 0, "num_tensors should be positive")
        on_host = desc.placement == Placement.HOST
        raise_if_false(
            self._enable_host_mem_pool if on_host else self._enable_mem_pool,
            "{} needs a memory pool for {!s}",
            operation,
            desc.placement,
        )
        raise_if_false(
            desc.num_tensors <= _MOST_TENSORS,
            "{} has no room for {} tensors",
            operation,
            desc.num_tensors,
            status_code=LLMStatusCode.LLM_OUT_OF_MEMORY,
        )
        cache_id, addrs = self._engine.allocate(operation, _pack_desc(desc, kind), keys, desc.num_tensors)
        return Cache(cache_id, desc, addrs, self, False, kind == _BLOCKS)

    def register_cache(
        self,
        cache_desc: CacheDesc,
        addrs: list[int],
        cache_keys: list[CacheKey] | tuple[CacheKey, ...] = (),
        remote_accessible: bool | None = None,
    ) -> Cache:
        """Make memory of the caller's, one address for each tensor, a contiguous cache; key i is bound to batch row i.

        Nothing is copied or touched. The memory must stay mapped until unregister_cache has returned.
        """
        check_isinstance("cache_desc", cache_desc, CacheDesc)
        check_isinstance("addrs", addrs, list, int)
        check_isinstance("cache_keys", cache_keys, [list, tuple], CacheKey)
        accessible = self._accessible(cache_desc, remote_accessible)
        raise_if_false(addrs, "addrs should not be empty")
        raise_if_false(
            len(addrs) == cache_desc.num_tensors,
            "number of addrs should be num_tensors {}, but got {}",
            cache_desc.num_tensors,
            len(addrs),
        )
        raise_if_true(0 in addrs, "addrs should not contain 0")
        return self._register("register_cache", cache_desc, _CONTIGUOUS, addrs, _pack_keys(cache_keys), accessible)

    def register_blocks_cache(
        self,
        cache_desc: CacheDesc,
        addrs: list[int],
        blocks_cache_key: BlocksCacheKey | None = None,
        remote_accessible: bool | None = None,
    ) -> Cache:
        """Make memory of the caller's a cache of blocks (the first dimension). As register_cache."""
        check_isinstance("cache_desc", cache_desc, CacheDesc)
        check_isinstance("addrs", addrs, list, int)
        check_isinstance("blocks_cache_key", blocks_cache_key, BlocksCacheKey)
        accessible = self._accessible(cache_desc, remote_accessible)
        raise_if_false(addrs, "addrs should not be empty")
        raise_if_true(accessible and 0 in addrs, "addrs should not contain 0")
        keys = _pack_blocks_key(blocks_cache_key)
        return self._register("register_blocks_cache", cache_desc, _BLOCKS, addrs, keys, accessible)

    def _accessible(self, desc: CacheDesc, remote_accessible: bool | None) -> bool:
        check_isinstance("remote_accessible", remote_accessible, bool)
        raise_if_true(
            remote_accessible and self._is_call_linked, "remote_accessible should not be True after link() was called"
        )
        if remote_accessible is not None:
            return remote_accessible
        return desc.placement == Placement.DEVICE and not self._is_call_linked

    def _register(
        self, operation: str, desc: CacheDesc, kind: int, addrs: list[int], keys: array[int], accessible: bool
    ) -> Cache:
        cache_id = self._engine.register(operation, _pack_desc(desc, kind), pack_addrs(addrs), keys, accessible)
        return Cache(cache_id, desc, addrs, self, True, kind == _BLOCKS)

    def unregister_cache(self, cache_id: int) -> None:
        """Take a cache off the table. An unknown id is a success.

        Waits for this engine's own operations on it. A peer that is pulling from it gets LLM_KV_CACHE_NOT_EXIST. After the
        return the memory is the caller's alone. Raises LLMException with LLM_TIMEOUT where an operation still uses the memory
        after sync_kv_timeout: the cache is gone all the same, and the memory has to stay until that operation has returned.
        """
        check_isinstance("cache_id", cache_id, int)
        self._engine.unregister(check_int64("cache_id", cache_id))

    def deallocate_cache(self, cache: Cache) -> None:
        """Give up a contiguous cache. It answers pulls until its last key is released; then its memory is free.

        Raises LLMException with LLM_FEATURE_NOT_ENABLED without a memory pool.
        """
        check_isinstance("cache", cache, Cache)
        raise_if_true(cache.is_blocks_cache, "deallocate_cache does not take a blocks cache")
        self._deallocate("deallocate_cache", cache)

    def deallocate_blocks_cache(self, cache: Cache) -> None:
        """Give up a blocks cache at once, with its key. Raises as deallocate_cache."""
        check_isinstance("cache", cache, Cache)
        raise_if_false(cache.is_blocks_cache, "deallocate_blocks_cache takes a blocks cache only")
        self._deallocate("deallocate_blocks_cache", cache)

    def _deallocate(self, operation: str, cache: Cache) -> None:
        self._check_pool(operation)
        self._engine.deallocate(operation, cache.cache_id, cache.is_blocks_cache)
        cache._tensor_addrs = []
        cache._valid = False

    def remove_cache_key(self, cache_key: CacheKey) -> None:
        """Release a key of an allocated cache. An unknown key is a success; the key of a registered cache stays.

        Raises LLMException with LLM_FEATURE_NOT_ENABLED without a memory pool.
        """
        check_isinstance("cache_key", cache_key, CacheKey)
        self._check_pool("remove_cache_key")
        key_id, model_id, prefix = _key_words(cache_key)
        self._engine.remove_key(key_id, model_id, prefix == 1)

    def _check_pool(self, operation: str) -> None:
        raise_if_false(
            self._enable_mem_pool or self._enable_host_mem_pool,
            "{} needs a memory pool",
            operation,
            status_code=LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
        )

    def pull_cache(
        self,
        cache_key: CacheKey | CacheKeyByIdAndIndex,
        cache: Cache,
        batch_index: int = 0,
        size: int = -1,
        **kwargs: Any,
    ) -> None:
        """Pull a row of a peer's cache into row batch_index of a local one: size bytes of each tensor, -1 for a whole local row.

        Keywords: src_layer_range and dst_layer_range (range, None for all), tensor_num_per_layer (2). Raises LLMException:
        LLM_KV_CACHE_NOT_EXIST, LLM_NOT_YET_LINK, LLM_TIMEOUT (after sync_kv_timeout; the link stays usable), LLM_FAILED where
        the peer died, LLM_PARAM_INVALID. After the return or the exception nothing is written any more.
        """
        packed = None if kwargs else self._pack_ordinary_row(cache_key, cache, batch_index, size)
        if packed is not None:
            self._engine.pull("pull_cache", array("Q", packed), 0, 0)
            return
        one_sided = self._enable_remote_cache_accessible
        check_isinstance(
            "cache_key", cache_key, CacheKeyByIdAndIndex if one_sided else [CacheKey, CacheKeyByIdAndIndex]
        )
        check_isinstance("cache", cache, Cache)
        check_uint32("batch_index", batch_index)
        check_int64("size", size)
        raise_if_true(cache.is_blocks_cache, "pull_cache does not take a blocks cache")
        raise_if_false(size == -1 or size > 0, "size should be -1 or positive, but got {}", size)
        per_layer = per_layer_of(kwargs)
        if isinstance(cache_key, CacheKey):
            self.check_cache_key(cache_key)
        self._pull("pull_cache", cache_key, cache, batch_index, size, per_layer, kwargs, b"", b"")

    def _pack_ordinary_row(self, key: Any, cache: Any, batch_index: Any, size: Any) -> bytes | None:
        """Pack the pull of a row if all checks would pass, in as few steps as that takes; None where that is not plain to see."""
        if not (
            type(cache) is Cache
            and not cache._is_blocks_cache
            and type(batch_index) is type(size) is int
            and 0 <= batch_index <= UINT32_MAX
            and (size == -1 or size > 0)
        ):
            return None
        if type(key) is CacheKey:
            if self._enable_remote_cache_accessible or (key._req_id == UINT64_MAX) == (key._prefix_id == UINT64_MAX):
                return None
        elif type(key) is not CacheKeyByIdAndIndex:
            return None
        try:
            return _pack_ends(key._cluster_id, *engine_key(key), cache._cache_id, batch_index, size) + _ORDINARY
        except struct.error:  # out of range
            return None

    def pull_blocks(
        self,
        src_cache_key: CacheKey | CacheKeyByIdAndIndex | BlocksCacheKey,
        dst_cache: Cache,
        src_blocks: Sequence[int] = (),
        dst_blocks: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        """Pull blocks of a peer's cache (BlocksCacheKey), or the pieces of a row of it, into blocks of a local one.

        Block i of src_blocks goes to block i of dst_blocks in every tensor; with another key src_blocks is empty, and piece i
        of the row goes to block i. Block lists may also be one-dimensional buffers of int64, uint64 or int32. Keywords and
        exceptions as pull_cache.
        """
        packed = None if kwargs else _pack_ordinary_block(src_cache_key, dst_cache, src_blocks, dst_blocks)
        if packed is not None:
            self._engine.pull("pull_blocks", array("Q", packed), 1, 1)
            return
        if not (type(src_cache_key) in _KEYS and type(dst_cache) is Cache):  # most calls need neither
            check_isinstance("src_cache_key", src_cache_key, _KEYS)
            check_isinstance("dst_cache", dst_cache, Cache)
        src, dst = pack_blocks("src_blocks", src_blocks), pack_blocks("dst_blocks", dst_blocks)
        raise_if_false(dst_cache.is_blocks_cache, "pull_blocks takes a blocks cache only")
        raise_if_false(dst, "dst_blocks should not be empty")
        per_layer = per_layer_of(kwargs)
        if isinstance(src_cache_key, BlocksCacheKey):
            raise_if_false(src, "src_blocks should not be empty with a BlocksCacheKey")
        else:
            if isinstance(src_cache_key, CacheKey):
                self.check_cache_key(src_cache_key)
            raise_if_true(src, "src_blocks should be empty unless the key is a BlocksCacheKey")
        self._pull("pull_blocks", src_cache_key, dst_cache, 0, -1, per_layer, kwargs, src, dst)

    def _pull(
        self,
        operation: str,
        key: CacheKey | CacheKeyByIdAndIndex | BlocksCacheKey,
        cache: Cache,
        batch_index: int,
        size: int,
        per_layer: int,
        kwargs: dict[str, Any],
        src: bytes,
        dst: bytes,
        offsets: bytes = _NO_OFFSETS,
    ) -> None:
        layers = _ALL_LAYERS
        if kwargs:
            src_tensors = _tensors("src_layer_range", kwargs.get("src_layer_range"), per_layer)
            dst_tensors = _tensors("dst_layer_range", kwargs.get("dst_layer_range"), per_layer)
            layers = _pack_layers(*src_tensors, *dst_tensors, per_layer)
        name = engine_key(key)
        numbers = (key.cluster_id, *name, cache.cache_id, batch_index, size)
        try:
            ends = _pack_ends(*numbers)
        except struct.error:  # of a number that a subclass has made up the low 64 bits count
            ends = _pack_ends_as_bits(*[number & WORD for number in numbers])
        words = array("Q", ends + layers + offsets)
        words.frombytes(src)
        words.frombytes(dst)
        self._engine.pull(operation, words, len(src) // ID_BYTES, len(dst) // ID_BYTES)

    def push_cache(
        self,
        dst_cache_key: CacheKeyByIdAndIndex,
        src_cache: Cache,
        src_batch_index: int = 0,
        src_layer_range: range | None = None,
        dst_layer_range: range | None = None,
        size: int = -1,
        tensor_num_per_layer: int = 2,
    ) -> None:
        """Push row src_batch_index of a local cache into a row of a peer's, in one-sided mode.

        Whole rows only: size is -1. A range that is None is all layers of the source. An id of 0 stands for the peer's key
        (req_id 0, model_id 0). Raises LLMException: LLM_KV_CACHE_NOT_EXIST, LLM_NOT_YET_LINK, LLM_PARAM_INVALID (where one
        of the caches is not remote accessible, too), LLM_FAILED where the peer died, and LLM_TIMEOUT (after
        sync_kv_timeout; with the cause "receiver has not confirmed" the destination may still change until the peer answers).
        """
        self._check_one_sided("push_cache")
        check_isinstance("dst_cache_key", dst_cache_key, CacheKeyByIdAndIndex, allow_none=False)
        check_isinstance("src_cache", src_cache, Cache, allow_none=False)
        check_uint32("src_batch_index", src_batch_index)
        raise_if_true(src_cache.is_blocks_cache, "push_cache does not take a blocks cache")
        src, dst = _pushed_layers(src_cache, src_layer_range, dst_layer_range, tensor_num_per_layer)
        check_int64("size", size)
        raise_if_false(size == -1, "size should be -1, but got {}", size)
        self._push("push_cache", dst_cache_key, src_cache, src_batch_index, src, dst, tensor_num_per_layer)

    def push_blocks(
        self,
        dst_cache_key: BlocksCacheKey,
        src_cache: Cache,
        src_blocks: Sequence[int] = (),
        dst_blocks: Sequence[int] = (),
        src_layer_range: range | None = None,
        dst_layer_range: range | None = None,
        tensor_num_per_layer: int = 2,
    ) -> None:
        """Push block src_blocks[i] of a local cache into block dst_blocks[i] of a peer's, in one-sided mode.

        Block lists, layers and exceptions are those of pull_blocks and push_cache.
        """
        self._check_one_sided("push_blocks")
        check_isinstance("dst_cache_key", dst_cache_key, BlocksCacheKey)
        check_isinstance("src_cache", src_cache, Cache)
        packed = pack_blocks("src_blocks", src_blocks), pack_blocks("dst_blocks", dst_blocks)
        raise_if_false(src_cache.is_blocks_cache, "push_blocks takes a blocks cache only")
        raise_if_false(packed[1], "dst_blocks should not be empty")
        src, dst = _pushed_layers(src_cache, src_layer_range, dst_layer_range, tensor_num_per_layer)
        self._push("push_blocks", dst_cache_key, src_cache, 0, src, dst, tensor_num_per_layer, *packed)

    def _check_one_sided(self, operation: str) -> None:
        raise_if_false(self._enable_remote_cache_accessible, "{} needs enable_remote_cache_accessible", operation)

    def _push(
        self,
        operation: str,
        key: CacheKeyByIdAndIndex | BlocksCacheKey,
        cache: Cache,
        src_batch: int,
        src: range,
        dst: range,
        per_layer: int,
        src_blocks: bytes = b"",
        dst_blocks: bytes = b"",
    ) -> None:
        what = TransferCacheParameters(
            key.cluster_id,
            engine_key(key),
            cache.cache_id,
            src_batch,
            _tensors("src_layer_range", src, per_layer),
            _tensors("dst_layer_range", dst, per_layer),
            per_layer,
            src_blocks=src_blocks,
            dst_blocks=dst_blocks,
        )
        if src:  # a cache with fewer tensors than a layer has no layers
            what.push(self._engine, operation)

    def transfer_cache_async(
        self,
        src_cache: Cache,
        layer_synchronizer: LayerSynchronizer,
        transfer_configs: Sequence[TransferConfig] | Sequence[TransferWithCacheKeyConfig],
        src_block_indices: Sequence[int] | None = None,
        dst_block_indices: Sequence[int] | None = None,
        dst_block_memory_size: int | None = None,
    ) -> CacheTask:
        """Push a cache layer by layer (two tensors each) in the background, each when the synchronizer says that it is there.

        Configs are TransferConfig in two-sided mode and TransferWithCacheKeyConfig in one-sided mode; a config without a
        range of layers gets all. Without indices a row goes to a row (of a blocks cache its block 0); with both, block
        src_block_indices[i] to block dst_block_indices[i]; with destinations only, the pieces of the row, each of
        dst_block_memory_size bytes, to those blocks. Each layer has sync_kv_timeout of its own. The first failure ends the
        transfer; the task tells its code, the log its cause. Raises before anything moves: TypeError, ValueError,
        LLMException with LLM_PARAM_INVALID.
        """
        check_isinstance("src_cache", src_cache, Cache, allow_none=False)
        return transfer_cache_async(
            self._engine,
            src_cache,
            layer_synchronizer,
            transfer_configs,
            src_block_indices,
            dst_block_indices,
            dst_block_memory_size,
            config_class=TransferWithCacheKeyConfig if self._enable_remote_cache_accessible else TransferConfig,
        )

    def remap_registered_memory(self, mem_infos: MemInfo | list[MemInfo]) -> None:
        """Ask the transport to register device memory again. Where DEVICE is host memory nothing has to be done.

        Raises LLMException: LLM_PARAM_INVALID for anything but infos of device memory, LLM_NOT_YET_LINK without a live link.
        """
        infos = [mem_infos] if isinstance(mem_infos, MemInfo) else mem_infos
        raise_if_false(isinstance(infos, list), "mem_infos should be a MemInfo or a list of them")
        for info in infos:
            raise_if_false(isinstance(info, MemInfo), "mem_infos should hold MemInfo only, but got {!r}", info)
            raise_if_false(info.mem_type == Memtype.MEM_TYPE_DEVICE, "mem_type of {!r} should be MEM_TYPE_DEVICE", info)
            raise_if_true(info.addr == 0, "addr of {!r} should not be 0", info)
            raise_if_false(info.size > 0, "size of {!r} should be positive", info)
        for info in infos:
            check_word("addr", info.addr)
            check_word("size", info.size)
        raise_if_false(infos, "mem_infos should not be empty")
        self._engine.memory_remap()

    def copy_cache(
        self,
        dst: Cache,
        src: Cache,
        dst_batch_index: int = 0,
        src_batch_index: int = 0,
        offset: int = 0,
        size: int = -1,
        req_id: int | None = None,
    ) -> None:
        """Copy size bytes (-1: to the end of src's row) from a row of src to a row of dst, from offset in both. Local.

        Raises LLMException: LLM_KV_CACHE_NOT_EXIST, LLM_PARAM_INVALID. req_id is checked and not used.
        """
        check_isinstance("dst", dst, Cache)
        check_isinstance("src", src, Cache)
        check_uint32("dst_batch_index", dst_batch_index)
        check_uint32("src_batch_index", src_batch_index)
        check_uint64("offset", offset)
        check_int64("size", size)
        raise_if_true(src.is_blocks_cache, "copy_cache does not take a blocks cache as src")
        raise_if_true(dst.is_blocks_cache, "copy_cache does not take a blocks cache as dst")
        raise_if_false(size == -1 or size > 0, "size should be -1 or positive, but got {}", size)
        if req_id is not None:
            check_uint64("req_id", req_id)
        self._engine.copy_cache(dst.cache_id, src.cache_id, dst_batch_index, src_batch_index, offset, size)

    def copy_blocks(self, cache: Cache, copy_block_info: dict[int, list[int]]) -> None:
        """Copy each block src to the blocks of copy_block_info[src], in every tensor, in the order of the dict. Local."""
        check_isinstance("cache", cache, Cache)
        check_isinstance("copy_block_info", copy_block_info, dict, allow_none=False)
        check_dict("copy_block_info", copy_block_info, int, list, int)
        raise_if_false(cache.is_blocks_cache, "copy_blocks takes a blocks cache only")
        pairs = [block for src, targets in copy_block_info.items() for dst in targets for block in (src, dst)]
        self._engine.copy_blocks(cache.cache_id, _pack_native("copy_block_info", pairs))

    def swap_blocks(self, src_cache: Cache, dst_cache: Cache, src_to_dst: dict[int, int]) -> None:
        """Copy blocks between a host and a device cache, by the addresses inside the objects. Local.

        Raises LLMException: LLM_PARAM_INVALID for blocks out of range and memory that is not mapped.
        """
        check_isinstance("src_cache", src_cache, Cache)
        check_isinstance("dst_cache", dst_cache, Cache)
        raise_if_false(src_cache.is_blocks_cache, "swap_blocks takes a blocks cache only as src_cache")
        raise_if_false(dst_cache.is_blocks_cache, "swap_blocks takes a blocks cache only as dst_cache")
        block_bytes, pairs = check_swap(src_cache.cache_desc, dst_cache.cache_desc, src_to_dst)
        src, dst = pack_addrs(src_cache.tensor_addrs), pack_addrs(dst_cache.tensor_addrs)
        raise_if_false(len(src) == len(dst), "the caches have {} and {} addresses", len(src), len(dst))
        placements = (dst_cache.cache_desc.placement, src_cache.cache_desc.placement)
        self._engine.swap_blocks(dst, src, placements, block_bytes, pairs)

    @staticmethod
    def check_cache_key(cache_key: CacheKey) -> None:
        """Raise LLMException unless exactly one of req_id and prefix_id is valid."""
        by_request, by_prefix = is_valid_id(cache_key.req_id), is_valid_id(cache_key.prefix_id)
        raise_if_false(by_request != by_prefix, "exactly one of req_id and prefix_id of {!r} should be valid", cache_key)


def check_swap(src: CacheDesc, dst: CacheDesc, src_to_dst: dict[int, int]) -> tuple[int, array[int]]:
    """Check a swap of blocks and return the bytes of a block and the packed pairs of blocks."""
    check_isinstance("src_to_dst", src_to_dst, dict, allow_none=False)
    check_dict("src_to_dst", src_to_dst, int, int)
    block_bytes = src.size // src.batch_size
    raise_if_false(block_bytes == dst.size // dst.batch_size, "the caches should have blocks of the same size")
    raise_if_false(src.num_tensors == dst.num_tensors, "the caches should have the same num_tensors")
    for name, desc, blocks in (("src", src, src_to_dst.keys()), ("dst", dst, src_to_dst.values())):
        for block in blocks:
            raise_if_false(
                0 <= block < desc.batch_size, "{} block {} should be in range [0, {})", name, block, desc.batch_size
            )
    raise_if_false(
        {src.placement, dst.placement} == {Placement.HOST, Placement.DEVICE},
        "exactly one of the caches should be Placement.HOST, the other Placement.DEVICE",
    )
    return block_bytes, array("q", [block for pair in src_to_dst.items() for block in pair])


def _pack_ordinary_block(key: Any, cache: Any, src_blocks: Any, dst_blocks: Any) -> bytes | None:
    """Pack the pull of one block, as _pack_ordinary_row does that of a row."""
    if not (
        type(key) is BlocksCacheKey
        and type(cache) is Cache
        and cache._is_blocks_cache
        and type(src_blocks) is type(dst_blocks) is list
        and len(src_blocks) == len(dst_blocks) == 1
    ):
        return None
    try:
        src, dst = src_blocks[0], dst_blocks[0]
        if not (type(src) is type(dst) is int and src >= 0 and dst >= 0):
            return None
        ends = _pack_ends(key._cluster_id, NORMAL_KEY, UINT64_MAX, key._model_id, 0, 0, cache._cache_id, 0, -1)
        return ends + _ORDINARY + _pack_two_blocks(src, dst)
    except (struct.error, IndexError):  # out of range; another thread has emptied a list
        return None


def per_layer_of(kwargs: dict[str, Any]) -> int:
    """Return the keyword tensor_num_per_layer of a call."""
    if "tensor_num_per_layer" not in kwargs:
        return _DEFAULT_PER_LAYER
    return _check_per_layer(kwargs["tensor_num_per_layer"])


def _check_per_layer(value: int) -> int:
    check_uint32("tensor_num_per_layer", value)
    raise_if_false(value > 0, "tensor_num_per_layer should be positive")
    return value


def _pushed_layers(cache: Cache, src: range | None, dst: range | None, per_layer: int) -> tuple[range, range]:
    """Check the layers of a push; those that are not named are all of the source's."""
    _check_per_layer(per_layer)
    check_layer_range("src_layer_range", src)
    check_layer_range("dst_layer_range", dst)
    every = range(cache.cache_desc.num_tensors // per_layer)
    src, dst = src or every, dst or every
    raise_if_false(
        layer_count(src) == layer_count(dst),
        "src_layer_range {} and dst_layer_range {} should be equally long",
        src,
        dst,
    )
    return src, dst


def _tensors(name: str, layers: range | None, per_layer: int) -> tuple[int, int]:
    """Return the first tensor and the number of tensors of a range of layers; (-1, 0) for all."""
    if layers is None:
        return ALL_TENSORS
    check_isinstance(name, layers, range)
    raise_if_false(layers.step == 1, "step of {} should be 1, but got {}", name, layers.step)
    if not layers:
        return ALL_TENSORS
    raise_if_false(layers.start >= 0, "{} should not start below 0, but got {}", name, layers)
    check_uint32(f"last tensor index of {name}", layers.stop * per_layer - 1)
    return layers.start * per_layer, len(layers) * per_layer


def _pack_desc(desc: CacheDesc, kind: int) -> array[int]:
    element_bytes = calc_tensor_size([1], desc.data_type.value)
    return array("q", [kind, desc.num_tensors, element_bytes, int(desc.placement), desc.seq_len_dim_index, *desc.shape])


def _key_words(key: CacheKey) -> tuple[int, int, int]:
    """Return id, model id and 1 for a prefix key."""
    if key.prefix_id != UINT64_MAX:
        return key.prefix_id, key.model_id, 1
    return key.req_id, key.model_id, 0


def _pack_keys(keys: Sequence[CacheKey]) -> array[int]:
    return array("Q", [word for key in keys or () for word in _key_words(key)])


def _pack_blocks_key(key: BlocksCacheKey | None) -> array[int]:
    return array("Q", [] if key is None else [UINT64_MAX, check_word("model_id", key.model_id), 0])


def pack_addrs(addrs: Sequence[int]) -> array[int]:
    try:
        return array("Q", addrs)
    except OverflowError:
        raise TypeError(f"addrs should be in range [0, {UINT64_MAX}]") from None


def _pack_native(name: str, values: Sequence[int]) -> array[int]:
    """Pack what the native layer takes as u64: what does not fit is a TypeError there."""
    if values and not (min(values) >= 0 and max(values) <= UINT64_MAX):
        raise TypeError(f"{name} should hold integers in range [0, {UINT64_MAX}]")
    return array("Q", values)
