"""`bench show`: one session, as it is on the disk."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click

from llm_daemon.cli.words import as_json, clean, duration, json_option, size, subcommand, table

from .. import records, results, sessions
from ..records import CaseInfo, Trial
from ..results import Results


@subcommand(
    "show",
    """
    llm-daemon bench show                                      the latest session
    llm-daemon bench show 20261122-1
    llm-daemon bench show --json | jq '.cells[] | {target, case, median_ms}'
    """,
)
@click.argument("session", required=False)
@click.option("--out", type=click.Path(path_type=Path), default=Path("results"), show_default=True, help="Folder of sessions.")
@json_option
def command(session: str | None, out: Path, json_: bool) -> None:
    """Show one session: its cells, medians and failures."""
    found = results.load(sessions.find(out, session))
    cells = [cell for case in found.session.cases for cell in cells_of(found, case)]
    if json_:
        as_json(
            {
                "session": records.to_json(found.session),
                "cells": cells,
                "lifecycle": lifecycle(found),
                "broken_lines": found.broken,
                "warnings": found.damage(),
            }
        )
        return
    _head(found)
    for case in found.session.cases:
        mine = [cell for cell in cells if cell["case"] == case.id]
        if mine:
            points = [c.id for c in case.checkpoints]
            click.echo(f"\n{clean(case.id)} ({case.kind}): median milliseconds")
            rows = [
                (c["target"], c["cache"], c["n"], *(_ms(c["median_ms"].get(p)) for p in points), _pass(c), c["failed"] or "")
                for c in mine
            ]
            table(("TARGET", "CACHE", "N", *points, "PASS", "FAILED"), rows)
    if starts := lifecycle(found):
        click.echo("\nlaunches: median milliseconds since the spawn; slot_free since a hang-up")
        rows = [
            (s["target"], s["n"], *(_ms(s["median_ms"].get(name)) for name in records.LIFECYCLE), s["failed"] or "")
            for s in starts
        ]
        table(("TARGET", "N", *records.LIFECYCLE, "FAILED"), rows)
    for line in [*(f"warning: {line}" for line in found.damage()), *failures(found)]:
        click.echo(clean(line))


def _head(found: Results) -> None:
    s = found.session
    state = "unfinished" if s.ended is None else f"took {duration(s.ended - s.began)}"
    click.echo(f"{s.id}: {clean(s.suite)}, {time.strftime('%Y-%m-%d %H:%M', time.localtime(s.began))}, {state}")
    m = s.machine
    ram = size(m.ram_mib * 2**20) if m.ram_mib else "?"
    click.echo(clean(f"{m.cpu}, {m.usable_cores} of {m.cores} cores, {ram}, {m.os}, Linux {m.kernel}" if m.kernel else m.cpu))
    for t in s.targets:
        artifact = f", {Path(t.artifact.path).name} {size(t.artifact.bytes)}" if t.artifact else ""
        click.echo(clean(f"  {t.id}: {t.server.version or 'version not told'}{artifact}, {t.via}"))
    for note in s.notes:
        click.echo(clean(f"  note: {note}"))


def cells_of(found: Results, case: CaseInfo) -> list[dict[str, Any]]:
    """One object for each target and cache mode of a case.  A median of mostly unreached checkpoints is None."""
    out = []
    trials = [t for t in found.measured() if t.case == case.id]
    for target, cache in sorted({(t.target, t.cache) for t in trials}):
        mine = [t for t in trials if (t.target, t.cache) == (target, cache)]
        checks = [t.check.passed for t in mine if t.check is not None]
        out.append(
            {
                "target": target,
                "case": case.id,
                "cache": cache,
                "n": len({t.key for t in mine}),
                "failed": len({t.key for t in mine if t.error}),
                "cache_wrong": sum(t.cache_ok is False for t in mine),
                "median_ms": {c.id: middle([_reached(t, c.id) for t in mine if c.id in t.cp]) for c in case.checkpoints},
                "decode_ms_per_tok": middle([t.decode_ms_per_tok for t in mine if t.decode_ms_per_tok is not None]),
                "passed": sum(checks),
                "checked": len(checks),
            }
        )
    return out


def _reached(trial: Trial, point: str) -> float:
    ms = trial.cp[point].ms
    return math.inf if ms is None else ms


def middle(values: Sequence[float]) -> float | None:
    """The median; what was never reached counts as infinite, and an infinite median is None.

    >>> middle([1.0, math.inf, 2.0]), middle([1.0, math.inf]), middle([])
    (2.0, None, None)
    """
    found = median(values) if values else math.inf
    return round(found, 3) if math.isfinite(found) else None


def lifecycle(found: Results) -> list[dict[str, Any]]:
    """One object for each target: medians over its launches."""
    out = []
    for target in dict.fromkeys(x.target for x in found.launches):
        mine = [x for x in found.launches if x.target == target]
        good = [x for x in mine if x.error is None]
        points = {name: middle([x.cp[name].ms or math.inf for x in good if name in x.cp]) for name in records.LIFECYCLE}
        out.append({"target": target, "n": len(mine), "failed": len(mine) - len(good), "median_ms": points})
    return out


def failures(found: Results) -> list[str]:
    """One line for each launch and trial that went wrong."""
    lines = [f"launch {x.launch} of {x.target}: {x.error}" for x in found.launches if x.error]
    return lines + [f"{t.case} {t.repeat} on {t.target}, launch {t.launch}: {t.error}" for t in found.trials if t.error]


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _pass(cell: dict[str, Any]) -> str:
    return f"{cell['passed']}/{cell['checked']}" if cell["checked"] else ""
