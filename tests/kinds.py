# SPDX-License-Identifier: Apache-2.0
"""One pull and one push of each kind between two ends, whatever joins them, with every byte of the destination compared."""

from __future__ import annotations

from typing import Any

import numpy as np

from llm_datadist import (
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    LLMStatusCode,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from peers import SOURCE, TARGET, End, desc, pattern, refused
from pushes import Ready

TENSORS = 4  # two layers
NO_ID = 2**64 - 1
NOT_EXIST = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST


def pull_each_kind(local: Any, owner: Any, cluster_id: int, one_sided: bool = False) -> None:
    """Pull from owner, which local knows under cluster_id. The two may be one End, and are left without caches of this."""
    for owned in (False, True):
        pull_by_id(local, owner, cluster_id, owned)
        pull_blocks(local, owner, cluster_id, owned)
        if not one_sided:
            pull_by_key(local, owner, cluster_id, owned)
            pull_by_prefix(local, owner, cluster_id, owned)
            pull_row_into_blocks(local, owner, cluster_id, owned)


def pull_by_id(local: Any, owner: Any, cluster_id: int, owned: bool) -> None:
    cache_id = owner.add("source", desc([2, 100], TENSORS), SOURCE, owned=owned)
    local.add("target", desc([3, 60], TENSORS), TARGET)
    local.manage("pull_cache", CacheKeyByIdAndIndex(cluster_id, cache_id, 1), "target", 2, 50)
    check(local, {tensor: {120: source(tensor, 200)[100:150]} for tensor in range(TENSORS)})
    layers = {"src_layer_range": range(1), "dst_layer_range": range(1, 2)}
    local.manage("pull_cache", CacheKeyByIdAndIndex(cluster_id, cache_id, 0), "target", **layers)
    moved: dict[int, dict[int, Any]] = {tensor: {120: source(tensor, 200)[100:150]} for tensor in range(TENSORS)}
    for tensor in range(2):
        moved[2 + tensor][0] = source(tensor, 200)[:60]
    check(local, moved)
    drop(local, owner)


def pull_by_key(local: Any, owner: Any, cluster_id: int, owned: bool) -> None:
    keys = [CacheKey(cluster_id, req_id=1), CacheKey(cluster_id, req_id=2)]
    owner.add("source", desc([2, 100], TENSORS), SOURCE, keys, owned=owned)
    local.add("target", desc([1, 100], TENSORS), TARGET)
    for batch in (1, 0):
        local.manage("pull_cache", keys[batch], "target")
        check(local, {tensor: {0: source(tensor, 200)[100 * batch :][:100]} for tensor in range(TENSORS)})
    if owned:
        refused(local.manage, "pull_cache", keys[1], "target", code=NOT_EXIST)
    else:
        local.manage("pull_cache", keys[1], "target")
    drop(local, owner)


def pull_by_prefix(local: Any, owner: Any, cluster_id: int, owned: bool) -> None:
    key = CacheKey(cluster_id, req_id=NO_ID, model_id=3, prefix_id=9)
    owner.add("source", desc([1, 100], TENSORS), SOURCE, [key], owned=owned)
    local.add("target", desc([1, 100], TENSORS), TARGET)
    for _ in range(2):  # it is not released
        local.manage("pull_cache", key, "target")
        check(local, {tensor: {0: source(tensor, 100)} for tensor in range(TENSORS)})
        local.fill("target", TARGET)
    owner.manage("remove_cache_key", key)
    drop(local, owner)


def pull_blocks(local: Any, owner: Any, cluster_id: int, owned: bool) -> None:
    key = BlocksCacheKey(cluster_id, model_id=4)
    owner.add("source", desc([8, 32], TENSORS), SOURCE, key, blocks=True, owned=owned)
    local.add("target", desc([5, 32], TENSORS), TARGET, blocks=True)
    local.manage("pull_blocks", key, "target", [5, 6, 1], [0, 1, 3])
    moved = {}
    for tensor in range(TENSORS):
        given = source(tensor, 256)
        moved[tensor] = {0: given[160:224], 96: given[32:64]}
    check(local, moved)
    drop(local, owner)


def pull_row_into_blocks(local: Any, owner: Any, cluster_id: int, owned: bool) -> None:
    key = CacheKey(cluster_id, req_id=5)
    owner.add("source", desc([1, 100], TENSORS), SOURCE, [key], owned=owned)
    local.add("target", desc([4, 40], TENSORS), TARGET, blocks=True)
    local.manage("pull_blocks", key, "target", [], [3, 0, 1])
    moved = {}
    for tensor in range(TENSORS):
        given = source(tensor, 100)
        moved[tensor] = {120: given[:40], 0: given[40:80], 40: given[80:]}
    check(local, moved)
    drop(local, owner)


def push_each_kind(pusher: End, receiver: Any, cluster_id: int, one_sided: bool = False) -> None:
    """Push to receiver, as pull_each_kind pulls. The pusher is in this process."""
    for owned in (False, True):
        if one_sided:
            push_rows(pusher, receiver, cluster_id, owned)
            push_blocks(pusher, receiver, cluster_id, owned)
        push_layers(pusher, receiver, cluster_id, owned, one_sided)


def push_rows(pusher: End, receiver: Any, cluster_id: int, owned: bool) -> None:
    pusher.add("source", desc([2, 60], TENSORS), SOURCE, owned=owned)
    cache_id = receiver.add("target", desc([3, 100], TENSORS), TARGET, owned=owned)
    pusher.manage("push_cache", CacheKeyByIdAndIndex(cluster_id, cache_id, 2), "source", 1)
    check(receiver, {tensor: {200: source(tensor, 120)[60:]} for tensor in range(TENSORS)})
    drop(receiver, pusher)


def push_blocks(pusher: End, receiver: Any, cluster_id: int, owned: bool) -> None:
    key = BlocksCacheKey(cluster_id, model_id=4)
    pusher.add("source", desc([8, 32], TENSORS), SOURCE, blocks=True, owned=owned)
    receiver.add("target", desc([5, 32], TENSORS), TARGET, key, blocks=True, owned=owned)
    layers = {"src_layer_range": range(1, 2), "dst_layer_range": range(1)}
    pusher.manage("push_blocks", key, "source", [5, 6, 1], [0, 1, 3], **layers)
    moved = {}
    for tensor in range(2):
        given = source(2 + tensor, 256)
        moved[tensor] = {0: given[160:224], 96: given[32:64]}
    check(receiver, moved)
    drop(receiver, pusher)


def push_layers(pusher: End, receiver: Any, cluster_id: int, owned: bool, one_sided: bool) -> None:
    """Transfer all layers in the background, to a cache of the receiver's or to its addresses."""
    pusher.add("source", desc([1, 100], TENSORS), SOURCE, owned=owned)
    cache_id = receiver.add("target", desc([1, 100], TENSORS), TARGET, owned=owned)
    config: Any
    if one_sided:
        config = TransferWithCacheKeyConfig(CacheKeyByIdAndIndex(cluster_id, cache_id), range(2), range(2))
    else:
        addrs = receiver.run("result = list(end.caches['target'].tensor_addrs)")
        config = TransferConfig(cluster_id, addrs, range(2))
    task = pusher.manager.transfer_cache_async(pusher.caches["source"], Ready(), [config])
    assert task.synchronize(10_000) is LLMStatusCode.LLM_SUCCESS
    assert task.get_results() == [LLMStatusCode.LLM_SUCCESS]
    check(receiver, {tensor: {0: source(tensor, 100)} for tensor in range(TENSORS)})
    drop(receiver, pusher)


def source(tensor: int, size: int) -> np.ndarray:
    return pattern(SOURCE, tensor, size)


def check(local: Any, moved: dict[int, dict[int, Any]]) -> None:
    """Check the target: where moved says so (tensor -> start -> bytes) it is new, everywhere else it is as it was."""
    for tensor, got in enumerate(local.content("target")):
        wanted = pattern(TARGET, tensor, got.size)
        for start, new in moved.get(tensor, {}).items():
            wanted[start : start + len(new)] = new
        assert np.array_equal(got, wanted), f"tensor {tensor}"


def drop(*ends: End) -> None:
    for end, name in zip(ends, ("target", "source")):
        end.drop(name)
