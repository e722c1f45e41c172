# SPDX-License-Identifier: Apache-2.0
"""What other libraries do with the same workloads, scaled to the machine of this run.

The figures were measured on a machine of this kind on 2026-11-23, with C++ programs around each library; only what they are
relative to a reference of that day says anything here. So each is multiplied by what the same reference does now over what it did
then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SOURCE = "figures measured on a machine of this kind on 2026-11-23"

# The references of that day. GB/s for the large workloads, the median in microseconds for the small ones.
_THEN = {
    "nt2": {"W1": 17.2, "W2": 143.0, "W3": 1.1, "W4": 19.5, "W5": 18.3},
    "tcp2-cubic": {"W1": 6.2, "W2": 353.0, "W3": 23.0, "W4": 7.3, "W5": 6.3},
}
_SMALL = ("W2", "W3")


@dataclass(frozen=True)
class Library:
    name: str
    ways: tuple[str, ...]  # of ours that it is compared with: the first that was measured
    scale: str  # the reference that scales it
    figures: Mapping[str, float]
    cpu: str


def _library(name: str, ways: tuple[str, ...], scale: str, cpu: str, *figures: float | None) -> Library:
    known = {workload: figure for workload, figure in zip(("W1", "W2", "W3", "W4", "W5"), figures) if figure is not None}
    return Library(name, ways, scale, known, cpu)


def _shm(name: str, cpu: str, *figures: float | None) -> Library:
    return _library(name, ("shm-pool",), "nt2", cpu, *figures)


def _tcp(name: str, *figures: float | None) -> Library:
    """These spin, on both cores: so does ours where it can."""
    return _library(name, ("tcp-spin", "tcp"), "tcp2-cubic", "both cores", *figures)


# In the order of the workloads; None: not measured, or (UCX, W3) a bare copy through a mapped pointer, which is no call.
LIBRARIES = (
    _shm("NIXL 2026-08 over UCX, one host", "both cores, all the time", 3.3, 672, 6.8, 5.5, 4.2),
    _shm("the same with its progress thread", "both cores", 1.7, 679, 8.2, 3.9, 2.5),
    _shm("UCX get through rkey_ptr", "1.3 cores", 4.7, 879, None, 12.6, 6.1),
    _shm("Mooncake TENT, shared memory", "1.3 cores", 5.6, 432, 4.3, 11.4, 7.1),
    _tcp("NIXL over UCX tcp", 0.64, 2783, 52, 0.88, 0.73),
    _tcp("Mooncake Transfer Engine tcp", 0.62, 2661, 93, 1.30, 1.46),
    _tcp("Mooncake TENT tcp", 0.33, 7360, 191, 0.24, None),
)


@dataclass(frozen=True)
class Comparison:
    name: str
    workload: str
    unit: str  # of the figures: GB/s or us
    then: float
    scaled: float
    ours: float
    way: str

    @property
    def ahead(self) -> bool:
        return self.ours < self.scaled if self.unit == "us" else self.ours > self.scaled


def compare(
    micros: Mapping[str, float], references: Mapping[str, Mapping[str, float]], sizes: Mapping[str, int]
) -> list[Comparison]:
    """Compare what was measured.

    micros has our median of each "way workload", references that of "candidate" and workload, sizes the bytes of a call.
    """
    return [
        compared
        for library in LIBRARIES
        for workload, figure in library.figures.items()
        if (compared := _compare(library, workload, figure, micros, references, sizes)) is not None
    ]


def _compare(
    library: Library,
    workload: str,
    figure: float,
    micros: Mapping[str, float],
    references: Mapping[str, Mapping[str, float]],
    sizes: Mapping[str, int],
) -> Comparison | None:
    way = next((way for way in library.ways if f"{way} {workload}" in micros), None)
    now = references.get(library.scale, {}).get(workload)
    if way is None or now is None:
        return None
    ours, then = micros[f"{way} {workload}"], _THEN[library.scale][workload]
    if workload in _SMALL:
        return Comparison(library.name, workload, "us", figure, figure * now / then, ours, way)
    gigabytes = sizes[workload] / 1e3  # a call of so many bytes in a microseconds is bytes / a / 1000 GB/s
    return Comparison(library.name, workload, "GB/s", figure, figure * (gigabytes / now) / then, gigabytes / ours, way)
