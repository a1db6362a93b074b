"""The pictures of the HTML report, each from cells alone: bars, every trial, tokens, speed against quality, drift."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from markupsafe import Markup

from .. import cells as cells_, stats
from ..cells import Cell, Dot, Key
from ..compare import tell_ms
from ..recommend import quality_of
from ..records import Trial
from .svg import GUTTER, WIDTH, Axis, Spots, colour, dot, el, label, legend, line, picture, rect, text
from .tables import View, slowness

PLOT_END = WIDTH - 14


def turns(view: View, case: str, cache: str) -> list[int]:
    return sorted({key.turn for key in view.keys(case, cache)})


# -- Where the time goes -------------------------------------------------------------------------------------------------


def waterfall(view: View, case: str, cache: str, turn: int) -> Markup:
    """A bar a target: load, queue, prefill, decoding up to its last checkpoint; numbered checkpoints under it."""
    keys = [key for key in view.keys(case, cache) if key.turn == turn]
    rows = {target: [view.cells[target, key] for key in keys if (target, key) in view.cells] for target in view.targets}
    rows = {target: cells for target, cells in rows.items() if cells}
    ends = [_load(cell) + cell.median for cells in rows.values() for cell in cells if math.isfinite(cell.median)]
    axis = Axis(0.0, max(ends, default=1.0) * 1.1, GUTTER, PLOT_END)
    height, out = 46.0, []
    bottom = 8 + height * len(rows)
    out += axis.horizontal(4, bottom, "ms")
    for i, (target, cells) in enumerate(rows.items()):
        out += _bar(8 + i * height, target, cells, axis)
    name = f"{case} [{cache}]" + (f", turn {turn}" if turn > 1 else "") + ": where the time goes"
    about = "Bars of median times: load, queue, prefill, decoding; numbers mark the checkpoints " + ", ".join(
        f"{n} {key.checkpoint}" for n, key in enumerate(keys, 1)
    )
    return picture(name, about, bottom + 22, out)


def _load(cell: Cell) -> float:
    parts = cells_.parts(cell)
    return parts.load if parts else 0.0


def _bar(y: float, target: str, cells: Sequence[Cell], axis: Axis) -> Iterator[Markup]:
    yield label(y + 14, target)
    reached = [cell for cell in cells if math.isfinite(cell.median)]
    last = max(reached, key=lambda cell: cell.median, default=None)
    parts = cells_.parts(last) if last else None
    if last is None or parts is None:
        yield text(GUTTER + 4, y + 14, "no checkpoint reached", "n")
        return
    at = 0.0
    for name, size in (("load", parts.load), ("queue", parts.queue), ("prefill", parts.prefill), ("decode", parts.decode)):
        hint = f"{name} {tell_ms(size)} ms" + (
            f": {parts.tokens:.0f} tokens x {tell_ms(parts.per_token)} ms"
            if name == "decode" and parts.tokens is not None and parts.per_token is not None
            else ""
        )
        yield rect(axis.at(at), y + 4, axis.at(at + size) - axis.at(at), 14, f"p-{name}", f"{target}: {hint}")
        at += size
    end = parts.load + last.median
    yield text(axis.at(end) + 5, y + 15, tell_ms(end), "n" if axis.at(end) < PLOT_END - 40 else "n hide")
    room = 0.0
    for number, cell in sorted(enumerate(cells, 1), key=lambda item: item[1].median):
        if not math.isfinite(cell.median):
            continue
        x = axis.at(parts.load + cell.median)
        place = max(x, room)  # labels that would lie upon each other move right, a line leads back
        room = place + 13
        cls = "bad" if cell.late else "good" if cell.slo_ms is not None else ""
        yield line(x, y + 2, x, y + 20, f"mark {cls}")
        yield line(x, y + 20, place, y + 26, f"mark {cls}")
        yield text(place, y + 36, str(number), f"num {cls}", "middle", _cell_hint(cell))


def _cell_hint(cell: Cell) -> str:
    span = cell.interval
    said = f"{cell.target}, {cell.key.checkpoint}: median {tell_ms(cell.median)} ms ({tell_ms(span.low)} to {tell_ms(span.high)})"
    said += f", reached by {cell.reached} of {cell.n}"
    return said + (f", limit {cell.slo_ms:g} ms missed by {cell.misses}" if cell.slo_ms is not None else "")


# -- Every trial ---------------------------------------------------------------------------------------------------------


def strip(view: View, case: str, cache: str) -> Markup:
    """Every trial as a dot, a band for each checkpoint, a row for each target; nothing is left out."""
    keys = view.keys(case, cache)
    shown = [cell for key in keys for target in view.targets if (cell := view.cells.get((target, key)))]
    slos = [cell.slo_ms for cell in shown if cell.slo_ms is not None]
    axis = Axis.over([*(x for cell in shown for x in cell.times), *slos], GUTTER, PLOT_END - 34)
    y, out = 4.0, []
    for key in keys:
        band = [view.cells[target, key] for target in view.targets if (target, key) in view.cells]
        top = y + 18
        y = top + 19 * len(band)
        head = (f"turn {key.turn}: " if key.turn > 1 else "") + key.checkpoint
        out += [line(0, y + 3, WIDTH, y + 3, "rule"), text(0, top - 5, head, "h")]
        out += (
            axis.horizontal(top, y, "")[:-1]
            if key is keys[-1]
            else [line(axis.at(v), top, axis.at(v), y, "grid") for v in axis.ticks()]
        )
        if (slo := band[0].slo_ms) is not None:
            out.append(line(axis.at(slo), top - 4, axis.at(slo), y, "slo", f"limit {slo:g} ms"))
            at = axis.at(slo)
            left = at > PLOT_END - 90  # no room on its right
            out.append(text(at - 4 if left else at + 4, top - 5, f"limit {slo:g} ms", "n", "end" if left else None))
        for i, cell in enumerate(band):
            out += _dots(top + 19 * i + 10, cell, axis, view.targets.index(cell.target))
        y += 10
    out.append(text(PLOT_END, y + 5, "ms · never", "n", "end"))
    about = (
        "Dots are trials, the vertical stroke is the median, the band its 95 % interval; crosses at the right never reached it."
    )
    return picture(f"{case} [{cache}]: every trial", about, y + 14, out)


def _dots(y: float, cell: Cell, axis: Axis, index: int) -> Iterator[Markup]:
    yield label(y + 4, cell.target)
    span = cell.interval
    if math.isfinite(span.low):
        high = axis.at(span.high) if math.isfinite(span.high) else axis.end
        yield rect(axis.at(span.low), y - 7, max(high - axis.at(span.low), 1), 14, "band", _cell_hint(cell))
    marked = {id(o.dot): o for o in cells_.outliers(cell)}
    processes = list(dict.fromkeys(d.process for d in cell.dots))
    for d in cell.dots:
        lane = processes.index(d.process) - (len(processes) - 1) / 2  # launches lie above each other
        hint = f"{cell.target}, {cell.key.checkpoint}: {tell_ms(d.ms)}{' ms' if math.isfinite(d.ms) else ''}, {_which(d)}"
        if math.isinf(d.ms):
            continue
        if outlier := marked.get(id(d)):
            hint += f"; {outlier.cls} outlier: {', '.join(outlier.causes) or 'no cause seen'}"
        cls = "miss" if cell.slo_ms is not None and d.ms > cell.slo_ms else colour(index).split()[0]
        yield dot(axis.at(d.ms), y + lane * min(4.0, 12 / len(processes)), 2.6, f"dot {cls}" + (" out" if outlier else ""), hint)
    if never := cell.n - cell.reached:
        yield text(
            PLOT_END,
            y + 4,
            f"× {never}",
            "never",
            "end",
            f"{cell.target}: {never} of {cell.n} never reached {cell.key.checkpoint}",
        )
    if math.isfinite(cell.median):
        yield line(axis.at(cell.median), y - 8, axis.at(cell.median), y + 8, "median")


def _which(d: Dot) -> str:
    r = d.record
    return f"launch {r.launch}" + (
        f", round {r.round}" + (f", repeat {r.repeat}" if r.repeat > 1 else "") if isinstance(r, Trial) else ""
    )


# -- Tokens over time ----------------------------------------------------------------------------------------------------


def timeline(view: View, case: str, cache: str, arrivals: Mapping[str, Sequence[tuple[float, float]]]) -> Markup:
    """Tokens over time of each target's median trial; `arrivals`: (ms, tokens so far) by target."""
    points = [p for target in view.targets for p in arrivals.get(target, ())]
    x = Axis(0.0, max((ms for ms, _ in points), default=1.0) * 1.05, 40, PLOT_END)
    y = Axis(0.0, max((n for _, n in points), default=1.0) * 1.08, 206, 8)
    out = x.horizontal(8, 206, "ms")
    for tick in y.ticks():
        out += [line(40, y.at(tick), PLOT_END, y.at(tick), "grid"), text(34, y.at(tick) + 4, f"{tick:g}", "n", "end")]
    spots = Spots()
    for i, target in enumerate(view.targets):
        if line_ := arrivals.get(target):
            path = " ".join(f"{x.at(ms):.1f},{y.at(n):.1f}" for ms, n in [(line_[0][0], 0.0), *line_])
            hint = f"{target}: {line_[-1][1]:.0f} tokens in {tell_ms(line_[-1][0])} ms, the first after {tell_ms(line_[0][0])} ms"
            out.append(el("polyline", el("title", hint), points=path, class_=f"l {colour(i)}"))
            out.append(text(*spots.free(x.at(line_[-1][0]) + 4, y.at(line_[-1][1]) + 4), str(i + 1), "num"))
    names, bottom = legend(view.targets, 242)
    about = "Lines climb by one for each token of the reply of the median trial of each target."
    return picture(f"{case} [{cache}]: tokens over time", about, bottom, [*out, *names])


# -- Speed against quality -----------------------------------------------------------------------------------------------


def pareto(view: View) -> Markup | None:
    """Right answers against time; against memory where nothing was checked.  None with fewer than two points."""
    slow = slowness(view)
    quality = {t: q for t in view.targets if (q := quality_of(t, view.passes.values())) is not None}
    up = bool(quality)
    values = quality or {t: rss for t in view.targets if (rss := view.rss(t)) is not None}
    points = [(slow[t], v, t) for t, v in values.items() if math.isfinite(slow.get(t, math.inf))]
    if len(points) < 2:
        return None
    top = 1.0 if up else max(v for _, v, _ in points)
    x = Axis(0.95, max(p[0] for p in points) * 1.06, 52, PLOT_END)
    y = Axis(0.0, top * 1.06, 226, 8)
    out = x.horizontal(8, 226, "times the fastest")
    for tick in y.ticks():
        said = f"{tick:.0%}" if up else f"{tick:g}"
        out += [line(52, y.at(tick), PLOT_END, y.at(tick), "grid"), text(46, y.at(tick) + 4, said, "n", "end")]
    front = _front([(a, v if up else -v) for a, v, _ in points])
    steps = " ".join(f"{x.at(a):.1f},{y.at(abs(v)):.1f}" for a, v in front)
    out.append(el("polyline", points=steps, class_="front"))
    out += _numbered(points, view, x, y, up)
    names, bottom = legend(view.targets, 262)
    what = "right answers" if up else "memory in MiB"
    about = f"Each target once: time as a multiple of the fastest against {what}; the line joins those that none beats in both."
    return picture(f"Speed against {what}", about, bottom, [*out, *names])


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that none beats in both: less in the first, more in the second; by the first.

    >>> _front([(2, 1.0), (1, 0.5), (3, 0.9), (1.5, 0.5)])
    [(1, 0.5), (2, 1.0)]
    """
    out: list[tuple[float, float]] = []
    for a, v in sorted(points, key=lambda p: (p[0], -p[1])):
        if not out or v > out[-1][1]:
            out.append((a, v))
    return out


def _numbered(points: Sequence[tuple[float, float, str]], view: View, x: Axis, y: Axis, up: bool) -> Iterator[Markup]:
    spots = Spots()
    for a, v, target in sorted(points):
        i = view.targets.index(target)
        px, py = x.at(a), y.at(v)
        lx, ly = spots.free(px + 7, py + 4)
        value = f"{v:.0%} right" if up else f"{v:.0f} MiB"
        hint = f"{target}: {a:.2f} times the fastest, {value}"
        yield dot(px, py, 4.5, f"dot solid {colour(i).split()[0]}", hint)
        yield text(lx, ly, str(i + 1), "num", hint=hint)


# -- Drift ---------------------------------------------------------------------------------------------------------------


def drift(view: View) -> Markup:
    """Order of running against time by the median of the same cell: heat, warming and other people's work are seen here."""
    rows: dict[str, list[tuple[float, float, str]]] = {target: [] for target in view.targets}
    for (target, key), cell in view.cells.items():
        if key.case == cells_.START or not math.isfinite(cell.median) or key != _last(view, target, key):
            continue
        for d in cell.dots:
            if math.isfinite(d.ms):
                rows[target].append((d.record.at, d.ms / max(cell.median, 1e-9), f"{key}: {tell_ms(d.ms)} ms, {_which(d)}"))
    times = [at for row in rows.values() for at, _, _ in row]
    began = min(times, default=0.0)
    x = Axis(0.0, max((max(times, default=60.0) - began) / 60, 0.1) * 1.03, GUTTER, PLOT_END)
    height, out = 40.0, []
    bottom = 4 + height * len(rows)
    out += x.horizontal(4, bottom, "min")
    for i, (target, row) in enumerate(rows.items()):
        out += _drift_row(4 + i * height, target, sorted(row), began, x, i)
    about = (
        "Dots are trials by the median of their cell, 0.7 at the bottom to 1.3 at the top; strokes are medians of both halves."
    )
    return picture("Order of running against time", about, bottom + 20, out)


def _last(view: View, target: str, key: Key) -> Key:
    """The checkpoint of the same turn with the largest median: one dot a trial."""
    same = [k for k in view.keys(key.case, key.cache) if k.turn == key.turn and (target, k) in view.cells]
    return max((k for k in same if math.isfinite(view.cells[target, k].median)), key=lambda k: view.cells[target, k].median)


def _drift_row(
    top: float, target: str, row: Sequence[tuple[float, float, str]], began: float, x: Axis, i: int
) -> Iterator[Markup]:
    y = Axis(0.7, 1.3, top + 36, top + 4)
    yield label(top + 24, target)
    yield line(GUTTER, y.at(1), PLOT_END, y.at(1), "rule")
    for at, share, hint in row:
        yield dot(x.at((at - began) / 60), y.at(share), 2.2, f"dot {colour(i).split()[0]}", f"{target}, {hint}")
    half = len(row) // 2
    for part in (row[:half], row[half:]) if half >= 3 else ():
        middle = stats.median([share for _, share, _ in part])
        yield line(
            x.at((part[0][0] - began) / 60), y.at(middle), x.at((part[-1][0] - began) / 60), y.at(middle), "median",
            f"{target}: median of this half {middle:.3f}",
        )  # fmt: skip
