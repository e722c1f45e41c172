# SPDX-License-Identifier: Apache-2.0
"""The programs that this project shows, each run as a user runs it: the demo, the examples, and those of README and guide."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from peers import free_port

ROOT = Path(__file__).resolve().parent.parent

# --- the demo

SMALL = ["--tokens", "64", "--layers", "4"]
DEMO = [sys.executable, "-m", "llm_datadist", "demo"]


def run_demo(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*DEMO, *options], capture_output=True, text=True, timeout=100)


# --- examples/

EXAMPLES = ROOT / "examples"
SHARED = "common.py"
# Options that the plain run of an example leaves out, and smaller sizes where the default ones take seconds.
OPTIONS = {
    "pull_blocks.py": [[], ["--many"]],
    "disaggregated_generation.py": [["--layers", "3", "--prompt", "100", "--generate", "6"]],
}
EXAMPLE_RUNS = [
    (path.name, options)
    for path in sorted(EXAMPLES.glob("*.py"))
    if path.name != SHARED
    for options in OPTIONS.get(path.name, [[]])
]
EXAMPLE_NAMES = [" ".join([name, *options]) for name, options in EXAMPLE_RUNS]


def run_program(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=100, cwd=cwd)


def run_example(name: str, options: list[str], folder: Path) -> None:
    """Run an example in a folder, which has to verify something and say nothing else."""
    done = run_program(EXAMPLES / name, *options, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"{name}: everything was verified"
    assert re.search(r"[1-9][\d,]* bytes verified$", done.stdout, re.MULTILINE), done.stdout
    assert done.stderr == ""


# --- README.md and docs/guide.md

README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"^```python\n(.*?)^```$", README + GUIDE, re.MULTILINE | re.DOTALL)

DOCUMENTED = """\
from llm_datadist import *
cache_keys = [CacheKey(1, req_id=1), CacheKey(1, req_id=2)]
try:
    kv_cache_manager.pull_cache(cache_keys[0], cache, 0)
except LLMException as exe:
    print(exe.status_code)
"""


def shown(first_line: str) -> str:
    found = [text for text in SHOWN if text.startswith(first_line)]
    assert len(found) == 1, first_line
    return found[0]


@contextlib.contextmanager
def prefill(folder: Path) -> Iterator[str]:
    """The prefill process of README.md; the value is its port."""
    port = str(free_port())
    script = folder / "prefill.py"
    script.write_text(shown("# prefill.py"), encoding="utf-8")
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


def run_shown(folder: Path, program: str, *arguments: str) -> list[str]:
    """Return the lines that a program prints."""
    script = folder / "program.py"
    script.write_text(program, encoding="utf-8")
    done = run_program(script, *arguments, cwd=folder)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout.splitlines()


def run_two_processes(folder: Path) -> list[str]:
    """Run prefill.py and decode.py of README.md, check what the comments there say, and return what the link was said to be."""
    with prefill(folder) as port:
        lines = run_shown(folder, shown("# decode.py"), port)
    assert lines[0] == "LLMStatusCode.LLM_SUCCESS"
    assert lines[1].startswith("cluster 1: linked, dialed at 127.0.0.1:")
    assert lines[-4:-1] == ["[0.0, 1.0, 2.0, 3.0]", "3.0 1025.0", "LLMStatusCode.LLM_KV_CACHE_NOT_EXIST"]
    assert lines[-1].startswith("lookup | ")
    return lines[1:-4]


def run_older(folder: Path) -> None:
    """Run the documented example of the older mode twice: the first pull releases the key."""
    setup = shown("# older.py")
    with prefill(folder) as port:
        assert run_shown(folder, setup + DOCUMENTED, port) == []
        assert run_shown(folder, setup + DOCUMENTED, port) == ["LLMStatusCode.LLM_KV_CACHE_NOT_EXIST"]


def run_fill(folder: Path) -> None:
    assert run_shown(folder, shown("# fill.py")) == ["[0. 0. 2. 0.]"]
