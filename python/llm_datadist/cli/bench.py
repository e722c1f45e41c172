# SPDX-License-Identifier: Apache-2.0
"""Measure pulls between HOST caches of two processes against plain copies of the same segments in one, and check every byte."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any, Callable

from .. import __version__
from . import options, tables
from .children import ChildError, Children, Reporter
from .workloads import Shape, Workload

HELP = "how fast pulls are here, beside plain copies"

MEMORIES = ("pool", "registered")
_START_SECONDS = 60  # what a child may take to start and to fill its caches, besides --timeout


# The calls of docs/performance.md, on smaller caches: half a GiB is enough for both processes.
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("paged", Shape(64, 32 << 10, 32), 16, 3, 12),  # many scattered blocks of a model with 32 layers
        Workload("block", Shape(64, 32 << 10, 32), 1, 25, 100),  # one block of each of its tensors
        Workload("tiny", Shape(1, 16 << 10, 512), 1, 125, 500),  # one block of one tensor
        Workload("row", Shape(4, 16 << 20, 1), 1, 2, 8),  # a contiguous cache
        Workload("latent", Shape(61, 144 << 10, 8), 4, 3, 12),  # scattered blocks of a model with latent attention
    )
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ",".join(WORKLOADS)
    options.add_transport(parser)
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
    options.add_timeout(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    options.add_role(parser, "owner", "puller")


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
    return options.count(text, 1000)


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark, or one of its two children."""
    if not options.has_numpy("bench"):
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
    except ChildError as exc:
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

    def run(self) -> list[dict[str, Any]]:
        """Measure all workloads and return a row for each."""
        passed_on = options.again(self._arguments, "workloads", "rounds", "transport", "timeout")
        with Children("bench", ["--memory", self._memory, *passed_on]) as children:
            return self._talk(children)

    def _talk(self, children: Children) -> list[dict[str, Any]]:
        patience = self._arguments.timeout + _START_SECONDS
        owner = children.start("owner", "owner")
        ready = owner.next(patience)
        puller = children.start("puller", "puller", ready["address"])
        rows: list[dict[str, Any]] = []
        while True:
            event = puller.next(patience)
            if event.pop("event") == "end":
                return rows
            print(f"{event['workload']} from {event['memory']} memory over {event['transport']}: {_speed(event)}", flush=True)
            rows.append(event)


def _speed(row: dict[str, Any]) -> str:
    return f"{row['p50_us']:,.1f} us" if WORKLOADS[row["workload"]].is_small else f"{row['gb_per_s']:.2f} GB/s"


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


def table(rows: list[dict[str, Any]]) -> str:
    """Return the figures as a table of plain text."""
    figures = tables.plain(_HEAD, [_cells(row) for row in rows], 3)
    return f"{figures}\ncopy: the same segments within one process, memmove on one thread; ratio: its time to that of the pull"


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
