"""Cells: what may be summarized together.  One cell is one (target, case, cache, turn, checkpoint); cache modes are never pooled.

Every measured trial is a dot in its cells, also one that failed: a checkpoint it did not reach is at infinity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from . import stats
from .records import LIFECYCLE, CaseInfo, Launch, Trial
from .results import Results

ALL = "all cases"  # the name under which right and wrong are compared over all checked cases
START = "start-up"  # the name under which lifecycle checkpoints of launches are shown: a case of its own, with one dot a launch


class Key(NamedTuple):
    """What a cell is about, whichever target it belongs to."""

    case: str
    cache: str
    turn: int
    checkpoint: str

    def __str__(self) -> str:
        mode = "" if self.case in (START, ALL) else f" [{self.cache}]"
        return f"{self.case}{mode} {self.name}"

    @property
    def name(self) -> str:
        """The checkpoint, with its turn if that is not the first and not part of the name already."""
        return (
            f"t{self.turn}.{self.checkpoint}"
            if self.turn > 1 and not self.checkpoint.startswith(f"t{self.turn}")
            else self.checkpoint
        )


@dataclass(frozen=True, slots=True)
class Dot:
    """One trial (or launch) in one cell.  `ms`: infinite if the checkpoint was never reached; `tok`: tokens by then."""

    ms: float
    tok: int | None
    record: Trial | Launch

    @property
    def pair(self) -> tuple[int, ...]:
        """Equal for dots of different targets that ran in the same launch and round."""
        r = self.record
        return (r.launch, r.round, r.repeat, r.stream) if isinstance(r, Trial) else (r.launch, r.start)

    @property
    def process(self) -> tuple[int, str]:
        """The server process: the unit of independence.  A resumed launch has a second one."""
        return self.record.launch, self.record.process


@dataclass(frozen=True)
class Cell:
    """All dots of one target under one key, in the order in which they ran; at least one."""

    target: str
    key: Key
    slo_ms: float | None
    dots: tuple[Dot, ...]

    @property
    def times(self) -> list[float]:
        return [dot.ms for dot in self.dots]

    @property
    def finite(self) -> list[float]:
        return [dot.ms for dot in self.dots if math.isfinite(dot.ms)]

    @property
    def n(self) -> int:
        return len(self.dots)

    @property
    def reached(self) -> int:
        return len(self.finite)

    @cached_property
    def median(self) -> float:
        """Infinite: not reached in half of the trials or more."""
        return stats.median(self.times)

    @cached_property
    def interval(self) -> stats.Interval:
        return stats.quantile_interval(self.times)

    @cached_property
    def reach(self) -> stats.Interval:
        return stats.wilson(self.reached, self.n)

    @property
    def misses(self) -> int:
        """Trials above the SLO, unreached ones among them; 0 without an SLO."""
        return 0 if self.slo_ms is None else sum(ms > self.slo_ms for ms in self.times)

    @property
    def late(self) -> bool:
        """Whether the median is above the SLO."""
        return self.slo_ms is not None and self.median > self.slo_ms

    def launches(self) -> list[list[float]]:
        """Times by server process."""
        groups: dict[tuple[int, str], list[float]] = {}
        for dot in self.dots:
            groups.setdefault(dot.process, []).append(dot.ms)
        return list(groups.values())

    @cached_property
    def drift(self) -> float | None:
        """Change from the first to the second half of the trials of the same process, all processes together."""
        early: list[float] = []
        late: list[float] = []
        for times in self.launches():
            half = len(times) // 2
            early += times[:half]
            late += times[len(times) - half :]
        return stats.drift([*early, *late])


def group(results: Results) -> dict[tuple[str, Key], Cell]:
    """All cells of a session, by target and key: targets, cases and checkpoints in the suite's order."""
    cases = {case.id: case for case in results.session.cases}
    found: dict[tuple[str, Key], list[Dot]] = {}
    for trial in results.measured():
        for name in _checkpoints(trial, cases.get(trial.case)):
            reached = trial.cp.get(name)
            dot = Dot(math.inf, None, trial) if reached is None else Dot(_ms(reached.ms), reached.tok, trial)
            found.setdefault((trial.target, Key(trial.case, trial.cache, trial.turn, name)), []).append(dot)
    for launch in results.launches:
        for name in LIFECYCLE:
            if (reached := launch.cp.get(name)) is None and not (name == "ready" and launch.error):
                continue
            if name == "first_token" and launch.first is not None:
                continue  # a case's own first request: that case has it, as cache `start`
            ms = math.inf if reached is None else _ms(reached.ms)
            found.setdefault((launch.target, Key(START, "start", 1, name)), []).append(Dot(ms, None, launch))
    slos = {(c.id, p.turn, p.id): p.slo_ms for c in results.session.cases for p in c.checkpoints}
    order = _order(results)
    return {
        (target, key): Cell(
            target, key, slos.get((key.case, key.turn, key.checkpoint)), tuple(sorted(dots, key=lambda d: d.record.at))
        )
        for (target, key), dots in sorted(found.items(), key=lambda item: order(*item[0]))
    }


def _ms(ms: float | None) -> float:
    return math.inf if ms is None else ms


def _checkpoints(trial: Trial, case: CaseInfo | None) -> list[str]:
    """Those of the trial's turn, from the suite: a failed trial may name none of them."""
    known = [p.id for p in case.checkpoints if p.turn == trial.turn] if case else []
    return [*known, *(name for name in trial.cp if name not in known)]


def _order(results: Results) -> Callable[[str, Key], tuple[Any, ...]]:
    """A sort key: the suite's order, and by name what the suite does not know."""
    targets = [t.id for t in results.session.targets]
    cases = [c.id for c in results.session.cases]
    points = [(c.id, p.turn, p.id) for c in results.session.cases for p in c.checkpoints]

    def place(known: Sequence[object], what: object) -> int:
        return known.index(what) if what in known else len(known)

    def order(target: str, key: Key) -> tuple[Any, ...]:
        lifecycle = LIFECYCLE.index(key.checkpoint) if key.case == START else 0
        at = place(points, (key.case, key.turn, key.checkpoint))
        return (place(targets, target), place(cases, key.case), key.case, key.cache, key.turn, lifecycle, at, key.checkpoint)

    return order


def targets(cells: Iterable[tuple[str, Key]]) -> list[str]:
    """In the order of their first cell."""
    return list(dict.fromkeys(target for target, _ in cells))


def keys(cells: Iterable[tuple[str, Key]]) -> list[Key]:
    """In the order of their first cell."""
    return list(dict.fromkeys(key for _, key in cells))


# -- Where the time went -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Parts:
    """Medians over a cell's reached trials, ms, scaled to add up to the cell's median.  `load` is 0 unless the request was the
    server's first one.

    `queue`: everything before the first token that the server does not count as prompt processing (connection, template,
    tokenizing, waiting); 0 where the server tells no times, and then `prefill` is all of it.  `tokens` x `per_token` make
    up the time after the first token, of which a checkpoint needs `decode`.
    """

    load: float
    queue: float
    prefill: float
    decode: float
    tokens: float | None
    per_token: float | None

    @property
    def total(self) -> float:
        return self.load + self.queue + self.prefill + self.decode


def parts(cell: Cell) -> Parts | None:
    """None where no trial reached the checkpoint, or for lifecycle checkpoints."""
    rows = [row for dot in cell.dots if isinstance(dot.record, Trial) for row in _parts_of(dot, dot.record)]
    if not rows:
        return None
    load, *rest = (stats.median([row[i] for row in rows]) for i in range(4))
    if sum(rest) > 0 and math.isfinite(cell.median):  # medians of parts do not add up to the median: shares of it do
        rest = [x * cell.median / sum(rest) for x in rest]
    queue, prefill, decode = rest
    tokens = [float(dot.tok) for dot in cell.dots if dot.tok is not None and math.isfinite(dot.ms)]
    rates = [x for dot in cell.dots if isinstance(dot.record, Trial) and (x := dot.record.decode_ms_per_tok) is not None]
    return Parts(load, queue, prefill, decode, stats.median(tokens) if tokens else None, stats.median(rates) if rates else None)


def _parts_of(dot: Dot, trial: Trial) -> Iterator[tuple[float, float, float, float]]:
    if not math.isfinite(dot.ms):
        return
    load = (trial.since_spawn_ms or 0.0) if trial.cache == "start" and trial.turn == 1 else 0.0
    first = min(dot.ms, trial.t_ms.get("first_token", dot.ms))
    prefill = min(first, trial.server_ms.prompt) if trial.server_ms.prompt is not None else first
    yield load, first - prefill, prefill, dot.ms - first


def why(base: Parts | None, new: Parts | None) -> str:
    """The largest share of a change in words: `load`, `queue`, `prefill`, `more tokens`, `slower tokens` or their opposites."""
    if base is None or new is None:
        return ""
    shares = {
        ("shorter load", "longer load"): new.load - base.load,
        ("shorter queue", "longer queue"): new.queue - base.queue,
        ("faster prefill", "slower prefill"): new.prefill - base.prefill,
    }
    known = [x for p in (base, new) for x in (p.tokens, p.per_token) if x is not None]
    if len(known) == 4:
        tokens, rate, more, slower = known[0] + known[2], known[1] + known[3], known[2] - known[0], known[3] - known[1]
        shares[("fewer tokens", "more tokens")] = more * rate / 2
        shares[("faster tokens", "slower tokens")] = slower * tokens / 2
    else:
        shares[("less decoding", "more decoding")] = new.decode - base.decode
    change = new.total - base.total
    (less, more_), share = max(shares.items(), key=lambda item: item[1] * change)
    return (more_ if share > 0 else less) if share * change > 0 else ""


# -- What deserves a mark ------------------------------------------------------------------------------------------------

CAUSES = ("load1", "mhz", "temp_c", "swap_in", "lag_ms")


@dataclass(frozen=True, slots=True)
class Outlier:
    """A dot beyond Tukey's fences; it stays in every figure.  `causes`: what was unusual about the machine, in words."""

    cell: Cell
    dot: Dot
    cls: str
    causes: tuple[str, ...]


def outliers(cell: Cell) -> list[Outlier]:
    """With the conditions that differ from the cell's usual ones: load, clock, heat, swapping, the client's own lag."""
    usual = {
        name: stats.median(seen) for name in CAUSES if (seen := [x for d in cell.dots if (x := _condition(d, name)) is not None])
    }
    return [
        Outlier(cell, dot, cls, tuple(_causes(dot, usual)))
        for dot, cls in zip(cell.dots, stats.outliers(cell.times), strict=True)
        if cls
    ]


def _condition(dot: Dot, name: str) -> float | None:
    if name == "lag_ms":
        return dot.record.client.lag_p99_ms if isinstance(dot.record, Trial) else None
    value: float | None = getattr(dot.record.env, name)
    return value


def _causes(dot: Dot, usual: dict[str, float]) -> Iterator[str]:
    """Limits are what a person would call unusual, not what a test would."""
    for name, normal in usual.items():
        value = _condition(dot, name)
        if value is None:
            continue
        if name == "load1" and value > normal + 0.5:
            yield f"load {value:.1f} (usually {normal:.1f})"
        elif name == "mhz" and value < 0.95 * normal:
            yield f"clock {value:.0f} MHz (usually {normal:.0f})"
        elif name == "temp_c" and value > normal + 5:
            yield f"{value:.0f} degrees (usually {normal:.0f})"
        elif name == "swap_in" and value > normal:
            yield f"{value:.0f} pages swapped in"
        elif name == "lag_ms" and value > normal + 1:
            yield f"client lag {value:.1f} ms (usually {normal:.1f})"


DRIFT = 0.05
CROWD = 0.5  # of load above the number of cores


def busy(results: Results) -> list[str]:
    """A line if in a quarter of the trials or more there was more work than cores: other programs took the server's time."""
    cores = results.session.machine.cores
    loads = [t.env.load1 for t in results.measured() if t.env.load1 is not None]
    crowded = [load for load in loads if cores and load > cores + CROWD]
    if not crowded or 4 * len(crowded) < len(loads):
        return []
    return [
        f"the machine was busy: before {len(crowded)} of {len(loads)} trials the load was above its {cores} cores, at most "
        f"{max(crowded):.1f}; end other work (`llm-daemon bench doctor` looks for it) and measure again"
    ]


def warnings(results: Results, cells: dict[tuple[str, Key], Cell]) -> list[str]:
    """A line for each thing that makes figures doubtful: a busy machine, drift, cache not as stated, errors, no end."""
    out = [*results.damage(), *busy(results)]
    moved: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells.values():
        if cell.key.case != START and cell.drift is not None and abs(cell.drift) > DRIFT:
            moved.setdefault((cell.target, cell.key.case, cell.key.cache), []).append(cell)
    for (target, case, cache), same in moved.items():
        worst = max(same, key=lambda cell: abs(cell.drift or 0))
        size = "far" if math.isinf(worst.drift or 0) else f"{abs(worst.drift or 0):.0%}"
        what = "slower, heating?" if (worst.drift or 0) > 0 else "faster, still warming?"
        names = ", ".join(cell.key.name for cell in same)
        out.append(f"{target}: {case} [{cache}] drifts within a launch: {names} up to {size} {what}")
    measured = results.measured()
    counts: dict[tuple[str, str], list[int]] = {}
    for t in measured:
        row = counts.setdefault((t.target, t.case), [0, 0, 0])
        row[0] += 1
        row[1] += t.cache_ok is False
        row[2] += t.error is not None
    for (target, case), (n, strange, errors) in counts.items():
        if strange:
            out.append(f"{target}: {case}: the server's cache was not in the stated state in {strange} of {n}")
        if errors:
            last = next(t.error for t in reversed(measured) if (t.target, t.case) == (target, case) and t.error)
            out.append(f"{target}: {case}: {errors} of {n} ended in an error, the last one: {last}")
    for launch in results.launches:
        if launch.error:
            out.append(f"{launch.target}: launch {launch.launch}: {launch.error}")
    if results.session.ended is None:
        out.append("the run has not ended: `llm-daemon bench run` with the same suite resumes it")
    return list(dict.fromkeys(out))
