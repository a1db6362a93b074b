"""What a crowd costs: tickets that wait and connections that are idle, in memory and in the time of everybody else.

One model is busy for ever (scripted engine, two slots), and a queue of tickets waits for it; a crowd of other connections was
served once by a second model and is idle.  Meanwhile requests go to the second model.  Then all hang up.  Several rounds: what
one more of them leaves behind in the daemon's memory shows whether it grows without end.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass, field

import psutil
from benchmarks.gateway import quantiles
from benchmarks.lab import Effort, Load, fake_model, gateway_address, load, request, status, world
from benchmarks.report import Row, Section, median, percentile

from llm_daemon import Lease, attach

SLOTS = 2
ROUNDS = 12
SETTLED = 8  # rounds until pools and arenas have their size: with 24 rounds the last step up was at the sixth
PATIENCE = 30.0
STEP = 0.005  # seconds between two looks at the queue
SPARE = 1500  # file descriptors for everything that is not the crowd
MOST_LEFT = 1.0  # MB a further round may leave: the allocator's odd pages, and not a hundred bytes for each of 11,000 connections
CONFIG = "queue_limit = 5000\n"
ENDING = '"total_tokens": 1}}'  # of the scripted engine's embeddings


@dataclass(slots=True)
class Round:
    """Megabytes of RSS and milliseconds."""

    before: float = 0.0
    crowded: float = 0.0
    queued: float = 0.0
    after: float = 0.0
    gone_ms: float = 0.0
    cut: int = 0
    alone_us: list[float] = field(default_factory=list)
    beside_us: list[float] = field(default_factory=list)


def growth(effort: Effort, out: Section) -> None:
    """Fills the section; see the module."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    crowd = min(effort.crowd, max(0, hard - effort.queue - SPARE))
    if crowd < effort.crowd:
        out.notes.append(f"only {crowd} idle connections: RLIMIT_NOFILE is {hard}")
    with world() as here, load() as generator:
        here.config.write_text(CONFIG + here.config.read_text())
        busy_model = fake_model(here, tokens=20_000, token_ms=50, silent=True)
        with attach(busy_model, parallel=SLOTS) as busy, attach(fake_model(here, silent=True), parallel=2) as other:
            daemon = psutil.Process(other.daemon_pid)
            rounds = [one_round(effort, generator, daemon, busy, other, crowd) for _ in range(ROUNDS)]
    rows(effort, crowd, rounds, out)


def one_round(effort: Effort, generator: Load, daemon: psutil.Process, busy: Lease, other: Lease, crowd: int) -> Round:
    found, address = Round(), gateway_address(other.base_url)
    quick = request("/v1/embeddings", {"model": other.model, "input": "x"}, other.api_key).decode()
    slow = request("/v1/chat/completions", {"model": busy.model, "stream": True, "messages": []}, busy.api_key).decode()

    def latency() -> list[float]:
        times: list[float] = generator.ask("latency", address=address, message=quick, ending=ENDING, count=effort.shots // 2)[
            "us"
        ]
        return times

    def memory() -> float:
        return float(daemon.memory_info().rss) / 1e6

    latency()  # warm
    found.before, found.alone_us = memory(), latency()
    generator.ask("hold", address=address, message=quick, ending=ENDING, number=crowd)
    found.crowded = memory()
    generator.ask("hold", address=address, message=slow, ending="", number=effort.queue + SLOTS)
    wait_for(busy, effort.queue)
    found.queued, found.beside_us = memory(), latency()
    began = time.perf_counter()
    found.cut = generator.ask("release", reset=True)["spoken"]
    wait_for(busy, 0)
    found.gone_ms = (time.perf_counter() - began) * 1e3
    found.after = memory()
    return found


def wait_for(lease: Lease, waiting: int) -> None:
    """Until exactly that many tickets wait for the lease's model (0: and none runs)."""
    deadline = time.monotonic() + PATIENCE
    while True:
        (it,) = (it for it in status()["instances"] if it["id"] == lease.instance)
        if it["waiting"] == waiting and (waiting or not it["running"]):
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"{it['waiting']} tickets wait and {it['running']} run, not {waiting}, after {PATIENCE:.0f} s")
        time.sleep(STEP)


def rows(effort: Effort, crowd: int, rounds: list[Round], out: Section) -> None:
    first, last = rounds[0], rounds[-1]
    alone = [us for it in rounds for us in it.alone_us]
    beside = [us for it in rounds for us in it.beside_us]
    them = f"{effort.queue} waiting and {crowd} idle"
    extra_round = (last.after - rounds[SETTLED - 1].after) / (ROUNDS - SETTLED)
    before = first.before
    worst_cut = float(max(0, *(it.cut - SLOTS for it in rounds)))  # streams that run have said something
    out.rows += [
        Row(f"RSS with {crowd} idle", "MB", first.crowded, 1, baseline=before, against="before"),
        Row(f"RSS with {them}", "MB", first.queued, 1, baseline=before, against="before"),
        Row("RSS after all hung up", "MB", first.after, 1, baseline=before, against="before"),
        Row(f"RSS after {ROUNDS} times all this", "MB", last.after, 1, baseline=first.after, against="after the first"),
        Row(f"RSS left by one round, of the last {ROUNDS - SETTLED}", "MB", extra_round, ROUNDS - SETTLED, target=MOST_LEFT),
        Row("memory of an idle connection", "kB", (first.crowded - first.before) * 1e3 / crowd, crowd),
        Row("memory of a waiting ticket", "kB", (first.queued - first.crowded) * 1e3 / effort.queue, effort.queue),
        Row.of(f"one request, p50, with {them}", "us", beside, alone, against="without", target=1.25, judged="ratio"),
        Row(f"one request, p99, with {them}", "us", percentile(beside, 99), len(beside), None, percentile(alone, 99), "without"),
        Row("all hang up until none waits or runs", "ms", median([it.gone_ms for it in rounds]), ROUNDS),
        Row("connections that were closed or answered", "", worst_cut, ROUNDS, target=0.0),
    ]  # fmt: skip
    out.extra["rounds"] = [
        {
            "before_mb": it.before, "crowded_mb": it.crowded, "queued_mb": it.queued, "after_mb": it.after,
            "gone_ms": it.gone_ms, "cut": it.cut, "alone_us": quantiles(it.alone_us), "beside_us": quantiles(it.beside_us),
        }
        for it in rounds
    ]  # fmt: skip
