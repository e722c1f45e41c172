# SPDX-License-Identifier: Apache-2.0
"""The face's declarations beside other headers of the library: the stand-in's, and the vendor's own where it is installed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from natives import FACE_SOURCES, STANDIN_SOURCES

OURS = FACE_SOURCES / "vendor.h"
STANDINS = STANDIN_SOURCES / "llm_datadist.h"


def told(header: Path, tmp_path: Path, *flags: str) -> list[str]:
    """What a header says of the documented types, see native/declarations.cc."""
    program = tmp_path / "declarations"
    command = [*os.environ.get("CXX", "g++").split(), "-std=c++17", "-Wall", "-Werror", "-Wno-invalid-offsetof", *flags]
    command += [f'-DHEADER="{header}"', "-o", str(program), str(STANDIN_SOURCES / "declarations.cc")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()


def vendors() -> list[Path]:
    """The vendor's header, where a toolkit is installed."""
    homes = [os.environ[name] for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME") if os.environ.get(name)]
    headers = [Path(home, "include", "llm_datadist", "llm_datadist.h") for home in homes]
    return [header for header in headers if header.is_file()]


@pytest.mark.parametrize("header", [STANDINS, *vendors()], ids=str)
def test_the_face_declares_what_the_header_does(header: Path, tmp_path: Path) -> None:
    includes = [f"-I{header.parent.parent}", f"-I{header.parent}"]
    theirs = told(header, tmp_path, *includes)
    assert len(theirs) > 50
    assert told(OURS, tmp_path) == theirs


@pytest.mark.parametrize(
    ("old", "new", "differs"),
    [
        ("uint64_t cluster_id;\n  int64_t cache_id;", "int64_t cache_id;\n  uint64_t cluster_id;", "CacheIndex::cache_id"),
        ("  uint8_t reserved[127];\n", "  uint8_t reserved[135];\n", "sizeof KvCacheExtParam"),
        ("kPrompt = 1, kDecoder = 2", "kPrompt = 2, kDecoder = 1", "LlmRole::kPrompt"),
        ("Status DeallocateCache(int64_t cache_id)", "Status DeallocateCache(int32_t cache_id)", "LlmDataDist::DeallocateCache"),
    ],
)
def test_a_header_that_says_otherwise_is_seen(old: str, new: str, differs: str, tmp_path: Path) -> None:
    text = STANDINS.read_text()
    assert text.count(old) == 1
    changed = tmp_path / "llm_datadist.h"
    changed.write_text(text.replace(old, new))
    pairs = zip(told(OURS, tmp_path), told(changed, tmp_path, f"-I{STANDIN_SOURCES}"))
    assert any(ours != theirs and differs in ours for ours, theirs in pairs)
