# SPDX-License-Identifier: Apache-2.0
"""Ends of a transfer: one in the test's own process, others in processes of their own.

An :class:`End` is an LLMDataDist with caches that have names and a known content. A :class:`Peer` is an End in another
process and has the same methods; it can also be killed, stopped and continued, and a call on it can be left running.

The content is :func:`pattern`: bytes that depend on the number of the cache, on the tensor and on the place in it, so that
a byte from anywhere else is seen.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

import numpy as np

from llm_datadist import (
    Cache,
    CacheDesc,
    DataType,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Placement,
    _native,
)

SUBJECT = Path(__file__).resolve()
ANSWER_SECONDS = 60.0  # no answer of a peer is expected to take a tenth of it, on any machine
POOL = '{"memory_size": 16777216}'
ADDRESS = "127.0.0.1:0"
SOURCE, TARGET = 1, 50  # numbers of the patterns of what is read and of what is written
_DISTINCT = 256


def pattern(number: int, tensor: int, size: int) -> np.ndarray:
    """Return the bytes of a tensor of cache number; up to 256 of them all differ."""
    rng = np.random.default_rng((number, tensor))
    if size <= _DISTINCT:
        return rng.permutation(_DISTINCT)[:size].astype(np.uint8)
    return np.frombuffer(rng.bytes(size), np.uint8).copy()


def is_pattern(view: np.ndarray, number: int, tensor: int = 0) -> bool:
    """Tell whether bytes are all those of a tensor of cache number."""
    return np.array_equal(view, pattern(number, tensor, view.size))


def ramp(number: int, tensor: int, size: int) -> np.ndarray:
    """As pattern, but quick for hundreds of MiB: words that count, from a number of their own, to a size that is whole words."""
    return np.arange(size >> 3, dtype=np.uint64).__iadd__(np.uint64((number << 8 | tensor) << 40)).view(np.uint8)


def desc(shape: Any, tensors: int = 1, dtype: DataType = DataType.DT_INT8, placement: Placement = Placement.DEVICE) -> CacheDesc:
    return CacheDesc(tensors, list(shape), dtype, placement)


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def options(listen: str | None = None, one_sided: bool = False, **settings: Any) -> dict[str, str]:
    """Return options for init; settings are properties of LLMConfig, None leaves one out."""
    config = LLMConfig()
    values = {
        "device_id": 0,
        "enable_cache_manager": True,
        "enable_remote_cache_accessible": one_sided,
        "mem_pool_cfg": POOL,
        "host_mem_pool_cfg": POOL,
        "sync_kv_timeout": 10_000,
        "listen_ip_info": listen,
        **settings,
    }
    for name, value in values.items():
        if value is not None:
            setattr(config, name, value)
    return dict(config.generate_options())


def cluster(address: str, cluster_id: int | None, local: str | None = "127.0.0.1") -> LLMClusterInfo:
    """Return the info of the engine at "ip:port"; a cluster id of None is never set."""
    info = LLMClusterInfo()
    if cluster_id is not None:
        info.remote_cluster_id = cluster_id
    if local is not None:
        info.append_local_ip_info(local, 0)
    ip, port = address.split(":")
    info.append_remote_ip_info(ip, int(port))
    return info


def refused(
    call: Callable[..., Any],
    *args: Any,
    error: type[Exception] = LLMException,
    code: LLMStatusCode = LLMStatusCode.LLM_PARAM_INVALID,
    **kwargs: Any,
) -> Any:
    """Return the error that a call has to raise: one of just this class, and with this code where it is an LLMException."""
    try:  # without pytest, which a peer would have to load
        call(*args, **kwargs)
    except error as failure:
        assert type(failure) is error
        if error is LLMException:
            assert failure.status_code is code, failure
        return failure
    raise AssertionError(f"{call} was not refused")


class End:
    """An LLMDataDist and its caches by name."""

    def __init__(self) -> None:
        self.engine: Any = None
        self.caches: dict[str, Any] = {}
        self.memory: dict[str, list[np.ndarray]] = {}  # of registered caches, which the caller keeps alive

    # --- the engine

    def open(
        self,
        cluster_id: int,
        role: LLMRole = LLMRole.MIX,
        listen: str | None = ADDRESS,
        raw: dict[str, str] | None = None,
        **settings: Any,
    ) -> str | None:
        """Initialise an engine and return its listen address. raw is an options dict to take instead of settings."""
        self.engine = LLMDataDist(role, cluster_id)
        self.engine.init(options(listen, **settings) if raw is None else raw)
        address: str | None = self.engine.listen_address
        return address

    def close(self) -> None:
        """Finalize the engine and forget its caches."""
        if self.engine is not None:
            self.engine.finalize()
        self.engine = None
        self.caches.clear()
        self.memory.clear()

    def ask(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the LLMDataDist, or read a property of it."""
        value = getattr(self.engine, name)
        return value(*args, **kwargs) if callable(value) else value

    def link(self, address: str, cluster_id: int | None, timeout: int = 10_000) -> Any:
        """Link to one engine and return its code."""
        return self.engine.link_clusters([cluster(address, cluster_id)], timeout)[1][0]

    def told(self, cluster_id: int) -> dict[str, str]:
        """Return what explain says of a cluster, by the first words of its lines."""
        return dict(line.split(": ", 1) for line in self.engine.explain(cluster_id).splitlines())

    def unlink(self, cluster_id: int, address: str | None = None, timeout: int = 10_000) -> Any:
        """Unlink one engine, by force where it is not to be asked, and return the code."""
        info = cluster(address or ADDRESS, cluster_id)
        return self.engine.unlink_clusters([info], timeout, address is None)[1][0]

    # --- caches

    @property
    def manager(self) -> Any:
        return self.engine.cache_manager

    def add(
        self,
        name: str,
        description: CacheDesc,
        number: int,
        keys: Any = (),
        *,
        blocks: bool = False,
        owned: bool = False,
        accessible: bool | None = None,
        content: Callable[[int, int, int], np.ndarray] = pattern,
    ) -> int:
        """Allocate a cache (owned) or register memory as one, with the pattern of number, and return its id."""
        if not owned:
            memory = [content(number, tensor, description.size) for tensor in range(description.num_tensors)]
            return self.lend(name, description, memory, keys, blocks=blocks, accessible=accessible)
        allocate = self.manager.allocate_blocks_cache if blocks else self.manager.allocate_cache
        cache = self.caches[name] = allocate(description, keys or None if blocks else keys)
        self.fill(name, number, content)
        return int(cache.cache_id)

    def lend(
        self,
        name: str,
        description: CacheDesc,
        memory: list[np.ndarray],
        keys: Any = (),
        *,
        blocks: bool = False,
        accessible: bool | None = None,
    ) -> int:
        """Register arrays as a cache, keep them, and return its id."""
        register = self.manager.register_blocks_cache if blocks else self.manager.register_cache
        addrs = [each.ctypes.data for each in memory]
        cache = self.caches[name] = register(description, addrs, keys or None if blocks else keys, accessible)
        self.memory[name] = memory
        return int(cache.cache_id)

    def fill(self, name: str, number: int, content: Callable[[int, int, int], np.ndarray] = pattern) -> None:
        """Write the pattern of number into a cache."""
        for tensor, view in enumerate(self.tensors(name)):
            view[:] = content(number, tensor, view.size)

    def tensors(self, name: str) -> list[np.ndarray]:
        """Return the bytes of each tensor, not copied."""
        cache = self.caches[name]
        return [memory_at(addr, cache.cache_desc.size) for addr in cache.tensor_addrs]

    def content(self, name: str) -> list[np.ndarray]:
        """Return a copy of the bytes of each tensor."""
        return [view.copy() for view in self.tensors(name)]

    def checksum(self, name: str) -> int:
        """Return a number that changes when a byte of a cache does."""
        value = 0
        for view in self.tensors(name):
            value = zlib.crc32(view, value)
        return value

    def manage(self, call: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the CacheManager; strings that name caches stand for them."""
        given = [self.caches.get(arg, arg) if isinstance(arg, str) else arg for arg in args]
        result = getattr(self.manager, call)(*given, **kwargs)
        return result.cache_id if isinstance(result, Cache) else result

    def drop(self, name: str) -> None:
        """Unregister a cache, or deallocate it where it is owned."""
        cache = self.caches.pop(name)
        if name in self.memory:
            self.manager.unregister_cache(cache.cache_id)
            del self.memory[name]
        elif cache.is_blocks_cache:
            self.manager.deallocate_blocks_cache(cache)
        else:
            self.manager.deallocate_cache(cache)

    # --- for the checks of a process

    def held(self) -> int:
        return _native.held()

    def run(self, code: str, **names: Any) -> Any:
        """Execute statements with this End as end, and return what they call result."""
        scope: dict[str, Any] = {"end": self, "result": None, **names}
        exec(code, scope)
        return scope["result"]


def memory_at(addr: int, size: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * size).from_address(addr), np.uint8)


class Call:
    """A call on a peer that is under way."""

    def __init__(self, peer: Peer, what: str) -> None:
        self._peer, self._what = peer, what

    def ended(self) -> bool:
        """Tell whether there is an answer; for one call at a time."""
        return bool(select.select([self._peer._answers], [], [], 0)[0])

    def result(self, seconds: float = ANSWER_SECONDS) -> Any:
        """Return what the call returned, or raise what it raised."""
        kind, value = self._peer._answer(self._what, seconds)
        if kind == "raised":
            raise value
        return value


def moved(end: End | Peer, name: str, moves: dict[int, np.ndarray], tensor: int = 0, number: int = TARGET) -> None:
    """Check a tensor: where moves say so (start -> bytes) it is new, everywhere else it has the pattern of number."""
    got = end.content(name)[tensor]
    wanted = pattern(number, tensor, got.size)
    for start, new in moves.items():
        wanted[start : start + len(new)] = new
    assert np.array_equal(got, wanted)


class Peer:
    """An End in a process of its own: any method of End, and what can be done to a process."""

    def __init__(self, env: dict[str, str] | None = None, *, under: Sequence[str] = ()) -> None:
        """Start the process, by way of the command under where one is given."""
        answers, give = os.pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by kill
        try:
            self.process = subprocess.Popen(
                [*under, sys.executable, str(SUBJECT), str(give)],
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                pass_fds=[give],
                env={**os.environ, **(env or {})},
            )
        finally:
            os.close(give)
        self._answers = os.fdopen(answers, "rb", buffering=0)
        self._pending = b""

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *failure: Any) -> None:
        try:
            if failure[0] is None and self.process.poll() is None:
                self.leave()
        finally:
            self.kill()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.begin(name, *args, **kwargs).result()

    def begin(self, name: str, *args: Any, **kwargs: Any) -> Call:
        """Start a call and don't wait for it."""
        assert self.process.stdin is not None
        try:
            pickle.dump((name, args, kwargs), self.process.stdin)
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._lost(f"{name}: the peer is gone") from None
        return Call(self, name)

    def leave(self) -> None:
        """Finalize, and check that the engine has kept nothing."""
        assert self.begin("close").result() is None
        assert self.begin("held").result() == 0, "the peer's engine has kept something"
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            code = self.process.wait(ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            raise self._lost("the peer does not end") from None
        if code != 0:
            raise self._lost(f"the peer ended with {code}")

    def kill(self) -> None:
        """End the process with SIGKILL, whatever it is doing, and wait until it is gone."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self._answers, self._log):
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    @contextlib.contextmanager
    def stopped(self) -> Any:
        """Stop the process, and continue it at the end."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    @contextlib.contextmanager
    def watched(self, name: str) -> Any:
        """Yield a function that reads the byte at a place of a cache's first tensor while the process does something else."""
        addr = self.run("result = end.caches[cache].tensor_addrs[0]", cache=name)
        with open(f"/proc/{self.process.pid}/mem", "rb", buffering=0) as memory:
            yield lambda at: os.pread(memory.fileno(), 1, addr + at)[0]

    def _answer(self, what: str, seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(EOFError, pickle.UnpicklingError):
                size = int.from_bytes(self._pending[:8], "little")
                if len(self._pending) >= 8 + size > 8:
                    answer, self._pending = self._pending[8 : 8 + size], self._pending[8 + size :]
                    return pickle.loads(answer)
            ready, _, _ = select.select([self._answers], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                raise self._lost(f"{what}: no answer in {seconds} s")
            chunk = self._answers.read(1 << 20)
            if not chunk:
                self.process.wait()
                raise self._lost(f"{what}: the peer ended with {self.process.returncode}")
            self._pending += chunk

    def written(self) -> str:
        """Return what the process has written to standard output and standard error, its log too."""
        return os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0).decode(errors="replace")

    def _lost(self, what: str) -> AssertionError:
        return AssertionError(f"{what}; it has written:\n{self.written()}")


def wait_until(condition: Callable[[], Any], what: str, seconds: float = ANSWER_SECONDS) -> Any:
    """Return condition() as soon as it is true."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {seconds} s until {what}"
        time.sleep(0.002)


class Background:
    """A call in a thread of this process."""

    def __init__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self.began = time.monotonic()
        self.seconds = 0.0
        self._result: tuple[Any, BaseException | None] = (None, None)
        self._thread = threading.Thread(target=self._run, args=(call, args, kwargs))
        self._thread.start()

    def _run(self, call: Callable[..., Any], args: Any, kwargs: Any) -> None:
        try:
            self._result = call(*args, **kwargs), None
        except BaseException as exc:
            self._result = None, exc
        self.seconds = time.monotonic() - self.began

    @classmethod
    def until_it_fails(cls, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Background:
        """Make a call again and again, so that one is under way however short they are, and return the failure of the last."""

        def repeat() -> Any:
            while True:
                call(*args, **kwargs)

        return cls(repeat)

    def running(self) -> bool:
        return self._thread.is_alive()

    def reaches(self, view: Any, wanted: Any, at: int = 0) -> None:
        """Wait until the call has written the byte at a place, or has ended."""
        wait_until(lambda: view[at] == wanted[at] or not self.running(), "the call writes")

    def result(self, seconds: float = ANSWER_SECONDS) -> Any:
        """Return what the call returned, or raise what it raised."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"the call has not ended in {seconds} s"
        value, failure = self._result
        if failure is not None:
            raise failure
        return value


def serve(answers: Any) -> None:
    """Do what is asked on standard input until it ends."""
    end = End()
    while True:
        try:
            name, args, kwargs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = "returned", getattr(end, name)(*args, **kwargs)
        except Exception as exc:
            traceback.print_exc()
            answer = "raised", exc
        content = pickle.dumps(answer)
        answers.write(len(content).to_bytes(8, "little") + content)
        answers.flush()


if __name__ == "__main__":
    # What is pickled by the test names this module: there is to be one of it.
    import peers

    with open(int(sys.argv[1]), "wb") as _answers:
        peers.serve(_answers)
