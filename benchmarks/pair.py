# SPDX-License-Identifier: Apache-2.0
"""A linked pair of processes, an owner and a puller, and what one can ask of it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ends import Setting
from workloads import Workload

HERE = Path(__file__).resolve().parent
_END_SECONDS = 30  # what giving memory back may take


class NotBuilt(Exception):
    """The library has not what the setting asks for. Its text is the library's reason."""


class Child:
    """One of the two processes."""

    def __init__(self, script: str, setting: Setting) -> None:
        self._name = script
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / script), setting.dump()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, **command: Any) -> None:
        assert self._process.stdin is not None
        print(json.dumps(command), file=self._process.stdin, flush=True)

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._name} has ended with status {self._process.wait()}, see above")
        fields: dict[str, Any] = json.loads(line)
        if "refused" in fields:
            raise NotBuilt(fields["refused"])
        return fields

    def ask(self, **command: Any) -> dict[str, Any]:
        self.tell(**command)
        return self.hear()

    def cpu(self) -> float:
        return float(self.ask(do="cpu")["cpu"])

    def end(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has died, and said why
            self._process.stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


@dataclass(frozen=True)
class Round:
    """What one round took: each call, and all of them with those of warm-up, in time and in processor time of both processes."""

    nanos: list[int]
    seconds: float
    cpu_seconds: float
    bytes: int  # that all moved


class Pair:
    def __init__(self, owner: Child, puller: Child, explain: str) -> None:
        self.owner, self.puller, self.explain = owner, puller, explain

    def round(self, workload: Workload, model: int = 0) -> Round:
        before = self._cpu()
        done = self.puller.ask(do="round", **_fields(workload, model))
        cpu = self._cpu() - before
        return Round(done["nanos"], done["seconds"], cpu, (workload.warmup + workload.calls) * workload.call_bytes)

    def together(self, workload: Workload, model: int, callers: int) -> tuple[list[int], float]:
        """Let so many threads make the calls of a round at once; return the nanoseconds of each call and the seconds of all."""
        done = self.puller.ask(do="round", callers=callers, **_fields(workload, model))
        return done["nanos"], done["seconds"]

    def verify(self, workload: Workload, model: int = 0) -> None:
        """Raise AssertionError unless a pull brings the right bytes."""
        wrong = self.puller.ask(do="verify", **_fields(workload, model))["wrong"]
        if wrong is not None:
            raise AssertionError(wrong)

    def boundary(self) -> float:
        """Return the microseconds of a one-block pull without its transfer."""
        return float(self.puller.ask(do="boundary", model=0)["micros"])

    def _cpu(self) -> float:
        return self.owner.cpu() + self.puller.cpu()


def _fields(workload: Workload, model: int) -> dict[str, Any]:
    fields = asdict(workload)
    del fields["shape"]  # the processes have it
    return {**fields, "model": model}


@contextlib.contextmanager
def linked(setting: Setting) -> Iterator[Pair]:
    """Start both processes, link them and end them. NotBuilt where the library has not what the setting asks for."""
    with contextlib.ExitStack() as stack:
        owner, puller = Child("owner.py", setting), Child("puller.py", setting)
        stack.callback(owner.end)
        stack.callback(puller.end)  # first
        puller.hear()
        puller.tell(**owner.hear())
        yield Pair(owner, puller, puller.hear()["explain"])
