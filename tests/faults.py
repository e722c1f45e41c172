# SPDX-License-Identifier: Apache-2.0
"""Failures of the stand-in for the vendor's library, in the process that has loaded it (tests/native/standin.h).

The process of an End calls these, see :class:`peers.Peer.run`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from typing import Any

import llm_datadist
from llm_datadist import LLMException
from native_face import ON_DEVICE, Side
from peers import Background, End, wait_until

_calls: list[Background] = []


def plan(faults: str) -> None:
    assert _standin().standin_plan(faults.encode()) == 0, faults


def await_waiting(calls: int = 1) -> None:
    """Wait until so many calls stall or are late."""
    wait_until(lambda: _standin().standin_waiting() == calls, f"{calls} calls wait")


def release() -> None:
    _standin().standin_release()


def forget() -> int:
    """End all waits and calls, and return how many planned failures have not come to pass."""
    release()
    for call in _calls:
        with contextlib.suppress(LLMException):
            call.result()
    _calls.clear()
    unused: int = _standin().standin_forget()
    return unused


def begin(end: End, *call: Any) -> None:
    """Begin a call of the CacheManager's in a thread of its own; the process goes on."""
    _calls.append(Background(end.manage, *call))


def result() -> Any:
    """Return what the call returns that was begun first, or raise what it raises."""
    return _calls.pop(0).result()


def lend_on_device(number_of_bytes: int) -> None:
    """Allocate memory of the device and give it back: there is as much."""
    side = Side(str(Path(llm_datadist.__file__).with_name("libcann_face.so")))
    side.free(ON_DEVICE, side.malloc(ON_DEVICE, number_of_bytes))


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _standin() -> ctypes.CDLL:
    return ctypes.CDLL("libacl_rt.so")  # the one that is loaded, whatever folder it came from
