"""`engines`: what can run here, and what is missing for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from ..config import Settings
from ..engines.base import Location
from ..engines.registry import Registry
from .words import as_json, clean, json_option, subcommand, table


@subcommand(
    "engines",
    """
    llm-daemon engines
    llm-daemon engines --json | jq '.engines[] | select(.runs) | .name'
    """,
)
@json_option
def command(json_: bool) -> None:
    """Show which engines can run here.

    And for those that cannot: why, and how to get them.
    """
    found = look(Settings.load().engines)
    if json_:
        as_json({"engines": found})
        return
    if runs := [e for e in found if e["runs"]]:
        table(("ENGINE", "VERSION", "LICENSE", "FOUND"), [(e["name"], e["version"], e["license"], e["origin"]) for e in runs])
    else:
        click.echo("no engine can run here")
    for e in found:
        if not e["runs"]:
            click.echo(f"\n{clean(e['name'])} cannot run: {clean(e['reason'])}\n  hint: {clean(e['hint'])}")


def look(config: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One object for each engine: `runs` and either where and which, or why not."""
    registry = Registry(config)
    out: list[dict[str, Any]] = []
    for name in registry.names:
        place = registry.locate(name)
        about = {"name": name, "license": registry.get(name).license, "runs": isinstance(place, Location)}
        if isinstance(place, Location):
            about |= {"version": place.version, "origin": place.origin, "argv": list(place.argv)}
        else:
            about |= {"reason": place.reason, "hint": place.hint}
        out.append(about)
    for name, reason in registry.broken.items():
        out.append({"name": name, "license": None, "runs": False, "reason": reason, "hint": "install its package anew"})
    return out
