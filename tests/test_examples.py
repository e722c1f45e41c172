# SPDX-License-Identifier: Apache-2.0
"""Every file in examples/, run as a user runs it, and that their common check and their common end can fail."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from programs import EXAMPLE_NAMES, EXAMPLE_RUNS, EXAMPLES, run_example, run_program


@pytest.mark.parametrize(("name", "options"), EXAMPLE_RUNS, ids=EXAMPLE_NAMES)
def test_an_example_verifies_what_it_moves(name: str, options: list[str], tmp_path: Path) -> None:
    run_example(name, options, tmp_path)


def test_tokens_do_not_depend_on_where_the_kv_cache_was_computed(tmp_path: Path) -> None:
    """Each way is in the table, and each table row says so."""
    small = ["--layers", "2", "--prompt", "40", "--generate", "4"]
    done = run_program(EXAMPLES / "disaggregated_generation.py", *small, cwd=tmp_path)
    ways = re.findall(r"^(.+?) {2,}.* as one process$", done.stdout, re.MULTILINE)
    assert ways == ["one process", "whole", "by blocks", "by layers, pulled", "by layers, pushed"], done.stdout + done.stderr
    # 3 prompts of 39 tokens; keys and values of 2 layers; 2 heads of 32 numbers of 2 bytes
    verified = re.findall(r"^(.+): ([\d,]+) bytes verified$", done.stdout, re.MULTILINE)
    assert verified == [(way, f"{3 * 39 * 4 * 2 * 32 * 2:,}") for way in ways[1:]]


FAULTS = {
    "a wrong byte": "common.verify('x', [np.zeros(4)], [np.array([0, 0, 0, 1e-300])])",
    "another shape": "common.verify('x', [np.zeros(4)], [np.zeros((4, 1))])",
    "a shape that would be broadcast": "common.verify('x', [np.zeros(1)], [np.zeros(4)])",
    "another type": "common.verify('x', [np.zeros(4)], [np.zeros(4, np.int64)])",
    "a wrong KV cache": "generation.verified('x', generation.KV([np.zeros((2, 4, 2, 32))], [1]), 3, lambda: 'another')",
    "a missing tensor": "common.verify('x', [np.zeros(4)], [np.zeros(4), np.zeros(4)])",
    "an exception": "raise ValueError('boom')",
    "death": "os.kill(os.getpid(), 9)",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_example_with_a_fault_in_one_process_fails_and_leaves_no_other(fault: str, tmp_path: Path) -> None:
    program = tmp_path / "faulty.py"
    program.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(EXAMPLES)!r})\n"
        "import common, disaggregated_generation as generation, numpy as np\n"
        f"def one(peer):\n    {FAULTS[fault]}\n"
        "def other(peer):\n    signal.pause()\n"
        "if __name__ == '__main__':\n    common.run(one, other)\n"
    )
    done = run_program(program, cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    assert "verified" not in done.stdout
    assert done.stderr.splitlines()[-1] == "faulty.py: FAILED"
