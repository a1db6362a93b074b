"""What the daemon adds to real engines with the starter model: cold start, and requests through the gateway."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks import peers, scripted
from benchmarks.lab import Effort, Http, engine_socket, fake_model, gateway_address, interleaved, request, setting, status, world
from benchmarks.report import Row, Section, median

from llm_daemon import Progress, attach, paths
from llm_daemon.config import Settings
from llm_daemon.daemon.process import scrubbed_env
from llm_daemon.daemon.supervisor import SOCKET
from llm_daemon.engines.base import Grant, Location, Missing, Plan, usable_cores
from llm_daemon.engines.registry import Registry
from llm_daemon.models.catalog import Catalog
from llm_daemon.models.fetch import fetch_sync
from llm_daemon.models.gguf import read_header
from llm_daemon.spec import Wish
from llm_daemon.testing import fake_engine
from llm_daemon.testing.world import World

STEP = 0.002  # seconds between two looks at a starting engine
PATIENCE = 60.0


def config(llama_server: str | None) -> str:
    return f'[engines.llama-server]\npath = "{llama_server}"\n' if llama_server else ""


def engines(llama_server: str | None) -> dict[str, Location | Missing]:
    registry = Registry({"llama-server": {"path": llama_server}} if llama_server else {})
    return {name: registry.locate(name) for name in ("xllamacpp", "llama-server")}


def is_scripted(model: str) -> bool:
    """Whether the "real" model is a scenario, as our tests have it."""
    return model.endswith(fake_engine.SUFFIX)


def is_none_here(llama_server: str | None, out: Section) -> bool:
    """Whether there is no engine at all; then the section says so."""
    missing = all(isinstance(where, Missing) for where in engines(llama_server).values())
    if missing:
        out.notes.append("real engine: not measured, none is installed")
    return missing


def attach_named(effort: Effort, out: Section, llama_server: str | None, model: str) -> None:
    """As people do it: a name of the catalog, which the daemon looks up each time."""
    if not is_none_here(llama_server, out):
        scripted.attach_warm(effort, out, model, config(llama_server))


# -- cold start


def cold_start(effort: Effort, out: Section, llama_server: str | None, model: str) -> None:
    """From no daemon at all to an engine that answers, against the engine's own start with the same command line."""
    for name, where in engines(llama_server).items():
        if isinstance(where, Missing):
            out.notes.append(f"{name}: not measured, {where.reason}")
            continue
        plan = plan_for(name, where, model)
        # Only the engine's own start gets a world that names it: the other one has no llama-server to look at.
        # Without kept conversations, whose folder is on the command line.
        with world(config(llama_server) if name == "llama-server" else "") as here, setting("PROMPT_CACHE_LIMIT", "0"):
            spawned: list[float] = []
            run_ours = functools.partial(ours, here, name, model, plan, spawned)
            run_alone = functools.partial(alone, here.base / "engine", plan)
            interleaved({"ours": run_ours, "alone": run_alone}, 1)  # warm: the files are in memory
            spawned.clear()
            found = interleaved({"ours": run_ours, "alone": run_alone}, effort.starts)
        out.rows += [
            Row.of(
                f"{name}: nothing to READY", "ms", found["ours"], found["alone"],
                against="engine alone", target=80.0, judged="difference",
            ),
            Row.of(f"{name}: of this, before the engine runs", "ms", spawned),
        ]  # fmt: skip
        out.extra[name] = {**found, "until_engine_runs": spawned, "version": where.version, "argv": list(plan.argv)}


def model_path(model: str, engine: str) -> str:
    """Where the model's file is, fetched if need be."""
    return str(fetch_sync(Catalog.load({}).resolve(Wish.of(model, engine=engine)).artifact, Path(paths.cache_dir())))


def threads() -> int:
    """How many a daemon with default settings gives an engine."""
    return max(1, usable_cores() - 1)


def plan_for(engine: str, where: Location, model: str) -> Plan:
    """The plan that a daemon with default settings makes for this model."""
    settings = Settings()
    spec = Catalog.load({}).resolve(Wish.of(model, engine=engine))
    path = model_path(model, engine)
    context = min(settings.context, read_header(Path(path)).context_length or settings.context)
    grant = Grant(path, alias=spec.model, socket=SOCKET, context=context, parallel=settings.parallel, threads=threads())
    return Registry({}).get(engine).plan(spec, where, grant)


def ours(here: World, engine: str, model: str, plan: Plan, spawned: list[float]) -> float:
    """Milliseconds of an attach when nothing runs; then everything is stopped again."""
    marks: list[float] = []

    def listen(progress: Progress) -> None:
        if progress.message == "starting":  # the keeper has just said that the engine runs
            marks.append(time.perf_counter())

    began = time.perf_counter()
    lease = attach(model, engine=engine, on_progress=listen)
    took = (time.perf_counter() - began) * 1e3
    try:
        (instance,) = status()["instances"]
        if instance["argv"] != list(plan.argv):
            raise RuntimeError(f"not the same start: the daemon runs {instance['argv']}, we {list(plan.argv)}")
    finally:
        lease.close()
        here.close()
    spawned.append((marks[0] - began) * 1e3)
    return took


def alone(folder: Path, plan: Plan) -> float:
    """Milliseconds from spawn to the first 200 of an engine without us; then it is killed."""
    folder.mkdir()
    assert isinstance(plan.address, str)
    address = str(folder / plan.address)
    with open(folder / "log", "wb") as log:
        began = time.perf_counter()
        engine = subprocess.Popen(
            plan.argv, cwd=folder, env={**scrubbed_env(os.environ, "bench"), **plan.env},
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        while not answers(address, plan.probes[0].path):
            if engine.poll() is not None or time.perf_counter() - began > PATIENCE:
                words = (folder / "log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{plan.argv[0]} did not start ({engine.returncode}):\n{words}")
            time.sleep(STEP)
        return (time.perf_counter() - began) * 1e3
    finally:
        end_group(engine)
        shutil.rmtree(folder)


def end_group(leader: subprocess.Popen[bytes]) -> None:
    """Kills the leader of a session and whatever it started."""
    os.killpg(leader.pid, signal.SIGKILL)  # its own session, and not yet reaped: nobody else has this number
    leader.wait()


def answers(address: str, path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(1)
        try:
            sock.connect(address)
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            return sock.recv(4096).startswith(b"HTTP/1.1 200")
        except OSError:
            return False


# -- requests


ROUTE = "/v1/completions"
BODY = {"prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}


def requests(effort: Effort, out: Section, llama_server: str | None, model: str) -> None:
    """One request through the whole daemon: to a scripted engine that answers at once, and to a real one."""
    with world() as here:
        found = asked(here, fake_model(here, tokens=[], silent=True), effort.requests)
    added = {way: median(times) - median(found["direct"]) for way, times in found.items()}
    out.rows.append(
        Row(
            "scripted engine: added by us, p50", "us", added["ours"], effort.requests, baseline=added.get("nginx"),
            against="nginx", target=1.25, judged="ratio",
        )
    )  # fmt: skip
    add_rows(out, "scripted engine", found)
    if is_none_here(llama_server, out):
        return
    with world(config(llama_server)) as here:
        add_rows(out, "real engine, one token", asked(here, model, effort.requests))


def add_rows(out: Section, title: str, found: dict[str, list[float]]) -> None:
    for way, label in (("ours", "through us"), ("nginx", "through nginx")):
        if way in found:
            out.rows.append(Row.of(f"{title}, {label}", "us", found[way], found["direct"], against="direct"))
    out.rows.append(Row.of(f"{title}, our answer's queue time", "us", found.pop("queue")))
    out.extra[title] = found


def asked(here: World, model: str, count: int) -> dict[str, list[float]]:
    """Microseconds of `count` answers on each way, and `queue`: from our reading a request to its way to the engine."""
    queue: list[float] = []

    def ask(way: Http) -> float:
        code, took, head = way.post(message)
        if code != 200:
            raise RuntimeError(f"{way.address} answers {code}: {head!r}")
        if timing := re.search(rb"server-timing: queue;dur=([0-9.]+)", head.lower()):
            queue.append(float(timing[1]) * 1e3)
        return took

    with attach(model) as llm:
        message = request(ROUTE, {**BODY, "model": llm.model}, llm.api_key)
        with clients(engine_socket(here), gateway_address(llm.base_url), here.base) as ways:
            asks = {name: functools.partial(ask, way) for name, way in ways.items()}
            interleaved(asks, min(count, 20))  # warm
            queue.clear()
            return {**interleaved(asks, count), "queue": queue}


@contextmanager
def clients(socket_path: str, ours: tuple[str, int], folder: Path) -> Iterator[dict[str, Http]]:
    with ExitStack() as stack:
        other = stack.enter_context(peers.nginx(folder, socket_path))
        ways = {"direct": Http(socket_path), "ours": Http(ours)}
        if other is not None:
            ways["nginx"] = Http(("127.0.0.1", other.port))
        for way in ways.values():
            stack.callback(way.close)
        yield ways
