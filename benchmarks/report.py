# SPDX-License-Identifier: Apache-2.0
"""Turns results into tables: of plain text for the terminal, and in the form of docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import libraries
import machine
import syscalls

Results = dict[str, Any]

MOST_KIB = 64  # of resident memory that an idle link may take
_MOST_SECONDS = 5  # in which 512 links are made
_MEASURED_LINKS = 512  # fewer say little: what the process touches once is divided by too few

PLOTS = {
    "pulls": "Pulls against their references",
    "segments": "Time of a pull by the number of its segments (4 KiB each)",
    "sizes": "Throughput of a pull of 64 MiB by the size of its segments",
    "callers": "Pulls from several threads at once",
    "links": "Links to engines of a second process",
}


@dataclass
class Table:
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    plot: str = ""  # the name of the plot of the same figures

    def text(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows)]
        lines = [self._line(row, widths) for row in (self.head, *self.rows)]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([f"{self.title}", *lines, *([self.note] if self.note else [])])

    @staticmethod
    def _line(row: Sequence[str], widths: Sequence[int]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()

    def markdown(self, plots: str) -> str:
        lines = [f"### {self.title}", ""]
        if self.note:
            lines += [self.note, ""]
        lines += [f"| {' | '.join(self.head)} |", "|" + "---|" * len(self.head)]
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        if self.plot and plots:
            lines += ["", f"![{PLOTS[self.plot]}]({plots}/{self.plot}.svg)"]
        return "\n".join(lines)


def text(results: Results) -> str:
    """Return all tables as plain text."""
    return "\n\n".join(table.text() for table in _tables(results))


def markdown(results: Results, plots: str) -> str:
    """Return all tables in the form of docs/performance.md; plots is their folder as the page names it, "" for none."""
    head = f"{results['rounds']} rounds each on {machine.sentence(results['machine'])}:"
    return "\n\n".join([head, *(table.markdown(plots) for table in _tables(results))]) + "\n"


def summary(results: Results) -> str:
    """Return the last line: what happened."""
    bars = [bar["holds"] for row in results["pulls"] for bar in row.get("bars", ())]
    bars += [holds for point in results["links"] if "skipped" not in point for holds in _asked(point).values()]
    noisy = sum("noisy" in row for row in results["pulls"])
    parts = [f"{sum(holds is True for holds in bars)} of {len(bars)} bars hold"]
    parts += [f"without a reference: {bars.count(None)}"] if None in bars else []
    parts += [f"cases without a quiet round: {noisy}"] if noisy else []
    parts += ["some parts were skipped, see above"] if _skipped(results) else []
    return "bench: every byte was verified; " + ", ".join(parts)


def _tables(results: Results) -> Iterator[Table]:
    pulls = [row for row in results["pulls"] if "skipped" not in row]
    if pulls:
        yield _pulls(pulls, results.get("go", {}))
        yield _costs(pulls)
    compared = _compared(results)
    if compared:
        yield _libraries(compared)
    grown = [grow for grow in results["scaling"] if "skipped" not in grow]
    if grown:
        yield _grown("Segments", "segments", "segments", grown, "p50_us")
        yield _grown("Size of a segment", "sizes", "bytes", grown, "gb_per_s")
        yield _callers(grown)
    links = [point for point in results["links"] if "skipped" not in point]
    if links:
        yield _links(links)
    skipped = _skipped(results)
    if skipped:
        yield Table("Skipped", ["what", "why"], skipped)


def _skipped(results: Results) -> list[Sequence[str]]:
    """Return what was skipped and why, each reason once."""
    why: dict[str, list[str]] = {}
    for row in results["pulls"]:
        if "skipped" in row:
            why.setdefault(row["skipped"], []).append(row["case"])
    for grow in results["scaling"]:
        if "skipped" in grow:
            why.setdefault(grow["skipped"], []).append(f"scaling over {grow['way']}")
    for point in results["links"]:
        if "skipped" in point:
            what, _, reason = point["skipped"].partition(": ")
            why.setdefault(reason, []).append(what)
    return [(", ".join(names), reason) for reason, names in why.items()]


def _pulls(rows: list[Results], go: dict[str, float]) -> Table:
    notes = []
    boundary = next((row["boundary_us"] for row in rows if "boundary_us" in row), None)
    if boundary is not None:
        notes.append(f"The boundary, a one-block `pull_blocks` without its transfer, took {boundary:.1f} us.")
    notes += [f"{name}, the engine's call in Go: {nanos / 1e3:.2f} us." for name, nanos in go.items()]
    thrown = sum(row["thrown_away"] + sum(one["thrown_away"] for one in row["candidates"].values()) for row in rows)
    notes.append(f"Rounds that were thrown away because their p90 was over 3 times their p10: {thrown}.")
    head = ["", "GB/s", "p50 us", "p99 us", "reference", "GB/s", "p50 us", "ratio", "asked", "holds"]
    return Table("Pulls", head, [_pull(row) for row in rows], " ".join(notes), plot="pulls")


def _pull(row: Results) -> Sequence[str]:
    theirs = [row.get("no_reference", "-"), "-", "-"]
    if "reference" in row:
        theirs = [row["reference"], f"{row['reference_gb_per_s']:.2f}", micros(row["reference_p50_us"])]
    if "noisy" in row:
        return [row["case"], "no quiet round", f"({micros(row['noisy_p50_us'])})", "-", *theirs, "-", "-", "-"]
    ratio = f"{row['ratio']:.2f}" if "ratio" in row else "-"
    asked = "; ".join(bar["text"] for bar in row["bars"]) or "-"
    holds = "; ".join({True: "yes", False: "NO", None: "no reference"}[bar["holds"]] for bar in row["bars"]) or "-"
    return [row["case"], f"{row['gb_per_s']:.2f}", micros(row["p50_us"]), micros(row["p99_us"]), *theirs, ratio, asked, holds]


def _costs(rows: list[Results]) -> Table:
    note = (
        "CPU: of both processes. System calls: of a pull, with the three most frequent ones. strace makes each of them slow, so "
        "there is more of the waiting (`nanosleep`, `futex`) in these than without it."
    )
    return Table("What a pull costs", ["", "CPU s per GiB", "cores", "system calls"], [_cost(row) for row in rows], note)


def _cost(row: Results) -> Sequence[str]:
    counted = row.get("syscalls_reason", "not counted")
    if "syscalls" in row:
        counted = syscalls.show(row["syscalls"])
    if "noisy" in row:
        return [row["case"], "-", "-", counted]
    return [row["case"], f"{row['cpu_seconds_per_gib']:.3f}", f"{row['cores_used']:.2f}", counted]


def _compared(results: Results) -> list[libraries.Comparison]:
    rows = [row for row in results["pulls"] if "p50_us" in row]
    ours = {row["case"]: row["p50_us"] for row in rows}
    in_go = results.get("go", {}).get("PullTiny/pool")
    if in_go is not None:
        ours["shm-pool W3"] = in_go / 1e3
    now: dict[str, dict[str, float]] = {}
    for row in rows:
        for candidate, figures in row["candidates"].items():
            if "p50_us" in figures:
                now.setdefault(candidate, {}).setdefault(row["workload"], figures["p50_us"])
    return libraries.compare(ours, now, {row["workload"]: row["bytes"] for row in rows})


def _libraries(compared: list[libraries.Comparison]) -> Table:
    workloads = sorted({row.workload for row in compared})
    units = {row.workload: row.unit for row in compared}
    cells = {(row.name, row.workload): row for row in compared}
    rows = []
    for name in dict.fromkeys(row.name for row in compared):
        found = [cells.get((name, workload)) for workload in workloads]
        rows.append([name, *(_verdict(row) if row else "-" for row in found)])
    note = (
        f"Their figures are scaled to this machine ({libraries.SOURCE}, times what the same reference does now over what it did "
        "then); in brackets where this library is, and by how much. W3 of shm is the engine's call in Go where that was "
        "measured; UCX with rkey_ptr has no figure there, since its W3 is a bare copy through a mapped pointer."
    )
    return Table("Other libraries", ["", *(f"{workload} {units[workload]}" for workload in workloads)], rows, note)


def _verdict(row: libraries.Comparison) -> str:
    theirs = micros(row.scaled) if row.unit == "us" else f"{row.scaled:.2f}"
    factor = row.scaled / row.ours if row.unit == "us" else row.ours / row.scaled
    return f"{theirs} (ahead {factor:.1f} x)" if row.ahead else f"{theirs} (BEHIND {1 / factor:.1f} x)"


def _grown(title: str, key: str, by: str, grown: list[Results], what: str) -> Table:
    note = PLOTS[key] + (", in microseconds (p50)." if what == "p50_us" else ", in GB/s.")
    rows = []
    for index, first in enumerate(grown[0][key]):
        points = [grow[key][index] for grow in grown]
        label = short(first[by]) if by == "bytes" else f"{first[by]:,}"
        rows.append([label, *(micros(one[what]) if what == "p50_us" else f"{one[what]:.2f}" for one in points)])
    return Table(title, [by if by != "bytes" else "segment", *(grow["way"] for grow in grown)], rows, note, plot=key)


def _callers(grown: list[Results]) -> Table:
    rows = []
    for index, first in enumerate(grown[0]["callers"]):
        points = [grow["callers"][index] for grow in grown]
        cells = (f"{one['calls_per_s']:,.0f} / {micros(one['p50_us'])}" for one in points)
        rows.append([f"{first['callers']} of {first['call']}", *cells])
    note = "Threads of one Python process that pull at once: pulls a second of all together / p50 of one in microseconds."
    return Table("Callers", ["callers", *(grow["way"] for grow in grown)], rows, note, plot="callers")


def _links(points: list[Results]) -> Table:
    note = (
        "From one engine to light ones in a second process; over the fabric all engines are in one process, and a link's memory "
        "is that of both ends and of the network between them, and the ends send signs of life, as between hosts. Idle CPU: "
        "processor time of both processes while nothing moves."
    )
    head = ["", "links", "s until all are made", "KiB a link", "idle CPU ms per s", "asked", "holds"]
    return Table("Links", head, [_link(point) for point in points], note, plot="links")


def _link(point: Results) -> Sequence[str]:
    asked = _asked(point)
    return [
        place(point["transport"]),
        f"{point['links']:,}",
        f"{point['seconds']:.2f}",
        f"{point['rss_per_link'] / 1024:.1f}",
        f"{point['idle_cpu_seconds'] / point['idle_seconds'] * 1e3:.1f}",
        "; ".join(asked) or "-",
        "; ".join("yes" if holds else "NO" for holds in asked.values()) or "-",
    ]


def _asked(point: Results) -> dict[str, bool]:
    """Return what is asked of a number of links and whether it holds."""
    kib = point["rss_per_link"] / 1024
    if point["links"] < _MEASURED_LINKS:
        return {}
    if point["transport"] == "fabric":
        return {f"< {MOST_KIB} KiB an end": kib < 2 * MOST_KIB}
    return {f"< {MOST_KIB} KiB": kib < MOST_KIB, f"< {_MOST_SECONDS} s": point["seconds"] < _MOST_SECONDS}


def place(transport: str) -> str:
    """Return what the figures of a link over a transport belong to."""
    return "fabric, both ends" if transport == "fabric" else transport


def micros(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def short(value: int) -> str:
    """Return a number of bytes in words."""
    return f"{value >> 20} MiB" if value >= 1 << 20 else f"{value >> 10} KiB"
