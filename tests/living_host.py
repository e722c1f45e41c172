# SPDX-License-Identifier: Apache-2.0
"""What test_living*.py do inside a host process: signals to itself, forks, and looks at its own state.

Each function takes the :class:`peers.End` of that process first and returns plain values. :func:`inside` runs one there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import itertools
import json
import logging
import multiprocessing
import os
import random
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable

import numpy as np

from llm_datadist import (
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    LLMDataDist,
    LLMException,
    LLMRole,
    MemInfo,
    Memtype,
    _native,
)
from peers import End, cluster, desc, options, pattern, wait_until

PEER_ID = 1  # of the engine that the tests pull from; its cache "big" answers to the blocks key of model 0
WAIT_SECONDS = _native.WAIT_MILLIS / 1000
SOON = 10 * WAIT_SECONDS  # ten times the time in which a signal is seen
BIG_BLOCK = 1 << 20
BIG_BLOCKS = 128
SMALL_BYTES = 1024
NO_ENGINE = -1  # a handle that none has


def inside(peer: Any, function: Callable[..., Any], *args: Any) -> Any:
    """Run a function of this module in a peer, and return what it returns."""
    return begin_inside(peer, function, *args).result()


def begin_inside(peer: Any, function: Callable[..., Any], *args: Any) -> Any:
    name = function.__name__
    return peer.begin("run", f"import living_host; result = living_host.{name}(end, *args)", args=args)


# --- ends


def serve_big(end: End) -> None:
    """Register what the tests pull: one large cache of blocks, which is also a row, and a small row."""
    end.add("big", desc([BIG_BLOCKS, BIG_BLOCK]), 7, BlocksCacheKey(PEER_ID), blocks=True)
    end.lend("row", desc([1, BIG_BLOCKS * BIG_BLOCK]), end.memory["big"], [CacheKey(PEER_ID, req_id=2)])
    end.add("small", desc([1, SMALL_BYTES]), 8, [CacheKey(PEER_ID, req_id=1)])


def add_destinations(end: End) -> None:
    big, small = np.zeros(BIG_BLOCKS * BIG_BLOCK, np.uint8), np.zeros(SMALL_BYTES, np.uint8)
    end.lend("big", desc([BIG_BLOCKS, BIG_BLOCK]), [big], blocks=True)
    end.lend("row", desc([1, BIG_BLOCKS * BIG_BLOCK]), [big])
    end.lend("small", desc([1, SMALL_BYTES]), [small])


def clear(end: End) -> None:
    for name in ("big", "small"):
        for view in end.tensors(name):
            view[:] = 0


def pull_big(end: End) -> None:
    every = list(range(BIG_BLOCKS))
    end.manager.pull_blocks(BlocksCacheKey(PEER_ID), end.caches["big"], every, every)


def pull_row(end: End) -> None:
    """Pull all of big by the key of a row, about which the owner is asked each time, over any transport."""
    end.manager.pull_cache(CacheKey(PEER_ID, req_id=2), end.caches["row"])


def pull_small(end: End) -> None:
    end.manager.pull_cache(CacheKey(PEER_ID, req_id=1), end.caches["small"])


def pull_one_block(end: End) -> None:
    end.manager.pull_blocks(BlocksCacheKey(PEER_ID), end.caches["big"], [3], [3])


def has_arrived(end: End) -> bool:
    return bool(np.array_equal(end.tensors("big")[0], whole_big()))


@functools.lru_cache(maxsize=1)
def whole_big() -> Any:
    return pattern(7, 0, BIG_BLOCKS * BIG_BLOCK)


def pull_all(end: End) -> bool:
    """Pull both caches and tell whether every byte is right."""
    clear(end)
    pull_big(end)
    pull_small(end)
    return has_arrived(end) and bool(np.array_equal(end.tensors("small")[0], pattern(8, 0, SMALL_BYTES)))


def failure(call: Callable[[], Any]) -> dict[str, Any]:
    """Return what a call raises, as data, and how long that took."""
    began = time.monotonic()
    try:
        call()
    except LLMException as exc:
        fields = {name: getattr(exc, name) for name in ("operation", "peer", "stage", "cause", "hint")}
        return {"code": exc.status_code.name, "seconds": time.monotonic() - began, **fields}
    except Exception as exc:
        return {"code": repr(exc), "seconds": time.monotonic() - began, "hint": None}
    return {"code": "none", "seconds": time.monotonic() - began, "hint": None}


@contextlib.contextmanager
def handling(number: int, handler: Any) -> Any:
    """Set a signal's handler, and put the old one back."""
    old = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, old)


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    # Its first thread may stand while another one still serves.
    wait_until(lambda: threads_stand(pid), "every thread of the process is stopped")


def threads_stand(pid: int) -> bool:
    try:
        return all(process_state(int(task.name)) == "T" for task in Path(f"/proc/{pid}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError):  # one has ended meanwhile
        return False


def process_state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


# --- failures


def failure_is_read_once(end: End) -> list[Any]:
    native = _native._extension
    before = native.pyext_Held()
    number = -native.pyext_SwitchRole(NO_ENGINE, "")
    kept = native.pyext_Held() - before
    first = json.loads(native.pyext_ErrorTake(number))["cause"]
    return [kept, first, native.pyext_ErrorTake(number), native.pyext_Held() - before]


def unread_failures(end: End, count: int) -> list[Any]:
    """Let count results be lost, then return what is kept, and whether the last can still be read."""
    native = _native._extension
    before = native.pyext_Held()
    for _ in range(count):
        number = -native.pyext_SwitchRole(NO_ENGINE, "")
    return [native.pyext_Held() - before, native.pyext_ErrorTake(number) != ""]


def failures_in_threads(end: End, threads: int, rounds: int) -> list[str]:
    """Fail in many threads at once, each with a cluster id, an operation and a cause of its own; return what was mixed up."""
    wrong: list[str] = []
    start = threading.Barrier(threads)

    def fail(index: int) -> None:
        unknown = 1000 + index
        manager, big, small = end.manager, end.caches["big"], end.caches["small"]
        no_link = [
            ("pull_cache", lambda: manager.pull_cache(CacheKey(unknown, req_id=1), small)),
            ("pull_blocks", lambda: manager.pull_blocks(BlocksCacheKey(unknown), big, [0], [0])),
        ]
        cases: list[Any] = [(*case, unknown, "LLM_NOT_YET_LINK") for case in no_link]
        no_key = lambda: manager.pull_cache(CacheKey(PEER_ID, req_id=unknown), small)  # noqa: E731
        cases.append(("pull_cache", no_key, PEER_ID, "LLM_KV_CACHE_NOT_EXIST"))
        cases.append(("copy_blocks", lambda: manager.copy_blocks(big, {0: [unknown]}), None, "LLM_PARAM_INVALID"))
        start.wait()
        for number in range(rounds):
            operation, call, peer, code = cases[(number + index) % len(cases)]
            got = failure(call)
            cause_is_own = operation != "copy_blocks" or f"block {unknown} " in got["cause"]
            if (got["operation"], got["peer"], got["code"]) != (operation, peer, code) or not cause_is_own:
                wrong.append(f"thread {index}: wanted {operation} {peer} {code}, got {got}")

    workers = [threading.Thread(target=fail, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return wrong


# --- interrupts


def interrupted_pull(end: End, peer_pid: int, midway: bool, stopping: bool = True) -> dict[str, Any]:
    """Press Ctrl-C in a pull from a process that is stopped, at the start or midway, and left so; or in the middle of a copy
    that needs no other process.
    """
    for _ in range(20):
        got = interrupt_pull(end, peer_pid, midway, stopping)
        if not got["too late"]:
            return got
        os.kill(peer_pid, signal.SIGCONT)
    return got


def interrupt_pull(end: End, peer_pid: int, midway: bool, stopping: bool) -> dict[str, Any]:
    idle = _native.held()
    clear(end)
    first_bytes = end.tensors("big")[0][::BIG_BLOCK]
    returned = threading.Event()
    sent: list[float] = []

    def interrupt() -> None:
        if midway:
            wait_until(first_bytes.any, "bytes arrive")
        if midway and stopping:
            stop(peer_pid)
            if returned.wait(2 * WAIT_SECONDS):  # what was in the sockets has been the rest
                return
        wait_until(lambda: _native.held() > idle or returned.is_set(), "the pull is under way")
        if not returned.is_set():
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

    if not midway:
        stop(peer_pid)
    helper = threading.Thread(target=interrupt)
    ending = "KeyboardInterrupt"
    with handling(signal.SIGINT, signal.default_int_handler):
        try:
            helper.start()
            pull_row(end) if stopping else pull_big_with_short_waits(end)
            ending = "returned"
            returned.set()
            helper.join()
        except KeyboardInterrupt:
            pass
        except LLMException as exc:
            ending = str(exc)
        ended = time.monotonic()
        held = _native.held() - idle
        checksum = end.checksum("big")
        returned.set()
        helper.join()
    seconds = ended - sent[0] if sent else 0
    too_late = not sent or ending == "returned" or (midway and has_arrived(end))
    return {"ending": ending, "seconds": seconds, "held": held, "checksum": checksum, "too late": too_late}


def pull_big_with_short_waits(end: End) -> None:
    """Pull big as if it were so large that it took many waits."""
    millis, _native.WAIT_MILLIS = _native.WAIT_MILLIS, 1
    try:
        pull_big(end)
    finally:
        _native.WAIT_MILLIS = millis


def changes_within(end: End, checksum: int, seconds: float) -> int:
    """Watch the destination, and count how often it is not what it was."""
    deadline = time.monotonic() + seconds
    changed = 0
    while time.monotonic() < deadline:
        changed += end.checksum("big") != checksum
    return changed


class Interrupted(Exception):
    """What the handlers of the storms raise."""


def storm(end: End, strikes: int, rounds: int, raised: type[BaseException]) -> dict[str, int]:
    """Make calls under a timer whose handler raises at random moments, up to so many times a round of calls."""
    idle = _native.held()
    rng = random.Random(1)
    left = [0]  # strikes of this round
    lost = 0
    struck = []

    def strike(_: int, frame: Any) -> None:
        while frame is not None and frame.f_code.co_filename != _native.__file__:
            frame = frame.f_back
        if frame is not None and left[0] > 0:  # never between the calls
            left[0] -= 1
            struck.append(1)
            raise raised("storm")

    def calls() -> None:
        """A call that succeeds, one that fails, and one that leaves a text."""
        pull_one_block(end)
        with contextlib.suppress(LLMException):
            end.manager.pull_cache(CacheKey(PEER_ID, req_id=99), end.caches["small"])
        end.engine.link_clusters([cluster(end.engine.listen_address, PEER_ID + 100)], 1000)

    millis = _native.WAIT_MILLIS
    with handling(signal.SIGALRM, strike):
        for number in range(rounds):
            _native.WAIT_MILLIS = number % 2 * millis  # with 0 an operation runs on when its start has returned
            left[0] = strikes
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 1e-3), 1e-4)
            with contextlib.suppress(raised):
                calls()
            left[0] = 0
            lost += strikes == 1 and _native.held() != idle
        signal.setitimer(signal.ITIMER_REAL, 0)
    _native.WAIT_MILLIS = millis
    if strikes > 1:  # the wait itself may be cut off: they end soon after
        wait_until(lambda: _native.held() == idle, "all have ended", SOON)
    return {"interrupted": len(struck), "lost": lost}


def interrupts_while_letting_go(end: End, peer_pid: int, times: int) -> dict[str, Any]:
    """Interrupt a pull, and its letting go as often again."""
    idle = _native.held()
    real = _native._extension
    left = itertools.repeat(None, times)

    class Interrupting:
        """The native module, whose Cancel is struck by Ctrl-C before it gets anywhere."""

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def pyext_Cancel(self, number: int, millis: int) -> int:
            for _ in left:
                signal.raise_signal(signal.SIGINT)
            return int(real.pyext_Cancel(number, millis))

        def pyext_Wait(self, number: int, millis: int) -> int:
            signal.raise_signal(signal.SIGINT)
            return int(real.pyext_Wait(number, millis))

    stop(peer_pid)
    with handling(signal.SIGINT, signal.default_int_handler):
        _native._extension = Interrupting()
        try:
            pull_row(end)
            ending = "returned"
        except KeyboardInterrupt:
            ending = "KeyboardInterrupt"
        finally:
            _native._extension = real
    return {"ending": ending, "left": len(list(left)), "held": _native.held() - idle}


def pull_under_quiet_signals(end: End, peer_pid: int, least: int) -> dict[str, Any]:
    """Pull while a handler that returns normally runs at least so often; the peer is stopped until then."""
    seen: list[int] = []

    def resume() -> None:
        wait_until(lambda: len(seen) >= least, "the handler has run")
        os.kill(peer_pid, signal.SIGCONT)

    clear(end)
    stop(peer_pid)
    helper = threading.Thread(target=resume)
    helper.start()
    with handling(signal.SIGALRM, lambda number, _: seen.append(number)):
        signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
        try:
            pull_row(end)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    helper.join()
    return {"handled": len(seen), "right": has_arrived(end)}


def work_during_a_blocked_pull(end: End, peer_pid: int, steps: int) -> dict[str, Any]:
    """Pull from a stopped process, which another Python thread continues when it has made so many steps of its own."""
    idle = _native.held()

    def work() -> None:
        wait_until(lambda: _native.held() > idle, "the pull is under way")
        for _ in range(steps):
            time.sleep(0.001)
        os.kill(peer_pid, signal.SIGCONT)

    clear(end)
    stop(peer_pid)
    worker = threading.Thread(target=work)
    worker.start()
    got = failure(lambda: pull_row(end))
    worker.join()
    return {**got, "right": has_arrived(end)}


def longest_pause_during_big_pulls(end: End, pulls: int) -> tuple[float, bool]:
    """Return for how long another Python thread did not run while everything was pulled so many times."""
    longest, started, done = 0.0, threading.Event(), threading.Event()

    def tick() -> None:
        nonlocal longest
        last = time.monotonic()
        started.set()
        while not done.is_set():
            time.sleep(0.001)
            now = time.monotonic()
            longest, last = max(longest, now - last), now

    clear(end)
    ticker = threading.Thread(target=tick)
    ticker.start()
    started.wait()
    for _ in range(pulls):
        pull_big(end)
    done.set()
    ticker.join()
    return longest, has_arrived(end)


def interrupted_init(end: End) -> dict[str, Any]:
    """Press Ctrl-C while init is inside the engine, then init again on the same port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = "127.0.0.1:%d" % probe.getsockname()[1]
    idle = _native.held()
    real = _native._extension

    class Interrupting:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def pyext_EngineOpen(self, *args: Any) -> int:
            assert real.pyext_EngineOpen(*args) == 0
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("not interrupted")

    with handling(signal.SIGINT, signal.default_int_handler):
        _native._extension = Interrupting()
        try:
            LLMDataDist(LLMRole.MIX, 77).init(options(address))
            ending = "returned"
        except KeyboardInterrupt:
            ending = "KeyboardInterrupt"
        finally:
            _native._extension = real
    report = {"ending": ending, "held": _native.held() - idle, "log threads": log_threads()}
    end.open(77, listen=address)
    end.close()
    return report


def interrupted_finalize(end: End) -> dict[str, Any]:
    """Press Ctrl-C while finalize waits for the engine."""
    real = _native._extension

    class Interrupting:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def pyext_EngineClose(self, number: int, handle: int, _: int) -> int:
            result = int(real.pyext_EngineClose(number, handle, 0))
            signal.raise_signal(signal.SIGINT)
            return result

    with handling(signal.SIGINT, signal.default_int_handler):
        _native._extension = Interrupting()
        try:
            end.close()
            ending = "returned"
        except KeyboardInterrupt:
            ending = "KeyboardInterrupt"
        finally:
            _native._extension = real
    return {"ending": ending, "held": _native.held(), "log threads": log_threads()}


def log_threads() -> int:
    return sum(thread.name == "llm_datadist-log" for thread in threading.enumerate())


# --- fork


def every_call(end: End) -> dict[str, Callable[[], Any]]:
    """Each documented call that needs an engine."""
    manager, engine, big, small = end.manager, end.engine, end.caches["big"], end.caches["small"]
    pool = end.caches["pool"]
    address = [small.tensor_addrs[0]]
    return {
        "pull_cache": lambda: manager.pull_cache(CacheKey(PEER_ID, req_id=1), small),
        "pull_cache by id": lambda: manager.pull_cache(CacheKeyByIdAndIndex(PEER_ID, 1, 0), small),
        "pull_blocks": lambda: pull_one_block(end),
        "register_cache": lambda: manager.register_cache(desc([1, SMALL_BYTES]), address),
        "register_blocks_cache": lambda: manager.register_blocks_cache(desc([1, SMALL_BYTES]), address),
        "unregister_cache": lambda: manager.unregister_cache(small.cache_id),
        "allocate_cache": lambda: manager.allocate_cache(desc([1, SMALL_BYTES])),
        "allocate_blocks_cache": lambda: manager.allocate_blocks_cache(desc([1, SMALL_BYTES])),
        "deallocate_cache": lambda: manager.deallocate_cache(pool),
        "remove_cache_key": lambda: manager.remove_cache_key(CacheKey(PEER_ID, req_id=1)),
        "copy_cache": lambda: manager.copy_cache(small, small),
        "copy_blocks": lambda: manager.copy_blocks(big, {0: [1]}),
        "remap_registered_memory": lambda: manager.remap_registered_memory(MemInfo(Memtype.MEM_TYPE_DEVICE, *address, 1)),
        "link_clusters": lambda: engine.link_clusters([cluster("127.0.0.1:1", 9)], 1000),
        "unlink_clusters": lambda: engine.unlink_clusters([cluster("127.0.0.1:1", 9)], 1000),
        "switch_role": lambda: engine.switch_role(LLMRole.DECODER),
        "listen_address": lambda: engine.listen_address,
        "explain": lambda: engine.explain(PEER_ID),
    }


def in_child(work: Callable[[], Any], leave: Callable[[int], Any] = os._exit, seconds: float = 30) -> tuple[Any, int]:
    """Fork, run work in the child, and return what it returned and how the child ended. A child that hangs is killed."""
    answers, give = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.close(answers)
        answer: Any = "no answer"
        try:
            answer = work()
        except BaseException as exc:
            answer = repr(exc)
        os.write(give, json.dumps(answer).encode())
        os.close(give)
        leave(0)
        os._exit(99)  # leave has returned
    os.close(give)
    text = b""
    deadline = time.monotonic() + seconds
    while select.select([answers], [], [], max(0, deadline - time.monotonic()))[0]:
        chunk = os.read(answers, 1 << 16)
        if not chunk:
            break
        text += chunk
    os.close(answers)
    with contextlib.suppress(AssertionError):
        wait_until(lambda: process_state(pid) == "Z", "the child ends", max(1, deadline - time.monotonic()))
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return json.loads(text or b'"the child hangs"'), os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)


def calls_in_child(end: End, leave_normally: bool) -> tuple[Any, int]:
    """Make every call in a forked child. It leaves as a Python process does, with its atexit handlers, or at once."""

    def calls() -> Any:
        found = {name: failure(call) for name, call in every_call(end).items()}
        found["init of the parent's engine"] = failure(lambda: end.engine.init(options()))
        found["init of another"] = failure(lambda: LLMDataDist(LLMRole.MIX, 78).init(options()))
        return found

    return in_child(calls, leave_as_an_interpreter_does if leave_normally else os._exit)


def leave_as_an_interpreter_does(code: int) -> None:
    """End a forked child as its main module's end would."""
    threading._shutdown()  # type: ignore[attr-defined]
    import atexit

    atexit._run_exitfuncs()
    gc.collect()
    os._exit(code)


def finalize_in_child(end: End) -> tuple[Any, int]:
    def finalize() -> str:
        end.engine.finalize()
        end.engine.finalize()
        end.engine = None
        gc.collect()
        return "done"

    return in_child(finalize)


def child_of_a_handler(end: End, peer_pid: int, leave_by_exit: bool) -> list[Any]:
    """Fork in a signal's handler, in the middle of a pull, and let the child come back to the pull or leave it by an exit."""
    children: list[int] = []
    parent = os.getpid()

    def fork(*_: Any) -> None:
        if children:
            return
        pid = os.fork()
        children.append(pid)
        if pid == 0 and leave_by_exit:
            sys.exit(3)

    def strike() -> None:
        wait_until(lambda: _native.held() > idle, "the pull is under way")
        os.kill(parent, signal.SIGALRM)
        wait_until(lambda: children, "the child is there")
        os.kill(peer_pid, signal.SIGCONT)

    idle = _native.held()
    stop(peer_pid)
    helper = threading.Thread(target=strike)
    helper.start()
    code = 0
    with handling(signal.SIGALRM, fork):
        try:
            pull_small(end)
        except LLMException as exc:
            code = 4 if "forked" in str(exc) else 5
        except SystemExit:
            code = 3
    if os.getpid() != parent:
        os._exit(code)
    helper.join()
    with contextlib.suppress(AssertionError):
        wait_until(lambda: process_state(children[0]) == "Z", "the child ends", 10)
    os.kill(children[0], signal.SIGKILL)
    status = os.waitpid(children[0], 0)[1]
    return [code, os.WEXITSTATUS(status) if os.WIFEXITED(status) else "hung"]


def fork_during_load(end: End) -> tuple[Any, int]:
    """Fork in the middle of the load of the runtime, and init in the child."""
    answers = []

    class Forking:
        @staticmethod
        def import_module(name: str) -> Any:
            module = importlib.import_module(name)
            answers.append(in_child(lambda: failure(lambda: LLMDataDist(LLMRole.MIX, 80).init(options()))))
            return module

    _native.importlib = Forking  # type: ignore[assignment]
    try:
        _native.extension()
    finally:
        _native.importlib = importlib
    return answers[0]


def fork_with_locks_held(end: End) -> tuple[Any, int]:
    """Fork while another thread is inside close; finalize in the child all the same."""
    with _native._engines_lock:
        return finalize_in_child(end)


def targets() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def open_and_link(end: End, address: str, cluster_id: int = 2, peer_dead_millis: int | None = None) -> dict[str, Any]:
    """Load the runtime, open an engine, link it to the peer, and say which descriptors each of the two steps brought."""
    before = targets()
    _native.extension()
    runtime = targets()
    own = end.open(cluster_id, peer_dead_millis=peer_dead_millis)
    code = end.link(address, PEER_ID).name
    add_destinations(end)
    end.add("pool", desc([1, SMALL_BYTES]), 102, owned=True)
    ours = [[fd, name] for fd, name in targets().items() if runtime.get(fd, before.get(fd)) != name]
    return {"address": own, "code": code, "ours": ours}


def open_in_child(end: End) -> list[list[Any]]:
    """List what a forked child has open of what the parent has open."""
    before = targets()
    answer, _ = in_child(lambda: [[fd, name] for fd, name in targets().items() if before.get(fd) == name])
    return answer


def open_in_program(end: End) -> list[tuple[int, str]]:
    """List the descriptors that a program gets which is started with close_fds=False."""
    code = "import living_host, json; print(json.dumps(list(living_host.targets().items())))"
    done = subprocess.run([sys.executable, "-c", code], close_fds=False, stdout=subprocess.PIPE, text=True, check=True)
    theirs = [tuple(entry) for entry in json.loads(done.stdout)]
    return [entry for entry in targets().items() if entry in theirs]


def descriptor_of_another_file_in_child(end: End) -> Any:
    """Put a stale entry into the table of descriptors, whose number is somebody else's by now, and fork."""
    words = _native._table
    slot = max(entry for entry in range(len(words) // 3) if words[3 * entry] == -1)
    with open(os.devnull) as file:
        words[3 * slot + 1], words[3 * slot + 2] = 1, 1
        words[3 * slot] = file.fileno()
        try:
            return in_child(lambda: os.fstat(file.fileno()).st_ino == os.stat(os.devnull).st_ino)[0]
        finally:
            words[3 * slot] = -1


def fork_a_child_that_stays(end: End) -> int:
    """Fork a child that lives until it is killed."""
    pid = os.fork()
    if pid == 0:
        while True:
            signal.pause()
    return pid


def pull_from_a_dying_process(end: End, cluster_id: int, pid: int) -> dict[str, Any]:
    """Pull from a stopped process and kill it in the middle; then pull again, until the link is known to be dead."""
    idle = _native.held()
    if "dying" not in end.caches:
        end.add("dying", desc([1, SMALL_BYTES]), 103)
    killed: list[float] = []

    def kill() -> None:
        wait_until(lambda: _native.held() > idle, "the pull is under way")
        killed.append(time.monotonic())
        os.kill(pid, signal.SIGKILL)

    def pull() -> None:
        end.manager.pull_cache(CacheKey(cluster_id, req_id=1), end.caches["dying"])

    stop(pid)
    killer = threading.Thread(target=kill)
    killer.start()
    first = failure(pull)
    ended = time.monotonic()
    killer.join()
    wait_until(lambda: failure(pull)["code"] == "LLM_NOT_YET_LINK", "the link is dead", SOON)
    return {**first, "seconds": ended - killed[0]}


def become(end: End, uid: int) -> None:
    """Load the engine, then change the uid: the peer can't show that it is on the same host."""
    _native.extension()
    pattern(1, 1, 1)  # numpy imports more at the first use, and another uid may not read it
    os.setresuid(uid, uid, uid)


def fork_before_init(end: End, address: str) -> Any:
    """Open an engine in a forked child, and after that one here."""

    def work() -> Any:
        opened = open_and_link(end, address, 21)
        right = pull_all(end)
        end.close()
        return [opened["code"], right, _native.held()]

    return [in_child(work), work()]


def pull_in_new_process(address: str) -> None:
    end = End()
    try:
        code = open_and_link(end, address, 22)["code"]
        right = pull_all(end)
    finally:
        end.close()
    sys.exit(0 if (code, right, _native.held()) == ("LLM_SUCCESS", True, 0) else 1)


def call_in_forked_process(end: End) -> None:
    got = failure(lambda: pull_small(end))
    sys.exit(0 if got["code"] == "LLM_FAILED" and got["hint"] else 1)


def multiprocess(end: End, method: str, address: str) -> Any:
    """Use the engine from a process of multiprocessing: an inherited one (fork), or one of its own (spawn)."""
    context: Any = multiprocessing.get_context(method)
    if method == "fork":
        process = context.Process(target=call_in_forked_process, args=(end,))
    else:
        process = context.Process(target=pull_in_new_process, args=(address,))
    process.start()
    process.join(30)
    if process.exitcode is None:
        process.kill()
        process.join()
        return "hung"
    if method != "fork":
        from multiprocessing import resource_tracker

        resource_tracker._resource_tracker._stop()  # it would outlive the test
    return process.exitcode


# --- the process's own settings


class Sigaction(ctypes.Structure):
    """The head of glibc's struct sigaction."""

    _fields_ = [("handler", ctypes.c_void_p), ("rest", ctypes.c_byte * 248)]


def disposition(number: int) -> int:
    """Return the handler of a signal as the kernel has it: 0 default, 1 ignored, else an address."""
    action = Sigaction()
    ctypes.CDLL(None).sigaction(number, None, ctypes.byref(action))
    return int(action.handler or 0)


# All but those that Go handles and passes on.
OBSERVED = set(signal.Signals) - {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGURG}


def settings() -> dict[str, Any]:
    limit = subprocess.run(["sh", "-c", "ulimit -S -n"], capture_output=True, text=True, check=True).stdout
    return {
        "signals": {signal.Signals(number).name: disposition(number) for number in OBSERVED},
        "python handlers": {signal.Signals(number).name: repr(signal.getsignal(number)) for number in OBSERVED},
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "files of children": int(limit),
        "directory": os.getcwd(),
        "umask": [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Umask")],
        "environment": dict(os.environ),
    }


def on_signal(*_: Any) -> None:
    """A handler that stands for the user's."""


def settings_around_a_life(end: End, address: str, sigpipe: str) -> list[Any]:
    """Compare the settings before the load, with an engine at work, and after finalize."""
    soft = 300
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    chosen = {"ignored": signal.SIG_IGN, "default": signal.SIG_DFL, "handled": on_signal}[sigpipe]
    signal.signal(signal.SIGPIPE, chosen)
    signal.signal(signal.SIGCHLD, on_signal)
    seen = [settings()]
    open_and_link(end, address)
    seen.append(settings())
    pulled = pull_all(end)
    end.close()
    seen.append(settings())
    return [pulled, seen]


def write_to_a_closed_pipe(end: End) -> str:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        os.write(writer, b"x")
    except OSError as exc:
        return type(exc).__name__
    finally:
        os.close(writer)
    return "written"


SO_PROTOCOL = 38


def socket_protocols(end: End) -> list[int]:
    """Return the protocol of each of this process's IPv4 sockets."""
    found = []
    for fd, name in targets().items():
        if name.startswith("socket:"):
            with socket.socket(fileno=os.dup(fd)) as own:
                if own.family == socket.AF_INET:
                    found.append(own.getsockopt(socket.SOL_SOCKET, SO_PROTOCOL))
    return found


# --- the log


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def line_about_a_stranger(end: End, address: str) -> str:
    """Speak HTTP to the engine's own listener, and wait for a line of the log, with no call under way."""
    lines = Lines()
    logger = logging.getLogger("LLM_DATADIST")
    logger.addHandler(lines)
    host, port = address.split(":")
    try:
        with socket.create_connection((host, int(port)), 5) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 10)
            wait_until(lambda: [line for line in lines.lines if "closed a connection from" in line], "a line", 10)
    finally:
        logger.removeHandler(lines)
    return lines.lines[-1]


# --- other interpreters


def init_in_free_threaded_build(end: End) -> dict[str, Any]:
    import sysconfig

    variables = sysconfig.get_config_vars()
    old = variables.get("Py_GIL_DISABLED")
    variables["Py_GIL_DISABLED"] = 1
    try:
        return failure(lambda: LLMDataDist(LLMRole.MIX, 79).init(options()))
    finally:
        variables["Py_GIL_DISABLED"] = old
