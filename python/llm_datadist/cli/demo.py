# SPDX-License-Identifier: Apache-2.0
"""Move a KV cache of a model's size from a prefill process to a decode process, check every byte, and show how fast it was."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from queue import Empty, Queue
from typing import Any

HELP = "two processes, one model's KV cache, every byte checked"

# The file descriptor on which a child reports: its standard output belongs to whatever else wants to print, such as the log.
_REPORT = "LLM_DATADIST_DEMO_REPORT"
_END_SECONDS = 5  # how long a child that was told to end may take
_START_SECONDS = 30  # what a child may take to start and to make its caches, besides --timeout
_TAIL_LINES = 30  # of a failed child's output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mode", choices=("blocks", "contiguous", "both"), default="both", help="kinds of caches (both)")
    parser.add_argument("--layers", type=_positive, default=32, metavar="N", help="layers of the model (32)")
    parser.add_argument("--kv-heads", type=_positive, default=8, metavar="N", help="key/value heads of a layer (8)")
    parser.add_argument("--head-dim", type=_positive, default=128, metavar="N", help="dimensions of a head (128)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp16", help="type of an element (fp16)")
    parser.add_argument("--tokens", type=_positive, default=2048, metavar="N", help="tokens in the cache (2048)")
    parser.add_argument("--block-tokens", type=_positive, default=16, metavar="N", help="tokens of a block (16)")
    parser.add_argument("--transport", choices=("auto", "shm", "tcp"), help="transport to require (auto)")
    parser.add_argument("--timeout", type=_seconds, default=60.0, metavar="S", help="seconds that one step may take (60)")
    parser.add_argument("--role", choices=("prompt", "decoder"), help=argparse.SUPPRESS)  # of a child
    parser.add_argument("--address", help=argparse.SUPPRESS)  # where a decoder finds the prompt


# Names of LLMConfig's DataType and the bytes of an element.
DTYPES = {"fp16": ("DT_FLOAT16", 2), "bf16": ("DT_BF16", 2), "fp32": ("DT_FLOAT", 4), "int8": ("DT_INT8", 1)}


def _positive(text: str) -> int:
    value = int(text)
    if not 0 < value < 1 << 31:
        raise argparse.ArgumentTypeError(f"{value} is not from 1 to {(1 << 31) - 1}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.001 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text} is not from 0.001 to 86400")
    return value


class DemoError(Exception):
    """The demo can't go on. Its text says why, for a person."""


def run(arguments: argparse.Namespace) -> int:
    """Run the demo, or one of its two children."""
    if importlib.util.find_spec("numpy") is None:
        print("demo: numpy is needed: pip install numpy", file=sys.stderr)
        return 2
    if arguments.role is not None:
        from . import demo_roles

        return demo_roles.run(arguments, Reporter())
    started = time.monotonic()
    try:
        results = _Demo(arguments).run()
    except DemoError as exc:
        print(f"demo: FAILED: {exc}")
        return 1
    failed = [row for row in results if row["wrong"] is not None]
    print()
    print(table(results))
    print()
    if failed:
        print(f"demo: FAILED: {len(failed)} of {len(results)} steps did not hold")
        return 1
    moved = sum(row["bytes"] for row in results)
    seconds = time.monotonic() - started
    print(f"demo: everything was verified, {moved:,} bytes in {len(results)} steps, {seconds:.1f} s in all")
    return 0


class Reporter:
    """How a child reports to its parent: JSON, one object a line."""

    def __init__(self) -> None:
        self._out = os.fdopen(int(os.environ[_REPORT]), "w", encoding="utf-8")

    def send(self, event: str, **fields: Any) -> None:
        print(json.dumps({"event": event, **fields}), file=self._out, flush=True)


class Child:
    """One process of the demo. It ends with its parent at the latest: when its standard input ends."""

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
            raise DemoError(f"cannot start the {name} process: {exc}") from None
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
        """Return what the child reports next. DemoError where it dies, or says nothing for so long."""
        try:
            event = self._events.get(timeout=seconds)
        except Empty:
            raise DemoError(f"the {self.name} process reported nothing for {seconds:g} s{self._tail()}") from None
        if event is None:
            raise DemoError(f"the {self.name} process died, {self._ending()}{self._tail()}")
        return event

    def _ending(self) -> str:
        try:
            status = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return "or closed its report"
        return f"killed by signal {-status}" if status < 0 else f"exit status {status}"

    def _tail(self) -> str:
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


class _Demo:
    """The parent: starts both processes, shows their progress, collects the results."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._children: list[Child] = []

    def run(self) -> list[dict[str, Any]]:
        try:
            results = self._talk()
            for child in reversed(self._children):
                status = child.end()
                if status != 0:
                    raise DemoError(f"the {child.name} process ended with status {status}{child._tail()}")
            return results
        finally:
            for child in self._children:
                child.kill()  # does nothing to one that has ended

    def _start(self, role: str, name: str, *more: str) -> Child:
        own = ("mode", "layers", "kv_heads", "head_dim", "dtype", "tokens", "block_tokens", "timeout")
        command = [sys.executable, "-m", "llm_datadist", "demo", "--role", role, *more]
        for option in own:
            command += [f"--{option.replace('_', '-')}", str(getattr(self._arguments, option))]
        if self._arguments.transport:
            command += ["--transport", self._arguments.transport]
        child = Child(name, command)
        self._children.append(child)
        return child

    def _talk(self) -> list[dict[str, Any]]:
        patience = self._arguments.timeout + _START_SECONDS
        prefill = self._start("prompt", "prefill")
        ready = self._follow(prefill, patience)
        decode = self._start("decoder", "decode", "--address", ready["address"])
        results: list[dict[str, Any]] = []
        while True:
            event = self._follow(decode, patience)
            if event["event"] == "end":
                return results
            results.append(event)

    def _follow(self, child: Child, patience: float) -> dict[str, Any]:
        """Show what a child says, up to the next event that is more than talk."""
        while True:
            event = child.next(patience)
            kind = event["event"]
            if kind == "failed":
                raise DemoError(f"the {child.name} process: {event['text']}")
            text = event.get("text")
            if text:
                print(f"[{child.name:7}] {text}", flush=True)
            if kind != "say":
                return event


def table(results: list[dict[str, Any]]) -> str:
    """Return the steps as a table of plain text."""
    cells = [["what", "bytes", "time", "speed", "verified"], *map(_cells, results)]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    lines = []
    for line in cells:
        figures = (figure.rjust(width) for figure, width in zip(line[1:4], widths[1:]))
        lines.append("  ".join([line[0].ljust(widths[0]), *figures, line[4]]))
    lines.insert(1, "  ".join("-" * width for width in (*widths, len("verified"))))
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> list[str]:
    verdict = row["good"] if row["wrong"] is None else f"WRONG: {row['wrong']}"
    size = speed = "-"
    if row["bytes"]:
        size, speed = f"{row['bytes']:,}", f"{row['bytes'] / row['seconds'] / 1e9:.2f} GB/s"
    return [row["what"], size, f"{row['seconds'] * 1e3:.1f} ms", speed, verdict]
