# SPDX-License-Identifier: Apache-2.0
"""Plots of the results, one SVG file each. Needs matplotlib, which requirements-bench.txt names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import matplotlib
import report

matplotlib.use("svg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from report import PLOTS, short

Results = dict[str, Any]

# By way and, where links are meant, by transport.
_COLOURS = {"shm-pool": "#0072b2", "shm-private": "#56b4e9", "tcp": "#d55e00", "tcp-spin": "#e69f00"}
_COLOURS.update(shm=_COLOURS["shm-pool"], fabric="#009e73")
_MARKERS = {"shm": "o", "shm-pool": "o", "shm-private": "s", "tcp": "^", "tcp-spin": "v", "fabric": "D"}
_STYLE = {
    "svg.fonttype": "none",  # text stays text: smaller files, which can be searched
    "svg.hashsalt": "llm-datadist",  # the same figures make the same file
    "font.size": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(results: Results, into: Path) -> list[Path]:
    """Write the plots for which there are figures, and return their paths."""
    into.mkdir(parents=True, exist_ok=True)
    pulls = [row for row in results["pulls"] if "ratio" in row]
    grown = [grow for grow in results["scaling"] if "skipped" not in grow]
    links = [point for point in results["links"] if "skipped" not in point]
    drawn = []
    with pyplot.rc_context(_STYLE):
        if pulls:
            drawn.append(_save("pulls", _pulls(pulls), into))
        if grown:
            drawn += [
                _save("segments", _lines(grown, "segments", "segments", "p50_us", "segments of a pull", "p50, us"), into),
                _save("sizes", _lines(grown, "sizes", "bytes", "gb_per_s", "bytes of a segment", "GB/s"), into),
                _save("callers", _callers(grown), into),
            ]
        if links:
            drawn.append(_save("links", _links(links), into))
    return drawn


def _save(name: str, figure: Any, into: Path) -> Path:
    figure.suptitle(PLOTS[name], fontsize=10)
    figure.tight_layout()
    path = into / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    # matplotlib ends lines of SVG with blanks, which a repository does not want.
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    return path


def _pulls(rows: list[Results]) -> Any:
    figure, axes = pyplot.subplots(figsize=(7, 1 + 0.27 * len(rows)))
    rows = rows[::-1]
    axes.barh([row["case"] for row in rows], [row["ratio"] for row in rows], color=[_COLOURS[row["way"]] for row in rows])
    axes.axvline(1, color="black", linewidth=1)
    right = 1.05 * max(1, *(row["ratio"] for row in rows))
    axes.set_xlim(0, right)
    for place, row in enumerate(rows):
        axes.text(right, place, f" {row['ratio']:.2f} of {row['reference']}", va="center", fontsize=8)
    axes.set_xlabel("time of the reference / time of the library; 1 is the machine's limit")
    axes.grid(axis="y", visible=False)
    return figure


def _lines(grown: list[Results], key: str, by: str, what: str, x: str, y: str) -> Any:
    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    for grow in grown:
        _line(axes, grow["way"], [point[by] for point in grow[key]], [point[what] for point in grow[key]])
    _label(axes, [point[by] for point in grown[0][key]], short if by == "bytes" else "{:,}".format)
    if what == "p50_us":
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend()
    return figure


def _label(axes: Axes, values: list[int], text: Callable[[int], str]) -> None:
    """Make the axis of x a logarithmic one that names these values."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [text(value) for value in values], minor=False)
    axes.tick_params(axis="x", labelsize=8)


def _line(axes: Axes, name: str, xs: list[float], ys: list[float], label: str = "") -> None:
    axes.plot(xs, ys, color=_COLOURS[name], marker=_MARKERS[name], markersize=4, linewidth=1.2, label=label or name)


def _callers(grown: list[Results]) -> Any:
    calls = list(dict.fromkeys(point["call"] for point in grown[0]["callers"]))
    figure, panels = pyplot.subplots(2, len(calls), figsize=(7, 5.5), squeeze=False, sharex=True)
    for column, call in enumerate(calls):
        for grow in grown:
            points = [point for point in grow["callers"] if point["call"] == call]
            callers = [point["callers"] for point in points]
            _line(panels[0][column], grow["way"], callers, [point["calls_per_s"] for point in points])
            _line(panels[1][column], grow["way"], callers, [point["p50_us"] for point in points])
        panels[0][column].set_title(f"pulls of {call}", fontsize=9)
        panels[0][column].set_ylim(bottom=0)
        panels[1][column].set_yscale("log")
        _label(panels[1][column], list(dict.fromkeys(point["callers"] for point in grown[0]["callers"])), str)
        panels[1][column].set_xlabel("callers")
    panels[0][0].set_ylabel("pulls a second, all together")
    panels[1][0].set_ylabel("p50 of one, us")
    panels[0][0].legend()
    return figure


def _links(points: list[Results]) -> Any:
    figure, (seconds, memory) = pyplot.subplots(1, 2, figsize=(7, 3.2))
    for name in dict.fromkeys(point["transport"] for point in points):
        own = [point for point in points if point["transport"] == name]
        counts = [point["links"] for point in own]
        _line(seconds, name, counts, [point["seconds"] for point in own], report.place(name))
        _line(memory, name, counts, [point["rss_per_link"] / 1024 for point in own])
    seconds.set_ylabel("s until all are made")
    memory.set_ylabel("KiB of resident memory a link")
    memory.set_ylim(bottom=0)
    seconds.set_yscale("log")
    for axes in (seconds, memory):
        _label(axes, sorted({point["links"] for point in points}), "{:,}".format)
        axes.set_xlabel("links")
    memory.axhline(report.MOST_KIB, color="black", linewidth=0.8, linestyle="--")
    seconds.legend()
    return figure
