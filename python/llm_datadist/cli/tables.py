# SPDX-License-Identifier: Apache-2.0
"""Tables of plain text."""

from __future__ import annotations

from collections.abc import Sequence


def plain(head: Sequence[str], rows: Sequence[Sequence[str]], words: int, *, open_end: bool = False) -> str:
    """Return a table: so many columns of words, flush left, then figures, flush right, and last a verdict.

    open_end: verdicts may be long, so that the line below the head ends where the head does.
    """
    cells = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    if open_end:
        widths[-1] = len(head[-1])
    lines = []
    for line in cells:
        left = [cell.ljust(width) for cell, width in zip(line[:words], widths)]
        right = [cell.rjust(width) for cell, width in zip(line[words:-1], widths[words:])]
        lines.append("  ".join([*left, *right, line[-1]]))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
