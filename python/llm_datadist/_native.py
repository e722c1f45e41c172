# SPDX-License-Identifier: Apache-2.0
"""The one place that talks to the native engine: loading, calls, failures, fork, and the log.

The Go runtime comes into the process with the first engine and never leaves it. The rules of living together are kept
here: a long call is a start and a loop of bounded waits, so that Python sees signals, and whatever interrupts it waits
until the engine has let go; a forked child never calls Go; nothing of the process's own settings stays changed.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import resource
import select
import signal
import sys
import sysconfig
import threading
from array import array
from collections import deque
from typing import Any, Callable, ClassVar

from . import _options
from .status import LLMException, LLMStatusCode, code_2_status
from .utils import log

_ENVIRONMENT = "LLM_DATADIST_"  # how the engine's environment variables begin
WAIT_MILLIS = 100  # the longest time in which a signal is not seen
_RUNNING = 1
_WORD_BYTES = 8
_PULL_BYTES = 18 * _WORD_BYTES  # the parameters of PullStart
_PUSH_BYTES = 14 * _WORD_BYTES  # the parameters of PushStart

_numbers = itertools.count(1)  # of operations and engines: drawn here, so that one is known before its call starts
_load_lock = threading.Lock()  # guards _extension and _fork_is_watched
_extension: Any = None
_fork_is_watched = False
_forked = False
_table: Any = None  # the engine's descriptors, as an array of int64: three words an entry
_engines: dict[int, bool] = {}  # the handle of each that is open, and whether others may be beside it
_engines_lock = threading.Lock()  # guards _engines
_dropped: deque[int] = deque()  # handles of engines that nobody can close any more


def extension() -> Any:
    """Return the native module, loaded on first use."""
    if _forked:
        raise _dead_in_child()
    if _extension is None:
        _load()
    return _extension


def _load() -> None:
    global _extension, _fork_is_watched, _table
    with _load_lock:
        if _extension is not None:
            return
        _refuse_untested_interpreters()
        if not _fork_is_watched:  # before the load: a child that is forked in the middle of it has half a runtime
            os.register_at_fork(after_in_child=_after_fork_in_child)
            _fork_is_watched = True
        with _ProcessSettings():
            module = importlib.import_module("llm_datadist._pyext")
            module.pyext_Version()  # answers when the Go runtime has finished its own start
        if sys.version_info < (3, 10):
            _let_handlers_use_the_alternate_stack()
        _table = _words_at(module.pyext_DescriptorTable(), 3 * module.pyext_DescriptorEntries())
        _extension = module


def _words_at(address: int, count: int) -> Any:
    """Return an array of int64 that is the memory at address."""
    import ctypes

    return (ctypes.c_int64 * count).from_address(address)


def _refuse_untested_interpreters() -> None:
    """Free-threaded builds and sub-interpreters get a clear error until they are tested."""
    what = None
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        what = "a free-threaded build of Python"
    elif not _is_main_interpreter():
        what = "a sub-interpreter"
    if what is not None:
        raise LLMException(
            f"LLMDataDist.init failed, the engine does not run in {what}",
            status_code=LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
            operation="init",
            stage="check",
            cause=f"the engine does not run in {what}",
            hint="use the main interpreter of an ordinary build of CPython",
        )


def _is_main_interpreter() -> bool:
    try:
        import ctypes
    except ImportError:  # an isolated sub-interpreter before Python 3.13
        return False
    api = ctypes.pythonapi
    api.PyInterpreterState_Get.restype = ctypes.c_void_p
    api.PyInterpreterState_Main.restype = ctypes.c_void_p
    return bool(api.PyInterpreterState_Get() == api.PyInterpreterState_Main())


class _ProcessSettings:
    """Puts back what the start of the Go runtime changes in the host process.

    Go raises the soft limit of descriptors, also for the children, and takes SIGPIPE, which Python ignores.
    """

    # struct sigaction of glibc has 152 bytes; it is kept as it is and never looked into.
    _SIGACTION_BYTES = 256

    def __enter__(self) -> None:
        import ctypes

        self._errno = ctypes.get_errno
        self._files = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._action = ctypes.create_string_buffer(self._SIGACTION_BYTES)
        self._sigaction(None, self._action)

    def __exit__(self, *_: object) -> None:
        self._sigaction(self._action, None)
        resource.setrlimit(resource.RLIMIT_NOFILE, self._files)

    def _sigaction(self, new: Any, old: Any) -> None:
        if self._libc.sigaction(int(signal.SIGPIPE), new, old) != 0:
            raise OSError(self._errno(), "sigaction")


def _let_handlers_use_the_alternate_stack() -> None:
    """Make signal.signal set SA_ONSTACK, as Python itself does from 3.10 on.

    The kernel writes the frame of a handler without it onto the stack that the thread is using, and beyond its end where
    that is the small stack of a goroutine. Handlers that were there before the load have been changed by Go.
    """
    import ctypes

    class Sigaction(ctypes.Structure):
        _fields_ = [
            ("handler", ctypes.c_void_p),
            ("mask", ctypes.c_ubyte * 128),
            ("flags", ctypes.c_int),
            ("restorer", ctypes.c_void_p),
        ]

    on_stack = 0x08000000
    libc = ctypes.CDLL(None)

    def use(number: int) -> None:
        action = Sigaction()
        if libc.sigaction(number, None, ctypes.byref(action)) == 0 and not action.flags & on_stack:
            action.flags |= on_stack
            libc.sigaction(number, ctypes.byref(action), None)

    original = signal.signal

    @functools.wraps(original)
    def signal_on_stack(signalnum: Any, handler: Any) -> Any:
        old = original(signalnum, handler)
        use(int(signalnum))
        return old

    use(int(signal.SIGPIPE))  # which has been put back
    signal.signal = signal_on_stack


def _dead_in_child() -> LLMException:
    cause = "this process was forked from one that had an engine, and the engine does not live on in a child"
    hint = "fork before init, or start children with the spawn method"
    return LLMException(
        f"LLMDataDist failed, {cause}; {hint}",
        status_code=LLMStatusCode.LLM_FAILED,
        stage="check",
        cause=cause,
        hint=hint,
    )


def refuse_in_child() -> None:
    """Raise LLMException in a forked child of a process that had an engine."""
    if _forked:
        raise _dead_in_child()


def _after_fork_in_child() -> None:
    """Mark every engine dead and close the engine's descriptors, so that peers of a dead parent see it die.

    Go must not be called here: such a call would never return. The parent's table of descriptors is read from memory;
    a number is closed only where fstat shows that it still is what the table says.
    """
    global _forked
    _forked = True
    if _table is None:
        return
    words = _table
    for entry, fd in enumerate(words[::3]):
        if fd < 0:
            continue
        try:
            found = os.fstat(fd)
            if (found.st_dev, found.st_ino) == (words[3 * entry + 1], words[3 * entry + 2]):
                os.close(fd)
        except OSError:
            continue  # closed already


def failure(operation: str, number: int) -> LLMException:
    """Return the failure that lies under a number, as the exception for the documented call."""
    text = _extension.pyext_ErrorTake(number)
    fields: dict[str, Any] = {"code": int(LLMStatusCode.LLM_FAILED), "text": "the reason was lost"}
    if text:
        fields = json.loads(text)
    return LLMException(
        f"{operation} failed, {fields['text']}",
        status_code=code_2_status(fields["code"]),
        operation=operation,
        peer=fields.get("peer"),
        address=fields.get("address"),
        stage=fields.get("stage"),
        cause=fields.get("cause"),
        hint=fields.get("hint"),
    )


def call(operation: str, start: Callable[..., int], *args: Any, leaves_text: bool = False) -> str:
    """Run a long call to its end and return the text that it leaves, if it does.

    start takes the number of the operation, then args. Whatever interrupts the wait ends the operation first: when this
    function has raised, nothing of it is under way.
    """
    native = _extension
    number = next(_numbers)
    text, failed = "", None
    try:
        result = start(number, *args)
        if result == _RUNNING:
            result = _wait(native, number)
        if result < 0:
            failed = failure(operation, -result)
        elif leaves_text:
            text = str(native.pyext_TextTake(number))
    except BaseException:
        try:
            # The first thing done and no function of Python's: nothing looks for a further signal before it.
            _forked or native.pyext_Cancel(number, WAIT_MILLIS)
        finally:
            _let_go(number)
        raise
    if failed is not None:
        raise failed
    return text


# A loop is in a function of its own where a try is to cover it: an interrupt that is seen at the jump back to the loop's
# start is, from Python 3.13 on, raised outside every try of the same function.


def _wait(native: Any, number: int) -> int:
    """Wait until an operation has ended and return its result."""
    result = _RUNNING
    while result == _RUNNING:
        if _forked:  # by a signal's handler, which has returned here in the child
            raise _dead_in_child()
        result = native.pyext_Wait(number, WAIT_MILLIS)
    return result


def _let_go(number: int) -> None:
    """Cancel an operation and wait until it touches nothing any more, through further interrupts."""
    while True:
        try:
            return _cancel(_extension, number)
        except BaseException:  # a second Ctrl-C: the first one is on its way up already
            continue


def _cancel(native: Any, number: int) -> None:
    while not _forked and native.pyext_Cancel(number, WAIT_MILLIS) == _RUNNING:
        pass


def _close(native: Any, handle: int) -> None:
    """Close an engine. Whatever interrupts is raised when the engine is gone."""
    number = next(_numbers)
    try:
        result = native.pyext_EngineClose(number, handle, WAIT_MILLIS)
        if result == _RUNNING:
            result = _wait(native, number)
    except BaseException:
        _let_go(number)  # closing can't be cancelled, only waited for
        raise
    if result < 0:
        log.error("%s", failure("finalize", -result))


def _finish(handle: int) -> None:
    """Close an engine, once."""
    with _engines_lock:
        if _engines.pop(handle, None) is None:
            return
    try:
        _close(_extension, handle)
    finally:
        _events.stop(_extension)


def close_dropped() -> None:
    """Close the engines that were dropped without finalize."""
    while not _forked:
        try:
            handle = _dropped.popleft()
        except IndexError:
            return
        _finish(handle)


def close_all() -> None:
    """Close every engine of the process."""
    if _forked:
        return
    with _engines_lock:
        handles = list(_engines)
    for handle in handles:
        _finish(handle)


def several() -> bool:
    """Tell whether an engine is open beside which others may be."""
    with _engines_lock:
        return any(_engines.values())


class Engine:
    """One native engine. Its methods are the calls of the boundary; each takes checked arguments.

    One that is dropped while it is open is closed when the next one is opened or closed, or at exit.
    """

    def __init__(self, cluster_id: int, options: dict[str, str]) -> None:
        self._open = False
        close_dropped()
        native = extension()
        handle = next(_numbers)
        variables = {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)}
        _events.start(native)
        failed = None
        try:
            result = native.pyext_EngineOpen(handle, signed(cluster_id), json.dumps(options), json.dumps(variables))
            if result < 0:
                failed = failure("init", -result)
        except BaseException:
            _close(native, handle)
            _events.stop(native)
            raise
        if failed is not None:
            _events.drain(native)
            _events.stop(native)
            raise failed
        self._native = native
        self._handle = handle
        with _engines_lock:
            _engines[handle] = options.get(_options.MULTIPLE_ENGINES) == "1"
        self._open = True
        self._pull = native.pyext_PullStart

    def close(self) -> None:
        """Finalize. In a forked child nothing happens: the engine is the parent's."""
        if _forked or not self._open:
            return
        self._open = False
        _finish(self._handle)
        close_dropped()

    def __del__(self) -> None:
        if self._open:
            _dropped.append(self._handle)  # closing takes locks, which whoever is interrupted by this may hold

    def _usable(self, closed: LLMStatusCode = LLMStatusCode.LLM_PARAM_INVALID) -> Any:
        if _forked:
            raise _dead_in_child()
        if not self._open:
            cause = "the engine was finalized"
            raise LLMException(cause, status_code=closed, stage="check", cause=cause, hint="call init again")
        return self._native

    def listen_address(self) -> str | None:
        return self._usable().pyext_ListenAddress(self._handle) or None

    def device_is_apart(self) -> bool:
        """Return whether the host can't touch DEVICE memory."""
        return bool(self._usable().pyext_DeviceApart(self._handle))

    def explain(self, cluster_id: int) -> str:
        return str(self._usable().pyext_Explain(self._handle, signed(cluster_id)))

    def switch_role(self, address: str) -> None:
        self._short("switch_role", self._usable().pyext_SwitchRole(self._handle, address))

    def links(self) -> list[dict[str, Any]]:
        """Return the live links: dicts of cluster (the id that the peer reports) and address."""
        text = self._usable().pyext_Links(self._handle)
        found: list[dict[str, Any]] = json.loads(text) if text else []
        return found

    def check_link(self, cluster_id: int) -> None:
        start = self._usable().pyext_LinkCheckStart
        call("check_link_status", start, self._handle, WAIT_MILLIS, signed(cluster_id))

    def link_clusters(self, clusters: list[dict[str, Any]], timeout: int) -> list[LLMStatusCode]:
        native = self._usable(LLMStatusCode.LLM_FAILED)
        arguments = (self._handle, WAIT_MILLIS, timeout, json.dumps(clusters))
        text = call("link_clusters", native.pyext_LinkStart, *arguments, leaves_text=True)
        return [code_2_status(code) for code in json.loads(text)]

    def unlink_clusters(self, clusters: list[dict[str, Any]], timeout: int, force: bool) -> list[LLMStatusCode]:
        native = self._usable(LLMStatusCode.LLM_FAILED)
        arguments = (self._handle, WAIT_MILLIS, timeout, json.dumps(clusters), force)
        text = call("unlink_clusters", native.pyext_UnlinkStart, *arguments, leaves_text=True)
        return [code_2_status(code) for code in json.loads(text)]

    def group_link(self, name: str, members: list[tuple[int, int]], table: str) -> int:
        """Begin to link a group. members has cluster id and rank of each."""
        plain = [(str(cluster_id), rank) for cluster_id, rank in members]
        request = json.dumps({"name": name, "members": plain, "table": table})
        return self._short("link", self._usable().pyext_GroupLink(self._handle, request))

    def group_unlink(self, comm_id: int) -> None:
        call("unlink", self._usable().pyext_GroupUnlinkStart, self._handle, WAIT_MILLIS, signed(comm_id))

    def group_status(self, comm_id: int) -> int:
        result = self._usable().pyext_GroupStatus(self._handle, signed(comm_id))
        return self._short("query_register_mem_status", result)

    def register(
        self, operation: str, desc: array[int], addrs: array[int], keys: array[int], remote_accessible: bool
    ) -> int:
        result = self._usable(LLMStatusCode.LLM_FAILED).pyext_CacheRegister(
            self._handle, *span(desc), *span(addrs), address(keys), len(keys) // 3, remote_accessible
        )
        return self._short(operation, result)

    def allocate(self, operation: str, desc: array[int], keys: array[int], num_tensors: int) -> tuple[int, list[int]]:
        native = self._usable(LLMStatusCode.LLM_FAILED)
        out = array("Q", bytes(8 * num_tensors))
        result = native.pyext_CacheAllocate(self._handle, *span(desc), address(keys), len(keys) // 3, *span(out))
        return self._short(operation, result), out.tolist()

    def unregister(self, cache_id: int) -> None:
        native = self._usable(LLMStatusCode.LLM_FAILED)
        call("unregister_cache", native.pyext_CacheUnregister, self._handle, WAIT_MILLIS, cache_id)

    def deallocate(self, operation: str, cache_id: int, blocks: bool) -> None:
        self._short(operation, self._usable().pyext_CacheDeallocate(self._handle, cache_id, blocks))

    def remove_key(self, key_id: int, model_id: int, prefix: bool) -> None:
        result = self._usable().pyext_KeyRemove(self._handle, signed(key_id), signed(model_id), prefix)
        self._short("remove_cache_key", result)

    def pull(self, operation: str, words: array[int], src_count: int, dst_count: int) -> None:
        """Pull. words has the parameters that pyext.PullStart names, then the source's blocks, then the local ones."""
        self._usable()
        params = words.buffer_info()[0]
        src = params + _PULL_BYTES
        dst = src + _WORD_BYTES * src_count
        call(operation, self._pull, self._handle, WAIT_MILLIS, params, src, src_count, dst, dst_count)

    def push(self, operation: str, words: array[int], src_count: int, dst_count: int, addr_count: int) -> None:
        """Push. words has the parameters that pyext.PushStart names, the local blocks, the peer's, and the peer's addresses."""
        start = self._usable().pyext_PushStart
        params = words.buffer_info()[0]
        src = params + _PUSH_BYTES
        dst = src + _WORD_BYTES * src_count
        addrs = dst + _WORD_BYTES * dst_count
        blocks = (src, src_count, dst, dst_count)
        call(operation, start, self._handle, WAIT_MILLIS, params, *blocks, addrs, addr_count)

    def memory_remap(self) -> None:
        self._short("remap_registered_memory", self._usable().pyext_MemoryRemap(self._handle))

    def copy_cache(self, dst: int, src: int, dst_batch: int, src_batch: int, offset: int, size: int) -> None:
        start = self._usable().pyext_CopyCacheStart
        call("copy_cache", start, self._handle, WAIT_MILLIS, dst, src, dst_batch, src_batch, signed(offset), size)

    def copy_blocks(self, cache_id: int, pairs: array[int]) -> None:
        start = self._usable().pyext_CopyBlocksStart
        call("copy_blocks", start, self._handle, WAIT_MILLIS, cache_id, *span(pairs))

    def swap_blocks(
        self, dst: array[int], src: array[int], placements: tuple[int, int], block_bytes: int, pairs: array[int]
    ) -> None:
        """Copy blocks. placements says where dst and src lie: 0 host, 1 device."""
        start = self._usable().pyext_SwapBlocksStart
        arguments = (address(dst), address(src), *placements, len(src), block_bytes, *span(pairs))
        call("swap_blocks", start, self._handle, WAIT_MILLIS, *arguments)

    def _short(self, operation: str, result: int) -> int:
        if result < 0:
            raise failure(operation, -result)
        return result


def signed(value: int) -> int:
    """Return the int64 with the same 64 bits as a uint64."""
    return value - (1 << 64) if value >= 1 << 63 else value


def address(words: array[int]) -> int:
    return words.buffer_info()[0] if words else 0


def span(words: array[int]) -> tuple[int, int]:
    """Return address and count."""
    return (words.buffer_info()[0], len(words)) if words else (0, 0)


class _Events:
    """A thread that writes the engine's lines to the log while there are engines."""

    _WRITERS: ClassVar = {1: log.info, 2: log.warn, 3: log.error}

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _users and _thread
        self._users = 0
        self._thread: threading.Thread | None = None
        self._stopping = False

    def start(self, native: Any) -> None:
        with self._lock:
            self._users += 1
            if self._users > 1:
                return
            fd = native.pyext_EventsOpen()
            if fd < 0:
                self._users = 0
                raise failure("init", -fd)
            self._stopping = False
            self._thread = threading.Thread(target=self._run, args=(native, fd), name="llm_datadist-log", daemon=True)
            self._thread.start()

    def stop(self, native: Any) -> None:
        with self._lock:
            self._users -= 1
            if self._users > 0 or self._thread is None:
                return
            self._stopping = True
            native.pyext_EventsWake()
            self._thread.join()
            self._thread = None
            self.drain(native)
            native.pyext_EventsClose()

    def _run(self, native: Any, fd: int) -> None:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while not self._stopping:
            poll.poll()
            self.drain(native)

    def drain(self, native: Any) -> None:
        text = native.pyext_EventsTake()
        for line in json.loads(text) if text else ():
            engine = "" if line["engine"] is None else f"engine {line['engine']}: "
            peer = "" if line["cluster"] is None else f"cluster {line['cluster']}: "
            cause = "" if line["cause"] is None else f": {line['cause']}"
            self._WRITERS.get(line["level"], log.error)("%s%s%s%s", engine, peer, line["text"], cause)


_events = _Events()


def held() -> int:
    """Count what the engine keeps for Python; 0 when everything has ended. For tests."""
    return 0 if _extension is None else int(_extension.pyext_Held())
