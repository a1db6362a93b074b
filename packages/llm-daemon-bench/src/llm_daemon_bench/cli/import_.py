"""`import`: what another tool measured, as a session."""

from __future__ import annotations

from pathlib import Path

import click

from llm_daemon.cli.words import as_json, clean, count, json_option, subcommand

from ..foreign import TOOLS, take


@subcommand(
    "import",
    """
    llm-daemon bench import llama-bench bench.json
    llm-daemon bench import llama-benchy report.json --out results --json | jq -r .folder
    """,
)
@click.argument("tool", type=click.Choice(list(TOOLS)))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("results"), show_default=True, help="Folder of sessions.")
@json_option
def command(tool: str, file: Path, out: Path, json_: bool) -> None:
    """Make a session of what llama-bench or llama-benchy measured.

    `report`, `compare`, `gate` and `export` then read it like one of ours. Each repetition is a trial.
    """
    folder, session = take(tool, file, out)
    targets, cases = [t.id for t in session.targets], [c.id for c in session.cases]
    if json_:
        as_json({"session": session.id, "folder": str(folder), "targets": targets, "cases": cases})
        return
    click.echo(clean(f"{folder}: {count(len(targets), 'target')}, {count(len(cases), 'case')}: {', '.join(cases)}"))
