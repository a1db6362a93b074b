"""`compare`: two targets or two sessions, cell by cell."""

from __future__ import annotations

import sys

import click

from llm_daemon.cli.words import as_json, is_terminal, json_option, subcommand

from .. import pick
from ..compare import compare
from ..faces import comparison_json, comparison_text

threshold_option = click.option(
    "--threshold", metavar="PCT", type=float, default=5.0, show_default=True, help="Changes below are of no interest, in percent."
)
floor_option = click.option(
    "--floor",
    metavar="PCT",
    type=float,
    default=0.0,
    help="Noise floor from `bench aa`, in percent; twice of it is the least change.",
)
within_option = click.option(
    "--in", "within", metavar="SESSION", help="Session of targets that are named alone (default: the newest)."
)
plain_option = click.option("--plain", is_flag=True, help="No colours, also on a terminal.")


@subcommand(
    "compare",
    """
    llm-daemon bench compare llama-server xllamacpp           two targets of the newest session
    llm-daemon bench compare results/monday results/tuesday
    llm-daemon bench compare monday:Q4_K_M tuesday:Q5_K_M --json
    """,
)
@click.argument("base", metavar="A")
@click.argument("new", metavar="B")
@within_option
@threshold_option
@floor_option
@plain_option
@json_option
def command(base: str, new: str, within: str | None, threshold: float, floor: float, plain: bool, json_: bool) -> None:
    """Say in which cells B is faster or slower than A.

    Only a change whose 95 % interval excludes none, which is as large as the threshold and which stands after Holm's
    correction over all cells is called one; all others are "no difference shown".
    """
    found = [compare(a, b, threshold=threshold / 100, floor=floor / 100) for a, b in pick.sides(base, new, within)]
    if json_:
        as_json({"comparisons": [comparison_json(c) for c in found]})
        return
    click.echo("\n\n".join(comparison_text(c, colour=not plain and is_terminal(sys.stdout)) for c in found))
