# SPDX-License-Identifier: Apache-2.0
"""Descriptions, keys and results: the values that travel between a caller and the managers.

Everything here checks its arguments when it is made and does no work of its own. None of it reaches the engine.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from enum import Enum, IntEnum
from typing import Any, Protocol

from ..data_type import DataType
from ..llm_datadist_wrapper import calc_tensor_size as _tensor_bytes
from ..status import LLMStatusCode, raise_if_false
from ..utils.utils import (
    UINT64_MAX,
    check_inner,
    check_int32,
    check_int64,
    check_isinstance,
    check_list_int64,
    check_list_uint64,
    check_uint32,
    check_uint64,
)

__all__ = [
    "CacheDesc",
    "CacheKey",
    "CacheKeyByIdAndIndex",
    "KvCache",
    "BlocksCacheKey",
    "Placement",
    "CacheTask",
    "TransferConfig",
    "LayerSynchronizer",
    "Cache",
]


class Placement(IntEnum):
    """Where a cache's memory lies."""

    HOST = 0
    DEVICE = 1

    def __str__(self) -> str:  # IntEnum's own changed with Python 3.11
        return f"Placement.{self.name}"


class RegisterMemStatus(Enum):
    """How far the preparation of a link() has come."""

    OK = 0
    PREPARING = 1
    FAILED = 2


int_to_mem_status_dict: dict[int, RegisterMemStatus] = {status.value: status for status in RegisterMemStatus}


class Memtype(Enum):
    """Kind of memory that a MemInfo names."""

    MEM_TYPE_DEVICE = 0
    MEM_TYPE_HOST = 1


class PushType(Enum):
    """How a push names its destination."""

    NO_CACHE_KEY = 0
    BLOCKS_CACHE_KEY = 1
    CACHE_KEY_BY_ID = 2


class MemInfo:
    """A range of memory."""

    def __init__(self, mem_type: Memtype, addr: int, size: int) -> None:
        self._mem_type = check_isinstance("mem_type", mem_type, Memtype)
        self._addr = check_isinstance("addr", addr, int)
        self._size = check_isinstance("size", size, int)

    @property
    def mem_type(self) -> Memtype:
        return self._mem_type

    @property
    def addr(self) -> int:
        return self._addr

    @property
    def size(self) -> int:
        return self._size

    def __repr__(self) -> str:
        return f"MemInfo(mem_type={self._mem_type}, addr={self._addr}, size={self._size})"


class CacheDesc:
    """Shape, type and place of a cache's tensors, which are all alike."""

    def __init__(
        self,
        num_tensors: int,
        shape: list[int] | tuple[int, ...],
        data_type: DataType,
        placement: Placement = Placement.DEVICE,
        batch_dim_index: int = 0,
        seq_len_dim_index: int = -1,
        kv_tensor_format: str | None = None,
    ) -> None:
        check_uint32("num_tensors", num_tensors)
        check_isinstance("shape", shape, [list, tuple], int)
        check_isinstance("data_type", data_type, DataType)
        check_isinstance("placement", placement, Placement)
        check_isinstance("batch_dim_index", batch_dim_index, int)
        check_int32("seq_len_dim_index", seq_len_dim_index)
        check_isinstance("kv_tensor_format", kv_tensor_format, str)
        rank = len(shape)
        raise_if_false(
            0 <= batch_dim_index < rank,
            "batch_dim_index should be in range [0, {}), but got {}",
            rank,
            batch_dim_index,
        )
        raise_if_false(
            seq_len_dim_index == -1 or 0 <= seq_len_dim_index < rank,
            "seq_len_dim_index should be -1 or in range [0, {}), but got {}",
            rank,
            seq_len_dim_index,
        )
        check_list_int64("shape", shape)
        self._num_tensors = num_tensors
        self._shape = shape
        self._data_type = data_type
        self._placement = placement
        self._batch_dim_index = batch_dim_index
        self._batch_size = shape[batch_dim_index]
        self._seq_len_dim_index = seq_len_dim_index
        self._kv_tensor_format = kv_tensor_format
        self._size: int | None = None

    @property
    def num_tensors(self) -> int:
        return self._num_tensors

    @property
    def shape(self) -> list[int] | tuple[int, ...]:
        """The very object that the description was made with."""
        return self._shape

    @property
    def data_type(self) -> DataType:
        return self._data_type

    @property
    def placement(self) -> Placement:
        return self._placement

    @property
    def batch_dim(self) -> int:
        return self._batch_dim_index

    @property
    def batch_size(self) -> int:
        """The batch dimension when the description was made."""
        return self._batch_size

    @property
    def seq_len_dim_index(self) -> int:
        return self._seq_len_dim_index

    @property
    def kv_tensor_format(self) -> str | None:
        return self._kv_tensor_format

    @property
    def size(self) -> int:
        """Bytes of one tensor."""
        if self._size is None:
            self._size = calc_tensor_size(self._shape, self._data_type)
        return self._size

    def update_dim(self, dim_index: int, dim_value: int) -> None:
        """Change one dimension. A shape given as a tuple can't be changed (TypeError)."""
        self._shape[dim_index] = dim_value  # type: ignore[index]
        self._size = None

    def __repr__(self) -> str:
        return (
            f"CacheDesc(num_tensors={self._num_tensors}, shape={self._shape}, data_type={self._data_type}, "
            f"placement={self._placement!s}, batch_dim_index={self._batch_dim_index}, "
            f"seq_len_dim_index={self._seq_len_dim_index},kv_tensor_format={self._kv_tensor_format})"
        )


def calc_tensor_size(shape: Sequence[int], dtype: DataType) -> int:
    """Return the bytes of a tensor. LLMException, with the documented LLM_SUCCESS, if there is no such size."""
    size = _tensor_bytes(shape, dtype.value)
    raise_if_false(
        size >= 0,
        "size of a tensor of shape {} and type {} can not be calculated",
        shape,
        dtype,
        status_code=LLMStatusCode.LLM_SUCCESS,
    )
    return size


class Cache:
    """A cache of a CacheManager. It is released by the manager only, never by going out of scope."""

    def __init__(
        self,
        cache_id: int,
        cache_desc: CacheDesc,
        tensor_addrs: list[int],
        cache_manager: Any,
        is_registered: bool,
        is_blocks_cache: bool,
    ) -> None:
        self._cache_id = check_int64("cache_id", cache_id)
        self._cache_desc = cache_desc
        self._tensor_addrs = tensor_addrs
        self._cache_manager = cache_manager
        self._is_registered = is_registered
        self._is_blocks_cache = is_blocks_cache
        self._valid = True

    @classmethod
    def create_cpu_cache(cls, cache_desc: CacheDesc, addrs: list[int]) -> Cache:
        """Describe host memory of the caller's, for swap_blocks."""
        check_isinstance("cache_desc", cache_desc, CacheDesc)
        check_isinstance("addrs", addrs, list, int)
        _check_host(cache_desc)
        _check_count(addrs, cache_desc)
        return cls(-1, cache_desc, addrs, None, False, True)

    @property
    def cache_id(self) -> int:
        return self._cache_id

    @property
    def cache_desc(self) -> CacheDesc:
        return self._cache_desc

    @property
    def tensor_addrs(self) -> list[int]:
        """One address for each tensor."""
        return self._tensor_addrs

    @property
    def is_blocks_cache(self) -> bool:
        return self._is_blocks_cache

    def __repr__(self) -> str:
        return (
            f"Cache(cache_id = {self._cache_id}, device_tensor_addrs = {len(self._tensor_addrs)}, "
            f"is_blocks_cache = {self._is_blocks_cache})"
        )


class KvCache:
    """A cache of a KvCacheManager. Going out of scope hands its id to the manager, which frees it at its next call."""

    _valid = False  # until __init__ is through: __del__ also runs for objects whose making failed
    _is_blocks_cache = False  # the manager sets it

    def __init__(
        self,
        cache_id: int,
        cache_desc: CacheDesc,
        per_device_tensor_addrs: list[list[int]],
        kv_cache_manager: Any,
    ) -> None:
        self._cache_id = check_int64("cache_id", cache_id)
        self._cache_desc = cache_desc
        self._per_device_tensor_addrs = per_device_tensor_addrs
        self._kv_cache_manager = kv_cache_manager
        self._valid = True

    @classmethod
    def create_cpu_cache(cls, cache_desc: CacheDesc, addrs: list[int] | list[list[int]]) -> KvCache:
        """Describe host memory of the caller's, for swap_blocks. A flat list is that of one device."""
        check_isinstance("cache_desc", cache_desc, CacheDesc)
        _check_host(cache_desc)
        check_isinstance("addrs", addrs, list, allow_none=False)
        raise_if_false(addrs, "addrs should not be empty")
        check_inner("addrs", addrs, [list, int])
        per_device = [element for element in addrs if isinstance(element, list)]
        for device_addrs in per_device:
            check_inner("addrs", device_addrs, int)
            _check_count(device_addrs, cache_desc)
        flat = [element for element in addrs if isinstance(element, int)]
        raise_if_false(not per_device or not flat, "element types of addrs should be consistent")
        if flat:
            _check_count(flat, cache_desc)
        return cls(-1, cache_desc, per_device or [flat], None)

    @property
    def cache_id(self) -> int:
        return self._cache_id

    @property
    def cache_desc(self) -> CacheDesc:
        return self._cache_desc

    @property
    def per_device_tensor_addrs(self) -> list[list[int]]:
        """For each device one address for each tensor."""
        return self._per_device_tensor_addrs

    def __repr__(self) -> str:
        return f"KvCache(cache_id = {self._cache_id}, num_devices = {len(self._per_device_tensor_addrs)})"

    def __del__(self) -> None:
        # May run on any thread, inside any other call and during shutdown: it only hands over the id.
        if self._valid and self._kv_cache_manager is not None and self._kv_cache_manager.is_initialized():
            self._kv_cache_manager._release_later(self._cache_id)


def _check_host(cache_desc: CacheDesc) -> None:
    raise_if_false(
        cache_desc.placement == Placement.HOST, "placement should be Placement.HOST, but got {!s}", cache_desc.placement
    )


def _check_count(addrs: list[int], cache_desc: CacheDesc) -> None:
    raise_if_false(
        len(addrs) == cache_desc.num_tensors,
        "number of addrs should be num_tensors {}, but got {}",
        cache_desc.num_tensors,
        len(addrs),
    )


_REQUIRED = object()


def _key_fields(
    args: tuple[Any, ...], kwargs: dict[str, Any], order: Sequence[str], defaults: dict[str, Any]
) -> dict[str, Any]:
    """Return the fields of a key, in the order in which they are checked (that of defaults).

    A positional value overrides a keyword, and cluster_id overrides prompt_cluster_id.
    """
    count = len(args) + len(kwargs)
    raise_if_false(count <= len(order), "at most {} arguments are supported, but got {}", len(order), count)
    given = {**kwargs, **dict(zip(order, args))}
    prompt_cluster_id = given.pop("prompt_cluster_id", _REQUIRED)
    given.setdefault("cluster_id", prompt_cluster_id)
    fields = {name: given.pop(name, default) for name, default in defaults.items()}
    for name, value in fields.items():
        raise_if_false(value is not _REQUIRED, "{} is required", name)
    raise_if_false(not given, "Unsupported arguments: {}", ", ".join(given))
    return fields


class BlocksCacheKey:
    """Names a blocks cache of a cluster: BlocksCacheKey(cluster_id, model_id=0).

    prompt_cluster_id is another keyword for cluster_id.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        fields = _key_fields(args, kwargs, ("cluster_id", "model_id"), {"cluster_id": _REQUIRED, "model_id": 0})
        for name, value in fields.items():
            check_isinstance(name, value, int)
        self._cluster_id: int = fields["cluster_id"]
        self._model_id: int = fields["model_id"]
        named_by_prompt = not args and "cluster_id" not in kwargs
        self._label = "prompt_cluster_id" if named_by_prompt else "cluster_id"

    @property
    def cluster_id(self) -> int:
        return self._cluster_id

    @property
    def prompt_cluster_id(self) -> int:
        return self._cluster_id

    @property
    def model_id(self) -> int:
        return self._model_id

    def __repr__(self) -> str:
        return f"BlocksCacheKey({self._label}={self._cluster_id}, model_id={self._model_id})"


class CacheKey:
    """Names a row of a cache: CacheKey(cluster_id, req_id, model_id=0, prefix_id=2**64 - 1).

    prompt_cluster_id is another keyword for cluster_id.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        fields = _key_fields(
            args,
            kwargs,
            ("cluster_id", "req_id", "model_id", "prefix_id"),
            {"cluster_id": _REQUIRED, "req_id": _REQUIRED, "model_id": 0, "prefix_id": UINT64_MAX},
        )
        for name, value in fields.items():
            check_uint64(name, value)
        self._cluster_id: int = fields["cluster_id"]
        self._req_id: int = fields["req_id"]
        self._model_id: int = fields["model_id"]
        self._prefix_id: int = fields["prefix_id"]

    @property
    def cluster_id(self) -> int:
        return self._cluster_id

    @property
    def prompt_cluster_id(self) -> int:
        return self._cluster_id

    @property
    def req_id(self) -> int:
        return self._req_id

    @property
    def model_id(self) -> int:
        return self._model_id

    @property
    def prefix_id(self) -> int:
        return self._prefix_id

    def __repr__(self) -> str:
        return (
            f"CacheKey(cluster_id={self._cluster_id}, req_id={self._req_id}, "
            f"prefix_id={self._prefix_id}, model_id={self._model_id})"
        )


class CacheKeyByIdAndIndex:
    """Names a row of a cache by the cache's id in its cluster."""

    def __init__(self, cluster_id: int, cache_id: int, batch_index: int = 0) -> None:
        self._cluster_id = check_uint64("cluster_id", cluster_id)
        self._cache_id = check_int64("cache_id", cache_id)
        self._batch_index = check_uint32("batch_index", batch_index)

    @property
    def cluster_id(self) -> int:
        return self._cluster_id

    @property
    def cache_id(self) -> int:
        return self._cache_id

    @property
    def batch_index(self) -> int:
        return self._batch_index

    def __repr__(self) -> str:
        return (
            f"CacheKeyByIdAndIndex(cluster_id={self._cluster_id}, cache_id={self._cache_id}, "
            f"batch_index={self._batch_index})"
        )


class LayerSynchronizer(abc.ABC):
    """Tells a layer-wise transfer when a layer's data is there."""

    @abc.abstractmethod
    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        """Wait for the layer; False ends the transfer."""


def check_layer_range(name: str, layer_range: range | None, allow_none: bool = True) -> None:
    """Check that layer_range is a range of layers: step 1, not empty, not negative."""
    if layer_range is None and allow_none:
        return
    layers = check_isinstance(name, layer_range, range, allow_none=False)
    assert layers is not None
    raise_if_false(layers.step == 1, "step of {} should be 1, but got {}", name, layers.step)
    raise_if_false(
        0 <= layers.start < layers.stop, "{} should not be empty and not start below 0, but got {}", name, layers
    )


def layer_count(layers: range) -> int:
    """Return how many layers a checked range has; len fails for one that no cache could have."""
    return layers.stop - layers.start


class TransferWithCacheKeyConfig:
    """One destination of a layer-wise transfer, named by a key."""

    def __init__(
        self,
        cache_key: BlocksCacheKey | CacheKeyByIdAndIndex,
        src_layer_range: range | None = None,
        dst_layer_range: range | None = None,
        src_batch_index: int = 0,
    ) -> None:
        _check_destination_key(cache_key)
        check_layer_range("src_layer_range", src_layer_range, allow_none=False)
        check_layer_range("dst_layer_range", dst_layer_range, allow_none=False)
        assert src_layer_range is not None and dst_layer_range is not None
        raise_if_false(
            layer_count(src_layer_range) == layer_count(dst_layer_range),
            "src_layer_range {} and dst_layer_range {} should be equally long",
            src_layer_range,
            dst_layer_range,
        )
        check_uint32("src_batch_index", src_batch_index)
        _check_source_batch(cache_key, src_batch_index)
        self._cache_key = cache_key
        self._src_layer_range: range | None = src_layer_range
        self._dst_layer_range: range | None = dst_layer_range
        self._src_batch_index = src_batch_index
        self.dst_cluster_id: int = cache_key.cluster_id

    @property
    def cache_key(self) -> BlocksCacheKey | CacheKeyByIdAndIndex:
        return self._cache_key

    @cache_key.setter
    def cache_key(self, cache_key: BlocksCacheKey | CacheKeyByIdAndIndex) -> None:
        _check_destination_key(cache_key)
        self._cache_key = cache_key

    @property
    def src_layer_range(self) -> range | None:
        return self._src_layer_range

    @src_layer_range.setter
    def src_layer_range(self, src_layer_range: range | None) -> None:
        check_layer_range("src_layer_range", src_layer_range)
        self._src_layer_range = src_layer_range

    @property
    def dst_layer_range(self) -> range | None:
        return self._dst_layer_range

    @dst_layer_range.setter
    def dst_layer_range(self, dst_layer_range: range | None) -> None:
        check_layer_range("dst_layer_range", dst_layer_range)
        self._dst_layer_range = dst_layer_range

    @property
    def src_batch_index(self) -> int:
        return self._src_batch_index

    @src_batch_index.setter
    def src_batch_index(self, src_batch_index: int) -> None:
        _check_source_batch(self._cache_key, src_batch_index)
        self._src_batch_index = check_uint32("src_batch_index", src_batch_index)

    def __repr__(self) -> str:
        return (
            f"TransferWithCacheKeyConfig(cache_key={self._cache_key}, src_layer_range={self._src_layer_range}, "
            f"dst_layer_range={self._dst_layer_range}, src_batch_index={self._src_batch_index})"
        )


def _check_destination_key(cache_key: BlocksCacheKey | CacheKeyByIdAndIndex) -> None:
    check_isinstance("cache_key", cache_key, [BlocksCacheKey, CacheKeyByIdAndIndex], allow_none=False)


def _check_source_batch(cache_key: BlocksCacheKey | CacheKeyByIdAndIndex, src_batch_index: int) -> None:
    if isinstance(cache_key, BlocksCacheKey):
        raise_if_false(
            src_batch_index == 0, "src_batch_index should be 0 with a BlocksCacheKey, but got {}", src_batch_index
        )


class TransferConfig:
    """One destination of a layer-wise transfer, named by addresses in the destination's process."""

    def __init__(
        self,
        dst_cluster_id: int,
        dst_addrs: list[int] | tuple[int, ...],
        src_layer_range: range | None = None,
        src_batch_index: int = 0,
    ) -> None:
        self.dst_cluster_id = dst_cluster_id
        self.dst_addrs = dst_addrs
        self.src_layer_range = src_layer_range
        self.src_batch_index = src_batch_index
        self.dst_layer_range: range | None = None

    @property
    def dst_cluster_id(self) -> int:
        return self._dst_cluster_id

    @dst_cluster_id.setter
    def dst_cluster_id(self, dst_cluster_id: int) -> None:
        self._dst_cluster_id = check_uint64("dst_cluster_id", dst_cluster_id)

    @property
    def dst_addrs(self) -> list[int] | tuple[int, ...]:
        return self._dst_addrs

    @dst_addrs.setter
    def dst_addrs(self, dst_addrs: list[int] | tuple[int, ...]) -> None:
        check_list_uint64("dst_addrs", dst_addrs)
        self._dst_addrs = dst_addrs

    @property
    def src_layer_range(self) -> range | None:
        return self._src_layer_range

    @src_layer_range.setter
    def src_layer_range(self, src_layer_range: range | None) -> None:
        check_layer_range("src_layer_range", src_layer_range)
        self._src_layer_range = src_layer_range

    @property
    def src_batch_index(self) -> int:
        return self._src_batch_index

    @src_batch_index.setter
    def src_batch_index(self, src_batch_index: int) -> None:
        self._src_batch_index = check_uint32("src_batch_index", src_batch_index)

    def __repr__(self) -> str:
        return (
            f"TransferConfig(dst_cluster_id={self._dst_cluster_id}, dst_addrs={self._dst_addrs}, "
            f"src_layer_range={self._src_layer_range}, src_batch_index={self._src_batch_index})"
        )


class TransferTask(Protocol):
    """What a CacheTask waits for: a thread (join and is_alive are those of threading.Thread) that keeps results."""

    def join(self, timeout: float | None = None) -> None: ...

    def is_alive(self) -> bool: ...

    def get_results(self) -> list[LLMStatusCode | None]:
        """One entry for each transfer config; None where nothing was recorded (yet)."""
        ...


class CacheTask:
    """A layer-wise transfer in the background. Both calls may be made any number of times."""

    _TIMEOUT_CODE = LLMStatusCode.LLM_TIMEOUT

    def __init__(self, transfer_async_task: TransferTask) -> None:
        self._transfer_async_task = transfer_async_task

    def synchronize(self, timeout_in_millis: int | None = None) -> LLMStatusCode:
        """Wait for the end and return the first code that is not success. None waits without limit, 0 only looks."""
        if not self._ended(timeout_in_millis):
            return self._TIMEOUT_CODE
        for code in self._transfer_async_task.get_results():
            if code is not None and code != LLMStatusCode.LLM_SUCCESS:
                return code
        return LLMStatusCode.LLM_SUCCESS

    def get_results(self, timeout_in_millis: int | None = None) -> list[LLMStatusCode | None]:
        """Wait for the end and return a code for each config; where it has not come, the timeout code for each."""
        ended = self._ended(timeout_in_millis)
        results = self._transfer_async_task.get_results()
        return results if ended else [self._TIMEOUT_CODE] * len(results)

    def _ended(self, timeout_in_millis: int | None) -> bool:
        if timeout_in_millis is not None:
            check_uint32("timeout_in_millis", timeout_in_millis)
        self._transfer_async_task.join(None if timeout_in_millis is None else timeout_in_millis / 1000)
        return not self._transfer_async_task.is_alive()
