"""`load`: warm up a model by hand."""

from __future__ import annotations

from typing import Any

import click

from . import link
from .run import fate
from .words import as_json, json_option, load_options, quiet_option, subcommand


@subcommand(
    "load",
    """
    llm-daemon load smollm2-135m
    llm-daemon load smollm2-135m --keep-alive 3600       stays for an hour after its last use
    """,
)
@click.argument("model", required=False)
@click.option("--keep-alive", type=click.FloatRange(0, 1e9), metavar="SECONDS", help="How long it stays when nobody uses it.")
@load_options
@json_option
@quiet_option
def command(model: str | None, keep_alive: float | None, load: dict[str, Any], json_: bool, quiet: bool) -> None:
    """Load a model ahead of its first use.

    Returns when it answers. It then closes as any other: some time after its last use.
    """
    name = model if model is not None else link.default_model()
    with link.attach(name, quiet, keep_alive, **load) as lease:
        if json_:
            facts = {"model": lease.model, "engine": lease.engine, "pid": lease.pid, "instance": lease.instance}
            as_json({**facts, "base_url": lease.base_url})
        else:
            click.echo(f"{lease.model} is loaded on {lease.engine} (pid {lease.pid})" + fate(lease, keep_alive))
