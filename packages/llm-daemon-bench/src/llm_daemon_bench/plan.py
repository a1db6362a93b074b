"""What has to be run, in which order: pure, so that a resumed run finds the same cells in the same order."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .records import Cache
from .suite import Case, Suite, Target


@dataclass(frozen=True, slots=True)
class Job:
    """One trial to be.  `repeat` from 1 within its launch."""

    case: Case
    launch: int
    round: int
    repeat: int
    cache: Cache
    warmup: bool = False

    def key(self, identity: str) -> str:
        """Names it across runs; `identity` says what it runs on."""
        return digest(identity, self.case.id, self.launch, self.repeat, self.cache, self.warmup)


@dataclass(frozen=True, slots=True)
class Visit:
    """One stay at a target: the trials `first` to `last` of each case, in launch `launch`."""

    target: Target
    launch: int
    round: int
    first: int
    last: int


def digest(*parts: object) -> str:
    """
    >>> digest("a", 1) == digest("a", 1), digest("a", 1) == digest("a", "1"), len(digest("a"))
    (True, False, 16)
    """
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def launch_key(identity: str, launch: int, start: int) -> str:
    return digest(identity, "launch", launch, start)


def repeats(suite: Suite, case: Case) -> int:
    return case.table.trials or suite.table.trials


def most_repeats(suite: Suite, target: Target) -> int:
    return max((repeats(suite, case) for case in suite.cases_for(target)), default=0)


def visits(suite: Suite, seed: int) -> Iterator[list[Visit]]:
    """The visits, in groups: after each group, every server is stopped.

    `up = "one"`: a group is one visit, which is one launch.  `up = "all"`: a group is one launch of all targets, which are
    visited once for each repeat.  `interleave = "round"`: a fresh random order in each round; `none`: as they stand.
    """
    table, number = suite.table, 0
    if table.interleave == "none" and table.up == "one":
        for target in suite.targets:
            for launch in range(1, table.launches + 1):
                yield [Visit(target, launch, launch, 1, most_repeats(suite, target))]
        return
    for launch in range(1, table.launches + 1):
        group: list[Visit] = []
        spans = (
            [(1, 0)] if table.up == "one" else [(r, r) for r in range(1, max(most_repeats(suite, t) for t in suite.targets) + 1)]
        )
        for first, last in spans:
            number += 1
            for target in ordered(suite.targets, seed, number, table.interleave == "round"):
                group.append(Visit(target, launch, number, first, last or most_repeats(suite, target)))
        if table.up == "one":
            yield from ([visit] for visit in group)
        else:
            yield group


def ordered(targets: Sequence[Target], seed: int, number: int, shuffled: bool) -> list[Target]:
    out = list(targets)
    if shuffled:
        random.Random(f"{seed}/round/{number}").shuffle(out)
    return out


def warmups(suite: Suite, visit: Visit) -> list[Job]:
    """Before a server's first trials, each case with another text; they are kept, marked as what they are."""
    out = []
    for case in suite.cases_for(visit.target):
        count = suite.table.warmup if case.table.warmup is None else case.table.warmup
        out += [Job(case, visit.launch, visit.round, n, "cold", True) for n in range(1, count + 1)]
    return out


def jobs(suite: Suite, visit: Visit, seed: int) -> list[Job]:
    """The trials of a visit: repeat by repeat, the cases in a fresh random order (`interleave = "none"`: as they stand)."""
    out: list[Job] = []
    for repeat in range(visit.first, visit.last + 1):
        cases = [case for case in suite.cases_for(visit.target) if repeat <= repeats(suite, case)]
        if suite.table.interleave == "round":
            random.Random(f"{seed}/{visit.target.id}/{visit.launch}/{repeat}").shuffle(cases)
        out += [Job(case, visit.launch, visit.round, repeat, case.table.cache) for case in cases]
    return out


def cold_starts(suite: Suite, visit: Visit) -> list[Job]:
    """One job for each case that wants to be the first request of a fresh server."""
    if visit.target.server.attach is not None:
        return []
    cases = [case for case in suite.cases_for(visit.target) if case.table.cold_start]
    return [Job(case, visit.launch, visit.round, 1, "start") for case in cases]


def total(suite: Suite, target: Target) -> int:
    """Trials of a target in all launches, without warm-ups."""
    each = sum(repeats(suite, case) for case in suite.cases_for(target))
    cold = 0 if target.server.attach is not None else sum(case.table.cold_start for case in suite.cases_for(target))
    return suite.table.launches * (each + cold)
