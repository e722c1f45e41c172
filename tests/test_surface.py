# SPDX-License-Identifier: Apache-2.0
"""The documented surface: what does not hold must be exactly what tests/surface_pending.txt lists.

Run as a program (``make surface``) this prints the failing rows, ready to be put into that file.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
CHECKER = TESTS.parent.parent / "shared" / "accept" / "surface.py"
PENDING = TESTS / "surface_pending.txt"


def failing_rows() -> list[str]:
    """The lines that the checker prints, without its closing line."""
    done = subprocess.run([sys.executable, str(CHECKER)], cwd=TESTS, capture_output=True, text=True, timeout=100)
    *rows, closing = done.stdout.splitlines() or [""]
    if not closing.startswith("surface: "):
        raise RuntimeError(f"{CHECKER.name} did not end: {closing}\n{done.stderr}")
    return rows


def pending_rows() -> list[str]:
    lines = PENDING.read_text().splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.skipif(not CHECKER.is_file(), reason="the surface checker is not beside this checkout")
def test_surface_fails_only_where_it_is_pending() -> None:
    failing, pending = set(failing_rows()), set(pending_rows())
    unexpected = sorted(failing - pending)
    arrived = sorted(pending - failing)
    assert not unexpected, "rows that should hold:\n" + "\n".join(unexpected)
    assert not arrived, "rows that hold now, to be taken out of surface_pending.txt:\n" + "\n".join(arrived)


if __name__ == "__main__":
    print("\n".join(failing_rows()))
