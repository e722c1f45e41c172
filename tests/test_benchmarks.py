# SPDX-License-Identifier: Apache-2.0
"""The scripts of benchmarks/: that they run, and that what they say of figures follows from the figures. Speed is not tested."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def scripts_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


def run(out: Path, *options: str) -> tuple[dict[str, Any], str]:
    command = [sys.executable, str(SCRIPTS / "run.py"), "--quick", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "results.json").read_text()), done.stdout


def test_a_quick_run_measures_a_case_and_how_pulls_grow(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    results, printed = run(
        tmp_path, "--workloads", "W3", "--ways", "tcp", "--parts", "pulls,scaling", "--markdown", str(page), "--plots", ""
    )
    case = results["pulls"][0]
    assert case["case"] == "tcp W3"
    assert case["bytes"] == 16384
    assert ("p50_us" in case) != ("noisy" in case)
    grown = results["scaling"][0]
    assert [point["segments"] for point in grown["segments"]] == [1, 64, 4096]
    assert [point["bytes"] for point in grown["sizes"]] == [4 << 10, 1 << 20]
    assert [(point["callers"], point["call"]) for point in grown["callers"]] == [
        (1, "2 MiB"), (4, "2 MiB"), (1, "16 KiB"), (4, "16 KiB")
    ]  # fmt: skip
    assert printed.splitlines()[-1].startswith("bench: every byte was verified; ")
    text = page.read_text()
    for title in ("Pulls", "What a pull costs", "Segments", "Size of a segment", "Callers"):
        assert f"\n### {title}\n" in text


@pytest.mark.skipif(shutil.which("go") is None, reason="go is not there")
def test_links_are_counted_and_weighed(tmp_path: Path) -> None:
    results, _ = run(tmp_path, "--parts", "links", "--ways", "tcp")
    points = results["links"]
    assert [(point["transport"], point["links"]) for point in points] == [("tcp", 8), ("fabric", 8)]
    for point in points:
        assert point["seconds"] > 0
        assert point["explain"].startswith(f"cluster {point['links'] + 2}: linked, ")


def test_a_round_with_a_long_tail_is_thrown_away_and_kept_apart() -> None:
    from samples import Samples

    samples = Samples()
    assert samples.add([1000] * 10) == 1
    assert samples.add([1000] * 5 + [4000] * 5) == 4
    assert (samples.rounds, samples.thrown_away) == (1, 1)
    assert (samples.micros(), samples.noisy_micros()) == (1, 2.5)


@pytest.mark.parametrize(
    ("name", "reference", "holds", "fails"),
    [
        ("shm-pool W1", 90.0, 100.0, 100.1),
        ("shm-pool W2", 100.0, 150.0, 150.1),
        ("shm-pool W3", None, 10.0, 10.1),
        ("shm-private W5", 95.0, 100.0, 100.1),
        ("tcp W4", 90.0, 100.0, 100.1),
        ("tcp W2", 100.0, 120.0, 120.1),
        ("tcp-spin W2", 100.0, 130.0, 130.1),
        ("tcp-spin W3", None, 40.0, 40.1),
    ],
)
def test_bars_are_held_up_to_what_they_say(name: str, reference: float | None, holds: float, fails: float) -> None:
    from cases import CASES

    (bar,) = next(case for case in CASES if case.name == name).bars

    def beside(ours: float) -> list[tuple[float, float]]:
        return [] if reference is None else [(reference, 3 * ours), (reference, ours), (3 * reference, ours)]

    assert bar.holds(holds - 1e-9, beside(holds - 1e-9))
    assert not bar.holds(fails, beside(fails))
    if bar.times:
        assert bar.holds(holds, []) is None


def test_figures_of_other_libraries_are_scaled_by_the_same_reference() -> None:
    from libraries import compare

    size = 128 << 20
    then = size / 17.2e3  # microseconds of nt2 in the table
    now = {"nt2": {"W1": 2 * then, "W2": 286.0}}  # half as fast now
    ours = {"shm-pool W1": then, "shm-pool W2": 1350.0}
    compared = {(row.name, row.workload): row for row in compare(ours, now, {"W1": size})}
    large, small = compared["NIXL 2026-08 over UCX, one host", "W1"], compared["NIXL 2026-08 over UCX, one host", "W2"]
    assert (large.scaled, large.ours) == pytest.approx((1.65, 17.2))
    assert large.ahead
    assert (small.scaled, small.ours) == pytest.approx((1344.0, 1350.0))
    assert not small.ahead
    assert not any(library.startswith("Mooncake TENT tcp") for library, _ in compared)


def test_what_strace_prints_is_understood() -> None:
    from syscalls import counts

    printed = """\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 90.00    0.001000          10       100           process_vm_readv
 10.00    0.000100           1        20         3 futex
------ ----------- ----------- --------- --------- ----------------
100.00    0.001100                   120         3 total
"""
    assert counts(printed) == {"process_vm_readv": 100, "futex": 20}


def test_a_pattern_tells_blocks_of_tensors_apart() -> None:
    import numpy as np
    from workloads import Shape, Workload, fill, first_wrong

    workload = Workload("small", Shape(2, 64, 4), 2, 0, 1)
    tensors = [np.empty(4 * 8, dtype=np.uint64) for _ in range(2)]
    for index, words in enumerate(tensors):
        fill(index, words)
    assert first_wrong(workload, tensors, [0, 3], [0, 3]) is None
    assert first_wrong(workload, tensors, [0, 3], [0, 2]) == "small: block 2 of tensor 0 does not hold block 3"
    tensors[1][31] ^= np.uint64(1)
    assert first_wrong(workload, tensors, [0, 3], [0, 3]) == "small: block 3 of tensor 1 does not hold block 3"
