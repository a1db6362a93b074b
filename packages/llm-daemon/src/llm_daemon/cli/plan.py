"""`plan`: what loading a model would be, without doing it."""

from __future__ import annotations

import os
import shlex
from time import monotonic
from typing import Any

import click

from .. import errors
from . import link
from .words import as_json, clean, count, json_option, load_options, size, subcommand

PARTS = {"weights_bytes": "weights", "cache_bytes": "cache", "compute_bytes": "compute", "process_bytes": "process"}


@subcommand(
    "plan",
    """
    llm-daemon plan smollm2-135m
    llm-daemon plan llama3-8b@Q4_K_M --context 16384     how much memory would that be?
    llm-daemon plan llama3-8b --json | jq .outcome
    """,
)
@click.argument("model", required=False)
@load_options
@json_option
def command(model: str | None, load: dict[str, Any], json_: bool) -> None:
    """Show what loading a model would do.

    Its file, here or to be fetched; engine and command line; the memory it needs, and who would have to leave for it. Nothing is
    started or fetched. Works with a daemon and without.
    """
    wish = link.sync.wish(model if model is not None else link.default_model(), **load)
    found = _of_daemon(wish) or _alone(wish)
    if json_:
        as_json(found)
    else:
        _show(found)


def _of_daemon(wish: dict[str, Any]) -> dict[str, Any] | None:
    talk = link.look()
    if talk is None:
        return None
    try:
        return {**link.call(talk, "plan", wish=wish), "daemon": True}
    except errors.Unavailable as e:
        if e.code != "daemon_ended":  # a question keeps no daemon here; we can answer it too
            raise
        return None
    finally:
        talk.close()


def _alone(wish: dict[str, Any]) -> dict[str, Any]:
    """As the daemon would answer that the next client starts."""
    from ..config import Settings
    from ..core.leases import Leases
    from ..core.machine import Machine
    from ..daemon.plan import look, outcome
    from ..daemon.settings import catalog_and_engines
    from ..daemon.supervisor import Supervisor
    from ..spec import Wish

    settings, now = Settings.load(), monotonic()
    supervisor = Supervisor(settings, *catalog_and_engines(settings), "", "", lambda event: None)
    spec = supervisor.resolve(Wish.of(**wish))
    found = look(supervisor, spec, supervisor.threads())
    machine = Machine(
        Leases.born(settings.linger, now), settings.ttl, settings.leased_ttl, settings.queue_limit, settings.max_overtake,
        supervisor.memory.budget,
    )  # fmt: skip
    return {**found, "outcome": outcome(machine, spec, found["memory"]["need_bytes"], now), "daemon": False}


def _show(found: dict[str, Any]) -> None:
    from ..daemon.plan import taken

    artifact, engine, memory = found["artifact"], found["engine"], found["memory"]
    about = ", ".join(clean(artifact[k]) for k in ("quant", "license") if artifact[k])
    here = (
        clean(artifact["path"])
        if artifact["path"]
        else f"to be fetched from {clean(artifact['source'])}:{clean(artifact['locator'])}"
    )
    parts = ", ".join(f"{word} {size(memory[name])}" for name, word in PARTS.items() if memory[name])
    basis = f"{memory['basis']}: {parts}" if parts and memory["basis"] != "learned" else memory["basis"]
    need = "unknown" if memory["basis"] == "unknown" else f"{size(memory['need_bytes'])} ({basis})"
    rows = {
        "model": clean(found["model"]) + (f" ({about})" if about else ""),
        "file": f"{here}, {size(artifact['size_bytes'])}",
        "engine": clean(f"{engine['name']} {engine['version']} ({engine['origin']})"),
        "command": clean(shlex.join([os.path.basename(found["argv"][0]), *found["argv"][1:]])),
        "room": f"{count(found['parallel'], 'conversation')} of {found['context']} tokens, {count(found['threads'], 'thread')}",
        "memory": need + (f"; {clean(memory['note'])}" if memory["note"] else ""),
        "budget": taken(found) + ("" if found["daemon"] else " (no daemon is running)"),
        "outcome": clean(found["outcome"]["text"]),
    }
    for name, text in rows.items():
        click.echo(f"{name + ':':<9} {text}")
