# SPDX-License-Identifier: Apache-2.0
"""Pushes, and the thread that makes them layer by layer while the layers are still being computed.

What a caller gave is checked and copied before the thread starts: a config or a list that changes later changes nothing.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

from .. import _native
from .._blocks import ID_BYTES, pack_blocks
from ..status import LLMException, LLMStatusCode, raise_if_false, raise_if_true
from ..utils import log
from ..utils.utils import check_isinstance, check_list_uint64, check_uint64
from .keys import ALL_TENSORS, NO_KEY, WORD, engine_key
from .llm_types import (
    BlocksCacheKey,
    Cache,
    CacheTask,
    KvCache,
    LayerSynchronizer,
    Placement,
    TransferConfig,
    TransferWithCacheKeyConfig,
    layer_count,
)

__all__ = ["TransferAsyncThread", "TransferCacheJob", "TransferCacheParameters", "transfer_cache_async"]

_PER_LAYER = 2  # tensors of a layer: fixed for layer-wise transfers


class TransferCacheParameters(NamedTuple):
    """One native push: of which local tensors what goes where in the peer's cache."""

    cluster_id: int
    key: tuple[int, int, int, int, int]  # the destination, as engine_key names it; NO_KEY with addrs
    cache_id: int  # of the local source
    src_batch: int
    src_tensors: tuple[int, int]  # the first one, how many
    dst_tensors: tuple[int, int]
    per_layer: int = _PER_LAYER
    block_bytes: int = 0  # of a destination block; 0: not said
    src_blocks: bytes = b""  # packed
    dst_blocks: bytes = b""
    addrs: Sequence[int] = ()  # of the destination's tensors, in its process

    def push(self, engine: Any, operation: str) -> None:
        """Push, for sync_kv_timeout at most. Raises LLMException, named after operation."""
        ends = self.cluster_id, *self.key, self.cache_id, self.src_batch
        layers = *self.src_tensors, *self.dst_tensors, self.per_layer
        words = array("Q", [number & WORD for number in (*ends, *layers, self.block_bytes)])
        words.frombytes(self.src_blocks)
        words.frombytes(self.dst_blocks)
        words.extend(self.addrs)
        counts = len(self.src_blocks) // ID_BYTES, len(self.dst_blocks) // ID_BYTES, len(self.addrs)
        engine.push(operation, words, *counts)


class TransferCacheJob:
    """One destination of a layer-wise transfer, as its config named it when the transfer began."""

    def __init__(
        self,
        config: TransferConfig | TransferWithCacheKeyConfig,
        cache_id: int,
        src_blocks: bytes = b"",
        dst_blocks: bytes = b"",
        block_bytes: int = 0,
    ) -> None:
        assert config.src_layer_range is not None
        self._layers = config.src_layer_range
        self._addrs: tuple[int, ...] = ()
        self._dst_first = 0
        key, src_batch = NO_KEY, config.src_batch_index
        if isinstance(config, TransferConfig):
            self._addrs = tuple(check_list_uint64("dst_addrs", config.dst_addrs))
        else:
            assert config.dst_layer_range is not None
            self._dst_first = config.dst_layer_range.start
            key = engine_key(config.cache_key)
            if isinstance(config.cache_key, BlocksCacheKey):
                src_batch = 0
        self._whole = TransferCacheParameters(
            check_uint64("dst_cluster_id", config.dst_cluster_id),
            key,
            cache_id,
            src_batch,
            ALL_TENSORS,
            ALL_TENSORS,
            block_bytes=block_bytes,
            src_blocks=src_blocks,
            dst_blocks=dst_blocks,
        )

    @property
    def cluster_id(self) -> int:
        return self._whole.cluster_id

    def wants(self, layer: int) -> bool:
        """Tell whether a layer of the source goes to this destination."""
        return layer in self._layers

    def ends_with(self, layer: int) -> bool:
        return layer == self._layers[-1]

    def parameters(self, layer: int) -> TransferCacheParameters:
        """Return the push of one layer of the source."""
        place = layer - self._layers.start
        src = layer * _PER_LAYER, _PER_LAYER
        if self._addrs:
            addrs = self._addrs[place * _PER_LAYER : (place + 1) * _PER_LAYER]
            return self._whole._replace(src_tensors=src, addrs=addrs)
        return self._whole._replace(src_tensors=src, dst_tensors=((self._dst_first + place) * _PER_LAYER, _PER_LAYER))


class TransferAsyncThread(threading.Thread):
    """Pushes each layer to the jobs that want it, as soon as the synchronizer says that its data is there.

    It is no daemon: a process that ends waits for it, and finalizes its engine after that. It keeps the source cache, which
    could be released by going out of scope, until it has ended.
    """

    _OPERATION = "transfer_cache_async"

    def __init__(
        self,
        engine: Any,
        src_cache: Cache | KvCache,
        layer_synchronizer: LayerSynchronizer,
        jobs: Sequence[TransferCacheJob],
        layers: range,
        timeout_code: LLMStatusCode = LLMStatusCode.LLM_TIMEOUT,
    ) -> None:
        super().__init__(
            target=self._survive,  # threading.Thread forgets target and arguments at the end
            args=(src_cache, engine, layer_synchronizer, layers),
            name="llm_datadist-transfer",
            daemon=False,
        )
        self._jobs = jobs
        self._timeout_code = timeout_code  # the result of a push that has missed its deadline
        self._results: dict[int, LLMStatusCode] = {}  # by destination cluster
        self._ended = threading.Event()

    def get_results(self) -> list[LLMStatusCode | None]:
        """Return the code of each job's cluster, None where there is none (yet)."""
        return [self._results.get(job.cluster_id) for job in self._jobs]

    def join(self, timeout: float | None = None) -> None:
        """Wait until the transfer has ended, for timeout seconds at most. LLMException in a forked child, where it never ends.

        RuntimeError for a wait inside its own synchronizer, as Thread.join has it; with timeout 0 it does not wait.
        Thread.join is no place to wait in: up to Python 3.12 it takes a Ctrl-C for the end of the thread.
        """
        _native.refuse_in_child()
        if timeout != 0 and threading.current_thread() is self:
            raise RuntimeError("a transfer can not be waited for inside its own synchronizer")
        if self._ended.wait(timeout):
            super().join()

    def is_alive(self) -> bool:
        """Tell whether the transfer still runs."""
        return not self._ended.is_set()

    def _survive(self, src_cache: Cache | KvCache, *work: Any) -> None:
        try:
            self._transfer(*work)
        except BaseException:
            log.error("%s of %s has ended by an exception", self._OPERATION, src_cache, exc_info=True)
        finally:
            self._ended.set()

    def _transfer(self, engine: Any, layer_synchronizer: LayerSynchronizer, layers: range) -> None:
        for layer in layers:
            jobs = [job for job in self._jobs if job.wants(layer)]
            if not jobs:
                continue
            if not layer_synchronizer.synchronize_layer(layer, None):
                self._results.update((job.cluster_id, LLMStatusCode.LLM_PARAM_INVALID) for job in jobs)
                return
            for job in jobs:
                try:
                    job.parameters(layer).push(engine, self._OPERATION)
                except LLMException as exc:
                    log.error("layer %d to cluster %d: %s", layer, job.cluster_id, exc)
                    timed_out = exc.status_code == LLMStatusCode.LLM_TIMEOUT
                    self._results[job.cluster_id] = self._timeout_code if timed_out else exc.status_code
                    return
                if job.ends_with(layer):
                    self._results[job.cluster_id] = LLMStatusCode.LLM_SUCCESS


def transfer_cache_async(
    engine: Any,
    src_cache: Cache | KvCache,
    layer_synchronizer: LayerSynchronizer,
    transfer_configs: Sequence[TransferConfig] | Sequence[TransferWithCacheKeyConfig],
    src_block_indices: Sequence[int] | None,
    dst_block_indices: Sequence[int] | None,
    dst_block_memory_size: int | None,
    *,
    config_class: type,
    task_class: type[CacheTask] = CacheTask,
) -> CacheTask:
    """Check what CacheManager.transfer_cache_async was given, start its thread and return its task.

    The caller has checked the class of src_cache. config_class is what the configs have to be; task_class is the CacheTask
    whose code of a timeout counts, for the task and for its pushes.
    """
    desc = src_cache.cache_desc
    raise_if_true(desc.placement == Placement.HOST, "src_cache should not be Placement.HOST")
    dst_blocks = _pack_indices("dst_block_indices", dst_block_indices)
    src_blocks = _pack_indices("src_block_indices", src_block_indices)
    if dst_block_memory_size is not None:
        check_uint64("dst_block_memory_size", dst_block_memory_size)
    _check_indices(src_blocks, dst_blocks, dst_block_memory_size)
    check_isinstance("layer_synchronizer", layer_synchronizer, LayerSynchronizer, allow_none=False)
    check_isinstance("transfer_configs", transfer_configs, [list, tuple], config_class, allow_none=False)
    raise_if_true(dst_block_memory_size and not dst_blocks, "dst_block_memory_size needs dst_block_indices")
    raise_if_false(desc.num_tensors % _PER_LAYER == 0, "num_tensors should be even, but got {}", desc.num_tensors)
    layers = range(desc.num_tensors // _PER_LAYER)
    for config in transfer_configs:
        _check_config(config, layers, bool(src_blocks))
    jobs = [
        TransferCacheJob(config, src_cache.cache_id, src_blocks, dst_blocks, dst_block_memory_size or 0)
        for config in transfer_configs
    ]
    _native.refuse_in_child()  # at once, not as the result of a thread
    thread = TransferAsyncThread(engine, src_cache, layer_synchronizer, jobs, layers, task_class._TIMEOUT_CODE)
    thread.start()
    return task_class(thread)


def _pack_indices(name: str, indices: Sequence[int] | None) -> bytes:
    if indices is None:
        return b""
    if isinstance(indices, (list, tuple)):
        check_list_uint64(name, indices)
    return pack_blocks(name, indices)


def _check_indices(src: bytes, dst: bytes, block_bytes: int | None) -> None:
    raise_if_true(src and not dst, "transfer from blocks to cache is not supported")
    raise_if_true(src and len(src) != len(dst), "src_block_indices and dst_block_indices should be equally long")
    raise_if_true(dst and not src and block_bytes is None, "dst_block_memory_size is needed without src_block_indices")


def _check_config(config: TransferConfig | TransferWithCacheKeyConfig, layers: range, from_blocks: bool) -> None:
    """Check a config against the source, and write all layers into one that names none."""
    if config.src_layer_range is None:
        config.src_layer_range = layers
    src = config.src_layer_range
    raise_if_true(from_blocks and config.src_batch_index != 0, "src_batch_index should be 0 with src_block_indices")
    raise_if_false(src.stop <= layers.stop, "src_layer_range {} should be inside {}", src, layers)
    if isinstance(config, TransferConfig):
        raise_if_false(
            len(config.dst_addrs) == len(src) * _PER_LAYER,
            "{} dst_addrs do not fit src_layer_range {} of {} tensors a layer",
            len(config.dst_addrs),
            src,
            _PER_LAYER,
        )
    else:
        dst = config.dst_layer_range  # its setter does not look at the other one
        raise_if_false(
            dst is not None and layer_count(dst) == layer_count(src),
            "src_layer_range {} and dst_layer_range {} should be equally long",
            src,
            dst,
        )
