# SPDX-License-Identifier: Apache-2.0
"""The child processes of a verb: how the parent starts them, hears of them and ends them, and how they report to it.

A child is the same command with --role. Its standard input tells it to end, and it reports on a file descriptor of its own: its
standard output belongs to whatever else wants to print, such as the log.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from queue import Empty, Queue
from types import TracebackType
from typing import Any

_REPORT = "LLM_DATADIST_CHILD_REPORT"  # names the file descriptor
_END_SECONDS = 5  # how long a child that was told to end may take
_TAIL_LINES = 30  # of a failed child's output


class ChildError(Exception):
    """A child did not do its part, and the parent can't go on. Its text says why, for a person."""


class Children:
    """The processes of one verb, which have the same options.

    At the end of the with statement they end, the last one first; ChildError is raised where one does not end well. An exception
    that leaves the statement kills them.
    """

    def __init__(self, verb: str, options: Sequence[str]) -> None:
        self._command = [sys.executable, "-m", "llm_datadist", verb, *options]
        self._children: list[Child] = []

    def start(self, name: str, role: str, address: str | None = None) -> Child:
        """Start the child that plays a role. name is what messages call it, address where it finds another one."""
        command = [*self._command, "--role", role]
        if address is not None:
            command += ["--address", address]
        child = Child(name, command)
        self._children.append(child)
        return child

    def __enter__(self) -> Children:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._end()
        finally:
            for child in self._children:
                child.kill()  # does nothing to one that has ended

    def _end(self) -> None:
        for child in reversed(self._children):
            status = child.end()
            if status != 0:
                raise ChildError(f"the {child.name} process ended with status {status}{child.tail()}")


class Child:
    """One process. It ends with its parent at the latest: when its standard input ends."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self._events: Queue[dict[str, Any] | None] = Queue()  # None: there will be no more
        self._output: list[str] = []
        reading, writing = os.pipe()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                pass_fds=(writing,),
                env={**os.environ, _REPORT: str(writing), "PYTHONUNBUFFERED": "1"},
            )
        except OSError as exc:
            os.close(reading)
            raise ChildError(f"cannot start the {name} process: {exc}") from None
        finally:
            os.close(writing)
        self._readers = [
            threading.Thread(target=self._read_events, args=(reading,), daemon=True),
            threading.Thread(target=self._read_output, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read_events(self, descriptor: int) -> None:
        with os.fdopen(descriptor, encoding="utf-8") as events:
            for line in events:
                self._events.put(json.loads(line))
        self._events.put(None)

    def _read_output(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._output.append(line.rstrip("\n"))
            del self._output[:-_TAIL_LINES]

    def next(self, seconds: float) -> dict[str, Any]:
        """Return what the child reports next. ChildError where that is a failure, or it dies, or says nothing for so long."""
        try:
            event = self._events.get(timeout=seconds)
        except Empty:
            raise ChildError(f"the {self.name} process reported nothing for {seconds:g} s{self.tail()}") from None
        if event is None:
            raise ChildError(f"the {self.name} process died, {self._ending()}{self.tail()}")
        if event["event"] == "failed":
            raise ChildError(f"the {self.name} process: {event['text']}")
        return event

    def _ending(self) -> str:
        try:
            status = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return "or closed its report"
        return f"killed by signal {-status}" if status < 0 else f"exit status {status}"

    def tail(self) -> str:
        """Return the last that the child printed, as the end of a message."""
        self._readers[1].join(0.2)
        return "; its last output:\n" + "\n".join(f"  | {line}" for line in self._output) if self._output else ""

    def end(self) -> int:
        """Let the child end, make it where it does not, and return its exit status."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it is gone already
            self._process.stdin.close()
        for insist in (self._process.terminate, self._process.kill):
            try:
                return self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                insist()
        return self._process.wait()

    def kill(self) -> None:
        """End the child at once, if it lives, and close what is open to it."""
        self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join(_END_SECONDS)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


class Reporter:
    """How a child reports to its parent: JSON, one object a line."""

    def __init__(self) -> None:
        self._out = os.fdopen(int(os.environ[_REPORT]), "w", encoding="utf-8")

    def send(self, event: str, **fields: Any) -> None:
        print(json.dumps({"event": event, **fields}), file=self._out, flush=True)
