"""`gate`: exit status 1 if something got slower, for scripts and CI."""

from __future__ import annotations

import click

from llm_daemon.cli.words import as_json, clean, json_option, subcommand

from .. import pick
from ..compare import compare, gate
from ..faces import comparison_json
from .compare import floor_option, within_option


def _share(_ctx: click.Context, _param: click.Parameter, text: str) -> float:
    """`5%` or `5`: percent."""
    try:
        number = float(text.strip().removesuffix("%"))
    except ValueError:
        number = -1.0
    if not 0 < number <= 1000:
        raise click.BadParameter(f"{text!r} is no percentage above 0, like 5%")
    return number


@subcommand(
    "gate",
    """
    llm-daemon bench gate results/main results/branch --max 5%
    llm-daemon bench gate main:llama-server branch:llama-server --max 10% --json
    """,
)
@click.argument("base")
@click.argument("new")
@click.option(
    "--max", "most", callback=_share, default="5%", show_default=True, metavar="PCT", help="How much slower a cell may get."
)
@within_option
@floor_option
@json_option
def command(base: str, new: str, most: float, within: str | None, floor: float, json_: bool) -> int:
    """Exit with 1 if anything became slower or wrong.

    NEW does not pass if it is slower than BASE in any cell by --max or more, is right less often, lacks a cell, or has too few
    trials to tell.
    """
    reasons: list[str] = []
    found = []
    reasons += pick.gone(base, new)
    for a, b in pick.sides(base, new, within):
        found.append(compare(a, b, threshold=most / 100, floor=floor / 100))
        reasons += [f"{found[-1].new}: {line}" for line in gate(found[-1])]
    if json_:
        as_json({"passed": not reasons, "reasons": reasons, "comparisons": [comparison_json(c) for c in found]})
    elif reasons:
        for line in reasons:
            click.echo(f"FAIL {clean(line)}")
    else:
        cells = sum(row.p is not None for c in found for row in c.rows)
        click.echo(f"pass: nothing in {cells} cells is slower by {most:g} % or more, as far as these trials can show")
    return 1 if reasons else 0
