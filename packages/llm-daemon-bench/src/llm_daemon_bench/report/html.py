"""One HTML file that needs nothing else: no network, no script to read it (a few lines make its tables sortable)."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from .. import cells as cells_, stats
from ..compare import tell_ms
from ..records import Stream, Trial
from ..reply import Parser
from ..results import read_streams
from . import figures
from .svg import el
from .tables import Table, Value, View, advice_lines, case_table, environment, summary, when

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class CasePart:
    """What one (case, cache) has in the page.  `points`: names of the numbered checkpoints, by turn."""

    table: Table
    points: list[tuple[int, list[str]]]
    waterfalls: list[tuple[int, Markup]]
    strip: Markup
    timeline: Markup | None


def html(view: View) -> str:
    """The page.  The same session always gives the same bytes."""
    style, script = ((HERE / name).read_text("utf-8").strip() for name in ("page.css", "page.js"))
    env = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = env.from_string((HERE / "page.html.j2").read_text("utf-8"))
    arrivals = token_arrivals(view)
    return template.render(
        view=view,
        session=view.results.session,
        began=when(view.results.session.began),
        advice=list(advice_lines(view.advice)) if view.advice else None,
        wishes=view.advice.wishes if view.advice else (),
        warnings=view.warnings,
        summary=summary(view),
        pareto=figures.pareto(view),
        cases=[_case(view, case, cache, arrivals.get((case, cache), {})) for case, cache in view.places],
        drift=figures.drift(view),
        outliers=outlier_table(view),
        environment=environment(view),
        table=_table,
        figure=_figure,
        style=Markup(style),
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _case(view: View, case: str, cache: str, arrivals: Mapping[str, Sequence[tuple[float, float]]]) -> CasePart:
    turns = figures.turns(view, case, cache)
    return CasePart(
        case_table(view, case, cache),
        [(turn, [key.checkpoint for key in view.keys(case, cache) if key.turn == turn]) for turn in turns],
        [(turn, figures.waterfall(view, case, cache, turn)) for turn in turns],
        figures.strip(view, case, cache),
        figures.timeline(view, case, cache, arrivals) if arrivals else None,
    )


def _table(table: Table) -> Markup:
    head = el("tr", *(el("th", name, scope="col") for name in table.head))
    rows = [el("tr", *(_field(value, i == 0) for i, value in enumerate(row))) for row in table.rows]
    inner = el("table", el("thead", head), el("tbody", *rows), class_="sortable", aria_label=table.title)
    return el("div", inner, class_="wide", tabindex=0, role="region", aria_label=f"Table: {table.title}")


def _field(value: Value, first: bool) -> Markup:
    sort = "" if value.sort is None else value.sort if isinstance(value.sort, str) else f"{value.sort:.6g}"
    attributes = {"data_sort": sort, "class_": value.mark or None, "title": value.hint or None}
    words: list[str | Markup] = [value.text + (" !" if value.mark == "bad" and not first else "")]  # not by colour alone
    words += [el("small", value.detail)] if value.detail else []
    return el("th", *words, scope="row", **attributes) if first else el("td", *words, **attributes)


def _figure(picture: Markup, caption: str) -> Markup:
    inner = el("div", picture, class_="wide", tabindex=0, role="region", aria_label=f"Picture: {caption}")
    return el("figure", el("figcaption", caption), inner)


def outlier_table(view: View) -> Table:
    """Every outlier with the conditions of its moment."""
    rows = []
    for cell in view.cells.values():
        for outlier in cells_.outliers(cell):
            r = outlier.dot.record
            lag = r.client.lag_p99_ms if isinstance(r, Trial) else None
            numbers = (r.env.load1, r.env.mhz, r.env.temp_c, r.env.swap_in, lag)
            rows.append(
                (
                    Value(cell.target, cell.target), Value(str(cell.key), str(cell.key)), Value(str(r.launch), r.launch),
                    Value(str(r.round), r.round), Value(tell_ms(outlier.dot.ms), outlier.dot.ms),
                    Value(tell_ms(cell.median), cell.median),
                    Value(outlier.cls, outlier.cls, "bad" if outlier.cls == "severe" else ""),
                    *(Value("-" if x is None else f"{x:g}", x) for x in numbers), Value("; ".join(outlier.causes) or "none seen"),
                )
            )  # fmt: skip
    head = (
        "target",
        "cell",
        "launch",
        "round",
        "ms",
        "median",
        "class",
        "load",
        "MHz",
        "degrees",
        "swapped in",
        "client lag",
        "unusual",
    )
    return Table("outliers", head, tuple(rows))


# -- Tokens over time ----------------------------------------------------------------------------------------------------


def token_arrivals(view: View) -> dict[tuple[str, str], dict[str, list[tuple[float, float]]]]:
    """By (case, cache) and target: (ms, tokens so far) of the trial whose last token came nearest to the median; first turns."""
    chosen: dict[str, Trial] = {}
    groups: dict[tuple[str, str, str], list[Trial]] = {}
    for t in view.results.measured():
        if t.error is None and "last_token" in t.t_ms and (t.turn, t.stream) == (1, 1):
            groups.setdefault((t.target, t.case, t.cache), []).append(t)
    for trials in groups.values():
        middle = stats.median([t.t_ms["last_token"] for t in trials])
        best = min(trials, key=lambda t: (abs(t.t_ms["last_token"] - middle), t.at))
        chosen[best.key] = best
    out: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    lines: dict[str, list[tuple[float, float]]] = {}
    for stream in read_streams(view.results.folder):
        if stream.key in chosen and stream.part == chosen[stream.key].part:
            lines[stream.key] = counted(stream, chosen[stream.key].tokens.out)
    for key, trial in chosen.items():
        if line := lines.get(key) or _from_checkpoints(trial):
            out.setdefault((trial.case, trial.cache), {})[trial.target] = line
    return out


def counted(stream: Stream, tokens: int | None) -> list[tuple[float, float]]:
    """(ms, tokens so far) at each event with text, reasoning or part of a tool call.

    Tokens are shared out evenly over the events where the server does not tell them with each.
    """
    parser = Parser()
    for ms, data in stream.chunks():
        parser.feed(ms, data)
    said = parser.reply.said
    share = (tokens or len(said)) / max(len(said), 1)
    return [(piece.ms, float(piece.tok) if piece.tok is not None else (i + 1) * share) for i, piece in enumerate(said)]


def _from_checkpoints(trial: Trial) -> list[tuple[float, float]]:
    """Where the raw reply was not kept: the tokens that the checkpoints counted."""
    points = {(r.ms, float(r.tok)) for r in trial.cp.values() if r.ms is not None and r.tok is not None}
    return sorted(points) if len(points) > 1 else []
