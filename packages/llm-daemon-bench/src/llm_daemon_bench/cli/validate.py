"""`bench validate`: are our numbers true?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec

from llm_daemon.cli.words import as_json, clean, json_option, subcommand

from .. import pick, results
from ..validate.agreement import Line

STEPS = ("V0", "V1", "V2", "V3", "V4")


@subcommand(
    "validate",
    """
    llm-daemon bench validate
    llm-daemon bench validate --tool-path servebench-env/bin --tool-path frugal-llm-env/bin
    llm-daemon bench validate 20260101-1               V1 alone, on a session that was run before
    """,
)
@click.argument("session", required=False)
@click.option("--step", "steps", multiple=True, type=click.Choice(STEPS), help="Only these steps; may be repeated.")
@click.option("--tool-path", "tools", multiple=True, metavar="DIR", type=click.Path(path_type=Path), help="Where tools are, too.")
@click.option("--model", default="smollm2-135m", show_default=True, help="Model for V1 and V2, by name or path.")
@json_option
def command(session: str | None, steps: tuple[str, ...], tools: tuple[Path, ...], model: str, json_: bool) -> int:
    """Hold our numbers against references, and print how far they agree.

    \b
    V0  a scripted server of known times
    V1  what a real server says of itself
    V2  llama-bench, on the same weights
    V3  llama-benchy; V4  servebench and frugal-llm, on one server, in turns

    Each is run if it is installed. Exit status 1 if any disagrees. Let the machine rest meanwhile.
    """
    # At the end: a tool's folder may hold a python, too.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), *(str(t.absolute()) for t in tools)])
    lines = []
    for line in references(session, steps or STEPS, model):
        lines.append(line)
        if not json_:
            click.echo(clean(row(line)))
    wrong = sum(line.agrees is False for line in lines)
    if json_:
        as_json({"lines": [msgspec.to_builtins(line) | {"apart": line.apart} for line in lines], "disagree": wrong})
    else:
        missing = sum(line.agrees is None for line in lines)
        click.echo(f"{len(lines) - wrong - missing} agree, {wrong} do not, {missing} not compared")
    return 1 if wrong else 0


def references(session: str | None, steps: tuple[str, ...], model: str) -> Iterator[Line]:
    """The lines of all steps that were asked for, as they come."""
    if session is not None:
        from ..validate import told

        yield from told.check(results.load(pick.folder(session)).measured())
        return
    if "V0" in steps:
        from ..validate import known

        yield from known.check()
    if "V1" in steps or "V2" in steps:
        from ..validate import engine

        yield from (line for line in engine.check(model, bench="V2" in steps) if line.step in steps)
    if "V3" in steps or "V4" in steps:
        from ..validate import others

        yield from others.check([tool for tool in others.TOOLS if tool.step in steps])


def row(line: Line) -> str:
    """One line of the table.

    >>> from llm_daemon_bench.validate.agreement import Bound, hold
    >>> row(hold("V4", "first token", "servebench", [(100.5, 101.0)], Bound(3.0, 0.03)))
    'V4  agrees    first token                              ours 100.50 ms, servebench 101.00 ms (-0.50; bound 3 ms or 3%)'
    """
    verdict = {True: "agrees", False: "DISAGREES", None: "-"}[line.agrees]
    told = line.note
    if line.ours is not None and line.reference is not None:
        told = f"ours {line.ours:.2f} ms, {line.against} {line.reference:.2f} ms ({line.apart:+.2f}"
        told += f"; bound {line.bound})" if line.bound != type(line.bound)() else ")"
        told += f"; {line.note}" if line.note else ""
    elif line.agrees is None:
        told = f"{line.against}: {line.note}"
    elif not told:
        told = f"the same as {line.against}, {line.n} times"
    return f"{line.step}  {verdict:<9} {line.what:<40} {told}"
