# SPDX-License-Identifier: Apache-2.0
"""The workloads of docs/performance.md, and the bytes that they move. benchmarks/perf/wl.h has the same for C."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from llm_datadist.cli.workloads import Shape, Workload

Words = npt.NDArray[np.uint64]

_WORD = 8
_PART = 1 << 20  # words that are made at a time: what does not fit a cache takes several times as long
_TENSOR_STEP, _WORD_STEP, _OFFSET = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x1234567

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("W1", Shape(64, 32768, 512), 64, 3, 20),
        Workload("W2", Shape(64, 32768, 512), 1, 50, 600),
        Workload("W3", Shape(1, 16384, 512), 1, 200, 2500),
        Workload("W4", Shape(1, 1 << 30, 1), 1, 2, 10),
        Workload("W5", Shape(61, 147456, 128), 32, 2, 15),
    )
}


def expected(tensor: int, first: int, count: int) -> Words:
    """Return words of the pattern of a tensor: each depends on the tensor and on its place in it."""
    seed = np.uint64((tensor + 1) * _TENSOR_STEP % (1 << 64))
    places = np.arange(first, first + count, dtype=np.uint64)
    words: Words = seed ^ (places * np.uint64(_WORD_STEP) + np.uint64(_OFFSET))
    return words


def fill(tensor: int, words: Words) -> None:
    """Write the pattern of a tensor."""
    for start in range(0, len(words), _PART):
        part = words[start : start + _PART]
        part[:] = expected(tensor, start, len(part))


def first_wrong(workload: Workload, tensors: Sequence[Words], sources: Sequence[int], targets: Sequence[int]) -> str | None:
    """Say which block targets[i] of a moved tensor does not hold the bytes of block sources[i] of the owner's; None: all do."""
    block = workload.shape.block_bytes // _WORD
    for tensor, have in enumerate(tensors[: workload.moved_tensors]):
        for source, target in zip(sources, targets):
            for start in range(0, block, _PART):
                count = min(_PART, block - start)
                part = have[target * block + start :][:count]
                if not np.array_equal(part, expected(tensor, source * block + start, count)):
                    return f"{workload.name}: block {target} of tensor {tensor} does not hold block {source}"
    return None
