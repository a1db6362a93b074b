"""`bench doctor`: what would spoil a measurement here."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click
import psutil

from llm_daemon.cli.words import as_json, clean, count, json_option, size, subcommand
from llm_daemon.engines.base import usable_cores

from .. import machine
from ..meter import Lag, energy_uj

LOOK_S = 1.0
BUSY = 0.15  # share of one core that something else may use
LAG_MS = 2.0
ROOM = 1 << 30  # bytes free in the folder of results


@dataclass(frozen=True, slots=True)
class Finding:
    """`state`: `good`, `warn` (numbers will be noisier) or `bad` (they would be wrong)."""

    what: str
    state: Literal["good", "warn", "bad"]
    said: str
    hint: str = ""


@subcommand(
    "doctor",
    """
    llm-daemon bench doctor
    llm-daemon bench doctor --json | jq '.findings[] | select(.state != "good")'
    """,
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("results"), help="Folder of sessions.")
@json_option
@click.pass_context
def command(ctx: click.Context, out: Path, json_: bool) -> None:
    """Look for what would spoil a measurement here.

    Exit status 3 if something is bad; warnings leave it 0.
    """
    found = look(out)
    if json_:
        as_json({"findings": [{"what": f.what, "state": f.state, "said": f.said, "hint": f.hint} for f in found]})
    else:
        for f in found:
            mark = {"good": "ok  ", "warn": "warn", "bad": "BAD "}[f.state]
            click.echo(clean(f"{mark} {f.what}: {f.said}"))
            if f.hint and f.state != "good":
                click.echo(clean(f"     hint: {f.hint}"))
    ctx.exit(3 if any(f.state == "bad" for f in found) else 0)


def look(out: Path) -> list[Finding]:
    """Everything, in about LOOK_S seconds."""
    lag, busy = self_test()
    return [cores(), governor(machine.governor()), load(busy), swap(), power(machine.power()), room(out), client(lag), energy()]


def self_test() -> tuple[float, float]:
    """(our own wake-up lag, p99 ms; cores that other processes use) over LOOK_S seconds."""
    psutil.cpu_percent()
    own, began = time.process_time(), time.perf_counter()
    with Lag() as lag:
        time.sleep(LOOK_S)  # what is looked at is this very sleep
    took = time.perf_counter() - began
    used = psutil.cpu_percent() / 100 * (os.cpu_count() or 1) - (time.process_time() - own) / took
    return lag.p99_ms() or 0.0, max(0.0, used)


def cores() -> Finding:
    n = usable_cores()
    if n < 2:
        return Finding("cores", "bad", "one", "client and server take turns on it: times include each other's")
    return Finding("cores", "good", f"{n}; servers get {count(n - 1, 'thread')}, the client keeps one core")


def governor(name: str) -> Finding:
    if not name:
        return Finding("clock", "good", "the system does not tell its governor (a virtual machine, perhaps)")
    if name in ("performance", "schedutil"):
        return Finding("clock", "good", name)
    return Finding("clock", "warn", f"governor {name}", "cpupower frequency-set -g performance, or a longer warm-up")


def load(busy: float) -> Finding:
    said = f"other processes use {busy:.2f} cores"
    if busy <= BUSY:
        return Finding("load", "good", said)
    found = [p for p in psutil.process_iter(["name", "cpu_times", "cmdline"]) if p.info["cmdline"] != []]  # no kernel threads
    most = ", ".join(str(p.info["name"]) for p in sorted(found, key=_used, reverse=True)[:3])
    return Finding("load", "bad" if busy > 0.5 else "warn", said, f"end what is not needed; most CPU time so far: {most}")


def _used(process: psutil.Process) -> float:
    times = process.info["cpu_times"]
    return times.user + times.system if times else 0.0


def swap() -> Finding:
    memory, swapped = psutil.virtual_memory(), psutil.swap_memory()
    said = f"{size(memory.available)} of memory free, {size(swapped.used)} swapped out"
    if memory.available < memory.total * 0.1:
        return Finding("memory", "bad", said, "models will be swapped or dropped from the page cache: close something")
    if swapped.used > memory.total * 0.05:
        return Finding("memory", "warn", said, "the first trials may wait for pages to come back")
    return Finding("memory", "good", said)


def power(source: str) -> Finding:
    if source == "battery":
        return Finding("power", "bad", "on battery", "plug it in: the clock is held down")
    return Finding("power", "good", source or "no battery")


def room(out: Path) -> Finding:
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < ROOM:
        return Finding(
            "disk", "warn", f"{size(free)} free in {folder}", "raw replies take some MB an hour; make room, or use --out"
        )
    return Finding("disk", "good", f"{size(free)} free")


def client(lag_ms: float) -> Finding:
    said = f"wakes up at most {lag_ms:.2f} ms late (p99)"
    if lag_ms > LAG_MS:
        return Finding("client", "warn", said, "times are no finer than this: leave the machine alone meanwhile")
    return Finding("client", "good", said)


def energy() -> Finding:
    if energy_uj():
        return Finding("energy", "good", "readable")
    return Finding("energy", "good", "not readable here (powercap needs Linux on bare metal, and often root): left out")
