"""`ps`: what runs.  Looks only: starts no daemon, wakes no model."""

from __future__ import annotations

import shlex
from typing import Any

import click

from . import link
from .words import as_json, clean, count, duration, json_option, size, subcommand, table

NOBODY = "no daemon is running"
STILL = 5.0  # seconds without a sign of life that are worth a word


@subcommand(
    "ps",
    """
    llm-daemon ps
    llm-daemon ps -v                                     also the engines' command lines and logs
    llm-daemon ps --json | jq '.instances[].model'
    """,
)
@click.option("--verbose", "-v", is_flag=True, help="Also pids, command lines and logs.")
@json_option
def command(verbose: bool, json_: bool) -> None:
    """Show what runs, and when it will close."""
    state = link.status()
    if json_:
        as_json(state or {"daemon": None, "instances": [], "leases": []})
    elif state is None:
        click.echo(NOBODY)
    else:
        _show(state, verbose)


def _show(state: dict[str, Any], verbose: bool) -> None:
    daemon = state["daemon"]
    click.echo(
        f"daemon {daemon['version']}, pid {daemon['pid']}, up {duration(daemon['uptime'])}, "
        f"{size(daemon['memory_bytes'])}, {count(daemon['leases'], 'lease')}, {daemon['base_url']}"
    )
    if daemon.get("port_note"):
        click.echo(f"  not the usual port: {clean(daemon['port_note'])}")
    if daemon.get("exit_in") is not None:
        click.echo(f"  nobody holds it: it ends by itself in {duration(daemon['exit_in'])}")
    if verbose:
        click.echo(f"  folder {clean(daemon['runtime_dir'])}\n  log {clean(daemon['log'])}")
    if not state["instances"]:
        click.echo("no model is loaded")
        return
    if daemon.get("memory_budget_bytes"):
        click.echo(
            f"memory: {size(daemon['memory_promised_bytes'])} of {size(daemon['memory_budget_bytes'])} are kept for models"
        )
    head = ("MODEL", "ENGINE", "STATE", "MEMORY", "CONTEXT", "LEASES", "BUSY", "LAST USE", "CLOSES")
    table(head, [_row(i) for i in state["instances"]])
    for i in state["instances"]:
        if i.get("error"):
            click.echo(f"{clean(i['model'])}: {clean(i['error'].get('message', ''))}")
        if i.get("waits_for"):
            click.echo(clean(i["waits_for"]))
        if verbose:
            click.echo(f"{clean(i['model'])}: pid {i['pid'] or '-'}, keeper {i['keeper_pid'] or '-'}, {i['engine_version']}")
            click.echo(f"  {clean(shlex.join(i['argv']))}\n  log {clean(i['log'])}")


def _row(i: dict[str, Any]) -> tuple[object, ...]:
    doing = i["state"]
    if progress := i.get("progress"):
        total = progress.get("total")
        percent = f" {100 * progress['done'] // total} %" if total else ""
        doing += f" ({progress.get('phase', '')}{percent})"
    if (still := i.get("stalled_seconds") or 0.0) >= STILL:
        doing += f", silent for {duration(still)}"
    busy = f"{i['running']}/{i['slots']}" + (f" +{i['waiting']} waiting" if i["waiting"] else "")
    used = "-" if i["state"] != "ready" else "now" if i["idle"] is None or i["running"] else f"{duration(i['idle'])} ago"
    closes = f"in {duration(i['closes_in'])}" if i["closes_in"] is not None else "-"
    return (
        i["model"], i["engine"] or "-", doing, _memory(i), i["context"] or "-", len(i["leases"]), busy, used, closes,
    )  # fmt: skip


def _memory(i: dict[str, Any]) -> str:
    """What it takes, of what is kept for it."""
    return size(i["memory_bytes"]) + (f" of {size(i['need_bytes'])}" if i.get("need_bytes") else "")
