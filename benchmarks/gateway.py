"""What our HTTP relay costs: the whole daemon beside no relay at all, nginx, and two other relays in Python, in one run.

Five ways to one stub engine (stub.py, which the daemon runs as its engine) on a unix socket: straight, through nginx
(unbuffered, kept alive), through the least that a relay in Python can be (floor.py), through a plain aiohttp relay (peers.py)
and through our gateway with token, Host check, ticket and queue.  The load generator (load.py) is a process of its own.  The
rounds of the ways alternate, so that whatever else the machine does meets all of them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
from benchmarks import peers
from benchmarks.lab import HERE, Effort, Load, cpu_ms, engine_socket, fake_model, gateway_address, load, request, world
from benchmarks.report import Grid, Row, Section, iqr, median, percentile
from benchmarks.stub import ANSWER, INTERVAL

from llm_daemon import attach

STUB = f'[engines.fake]\nadapter = "llm_daemon.testing.fake_engine:FakeEngine"\npath = "{HERE / "stub.py"}"\n'
ENDING = ANSWER.decode()
SLOTS = 256  # more than any measurement needs: nobody waits for a turn here
CONNECTIONS = (8, 32)
STREAMS = (1, 8, 64, 128)
SPREAD = 0.2  # seconds in which they begin: first tokens then meet streams that run, not a rush of connections
ORDER = ("direct", "nginx", "floor", "aiohttp", "ours")
KEYS = {"first": "first token", "gap": "gap between chunks", "way": "a chunk's way"}


@dataclass(slots=True)
class Way:
    """One way to the engine, and the process that is measured on it: the relay's, or the engine's own on the direct way."""

    address: str | tuple[str, int]
    pid: int
    token: str = ""


@dataclass(slots=True)
class Bench:
    """A running set of ways with a load generator; `shares` is how busy that was, in percent of a core, by measurement."""

    ways: dict[str, Way]
    model: str
    load: Load
    shares: dict[str, list[float]] = field(default_factory=dict)

    def ask(self, way: str, do: str, message: str, **order: Any) -> dict[str, Any]:
        found = self.load.ask(do, address=self.ways[way].address, message=message, **order)
        self.shares.setdefault(f"{do}, {way}", []).append(found["cpu_share"])
        return found

    def message(self, way: str, **body: object) -> str:
        route = "/v1/chat/completions" if "stream" in body else "/v1/embeddings"
        return request(route, {"model": self.model, **body}, self.ways[way].token).decode()

    def short(self, way: str) -> str:
        return self.message(way, input="word " * 20)


@contextmanager
def bench() -> Iterator[Bench]:
    """Daemon, stub, peers and load generator, all up."""
    with world() as here, ExitStack() as stack:
        here.config.write_text(here.config.read_text().partition("[engines.fake]")[0] + STUB)
        llm = stack.enter_context(attach(fake_model(here), parallel=SLOTS))
        path = engine_socket(here)
        ways: dict[str, Way | None] = {"direct": Way(path, llm.pid)}
        for name, start in (
            ("nginx", functools.partial(peers.nginx, here.base, path)),
            ("floor", functools.partial(peers.python_relay, peers.FLOOR, path)),
            ("aiohttp", functools.partial(peers.python_relay, peers.__file__, path)),
        ):
            peer = stack.enter_context(start())
            ways[name] = Way(("127.0.0.1", peer.port), peer.pid) if peer else None
        ways["ours"] = Way(gateway_address(llm.base_url), llm.daemon_pid, llm.api_key)
        yield Bench({name: way for name in ORDER if (way := ways[name])}, llm.model, stack.enter_context(load()))


def relay(effort: Effort, out: Section) -> None:
    """Fills the section; see the module."""
    with bench() as it:
        for name in ORDER:
            if name not in it.ways:
                out.notes.append(
                    f"{name} is not installed: no rows against it" + " (Debian: apt-get install nginx-light)" * (name == "nginx")
                )
        out.grids.append(Grid("All ways", list(it.ways)))
        for part in (_memory, _latency, _throughput, _streams):
            part(effort, it, out)
        shares = {name: round(max(values), 1) for name, values in it.shares.items()}
    out.extra["generator_cpu_percent"] = shares
    busiest = max(shares, key=lambda name: shares[name])
    out.notes.append(f"The load generator used {shares[busiest]:.0f} % of a core at most ({busiest}); JSON has all.")


def add(out: Section, what: str, unit: str, found: Mapping[str, float], samples: int, base: str = "direct", **more: Any) -> None:
    """All ways into the grid; ours against `base` as a row, if that was measured."""
    out.grids[0].lines.append((what, unit, found))
    if base in found:
        out.rows.append(Row(what, unit, found["ours"], samples, baseline=found[base], against=base, **more))


def _latency(effort: Effort, it: Bench, out: Section) -> None:
    times: dict[str, list[float]] = {way: [] for way in it.ways}
    medians: dict[str, list[float]] = {way: [] for way in it.ways}
    before = {way: cpu_ms(it.ways[way].pid) for way in it.ways}
    for turn in range(effort.rounds + 1):
        for way in it.ways:
            taken = it.ask(way, "latency", it.short(way), ending=ENDING, count=effort.shots)["us"]
            if turn:  # the first round warms up
                times[way] += taken
                medians[way].append(median(taken))
    time.sleep(effort.pause)  # for our records of the last requests
    asked = (effort.rounds + 1) * effort.shots
    cpu = {way: (cpu_ms(it.ways[way].pid) - ms) * 1e3 / asked for way, ms in before.items()}
    count, spread = effort.rounds * effort.shots, iqr(medians["ours"])
    p50 = {way: median(taken) for way, taken in times.items()}
    added = {way: value - p50["direct"] for way, value in p50.items() if way != "direct"}
    add(out, "added to a request, p50", "us", added, count, "nginx", target=1.25, judged="ratio")
    least = added["floor"]  # docs/adr/0021
    out.rows.append(
        Row("added to a request, p50", "us", added["ours"], count, baseline=least, against="floor", target=3.0, judged="ratio")
    )
    add(out, "CPU for a request", "us", {way: us for way, us in cpu.items() if way != "direct"}, asked, "nginx")
    add(out, "one request, p50", "us", p50, count, spread=spread)
    add(out, "one request, p99", "us", {way: percentile(taken, 99) for way, taken in times.items()}, count)
    out.extra["latency_us"] = {way: quantiles(taken) | {"p50_of_rounds": medians[way]} for way, taken in times.items()}


def _throughput(effort: Effort, it: Bench, out: Section) -> None:
    for number in CONNECTIONS:
        rates: dict[str, list[float]] = {way: [] for way in it.ways}
        for _ in range(2):
            for way in it.ways:
                found = it.ask(way, "throughput", it.short(way), ending=ENDING, connections=number, seconds=effort.burst)
                rates[way].append(found["rate"])
        best = {way: max(rate) for way, rate in rates.items()}
        add(out, f"requests a second, {number} connections", "/s", best, 2, "nginx")
        out.extra[f"rate_{number}"] = rates


def _streams(effort: Effort, it: Bench, out: Section) -> None:
    """Gaps, ways and first tokens at several numbers of streams; CPU of the relay for each chunk."""
    patience = effort.chunks * INTERVAL * 4 + 10
    for number in STREAMS:
        found: dict[str, dict[str, list[float]]] = {way: {key: [] for key in KEYS} for way in it.ways}
        cpu: dict[str, list[float]] = {way: [] for way in it.ways}
        for _ in range(min(effort.rounds, 4 if number == 1 else 2)):
            for way in it.ways:
                before = cpu_ms(it.ways[way].pid)
                message = it.message(way, stream=True, max_tokens=effort.chunks)
                got = it.ask(way, "streams", message, number=number, spread=SPREAD, patience=patience)
                cpu[way].append((cpu_ms(it.ways[way].pid) - before) * 1e3 / (number * effort.chunks))
                for key in KEYS:
                    found[way][key] += got[key]
        _stream_rows(number, found, out)
        if number > 1:
            spent = {way: median(values) for way, values in cpu.items() if way != "direct"}
            add(out, f"{number} streams, CPU for a chunk", "us", spent, len(cpu["ours"]), "nginx")
        all_of_it = {way: {key: quantiles(values) for key, values in v.items()} for way, v in found.items()}
        out.extra[f"streams_{number}"] = {"ms": all_of_it, "cpu_us_a_chunk": cpu}


def _stream_rows(number: int, found: Mapping[str, Mapping[str, Sequence[float]]], out: Section) -> None:
    title = f"{number} stream{'s' * (number > 1)}"
    for key, percent in (("first", 50), ("gap", 50), ("gap", 99), ("way", 99)):
        values = {way: percentile(v[key], percent) for way, v in found.items()}
        goal: dict[str, Any] = {"target": 1.0, "judged": "difference"} if (key, percent) in (("first", 50), ("gap", 99)) else {}
        add(out, f"{title}, {KEYS[key]}, p{percent}", "ms", values, len(found["ours"][key]), **goal)


def _memory(effort: Effort, it: Bench, out: Section) -> None:
    """Growth of the relay's memory with idle connections that were served once.

    First of all: memory that many streams left behind in a process would hold the connections without any growth.
    """
    grown = {}
    for way in it.ways:
        process = psutil.Process(it.ways[way].pid)
        it.ask(way, "latency", it.short(way), ending=ENDING, count=100)
        before = process.memory_info().rss
        it.ask(way, "hold", it.short(way), ending=ENDING, number=effort.idlers)
        grown[way] = (process.memory_info().rss - before) / 1e3 / effort.idlers
        it.load.ask("release", reset=True)
    grown.pop("direct")
    add(out, f"memory of an idle connection, of {effort.idlers}", "kB", grown, effort.idlers, "nginx")
    out.notes.append("Memory is growth of RSS: what the kernel keeps for sockets is not in it.")


def quantiles(values: Sequence[float]) -> dict[str, float]:
    return {"p50": round(percentile(values, 50), 3), "p99": round(percentile(values, 99), 3)}
