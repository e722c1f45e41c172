# SPDX-License-Identifier: Apache-2.0
"""Disaggregated generation: one process computes the KV cache of a prompt, another one fetches it and generates.

The model is a small transformer of the shape of Llama (RMSNorm, grouped-query attention, rotary positions, SwiGLU) with seeded
weights. The KV cache moves in four ways. With each the decode process must hold the very bytes that the prefill process computed,
and generate the tokens that a single process generates:

- whole: one contiguous row, with pull_cache;
- by blocks: the prefill's pages to other pages of a smaller pool, with pull_blocks;
- by layers, pulled: each layer as soon as the prefill has finished it, while it computes the next ones;
- by layers, pushed: the same by the prefill, with transfer_cache_async.

The caches are DEVICE memory, which may be an NPU's. numpy computes on the host: a layer goes to the device when it is computed,
and what was fetched comes to the host before it is used.

The time to the first token counts from the request until the decode process has that token.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import NamedTuple

import common
import numpy as np

from llm_datadist import BlocksCacheKey, Cache, CacheDesc, CacheKey, DataType, LayerSynchronizer, LLMRole, TransferConfig
from llm_datadist.v2.cache_manager import CacheManager

PREFILL, DECODE = 1, 2  # cluster ids
VOCABULARY, WIDTH, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 2048, 256, 8, 2, 32, 704
BLOCK_TOKENS = 16
POOL = '{"memory_size": 268435456}'  # bytes, which are taken from the system when they are used
REPEATS = 3  # of each way, of which the fastest is shown


@dataclass
class Sizes:
    """What the command line says."""

    layers: int
    prompt: int  # tokens
    generate: int  # tokens

    @property
    def positions(self) -> int:
        return self.prompt + self.generate

    @property
    def blocks(self) -> int:
        return -(-self.positions // BLOCK_TOKENS)

    def desc(self, count: int, tokens: int) -> CacheDesc:
        """Return the description of a cache: for each layer keys and values, [count, tokens, KV heads, head dim]."""
        return CacheDesc(2 * self.layers, [count, tokens, KV_HEADS, HEAD_DIM], DataType.DT_FLOAT16)

    def row(self) -> CacheDesc:
        return self.desc(1, self.positions)

    def pages(self, spare: int) -> CacheDesc:
        return self.desc(self.blocks + spare, BLOCK_TOKENS)


class KV:
    """The KV cache of one sequence: token t is in page table[t // page size] of each tensor. A contiguous row is one page."""

    def __init__(self, tensors: list[np.ndarray], table: list[int]) -> None:
        self._tensors = tensors
        self._table = np.array(table)
        self._page = tensors[0].shape[1]

    def write(self, layer: int, start: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Store keys and values of the tokens from start on, [tokens, KV heads, head dim]."""
        positions = np.arange(start, start + len(keys))
        pages, offsets = self._table[positions // self._page], positions % self._page
        for tensor, new in zip(self.layer(layer), (keys, values)):
            tensor[pages, offsets] = new

    def read(self, layer: int, count: int) -> list[np.ndarray]:
        """Return keys and values of the first count tokens, [KV heads, tokens, head dim]."""
        return [
            tensor[self._table].reshape(-1, KV_HEADS, HEAD_DIM)[:count].transpose(1, 0, 2).astype(np.float32)
            for tensor in self.layer(layer)
        ]

    def layer(self, layer: int) -> list[np.ndarray]:
        """Return the tensors of a layer."""
        return self._tensors[2 * layer : 2 * layer + 2]

    def content(self, count: int) -> bytes:
        """Return the bytes of the first count tokens of all tensors, wherever their pages are."""
        return b"".join(tensor[self._table].reshape(-1, KV_HEADS, HEAD_DIM)[:count].tobytes() for tensor in self._tensors)


class Layer(NamedTuple):
    """The weights of one layer."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    out: np.ndarray
    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray


class Model:
    """A decoder-only transformer whose weights are the same in every process."""

    def __init__(self, layers: int) -> None:
        random = np.random.default_rng(1)

        def weights(rows: int, columns: int) -> np.ndarray:
            return random.standard_normal((rows, columns), np.float32) / np.float32(np.sqrt(rows))

        self.layers = [
            Layer(
                query=weights(WIDTH, HEADS * HEAD_DIM),
                key=weights(WIDTH, KV_HEADS * HEAD_DIM),
                value=weights(WIDTH, KV_HEADS * HEAD_DIM),
                out=weights(HEADS * HEAD_DIM, WIDTH),
                gate=weights(WIDTH, HIDDEN),
                up=weights(WIDTH, HIDDEN),
                down=weights(HIDDEN, WIDTH),
            )
            for _ in range(layers)
        ]
        self._embedding = random.standard_normal((VOCABULARY, WIDTH), np.float32)
        self._head = weights(WIDTH, VOCABULARY)

    def forward(self, tokens: list[int], start: int, kv: KV, finished: Callable[[int], None] = lambda layer: None) -> int:
        """Compute tokens, whose first is at position start, and return the most likely next one.

        Their keys and values go into kv, which has those of all earlier positions; finished is called after each layer.
        """
        state = self._embedding[tokens]
        for number, layer in enumerate(self.layers):
            normed = rms_norm(state)
            query = rotate((normed @ layer.query).reshape(-1, HEADS, HEAD_DIM), start)
            key = rotate((normed @ layer.key).reshape(-1, KV_HEADS, HEAD_DIM), start)
            kv.write(number, start, key, (normed @ layer.value).reshape(-1, KV_HEADS, HEAD_DIM))
            state = state + attention(query, *kv.read(number, start + len(tokens)), start) @ layer.out
            normed = rms_norm(state)
            gate = normed @ layer.gate
            state = state + (gate / (1 + np.exp(-gate)) * (normed @ layer.up)) @ layer.down
            finished(number)
        return int(np.argmax(rms_norm(state[-1]) @ self._head))

    def generate(self, token: int, start: int, kv: KV, count: int) -> list[int]:
        """Return count tokens that follow the one at position start, the likeliest each time."""
        tokens = []
        for position in range(start, start + count):
            token = self.forward([token], position, kv)
            tokens.append(token)
        return tokens


def rms_norm(state: np.ndarray) -> np.ndarray:
    return state / np.sqrt(np.mean(state * state, axis=-1, keepdims=True) + np.float32(1e-5))


def rotate(heads: np.ndarray, start: int) -> np.ndarray:
    """Turn the pairs of dimensions of [tokens, heads, head dim] by angles that grow with the position."""
    half = HEAD_DIM // 2
    angles = np.outer(np.arange(start, start + len(heads)), 10_000.0 ** (-np.arange(half) / half)).astype(np.float32)[:, None]
    cos, sin, left, right = np.cos(angles), np.sin(angles), heads[..., :half], heads[..., half:]
    return np.concatenate([left * cos - right * sin, left * sin + right * cos], axis=-1)


def attention(query: np.ndarray, keys: np.ndarray, values: np.ndarray, start: int) -> np.ndarray:
    """Let each token look at all up to itself. Each group of HEADS / KV_HEADS query heads has one head of keys and values."""
    count = len(query)
    grouped = query.reshape(count, KV_HEADS, -1, HEAD_DIM).transpose(1, 2, 0, 3)  # [KV heads, group, tokens, head dim]
    scores = grouped @ keys[:, None].swapaxes(-1, -2) / np.float32(np.sqrt(HEAD_DIM))
    future = np.arange(keys.shape[1]) > np.arange(start, start + count)[:, None]
    scores[..., future] = -np.inf
    likely = np.exp(scores - scores.max(axis=-1, keepdims=True))
    looked = likely / likely.sum(axis=-1, keepdims=True) @ values[:, None]
    return looked.transpose(2, 0, 1, 3).reshape(count, -1)


def pages_of(seed: int, sizes: Sizes, desc: CacheDesc) -> list[int]:
    """Return which pages of a cache a sequence has. A serving framework's block manager would say."""
    return [int(page) for page in np.random.default_rng(seed).permutation(desc.shape[0])[: sizes.blocks]]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- the prefill process


class Progress(LayerSynchronizer):
    """Lets a transfer wait for layers that are computed."""

    def __init__(self, layers: int) -> None:
        self._events = [threading.Event() for _ in range(layers)]

    def finish(self, layer: int) -> None:
        self._events[layer].set()

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return self._events[layer_index].wait(None if timeout_in_millis is None else timeout_in_millis / 1000)


class Worker:
    """Computes the KV cache of prompts: all tokens but the last, with which decoding begins.

    Each way returns the digest of what was computed.
    """

    def __init__(self, manager: CacheManager, sizes: Sizes, decode: Connection) -> None:
        self._manager, self._sizes, self._decode = manager, sizes, decode
        self._model = Model(sizes.layers)
        self._paged = manager.allocate_blocks_cache(sizes.pages(spare=24), BlocksCacheKey(PREFILL))

    def whole(self, request: int, prompt: list[int]) -> str:
        """Compute into a row that the request's key names."""
        row = self._manager.allocate_cache(self._sizes.row(), [CacheKey(PREFILL, req_id=request)])
        self._decode.send(request)
        computed = self._compute(prompt, row, [0])
        self._decode.recv()  # pulled, by which the key was released
        self._manager.deallocate_cache(row)
        return computed

    def paged(self, request: int, prompt: list[int]) -> str:
        """Compute into pages, which the decode process is told."""
        table = pages_of(request, self._sizes, self._paged.cache_desc)
        self._decode.send(table)
        return self._compute(prompt, self._paged, table)

    def pushed(self, request: int, prompt: list[int]) -> str:
        """Compute into pages, and push each layer to where the decode process wants it."""
        desc = self._paged.cache_desc
        table = pages_of(request, self._sizes, desc)
        addresses, pages = self._decode.recv()
        progress = Progress(self._sizes.layers)
        task = self._manager.transfer_cache_async(
            self._paged,
            progress,
            [TransferConfig(DECODE, addresses)],
            src_block_indices=table,
            dst_block_indices=pages,
            dst_block_memory_size=desc.size // desc.shape[0],
        )
        computed = self._compute(prompt, self._paged, table, progress.finish)
        self._decode.send(task.synchronize())
        return computed

    def _compute(
        self, prompt: list[int], cache: Cache, table: list[int], finished: Callable[[int], None] = lambda layer: None
    ) -> str:
        kv = KV(common.zeros(cache.cache_desc), table)

        def hand_over(layer: int) -> None:
            common.write(self._manager, cache, kv.layer(layer), first=2 * layer, blocks=table)
            finished(layer)
            self._decode.send(("finished", layer))

        self._model.forward(prompt[:-1], 0, kv, hand_over)
        return digest(kv.content(len(prompt) - 1))


def prefill(decode: Connection, sizes: Sizes) -> None:
    """Serve the requests of the decode process until there is none."""
    engine = common.start_engine(LLMRole.PROMPT, PREFILL, listen_ip_info="127.0.0.1:0", mem_pool_cfg=POOL)
    worker = Worker(engine.cache_manager, sizes, decode)
    decode.send(engine.listen_address)
    for request, (kind, prompt) in enumerate(iter(decode.recv, None)):
        decode.send(getattr(worker, kind)(request, prompt))
    engine.finalize()


# --- the decode process


class Fetcher:
    """The caches of the decode process, and how the KV cache of a prompt gets there."""

    def __init__(self, manager: CacheManager, sizes: Sizes, prefill: Connection) -> None:
        self._manager, self._sizes, self._prefill = manager, sizes, prefill
        self._row = manager.allocate_cache(sizes.row())
        self._paged = manager.allocate_blocks_cache(sizes.pages(spare=8))
        self._table = pages_of(99, sizes, self._paged.cache_desc)
        self.waited = 0.0  # s between the end of the prefill and the last byte

    def whole(self) -> KV:
        """Pull the row when it is computed."""
        request = self._prefill.recv()
        self._after(self._sizes.layers - 1, lambda: self._manager.pull_cache(CacheKey(PREFILL, req_id=request), self._row))
        self._prefill.send("pulled")
        return self._on_host(self._row, [0])

    def by_blocks(self) -> KV:
        """Pull the pages when all are computed."""
        theirs = self._prefill.recv()
        key = BlocksCacheKey(PREFILL)
        self._after(self._sizes.layers - 1, lambda: self._manager.pull_blocks(key, self._paged, theirs, self._table))
        return self._on_host(self._paged, self._table)

    def pushed(self) -> KV:
        """Have the prefill push the pages of each layer when that is computed."""
        self._prefill.send((self._paged.tensor_addrs, self._table))
        self._after(self._sizes.layers - 1, self._prefill.recv)
        return self._on_host(self._paged, self._table)

    def by_layers(self) -> KV:
        """Pull the pages of each layer when that is computed."""
        theirs = self._prefill.recv()
        key = BlocksCacheKey(PREFILL)
        for layer in range(self._sizes.layers):
            only = range(layer, layer + 1)
            pull = partial(self._manager.pull_blocks, key, self._paged, theirs, self._table)
            self._after(layer, partial(pull, src_layer_range=only, dst_layer_range=only))
        return self._on_host(self._paged, self._table)

    def _on_host(self, cache: Cache, table: list[int]) -> KV:
        return KV(common.read(self._manager, cache), table)

    def _after(self, layer: int, transfer: Callable[[], object]) -> None:
        while self._prefill.recv() != ("finished", layer):
            pass
        began = time.perf_counter()
        transfer()
        self.waited = time.perf_counter() - began

    def clear(self) -> None:
        """Leave nothing in the caches that could be taken for the next prompt's."""
        for cache in (self._row, self._paged):
            nothing = [np.full(cache.cache_desc.shape, np.nan, np.float16) for _ in range(cache.cache_desc.num_tensors)]
            common.write(self._manager, cache, nothing)


class Result(NamedTuple):
    """One generation. Times are in s."""

    first_token: float
    waited: float
    verified: int  # bytes of KV cache
    tokens: list[int]


def decode(prefill: Connection, sizes: Sizes) -> None:
    """Generate in each way, and compare with what this process generates alone."""
    model = Model(sizes.layers)
    engine = common.start_engine(LLMRole.DECODER, DECODE, mem_pool_cfg=POOL)
    cluster = common.link(engine, PREFILL, prefill.recv())
    fetcher = Fetcher(engine.cache_manager, sizes, prefill)
    ways = {
        "whole": ("whole", fetcher.whole),
        "by blocks": ("paged", fetcher.by_blocks),
        "by layers, pulled": ("paged", fetcher.by_layers),
        "by layers, pushed": ("pushed", fetcher.pushed),
    }
    prompts = [[int(token) for token in np.random.default_rng(n).integers(VOCABULARY, size=sizes.prompt)] for n in range(REPEATS)]
    wanted = [alone(model, sizes, prompt) for prompt in prompts]
    table = {"one process": wanted}
    for way, (kind, fetch) in ways.items():
        table[way] = []
        for prompt in prompts:
            fetcher.clear()
            began = time.perf_counter()
            prefill.send((kind, prompt))
            kv = fetch()
            verify = partial(verified, way, kv, len(prompt) - 1, prefill.recv)
            table[way].append(go_on(model, sizes, prompt, kv, began, fetcher.waited, verify))
    engine.unlink_clusters([cluster], timeout=5000)
    prefill.send(None)  # there are no more requests
    engine.finalize()
    good = {way: [a.tokens == b.tokens for a, b in zip(results, wanted)].count(True) for way, results in table.items()}
    show(table, good)
    for way in ways:
        print(f"{way}: {sum(result.verified for result in table[way]):,} bytes verified")
    print(f"the first prompt goes on with {' '.join(map(str, wanted[0].tokens[:8]))} ...")
    if set(good.values()) != {REPEATS} or len({tuple(result.tokens) for result in wanted}) != REPEATS:
        sys.exit("the tokens are not those of one process")


def alone(model: Model, sizes: Sizes, prompt: list[int]) -> Result:
    """Prefill and generate in this process."""
    kv = KV(common.zeros(sizes.row()), [0])
    began = time.perf_counter()
    model.forward(prompt[:-1], 0, kv)
    return go_on(model, sizes, prompt, kv, began)


def verified(way: str, kv: KV, tokens: int, computed: Callable[[], str]) -> int:
    """Compare what lies in a KV cache with the digest of what was computed, and return its bytes or end the process."""
    content = kv.content(tokens)
    if digest(content) != computed():
        sys.exit(f"{way}: WRONG, the KV cache is not the one that was computed")
    return len(content)


def go_on(
    model: Model,
    sizes: Sizes,
    prompt: list[int],
    kv: KV,
    began: float,
    waited: float = 0.0,
    verify: Callable[[], int] = lambda: 0,
) -> Result:
    """Generate after a prompt whose KV cache is there, all but its last token's. It is verified when the first token is timed."""
    last = len(prompt) - 1
    tokens = model.generate(prompt[-1], last, kv, 1)
    first = time.perf_counter() - began
    verified_bytes = verify()  # of the prompt; the first token has written behind it
    return Result(first, waited, verified_bytes, tokens + model.generate(tokens[0], last + 1, kv, sizes.generate - 1))


def show(table: dict[str, list[Result]], good: dict[str, int]) -> None:
    print("KV cache             first token   waited for KV   tokens")
    print("-----------------   ------------   -------------   --------------")
    for way, results in table.items():
        best = min(results)
        waited = f"{best.waited * 1e3:.2f} ms" if best.waited else "-"
        verdict = "as one process" if good[way] == REPEATS else "WRONG"
        print(f"{way:17}   {best.first_token * 1e3:9.1f} ms   {waited:>13}   {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate with prefill and decode in two processes.")
    for name, default in (("layers", 8), ("prompt", 512), ("generate", 16)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"({default})")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # for numpy in both processes, which compute by turns on few cores
    common.run(prefill, decode, Sizes(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
