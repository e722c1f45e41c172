# SPDX-License-Identifier: Apache-2.0
"""The documented surface: every name and signature that the checker beside this checkout knows.

Run as a program (``make surface``) this prints the rows that do not hold.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
CHECKER = TESTS.parent.parent / "shared" / "accept" / "surface.py"


def failing_rows() -> list[str]:
    """The lines that the checker prints, without its closing line."""
    done = subprocess.run([sys.executable, str(CHECKER)], cwd=TESTS, capture_output=True, text=True, timeout=100)
    *rows, closing = done.stdout.splitlines() or [""]
    if not closing.startswith("surface: "):
        raise RuntimeError(f"{CHECKER.name} did not end: {closing}\n{done.stderr}")
    return rows


@pytest.mark.skipif(not CHECKER.is_file(), reason="the surface checker is not beside this checkout")
def test_every_row_of_the_surface_holds() -> None:
    assert failing_rows() == []


if __name__ == "__main__":
    if not CHECKER.is_file():
        sys.exit("the surface checker is not beside this checkout")
    print("\n".join(failing_rows()))
