"""What every face shows, as plain rows: one table a case, the summary of targets, the environment."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property

from .. import cells as cells_, stats
from ..cells import START, Cell, Key
from ..compare import tell_ms
from ..passes import Passes, passes
from ..recommend import Advice, recommend, wishes_of
from ..records import CaseInfo
from ..results import Results

FEW_COVER = 0.93  # intervals that cover less say of how few trials they are (five give 93.75 %)


@dataclass(frozen=True, slots=True)
class Value:
    """One field of a table.  `detail` stands behind `text`, or small below it.  `sort`: what to sort by, None goes last.

    `mark`: `bad`, `good`, `dim` or nothing; `hint`: more of it, for those who point at it.
    """

    text: str
    sort: float | str | None = None
    mark: str = ""
    hint: str = ""
    detail: str = ""

    @property
    def whole(self) -> str:
        return f"{self.text} {self.detail}" if self.detail else self.text


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class View:
    """A session with everything that is computed from it, once."""

    results: Results
    cells: dict[tuple[str, Key], Cell] = field(default_factory=dict)
    passes: dict[tuple[str, str, str], Passes] = field(default_factory=dict)

    @classmethod
    def of(cls, results: Results) -> View:
        return cls(results, cells_.group(results), passes(results))

    @cached_property
    def targets(self) -> list[str]:
        ran = {target for target, _ in self.cells}
        return [t.id for t in self.results.session.targets if t.id in ran] + sorted(
            ran - {t.id for t in self.results.session.targets}
        )

    @cached_property
    def places(self) -> list[tuple[str, str]]:
        """(case, cache) of everything measured, lifecycle left out, in the suite's order."""
        return list(dict.fromkeys((key.case, key.cache) for key in cells_.keys(self.cells) if key.case != START))

    def keys(self, case: str, cache: str) -> list[Key]:
        return [key for key in cells_.keys(self.cells) if (key.case, key.cache) == (case, cache)]

    def case(self, case: str) -> CaseInfo | None:
        return next((c for c in self.results.session.cases if c.id == case), None)

    def rss(self, target: str, case: str | None = None) -> float | None:
        """Peak memory of the server's processes, MiB."""
        seen = (t for t in self.results.trials if t.target == target and case in (None, t.case))
        return max((t.res.rss_mib for t in seen if t.res.rss_mib is not None), default=None)

    def ready(self, target: str) -> Cell | None:
        return self.cells.get((target, Key(START, "start", 1, "ready")))

    @cached_property
    def warnings(self) -> list[str]:
        return cells_.warnings(self.results, self.cells)

    @cached_property
    def advice(self) -> Advice | None:
        """By the suite's own limits; None where it has none or nothing was measured."""
        wishes = wishes_of(self.results)
        return recommend(self.results, wishes) if wishes and self.results.measured() else None


def times(cell: Cell) -> Value:
    """Median with its interval; how many reached it, where not all did."""
    span, label_tail = cell.interval, stats.tail(cell.times)
    hint = (
        f"{cell.n} trials, least {tell_ms(min(cell.times))}, quartile distance {tell_ms(stats.iqr(cell.times))}, "
        f"{label_tail[0]} {tell_ms(label_tail[1])}; interval covers {span.coverage:.1%}"
    )
    detail = ""
    if cell.n > 1 and math.isfinite(cell.median):
        few = f", n={cell.n}" if span.coverage < FEW_COVER else ""
        detail = f"({tell_ms(span.low)}..{'never' if math.isinf(span.high) else tell_ms(span.high)}{few})"
    if cell.reached < cell.n:
        detail = f"{detail} {cell.reached}/{cell.n}".strip()
        hint += f"; reached by {cell.reach.low:.0%} to {cell.reach.high:.0%}"
    if cell.misses:
        hint += f"; {cell.misses} of {cell.n} above {cell.slo_ms:g} ms"
    mark = "bad" if cell.late else "good" if cell.slo_ms is not None else ""
    return Value(tell_ms(cell.median), cell.median if math.isfinite(cell.median) else None, mark, hint, detail)


def right(outcomes: Passes | None) -> Value:
    """With the number of different replies, where some were equal."""
    if outcomes is None:
        return Value("-", None, "dim")
    span, told = outcomes.span, outcomes.distinct
    mark = "good" if outcomes.hits == outcomes.n else "bad" if outcomes.rate < 0.5 else ""
    detail = "" if told in (None, outcomes.n) else "(1 reply)" if told == 1 else f"({told} replies)"
    hint = f"{span.low:.0%} to {span.high:.0%}, worth {outcomes.worth:.1f} independent trials"
    return Value(f"{outcomes.hits}/{outcomes.n}", outcomes.rate, mark, hint, detail)


def amount(mib: float | None) -> Value:
    return Value("-", None, "dim") if mib is None else Value(f"{mib:.0f}", mib)


def case_table(view: View, case: str, cache: str) -> Table:
    """Rows are targets, columns checkpoints; nothing is pooled with another cache mode."""
    keys = view.keys(case, cache)
    info = view.case(case)
    checked = any((c, m) == (case, cache) for _, c, m in view.passes)
    head = ["target", *(_column(view, key) for key in keys), *(["right"] if checked else []), "MiB", "ready"]
    rows = []
    for target in view.targets:
        mine = [view.cells.get((target, key)) for key in keys]
        if not any(mine):
            continue
        row = [Value(target, target), *(times(cell) if cell else Value("-", None, "dim") for cell in mine)]
        row += [right(view.passes.get((target, case, cache)))] if checked else []
        ready = view.ready(target)
        row += [amount(view.rss(target, case)), times(ready) if ready else Value("-", None, "dim")]
        rows.append(tuple(row))
    notes = [
        f"{p.id}: {p.text}" + (f", turn {p.turn}" if p.turn > 1 else "") for p in (info.checkpoints if info else ()) if p.text
    ]
    return Table(f"{case} [{cache}]", tuple(head), tuple(rows), tuple(notes))


def _column(view: View, key: Key) -> str:
    cell = next(view.cells[t, key] for t in view.targets if (t, key) in view.cells)
    return key.name + (f" <= {cell.slo_ms:g}" if cell.slo_ms is not None else "")


def case_tables(view: View) -> list[Table]:
    return [case_table(view, *place) for place in view.places]


def summary(view: View) -> Table:
    """One row a target: how fast over all, how often right, how large, how soon ready."""
    advice = view.advice
    ranks = {c.info.id: c for c in (*advice.ranked, *advice.undecided, *advice.rejected)} if advice else {}
    words = {"met": "meets all limits", "missed": "misses a limit", "undecided": "undecided"}
    marks = {"met": "good", "missed": "bad", "undecided": ""}
    slow = slowness(view)
    rows = []
    for target in view.targets:
        mine = [p for p in view.passes.values() if p.target == target]
        hits, n = sum(p.hits for p in mine), sum(p.n for p in mine)
        ready, factor = view.ready(target), slow.get(target, math.inf)
        row = [
            Value(target, target),
            Value(f"{factor:.2f}" if math.isfinite(factor) else "not all reached", factor if math.isfinite(factor) else None),
            Value(f"{hits}/{n}", hits / n) if n else Value("-", None, "dim"),
            amount(view.rss(target)),
            times(ready) if ready else Value("-", None, "dim"),
        ]
        if target in ranks:
            c = ranks[target]
            row.append(Value(words[c.state], words[c.state], marks[c.state], c.reason))
        rows.append(tuple(row))
    head = ("target", "times the fastest", "right", "MiB", "ready") + (("limits",) if ranks else ())
    return Table("targets", head, tuple(rows))


def slowness(view: View) -> dict[str, float]:
    from ..recommend import slowness as over

    return over(view.cells, [])


def environment(view: View) -> list[tuple[str, str]]:
    """(name, value) of everything a reader has to know; empty values are left out."""
    s = view.results.session
    m = s.machine
    rows = [
        ("session", s.id),
        ("began", when(s.began)),
        ("suite", f"{s.suite} ({s.suite_sha256[:12]}{', git ' + s.git[:12] if s.git else ''})"),
        ("shape", f"{s.launches} launches x {s.trials} trials, interleaved by {s.interleave}, warm-up {s.warmup}, seed {s.seed}"),
        ("command", " ".join(s.command)),
        ("bench", s.bench_version),
        ("cpu", m.cpu + (f", {m.cores} cores ({m.usable_cores} usable)" if m.cores else "")),
        ("governor", m.governor),
        ("memory", f"{m.ram_mib} MiB" + (f", swap {m.swap_mib} MiB" if m.swap_mib else "") if m.ram_mib else ""),
        ("gpu", ", ".join(m.gpu)),
        ("power", m.power),
        ("system", f"{m.os} {m.kernel}".strip()),
        ("python", m.python),
    ]
    rows += [(t.id, f"{t.server.version} {t.command}".strip()) for t in s.targets]
    return [(name, value) for name, value in rows if value] + [("note", note) for note in s.notes]


def when(unix: float) -> str:
    """
    >>> when(0)
    '1970-01-01 00:00 UTC'
    """
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M UTC")


def advice_lines(advice: Advice) -> Iterator[str]:
    """The recommendation in words, the answer first."""
    from ..recommend import praise

    if (best := advice.winner) is not None:
        yield f"Use {best.info.id}: {praise(advice, best)}."
        if len(advice.ranked) > 1:
            yield f"Runner-up: {advice.ranked[1].info.id}: {praise(advice, advice.ranked[1])}."
    elif advice.undecided:
        more = f"run {advice.more} more trials" if advice.more else "it is too close to the limit to tell"
        yield f"Undecided, {more}. Nearest: {advice.undecided[0].info.id}: {praise(advice, advice.undecided[0])}."
    else:
        yield "No target meets all limits."
    for c in advice.undecided:
        more = f"; {c.more} more trials may tell" if c.more else "; too close to tell"
        yield f"Undecided {c.info.id}: {c.reason}{more}."
    for c in advice.rejected:
        yield f"Rejected {c.info.id}: {c.reason}."


def folder_name(results: Results) -> str:
    return os.path.basename(os.path.normpath(results.folder))


def limited(lines: Iterable[str], most: int) -> list[str]:
    """
    >>> limited(["a", "b", "c"], 2)
    ['a', '... and 2 more']
    """
    lines = list(lines)
    return lines if len(lines) <= most else [*lines[: most - 1], f"... and {len(lines) - most + 1} more"]
