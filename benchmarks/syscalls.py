# SPDX-License-Identifier: Apache-2.0
"""Counts the system calls of a pull with strace, on both ends."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from pair import Pair
from workloads import Workload

_ATTACH_SECONDS = 10
_LEAST_BYTES = 1 << 30  # that are moved under it, so that what is not of a pull's does not count...
_MOST_CALLS = 200  # ... and no more calls than that: each system call takes long under strace
_LEAST_CALLS = 4
_LINE = re.compile(r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)$", re.MULTILINE)


class NotCounted(Exception):
    """The system calls can't be counted here. Its text says why."""


class _Strace:
    """strace on all threads of one process."""

    def __init__(self, pid: int, folder: Path) -> None:
        self._pid, self._output, self._complaint = pid, folder / str(pid), folder / f"{pid}.err"
        with self._complaint.open("w") as errors:
            self._process = subprocess.Popen(
                ["strace", "-c", "-f", "-o", str(self._output), "-p", str(pid)],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
            )

    def wait(self) -> None:
        """Wait until every thread is traced."""
        deadline = time.monotonic() + _ATTACH_SECONDS
        while not all(_is_traced(task) for task in Path(f"/proc/{self._pid}/task").iterdir()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise NotCounted(f"strace could not attach: {self._complaint.read_text().strip() or 'no reason given'}")
            time.sleep(0.01)

    def end(self) -> Counter[str]:
        """Detach, and return how often each system call was made."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        self._process.wait()
        return counts(self._output.read_text() if self._output.exists() else "")


def _is_traced(task: Path) -> bool:
    try:
        text = (task / "status").read_text()
    except OSError:  # the thread has ended meanwhile
        return True
    return re.search(r"^TracerPid:\s+[1-9]", text, re.MULTILINE) is not None


def counts(printed: str) -> Counter[str]:
    """Return the column of calls of what `strace -c` prints."""
    return Counter({name: int(calls) for calls, name in _LINE.findall(printed) if name != "total"})


def per_pull(pair: Pair, workload: Workload) -> dict[str, dict[str, float]]:
    """Return, for each end, how often a pull makes each system call.

    As many pulls are made under strace as their size allows; then none, to know what strace itself and the commands cost.
    """
    if shutil.which("strace") is None:
        raise NotCounted("strace is not there")
    calls = max(_LEAST_CALLS, min(_MOST_CALLS, _LEAST_BYTES // workload.call_bytes))
    some = _count(pair, replace(workload, warmup=0, calls=calls))
    none = _count(pair, replace(workload, warmup=0, calls=0))
    # The subtraction of Counters keeps what is positive.
    return {end: {name: round(count / calls, 3) for name, count in (some[end] - none[end]).items()} for end in some}


def _count(pair: Pair, workload: Workload) -> dict[str, Counter[str]]:
    with tempfile.TemporaryDirectory() as folder:
        straces = {"puller": _Strace(pair.puller.pid, Path(folder)), "owner": _Strace(pair.owner.pid, Path(folder))}
        try:
            for strace in straces.values():
                strace.wait()
            pair.round(workload)
        finally:
            counted = {end: strace.end() for end, strace in straces.items()}
        return counted


def show(counted: dict[str, dict[str, float]], most: int = 3) -> str:
    """Return the sums and the most frequent calls as text."""
    parts = []
    for end, names in counted.items():
        often = sorted(names.items(), key=lambda item: -item[1])[:most]
        words = ", ".join(f"{name} {count:.3g}" for name, count in often if count >= 0.05)
        parts.append(f"{end} {sum(names.values()):.1f}" + (f" ({words})" if words else ""))
    return "; ".join(parts)
