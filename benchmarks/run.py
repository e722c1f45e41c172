# SPDX-License-Identifier: Apache-2.0
"""Measures pulls against what the machine can do, as ratios inside one run. `make bench` calls it.

For each workload the library and its reference (benchmarks/perf/limit.c, sockets driven by a plain C program) take turns for
some rounds; a round whose p90 is over 3 times its p10 is thrown away, and said so. Figures of other runs or machines are
never compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from owner import CLUSTER
from workloads import WORKLOADS, Words, Workload, check

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    DataType,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
)

HERE = Path(__file__).resolve().parent
NOISY = 3  # p90 / p10 of a round that is thrown away
BOUNDARY_CALLS = 20000


class Puller:
    """The deciding side of one workload: a cache of this process's, linked to the owner's."""

    def __init__(self, workload: Workload, datadist: LLMDataDist) -> None:
        self.workload = workload
        self.manager = datadist.cache_manager
        self.random = random.Random(1)
        words = workload.blocks * workload.block_bytes // 8
        self.tensors: list[Words] = [np.full(words, 0xEE, dtype=np.uint64) for _ in range(workload.tensors)]
        desc = CacheDesc(workload.tensors, [workload.blocks, workload.block_bytes], DataType.DT_INT8)
        addrs = [tensor.ctypes.data for tensor in self.tensors]
        register = self.manager.register_cache if workload.is_row else self.manager.register_blocks_cache
        self.cache: Cache = register(desc, addrs)

    def pull(self) -> tuple[float, list[int], list[int]]:
        """Make one call and return its seconds and the blocks that it moved."""
        if self.workload.is_row:
            start = time.perf_counter()
            self.manager.pull_cache(CacheKey(CLUSTER, req_id=1), self.cache)
            return time.perf_counter() - start, [0], [0]
        sources = self.random.sample(range(self.workload.blocks), self.workload.per_call)
        targets = self.random.sample(range(self.workload.blocks), self.workload.per_call)
        start = time.perf_counter()
        self.manager.pull_blocks(BlocksCacheKey(CLUSTER), self.cache, sources, targets)
        return time.perf_counter() - start, sources, targets

    def round(self) -> list[float]:
        for _ in range(self.workload.warmup):
            self.pull()
        return [self.pull()[0] for _ in range(self.workload.calls)]

    def verify(self) -> None:
        for tensor in self.tensors:
            tensor.fill(0xEE)
        _, sources, targets = self.pull()
        check(self.workload, self.tensors, sources, targets)


@contextlib.contextmanager
def linked(workload: Workload, transport: str) -> Iterator[LLMDataDist]:
    """An engine that is linked to a process that owns the workload's tensors."""
    command = [sys.executable, str(HERE / "owner.py"), workload.name, transport]
    owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdin is not None and owner.stdout is not None
    datadist = LLMDataDist(LLMRole.DECODER, CLUSTER + 1)
    try:
        ip, port = owner.stdout.readline().strip().split(":")
        config = LLMConfig()
        config.enable_cache_manager = True
        config.sync_kv_timeout = 60000
        config.transport = transport
        datadist.init(config.generate_options())
        cluster = LLMClusterInfo()
        cluster.remote_cluster_id = CLUSTER
        cluster.append_local_ip_info(ip, 0)
        cluster.append_remote_ip_info(ip, int(port))
        code, _ = datadist.link_clusters([cluster], 10000)
        assert code == LLMStatusCode.LLM_SUCCESS, datadist.explain(CLUSTER)
        yield datadist
    finally:
        datadist.finalize()
        owner.stdin.close()
        owner.wait()
        owner.stdout.close()


def reference(limit: Path, candidate: str, workload: Workload) -> list[float]:
    """Run one round of the C program and return the seconds of each call."""
    done = subprocess.run([str(limit), candidate, workload.name], capture_output=True, text=True, check=True)
    return [int(nanos) / 1e9 for nanos in done.stdout.strip().split(",")[5:]]


def quiet(what: str, samples: list[float]) -> bool:
    """Tell whether a round may count."""
    tenths = statistics.quantiles(samples, n=10)
    if tenths[8] <= NOISY * tenths[0]:
        return True
    print(f"  thrown away: a round of {what} whose p90 is {tenths[8] / tenths[0]:.1f} times its p10")
    return False


def measure(workload: Workload, transport: str, candidate: str, limit: Path, rounds: int) -> dict[str, object]:
    ours: list[float] = []
    theirs: list[float] = []
    with linked(workload, transport) as datadist:
        puller = Puller(workload, datadist)
        puller.verify()
        for _ in range(rounds):
            for samples, into, what in (
                (reference(limit, candidate, workload), theirs, candidate),
                (puller.round(), ours, transport),
            ):
                if quiet(f"{workload.name} {what}", samples):
                    into.extend(samples)
        puller.verify()
    if not ours or not theirs:
        return {"workload": workload.name, "transport": transport, "reference": candidate, "noisy": True}
    mine, limits = statistics.median(ours), statistics.median(theirs)
    return {
        "workload": workload.name,
        "transport": transport,
        "reference": candidate,
        "bytes": workload.call_bytes,
        "p50_us": mine * 1e6,
        "p99_us": float(np.quantile(ours, 0.99)) * 1e6,
        "gb_per_s": workload.call_bytes / mine / 1e9,
        "reference_p50_us": limits * 1e6,
        "reference_gb_per_s": workload.call_bytes / limits / 1e9,
        "ratio": limits / mine,
        "calls": len(ours),
    }


def boundary() -> float:
    """Return the microseconds of a one-block pull_blocks without its transfer: checks, packing, crossing and back."""
    workload = WORKLOADS["W3"]
    with linked(workload, "tcp") as datadist:
        puller = Puller(workload, datadist)
        engine = puller.manager._engine
        engine._pull = engine._native.pyext_PullNothing
        key = BlocksCacheKey(CLUSTER)
        samples = array("d")
        for index in range(BOUNDARY_CALLS):
            start = time.perf_counter()
            puller.manager.pull_blocks(key, puller.cache, [index & 511], [index & 255])
            samples.append(time.perf_counter() - start)
    return statistics.median(samples) * 1e6


def build_limit(into: Path) -> Path:
    compiler = os.environ.get("CC") or shutil.which("gcc") or "cc"
    program = into / "limit"
    subprocess.run([compiler, "-O3", "-pthread", "-o", str(program), str(HERE / "perf" / "limit.c")], check=True)
    return program


def machine() -> dict[str, object]:
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    congestion = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "congestion_control": congestion,
    }


def show(results: list[dict[str, object]], crossing: float) -> None:
    print(f"{'':4} {'transport':9} {'GB/s':>7} {'p50 us':>9} {'p99 us':>9}   {'reference':12} {'GB/s':>7} {'p50 us':>9}  ratio")
    for row in results:
        if "noisy" in row:
            print(f"{row['workload']:4} every round was thrown away: the machine is not quiet")
            continue
        print(
            f"{row['workload']:4} {row['transport']:9} {row['gb_per_s']:7.2f} {row['p50_us']:9.0f} {row['p99_us']:9.0f}   "
            f"{row['reference']:12} {row['reference_gb_per_s']:7.2f} {row['reference_p50_us']:9.0f}  {row['ratio']:.2f}"
        )
    print(f"boundary: {crossing:.1f} us for a one-block pull_blocks without its transfer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workloads", default="W1,W2,W3,W4,W5", help="comma-separated")
    parser.add_argument("--rounds", type=int, default=5, help="of library and reference each")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        limit = build_limit(Path(scratch))
        results = [measure(WORKLOADS[name], "tcp", "tcp2-cubic", limit, args.rounds) for name in args.workloads.split(",")]
    crossing = boundary()
    show(results, crossing)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "boundary_us": crossing, "results": results}, indent=1) + "\n")
    print("bench: done; ratio is reference time / library time of the same run, 1 is the machine's limit")


if __name__ == "__main__":
    main()
