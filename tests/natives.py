# SPDX-License-Identifier: Apache-2.0
"""What tests compile for the vendor's library, once for each session: the face, and the stand-in (tests/native/standin.h)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FACE_SOURCES = ROOT / "capi" / "cann" / "face"
STANDIN_SOURCES = ROOT / "tests" / "native"
ABIS = ("0", "1")  # the C++ string ABIs


def make(sources: Path, out: Path, abi: str, *more: str) -> subprocess.Popen[str]:
    out.mkdir(parents=True, exist_ok=True)
    command = ["make", "-s", "-C", str(sources), f"OUT={out}", f"CXX11_ABI={abi}", "CXXFLAGS=-O0", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*builds: subprocess.Popen[str]) -> None:
    for build in builds:
        output, _ = build.communicate()
        assert build.returncode == 0, output


@pytest.fixture(scope="session")
def faces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The face for each string ABI."""
    folder = tmp_path_factory.mktemp("faces")
    finish(*(make(FACE_SOURCES, folder / abi, abi) for abi in ABIS))
    return {abi: folder / abi / "libcann_face.so" for abi in ABIS}


@pytest.fixture(scope="session")
def standins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of the stand-in's libraries for each string ABI."""
    folder = tmp_path_factory.mktemp("standins")
    finish(*(make(STANDIN_SOURCES, folder / abi, abi) for abi in ABIS))
    return {abi: folder / abi for abi in ABIS}


@pytest.fixture(scope="session")
def libraries(standins: dict[str, Path]) -> Path:
    """The stand-in for the ABI that the vendor's own consumers have. The face in the wheel has the other one."""
    return standins["0"]
