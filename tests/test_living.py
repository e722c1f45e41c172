# SPDX-License-Identifier: Apache-2.0
"""The engine comes late, changes nothing of its host process, speaks through the log, and goes without a word."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import living_host
from living_host import SOON, inside
from peers import Peer, wait_until

TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def owner() -> Iterator[Any]:
    with Peer() as owner:
        owner.address = owner.open(living_host.PEER_ID, sync_kv_timeout=10_000)
        inside(owner, living_host.serve_big)
        yield owner


def python(code: str, *args: Any, **env: str) -> Any:
    """Run a program in a fresh interpreter that finds the helpers of the tests, and return how it ended."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(TESTS)!r})\n{code}", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **env},
    )


# --- load

LOADED = """
def loaded():
    maps = open('/proc/self/maps').read()
    names = [name for name in sys.modules if name.split('.')[0] in ('numpy', 'torch') or name.endswith('_pyext')]
    return names, '_pyext' in maps
"""
INIT = """
config = llm_datadist.LLMConfig()
config.device_id, config.enable_cache_manager = 0, True
config.mem_pool_cfg = '{"memory_size": 1048576}'
engine = llm_datadist.LLMDataDist(llm_datadist.LLMRole.PROMPT, 1)
engine.init(config.generate_options())
desc = llm_datadist.CacheDesc(1, [1, 64], llm_datadist.DataType.DT_INT8)
cache = engine.cache_manager.allocate_cache(desc, [])
"""


@pytest.mark.parametrize("how", ["import llm_datadist", "import llm_datadist\nfrom llm_datadist import *"])
def test_import_loads_no_engine_and_init_does(how: str) -> None:
    done = python(f"{LOADED}\n{how}\nprint(loaded())\n{INIT}\nprint(loaded())\nengine.finalize()")
    assert done.stdout.splitlines() == ["([], False)", "(['llm_datadist._pyext'], True)"], done.stderr


# --- the host process stays as it was


@pytest.mark.parametrize("sigpipe", ["ignored", "default", "handled"])
def test_settings_of_the_process_stay_as_they_were(owner: Any, sigpipe: str) -> None:
    with Peer(env={"LLM_TEST_MARK": "x"}) as host:
        pulled, (before, during, after) = inside(host, living_host.settings_around_a_life, owner.address, sigpipe)
    assert pulled
    assert before["files"][0] == 300 and before["files of children"] == 300
    assert during == before
    assert after == before


def test_a_broken_pipe_stays_an_exception() -> None:
    with Peer() as host:
        host.open(31)
        assert inside(host, living_host.write_to_a_closed_pipe) == "BrokenPipeError"


def test_faulthandler_that_is_enabled_after_the_load_reports_a_crash() -> None:
    crash = "import llm_datadist, faulthandler, ctypes\n" + INIT + "faulthandler.enable()\nctypes.string_at(16)"
    done = python(crash)
    assert done.returncode == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in done.stderr


@pytest.mark.skipif(
    not os.path.exists("/proc/sys/net/mptcp/enabled") or Path("/proc/sys/net/mptcp/enabled").read_text().strip() != "1",
    reason="this kernel has no multipath TCP to turn off",
)
def test_sockets_speak_plain_tcp(owner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_DATADIST_TRANSPORT", "tcp")  # of the host alone: over shm the data connections are Unix sockets
    with Peer() as host:
        inside(host, living_host.open_and_link, owner.address, 32)
        for end in (host, owner):
            protocols = inside(end, living_host.socket_protocols)
            assert len(protocols) >= 3, "a listener and two data connections at least"
            assert set(protocols) == {living_host.socket.IPPROTO_TCP}


# --- the log


def test_lines_reach_the_log_while_no_call_is_under_way() -> None:
    with Peer(env={"ASCEND_GLOBAL_LOG_LEVEL": "1"}) as host:
        address = host.open(33)
        assert "closed a connection from 127.0.0.1" in inside(host, living_host.line_about_a_stranger, address)


# --- exit

OPEN = """
import atexit, os, sys, threading
# Registered before the import, so it runs after the package's own handler.
@atexit.register
def report():
    wait_until(lambda: _native.held() == 0, "a daemon thread has taken its failure", 10)
    print(LLMDataDist.llm_engine_instance, _native.held(), flush=True)
from llm_datadist import LLMDataDist, _native
import living_host
from peers import End, wait_until
end = End()
assert living_host.open_and_link(end, sys.argv[1], int(sys.argv[2]))["code"] == "LLM_SUCCESS"
"""
ENDINGS = {
    "end of main": ("", 0),
    "sys.exit": ("sys.exit(5)", 5),
    "dropped": ("import gc; end.engine = None; end.caches.clear(); del end; gc.collect()", 0),
    "a pull in a daemon thread": (
        """
living_host.stop(int(sys.argv[3]))
threading.Thread(target=living_host.failure, args=(lambda: living_host.pull_big(end),), daemon=True).start()
wait_until(lambda: _native.held() > 1, "the pull is under way")
""",
        0,
    ),
}


@pytest.mark.parametrize("ending", list(ENDINGS))
def test_exit_without_finalize_finalizes_and_prints_nothing(owner: Any, ending: str) -> None:
    code, status = ENDINGS[ending]
    cluster_id = 40 + list(ENDINGS).index(ending)
    try:
        done = python(OPEN + code, owner.address, cluster_id, owner.process.pid)
    finally:
        owner.process.send_signal(signal.SIGCONT)
    assert (done.stdout, done.stderr, done.returncode) == ("None 0\n", "", status)
    wait_until(lambda: "linked" not in owner.ask("explain", cluster_id).split(",")[1], "the peer sees it go", SOON)


# --- other interpreters

SUB_INTERPRETER = """
import importlib, sys
for name in ("_interpreters", "_xxsubinterpreters"):
    try:
        interpreters = importlib.import_module(name)
        break
    except ImportError:
        pass
program = '''
import sys
sys.path[:] = {path!r}
import llm_datadist
try:
    config = llm_datadist.LLMConfig()
    config.device_id, config.enable_cache_manager = 0, True
    llm_datadist.LLMDataDist(llm_datadist.LLMRole.PROMPT, 1).init(config.generate_options())
except llm_datadist.LLMException as exc:
    print(exc.status_code.name, exc.cause, exc.hint, sep="|", flush=True)
'''.replace("{path!r}", repr(sys.path))
failed = interpreters.run_string(interpreters.create({options}), program)
if failed:
    print(failed)
"""


@pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("_interpreters", "_xxsubinterpreters"))),
    reason="no module that makes sub-interpreters",
)
@pytest.mark.parametrize("kind", ["isolated", "legacy"])
def test_init_in_a_sub_interpreter_is_a_clear_error(kind: str) -> None:
    if sys.version_info >= (3, 13):
        options = repr(kind)
    else:
        options = f"isolated={kind == 'isolated'}"
    done = python(SUB_INTERPRETER.replace("{options}", options))
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "LLM_FEATURE_NOT_ENABLED|the engine does not run in a sub-interpreter|"
        "use the main interpreter of an ordinary build of CPython\n"
    )


def test_init_in_a_free_threaded_build_is_a_clear_error() -> None:
    with Peer() as host:
        got = inside(host, living_host.init_in_free_threaded_build)
    assert got["code"] == "LLM_FEATURE_NOT_ENABLED" and "free-threaded" in got["cause"] and got["hint"]
