"""`bench run`: measures a suite, or goes on with what was cut short."""

from __future__ import annotations

import signal
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import msgspec

from llm_daemon.cli.words import as_json, count, duration, json_option, quiet_option, subcommand

from .. import cells, records, results, sessions, suite as suites
from ..artifacts import Finder
from ..display import Display
from ..errors import MachineError
from ..runner import Ready, Runner, Summary, prepare
from ..validate import told


@subcommand(
    "run",
    """
    llm-daemon bench run suite.toml
    llm-daemon bench run suite.toml --resume                   go on after a Ctrl-C, a crash, a power cut
    llm-daemon bench run suite.toml --target 'llama-server/*' --case chat-short --trials 2
    llm-daemon bench run suite.toml --json | jq -r .folder
    """,
)
@click.argument("suite_file", metavar="SUITE", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("results"), show_default=True, help="Folder of sessions.")
@click.option("--resume", is_flag=True, help="Go on with the latest unfinished session of this suite.")
@click.option("--session", metavar="ID", help="The session to resume, instead of the latest.")
@click.option("--target", "targets", multiple=True, metavar="GLOB", help="Only these targets (server/model/quant).")
@click.option("--case", "cases", multiple=True, metavar="GLOB", help="Only these cases.")
@click.option("--trials", type=click.IntRange(1), metavar="N", help="Trials of each case in a launch, instead of the suite's.")
@click.option("--launches", type=click.IntRange(1), metavar="N", help="Launches of each target, instead of the suite's.")
@click.option(
    "--max-minutes", type=click.FloatRange(0, min_open=True), metavar="M", help="Stop after that long; it can be resumed."
)
@click.option("--plain", is_flag=True, help="Lines instead of bars.")
@json_option
@quiet_option
def command(
    suite_file: Path, out: Path, resume: bool, session: str | None, targets: tuple[str, ...], cases: tuple[str, ...],
    trials: int | None, launches: int | None, max_minutes: float | None, plain: bool, json_: bool, quiet: bool,
) -> int:  # fmt: skip
    """Measure a suite: every server, model and quantization on every case.

    Results are on the disk after each trial. Ctrl-C stops at once; --resume goes on where it was.
    """
    chosen = sessions.Chosen(trials, launches, max_minutes, targets, cases)
    if (resume or session) and (trials or launches or targets or cases):
        raise click.UsageError("--resume goes on as it was begun: leave out --trials, --launches, --target and --case")
    suite = suites.load(suite_file)
    signal.signal(signal.SIGTERM, _terminate)
    with Display(plain, quiet or json_) as display:
        if resume or session:
            folder = sessions.find(out, session, suite)
            about, suite = sessions.resumed(folder, suite)
            suite = sessions.Chosen(max_minutes=max_minutes).apply(suite)
        else:
            suite = chosen.apply(suite)
        ready = prepare(suite, Finder(out / sessions.HASHES, lambda text: display.doing("", text)), display.problem)
        if not ready:
            raise MachineError("no target can be run", hint="each line above says what one of them needs")
        if resume or session:
            about = sessions.still(results.load(folder), about, ready)
        else:
            folder, about = sessions.new(suite, ready, out, sessions.invoked(), display.problems, trials_given=trials is not None)
        with closing(results.Writer(folder)) as writer:
            writer.session(about)
            try:
                summary = Runner(suite, about, ready, writer, display).run()
            except KeyboardInterrupt:
                display.problem(folder.name, f"stopped; `llm-daemon bench run {suite_file} --resume` goes on")
                raise
            lost = {t.id: "its program or model is missing" for t in suite.targets if t.id not in ready} | summary.lost
            found = results.load(folder)
            doubts = told.warnings(found.measured())
            for doubt in [*cells.busy(found), *doubts]:  # of a busy machine `report` can tell by itself
                display.problem(folder.name, doubt)
            about = msgspec.structs.replace(about, held=len({t.key for t in found.measured()}))
            writer.session(_ended(about, summary, lost, doubts))
    return _tell(folder, about, summary, lost, ready, json_, quiet)


def _terminate(*_: Any) -> None:
    """SIGTERM ends the servers in good order."""
    sys.exit(143)


def _ended(about: records.Session, summary: Summary, lost: dict[str, str], doubts: list[str]) -> records.Session:
    notes = [*about.notes, *(f"{name} is not complete: {why}" for name, why in lost.items()), *doubts]
    if summary.out_of_time:
        return msgspec.structs.replace(about, notes=(*notes, "stopped: the time budget was used up"))
    return msgspec.structs.replace(about, notes=tuple(dict.fromkeys(notes)), ended=None if lost else time.time())


def _tell(
    folder: Path,
    about: records.Session,
    summary: Summary,
    lost: dict[str, str],
    ready: dict[str, Ready],
    json_: bool,
    quiet: bool,
) -> int:
    if json_:
        as_json(
            {
                "session": about.id,
                "folder": str(folder),
                "trials": summary.trials,
                "kept": summary.kept,
                "errors": summary.errors,
                "targets": sorted(ready),
                "lost": lost,
                "out_of_time": summary.out_of_time,
            }
        )
    elif not quiet:
        kept = f", {summary.kept} kept from before" if summary.kept else ""
        failed = f", {summary.errors} of them failed" if summary.errors else ""
        click.echo(f"{folder}: {count(summary.trials, 'trial')}{failed}{kept}, {duration(time.time() - about.began)}")
        if summary.out_of_time:
            click.echo("The time budget was used up: --resume goes on.", err=True)
    return 3 if lost else 0
