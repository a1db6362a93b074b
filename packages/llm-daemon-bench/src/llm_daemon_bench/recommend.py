"""Which target to use: those that meet every wish, ranked; and one reason for each that does not.

A wish is judged by the pessimistic end of its 95 % interval, so that a recommendation still holds tomorrow.  Where the
interval holds the limit nothing can be said yet: "undecided", with the number of trials that will probably decide it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from llm_daemon.errors import UsageError

from . import cells as cells_, stats
from .cells import START, Cell, Key
from .compare import LEAST, tell_ms
from .errors import ResultsError
from .passes import Passes, by_case, passes as passes_of
from .records import TargetInfo, Trial
from .results import Results

Prefer = Literal["speed", "quality", "size"]
State = Literal["met", "missed", "undecided"]
MOST = 500  # trials: what needs more to decide is too close to care
_SLO = re.compile(
    r"(?P<case>[^:@]+?)(@(?P<cache>cold|warm|asis|start))?(\.(?P<point>[^:.@]+))?:(?P<what>p50|p90|p95|p99|pass|reach)\s*"
    r"(?P<op><=|>=)\s*(?P<limit>\d+(\.\d+)?)(?P<unit>ms|s|%)?"
)


@dataclass(frozen=True, slots=True)
class Slo:
    """`CASE[@CACHE].CHECKPOINT:p50<=500`, `CASE.CHECKPOINT:reach>=0.9` or `CASE[@CACHE]:pass>=0.9`.

    `limit`: milliseconds, or a share.  `cache` None: the mode the suite gives the case.
    """

    case: str
    cache: str | None
    point: str | None
    what: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Slo:
        """Raises UsageError (`bad_slo`).

        >>> Slo.parse("code.one_line:p90<=0.5s")
        Slo(case='code', cache=None, point='one_line', what='p90', limit=500.0)
        >>> Slo.parse("extract@start:pass>=90%").limit
        0.9
        """
        found = _SLO.fullmatch(text.strip())
        hint = "like code.one_line:p50<=500, code.one_line:reach>=0.9 or code:pass>=0.9"
        if found is None:
            raise UsageError(f"cannot read the wish {text!r}", code="bad_slo", hint=hint)
        what, limit = found["what"], float(found["limit"])
        share = what in ("pass", "reach")
        limit *= {"s": 1000.0, "%": 0.01}.get(found["unit"], 1.0)
        if (share == (found["op"] == "<=")) or (what == "pass") == bool(found["point"]) or (share and limit > 1):
            raise UsageError(f"the wish {text!r} makes no sense", code="bad_slo", hint=hint)
        if share != (found["unit"] == "%") and found["unit"]:
            raise UsageError(f"the wish {text!r} has the wrong unit", code="bad_slo", hint=hint)
        return cls(found["case"], found["cache"], found["point"], what, limit)

    def __str__(self) -> str:
        place = self.case + (f"@{self.cache}" if self.cache else "") + (f".{self.point}" if self.point else "")
        return f"{place}:{self.what}" + (f">={self.limit:g}" if self.what in ("pass", "reach") else f"<={self.limit:g}")


@dataclass(frozen=True, slots=True)
class Judged:
    """One wish on one target; `reason` in words, `more`: trials that will probably decide it (None: too close to decide)."""

    wish: str
    state: State
    reason: str
    more: int | None = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A target with what ranks it.  `slowness`: geometric mean over checkpoints of its median by the fastest target's;
    infinite if one is not reached.  `quality`: mean share of passes over checked cases; None without such.  `rss_mib`: peak.
    """

    info: TargetInfo
    judged: tuple[Judged, ...]
    slowness: float
    quality: float | None
    rss_mib: float | None

    @property
    def state(self) -> State:
        states = {j.state for j in self.judged}
        return "missed" if "missed" in states else "undecided" if "undecided" in states else "met"

    @property
    def reason(self) -> str:
        """The first wish that is not met."""
        return next((j.reason for state in ("missed", "undecided") for j in self.judged if j.state == state), "")

    @property
    def more(self) -> int | None:
        counts = [j.more for j in self.judged if j.state == "undecided"]
        return None if None in counts else max((c for c in counts if c is not None), default=0)


@dataclass(frozen=True, slots=True)
class Advice:
    """`ranked`: those that meet all wishes, best first.  `undecided`, `rejected`: the others, best first."""

    prefer: Prefer
    wishes: tuple[str, ...]
    ranked: tuple[Candidate, ...]
    undecided: tuple[Candidate, ...]
    rejected: tuple[Candidate, ...]

    @property
    def winner(self) -> Candidate | None:
        return self.ranked[0] if self.ranked else None

    @property
    def more(self) -> int | None:
        """How many trials more will probably decide: the least over undecided targets; None where none will."""
        return min((c.more for c in self.undecided if c.more is not None), default=None)


def wishes_of(results: Results) -> list[Slo]:
    """The suite's own: the median of each checkpoint with `slo_ms`."""
    return [Slo(c.id, None, p.id, "p50", p.slo_ms) for c in results.session.cases for p in c.checkpoints if p.slo_ms is not None]


def recommend(
    results: Results, slos: Sequence[Slo], *, prefer: Prefer = "speed", max_rss_mib: float | None = None, observed: bool = False
) -> Advice:
    """Judges every target of the session.  `observed`: by what was seen, not by the end of the interval.

    Raises UsageError (`bad_slo`) for a case or checkpoint that the session does not have.
    """
    if not results.measured():
        raise ResultsError(f"{results.folder} holds no measured trial", hint="`llm-daemon bench run` first")
    cells, passes = cells_.group(results), passes_of(results)
    for slo in slos:
        _check_known(slo, results)
    slow = slowness(cells, slos)
    found = []
    for info in results.session.targets:
        judged = [_judge(slo, info.id, results, cells, passes, observed) for slo in slos]
        rss = max((x for t in results.measured() if t.target == info.id and (x := t.res.rss_mib) is not None), default=None)
        if max_rss_mib is not None:
            judged.append(_judge_rss(rss, max_rss_mib))
        if not any(t.target == info.id and t.error is None for t in results.measured()):
            judged.append(Judged("it runs", "missed", "no trial of it went well"))
        found.append(Candidate(info, tuple(judged), slow.get(info.id, math.inf), quality_of(info.id, passes.values()), rss))
    found.sort(key=lambda c: _rank(c, prefer))
    names = [str(slo) for slo in slos] + ([f"rss<={max_rss_mib:.0f}MiB"] if max_rss_mib is not None else [])
    groups = {state: tuple(c for c in found if c.state == state) for state in ("met", "undecided", "missed")}
    return Advice(prefer, tuple(names), groups["met"], groups["undecided"], groups["missed"])


def _check_known(slo: Slo, results: Results) -> None:
    case = next((c for c in results.session.cases if c.id == slo.case), None)
    if case is None:
        raise UsageError(
            f"no case {slo.case!r}", code="bad_slo", hint="cases are " + ", ".join(c.id for c in results.session.cases)
        )
    points = [p.id for p in case.checkpoints]
    if slo.point is not None and slo.point not in points:
        raise UsageError(f"{slo.case} has no checkpoint {slo.point!r}", code="bad_slo", hint="it has " + ", ".join(points))
    if slo.what == "pass" and not case.checked:
        raise UsageError(f"{slo.case} has no check that could pass", code="bad_slo", hint="give the case a `check` in the suite")


def _cell(slo: Slo, target: str, results: Results, cells: dict[tuple[str, Key], Cell]) -> Cell | None:
    case = next(c for c in results.session.cases if c.id == slo.case)
    point = next(p for p in case.checkpoints if p.id == slo.point)
    return cells.get((target, Key(case.id, slo.cache or case.cache, point.turn, point.id)))


def _judge(
    slo: Slo,
    target: str,
    results: Results,
    cells: dict[tuple[str, Key], Cell],
    passes: dict[tuple[str, str, str], Passes],
    observed: bool,
) -> Judged:
    if slo.what == "pass":
        case = next(c for c in results.session.cases if c.id == slo.case)
        seen = passes.get((target, slo.case, slo.cache or case.cache))
        return _judge_pass(slo, seen, observed) if seen else _nothing(slo)
    cell = _cell(slo, target, results, cells)
    if slo.what == "reach":
        return (
            _judge_share(slo, f"reached {cell.reached} of {cell.n}", cell.reached / cell.n, cell.n, observed)
            if cell
            else _nothing(slo)
        )
    return _judge_time(slo, cell, observed)


def _nothing(slo: Slo) -> Judged:
    return Judged(str(slo), "missed", f"{slo.case}: never ran to its end")


def _judge_time(slo: Slo, cell: Cell | None, observed: bool) -> Judged:
    if cell is None or not cell.n:
        return _nothing(slo)
    q, limit, name = int(slo.what[1:]) / 100, slo.limit, f"{slo.case}.{slo.point}"
    value, span = stats.quantile(cell.times, q), stats.quantile_interval(cell.times, q)
    needed = stats.trials_for_interval(q)
    said = f"{name} {slo.what} {tell_ms(value)}" + ("" if math.isinf(value) else " ms")
    if observed:
        return Judged(str(slo), "met" if value <= limit else "missed", f"{said} {'<=' if value <= limit else '>'} {limit:g}")
    if cell.n >= LEAST and span.low > limit:
        return Judged(str(slo), "missed", f"{said} > {limit:g}")
    if span.high <= limit and cell.n >= needed:
        return Judged(str(slo), "met", f"{said} <= {limit:g}")
    more = max(needed - cell.n, 1) if cell.n < needed else _more(cell.n, value, span, limit)
    if math.isinf(span.low):  # few or none reached it
        return Judged(str(slo), "undecided", f"{said}: {cell.reached} of {cell.n} reached it; limit {limit:g}", more)
    high = "never" if math.isinf(span.high) else tell_ms(span.high)
    return Judged(str(slo), "undecided", f"{said}, somewhere from {tell_ms(span.low)} to {high}; limit {limit:g}", more)


def _more(n: int, value: float, span: stats.Interval, limit: float) -> int | None:
    """Trials until the interval, which shrinks with the root of their number, would end at the limit."""
    half = span.high - value if limit >= value else value - span.low
    if value == limit or not math.isfinite(half) or not math.isfinite(value):
        return None if value == limit else n
    more = math.ceil(n * (half / (limit - value)) ** 2) - n
    return max(more, 1) if more <= MOST else None


def _judge_pass(slo: Slo, seen: Passes, observed: bool) -> Judged:
    """By as many trials as they are worth.  Who always says the same is judged by it: of this case there is no more to learn."""
    same = seen.distinct == 1 and seen.n > 1
    words = (
        "" if seen.distinct in (None, seen.n) else ", always the same reply" if same else f", {seen.distinct} different replies"
    )
    judged = _judge_share(
        slo, f"right {seen.hits} of {seen.n}{words}", seen.rate, seen.worth, observed or (same and seen.n >= LEAST),
        seen.n / seen.worth,
    )  # fmt: skip
    if judged.state != "undecided" or seen.distinct not in (None, 1):
        return judged
    # Of replies without a name more trials show nothing; one that stays the same is believed after LEAST.
    return replace(judged, more=LEAST - seen.n if seen.distinct == 1 else None)


def _judge_share(slo: Slo, said: str, rate: float, n: float, observed: bool, each: float = 1.0) -> Judged:
    """`n`: what the trials are worth, `each`: trials for one more."""
    said, span = f"{slo.case}{f'.{slo.point}' if slo.point else ''} {said}", stats.wilson(rate * n, n)
    if observed or n >= LEAST:
        low, high = (rate, rate) if observed else (span.low, span.high)
        if low >= slo.limit:
            return Judged(str(slo), "met", f"{said}, at least {slo.limit:.0%}")
        if high < slo.limit:
            return Judged(str(slo), "missed", f"{said}, wanted {slo.limit:.0%}")
    more = next((m for m in range(1, MOST) if _decided(rate, n + m / each, slo.limit)), None)
    return Judged(
        str(slo), "undecided", f"{said}, somewhere from {span.low:.0%} to {span.high:.0%}; wanted {slo.limit:.0%}", more
    )


def _decided(rate: float, n: float, limit: float) -> bool:
    span = stats.wilson(rate * n, n)
    return span.low >= limit or span.high < limit


def _judge_rss(rss: float | None, limit: float) -> Judged:
    wish = f"rss<={limit:.0f}MiB"
    if rss is None:
        return Judged(wish, "missed", "its memory was not measured")
    return Judged(
        wish, "met" if rss <= limit else "missed", f"memory {rss:.0f} MiB {'<=' if rss <= limit else '>'} {limit:.0f} MiB"
    )


# -- Ranking -------------------------------------------------------------------------------------------------------------


def slowness(cells: dict[tuple[str, Key], Cell], slos: Sequence[Slo]) -> dict[str, float]:
    """Over the checkpoints of the wishes; over all of the cases where no wish is about a time."""
    wanted = {(slo.case, slo.point) for slo in slos if slo.what.startswith("p") and slo.point}
    started = {(slo.case, slo.point) for slo in slos if slo.cache == "start"}
    # An attached server has no first requests: they count where somebody wishes for them.
    keys = [
        k for k in cells_.keys(cells)
        if k.case != START and (not wanted or (k.case, k.checkpoint) in wanted)
        and (k.cache != "start" or (k.case, k.checkpoint) in started)
    ]  # fmt: skip
    logs: dict[str, list[float]] = {}
    for key in keys:
        medians = {target: cells[target, key].median for target in cells_.targets(cells) if (target, key) in cells}
        best = min(medians.values())
        for target in cells_.targets(cells):
            mine = medians.get(target, math.inf)
            if math.isfinite(best):  # what nobody reached tells nothing
                logs.setdefault(target, []).append(
                    math.log(max(mine, 1e-6) / max(best, 1e-6)) if math.isfinite(mine) else math.inf
                )
    return {target: math.exp(sum(x) / len(x)) for target, x in logs.items()}


def quality_of(target: str, passes: Iterable[Passes]) -> float | None:
    """Mean share of right answers over checked cases: each case counts the same, however many trials and cache modes it has."""
    shares = by_case(p for p in passes if p.target == target).values()
    return sum(shares) / len(shares) if shares else None


def _rank(c: Candidate, prefer: Prefer) -> tuple[float, ...]:
    """Smaller is better.  Among equals in quality the larger file wins: more bits lose less of the model."""
    size = c.info.artifact.bytes if c.info.artifact and c.info.artifact.bytes else math.inf
    wrong = -round(c.quality or 0.0, 2)
    memory = c.rss_mib if c.rss_mib is not None else size / 2**20
    return {
        "speed": (round(c.slowness, 2), wrong, memory),
        "quality": (wrong, -size if math.isfinite(size) else 0.0, c.slowness),
        "size": (memory, c.slowness, wrong),
    }[prefer]


def praise(advice: Advice, c: Candidate) -> str:
    """Why it ranks where it does, in one line."""
    said = []
    if math.isfinite(c.slowness):
        said.append("fastest of all" if c.slowness <= 1.005 else f"{c.slowness:.2f} times the fastest one's time")
    if c.quality is not None:
        said.append(f"{c.quality:.0%} right")
    if c.rss_mib is not None:
        said.append(f"{c.rss_mib:.0f} MiB")
    order = {"speed": 0, "quality": 1, "size": 2}[advice.prefer]
    return ", ".join(said[order:] + said[:order]) if order < len(said) else ", ".join(said)


def trials_each(results: Results) -> int:
    """Trials a target and case has now."""
    counts: dict[tuple[str, str, str, int], int] = {}
    for t in results.measured():
        if isinstance(t, Trial):
            counts[t.target, t.case, t.cache, t.turn] = counts.get((t.target, t.case, t.cache, t.turn), 0) + 1
    return max(counts.values(), default=0)
