"""`who`: which process holds which model."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import click

from . import link
from .ps import NOBODY
from .words import as_json, duration, json_option, subcommand, table

SHELLS = frozenset("sh bash zsh fish dash ksh mksh tcsh csh nu pwsh xonsh".split())


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
        table(("PID", "KIND", "SINCE", "HOLDS", "PROGRAM"), [_row(le) for le in leases])


def _row(lease: dict[str, Any]) -> tuple[object, ...]:
    holds = ", ".join(lease["models"]) or "the endpoint"
    program = short(lease["program"])
    return lease["pid"] or "-", kind(lease["kind"], lease["program"]), duration(lease["since"]), holds, program or "-"


def kind(lease: str, program: str) -> str:
    """What sort of holder it is, as well as its command line tells.

    >>> kind("client", "/usr/bin/python3 -m ipykernel_launcher -f"), kind("client", "python train.py"), kind("hold", "-zsh")
    ('notebook', 'program', 'shell')
    >>> kind("client", "python /usr/bin/llm-daemon exec --model"), kind("hold", "vim notes"), kind("ghost", "python boot.py")
    ('llm-daemon exec', 'watched program', 'older daemon')
    """
    words = program.split()
    if lease == "ghost":
        return "older daemon"
    if any(os.path.basename(word) in ("ipykernel_launcher", "ipykernel", "jupyter-kernel") for word in words):
        return "notebook"
    if lease == "hold":
        return "shell" if words and os.path.basename(words[0]).lstrip("-") in SHELLS else "watched program"
    for word, after in pairwise(words):
        if os.path.basename(word) in ("llm-daemon", "llmd", "llm_daemon.cli.main"):
            return f"llm-daemon {after}"
    return "program"


def short(program: str) -> str:
    """The command line without the folder of its first word.

    >>> short("/usr/bin/python3 train.py")
    'python3 train.py'
    """
    first, space, rest = program.partition(" ")
    return os.path.basename(first) + space + rest
