# SPDX-License-Identifier: Apache-2.0
"""How the cost of a pull grows: with its segments, their size, and the callers; and what links cost, by benchmarks/links."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cases import Way
from ends import Setting
from pair import NotBuilt, Pair, Round, linked
from samples import Samples, quantile
from workloads import Shape, Workload

Point = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent

_TENSORS = 64
_SEGMENT_BYTES = 4 << 10
_SIZED_BYTES = 64 << 20  # that a call moves while the size of its segments changes
_POINT_BYTES = 1 << 30  # that a point moves...
_MOST_CALLS = 300  # ... with no more calls than that
_LEAST_CALLS = 5
_TRIES = 3  # for a round that is quiet
_LINK_SECONDS = 120  # for one run of benchmarks/links

SEGMENTS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
SIZES = tuple((4 << 10) << 2 * step for step in range(7))  # to 16 MiB
CALLERS = (1, 2, 4, 8, 16)
LINKS = (1, 32, 512)
FABRIC_LINKS = (512, 4096)


def _calls(call_bytes: int) -> int:
    return max(_LEAST_CALLS, min(_MOST_CALLS, _POINT_BYTES // call_bytes))


def by_segments(counts: Iterable[int] = SEGMENTS) -> list[Workload]:
    """Return calls with so many scattered segments of 4 KiB: up to 64 one of each tensor, then more of each."""
    counts = list(counts)
    shape = Shape(_TENSORS, _SEGMENT_BYTES, max(2, 2 * max(counts) // _TENSORS))
    return [
        Workload(str(count), shape, max(1, count // _TENSORS), 2, _calls(count * _SEGMENT_BYTES), min(count, _TENSORS))
        for count in counts
    ]


def by_size(sizes: Iterable[int] = SIZES) -> list[Workload]:
    """Return calls of 64 MiB in scattered segments of so many bytes, half the blocks of a cache each."""
    workloads = []
    for size in sizes:
        segments = _SIZED_BYTES // size
        tensors = min(segments, _TENSORS)
        per_call = segments // tensors
        workloads.append(Workload(str(size), Shape(tensors, size, 2 * per_call), per_call, 2, _calls(_SIZED_BYTES)))
    return workloads


# What callers pull at once: a block of each tensor of a model, and a single one.
_CALLED = (
    Workload("2 MiB", Shape(_TENSORS, 32 << 10, 64), 1, 20, 60),
    Workload("16 KiB", Shape(1, 16 << 10, 512), 1, 100, 500),
)


def grow(way: Way, segments: Sequence[int] = SEGMENTS, sizes: Sequence[int] = SIZES, callers: Sequence[int] = CALLERS) -> Point:
    """Measure how the cost of a pull over one way grows. `skipped` says why that can't be."""
    counted, sized = by_segments(segments), by_size(sizes)
    shapes = (counted[0].shape, *(workload.shape for workload in sized), *(workload.shape for workload in _CALLED))
    print(f"scaling over {way.name} ...", flush=True)
    try:
        with linked(Setting(way.transport, way.pool, shapes, way.spin_micros)) as pair:

            for model, workload in enumerate(sized, start=1):
                pair.verify(workload, model)
            pair.verify(counted[-1], 0)
            return {
                "way": way.name,
                "segments": [{"segments": workload.segments, **_round(pair, workload, 0)} for workload in counted],
                "sizes": [
                    {"bytes": int(workload.name), **_round(pair, workload, model)}
                    for model, workload in enumerate(sized, start=1)
                ],
                "callers": [
                    {"callers": of, "call": workload.name, **_together(pair, workload, model, of)}
                    for model, workload in enumerate(_CALLED, start=1 + len(sized))
                    for of in callers
                ],
            }
    except NotBuilt as exc:
        return {"way": way.name, "skipped": str(exc)}


def _round(pair: Pair, workload: Workload, model: int) -> Point:
    """Return the round with the least spread of up to three: what is one of many points has no other to be pooled with."""
    rounds: list[tuple[float, Samples, Round]] = []
    while len(rounds) < _TRIES and not any(samples.rounds for _, samples, _ in rounds):
        samples, done = Samples(), pair.round(workload, model)
        rounds.append((samples.add(done.nanos), samples, done))
    spread, _, done = min(rounds, key=lambda each: each[0])
    median = quantile(sorted(done.nanos), 0.5)
    return {
        "p50_us": median / 1e3,
        "gb_per_s": workload.call_bytes / median,
        "cpu_seconds_per_gib": done.cpu_seconds / (done.bytes / 2**30),
        "spread": spread,
    }


def _together(pair: Pair, workload: Workload, model: int, callers: int) -> Point:
    nanos, seconds = pair.together(workload, model, callers)
    return {"p50_us": quantile(sorted(nanos), 0.5) / 1e3, "calls_per_s": len(nanos) / seconds}


def links(
    into: Path, transports: Iterable[str], counts: Iterable[int] = LINKS, fabric: Iterable[int] = FABRIC_LINKS
) -> list[Point]:
    """Build benchmarks/links and run it for each number of links; over the fabric in one process."""
    if shutil.which("go") is None:
        return [{"skipped": "links: go is not there"}]
    program = into / "links"
    built = subprocess.run(["go", "build", "-o", str(program), "./benchmarks/links"], cwd=ROOT, capture_output=True, text=True)
    if built.returncode != 0:
        return [{"skipped": f"links: {built.stderr.strip()}"}]
    runs = [["-transport", transport, "-links", str(count)] for transport in transports for count in counts]
    runs += [["-fabric", "-links", str(count)] for count in fabric]
    return [_links(program, arguments) for arguments in runs]


def _links(program: Path, arguments: list[str]) -> Point:
    what = f"links {' '.join(arguments)}"
    print(f"{what} ...", flush=True)
    try:
        done = subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=_LINK_SECONDS)
    except subprocess.TimeoutExpired:
        return {"skipped": f"{what}: not done after {_LINK_SECONDS} s"}
    if done.returncode != 0:
        return {"skipped": f"{what}: {done.stderr.strip()}"}
    point: Point = json.loads(done.stdout)
    return {"skipped": f"{what}: {point['refused']}"} if "refused" in point else point
