"""From a client's hang-up until the slot serves somebody else.

The engine has two slots, both busy: one with the *victim*, the other with the *company*, a request that outlasts the trial.
A third request, the *probe*, asks for one token and has to wait.  Then the victim's client closes its connection.  The result
is the time from that close until the probe's first token, less what the probe takes when a slot is free and the company runs
(median, measured just before on the same way); less than nothing is noise, and counts as nothing.  So it is how long the slot
was lost, whoever kept it: engine, gateway or client library.  A trial does not count if the probe spoke before the hang-up,
or if the company ended by itself.

Four cells: the victim streams or not, and the company streams ("beside a stream") or not ("quiet": the engine has nothing to
tell anybody meanwhile).  llama.cpp looks after a non-streaming client only when a wait of one second for results runs out,
and any other request's result restarts it; so such victims are left at a random moment of that second.  A victim whose
hang-up nobody notices ends by itself: its natural length bounds such a cell and is said with it.

Ways: straight to the engine's unix socket, through us, and through llama-server's own router mode.  Each cell of each way has
a fresh engine, so that nothing which another one left unfinished is in it.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import select
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from benchmarks import real
from benchmarks.flood import is_complete
from benchmarks.lab import Effort, engine_socket, gateway_address, request, world
from benchmarks.report import Grid, Row, Section, median, percentile

from llm_daemon import attach
from llm_daemon.daemon.process import scrubbed_env
from llm_daemon.engines.base import Location, Missing
from llm_daemon.errors import LlmDaemonError

ROUTE = "/v1/chat/completions"
SLOTS, CONTEXT = 2, 4096
COMPANY_TOKENS = 3500  # fits the context; about a minute
SAMPLE_TOKENS = 32  # from which the victim's length is found
LEAD = 0.1  # seconds until a request that says nothing certainly runs, and until the probe certainly waits
PATIENCE = 60.0
TARGET = 30.0  # ms
ROUTED = "bench-model"  # what router mode calls it
CELLS = list(itertools.product((True, False), (False, True)))  # does the victim stream, does the company


class Asked:
    """One request on a connection of its own, sent when it is made."""

    def __init__(self, address: str | tuple[str, int], message: bytes) -> None:
        self.sent = time.perf_counter()
        self.sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        self.sock.settimeout(PATIENCE)
        self.data = b""
        try:
            self.sock.connect(address)
            self.sock.sendall(message)
        except BaseException:
            self.sock.close()
            raise

    @property
    def is_silent(self) -> bool:
        return not self.data and not select.select([self.sock], [], [], 0)[0]

    def wait(self, done: Callable[[bytes], bool]) -> float:
        """Reads until `done`; returns that moment.  Raises RuntimeError for an answer that is none."""
        while not done(self.data):
            if not (more := self.sock.recv(65536)):
                raise RuntimeError(f"the connection was closed: {self.data[-300:]!r}")
            self.data += more
            if not b"HTTP/1.1 200".startswith(self.data[:12]):
                raise RuntimeError(f"unexpected answer: {self.data[:300]!r}")
        return time.perf_counter()

    def first_token(self) -> float:
        return self.wait(lambda data: b"data: {" in data)

    def whole(self) -> float:
        return self.wait(is_complete)

    def hang_up(self) -> float:
        now = time.perf_counter()
        self.sock.close()
        return now


class Company:
    """Keeps a slot busy; a thread reads what it says, else the engine would wait for us.  `over` once it ended by itself."""

    def __init__(self, asked: Asked, streams: bool) -> None:
        self._asked, self._streams, self.over = asked, streams, threading.Event()
        if streams:
            asked.first_token()
        else:
            time.sleep(LEAD)  # it says nothing until its end
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with suppress(OSError):
            while data := self._asked.sock.recv(65536):
                if not self._streams or data.endswith(b"0\r\n\r\n"):
                    break
        self.over.set()

    def leave(self) -> None:
        with suppress(OSError):
            self._asked.sock.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join()
        self._asked.sock.close()


@dataclass(slots=True)
class Target:
    """One way to a running engine."""

    address: str | tuple[str, int]
    model: str
    token: str = ""

    def ask(self, stream: bool, tokens: int) -> Asked:
        body: dict[str, object] = {"model": self.model, "max_tokens": tokens, "ignore_eos": True}
        body["messages"] = [{"role": "user", "content": "Write a very long story about a river."}]
        if stream:
            body["stream"] = True
        return Asked(self.address, request(ROUTE, body, self.token))

    def probe(self) -> Asked:
        return self.ask(stream=True, tokens=1)


@dataclass(slots=True)
class Cell:
    """Milliseconds.  `normal`: the probe's first token with a slot free; `natural`: how long a victim lives undisturbed."""

    lost: list[float] = field(default_factory=list)
    normal: float = 0.0
    natural: float = 0.0
    spoiled: int = 0


def measure(target: Target, victim_streams: bool, company_streams: bool, effort: Effort) -> Cell:
    """The trials of one cell on one way.  Raises RuntimeError if they cannot be had."""
    rng, cell = random.Random(3), Cell()
    company = Company(target.ask(company_streams, COMPANY_TOKENS), company_streams)
    try:
        cell.normal = normal_ms(target, max(3, effort.hangups // 2))
        tokens = victim_length(target, effort.natural)
        cell.natural = effort.natural * 1e3
        while len(cell.lost) < effort.hangups:
            if company.over.is_set():
                company.leave()
                company = Company(target.ask(company_streams, COMPANY_TOKENS), company_streams)
            pause = LEAD + rng.random() * (LEAD if victim_streams else min(1.0, effort.natural / 2.3))
            took = trial(target, victim_streams, tokens, pause)
            if took is None or company.over.is_set():
                cell.spoiled += 1
                if cell.spoiled > 3 + effort.hangups:
                    raise RuntimeError("the probe never waits: the engine has more slots than two, or the company none")
            else:
                cell.lost.append(max(0.0, took - cell.normal))
    finally:
        company.leave()
    return cell


def normal_ms(target: Target, count: int) -> float:
    took = []
    for _ in range(count + 1):
        probe = target.probe()
        took.append((probe.first_token() - probe.sent) * 1e3)
        probe.whole()
        probe.hang_up()
    return median(took[1:])


def victim_length(target: Target, seconds: float) -> int:
    """How many tokens take so long."""
    sample = target.ask(stream=True, tokens=SAMPLE_TOKENS)
    first = sample.first_token()
    each = (sample.whole() - first) / (SAMPLE_TOKENS - 1)
    sample.hang_up()
    return max(SAMPLE_TOKENS, min(COMPANY_TOKENS, int(seconds / each)))


def trial(target: Target, victim_streams: bool, tokens: int, pause: float) -> float | None:
    """Milliseconds from the hang-up to the probe's first token; None if the probe did not have to wait."""
    victim = target.ask(victim_streams, tokens)
    try:
        if victim_streams:
            victim.first_token()
        else:
            time.sleep(LEAD)
        probe = target.probe()
        try:
            time.sleep(pause)
            waited = probe.is_silent
            gone = victim.hang_up()
            spoke = probe.first_token()
            probe.whole()
        finally:
            probe.hang_up()
        return (spoke - gone) * 1e3 if waited else None
    finally:
        victim.hang_up()


# -- the ways


@contextmanager
def shared(engine: str | None, model: str, ours: bool, llama_server: str | None) -> Iterator[Target]:
    """A daemon with a fresh engine: through us, or past us to the engine's own socket."""
    with world(real.config(llama_server)) as here, attach(model, engine=engine, parallel=SLOTS, context=CONTEXT) as llm:
        if ours:
            yield Target(gateway_address(llm.base_url), llm.model, llm.api_key)
        else:
            yield Target(engine_socket(here), llm.model)


@contextmanager
def router(program: str, model: str) -> Iterator[Target]:
    """llama-server without a model of its own, which starts a server for each model asked for."""
    path = real.model_path(model, "llama-server")
    with world() as here, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
        free.close()
        models = here.base / "models"
        models.mkdir()
        (models / f"{ROUTED}.gguf").symlink_to(path)
        argv = [
            program, "--models-dir", str(models), "--host", "127.0.0.1", "--port", str(port), "-np", str(SLOTS),
            "-c", str(SLOTS * CONTEXT), "-t", str(real.threads()), "-tb", str(real.threads()),
        ]  # fmt: skip
        with open(here.base / "router.log", "wb") as log:
            server = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=here.base,
                env={**scrubbed_env(os.environ, "bench"), "XDG_CONFIG_HOME": str(here.base), "XDG_CACHE_HOME": str(here.base)},
            )  # fmt: skip
        try:
            name = routed_name(port, server, here.base / "router.log")
            target = Target(("127.0.0.1", port), name)
            first = target.probe()  # loads the model
            first.whole()
            first.hang_up()
            yield target
        finally:
            # Its servers first, so that it buries them: who dies with them leaves zombies where nobody else does.
            servers = psutil.Process(server.pid).children()
            for process in servers:
                process.kill()
            psutil.wait_procs(servers, 5)
            real.end_group(server)


def routed_name(port: int, server: subprocess.Popen[bytes], log: Path) -> str:
    """Waits until the router answers; returns what it calls the model."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with suppress(OSError, StopIteration):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5) as answer:
                names = [str(it["id"]) for it in json.load(answer)["data"]]
                return next(name for name in names if name.removesuffix(".gguf") == ROUTED)
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"router mode did not start ({server.returncode}): {log.read_text(errors='replace')[-1000:]}")
        time.sleep(real.STEP)


def hangup(effort: Effort, out: Section, llama_server: str | None, model: str) -> None:
    """Fills the section; see the module."""
    if real.is_scripted(model):
        ways: dict[str, Start] = {
            "engine alone": lambda: shared(None, model, False, None), "ours": lambda: shared(None, model, True, None),
        }  # fmt: skip
        fill("scripted engine", ways, effort, out)
        return
    for name, where in real.engines(llama_server).items():
        if isinstance(where, Missing):
            out.notes.append(
                f"{name}: not measured, {where.reason}" + " (make llama-server builds one)" * (name == "llama-server")
            )
            continue
        fill(name, ways_of(name, where, model, llama_server), effort, out)


Start = Callable[[], AbstractContextManager[Target]]


def ways_of(engine: str, where: Location, model: str, llama_server: str | None) -> dict[str, Start]:
    config = llama_server if engine == "llama-server" else None
    ways: dict[str, Start] = {
        "engine alone": lambda: shared(engine, model, False, config),
        "ours": lambda: shared(engine, model, True, config),
    }
    if engine == "llama-server":
        ways["router mode"] = lambda: router(where.argv[0], model)
    return ways


def fill(engine: str, ways: dict[str, Start], effort: Effort, out: Section) -> None:
    """Rows, a grid and the samples of one engine."""
    grid = Grid(f"{engine}: hang-up to slot free", [*ways])
    out.grids.append(grid)  # now: what is measured when the time is over is shown
    samples = out.extra[engine] = {}
    for victim_streams, company_streams in CELLS if effort.all_cells else CELLS[:: len(CELLS) - 1]:
        title = f"{'streaming' if victim_streams else 'non-streaming'}, {'beside a stream' if company_streams else 'quiet'}"
        cells: dict[str, Cell] = {}
        for way, start in ways.items():
            try:
                with start() as target:
                    cells[way] = measure(target, victim_streams, company_streams, effort)
            except (LlmDaemonError, RuntimeError, OSError) as e:
                out.failed = True
                out.notes.append(f"{engine}, {title}, {way}: not measured, {e}")
        for name, pick in (("p50", 50), ("p90", 90), ("max", 100)):
            values = {way: max(it.lost) if pick == 100 else percentile(it.lost, pick) for way, it in cells.items()}
            grid.lines.append((f"{title}, {name}", "ms", values))
        if {"ours", "engine alone"} <= cells.keys():
            ours, alone = cells["ours"].lost, cells["engine alone"].lost
            out.rows.append(Row.of(f"{engine}: {title}, p50", "ms", ours, alone, against="engine alone", target=TARGET))
        samples[title] = {
            way: {"lost_ms": it.lost, "normal_ms": it.normal, "natural_ms": it.natural, "spoiled": it.spoiled}
            for way, it in cells.items()
        }
    out.notes.append(f"{engine}: a victim that nobody stops ends by itself {effort.natural:g} s after its begin.")
