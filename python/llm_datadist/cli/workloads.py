# SPDX-License-Identifier: Apache-2.0
"""What a benchmark pulls: the verb bench and the scripts of benchmarks/ say it in the same words."""

from __future__ import annotations

from dataclasses import dataclass

_SMALL_BYTES = 16 << 20  # copying them takes about a millisecond: below that, what goes before and after the copy can be seen


@dataclass(frozen=True)
class Shape:
    """A cache: tensors of blocks x block_bytes. One block is the whole tensor of a contiguous cache."""

    tensors: int
    block_bytes: int
    blocks: int

    @property
    def is_row(self) -> bool:
        return self.blocks == 1

    @property
    def tensor_bytes(self) -> int:
        return self.blocks * self.block_bytes


@dataclass(frozen=True)
class Workload:
    """A call that moves per_call random blocks of each of the first `tensors` tensors; timed calls come after warm-up ones."""

    name: str
    shape: Shape
    per_call: int
    warmup: int
    calls: int  # of a round
    tensors: int = 0  # 0: all

    @property
    def moved_tensors(self) -> int:
        return self.tensors or self.shape.tensors

    @property
    def segments(self) -> int:
        return self.moved_tensors * self.per_call

    @property
    def call_bytes(self) -> int:
        return self.segments * self.shape.block_bytes

    @property
    def is_small(self) -> bool:
        """What counts is the time of a call, not its throughput."""
        return self.call_bytes < _SMALL_BYTES
