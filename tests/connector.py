# SPDX-License-Identifier: Apache-2.0
"""A connector as serving frameworks write one: a prefill worker and a decode worker, and plain sockets with JSON between them.

Each worker registers its KV tensors layer by layer in groups, which have a model id each, with fewer or more blocks than the
other worker. The decode worker serves requests in a pool of threads: it has a request prefilled, pulls its blocks, compares every
byte and lets them go. What fails with a code that may be retried is pulled again; what is lost is linked and prefilled again.

The content of a request's blocks depends on the request, the tensor, the place and the incarnation of the prefill worker.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import socket
import socketserver
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Callable

import numpy as np

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    DataType,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
)
from peers import ramp, wait_until

PREFILL, DECODE = 0xF000_0000_0000_0001, 2  # cluster ids; one needs all 64 bits
THREADS = 8
PULL_MILLIS = 1000
LINK_MILLIS = 5000

# After these a client calls again; after the others in LOST it has to link first.
RETRYABLE = {
    LLMStatusCode.LLM_REPEAT_REQUEST,
    LLMStatusCode.LLM_CLUSTER_NUM_EXCEED_LIMIT,
    LLMStatusCode.LLM_PROCESSING_LINK,
    LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY,
    LLMStatusCode.LLM_TIMEOUT,
    LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT,
    LLMStatusCode.LLM_LINK_BUSY,
}
LOST = {LLMStatusCode.LLM_NOT_YET_LINK, LLMStatusCode.LLM_FAILED}


@dataclass(frozen=True)
class Group:
    """Layers whose KV cache has one form."""

    model_id: int
    layers: int
    per_layer: int  # tensors
    block: tuple[int, ...]  # shape
    data_type: DataType
    dtype: str  # the name that numpy and torch have for it
    counts: dict[LLMRole, int]  # of blocks

    @property
    def tensors(self) -> int:
        return self.layers * self.per_layer

    def content(self, request: int, incarnation: int, tensor: int, blocks: int) -> np.ndarray:
        """Return the bytes of a request's blocks of one tensor, [blocks, bytes of a block]."""
        size = int(np.prod(self.block)) * np.dtype(self.dtype).itemsize
        return ramp(incarnation << 12 | request, self.model_id << 6 | tensor, blocks * size).reshape(blocks, size)


GROUPS = (
    Group(0, 4, 2, (16, 2, 32), DataType.DT_FLOAT16, "float16", {LLMRole.PROMPT: 192, LLMRole.DECODER: 128}),
    Group(1, 2, 1, (16, 144), DataType.DT_UINT8, "uint8", {LLMRole.PROMPT: 96, LLMRole.DECODER: 160}),
)
LARGEST = {0: 24, 1: 12}  # blocks of a request; THREADS times as many are there at the prefill worker


@dataclass(frozen=True)
class Request:
    """What one request needs: blocks of each group, and whether it is pulled layer by layer."""

    number: int
    blocks: tuple[int, ...]
    by_layers: bool


def requests(count: int, seed: int) -> list[Request]:
    sizes = random.Random(seed)
    return [
        Request(number, tuple(sizes.randint(1, LARGEST[group.model_id]) for group in GROUPS), sizes.random() < 0.2)
        for number in range(count)
    ]


class Layers:
    """The registered tensors of one group, and which of its blocks are free."""

    def __init__(self, group: Group, role: LLMRole) -> None:
        self._free = list(range(group.counts[role]))
        random.Random(group.model_id).shuffle(self._free)
        self._changed = threading.Condition()
        shape = (group.counts[role], *group.block)
        if importlib.util.find_spec("torch"):
            import torch

            self._tensors = [torch.zeros(shape, dtype=getattr(torch, group.dtype)) for _ in range(group.tensors)]
            self.addresses = [tensor.data_ptr() for tensor in self._tensors]
            views = [tensor.view(torch.uint8).numpy() for tensor in self._tensors]
        else:
            views = self._tensors = [np.zeros(shape, group.dtype) for _ in range(group.tensors)]
            self.addresses = [tensor.ctypes.data for tensor in self._tensors]
        self.desc = CacheDesc(num_tensors=group.tensors, shape=self._tensors[0].shape, data_type=group.data_type)
        self.bytes = [view.view(np.uint8).reshape(shape[0], -1) for view in views]

    def take(self, count: int) -> list[int]:
        """Return blocks that are the caller's until it gives them back; wait where there are not enough."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._free) >= count)
            taken, self._free = self._free[:count], self._free[count:]
            return taken

    def give_back(self, blocks: Sequence[int]) -> None:
        with self._changed:
            self._free.extend(blocks)
            self._changed.notify_all()


class PrefillWorker:
    """Fills blocks for requests and says where they are."""

    def __init__(self, address: str, port: int, incarnation: int, one_sided: bool) -> None:
        """Listen at "ip:port" for the engine's peers, and at port for metadata; 0 means any."""
        config = LLMConfig()
        config.device_id = 0
        config.enable_switch_role = True
        config.ge_options["llm.EnableCacheManager"] = "1"
        config.ge_options["llm.EnableRemoteCacheAccessible"] = "1" if one_sided else "0"
        config.ge_options["llm.listenIpInfo"] = address
        self._engine = LLMDataDist(LLMRole.PROMPT, PREFILL)
        self._engine.init(config.generate_options())
        self._incarnation = incarnation
        self._held: dict[int, list[list[int]]] = {}
        self._layers = [Layers(group, LLMRole.PROMPT) for group in GROUPS]
        for group, layers in zip(GROUPS, self._layers):
            key = BlocksCacheKey(PREFILL, model_id=group.model_id)
            self._engine.cache_manager.register_blocks_cache(layers.desc, layers.addresses, key, True)
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.answer = self._answer
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def where(self) -> tuple[str, int]:
        """Return the address of the engine and the port for metadata."""
        address = self._engine.listen_address
        assert address is not None
        return address, self._server.server_address[1]

    def _answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        number = asked["request"]
        for layers, blocks in zip(self._layers, self._held.pop(number, [])):  # of an attempt that was given up
            layers.give_back(blocks)
        if asked["what"] == "done":
            return {}
        taken = self._held[number] = [layers.take(count) for layers, count in zip(self._layers, asked["blocks"])]
        for group, layers, blocks in zip(GROUPS, self._layers, taken):
            for tensor, content in enumerate(layers.bytes):
                content[blocks] = group.content(number, self._incarnation, tensor, len(blocks))
        return {"blocks": taken, "incarnation": self._incarnation}

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._engine.finalize()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    answer: Callable[[dict[str, Any]], dict[str, Any]]


class _Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            assert isinstance(self.server, _Server)
            self.wfile.write(json.dumps(self.server.answer(json.loads(line))).encode() + b"\n")


class _Metadata:
    """A connection to the prefill worker, for one thread."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket: socket.socket | None = None
        self._answers: Any = None

    def ask(self, **what: Any) -> dict[str, Any]:
        """Return the answer. ConnectionError where the prefill worker is gone; the next call waits for its successor."""
        if self._socket is None:
            self._socket = wait_until(self._connected, "a prefill worker listens")
            self._answers = self._socket.makefile("rb")
        self._socket.sendall(json.dumps(what).encode() + b"\n")
        line = self._answers.readline()
        if not line:
            raise ConnectionResetError("the prefill worker is gone")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _connected(self) -> socket.socket | None:
        try:
            return socket.create_connection(("127.0.0.1", self._port))
        except ConnectionError:
            return None

    def close(self) -> None:
        if self._socket is not None:
            self._answers.close()
            self._socket.close()
            self._socket = None


class DecodeWorker:
    """Serves requests: each thread of its pool takes the next one, until its bytes are there and right."""

    def __init__(
        self, address: str, port: int, one_sided: bool, transport: str, record: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        """record is called with each pull."""
        self._engine = LLMDataDist(LLMRole.DECODER, DECODE)
        options = {
            "ge.exec.deviceId": "0",
            "llm.EnableCacheManager": "1",
            "llm.SyncKvCacheWaitTime": str(PULL_MILLIS),
            "open.Transport": transport,
        }
        if one_sided:
            options["llm.EnableRemoteCacheAccessible"] = "1"
        self._engine.init(options)
        self._port, self._record = port, record
        self._cluster = LLMClusterInfo()
        self._cluster.remote_cluster_id = PREFILL
        self._cluster.append_local_ip_info("127.0.0.1", 0)
        ip, engine_port = address.split(":")
        self._cluster.append_remote_ip_info(ip, int(engine_port))
        self._layers = [Layers(group, LLMRole.DECODER) for group in GROUPS]
        manager = self._engine.cache_manager
        self._caches = [manager.register_blocks_cache(each.desc, each.addresses, None, True) for each in self._layers]
        self._link_lock = threading.Lock()  # guards the two that follow: one thread links, the others wait
        assert self._link() is LLMStatusCode.LLM_SUCCESS
        self.links = 1
        self._count_lock = threading.Lock()  # guards those that follow
        self.ends: Counter[LLMStatusCode] = Counter()  # of pulls
        self.served: Counter[int] = Counter()  # requests, by the incarnation that filled them
        self.unanswered = 0  # requests whose prefill worker was gone before it had answered
        self._threads = itertools.count()
        self._mine = threading.local()  # thread: its number; metadata: its connection
        self._connections: list[_Metadata] = []

    @property
    def finished(self) -> int:
        return sum(self.served.values())

    def serve_all(self, wanted: Sequence[Request]) -> None:
        """Serve requests in THREADS threads."""
        with ThreadPoolExecutor(THREADS, initializer=self._start_thread) as pool:
            list(pool.map(self._serve, wanted))
            for metadata in self._connections:
                metadata.close()

    def _start_thread(self) -> None:
        with self._count_lock:
            self._mine.thread = next(self._threads)
            self._mine.metadata = _Metadata(self._port)
            self._connections.append(self._mine.metadata)

    def _serve(self, request: Request) -> None:
        taken = [layers.take(count) for layers, count in zip(self._layers, request.blocks)]
        try:
            while not self._attempt(request, taken):
                pass
        finally:
            for layers, blocks in zip(self._layers, taken):
                layers.give_back(blocks)

    def _attempt(self, request: Request, taken: list[list[int]]) -> bool:
        """Have a request prefilled and pull it. False: the prefill worker was lost, its successor has to begin again."""
        links = self.links
        try:
            told = self._mine.metadata.ask(what="prefill", request=request.number, blocks=request.blocks)
            for group, src, dst in zip(GROUPS, told["blocks"], taken):
                self._pull_group(group, src, dst, told["incarnation"], request.by_layers)
                self._check(group, request.number, told["incarnation"], dst)
            self._mine.metadata.ask(what="done", request=request.number)
        except ConnectionError:
            self._mine.metadata.close()
            with self._count_lock:
                self.unanswered += 1
            return False
        except LLMException as exe:
            if exe.status_code not in LOST:
                raise
            self._link_again(links)
            return False
        with self._count_lock:
            self.served[told["incarnation"]] += 1
        return True

    def _pull_group(self, group: Group, src: list[int], dst: list[int], incarnation: int, by_layers: bool) -> None:
        for layer in range(group.layers) if by_layers else [None]:
            while True:
                code = self._pull(group, src, dst, layer)
                if self._record is not None:
                    fields = {"group": group.model_id, "layer": layer, "src": src, "dst": dst, "code": code.name}
                    self._record({"thread": self._mine.thread, "incarnation": incarnation, **fields})
                if code not in RETRYABLE:
                    break
            if code is not LLMStatusCode.LLM_SUCCESS:
                raise LLMException("lost", status_code=code)

    def _pull(self, group: Group, src: list[int], dst: list[int], layer: int | None) -> LLMStatusCode:
        ranges = {} if layer is None else dict.fromkeys(("src_layer_range", "dst_layer_range"), range(layer, layer + 1))
        key = BlocksCacheKey(prompt_cluster_id=PREFILL, model_id=group.model_id)
        try:
            self._engine.cache_manager.pull_blocks(
                key, self._caches[group.model_id], src, dst, tensor_num_per_layer=group.per_layer, **ranges
            )
            code = LLMStatusCode.LLM_SUCCESS
        except LLMException as exe:
            code = exe.status_code
        with self._count_lock:
            self.ends[code] += 1
        return code

    def _check(self, group: Group, request: int, incarnation: int, dst: list[int]) -> None:
        for tensor, content in enumerate(self._layers[group.model_id].bytes):
            wanted = group.content(request, incarnation, tensor, len(dst))
            assert np.array_equal(content[dst], wanted), f"request {request}: wrong bytes in tensor {tensor} of {group}"

    def _link(self) -> LLMStatusCode:
        return self._engine.link_clusters([self._cluster], LINK_MILLIS)[0]

    def _link_again(self, links: int) -> None:
        """Take down the lost link, naming its id only, and make a new one, unless another thread has.

        Where that fails, the next attempt waits for the prefill worker's answer and comes here again.
        """
        with self._link_lock:
            if self.links != links:
                return
            only_id = LLMClusterInfo()
            only_id.remote_cluster_id = PREFILL
            codes = self._engine.unlink_clusters([only_id], LINK_MILLIS, force=True)
            assert codes == (LLMStatusCode.LLM_SUCCESS, [LLMStatusCode.LLM_SUCCESS])
            if self._link() is LLMStatusCode.LLM_SUCCESS:
                self.links += 1

    def close(self) -> None:
        for cache in self._caches:
            self._engine.cache_manager.unregister_cache(cache.cache_id)
        self._engine.finalize()
