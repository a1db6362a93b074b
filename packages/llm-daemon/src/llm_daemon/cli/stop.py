"""`stop`: one model, or everything."""

from __future__ import annotations

import select
from typing import Any

import click

from .. import errors
from . import link
from .ps import NOBODY
from .words import as_json, clean, json_option, subcommand

PATIENCE = 30.0  # seconds until a daemon that was told to leave must be gone: engines get some to end by themselves


@subcommand(
    "stop",
    """
    llm-daemon stop smollm2-135m                         this model; the next request loads it again
    llm-daemon stop                                      all models and the daemon
    llm-daemon stop --force                              even while programs use them
    """,
)
@click.argument("model", required=False)
@click.option("--force", is_flag=True, help="Even if somebody uses it; running answers are cut off.")
@json_option
def command(model: str | None, force: bool, json_: bool) -> None:
    """Stop a model, or everything.

    Rarely needed: models and daemon close by themselves. Refused while somebody holds what would be stopped
    (`llm-daemon who`), unless --force is given; a program that still wants it then starts it anew.
    """
    name = None if model is None else link.sync.wish(model)["model"]
    talk = link.look()
    if talk is None:
        if json_:
            as_json({"stopped": [], "daemon": False})
        else:
            click.echo(NOBODY)
        return
    try:
        result = _ask(talk, name, force)
        if result["daemon"]:
            _wait_gone(talk)
    finally:
        talk.close()
    if json_:
        as_json(result)
        return
    for stopped in result["stopped"]:
        click.echo(f"stopped {clean(stopped)}")
    if result["daemon"]:
        click.echo("the daemon has ended")
    elif not result["stopped"]:
        click.echo(f"{clean(model)} is not loaded")


def _ask(talk: Any, model: str | None, force: bool) -> dict[str, Any]:
    try:
        return link.call(talk, "stop", model=model, force=force)
    except errors.Unavailable as e:
        if e.code != "daemon_ended":
            raise
        return {"stopped": [], "daemon": True}  # on our word or its own: it is what was wanted


def _wait_gone(talk: Any) -> None:
    """Returns when the daemon has ended: whoever starts one next must not meet the old one's port."""
    poll = select.poll()
    poll.register(talk.sock, 0)  # the end of the connection is always reported
    if not poll.poll(1000 * PATIENCE):
        raise errors.Unavailable(
            f"the daemon (pid {talk.welcome['pid']}) was told to end and has not after {PATIENCE:g} s",
            hint="`llm-daemon ps` shows what it waits for; `llm-daemon stop --force` does not wait",
        )
