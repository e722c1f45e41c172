# SPDX-License-Identifier: Apache-2.0
"""The machine that a run was made on, as far as it matters for the figures."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path


def describe() -> dict[str, object]:
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "go": _go(),
        "congestion_control": _read("/proc/sys/net/ipv4/tcp_congestion_control"),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "load": round(os.getloadavg()[0], 2),
    }


def sentence(machine: dict[str, object]) -> str:
    """Return the description as it stands in docs/performance.md."""
    return (
        f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gib']} GiB, Linux {machine['kernel']}, "
        f"CPython {machine['python']}, {machine['congestion_control']} as the system's congestion control"
    )


def _cpu() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _go() -> str:
    if shutil.which("go") is None:
        return ""
    done = subprocess.run(["go", "env", "GOVERSION"], capture_output=True, text=True)
    return done.stdout.strip().removeprefix("go")


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
