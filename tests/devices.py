# SPDX-License-Identifier: Apache-2.0
"""Caches of an End in each kind of memory, where DEVICE memory may be an NPU's, which only the engine and its runtime can copy.

The process of the End calls these, see :class:`peers.Peer.run`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

import llm_datadist
from llm_datadist import Cache, CacheDesc, Placement
from native_face import ON_DEVICE, Side
from peers import End, desc, memory_at, pattern
from pushes import Ready

ON_NPUS = os.environ.get("LLM_DATADIST_DEVICE") == "cann"
DEVICE_KINDS = ("device pool", "device registered")
KINDS = (*DEVICE_KINDS, "host pool", "host registered")
TENSORS = 4  # two layers

_keys: dict[str, Any] = {}  # of allocated caches, which live until these are released
_lent: dict[str, list[int]] = {}  # device memory of the test's own that is registered, by the name of the cache
_sides: list[Side] = []  # the device's runtime, once it was needed


def add(
    end: End, name: str, kind: str, shape: list[int], number: int, keys: Any = (), *, blocks: bool, accessible: bool | None
) -> int:
    """Make a cache in a kind of memory, with the pattern of number, and return its id."""
    place, how = kind.split()
    description = desc(shape, TENSORS, placement=Placement.DEVICE if place == "device" else Placement.HOST)
    arrays = [pattern(number, tensor, description.size) for tensor in range(TENSORS)]
    if how == "registered" and not (place == "device" and ON_NPUS):
        return end.lend(name, description, arrays, keys, blocks=blocks, accessible=accessible)
    given: Any = keys or None if blocks else keys
    if how == "pool":
        allocate = end.manager.allocate_blocks_cache if blocks else end.manager.allocate_cache
        cache = end.caches[name] = allocate(description, given)
        _keys[name] = () if blocks else keys
    else:
        register = end.manager.register_blocks_cache if blocks else end.manager.register_cache
        _lent[name] = [_side().malloc(ON_DEVICE, description.size) for _ in range(TENSORS)]
        cache = end.caches[name] = register(description, _lent[name], given, accessible)
    _copy(end, cache, arrays, into=True)
    return int(cache.cache_id)


def content(end: End, name: str) -> list[np.ndarray]:
    """Return a copy of the bytes of each tensor."""
    cache = end.caches[name]
    arrays = [np.zeros(cache.cache_desc.size, np.uint8) for _ in cache.tensor_addrs]
    _copy(end, cache, arrays, into=False)
    return arrays


def drop(end: End) -> None:
    """Give up all caches."""
    for name in list(end.caches):
        for key in _keys.pop(name, ()):
            end.manager.remove_cache_key(key)
        if name not in _lent:
            end.drop(name)
            continue
        end.manager.unregister_cache(end.caches.pop(name).cache_id)
        for address in _lent.pop(name):
            _side().free(ON_DEVICE, address)


def transfer(end: End, config: Any, **blocks: Any) -> Any:
    """Transfer all layers of the source, and return the task's code and results."""
    task = end.manager.transfer_cache_async(end.caches["source"], Ready(), [config], **blocks)
    return task.synchronize(10_000), task.get_results()


def _copy(end: End, cache: Cache, arrays: list[np.ndarray], into: bool) -> None:
    description = cache.cache_desc
    if description.placement is Placement.HOST:
        for array, address in zip(arrays, cache.tensor_addrs):
            view = memory_at(address, array.size)
            target, given = (view, array) if into else (array, view)
            target[:] = given
        return
    on_host = CacheDesc(description.num_tensors, description.shape, description.data_type, Placement.HOST)
    host = Cache.create_cpu_cache(on_host, [array.ctypes.data for array in arrays])
    device = Cache(cache.cache_id, description, cache.tensor_addrs, None, False, True)  # swap_blocks goes by addresses
    source, target = (host, device) if into else (device, host)
    end.manager.swap_blocks(source, target, {block: block for block in range(description.shape[0])})


def _side() -> Side:
    if not _sides:
        _sides.append(Side(str(Path(llm_datadist.__file__).with_name("libcann_face.so"))))
    return _sides[0]
