"""`who`: which process holds which model."""

from __future__ import annotations

import click

from . import link
from .ps import NOBODY
from .words import as_json, duration, json_option, subcommand, table


@subcommand(
    "who",
    """
    llm-daemon who
    llm-daemon who --json | jq '.leases[].pid'
    """,
)
@json_option
def command(json_: bool) -> None:
    """Show who holds which model.

    A lease ends with its process. A process that is only watched (by `llm-daemon env`) holds the endpoint, not a model.
    """
    state = link.status()
    leases = state["leases"] if state else []
    if json_:
        as_json({"leases": leases})
    elif state is None:
        click.echo(NOBODY)
    elif not leases:
        click.echo("nobody holds a lease")
    else:
        rows = [
            (le["pid"] or "-", f"{duration(le['since'])}", ", ".join(le["models"]) or "the endpoint", le["program"] or "-")
            for le in leases
        ]
        table(("PID", "SINCE", "HOLDS", "PROGRAM"), rows)
