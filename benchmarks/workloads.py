# SPDX-License-Identifier: Apache-2.0
"""The workloads of docs/performance.md, and the bytes that they move. benchmarks/perf/wl.h has the same for C."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Workload:
    """tensors of blocks x block_bytes, of which a call moves per_call random blocks each; timed calls after warm-up ones."""

    name: str
    tensors: int
    block_bytes: int
    blocks: int
    per_call: int
    warmup: int
    calls: int

    @property
    def call_bytes(self) -> int:
        return self.tensors * self.per_call * self.block_bytes

    @property
    def is_row(self) -> bool:
        """One block is the whole tensor: a contiguous cache."""
        return self.blocks == 1


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("W1", 64, 32768, 512, 64, 3, 20),
        Workload("W2", 64, 32768, 512, 1, 50, 600),
        Workload("W3", 1, 16384, 512, 1, 200, 2500),
        Workload("W4", 1, 1 << 30, 1, 1, 2, 10),
        Workload("W5", 61, 147456, 128, 32, 2, 15),
    )
}


def fill(tensor: int, words: Words) -> None:
    """Write the pattern of a tensor: each 64-bit word depends on tensor and position."""
    step = np.uint64(0xBF58476D1CE4E5B9)
    seed = np.uint64(((tensor + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1))
    for start in range(0, len(words), 1 << 20):
        part = words[start : start + (1 << 20)]
        position = np.arange(start, start + len(part), dtype=np.uint64)
        part[:] = seed ^ (position * step + np.uint64(0x1234567))


def check(workload: Workload, tensors: list[Words], sources: list[int], targets: list[int]) -> None:
    """Raise AssertionError unless block targets[i] of every tensor holds the bytes of block sources[i] of the source."""
    words = workload.block_bytes // 8
    expected = np.empty(words * workload.blocks, dtype=np.uint64)
    for tensor, have in enumerate(tensors):
        fill(tensor, expected)
        rows, wanted = have.reshape(workload.blocks, words), expected.reshape(workload.blocks, words)
        for source, target in zip(sources, targets):
            assert np.array_equal(rows[target], wanted[source]), f"{workload.name}: tensor {tensor} block {target} is wrong"
