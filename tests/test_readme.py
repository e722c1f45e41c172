# SPDX-License-Identifier: Apache-2.0
"""The programs of README.md and of the guide, run as they stand there, and the files and links that README.md names."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from peers import free_port

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```$", README + GUIDE, re.MULTILINE | re.DOTALL)

DOCUMENTED = """\
from llm_datadist import *
cache_keys = [CacheKey(1, req_id=1), CacheKey(1, req_id=2)]
try:
    kv_cache_manager.pull_cache(cache_keys[0], cache, 0)
except LLMException as exe:
    print(exe.status_code)
"""


def block(first_line: str) -> str:
    found = [text for text in PYTHON if text.startswith(first_line)]
    assert len(found) == 1, first_line
    return found[0]


@contextlib.contextmanager
def prefill(folder: Path) -> Iterator[str]:
    """The prefill process of README.md; the value is its port."""
    port = str(free_port())
    script = folder / "prefill.py"
    script.write_text(block("# prefill.py"), encoding="utf-8")
    process = subprocess.Popen([sys.executable, script, port], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        yield port
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def run(folder: Path, program: str, port: str) -> list[str]:
    script = folder / "program.py"
    script.write_text(program, encoding="utf-8")
    done = subprocess.run([sys.executable, script, port], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_two_process_example_prints_what_its_comments_say(tmp_path: Path) -> None:
    with prefill(tmp_path) as port:
        lines = run(tmp_path, block("# decode.py"), port)
    assert lines[0] == "LLMStatusCode.LLM_SUCCESS"
    assert lines[1].startswith("cluster 1: linked, dialed at 127.0.0.1:")
    assert lines[-4:-1] == ["[0.0, 1.0, 2.0, 3.0]", "3.0 1025.0", "LLMStatusCode.LLM_KV_CACHE_NOT_EXIST"]
    assert lines[-1].startswith("lookup | ")


def test_documented_example_stands_there_word_for_word() -> None:
    assert DOCUMENTED in PYTHON


def test_documented_example_moves_the_row_once_and_then_prints_the_status(tmp_path: Path) -> None:
    setup = block("# older.py")
    with prefill(tmp_path) as port:
        assert run(tmp_path, setup + DOCUMENTED, port) == []
        assert run(tmp_path, setup + DOCUMENTED, port) == ["LLMStatusCode.LLM_KV_CACHE_NOT_EXIST"]


def test_program_of_the_guide_brings_bytes_to_a_device_and_back() -> None:
    done = subprocess.run([sys.executable, "-c", block("# fill.py")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0. 0. 2. 0.]\n", "")


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_links_between_the_pages_lead_somewhere(page: str) -> None:
    here = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", here.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (here.parent / target).exists(), f"{page} links to {target}"


def test_paths_that_the_readme_names_exist() -> None:
    for path in re.findall(r"`((?:python|pyext|core|tests|docs|tools)/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path
