# SPDX-License-Identifier: Apache-2.0
"""Measure pulls between two processes of this machine against plain copies of the same segments in one, and check every byte."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

from .. import __version__
from .demo import Child, DemoError, Reporter

HELP = "how fast pulls are here, beside plain copies"

MEMORIES = ("pool", "registered")
_START_SECONDS = 60  # what a child may take to start and to fill its caches, besides --timeout


@dataclass(frozen=True)
class Workload:
    """A call pulls per_call random blocks of every tensor. One block is the whole tensor of a contiguous cache."""

    name: str
    about: str
    tensors: int
    block_bytes: int
    blocks: int
    per_call: int
    calls: int  # of a round

    @property
    def is_row(self) -> bool:
        return self.blocks == 1

    @property
    def tensor_bytes(self) -> int:
        return self.blocks * self.block_bytes

    @property
    def segments(self) -> int:
        return self.tensors * self.per_call

    @property
    def call_bytes(self) -> int:
        return self.segments * self.block_bytes


# The calls of docs/performance.md, on smaller caches: half a GiB is enough for both processes.
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("paged", "many scattered blocks of a model with 32 layers", 64, 32 << 10, 32, 16, 12),
        Workload("block", "one block of each of its tensors", 64, 32 << 10, 32, 1, 100),
        Workload("tiny", "one block of one tensor", 1, 16 << 10, 512, 1, 500),
        Workload("row", "a contiguous cache", 4, 16 << 20, 1, 1, 8),
        Workload("latent", "scattered blocks of a model with latent attention", 61, 144 << 10, 8, 4, 12),
    )
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ",".join(WORKLOADS)
    parser.add_argument("--transport", choices=("auto", "shm", "tcp"), help="transport to require (auto)")
    parser.add_argument(
        "--workloads", type=_some_of(tuple(WORKLOADS)), default=list(WORKLOADS), metavar="LIST", help=f"some of {names} (all)"
    )
    parser.add_argument(
        "--memory",
        type=_some_of(MEMORIES),
        default=list(MEMORIES),
        metavar="LIST",
        help="of the caches: a memory pool's, registered memory of the caller's own, or both (pool,registered)",
    )
    parser.add_argument("--rounds", type=_rounds, default=3, metavar="N", help="of pulls and of copies, in turns (3)")
    parser.add_argument("--timeout", type=_seconds, default=60.0, metavar="S", help="seconds that one step may take (60)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--role", choices=("owner", "puller"), help=argparse.SUPPRESS)  # of a child
    parser.add_argument("--address", help=argparse.SUPPRESS)  # where a puller finds the owner


def _some_of(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Return the type of an option that lists some of what is known."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return [name for name in known if name in names]

    return read


def _rounds(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"{value} is not from 1 to 1000")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.001 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text} is not from 0.001 to 86400")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark, or one of its two children."""
    if importlib.util.find_spec("numpy") is None:
        print("bench: numpy is needed: pip install numpy", file=sys.stderr)
        return 2
    if arguments.json is not None and not arguments.json.parent.is_dir():
        print(f"bench: there is no folder {arguments.json.parent}", file=sys.stderr)
        return 2
    if arguments.role is not None:
        from . import bench_roles

        return bench_roles.run(arguments, Reporter())
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    try:
        for memory in arguments.memory:
            rows += _Pair(arguments, memory).run()
    except DemoError as exc:
        print(f"bench: FAILED: {exc}")
        return 1
    print()
    print(table(rows))
    print()
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(_document(arguments, rows), indent=1) + "\n", encoding="utf-8")
    wrong = [row for row in rows if row["wrong"] is not None]
    if wrong:
        print(f"bench: FAILED: {len(wrong)} of {len(rows)} workloads brought wrong bytes")
        return 1
    print(
        f"bench: every byte was verified, {sum(row['calls'] for row in rows):,} pulls over {_transports(rows)}, "
        f"{time.monotonic() - started:.1f} s in all"
    )
    return 0


class _Pair:
    """Two children, whose caches lie in one kind of memory."""

    def __init__(self, arguments: argparse.Namespace, memory: str) -> None:
        self._arguments = arguments
        self._memory = memory
        self._children: list[Child] = []

    def run(self) -> list[dict[str, Any]]:
        """Measure all workloads and return a row for each."""
        try:
            rows = self._talk()
            for child in reversed(self._children):
                status = child.end()
                if status != 0:
                    raise DemoError(f"the {child.name} process ended with status {status}")
            return rows
        finally:
            for child in self._children:
                child.kill()  # does nothing to one that has ended

    def _talk(self) -> list[dict[str, Any]]:
        patience = self._arguments.timeout + _START_SECONDS
        owner = self._start("owner")
        ready = _follow(owner, patience)
        puller = self._start("puller", "--address", ready["address"])
        rows: list[dict[str, Any]] = []
        while True:
            event = _follow(puller, patience)
            if event.pop("event") == "end":
                return rows
            print(f"{event['workload']} from {event['memory']} memory over {event['transport']}: {_speed(event)}", flush=True)
            rows.append(event)

    def _start(self, role: str, *more: str) -> Child:
        arguments = self._arguments
        command = [sys.executable, "-m", "llm_datadist", "bench", "--role", role, "--memory", self._memory, *more]
        command += ["--workloads", ",".join(arguments.workloads), "--rounds", str(arguments.rounds)]
        command += ["--timeout", str(arguments.timeout)]
        if arguments.transport:
            command += ["--transport", arguments.transport]
        child = Child(role, command)
        self._children.append(child)
        return child


def _follow(child: Child, patience: float) -> dict[str, Any]:
    event = child.next(patience)
    if event["event"] == "failed":
        raise DemoError(f"the {child.name} process: {event['text']}")
    return event


def _speed(row: dict[str, Any]) -> str:
    if row["bytes"] < 16 << 20:
        return f"{row['p50_us']:,.1f} us"
    return f"{row['gb_per_s']:.2f} GB/s"


def _transports(rows: list[dict[str, Any]]) -> str:
    return " and ".join(dict.fromkeys(row["transport"] for row in rows))


def _document(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "version": __version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "rounds": arguments.rounds,
        "results": rows,
    }


_HEAD = ("what", "memory", "transport", "bytes", "GB/s", "p50 us", "p99 us", "copy GB/s", "ratio", "verified")
_LEFT = 3  # columns of words


def table(rows: list[dict[str, Any]]) -> str:
    """Return the figures as a table of plain text."""
    cells = [_HEAD, *map(_cells, rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEAD))]
    lines = []
    for line in cells:
        words = [cell.ljust(width) for cell, width in zip(line[:_LEFT], widths)]
        figures = [cell.rjust(width) for cell, width in zip(line[_LEFT:-1], widths[_LEFT:])]
        lines.append("  ".join([*words, *figures, line[-1]]))
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines.append("copy: the same segments within one process, memmove on one thread; ratio: its time to that of the pull")
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["workload"],
        row["memory"],
        row["transport"],
        f"{row['bytes']:,}",
        f"{row['gb_per_s']:.2f}",
        f"{row['p50_us']:,.1f}",
        f"{row['p99_us']:,.1f}",
        f"{row['copy_gb_per_s']:.2f}",
        f"{row['ratio']:.2f}",
        "every byte" if row["wrong"] is None else f"WRONG: {row['wrong']}",
    )
