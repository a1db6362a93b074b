"""Brings a target's server up and down: launched by its own command, by llm-daemon's adapter, attached, or through the daemon."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns
from typing import Any, Protocol

import psutil

from llm_daemon.client import sync
from llm_daemon.engines.base import Grant, Location, Plan, Tcp, usable_cores
from llm_daemon.errors import LlmDaemonError

from .artifacts import Weights
from .client import Endpoint, get
from .process import Died, Process, tail
from .records import Reached
from .suite import Suite, Target
from .templates import named

POLL_S = 0.004  # between two looks whether it is up: finer costs the loading server CPU, coarser costs precision
ANSWER_S = 5.0  # for one look
SCRATCH = "llmd-bench-"  # then our pid: working folders of servers, in the folder of temporary files


class NotReady(Exception):
    """A server that could not be brought up; one line.  `cp`: how far it came, `words`: the end of its log."""

    def __init__(self, message: str, cp: dict[str, Reached], words: str = "", argv: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.cp, self.words, self.argv = cp, words, argv


class Server(Protocol):
    """A server that is up.  `cp`: lifecycle so far; `spawn_ns`: where those count from; `name`: tells processes apart."""

    endpoint: Endpoint
    model: str
    argv: tuple[str, ...]
    name: str
    spawn_ns: int
    cp: dict[str, Reached]

    def pids(self) -> list[int]:
        """Roots of its process tree; empty if we do not know it."""
        ...

    def gone(self, within: float = 0.0) -> str | None:
        """How it died, None while it lives as far as we know; one that is just dying gets `within` seconds for it."""
        ...

    def last_words(self) -> str: ...

    def stop(self) -> None: ...


@dataclass(slots=True)
class Launched:
    """Runs as a process of ours."""

    process: Process
    endpoint: Endpoint
    model: str
    folder: str
    cp: dict[str, Reached]
    argv: tuple[str, ...] = ()
    name: str = ""
    spawn_ns: int = 0

    def pids(self) -> list[int]:
        return [self.process.pid]

    def gone(self, within: float = 0.0) -> str | None:
        return self.process.exit(within)

    def last_words(self) -> str:
        return self.process.last_words()

    def stop(self) -> None:
        self.process.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(slots=True)
class Attached:
    """Somebody else's; never started nor stopped."""

    endpoint: Endpoint
    model: str
    cp: dict[str, Reached]
    argv: tuple[str, ...] = ()
    name: str = "attached"
    spawn_ns: int = 0

    def pids(self) -> list[int]:
        return []

    def gone(self, within: float = 0.0) -> str | None:
        return None

    def last_words(self) -> str:
        return ""

    def stop(self) -> None:
        pass


@dataclass(slots=True)
class Daemon:
    """Held by a lease on a daemon of the session's own; stopping ends that daemon too."""

    lease: Any
    endpoint: Endpoint
    model: str
    cp: dict[str, Reached]
    argv: tuple[str, ...] = ()
    name: str = ""
    spawn_ns: int = 0
    roots: tuple[int, ...] = ()
    runtime: str = ""

    def pids(self) -> list[int]:
        return list(self.roots)

    def gone(self, within: float = 0.0) -> str | None:
        try:
            psutil.Process(self.roots[0]).wait(within)
        except psutil.TimeoutExpired:
            return None
        except psutil.NoSuchProcess:
            pass
        return "the engine behind the daemon ended"

    def last_words(self) -> str:
        return ""

    def stop(self) -> None:
        self.lease.close()
        os.environ["LLM_DAEMON_RUNTIME_DIR"] = self.runtime
        stop_daemon(self.roots[-1])


@dataclass(slots=True)
class Starter:
    """Starts targets of one session.  `logs`: folder of the servers' logs."""

    suite: Suite
    logs: Path
    tell: Callable[[str], None] = field(default=lambda text: None)
    count: int = 0

    def start(self, target: Target, weights: Weights) -> Server:
        """Brings it up and returns when it is ready.  Raises NotReady; then nothing of it is left."""
        self.count += 1
        server = target.server
        if server.via == "daemon":
            return self._daemon(target, weights)
        if server.attach is not None:
            return self._attach(target)
        return self._launch(target, weights)

    def _headers(self, target: Target) -> dict[str, str]:
        key = os.environ.get(target.server.key_env or "", "")
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _log(self, target: Target) -> Path:
        return self.logs / (target.id.replace("/", "_") + ".log")

    def _attach(self, target: Target) -> Server:
        endpoint = Endpoint.of(target.server.attach or "", self._headers(target))
        cp: dict[str, Reached] = {}
        began = perf_counter_ns()
        self._wait(target, endpoint, cp, began, lambda: None)
        return Attached(endpoint, target.server.model_name or served(endpoint) or target.model.id, cp, spawn_ns=began)

    def _launch(self, target: Target, weights: Weights) -> Server:
        folder = tempfile.mkdtemp(prefix=f"{SCRATCH}{os.getpid()}-")
        try:
            argv, env, endpoint, alias = command(target, weights, folder, self._headers(target))
            try:
                process = Process(argv, folder, env, self._log(target), target.server.stop_s)
            except (Died, OSError, ValueError) as e:
                raise NotReady(str(e), {}, tail(self._log(target)), tuple(argv)) from None
            cp = {"spawned": Reached(ms=round(process.running_ms, 3))}
            try:
                self._wait(target, endpoint, cp, process.spawn_ns, process.exit)
                _owned(process.pid, endpoint)
            except NotReady as e:
                process.stop(force=True)
                e.words, e.argv = process.last_words(), tuple(argv)
                raise
            except BaseException:
                process.stop(force=True)
                raise
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        model = target.server.model_name or (alias if target.server.engine else served(endpoint)) or alias
        return Launched(process, endpoint, model, folder, cp, tuple(argv), process.tag[:8], process.spawn_ns)

    def _wait(
        self, target: Target, endpoint: Endpoint, cp: dict[str, Reached], began: int, gone: Callable[[], str | None]
    ) -> None:
        """Returns when it answers 200 on its ready path (or, where there is no such path, on /v1/models)."""
        path, limit = target.server.ready, self.suite.table.ready_s
        said = "it does not listen"
        while True:
            if (end := gone()) is not None:
                raise NotReady(f"{target.server.id} ended while starting ({end})", cp)
            try:
                status, _ = get(endpoint, path, ANSWER_S)
            except (ConnectionError, FileNotFoundError):
                status = 0
            except (OSError, http.client.HTTPException) as e:
                status, said = -1, f"no answer on {path}: {e}"
            ms = round((perf_counter_ns() - began) / 1e6, 3)
            if status:
                cp.setdefault("port_open", Reached(ms=ms))
            if status == 200:
                cp["ready"] = Reached(ms=ms)
                return
            if status in (404, 405, 501) and path != "/v1/models":
                path = "/v1/models"
                continue
            if status > 0:
                said = f"{path} answers {status}"
            if ms > limit * 1000:
                cp["ready"] = Reached(ms=None, censored_ms=ms)
                raise NotReady(f"{target.server.id} was not ready after {limit:g} s: {said}", cp)
            time.sleep(POLL_S)  # nothing tells when a foreign server begins to listen

    def _daemon(self, target: Target, weights: Weights) -> Server:
        server = target.server
        os.environ["LLM_DAEMON_THREADS"] = str(threads(target))  # read by the daemon that this starts
        runtime = os.path.join(os.path.dirname(os.environ["LLM_DAEMON_RUNTIME_DIR"]), f"run{self.count}")
        os.environ["LLM_DAEMON_RUNTIME_DIR"] = runtime  # one daemon for each server: ending it ends no other
        began = perf_counter_ns()
        try:
            lease: Any = sync.attach(
                target.artifact, engine=server.engine, context=server.context, parallel=server.slots,
                gpu_layers=server.gpu_layers, args=server.args, timeout=self.suite.table.ready_s,
            )  # fmt: skip
        except LlmDaemonError as e:
            raise NotReady(e.message, {}, str(e.data.get("last_words", ""))) from None
        cp = {"ready": Reached(ms=round((perf_counter_ns() - began) / 1e6, 3))}
        endpoint = Endpoint.of(lease.base_url, {"Authorization": f"Bearer {lease.api_key}"})
        argv: tuple[str, ...] = ()
        with suppress(psutil.Error):
            argv = tuple(psutil.Process(lease.pid).cmdline())
        return Daemon(lease, endpoint, lease.model, cp, argv, f"d{lease.pid}", began, (lease.pid, lease.daemon_pid), runtime)


def command(
    target: Target, weights: Weights, folder: str, headers: dict[str, str]
) -> tuple[list[str], dict[str, str], Endpoint, str]:
    """(argv, environment, where it will listen, the model's name there) of a server that is ours to start."""
    if target.server.engine is not None:
        return _engine_command(target, weights, folder)
    server = target.server
    port, path = free_port(), os.path.join(folder, "s")
    values = {**places(target, weights), "port": str(port), "socket": path}
    argv = [part.format_map(values) for part in server.launch or ()]
    uses_socket = any("socket" in named(part) for part in server.launch or ())
    endpoint = Endpoint(socket=path, headers=headers) if uses_socket else Endpoint("127.0.0.1", port, headers=headers)
    return argv, {**os.environ, **server.env}, endpoint, target.model.id


def places(target: Target, weights: Weights) -> dict[str, str]:
    """What stands for the names in braces in `launch`, without port and socket: those of templates.TOLD."""
    server = target.server
    return {
        "artifact": weights.path, "host": "127.0.0.1", "threads": str(threads(target)), "context": str(server.context),
        "slots": str(server.slots), "alias": target.model.id, "gpu_layers": str(server.gpu_layers or 0),
    }  # fmt: skip


def threads(target: Target) -> int:
    """As the daemon decides: one core is left to the client."""
    return target.server.threads or max(1, usable_cores() - 1)


def _engine_command(target: Target, weights: Weights, folder: str) -> tuple[list[str], dict[str, str], Endpoint, str]:
    """The adapter's own plan, as the daemon would run it."""
    from llm_daemon.daemon.process import scrubbed_env

    server, found = target.server, weights.engine
    assert found is not None and weights.spec is not None
    adapter, where, settings = found
    table = settings.engines.get(adapter.name, {})
    grant = Grant(
        model_path=weights.path, alias=weights.spec.model, socket="engine.sock", port=free_port(), key=os.urandom(16).hex(),
        context=server.context, parallel=server.slots,
        threads=min(settings.threads or threads(target), threads(target)), gpu_layers=server.gpu_layers,
        args=(*map(str, table.get("args", ())), *server.args),
    )  # fmt: skip
    plan = adapter.plan(weights.spec, where, grant)
    if plan.files or plan.paths or plan.drop or plan.warm_up or (isinstance(plan.address, Tcp) and plan.address.told):
        raise NotReady(f'{server.id}: this engine runs through the daemon only: via = "daemon"', {})
    own = {str(k): str(v) for k, v in table.get("env", {}).items()}
    env = {**scrubbed_env(os.environ, f"bench-{os.getpid()}"), **own, **plan.env, **server.env}
    return list(plan.argv), env, _address(plan, folder), plan.served_id or weights.spec.model


def _address(plan: Plan, folder: str) -> Endpoint:
    """Where the engine of a plan listens; `folder` is its working folder."""
    if isinstance(plan.address, Tcp):
        return Endpoint(plan.address.host, plan.address.port, headers=dict(plan.headers))
    return Endpoint(socket=os.path.join(folder, plan.address), headers=dict(plan.headers))


def free_port() -> int:
    """A port that nobody listens on now; `_owned` checks afterwards that it was not taken by another."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _owned(pid: int, endpoint: Endpoint) -> None:
    """Raises NotReady if a TCP port that answers is somebody else's."""
    if endpoint.socket is not None:
        return
    try:
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        listening = {c.laddr.port for p in tree for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    except (psutil.Error, OSError):
        return  # the system does not tell
    if listening and endpoint.port not in listening:
        raise NotReady(f"port {endpoint.port} is answered by another process", {})


def served(endpoint: Endpoint) -> str | None:
    """The first model that the server says it has."""
    try:
        status, data = get(endpoint, "/v1/models", ANSWER_S)
        name = json.loads(data)["data"][0]["id"] if status == 200 else None
        return name if isinstance(name, str) else None
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError):
        return None


def version(target: Target, weights: Weights) -> str:
    """What the server says its version is; "" if it does not tell."""
    server = target.server
    if weights.engine is not None:
        where: Location = weights.engine[1]
        return where.version
    argv: list[str] = []
    if server.version is not None:
        argv = [part.format_map(places(target, weights)) for part in server.version]
    elif server.launch is not None:
        argv = [server.launch[0].format_map({**places(target, weights), "port": "0", "socket": ""}), "--version"]
    if not argv:
        return ""
    try:
        done = subprocess.run(
            argv, env={**os.environ, **server.env}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=20, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = [line.strip() for line in done.stdout.decode(errors="replace").splitlines() if line.strip()]
    told = next((line for line in lines if "version" in line.lower()), lines[0] if lines else "")
    return told.removeprefix("version:").strip()[:120] if done.returncode == 0 else ""


def sweep() -> None:
    """Removes the working folders of runs that were killed: those of processes that are gone, and theirs with them."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*-*"):
        pid = folder.name.removeprefix(SCRATCH).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)  # somebody else's is left alone by the system


# The session's own daemon ---------------------------------------------------------------------------------------------


@contextmanager
def own_daemon() -> Iterator[None]:
    """Gives `attach` a runtime folder of its own, so that the user's daemon is not touched, and ends what runs there.

    With `ttl` and `linger` 0 the daemon ends with its last lease: also when this process is killed.
    """
    with tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{os.getpid()}-", ignore_cleanup_errors=True) as folder:
        mine = {
            "RUNTIME_DIR": os.path.join(folder, "run"), "STATE_DIR": os.path.join(folder, "state"), "TTL": "0", "LINGER": "0",
            "HISTORY_LIMIT": "0", "PROMPT_CACHE_LIMIT": "0", "THREADS": str(max(1, usable_cores() - 1)),
        }  # fmt: skip
        before = {f"LLM_DAEMON_{name}": os.environ.get(f"LLM_DAEMON_{name}") for name in mine}
        os.environ.update({f"LLM_DAEMON_{name}": value for name, value in mine.items()})
        try:
            yield
        finally:
            with suppress(LlmDaemonError, OSError):
                stop_daemon(None)
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def stop_daemon(pid: int | None) -> None:
    """Tells the session's daemon to end, and returns when it has."""
    talk: Any = sync.connect(start_daemon=False, lease=False)
    if talk is not None:
        with suppress(OSError, LlmDaemonError):
            talk.ask("CALL", 10, method="stop", params={"force": True})
        talk.close()
    if pid is None:
        return
    try:
        psutil.Process(pid).wait(15)
    except psutil.NoSuchProcess:
        pass
    except psutil.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
