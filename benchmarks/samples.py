# SPDX-License-Identifier: Apache-2.0
"""Rounds of one candidate: which of them count, and what they say together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

NOISY = 3  # p90 / p10 of a round that is thrown away


def quantile(ordered: list[int], share: float) -> float:
    """Return a quantile of samples in order, between its two neighbours as numpy does it."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass
class Samples:
    """The calls of all rounds that count, pooled."""

    nanos: list[int] = field(default_factory=list)
    rounds: int = 0
    thrown_away: int = 0
    discarded: list[int] = field(default_factory=list)  # of the rounds that were thrown away

    def add(self, nanos: list[int]) -> float:
        """Take a round in where it counts, and return its p90 / p10."""
        ordered = sorted(nanos)
        spread = quantile(ordered, 0.9) / quantile(ordered, 0.1)
        if spread > NOISY:
            self.thrown_away += 1
            self.discarded.extend(nanos)
        else:
            self.rounds += 1
            self.nanos.extend(nanos)
        return spread

    def micros(self, share: float = 0.5) -> float:
        """Return a quantile in microseconds."""
        return quantile(sorted(self.nanos), share) / 1e3

    def noisy_micros(self) -> float:
        """Return the median of what was thrown away, which is to be shown as such."""
        return quantile(sorted(self.discarded), 0.5) / 1e3
