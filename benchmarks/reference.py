# SPDX-License-Identifier: Apache-2.0
"""The references: what the machine itself can do, by the C programs of benchmarks/perf."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "perf"
_HEAD = 5  # fields of a line before the nanoseconds: S, candidate, workload, metric, bytes
_PINGPONG = "pingpong"  # a program of its own; every other candidate is an argument of limit


class References:
    """The programs that could be built. reason says why one could not."""

    def __init__(self, into: Path) -> None:
        self._into = into
        self.reason = ""
        self._built = {name for name in ("limit", _PINGPONG) if (SOURCES / f"{name}.c").exists() and self._build(name)}

    def _build(self, name: str) -> bool:
        compiler = os.environ.get("CC") or shutil.which("gcc") or "cc"
        command = [compiler, "-O3", "-pthread", "-o", str(self._into / name), str(SOURCES / f"{name}.c")]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as exc:
            self.reason = f"no reference: {compiler}: {exc.strerror}"
            return False
        if done.returncode != 0:
            first, _, _ = done.stderr.strip().partition("\n")
            self.reason = f"no reference: {name}.c does not compile here: {first}"
        return done.returncode == 0

    def has(self, candidate: str) -> bool:
        return (_PINGPONG if candidate == _PINGPONG else "limit") in self._built

    def round(self, candidate: str, workload: str) -> list[int]:
        """Run one round and return the nanoseconds of each call. The program verifies its bytes itself."""
        program = _PINGPONG if candidate == _PINGPONG else "limit"
        command = [str(self._into / program), *([] if program == _PINGPONG else [candidate]), workload]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0 or not done.stdout.startswith("S,"):
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
        return [int(nanos) for nanos in done.stdout.splitlines()[0].split(",")[_HEAD:]]
