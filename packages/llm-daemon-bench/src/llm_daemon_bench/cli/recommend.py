"""`recommend`: which target to use, and why not the others."""

from __future__ import annotations

import re
from typing import get_args

import click

from llm_daemon.cli.words import as_json, clean, json_option, subcommand

from .. import pick
from ..errors import ResultsError
from ..faces import advice_json
from ..recommend import Advice, Prefer, Slo, recommend, wishes_of
from ..report.tables import advice_lines
from ..results import load


def _wishes(_ctx: click.Context, _param: click.Parameter, texts: tuple[str, ...]) -> list[Slo]:
    return [Slo.parse(text) for text in texts]


def _mib(_ctx: click.Context, _param: click.Parameter, text: str | None) -> float | None:
    """MiB of `6GiB`, `800MB`, `6G`; a bare number is MiB."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?B)?", text.strip(), re.I)
    if not found or (found[3] and not found[2]):
        raise click.BadParameter(f"{text!r} is no size like 6GiB")
    number, power = float(found[1]), "KMGT".find(found[2].upper() or "M") + 1
    return number * (1000.0 if found[3] and len(found[3]) == 1 else 1024.0) ** power / 2**20


@subcommand(
    "recommend",
    """
    llm-daemon bench recommend                             by the limits of the suite
    llm-daemon bench recommend --slo 'code-line.one_line:p50<=500' --slo 'extract-json:pass>=0.8' --max-rss 6GiB
    llm-daemon bench recommend --prefer quality --apply    and let llm-daemon use it from now on
    """,
)
@click.argument("session", required=False)
@click.option(
    "--slo", "slos", multiple=True, callback=_wishes, metavar="WISH", help="What has to hold; may be given several times."
)
@click.option("--max-rss", callback=_mib, metavar="SIZE", help="Memory it may use at most.")
@click.option(
    "--prefer",
    type=click.Choice(get_args(Prefer)),
    default="speed",
    show_default=True,
    help="What ranks those that meet all wishes.",
)
@click.option("--observed", is_flag=True, help="Judge by what was seen, not by the pessimistic end of its interval.")
@click.option("--apply", "apply_", is_flag=True, help="Write the winner into llm-daemon's config: `attach` then uses it.")
@click.option("--as", "name", metavar="NAME", help="With --apply: the model name that shall mean it (default: the model's own).")
@json_option
def command(
    session: str | None,
    slos: list[Slo],
    max_rss: float | None,
    prefer: Prefer,
    observed: bool,
    apply_: bool,
    name: str | None,
    json_: bool,
) -> int:
    """Name the target to use, and why not the others.

    The winner comes with its launch command, then the runner-up, and one reason for each rejected target.

    A wish is CASE.CHECKPOINT:p50<=500 (p50, p90, p95 or p99, in ms), CASE.CHECKPOINT:reach>=0.9 or CASE:pass>=0.9; CASE@start
    means the first request of a fresh server. Without any, the suite's `slo_ms` are the wishes.

    Exit status 1 if there is none to use: undecided, or no target meets all wishes.
    """
    results = load(pick.folder(session))
    wishes = slos or wishes_of(results)
    advice = recommend(results, wishes, prefer=prefer, max_rss_mib=max_rss, observed=observed)
    applied = _apply(advice, name) if apply_ else None
    if json_:
        as_json({**advice_json(advice), "applied": applied})
        return 0 if advice.winner else 1
    for i, line in enumerate(advice_lines(advice)):
        click.echo(clean(line))
        if i == 0 and advice.winner and advice.winner.info.command:
            click.echo(clean(f"  {advice.winner.info.command}"))
    if applied:
        click.echo(clean(f"{applied['file']}: {applied['name']} now means {applied['wish']}, and is the default model"))
        click.echo("  a daemon that runs already learns it when it was stopped (`llm-daemon stop`)")
        if applied["backup"]:
            click.echo(clean(f"  the file as it was: {applied['backup']}"))
    return 0 if advice.winner else 1


def _apply(advice: Advice, name: str | None) -> dict[str, str | None]:
    from ..apply import apply

    if advice.winner is None:
        raise ResultsError(
            "there is no winner to apply", hint="`bench recommend` without --apply says why; --observed is less strict"
        )
    done = apply(advice.winner.info, name=name)
    return {"file": str(done.file), "name": done.name, "wish": done.wish, "backup": str(done.backup) if done.backup else None}
