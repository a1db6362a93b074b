"""`engines`: what can run here, and what is missing for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import click

from ..config import Settings
from ..engines.base import Location
from ..engines.libraries import LIBRARIES
from ..engines.registry import Registry
from ..errors import LlmDaemonError
from . import measured
from .words import as_json, clean, json_option, quiet_option, subcommand, table


@subcommand(
    "engines",
    """
    llm-daemon engines
    llm-daemon engines --measure                         how soon each lets go of a request whose client is gone
    llm-daemon engines --json | jq '.engines[] | select(.runs) | .name'
    """,
)
@click.option("--measure", is_flag=True, help="Start each one and measure its hang-ups; takes some minutes.")
@click.option("--model", metavar="MODEL", help="Measure with this model instead of the default one.")
@json_option
@quiet_option
@click.pass_context
def command(ctx: click.Context, measure: bool, model: str | None, json_: bool, quiet: bool) -> None:
    """Show which engines can run here.

    And for those that cannot: why, and how to get them. HANG-UP is the time from a client's hang-up until the engine serves
    somebody else: what clients get through the daemon and, in parentheses, what a plain request would get.
    """
    if model is not None and not measure:
        raise click.UsageError("--model goes with --measure", ctx)
    settings = Settings.load()
    failed: dict[str, LlmDaemonError] = {}
    if measure:
        from .measure import run

        failed = run(settings.default_model if model is None else model, settings, quiet)
    found = look(settings.engines)
    if json_:
        as_json({"engines": found})
    else:
        show(found)
    for name, e in failed.items():
        click.echo(clean(f"llm-daemon: {name} was not measured: {e.message}" + (f" ({e.hint})" if e.hint else "")), err=True)
    ctx.exit(max((e.exit_status for e in failed.values()), default=0))


def show(found: list[dict[str, Any]]) -> None:
    if runs := [e for e in found if e["runs"]]:
        rows = [(e["name"], e["version"], e["license"], measured.brief(e["hang_up"]), e["origin"]) for e in runs]
        table(("ENGINE", "VERSION", "LICENSE", "HANG-UP", "FOUND"), rows)
        for e in runs:
            for weak in e["weaknesses"]:
                click.echo(f"\n{clean(e['name'])} {clean(e['version'])} has {weak['id']}: llm-daemon doctor says what to do")
    else:
        click.echo("no engine can run here")
    for e in found:
        if not e["runs"]:
            click.echo(f"\n{clean(e['name'])} cannot run: {clean(e['reason'])}\n  hint: {clean(e['hint'])}")


def look(config: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One object for each engine: `runs` and either where, which, its `hang_up` (None: not measured) and known `weaknesses`,
    or why not.  Last come `library`s, which no adapter could serve with."""
    registry, known = Registry(config), measured.load()
    out: list[dict[str, Any]] = []
    for name in registry.names:
        place = registry.locate(name)
        about = {"name": name, "license": registry.get(name).license, "runs": isinstance(place, Location)}
        if isinstance(place, Location):
            about |= {"version": place.version, "origin": place.origin, "argv": list(place.argv)}
            about["hang_up"] = measured.find(known, name, place.version, place.argv[0])
            about["weaknesses"] = [
                asdict(a) for a in getattr(registry.get(name), "weaknesses", lambda version: ())(place.version)
            ]
        else:
            about |= {"reason": place.reason, "hint": place.hint}
        out.append(about)
    for name, reason in registry.broken.items():
        out.append({"name": name, "license": None, "runs": False, "reason": reason, "hint": "install its package anew"})
    for name, (license_, reason, hint) in LIBRARIES.items():
        out.append({"name": name, "license": license_, "runs": False, "reason": reason, "hint": hint, "library": True})
    return out
