"""`explain`: where the time of a request went, and why models were loaded and closed."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import click

from .. import errors
from . import link
from .words import as_json, clean, count, json_option, size, subcommand

WIDTH = 40  # characters of a bar that stands for the whole request
PARTS = {
    "queue": "waited for a slot", "load": "waited for the model", "engine": "until the answer began", "answer": "until its end",
}  # fmt: skip


@subcommand(
    "explain",
    """
    llm-daemon explain                                   the last request, and the last twenty in short
    llm-daemon explain 3f2a1c-17                         one request, by its X-LLM-Ticket
    llm-daemon explain --last 500 --json | jq .summary
    """,
)
@click.argument("ticket", required=False)
@click.option("--last", type=click.IntRange(1, 10_000), default=20, show_default=True, help="Sum up so many requests.")
@json_option
def command(ticket: str | None, last: int, json_: bool) -> None:
    """Show where the time of a request went.

    Without TICKET: the last request, a summary of those before it, and why models were loaded and closed. What is shown is
    kept in a file, so that it needs no daemon; prompts and answers are not in it.
    """
    told = _ask(ticket, last)
    if json_:
        as_json(told)
        return
    if told["ticket"] is None:
        click.echo("no request is known yet")
    else:
        _show(told["ticket"])
    if ticket is None:
        for one in told["live"]:
            click.echo(f"now {one['state']}: {_what(one)}, for {seconds(one['total_s'])}")
        if told["recent"]:
            _sum_up(told["summary"])
    if told["events"]:
        click.echo("models:")
        for event in reversed(told["events"]):
            click.echo(f"  {_clock(event['time'])}  {clean(event['text'])}")


def _ask(ticket: str | None, last: int) -> dict[str, Any]:
    talk = link.look()
    if talk is not None:
        try:
            return link.call(talk, "explain", ticket=ticket, limit=last)
        except errors.Unavailable as e:
            if e.code != "daemon_ended":  # a question keeps no daemon here; the file knows as much
                raise
        finally:
            talk.close()
    from ..daemon.explain import from_file
    from ..paths import history_file

    return from_file(history_file(), ticket, last)


def _show(record: Mapping[str, Any]) -> None:
    end = record.get("end")
    if end is None:
        click.echo(f"request {clean(record['ticket'])}: {record['state']}, for {seconds(record['total_s'])}; {_what(record)}")
        return
    status = ", ".join(clean(v) for v in (record["status"], record["code"]) if v)
    click.echo(f"request {clean(record['ticket'])}: {end} ({status}) after {seconds(record['total_s'])}")
    click.echo(f"  {_clock(record['time'])}  {_what(record)}{_from(record)}")
    for line in bars(record["parts"]):
        click.echo("  " + line)
    if record["first_token_s"] is not None:
        click.echo(f"  its first piece came after {seconds(record['first_token_s'])}; {_amount(record)}")
    if record["replayed"]:
        click.echo("  its first engine died before it answered; a second one did")


def bars(parts: Mapping[str, float]) -> list[str]:
    """One line for each part that took time; a bar begins where the one above ends.

    >>> for line in bars({"queue": 1.0, "load": 0.0, "engine": 1.0, "answer": 2.0}): print(line.replace("█", "#"))
    queue   ##########                               1.00 s  25 %  waited for a slot
    engine            ##########                     1.00 s  25 %  until the answer began
    answer                      #################### 2.00 s  50 %  until its end
    """
    block = "█" if (sys.stdout.encoding or "").lower().startswith("utf") else "#"
    whole = sum(parts.values())
    lines, before = [], 0.0
    for name, took in parts.items():
        if took <= 0:
            continue
        start = min(WIDTH - 1, round(WIDTH * before / whole))
        length = max(1, round(WIDTH * (before + took) / whole) - start)
        bar = (" " * start + block * length).ljust(WIDTH)
        lines.append(f"{name:<7} {bar} {seconds(took)} {100 * took / whole:>3.0f} %  {PARTS[name]}")
        before += took
    return lines


def seconds(value: float) -> str:
    """
    >>> [seconds(v) for v in (0.00012, 0.0321, 2.5, 75.0)]
    ['0.1 ms', '32.1 ms', '2.50 s', '75.0 s']
    """
    return f"{1000 * value:.1f} ms" if value < 0.1 else f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def _what(record: Mapping[str, Any]) -> str:
    engine = f" on {record['engine']}" if record.get("engine") else ""
    lane = f", {record['lane']} lane" if record.get("lane") else ""
    return clean(f"{record.get('path', 'a request')}, {record.get('model') or 'no model'}{engine}{lane}")


def _from(record: Mapping[str, Any]) -> str:
    pid = f", pid {record['pid']}" if record.get("pid") else ""
    return f", over {record['via']}{pid}"


def _amount(record: Mapping[str, Any]) -> str:
    tokens, took = record["completion_tokens"], record["parts"]["answer"]
    if tokens is None:
        return f"{size(record['bytes_out'])} in {count(record['chunks'], 'piece')}"
    speed = f", {tokens / took:.0f} a second" if record["stream"] and took > 0.01 and tokens > 1 else ""
    asked = f"{record['prompt_tokens']} prompt and " if record["prompt_tokens"] is not None else ""
    return f"{asked}{count(tokens, 'token')}{speed}"


def _sum_up(summary: Mapping[str, Any]) -> None:
    ends = ", ".join(f"{n} {clean(end)}" for end, n in summary["ends"].items())
    click.echo(f"the last {count(summary['requests'], 'request')}: {ends}")
    for name in (*PARTS, "total"):
        if name in summary:
            half, most = summary[name]["p50"], summary[name]["p95"]
            click.echo(f"  {name:<7} half within {seconds(half):<9} 95 of 100 within {seconds(most)}")


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
