# SPDX-License-Identifier: Apache-2.0
"""The demo: what it prints, that its check finds a single wrong byte, and that no process of it outlives it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llm_datadist.cli import children, demo, main
from llm_datadist.cli.pattern import REST, Expectation, Pattern
from programs import DEMO, SMALL, run_demo

NOT_EXIST = "LLMStatusCode.LLM_KV_CACHE_NOT_EXIST"


def rows_of(output: str) -> dict[str, list[str]]:
    """What the table says, by the text of its first column."""
    lines = output.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("---")) + 1
    rows: dict[str, list[str]] = {}
    for line in lines[start:]:
        if not line:
            break
        what, *cells = re.split(r"  +", line)
        rows[what] = cells
    return rows


def test_demo_moves_and_verifies_rows_and_blocks() -> None:
    done = run_demo(*SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(done.stdout)
    assert {what: cells[0] for what, cells in rows.items() if cells[0] != "-"} == {
        "row by key, layers 1..1 to 3..3": "262,144",
        "row by key, all layers": "1,048,576",
        "4 scattered blocks, all layers": "1,048,576",
        "2 scattered blocks, layers 1..1 to 3..3": "131,072",
    }
    assert {cells[-1] for cells in rows.values() if cells[0] != "-"} == {"every byte"}
    missing = [what for what, cells in rows.items() if cells[-1] == NOT_EXIST]
    assert missing == [
        "row by the same key: it was released",
        "row by a key that does not exist",
        "blocks by a key that does not exist",
    ]
    assert done.stdout.splitlines()[-1].startswith("demo: everything was verified, 2,490,368 bytes in 7 steps, ")
    assert done.stderr == ""


@pytest.mark.parametrize(
    "options",
    [
        ["--mode", "blocks", "--dtype", "int8", "--kv-heads", "1", "--head-dim", "3", "--tokens", "7", "--block-tokens", "4"],
        ["--mode", "contiguous", "--dtype", "fp32", "--tokens", "33", "--layers", "3", "--transport", "tcp"],
    ],
)
def test_demo_holds_for_odd_shapes(options: list[str]) -> None:
    done = run_demo("--layers", "1", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "demo: everything was verified" in done.stdout


def test_demo_that_cannot_link_in_time_says_so_and_fails() -> None:
    done = run_demo(*SMALL, "--timeout", "0.001")
    assert done.returncode == 1
    assert "demo: FAILED: the decode process: " in done.stdout


def test_no_process_of_a_killed_demo_stays() -> None:
    running = subprocess.Popen(DEMO + SMALL, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    pids = []
    for line in running.stdout:
        found = re.search(r"process (\d+) is cluster", line)
        if found:
            pids.append(int(found.group(1)))
            break
    running.send_signal(signal.SIGKILL)
    running.wait()
    running.stdout.close()
    deadline = time.monotonic() + 20
    while pids and any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, f"of {pids} some still run"
        time.sleep(0.05)
    assert pids


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def test_child_that_dies_is_reported_with_its_output() -> None:
    child = children.Child("decode", [sys.executable, "-c", "import sys; print('boom'); sys.exit(3)"])
    with pytest.raises(children.ChildError, match=r"the decode process died, exit status 3(?s:.*)\| boom"):
        child.next(30)
    assert child.end() == 3
    child.kill()


def test_child_that_says_nothing_is_reported_and_ended() -> None:
    child = children.Child("prefill", [sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(children.ChildError, match=r"reported nothing for 0\.2 s"):
        child.next(0.2)
    child.kill()
    assert child.end() == -signal.SIGKILL


def pulled(expectation: Expectation, tensors: list[np.ndarray]) -> None:
    """What a faultless pull does."""
    for index, tensor in enumerate(tensors):
        tensor[:] = expectation.tensor(index, tensor.size)[1]


EXPECTATIONS = {
    "rows": Expectation(Pattern(64, seed=1), {1: 0}),
    "blocks": Expectation(Pattern(64, seed=2), {0: 1, 1: 0}, 16, ([3, 0], [1, 2])),
}


@pytest.mark.parametrize("name", EXPECTATIONS)
def test_a_single_wrong_byte_anywhere_is_found(name: str) -> None:
    expectation = EXPECTATIONS[name]
    tensors = [np.empty(64, dtype=np.uint8) for _ in range(2)]
    pulled(expectation, tensors)
    assert expectation.first_wrong(tensors) is None
    for index, tensor in enumerate(tensors):
        for at in range(tensor.size):
            tensor[at] ^= 1
            assert expectation.first_wrong(tensors).startswith(f"1 wrong bytes; byte {at} of tensor {index} is ")
            tensor[at] ^= 1


@pytest.mark.parametrize("name", EXPECTATIONS)
def test_a_poisoned_destination_has_every_byte_wrong_that_must_arrive(name: str) -> None:
    expectation = EXPECTATIONS[name]
    tensors = [np.empty(64, dtype=np.uint8) for _ in range(2)]
    expectation.poison(tensors)
    for index, tensor in enumerate(tensors):
        after = expectation.tensor(index, tensor.size)[1]
        arriving = after != REST
        assert (tensor[arriving] != after[arriving]).all()
    moved = 64 if name == "rows" else 2 * 2 * 16
    assert expectation.first_wrong(tensors).startswith(f"{moved} wrong bytes")


def test_blocks_in_the_wrong_order_are_found() -> None:
    expectation = EXPECTATIONS["blocks"]
    tensors = [np.empty(64, dtype=np.uint8) for _ in range(2)]
    pulled(expectation, tensors)
    blocks = tensors[0].reshape(-1, 16)
    blocks[[1, 2]] = blocks[[2, 1]]
    assert expectation.first_wrong(tensors) is not None


def test_pattern_has_no_eight_bytes_twice() -> None:
    pattern = Pattern(1 << 16, seed=1)
    words = np.concatenate([pattern.tensor(index).view(np.uint64) for index in range(64)])
    assert np.unique(words).size == words.size


def test_a_wrong_step_shows_in_the_table() -> None:
    row = {"what": "rows", "bytes": 10, "seconds": 0.001, "good": "every byte", "wrong": "3 wrong bytes; byte 0"}
    assert "WRONG: 3 wrong bytes; byte 0" in demo.table([row])


def test_a_wrong_step_fails_the_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"what": "rows", "bytes": 10, "seconds": 0.001, "good": "every byte", "wrong": "3 wrong bytes; byte 0"}
    monkeypatch.setattr(demo._Demo, "run", lambda self: [row, {**row, "wrong": None}])
    assert main(["demo"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "demo: FAILED: 1 of 2 steps did not hold"


def test_demo_without_numpy_says_what_to_install(tmp_path: Path) -> None:
    hide = "import sys; sys.modules['numpy'] = None; sys.argv[1:] = ['demo']; from llm_datadist.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "demo: numpy is needed: pip install numpy\n"


def test_unknown_verbs_and_values_are_refused() -> None:
    for argv in (["demo", "--tokens", "0"], ["demo", "--timeout", "0"], ["nothing"], []):
        with pytest.raises(SystemExit) as refused:
            main(argv)
        assert refused.value.code == 2


def test_version_is_the_distribution_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert re.fullmatch(r"llm-datadist-open \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_command_line_loads_neither_numpy_nor_the_engine_for_help() -> None:
    code = (
        "import sys; from llm_datadist.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('numpy', 'llm_datadist._pyext') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={**os.environ})
    assert done.stderr == "[]\n"
