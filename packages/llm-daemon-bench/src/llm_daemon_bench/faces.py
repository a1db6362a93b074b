"""What the verbs print: comparisons as tables, everything as JSON, trials as lines of CSV."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from . import stats
from .cells import Cell, parts
from .compare import FEW, SAME, Comparison, Row, few, percent, tell_ms
from .recommend import Advice, Candidate
from .records import to_json
from .report.tables import Table, Value, View
from .report.text import plain, rich
from .results import Results

MARKS = {"faster": "good", "better": "good", "slower": "bad", "worse": "bad", SAME: "dim"}


def comparison_table(found: Comparison) -> Table:
    rows = [
        (
            Value(str(row.key)),
            Value(_amount(row, row.base)),
            Value(_amount(row, row.new)),
            Value(percent(row.ratio.ratio) if row.ratio else f"{row.change * 100:+.0f} points"),
            Value(f"{percent(row.ratio.low)} to {percent(row.ratio.high)}" if row.ratio else "-"),
            Value(f"{row.p:.3f}" if row.p >= 0.001 else "<0.001"),
            Value(row.verdict, mark=MARKS[row.verdict]),
            Value(row.cause),
        )
        for row in found.rows
        if row.p is not None
    ]
    head = ("cell", "A", "B", "change", "95 % interval", "p (Holm)", "verdict", "because of")
    return Table(f"A = {found.base}, B = {found.new}", head, tuple(rows))


def few_lines(found: Comparison) -> Iterator[str]:
    """One line for each case whose trials, or different replies, are too few to compare."""
    rows = [row for row in found.rows if row.verdict == FEW]
    yield from dict.fromkeys(f"{str(row.key).removesuffix(row.key.name).strip()}: {few(row)}" for row in rows)


def _amount(row: Row, value: float) -> str:
    return f"{value:.0%}" if row.key.checkpoint == "pass" else tell_ms(value)


def comparison_text(found: Comparison, *, colour: bool) -> str:
    table = comparison_table(found)
    lines = [rich(table) if colour else plain(table)]
    calls = found.calls()
    tested = sum(row.p is not None for row in found.rows)
    said = f"{len(calls)} of {tested} cells differ" if calls else f"no difference shown in any of {tested} cells"
    paired = "paired by round" if found.paired else "not paired"
    lines.append(f"{said}; changes below {found.threshold:.1%} are not called; {paired}.")
    lines += few_lines(found)
    if found.one_launch:
        lines.append("Only one launch: how much launches differ is unknown, and no interval here knows of it.")
    for key in found.missing:
        lines.append(f"only in A: {key}")
    for key in found.added:
        lines.append(f"only in B: {key}")
    return "\n".join(lines)


def _number(x: float | None) -> float | None:
    """JSON knows no infinity."""
    return x if x is not None and math.isfinite(x) else None


def comparison_json(found: Comparison) -> dict[str, Any]:
    """`ratio`, `low`, `high` null: infinite (a side did not reach it) or not compared."""
    rows = [
        {
            **row.key._asdict(), "base": _number(row.base), "new": _number(row.new), "trials": list(row.n),
            "ratio": _number(row.ratio.ratio) if row.ratio else None, "low": _number(row.ratio.low) if row.ratio else None,
            "high": _number(row.ratio.high) if row.ratio else None, "p": row.p, "verdict": row.verdict, "cause": row.cause,
        }
        for row in found.rows
    ]  # fmt: skip
    return {
        "base": found.base, "new": found.new, "threshold": found.threshold, "paired": found.paired,
        "one_launch": found.one_launch,
        "rows": rows, "missing": [key._asdict() for key in found.missing], "added": [key._asdict() for key in found.added],
    }  # fmt: skip


def advice_json(advice: Advice) -> dict[str, Any]:
    winner = advice.winner
    return {
        "prefer": advice.prefer, "wishes": list(advice.wishes), "winner": _candidate(winner) if winner else None,
        "ranked": [_candidate(c) for c in advice.ranked], "undecided": [_candidate(c) for c in advice.undecided],
        "rejected": [_candidate(c) for c in advice.rejected], "more_trials": advice.more,
    }  # fmt: skip


def _candidate(c: Candidate) -> dict[str, Any]:
    return {
        "target": c.info.id, "command": c.info.command, "state": c.state, "reason": c.reason, "slowness": _number(c.slowness),
        "quality": c.quality, "rss_mib": c.rss_mib, "more_trials": c.more,
        "wishes": [{"wish": j.wish, "state": j.state, "reason": j.reason, "more_trials": j.more} for j in c.judged],
    }  # fmt: skip


def view_json(view: View) -> dict[str, Any]:
    return {
        "session": to_json(view.results.session),
        "cells": [_cell(cell) for cell in view.cells.values()],
        "passes": [
            {
                "target": p.target,
                "case": p.case,
                "cache": p.cache,
                "right": p.hits,
                "of": p.n,
                "replies": p.distinct,
                "worth": p.worth,
                "low": p.span.low,
                "high": p.span.high,
            }
            for p in view.passes.values()
        ],
        "advice": advice_json(view.advice) if view.advice else None,
        "warnings": view.warnings,
    }


def _cell(cell: Cell) -> dict[str, Any]:
    span, found, name_value = cell.interval, parts(cell), stats.tail(cell.times)
    return {
        "target": cell.target, **cell.key._asdict(), "trials": cell.n, "reached": cell.reached, "median_ms": _number(cell.median),
        "low_ms": _number(span.low), "high_ms": _number(span.high), "coverage": span.coverage, "min_ms": _number(min(cell.times)),
        "iqr_ms": _number(stats.iqr(cell.times)), "tail": name_value[0], "tail_ms": _number(name_value[1]), "slo_ms": cell.slo_ms,
        "misses": cell.misses, "drift": _number(cell.drift), "outliers": sum(map(bool, stats.outliers(cell.times))),
        "parts_ms": {name: getattr(found, name) for name in PARTS} if found else None,
    }  # fmt: skip


PARTS = ("load", "queue", "prefill", "decode", "tokens", "per_token")
CSV_HEAD = (
    "session", "target", "server", "version", "via", "model", "params", "quant", "case", "cache", "cache_ok", "turn", "stream",
    "launch", "round", "repeat", "warmup", "at", "checkpoint", "ms", "tokens_by_then", "pass", "prompt_tokens", "cached_tokens",
    "out_tokens", "server_prompt_ms", "server_decode_ms", "decode_ms_per_token", "rss_mib", "load1", "mhz", "temp_c", "finish",
    "error", "reply",
)  # fmt: skip


def csv_rows(results: Results) -> Iterator[list[Any]]:
    """A row for each checkpoint of each trial, and for each event of `t_ms`; an empty `ms`: never reached."""
    for t in results.trials:
        head = [
            t.session, t.target, t.server.id, t.server.version, t.via, t.model, t.params, t.quant, t.case, t.cache, t.cache_ok,
            t.turn, t.stream, t.launch, t.round, t.repeat, t.warmup, t.at,
        ]  # fmt: skip
        tail = [
            None if t.check is None else t.check.passed, t.tokens.prompt, t.tokens.cached, t.tokens.out, t.server_ms.prompt,
            t.server_ms.decode, t.decode_ms_per_tok, t.res.rss_mib, t.env.load1, t.env.mhz, t.env.temp_c, t.finish, t.error,
            t.said,
        ]  # fmt: skip
        for name, reached in t.cp.items():
            yield [*head, name, reached.ms, reached.tok, *tail]
        for name, ms in t.t_ms.items():
            yield [*head, f"event:{name}", ms, None, *tail]
