"""Is one target faster than another?  Only a change that passes every test is called one; all others are "no difference shown".

The tests: the interval of the ratio excludes 1; the change is as large as the threshold; Holm's correction over everything
shown leaves p below 0.05.  With fewer than five launches there is a fourth: the change is larger than launches of the same
thing differ among themselves, for no interval from so few knows that.  Sides with fewer than five trials are not compared at
all: no test could tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from . import cells as cells_, passes as passes_, stats
from .cells import ALL, Cell, Key
from .passes import Passes
from .results import Results

LEAST = 5  # trials a side: with 3 a rank test cannot go below p = 0.1, with 5 it reaches 0.008
ENOUGH_LAUNCHES = 5
ENOUGH_CASES = 6  # checked cases: with 5 the exact test of pairs cannot go below p = 0.06
THRESHOLD = 0.05  # changes below are of no interest, however surely they are there
FEW: Final = "too few trials"
SAME: Final = "no difference shown"

Verdict = Literal["faster", "slower", "better", "worse", "no difference shown", "too few trials"]


@dataclass(frozen=True)
class Side:
    """One target of one session."""

    results: Results
    target: str

    def __str__(self) -> str:
        return f"{self.results.session.id}:{self.target}"

    def cells(self) -> dict[Key, Cell]:
        return {key: cell for (target, key), cell in cells_.group(self.results).items() if target == self.target}

    def passes(self) -> dict[tuple[str, str], Passes]:
        return {(p.case, p.cache): p for p in passes_.passes(self.results).values() if p.target == self.target}


@dataclass(frozen=True, slots=True)
class Row:
    """One cell on both sides, or the outcomes of one case or of all of them (`key.checkpoint` is "pass").

    `base`, `new`: median ms, or share of passes.  `n`: trials on each side; of outcomes the number that they are worth
    (`Passes.worth`, rounded down), or that of cases.  `p`: after Holm; None if not tested.
    `spread`: logarithm of the factor by which launches of the same thing differ, 0 where there are launches enough.
    `cause`: the largest share of a change of time, see `cells.why`; or why a change that seems large was not called.
    `is_fact`: a change of passes that is one of this very question, whatever it tells about others.
    """

    key: Key
    base: float
    new: float
    n: tuple[int, int]
    ratio: stats.Ratio | None = None
    p: float | None = None
    verdict: Verdict = "no difference shown"
    spread: float = 0.0
    cause: str = ""
    is_fact: bool = False

    @property
    def change(self) -> float:
        """0.10: a tenth slower; for passes the difference of the shares."""
        return self.ratio.ratio - 1 if self.ratio else self.new - self.base


@dataclass(frozen=True, slots=True)
class Comparison:
    """`missing`: cells that one side alone has, as `key (only BASE)` or `key (only NEW)`."""

    base: str
    new: str
    threshold: float
    paired: bool
    rows: tuple[Row, ...]
    missing: tuple[Key, ...] = ()
    added: tuple[Key, ...] = ()
    one_launch: bool = False

    def calls(self) -> list[Row]:
        """Rows in which something was called different."""
        return [row for row in self.rows if row.verdict not in (SAME, FEW)]


def compare(base: Side, new: Side, *, threshold: float = THRESHOLD, floor: float = 0.0, seed: int = 7) -> Comparison:
    """All cells that both have.  `threshold` and `floor` (the noise floor of an A/A run) are shares; twice the floor counts."""
    limit = max(threshold, 2 * floor)
    paired = base.results.folder == new.results.folder
    before, after = base.cells(), new.cells()
    rows, paired_rows = [], []
    for key in [key for key in before if key in after]:
        row, was_paired = _time(before[key], after[key], paired, seed)
        rows.append(row)
        paired_rows.append(was_paired)
    old, now = base.passes(), new.passes()
    rows += [_pass(old[place], now[place]) for place in old if place in now]
    rows += _all_cases([old[place] for place in old if place in now], [now[place] for place in old if place in now])
    judged = _judge(rows, limit)
    return Comparison(
        str(base),
        str(new),
        limit,
        paired and all(paired_rows),
        tuple(_explained(row, before, after) for row in judged),
        tuple(key for key in before if key not in after),
        tuple(key for key in after if key not in before),
        any(len(cell.launches()) < 2 for side in (before, after) for cell in side.values() if cell.n >= LEAST),
    )


def _time(base: Cell, new: Cell, paired: bool, seed: int) -> tuple[Row, bool]:
    row = Row(base.key, base.median, new.median, (base.n, new.n), verdict=FEW)
    if min(row.n) < LEAST:
        return row, paired
    pairs = _pairs(base, new) if paired else None
    old, now = pairs or (base.launches(), new.launches())
    ratio = stats.ratio_of_medians(old, now, paired=pairs is not None, seed=seed)
    if pairs is None:  # ranks know nothing of launches, the bootstrap little of few trials: both have to see it
        ratio = replace(ratio, p=max(ratio.p, stats.mann_whitney(base.times, new.times)))
    few = min(len(old), len(now)) < ENOUGH_LAUNCHES
    spread = stats.launch_spread(old, now, paired=pairs is not None) if few else 0.0
    return replace(row, ratio=ratio, p=ratio.p, verdict=SAME, spread=spread), pairs is not None or not paired


def _pairs(base: Cell, new: Cell) -> tuple[list[list[float]], list[list[float]]] | None:
    """Trials of the same launch and round, by launch; None where so many lack a partner that pairing would lose them."""
    partners = {dot.pair: dot.ms for dot in new.dots}
    groups: dict[int, list[tuple[float, float]]] = {}
    for dot in base.dots:
        if dot.pair in partners:
            groups.setdefault(dot.pair[0], []).append((dot.ms, partners[dot.pair]))
    found = sum(map(len, groups.values()))
    if found < LEAST or found < 0.8 * max(base.n, new.n):
        return None
    return [[a for a, _ in group] for group in groups.values()], [[b for _, b in group] for group in groups.values()]


def _pass(base: Passes, new: Passes) -> Row:
    """One case.  Outcomes of a round are no pairs: nothing but the question, which all trials share, ties them together.

    On outcomes of 0 and 1 the exact rank test is Fisher's, with doubled tails.
    """
    row = Row(Key(base.case, base.cache, 1, "pass"), base.rate, new.rate, (int(base.worth), int(new.worth)), verdict=FEW)
    if min(row.n) < LEAST:
        said = [[float(right) for right in side.outcomes] for side in (base, new)]
        return replace(row, is_fact=base.distinct == new.distinct == 1 or stats.mann_whitney(*said) < 1 - stats.LEVEL)
    hits = [round(side.rate * n) for side, n in zip((base, new), row.n, strict=True)]
    return replace(
        row, verdict=SAME, p=stats.mann_whitney(*([1.0] * h + [0.0] * (n - h) for h, n in zip(hits, row.n, strict=True)))
    )


def _all_cases(base: Iterable[Passes], new: Iterable[Passes]) -> list[Row]:
    """All cases at once, where there are enough: exact McNemar, pairs are the cases, the side that is right more often has it."""
    old, now = passes_.by_case(base), passes_.by_case(new)
    if len(old) < ENOUGH_CASES:
        return []
    before, after = (sum(x.values()) / len(x) for x in (old, now))
    lost, won = sum(old[case] > now[case] for case in old), sum(old[case] < now[case] for case in old)
    agree = (after - before) * (won - lost) > 0  # else a few large changes stand against many small ones
    p = stats.mcnemar(lost, won) if agree else 1.0
    return [Row(Key(ALL, "", 1, "pass"), before, after, (len(old), len(now)), p=p, verdict=SAME)]


def _judge(rows: Iterable[Row], threshold: float) -> list[Row]:
    """Holm over all rows that were tested, then the verdicts."""
    rows = list(rows)
    tested = [i for i, row in enumerate(rows) if row.p is not None]
    for i, p in zip(tested, stats.holm([rows[i].p or 0.0 for i in tested]), strict=True):
        rows[i] = replace(rows[i], p=p, verdict=_verdict(rows[i], p, threshold))
    return rows


def _verdict(row: Row, p: float, threshold: float) -> Verdict:
    if p >= 1 - stats.LEVEL or abs(row.change) < threshold:
        return "no difference shown"
    if row.ratio is None:
        return "better" if row.change > 0 else "worse"
    if row.ratio.low <= 1 <= row.ratio.high or _hidden(row):
        return "no difference shown"
    return "slower" if row.ratio.ratio > 1 else "faster"


def _hidden(row: Row) -> bool:
    """Whether launches of the same thing differ as much as the sides do."""
    change = row.ratio.ratio if row.ratio else 1.0
    return math.isfinite(change) and change > 0 and abs(math.log(change)) <= row.spread


def _explained(row: Row, before: dict[Key, Cell], after: dict[Key, Cell]) -> Row:
    if row.verdict in ("faster", "slower") and math.isfinite(row.change):
        return replace(row, cause=cells_.why(cells_.parts(before[row.key]), cells_.parts(after[row.key])))
    if row.verdict == SAME and row.ratio and not row.ratio.low <= 1 <= row.ratio.high and _hidden(row):
        return replace(row, cause=f"launches differ by {math.expm1(row.spread):.0%}")
    return row


# -- Gate and A/A --------------------------------------------------------------------------------------------------------


def gate(comparison: Comparison) -> list[str]:
    """One line for each reason not to let NEW pass: slower or worse, gone, or too few trials to tell.

    The limit is the comparison's threshold.  Where equal replies leave too little to tell, a case that was right more often
    before is a reason if that is a fact about that question, if not about others: one reply each time, or more than chance.
    Cells with one value a launch (lifecycle, first requests) count once there are enough of them.
    """
    out = []
    for row in comparison.rows:
        if row.verdict in ("slower", "worse"):
            out.append(f"{row.key}: {tell_change(row)}")
        elif row.verdict == FEW and row.key.checkpoint == "pass":
            if row.is_fact and row.base - row.new >= comparison.threshold:
                out.append(f"{row.key}: {tell_change(row)}, by {few(row)}")
        elif row.verdict == FEW and row.key.cache != "start":
            out.append(f"{row.key}: {few(row)}")
    return out + [f"{key}: not there any more" for key in comparison.missing if key.case != cells_.START]


def few(row: Row) -> str:
    """
    >>> few(Row(Key("chat", "warm", 1, "done"), 1.0, 1.0, (4, 4))), few(Row(Key("chat", "warm", 1, "pass"), 1.0, 0.0, (1, 2)))
    ('too few trials to tell (4 and 4, 5 a side are needed)', 'too few different replies to tell (1 and 2, 5 a side are needed)')
    """
    what = "different replies" if row.key.checkpoint == "pass" else "trials"
    return f"too few {what} to tell ({row.n[0]} and {row.n[1]}, {LEAST} a side are needed)"


def tell_change(row: Row) -> str:
    """A row's change in words.

    >>> key = Key("chat", "warm", 1, "pass")
    >>> tell_change(Row(key, 1.0, 0.5, (8, 8)))
    'passes 100 % -> 50 %'
    >>> tell_change(Row(key, 100.0, 110.0, (8, 8), stats.Ratio(1.1, 1.05, 1.15, 0.01), cause="slower tokens"))
    '100 -> 110 ms, +10.0 % (+5.0 % to +15.0 %), slower tokens'
    """
    if row.ratio is None:
        return f"passes {row.base * 100:.0f} % -> {row.new * 100:.0f} %"
    r = row.ratio
    text = f"{tell_ms(row.base)} -> {tell_ms(row.new)} ms, {percent(r.ratio)} ({percent(r.low)} to {percent(r.high)})"
    return text + (f", {row.cause}" if row.cause else "")


def percent(ratio: float) -> str:
    """
    >>> percent(1.1), percent(0.9), percent(math.inf), percent(0)
    ('+10.0 %', '-10.0 %', 'to never', 'from never')
    """
    if ratio == 0 or math.isinf(ratio):
        return "to never" if ratio else "from never"
    return f"{(ratio - 1) * 100:+.1f} %"


def tell_ms(ms: float) -> str:
    """Milliseconds with three or four digits.

    >>> [tell_ms(x) for x in (0.1234, 5.678, 98.76, 1234.5, math.inf)]
    ['0.12', '5.7', '98.8', '1234', 'not reached']
    """
    if math.isinf(ms):
        return "not reached"
    return f"{ms:.2f}" if ms < 1 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What an A/A run tells: `floors` by cell, `floor` over all of them (their 95 % quantile), `comparison` of the two halves."""

    target: str
    floor: float
    floors: dict[Key, float]
    comparison: Comparison


def self_test(side: Side, twin: Side | None = None, *, seed: int = 7) -> SelfTest:
    """The noise floor of a target: with `twin` the same thing run as a second target, else its own trials dealt into two."""
    mine = {key: cell for key, cell in side.cells().items() if cell.n >= 2 * LEAST and key.case != cells_.START}
    theirs = twin.cells() if twin else {}
    floors = {}
    for key, cell in mine.items():
        launches = [*cell.launches(), *(theirs[key].launches() if key in theirs else [])]
        floors[key] = stats.noise_floor(launches, seed=seed)
    sides = (side, twin) if twin else _halves(side)
    finite = [x for x in floors.values() if math.isfinite(x)]
    return SelfTest(side.target, stats.quantile(finite, 0.95) if finite else math.inf, floors, compare(*sides, seed=seed))


def _halves(side: Side) -> tuple[Side, Side]:
    """Every other round of the same launches: as if two targets had taken turns."""
    trials = [t for t in side.results.measured() if t.target == side.target]
    order: dict[tuple[int, str, str], list[tuple[int, int]]] = {}
    for t in trials:
        turns = order.setdefault((t.launch, t.case, t.cache), [])
        if (t.round, t.repeat) not in turns:
            turns.append((t.round, t.repeat))
    out = []
    for half in (0, 1):
        kept = []
        for t in trials:
            at = order[(t.launch, t.case, t.cache)].index((t.round, t.repeat))
            if at % 2 == half:
                kept.append(_renumbered(t, at // 2))
        out.append(Side(replace(side.results, trials=kept, launches=[]), side.target))
    return out[0], out[1]


def _renumbered(trial: Any, at: int) -> Any:
    import msgspec

    return msgspec.structs.replace(trial, round=at + 1, repeat=1)
