# SPDX-License-Identifier: Apache-2.0
"""What every test has to leave behind as it was, and the ends that several files use."""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from llm_datadist import LLMDataDist, _native
from llm_datadist.utils import log
from peers import End, Peer, wait_until

pytest_plugins = ["natives", "older", "parity"]

hypothesis.settings.register_profile("tests", deadline=None)  # how long an example takes is the machine's affair
hypothesis.settings.load_profile("tests")

# What the Go runtime opens once and keeps: its poller, and files that say how much of the machine it may use.
RUNTIME = ("anon_inode:[eventpoll]", "anon_inode:[eventfd]", "/sys/fs/cgroup/")


def descriptors() -> Counter[str]:
    found: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[f"{fd} -> {os.readlink(f'/proc/self/fd/{fd}')}"] += 1
    return found


def shared_mappings() -> Counter[str]:
    """The mappings of memfds and of shared-memory files."""
    names = (line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines())
    return Counter(name for name in names if name.startswith(("/memfd:", "/dev/shm/")))


def children() -> Counter[str]:
    tasks = Path("/proc/self/task").glob("*/children")
    return Counter(pid for task in tasks for pid in read(task).split())


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # a thread that has ended meanwhile
        return ""


def state() -> dict[str, Counter[str]]:
    return {
        "descriptors": descriptors(),
        "mappings": shared_mappings(),
        "children": children(),
        "threads": Counter(thread.name for thread in threading.enumerate()),
        "shared memory": Counter(glob.glob("/dev/shm/llm*")),
        "kept by the engine": Counter({"objects": _native.held()}),
    }


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    loaded = _native._extension is not None
    before = state()
    yield
    first_load = not loaded and _native._extension is not None

    def extra() -> dict[str, Counter[str]]:
        left = {kind: now - before[kind] for kind, now in state().items()}
        if first_load:
            left["descriptors"] = Counter(name for name in left["descriptors"] if not name.split(" -> ")[1].startswith(RUNTIME))
        return {kind: names for kind, names in left.items() if names}

    try:
        wait_until(lambda: not extra(), "nothing is left", 10)
    except AssertionError:
        pytest.fail(f"left behind: {extra()}")


@pytest.fixture(scope="module", params=["shm", "tcp"])
def transport(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run what depends on it over each transport, which is required of this process and of the peers that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_DATADIST_TRANSPORT", request.param)
        yield request.param


@pytest.fixture(scope="module")
def process(transport: str) -> Iterator[Peer]:
    """The process of the remote end, one for all tests of a module over a transport."""
    with Peer() as peer:
        yield peer


@pytest.fixture
def remote(process: Peer) -> Iterator[Peer]:
    """An end in another process, without an engine yet."""
    yield process
    process.close()


@pytest.fixture
def owner(remote: Peer) -> Peer:
    """The remote end, where its caches are what is pulled from or pushed to."""
    return remote


@pytest.fixture
def local() -> Iterator[End]:
    """An end in the test's own process, without an engine yet."""
    end = End()
    yield end
    end.close()


@pytest.fixture(params=[False, True], ids=["registered", "owned"])
def owned(request: pytest.FixtureRequest) -> bool:
    """Whether a cache is memory of a pool, which peers of one host map, or private memory, which the kernel reads for them."""
    return bool(request.param)


@pytest.fixture
def quiet() -> Iterator[None]:
    """Links that fail are logged as errors, later and from another thread: not between the dots of a test run."""
    logger = log.get_logger()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelname, record.getMessage()))


@pytest.fixture
def lines() -> Iterator[list[tuple[str, str]]]:
    """What the test writes to the log: level and text of each line."""
    logger = log.get_logger()
    handler, level = Lines(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler.lines
    logger.setLevel(level)
    logger.removeHandler(handler)


@pytest.fixture(autouse=True, scope="module")
def a_module_leaves_nothing() -> Iterator[None]:
    with nothing_left():
        yield


@pytest.fixture(autouse=True)
def a_test_leaves_nothing(a_module_leaves_nothing: None) -> Iterator[None]:
    engine = LLMDataDist.llm_engine_instance
    with nothing_left():
        yield
        left = LLMDataDist.llm_engine_instance
        if left is not None and left is not engine:
            left.finalize()
            pytest.fail("the test has left an engine")
