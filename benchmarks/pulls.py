# SPDX-License-Identifier: Apache-2.0
"""Measures the cases: candidate and references take turns, round by round, in one run."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import syscalls
from cases import Beside, Case
from ends import Setting
from pair import NotBuilt, Pair, Round, linked
from reference import References
from samples import Samples
from workloads import WORKLOADS, Workload

Row = dict[str, Any]

# A round that is thrown away is made again, but not for ever: with r rounds wanted there are at most r + r // 2.
_SPARE = 2
_SHOWN_ROUNDS = 2  # of a case that is only shown: nothing is asked of it
# A reference that is so many times slower than the best one after some rounds is not the one that counts, and gets no more.
_SLOWER, _TRIAL_ROUNDS = 1.2, 2


def measure(cases: Sequence[Case], references: References, rounds: int, count_syscalls: bool) -> list[Row]:
    """Measure cases and return a row for each."""
    rows = []
    for case in cases:
        print(f"{case.name} ...", flush=True)
        rows.append(_measure(case, references, rounds, count_syscalls))
    return rows


def _measure(case: Case, references: References, rounds: int, count_syscalls: bool) -> Row:
    workload = WORKLOADS[case.workload]
    row: Row = {"case": case.name, "way": case.way.name, "workload": workload.name, "bytes": workload.call_bytes}
    wanted = rounds if case.bars else min(rounds, _SHOWN_ROUNDS)
    try:
        ours, own_rounds, theirs, beside = _rounds(case, workload, references, wanted)
        with _verified(case, workload) as pair:
            row["explain"] = pair.explain
            if count_syscalls:
                row.update(_syscalls(pair, workload))
            if case.workload == "W3":
                row["boundary_us"] = pair.boundary()
    except NotBuilt as exc:
        return {**row, "skipped": str(exc)}
    return {**row, **_figures(case, workload, ours, own_rounds), **_against(case, workload, ours, theirs, beside)}


@contextlib.contextmanager
def _verified(case: Case, workload: Workload) -> Iterator[Pair]:
    """Start a pair whose first pulls are over. Pulls bring the right bytes before and after what is done with it."""
    with linked(Setting(case.way.transport, case.way.pool, (workload.shape,), case.way.spin_micros)) as pair:
        pair.verify(workload)
        pair.round(workload)
        yield pair
        pair.verify(workload)


def _rounds(
    case: Case, workload: Workload, references: References, rounds: int
) -> tuple[Samples, list[Round], dict[str, Samples], dict[str, list[Beside]]]:
    """Let the candidates take turns until each has its rounds.

    All have new processes for each round: how the pages of a process lie in the machine's memory is worth up to a fifth, and is
    drawn anew with them.
    """
    ours, own_rounds = Samples(), []
    theirs = {candidate: Samples() for candidate in case.candidates if references.has(candidate)}
    beside: dict[str, list[Beside]] = {candidate: [] for candidate in theirs}
    for _ in range(rounds + rounds // _SPARE):
        counting = [candidate for candidate in theirs if not _is_beaten(candidate, case, theirs)]
        if min(samples.rounds for samples in (ours, *(theirs[candidate] for candidate in counting))) >= rounds:
            break
        medians = {}
        for candidate in counting:
            nanos = references.round(candidate, workload.name)
            if _take(theirs[candidate], nanos, f"{case.name}: {candidate}"):
                medians[candidate] = statistics.median(nanos) / 1e3
        with _verified(case, workload) as pair:
            done = pair.round(workload)
        if _take(ours, done.nanos, f"{case.name}: the library"):
            own_rounds.append(done)
            for candidate, median in medians.items():
                beside[candidate].append((median, statistics.median(done.nanos) / 1e3))
    return ours, own_rounds, theirs, beside


def _is_beaten(candidate: str, case: Case, theirs: dict[str, Samples]) -> bool:
    """Tell whether a candidate can't become the reference any more."""
    rivals = [theirs[reference].micros() for reference in case.references if _is_tried(theirs.get(reference))]
    own = theirs[candidate]
    return candidate in case.references and _is_tried(own) and own.micros() > _SLOWER * min(rivals)


def _is_tried(samples: Samples | None) -> bool:
    return samples is not None and samples.rounds >= _TRIAL_ROUNDS


def _take(samples: Samples, nanos: list[int], what: str) -> bool:
    rounds = samples.rounds
    spread = samples.add(nanos)
    if samples.rounds == rounds:
        print(f"  thrown away: a round of {what} whose p90 is {spread:.1f} times its p10", flush=True)
    return samples.rounds > rounds


def _figures(case: Case, workload: Workload, ours: Samples, rounds: list[Round]) -> Row:
    row: Row = {"rounds": ours.rounds, "thrown_away": ours.thrown_away}
    if not rounds:
        return {**row, "noisy": True, "noisy_p50_us": ours.noisy_micros()}
    median, moved = ours.micros(), sum(done.bytes for done in rounds)
    cpu = sum(done.cpu_seconds for done in rounds)
    return {
        **row,
        "calls": len(ours.nanos),
        "p50_us": median,
        "p99_us": ours.micros(0.99),
        "gb_per_s": workload.call_bytes / median / 1e3,
        "cpu_seconds_per_gib": cpu / (moved / 2**30),
        "cores_used": cpu / sum(done.seconds for done in rounds),
    }


def _against(
    case: Case, workload: Workload, ours: Samples, theirs: dict[str, Samples], beside: dict[str, list[Beside]]
) -> Row:
    medians = {candidate: samples.micros() for candidate, samples in theirs.items() if samples.rounds}
    candidates: dict[str, Row] = {
        candidate: {"rounds": samples.rounds, "thrown_away": samples.thrown_away} for candidate, samples in theirs.items()
    }
    for candidate, median in medians.items():
        candidates[candidate].update(p50_us=median, gb_per_s=workload.call_bytes / median / 1e3)
    row: Row = {"candidates": candidates}
    missing = [candidate for candidate in case.references if candidate not in medians]
    best = None if missing else min(case.references, key=medians.__getitem__)  # of some only it might be the worse one
    if best is None:
        absent = [candidate for candidate in missing if candidate not in theirs]
        row["no_reference"] = f"no {absent[0]} here" if absent else f"no quiet round of {' and '.join(missing)}"
    else:
        row.update(reference=best, reference_p50_us=medians[best], reference_gb_per_s=workload.call_bytes / medians[best] / 1e3)
    if ours.rounds:
        pairs = beside.get(best or "", [])
        if pairs:
            row["beside"] = pairs
            row["ratio"] = statistics.median(reference / own for reference, own in pairs)
        row["bars"] = [{"text": bar.text, "holds": bar.holds(ours.micros(), pairs)} for bar in case.bars]
    return row


def _syscalls(pair: Pair, workload: Workload) -> Row:
    try:
        return {"syscalls": syscalls.per_pull(pair, workload)}
    except syscalls.NotCounted as exc:
        return {"syscalls_reason": str(exc)}
