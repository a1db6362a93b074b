"""`aa`: how large a difference is when there is none."""

from __future__ import annotations

import math

import click

from llm_daemon.cli.words import as_json, clean, json_option, subcommand

from .. import pick
from ..compare import Side, self_test
from ..faces import comparison_json
from ..results import load


@subcommand(
    "aa",
    """
    llm-daemon bench aa                                    each target of the newest session
    llm-daemon bench aa results/monday --target llama-server
    llm-daemon bench aa results/monday --target one --twin two    the same thing, run as two targets
    """,
)
@click.argument("session", required=False)
@click.option("--target", "targets", multiple=True, metavar="TARGET", help="This one (may be given several times).")
@click.option("--twin", metavar="TARGET", help="A second target that is the same thing.")
@json_option
def command(session: str | None, targets: tuple[str, ...], twin: str | None, json_: bool) -> None:
    """Tell how large a difference is where there is none.

    Compares each target with itself, every other round against the rest: the noise floor.

    `compare --floor` and `gate --floor` then call only changes of twice its size.
    """
    results = load(pick.folder(session))
    names = [pick.target(results, t) for t in targets] or pick.measured(results)
    other = Side(results, pick.target(results, twin)) if twin else None
    found = [self_test(Side(results, name), other) for name in names]
    if json_:
        as_json(
            {
                "floors": [
                    {
                        "target": f.target,
                        "floor": f.floor if math.isfinite(f.floor) else None,
                        "cells": [{**k._asdict(), "floor": v if math.isfinite(v) else None} for k, v in f.floors.items()],
                        "called_different": len(f.comparison.calls()),
                        "comparison": comparison_json(f.comparison),
                    }
                    for f in found
                ]
            }
        )
        return
    for f in found:
        floor = f"noise floor {f.floor:.1%}" if math.isfinite(f.floor) else "too few trials for a noise floor (10 a cell)"
        calls = f.comparison.calls()
        said = f"calls {len(calls)} of {len(f.comparison.rows)} cells different" if calls else "nothing called different"
        click.echo(clean(f"{f.target}: {floor}; {said}"))
        for row in calls:
            click.echo(clean(f"  {row.key}: {row.verdict}: the machine was not quiet"))
        worst = max(f.floors.items(), key=lambda item: item[1], default=None)
        if worst and math.isfinite(worst[1]):
            click.echo(clean(f"  noisiest cell {worst[0]}: {worst[1]:.1%}"))
