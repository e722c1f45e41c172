# SPDX-License-Identifier: Apache-2.0
"""The C face of the vendor's library by way of ctypes, and one process that works with it.

A :class:`Side` is a native object with caches that have names and a known content. A :class:`RemoteSide` is a Side in
another process and has the same methods.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from ctypes import POINTER, byref, c_char, c_char_p, c_int32, c_int64, c_uint16, c_uint32, c_uint64
from typing import Any

import numpy as np

from peers import Call, Peer, pattern

FACE, LIBRARY, RUNTIME = 1, 2, 3  # who refused a call
NOT_LOADED, CANNOT_LOAD, MISSING_SYMBOL, WRONG_ABI, UNKNOWN_OBJECT, BAD_ARGUMENT = range(1, 7)
MIX = 3
ON_HOST, ON_DEVICE = 0, 1
HOST_TO_HOST, HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE = range(4)
DT_INT8 = 2
DEVICE = 0
IP = b"127.0.0.1"


class Error(ctypes.Structure):
    _fields_ = [("code", c_int64), ("text", c_char * 1016)]


class Move(ctypes.Structure):
    _fields_ = [("dst", c_uint64), ("dst_bytes", c_uint64), ("src", c_uint64), ("bytes", c_uint64)]


class Cluster(ctypes.Structure):
    _fields_ = [
        ("cluster_id", c_uint64),
        ("local_ip", c_char * 46),
        ("remote_ip", c_char * 46),
        ("local_port", c_uint16),
        ("remote_port", c_uint16),
    ]


class Description(ctypes.Structure):
    _fields_ = [
        ("placement", c_uint32),
        ("num_tensors", c_uint32),
        ("data_type", c_int32),
        ("rank", c_uint32),
        ("shape", c_int64 * 32),
    ]


class Transfer(ctypes.Structure):
    _fields_ = [
        ("cluster_id", c_uint64),
        ("remote_cache", c_int64),
        ("local_cache", c_int64),
        ("remote_batch", c_uint32),
        ("local_batch", c_uint32),
        ("bytes", c_int64),
        ("src_first_layer", c_int32),
        ("src_last_layer", c_int32),
        ("dst_first_layer", c_int32),
        ("dst_last_layer", c_int32),
        ("tensors_per_layer", c_uint32),
        ("local_placement", c_uint32),
        ("local_tensors", c_uint32),
        ("zero", c_uint32),
    ]


# What each function takes before the error.
_BLOCKS = [POINTER(c_uint64), c_uint64]
_LINKING = [c_int64, POINTER(Cluster), c_uint64, c_int32]
FUNCTIONS: dict[str, list[Any]] = {
    "load": [c_char_p],
    "loaded": [c_char_p, c_uint64],
    "device_count": [POINTER(c_uint32)],
    "device_reset": [c_int32],
    "malloc": [c_int32, c_uint64, c_int32, POINTER(c_uint64)],
    "free": [c_int32, c_uint64],
    "malloc_host": [c_int32, c_uint64, POINTER(c_uint64)],
    "free_host": [c_int32, c_uint64],
    "copy": [c_int32, c_int32, POINTER(Move), c_uint64],
    "create": [c_uint64, c_int32, c_int32, POINTER(c_int64)],
    "initialize": [c_int64, c_char_p, c_uint64],
    "finalize": [c_int64],
    "destroy": [c_int64],
    "set_role": [c_int64, c_int32, c_char_p, c_uint64],
    "link": [*_LINKING, POINTER(c_uint32)],
    "unlink": [*_LINKING, c_int32, POINTER(c_uint32)],
    "register": [c_int64, POINTER(Description), *_BLOCKS, POINTER(c_int64)],
    "unregister": [c_int64, c_int64],
    "pull_cache": [c_int64, POINTER(Transfer)],
    "pull_blocks": [c_int64, POINTER(Transfer), *_BLOCKS, *_BLOCKS],
    "push_cache": [c_int64, POINTER(Transfer)],
    "push_blocks": [c_int64, POINTER(Transfer), *_BLOCKS, *_BLOCKS],
    "allocate_cache": [c_int64, POINTER(Description), POINTER(c_int64), *_BLOCKS, POINTER(c_uint64)],
    "deallocate_cache": [c_int64, c_int64],
    "copy_cache": [c_int64, c_int64, c_int64, c_uint32, c_uint32, c_uint64, c_int64],
    "copy_blocks": [c_int64, c_int64, c_int64, *_BLOCKS, *_BLOCKS],
}


class Refused(Exception):
    """A call that has not succeeded: who refused it, with which number and text."""

    def __init__(self, who: int, code: int, text: str) -> None:
        super().__init__(who, code, text)
        self.who, self.code, self.text = who, code, text


class Face:
    """libcann_face.so in this process; each function of it without its prefix, raising Refused."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        self._library.cann_status_name.restype = c_char_p
        self._library.cann_status_name.argtypes = [c_uint32]
        for name, types in FUNCTIONS.items():
            getattr(self._library, "cann_" + name).argtypes = [*types, POINTER(Error)]

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, "cann_" + name)

        def call(*args: Any) -> None:
            error = Error()
            who = function(*args, byref(error))
            if who:
                raise Refused(who, error.code, error.text.decode())

        return call

    def status_name(self, status: int) -> str:
        name: bytes = self._library.cann_status_name(status)
        return name.decode()


def packed(options: dict[str, Any]) -> tuple[bytes, int]:
    text = b"".join(f"{key}\0{value}\0".encode() for key, value in options.items())
    return text, len(text)


def words(numbers: Sequence[int]) -> tuple[Any, int]:
    return (c_uint64 * len(numbers))(*numbers), len(numbers)


class Side:
    """One native object, where ``face`` has loaded the libraries, and the memory that it works on."""

    def __init__(self, face: str, folder: str | None = None) -> None:
        self.face = Face(face)
        self.face.load(folder.encode() if folder is not None else None)
        self.object = 0
        self.ids: dict[str, int] = {}
        self.memory: dict[str, tuple[int, int, list[int]]] = {}  # by name: placement, bytes of a tensor, addresses

    # --- memory

    def malloc(self, placement: int, size: int) -> int:
        address = c_uint64()
        if placement == ON_DEVICE:
            self.face.malloc(DEVICE, size, 0, byref(address))
        else:
            self.face.malloc_host(DEVICE, size, byref(address))
        return address.value

    def free(self, placement: int, address: int) -> None:
        (self.face.free if placement == ON_DEVICE else self.face.free_host)(DEVICE, address)

    def copy(self, kind: int, dst: int, src: int, size: int, room: int | None = None) -> None:
        self.face.copy(DEVICE, kind, byref(Move(dst, size if room is None else room, src, size)), 1)

    def write(self, placement: int, address: int, content: np.ndarray) -> None:
        self.copy(HOST_TO_DEVICE if placement == ON_DEVICE else HOST_TO_HOST, address, content.ctypes.data, content.nbytes)

    def read(self, placement: int, address: int, size: int) -> np.ndarray:
        content = np.empty(size, np.uint8)
        self.copy(DEVICE_TO_HOST if placement == ON_DEVICE else HOST_TO_HOST, content.ctypes.data, address, size)
        return content

    # --- the object

    def create(self, cluster_id: int, role: int = MIX) -> None:
        number = c_int64()
        self.face.create(cluster_id, role, DEVICE, byref(number))
        self.object = number.value

    def initialize(self, options: dict[str, Any] | None = None) -> None:
        self.face.initialize(self.object, *packed({"llm.DeviceId": DEVICE, **(options or {})}))

    def open(self, cluster_id: int, listen: int | None = None, **options: Any) -> None:
        """Create and initialise an object, which listens where a port is given."""
        self.create(cluster_id)
        listening = {"llm.ListenIpInfo": f"127.0.0.1:{listen}"} if listen else {}
        self.initialize({**listening, **{f"llm.{name}": value for name, value in options.items()}})

    def set_role(self, role: int, **options: Any) -> None:
        self.face.set_role(self.object, role, *packed({f"llm.{name}": value for name, value in options.items()}))

    def destroy(self) -> None:
        number, self.object = self.object, 0
        self.face.destroy(number)

    def close(self) -> None:
        """Destroy the object, where there is one still, and free all memory."""
        if self.object:
            self.destroy()
        for placement, _, addresses in self.memory.values():
            for address in addresses:
                self.free(placement, address)
        self.memory.clear()
        self.ids.clear()

    def add(self, name: str, number: int, tensors: int, shape: Sequence[int], placement: int = ON_DEVICE) -> int:
        """Register memory that holds the pattern of a number, and return the cache's id."""
        size = int(np.prod(shape))
        addresses = [self.malloc(placement, size) for _ in range(tensors)]
        self.memory[name] = placement, size, addresses
        for tensor, address in enumerate(addresses):
            self.write(placement, address, pattern(number, tensor, size))
        self.ids[name] = self.register(tensors, shape, addresses, placement)
        return self.ids[name]

    def register(
        self, tensors: int, shape: Sequence[int], addresses: Sequence[int], placement: int = ON_DEVICE, dtype: int = DT_INT8
    ) -> int:
        description = Description(placement, tensors, dtype, len(shape), (c_int64 * 32)(*shape))
        cache_id = c_int64()
        self.face.register(self.object, byref(description), *words(addresses), byref(cache_id))
        return cache_id.value

    def unregister(self, name: str) -> None:
        self.face.unregister(self.object, self.ids[name])

    def content(self, name: str) -> list[np.ndarray]:
        placement, size, addresses = self.memory[name]
        return [self.read(placement, address, size) for address in addresses]

    # --- links

    def _linking(self, function: Any, cluster_id: int, port: int | None, timeout: int, *more: Any, local: bytes = IP) -> None:
        cluster = Cluster(cluster_id, local, IP if port else b"", 0, port or 0)
        status = c_uint32(1)
        try:
            function(self.object, byref(cluster), 1, timeout, *more, byref(status))
        except Refused as refused:
            assert refused.who != LIBRARY or status.value == refused.code
            raise
        assert status.value == 0

    def link(self, cluster_id: int, port: int | None, timeout: int = 10_000, local: bytes = IP) -> None:
        self._linking(self.face.link, cluster_id, port, timeout, local=local)

    def unlink(self, cluster_id: int, port: int | None = None, timeout: int = 10_000) -> None:
        """Unlink a cluster, by force where there is no port to ask at."""
        self._linking(self.face.unlink, cluster_id, port, timeout, port is None)

    # --- transfers

    def transfer(self, cluster_id: int, remote: int, name: str, **fields: Any) -> Transfer:
        transfer = Transfer(cluster_id, remote, self.ids.get(name, -1), bytes=-1, tensors_per_layer=2)
        transfer.src_first_layer = transfer.src_last_layer = transfer.dst_first_layer = transfer.dst_last_layer = -1
        if name in self.memory:
            transfer.local_placement, transfer.local_tensors = self.memory[name][0], len(self.memory[name][2])
        for field, value in fields.items():
            setattr(transfer, field, value)
        return transfer

    def pull_cache(self, cluster_id: int, remote: int, name: str, **fields: Any) -> None:
        self.face.pull_cache(self.object, byref(self.transfer(cluster_id, remote, name, **fields)))

    def push_cache(self, cluster_id: int, remote: int, name: str, **fields: Any) -> None:
        self.face.push_cache(self.object, byref(self.transfer(cluster_id, remote, name, **fields)))

    def pull_blocks(self, cluster_id: int, remote: int, name: str, src: Any, dst: Any, **fields: Any) -> None:
        self.face.pull_blocks(self.object, byref(self.transfer(cluster_id, remote, name, **fields)), *words(src), *words(dst))

    def push_blocks(self, cluster_id: int, remote: int, name: str, src: Any, dst: Any, **fields: Any) -> None:
        self.face.push_blocks(self.object, byref(self.transfer(cluster_id, remote, name, **fields)), *words(src), *words(dst))

    # --- the stand-in's own functions

    def standin(self) -> Any:
        """Return the stand-in's device runtime, which plans its failures, as it is loaded in this process."""
        paths = ctypes.create_string_buffer(4096)
        self.face.loaded(paths, len(paths))
        return ctypes.CDLL(next(line for line in paths.value.decode().splitlines() if line.endswith("libacl_rt.so")))

    def plan(self, faults: str) -> None:
        assert self.standin().standin_plan(faults.encode()) == 0, faults


here: Any = None  # the Side of this process, where it has one


def begin(face: str, folder: str | None) -> None:
    global here
    here = Side(face, folder)


class RemoteSide:
    """A Side in a process of its own."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.start(name, *args, **kwargs).result()

    def start(self, name: str, *args: Any, **kwargs: Any) -> Call:
        """Start a call and don't wait for it."""
        code = "import native_face; result = getattr(native_face.here, method)(*args, **kwargs)"
        return self.peer.begin("run", code, method=name, args=args, kwargs=kwargs)

    def run(self, code: str, **names: Any) -> Any:
        """Execute statements with the Side as side, and return what they call result."""
        return self.peer.run("import native_face; side = native_face.here\n" + code, **names)


@contextlib.contextmanager
def remote_side(face: os.PathLike[str], libraries: os.PathLike[str], **env: str) -> Iterator[RemoteSide]:
    """Start a process with a Side on the libraries of a folder."""
    with Peer({"LD_LIBRARY_PATH": str(libraries), **env}) as peer:
        peer.run("import native_face; native_face.begin(face, None)", face=str(face))
        yield RemoteSide(peer)
