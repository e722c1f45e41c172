# SPDX-License-Identifier: Apache-2.0
"""Measures pulls against what the machine can do, and how their cost grows. `make bench` calls it.

Library and reference (the C programs of benchmarks/perf) take turns for some rounds; a round whose p90 is over 3 times its p10 is
thrown away, and said so. Only ratios inside one run mean anything.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import tempfile
from pathlib import Path
from typing import Callable

import machine
import pulls
import report
import scaling
from cases import CASES, WAYS
from reference import References
from workloads import WORKLOADS

import llm_datadist

PARTS = ("pulls", "scaling", "links")
_ROUNDS = 7  # fewer than five are no fair run
_QUICK_WORKLOADS = ("W2", "W3")  # the others take long to set up
_QUICK_POINTS = {"segments": (1, 64, 4096), "sizes": (4 << 10, 1 << 20), "callers": (1, 4)}
_QUICK_LINKS = {"counts": (8,), "fabric": (8,)}


def main() -> None:
    arguments = _parser().parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.earlier:
        results = json.loads(arguments.earlier.read_text())
    else:
        results = _measure(arguments, arguments.rounds or (1 if arguments.quick else _ROUNDS))
        (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"results: {arguments.out / 'results.json'}")
    print(f"\n{machine.sentence(results['machine'])}\n\n{report.text(results)}\n")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed (requirements-bench.txt)")
    else:
        import plots

        drawn = plots.draw(results, arguments.out)
        print(f"plots: {', '.join(str(path) for path in drawn)}")
    if arguments.markdown:
        arguments.markdown.write_text(report.markdown(results, arguments.plots))
    print(report.summary(results))


def _measure(arguments: argparse.Namespace, rounds: int) -> report.Results:
    ways = arguments.ways or list(WAYS)
    parts = arguments.parts or PARTS
    workloads = arguments.workloads or (_QUICK_WORKLOADS if arguments.quick else list(WORKLOADS))
    results: report.Results = {
        "machine": machine.describe(),
        "version": llm_datadist.__version__,
        "rounds": rounds,
        "go": _go_benchmarks(arguments.go_output),
        "pulls": [],
        "scaling": [],
        "links": [],
    }
    if "pulls" in parts:
        cases = [case for case in CASES if case.way.name in ways and case.workload in workloads]
        with tempfile.TemporaryDirectory() as folder:
            references = References(Path(folder))
            if references.reason:
                print(references.reason)
            results["pulls"] = pulls.measure(cases, references, rounds, not arguments.quick)
    if "scaling" in parts:
        points = _QUICK_POINTS if arguments.quick else {}
        results["scaling"] = [scaling.grow(WAYS[way], **points) for way in ways if not WAYS[way].spin_micros]
    if "links" in parts:
        transports = dict.fromkeys(WAYS[way].transport for way in ways)
        with tempfile.TemporaryDirectory() as folder:
            results["links"] = scaling.links(Path(folder), transports, **(_QUICK_LINKS if arguments.quick else {}))
    return results


def _go_benchmarks(output: Path | None) -> dict[str, float]:
    """Return the nanoseconds of the engine's benchmarks of pulls, from what `go test -bench` has printed."""
    if output is None or not output.exists():
        return {}
    found = re.findall(r"^Benchmark(Pull\w*/\w+)\S*\s+\d+\s+([\d.]+) ns/op", output.read_text(), re.MULTILINE)
    return {name: float(nanos) for name, nanos in found}


def _some_of(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not one of {', '.join(known)}")
        return names

    return read


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for option, known in (("parts", PARTS), ("ways", tuple(WAYS)), ("workloads", tuple(WORKLOADS))):
        parser.add_argument(f"--{option}", type=_some_of(known), metavar="LIST", help=f"some of {','.join(known)} (all)")
    parser.add_argument("--rounds", type=int, metavar="N", help="of the library and of each reference (7)")
    quick = f"{' and '.join(_QUICK_WORKLOADS)}, one round, few points, no strace: does it run at all"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--out", type=Path, default=Path("build/bench"), metavar="FOLDER", help="of results.json and the plots")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables in the form of docs/performance.md")
    parser.add_argument("--plots", default="plots", metavar="FOLDER", help="of the plots as --markdown names it (plots)")
    parser.add_argument("--go-output", type=Path, metavar="FILE", help="what go test -bench has printed")
    parser.add_argument("--from", dest="earlier", type=Path, metavar="FILE", help="measure nothing: show an earlier results.json")
    return parser


if __name__ == "__main__":
    main()
