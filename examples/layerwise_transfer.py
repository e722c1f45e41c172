# SPDX-License-Identifier: Apache-2.0
"""Transfer layer by layer while the model computes: transfer_cache_async with a LayerSynchronizer.

The prefill process computes a layer on its "device" (a thread that takes its time), and what is computed goes out while the next
layer is under way. The decode process has told the addresses and the blocks that it wants; they lie within a cache of its own.
Both caches are DEVICE memory.
"""

from __future__ import annotations

import sys
import threading
import time
from multiprocessing.connection import Connection

import common

from llm_datadist import BlocksCacheKey, Cache, CacheDesc, DataType, LayerSynchronizer, LLMRole, LLMStatusCode, TransferConfig
from llm_datadist.v2.cache_manager import CacheManager

PREFILL, DECODE = 1, 2  # cluster ids
LAYERS, BLOCK = 8, (16, 8, 64)  # tokens, heads and dimensions of a head in a block
HERE = CacheDesc(2 * LAYERS, [32, *BLOCK], DataType.DT_FLOAT16)  # the prefill's cache: K and V of each layer
THERE = CacheDesc(2 * LAYERS, [48, *BLOCK], DataType.DT_FLOAT16)
BLOCK_BYTES = THERE.size // THERE.shape[0]
SOURCE, TARGET = list(range(4, 20)), list(range(40, 24, -1))  # blocks of the sequence, here and there
LAYER_SECONDS = 0.02


class Device(LayerSynchronizer):
    """Computes layer after layer, and lets others wait for one as for an event of an accelerator's stream."""

    def __init__(self, manager: CacheManager, cache: Cache) -> None:
        self._manager, self._cache = manager, cache
        self._finished = [threading.Event() for _ in range(LAYERS)]
        self._thread = threading.Thread(target=self._compute)
        self.last_at = 0.0  # when the last layer was finished

    def launch(self) -> None:
        self._thread.start()

    def _compute(self) -> None:
        content = common.random_kv(HERE, seed=1)
        for layer, event in enumerate(self._finished):
            time.sleep(LAYER_SECONDS)  # the work
            common.write(self._manager, self._cache, content[2 * layer : 2 * layer + 2], first=2 * layer)
            self.last_at = time.perf_counter()
            event.set()

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        """Wait until a layer is computed. False ends the transfer."""
        seconds = None if timeout_in_millis is None else timeout_in_millis / 1000
        return self._finished[layer_index].wait(seconds)


def prefill(decode: Connection) -> None:
    engine = common.start_engine(LLMRole.PROMPT, PREFILL, listen_ip_info="127.0.0.1:0", mem_pool_cfg=common.POOL)
    manager = engine.cache_manager
    cache = manager.allocate_blocks_cache(HERE, BlocksCacheKey(PREFILL))
    decode.send(engine.listen_address)
    addresses = decode.recv()  # the decode process has linked

    device = Device(manager, cache)
    device.launch()
    task = manager.transfer_cache_async(
        cache,
        device,
        [TransferConfig(DECODE, addresses)],
        src_block_indices=SOURCE,
        dst_block_indices=TARGET,
        dst_block_memory_size=BLOCK_BYTES,
    )
    code = task.synchronize()
    behind = time.perf_counter() - device.last_at
    if code != LLMStatusCode.LLM_SUCCESS:
        sys.exit(f"transfer_cache_async: {code}, {task.get_results()}")
    print(f"the transfer of {LAYERS} layers ended {behind * 1e3:.1f} ms after the last of them was computed")
    decode.send("transferred")
    decode.recv()
    manager.deallocate_blocks_cache(cache)
    engine.finalize()


def decode(prefill: Connection) -> None:
    engine = common.start_engine(LLMRole.DECODER, DECODE, mem_pool_cfg=common.POOL)
    manager = engine.cache_manager
    cache = manager.allocate_blocks_cache(THERE)
    common.write(manager, cache, common.zeros(THERE))
    cluster = common.link(engine, PREFILL, prefill.recv())
    prefill.send(cache.tensor_addrs)
    prefill.recv()

    wanted = common.zeros(THERE)
    for tensor, source in zip(wanted, common.random_kv(HERE, seed=1)):
        tensor[TARGET] = source[SOURCE]
    common.verify(f"{len(SOURCE)} blocks of {LAYERS} layers", common.read(manager, cache), wanted)
    engine.unlink_clusters([cluster], timeout=5000)
    prefill.send("done")
    engine.finalize()


if __name__ == "__main__":
    common.run(prefill, decode)
