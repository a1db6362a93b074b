"""Right or wrong: the outcomes of checked trials, and how much they are worth as evidence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from . import stats
from .records import Trial
from .results import Results


@dataclass(frozen=True)
class Passes:
    """Outcomes of one target's checked trials of one (case, cache), in the order in which they ran.

    At temperature 0 a target says the same each time: then its trials are one observation of how good it is, told n times.
    So shares are of trials, but how sure they are goes by different replies (docs/adr/0023).  `replies`: the name of each
    trial's reply; None if a trial was recorded without it, and then equal outcomes are taken for equal replies.
    """

    target: str
    case: str
    cache: str
    outcomes: tuple[bool, ...]
    replies: tuple[str, ...] | None

    @property
    def hits(self) -> int:
        return sum(self.outcomes)

    @property
    def n(self) -> int:
        return len(self.outcomes)

    @property
    def rate(self) -> float:
        return self.hits / self.n

    @property
    def distinct(self) -> int | None:
        """Different replies; None if that is not known."""
        return None if self.replies is None else len(set(self.replies))

    @cached_property
    def worth(self) -> float:
        """The number of independent trials that these are worth, from 1 (all replies are equal) to `n` (all differ)."""
        return stats.effective(Counter(self.outcomes if self.replies is None else self.replies).values())

    @cached_property
    def span(self) -> stats.Interval:
        """Of the share, for so many as they are worth."""
        return stats.wilson(self.rate * self.worth, self.worth)


def passes(results: Results) -> dict[tuple[str, str, str], Passes]:
    """By (target, case, cache).  A trial of a checked case that ended in an error did not pass."""
    checked = {case.id for case in results.session.cases if case.checked}
    found: dict[tuple[str, str, str], dict[tuple[int, ...], list[Trial]]] = {}
    for t in results.measured():
        if t.check is not None or (t.error and t.case in checked):
            groups = found.setdefault((t.target, t.case, t.cache), {})
            groups.setdefault((t.launch, t.round, t.repeat, t.stream), []).append(t)
    return {place: _passes(place, list(groups.values())) for place, groups in found.items()}


def _passes(place: tuple[str, str, str], trials: list[list[Trial]]) -> Passes:
    """Turns of one conversation are one outcome: all of them have to be right."""
    outcomes = tuple(all(t.check is not None and t.check.passed for t in turns) for turns in trials)
    told = all(t.said for turns in trials for t in turns)
    return Passes(*place, outcomes, tuple("/".join(t.said for t in turns) for turns in trials) if told else None)


def by_case(passes: Iterable[Passes]) -> dict[str, float]:
    """Share of right answers of each case: all its trials together, for its cache modes ask the same question."""
    counts: dict[str, list[int]] = {}
    for p in passes:
        row = counts.setdefault(p.case, [0, 0])
        row[0] += p.hits
        row[1] += p.n
    return {case: hits / n for case, (hits, n) in counts.items()}
