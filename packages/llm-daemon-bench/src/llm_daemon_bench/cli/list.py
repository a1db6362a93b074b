"""`bench list`: the sessions there are."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from llm_daemon.cli.words import as_json, json_option, subcommand, table

from .. import ready, results, sessions
from ..errors import ResultsError


@subcommand(
    "list",
    """
    llm-daemon bench list
    llm-daemon bench list --json | jq -r '.sessions[] | select(.ended == null) | .id'
    """,
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("results"), show_default=True, help="Folder of sessions.")
@click.option("--suites", is_flag=True, help="The ready suites that `bench init --suite` starts from, instead.")
@json_option
def command(out: Path, suites: bool, json_: bool) -> None:
    """Show the sessions there are."""
    if suites:
        if json_:
            as_json({"suites": ready.names()})
        else:
            table(("SUITE", "ABOUT"), list(ready.names().items()))
        return
    rows: list[dict[str, Any]] = []
    broken: list[str] = []
    for folder in sessions.folders(out):
        try:
            found = results.load(folder)
        except ResultsError as e:
            broken.append(e.message)
            continue
        session, trials = found.session, {t.key for t in found.measured()}
        rows.append(
            {
                "id": folder.name,  # what the other verbs find it by, also where it was copied or renamed
                "suite": session.suite,
                "began": session.began,
                "ended": session.ended,
                "trials": len(trials),
                "targets": [t.id for t in session.targets],
                "cases": [c.id for c in session.cases],
                "cpu": session.machine.cpu,
            }
        )
    if json_:
        as_json({"sessions": rows})
    elif rows:
        lines = [
            (
                r["id"], time.strftime("%Y-%m-%d %H:%M", time.localtime(r["began"])), "" if r["ended"] else "unfinished",
                r["trials"], len(r["targets"]), len(r["cases"]), r["suite"],
            )
            for r in rows
        ]  # fmt: skip
        table(("SESSION", "BEGAN", "STATE", "TRIALS", "TARGETS", "CASES", "SUITE"), lines)
    else:
        click.echo(f"no session in {out}")
    for line in broken:
        click.echo(f"llm-daemon: {line}", err=True)
