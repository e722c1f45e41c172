# SPDX-License-Identifier: Apache-2.0
"""What the caches of demo and bench are filled with, and the check that it arrived, byte for byte.

Every 8 bytes of a cache are a number that no other 8 bytes of it have: it depends on the tensor (so on layer, and key or
value) and on the position in it. Bytes that arrive at a wrong place, in a wrong tensor or not at all therefore never look
right. What must not be written is REST; what must be is made the complement of what must arrive, so that each single byte has
to be written.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

REST = 0xA5  # what lies where a pull must write nothing

_WORD = 8
_ODD = np.uint64(0x9E3779B97F4A7C15)  # any odd number: multiplication by it permutes the 64-bit numbers


class Pattern:
    """The content of caches whose tensors have tensor_bytes each. seed tells one cache from another."""

    def __init__(self, tensor_bytes: int, seed: int) -> None:
        words = np.arange(-(-tensor_bytes // _WORD), dtype=np.uint64) * _ODD
        self._base = words ^ (words >> np.uint64(29))
        self._bytes = tensor_bytes
        self._seed = seed << 32

    def tensor(self, index: int) -> Bytes:
        """Return what lies in a tensor of the source."""
        # Numbers that differ in their upper bits only can't be mistaken for those of a shifted position.
        mark = (self._seed + index + 1) * int(_ODD) % (1 << 64)
        content: Bytes = (self._base ^ np.uint64(mark)).view(np.uint8)[: self._bytes]
        return content

    def fill(self, tensors: list[Bytes]) -> None:
        """Make tensors those of the source."""
        for index, tensor in enumerate(tensors):
            tensor[:] = self.tensor(index)


@dataclass
class Expectation:
    """What a pull has to make of a destination.

    tensors maps a tensor of the destination to that of the source. blocks has the blocks of the source and, in the same order,
    those of the destination; None where each tensor moves as a whole.
    """

    pattern: Pattern
    tensors: dict[int, int]
    block_bytes: int = 0
    blocks: tuple[list[int], list[int]] | None = None

    def tensor(self, index: int, size: int) -> tuple[Bytes, Bytes]:
        """Return what a tensor of size bytes must hold before the pull and after it."""
        after = np.full(size, REST, dtype=np.uint8)
        before = after.copy()
        if index in self.tensors:
            arriving = self.pattern.tensor(self.tensors[index])
            if self.blocks is None:
                after[: arriving.size] = arriving
                before[: arriving.size] = ~arriving
            else:
                src, dst = self.blocks
                pieces = arriving.reshape(-1, self.block_bytes)[src]
                after.reshape(-1, self.block_bytes)[dst] = pieces
                before.reshape(-1, self.block_bytes)[dst] = ~pieces
        return before, after

    def poison(self, tensors: list[Bytes]) -> None:
        """Prepare a destination for the pull."""
        for index, tensor in enumerate(tensors):
            tensor[:] = self.tensor(index, tensor.size)[0]

    def first_wrong(self, tensors: list[Bytes]) -> str | None:
        """Compare every byte of a destination; return where the first wrong one is and how many there are, or None."""
        first, wrong = None, 0
        for index, tensor in enumerate(tensors):
            after = self.tensor(index, tensor.size)[1]
            if np.array_equal(tensor, after):
                continue
            places = np.flatnonzero(tensor != after)
            wrong += places.size
            if first is None:
                at = int(places[0])
                first = f"byte {at} of tensor {index} is {tensor[at]:#04x}, not {after[at]:#04x}"
        return None if first is None else f"{wrong} wrong bytes; {first}"
