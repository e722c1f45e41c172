# SPDX-License-Identifier: Apache-2.0
"""What is measured against what, and what is asked of it.

A case is a workload over one way to move bytes. Its reference is the better of some candidates of benchmarks/perf; further ones
are measured in the same rounds and only shown, or scale the figures of other libraries.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# The library copies with so many threads where nothing else is asked for, and the references have one or two.
THREADS = min(2, 4, os.cpu_count() or 1)
SPIN_MICROS = 200  # longer than an idle core of a virtual machine takes to wake


@dataclass(frozen=True)
class Way:
    """A transport, where the owner's memory is, and how long a waiting call spins."""

    name: str
    transport: str
    pool: bool
    spin_micros: int = 0


WAYS = {
    way.name: way
    for way in (
        Way("shm-pool", "shm", pool=True),
        Way("shm-private", "shm", pool=False),
        Way("tcp", "tcp", pool=False),
        Way("tcp-spin", "tcp", pool=False, spin_micros=SPIN_MICROS),
    )
}


# The medians of two rounds that came one after the other, in microseconds: the reference's and the library's.
Beside = tuple[float, float]


@dataclass(frozen=True)
class Bar:
    """At most `times` the reference's time and `micros` more. With times 0 the reference does not count."""

    text: str
    times: float = 0.0
    micros: float = 0.0

    def holds(self, micros: float, beside: Sequence[Beside]) -> bool | None:
        """Tell whether a median, or that of rounds side by side, holds it; None where there is nothing to compare with."""
        if not self.times:
            return micros <= self.micros
        if not beside:
            return None
        return statistics.median((self.times * theirs + self.micros) / ours for theirs, ours in beside) >= 1


def _share(share: float) -> Bar:
    return Bar(f"throughput >= {share:g} x reference", 1 / share)


def _times(times: float, micros: float = 0.0) -> Bar:
    more = f" + {micros:g} us" if micros else ""
    return Bar(f"p50 <= {times:g} x reference{more}", times, micros)


def _within(micros: float) -> Bar:
    return Bar(f"p50 <= {micros:g} us", 0.0, micros)


@dataclass(frozen=True)
class Case:
    way: Way
    workload: str
    references: tuple[str, ...]  # the better one counts
    bars: tuple[Bar, ...] = ()
    beside: tuple[str, ...] = ()  # measured too

    @property
    def candidates(self) -> tuple[str, ...]:
        return self.references + self.beside

    @property
    def name(self) -> str:
        return f"{self.way.name} {self.workload}"


def _large(way: str, references: tuple[str, ...], share: float, beside: tuple[str, ...] = ()) -> list[Case]:
    more = tuple(candidate for candidate in beside if candidate not in references)
    return [Case(WAYS[way], workload, references, (_share(share),), more) for workload in ("W1", "W4", "W5")]


CASES = sorted(
    [
        *_large("shm-pool", (f"nt{THREADS}", f"memcpy{THREADS}"), 0.9, beside=("nt2",)),
        Case(WAYS["shm-pool"], "W2", ("nt1", "nt2"), (_times(1.3, 20),)),
        Case(WAYS["shm-pool"], "W3", ("memcpy1",), (_within(10),), ("nt2",)),
        *_large("shm-private", (f"pvr{THREADS}",), 0.95),
        Case(WAYS["shm-private"], "W2", ("pvr1", "pvr2")),
        Case(WAYS["shm-private"], "W3", ("pvr1", "pvr2")),
        *_large("tcp", ("tcp2-cubic",), 0.9),
        Case(WAYS["tcp"], "W2", ("tcp1-cubic",), (_times(1.2),), ("tcp2-cubic",)),
        Case(WAYS["tcp"], "W3", ("pingpong",), (_times(1.2),), ("tcp2-cubic",)),
        Case(WAYS["tcp-spin"], "W2", ("tcp2-cubic",), (_times(1.3),)),
        Case(WAYS["tcp-spin"], "W3", ("pingpong",), (_within(40),), ("tcp2-cubic",)),
    ],
    key=lambda case: (list(WAYS).index(case.way.name), case.workload),
)
