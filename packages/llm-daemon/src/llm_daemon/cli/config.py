"""`config`: every setting, and where it comes from."""

from __future__ import annotations

import json
import os

import click

from .. import paths
from ..config import Settings, effective
from .words import as_json, clean, json_option, subcommand, table


@subcommand(
    "config",
    """
    llm-daemon config
    llm-daemon config --json | jq .settings.ttl.value
    LLM_DAEMON_TTL=600 llm-daemon config                 what a variable would do
    """,
)
@json_option
def command(json_: bool) -> None:
    """Show every setting and where it comes from.

    Settings stand in the config file as KEY = VALUE; an environment variable LLM_DAEMON_<KEY> goes before it. A running daemon
    keeps what it was started with: `llm-daemon stop` makes it read them anew.
    """
    from ..daemon.settings import catalog_and_engines

    loaded = Settings.load()
    catalog_and_engines(loaded)  # what the daemon would refuse is refused here
    settings = effective(loaded)
    path = paths.config_file()
    folders = {"runtime": paths.runtime_dir(), "state": paths.state_dir(), "cache": paths.cache_dir()}
    if json_:
        as_json({"file": path, "exists": os.path.exists(path), "folders": folders, "settings": settings})
        return
    click.echo(f"file: {clean(path)}" + ("" if os.path.exists(path) else " (does not exist)"))
    for name, folder in folders.items():
        click.echo(f"{name} folder: {clean(folder)}")
    click.echo()
    table(("SETTING", "VALUE", "FROM"), [(k, _shown(v["value"]), v["from"]) for k, v in settings.items()])


def _shown(value: object) -> str:
    if value is None:
        return "-"
    text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
