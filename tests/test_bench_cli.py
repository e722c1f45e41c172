# SPDX-License-Identifier: Apache-2.0
"""``python -m llm_datadist bench``: that it moves and checks bytes, what it prints and writes, and how it fails."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llm_datadist.cli import bench, main

COMMAND = [sys.executable, "-m", "llm_datadist", "bench"]


def run_bench(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=100)


def test_every_workload_is_measured_and_verified_in_both_kinds_of_memory(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    done = run_bench("--rounds", "1", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert re.match(r"bench: every byte was verified, [\d,]+ pulls over \w+, [\d.]+ s in all$", done.stdout.splitlines()[-1])
    document = json.loads(file.read_text())
    assert document["rounds"] == 1
    assert {"version", "python", "kernel", "cores"} < document.keys()
    rows = document["results"]
    assert [(row["memory"], row["workload"]) for row in rows] == [
        (memory, workload) for memory in bench.MEMORIES for workload in bench.WORKLOADS
    ]
    for row in rows:
        assert row["wrong"] is None
        workload = bench.WORKLOADS[row["workload"]]
        assert (row["segments"], row["bytes"], row["calls"]) == (workload.segments, workload.call_bytes, workload.calls)
        assert 0 < row["p50_us"] <= row["p99_us"]
        assert min(row["gb_per_s"], row["copy_gb_per_s"], row["copy_p50_us"], row["ratio"]) > 0
        assert f"{row['workload']} from {row['memory']} memory over {row['transport']}: " in done.stdout


def test_options_choose_transport_workloads_and_memory(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    options = ("--transport", "tcp", "--workloads", "tiny,block", "--memory", "registered", "--rounds", "2", "--json", str(file))
    done = run_bench(*options)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["results"]
    assert [(row["workload"], row["memory"], row["transport"]) for row in rows] == [
        ("block", "registered", "tcp"),
        ("tiny", "registered", "tcp"),
    ]
    assert rows[1]["calls"] == 2 * bench.WORKLOADS["tiny"].calls
    assert done.stdout.splitlines()[-1].endswith(" in all")


def test_a_bench_that_cannot_link_in_time_says_so_and_fails() -> None:
    done = run_bench("--workloads", "tiny", "--memory", "pool", "--timeout", "0.001")
    assert done.returncode == 1
    assert "bench: FAILED: the puller process: " in done.stdout


def row(**fields: object) -> dict[str, object]:
    words = {"workload": "tiny", "memory": "pool", "transport": "tcp", "wrong": None}
    figures = dict.fromkeys(("p50_us", "p99_us", "gb_per_s", "copy_gb_per_s", "ratio"), 1.0)
    return {**words, "bytes": 1 << 14, "calls": 3, **figures, **fields}


def test_wrong_bytes_show_in_the_table_and_fail_the_bench(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench._Pair, "run", lambda self: [row(), row(wrong="3 wrong bytes; byte 0")])
    assert main(["bench", "--memory", "pool"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG: 3 wrong bytes; byte 0" in printed
    assert printed.splitlines()[-1] == "bench: FAILED: 1 of 2 workloads brought wrong bytes"


def test_bench_without_numpy_says_what_to_install(tmp_path: Path) -> None:
    hide = "import sys; sys.modules['numpy'] = None; from llm_datadist.cli import main; sys.exit(main(['bench']))"
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "bench: numpy is needed: pip install numpy\n"


@pytest.mark.parametrize(
    "argv", [["--workloads", "none"], ["--memory", ""], ["--rounds", "0"], ["--transport", "smoke"], ["--timeout", "0"]]
)
def test_unknown_values_are_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["bench", *argv])
    assert refused.value.code == 2


def test_a_folder_that_is_not_there_is_noticed_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--json", str(tmp_path / "none" / "bench.json")]) == 2
    assert capsys.readouterr().err == f"bench: there is no folder {tmp_path / 'none'}\n"
