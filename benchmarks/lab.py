"""Where measurements happen: private folders, processes that end by themselves, clocks."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from llm_daemon.client import sync
from llm_daemon.daemon.supervisor import SOCKET
from llm_daemon.testing.world import World

HERE = Path(__file__).resolve().parent
FOLDERS = ("RUNTIME_DIR", "STATE_DIR", "CONFIG")


@dataclass(frozen=True, slots=True)
class Effort:
    """How often things are done, and how long idleness is watched (seconds)."""

    attaches: int
    processes: int
    starts: int
    loads: int
    requests: int
    idle: float
    pause: float  # for the look at what others do, before and after each section
    rounds: int  # of the relay's latencies, with `shots` requests each
    shots: int
    burst: float  # seconds of full load
    chunks: int  # of each stream
    idlers: int  # idle connections for the memory of one
    crowd: int  # idle connections, and
    queue: int  # waiting tickets, of the growth
    floods: int  # times that too much arrives, for each lane
    flood: float  # seconds it arrives for
    hangups: int  # for each cell
    many: int  # requests to six models
    natural: float  # seconds a victim of a hang-up lives if nobody stops it
    all_cells: bool = True  # of the hang-ups; else the first and the last


FULL = Effort(
    attaches=800, processes=50, starts=8, loads=15, requests=300, idle=20.0, pause=1.0, rounds=10, shots=2000, burst=1.0,
    chunks=60, idlers=2000, crowd=10_000, queue=1000, floods=5, flood=0.8, hangups=20, many=200, natural=2.4,
)  # fmt: skip
QUICK = Effort(
    attaches=100, processes=8, starts=1, loads=4, requests=15, idle=1.5, pause=0.1, rounds=2, shots=300, burst=0.2,
    chunks=20, idlers=500, crowd=1000, queue=200, floods=2, flood=0.4, hangups=3, many=48, natural=2.4,
)  # fmt: skip
TINY = Effort(
    attaches=3, processes=1, starts=1, loads=1, requests=2, idle=0.2, pause=0.05, rounds=1, shots=20, burst=0.05,
    chunks=4, idlers=50, crowd=100, queue=20, floods=1, flood=0.1, hangups=1, many=16, natural=2.0, all_cells=False,
)  # fmt: skip


@contextmanager
def setting(name: str, value: str) -> Iterator[None]:
    """LLM_DAEMON_`name` for the daemons that are started meanwhile."""
    os.environ[f"LLM_DAEMON_{name}"] = value
    try:
        yield
    finally:
        del os.environ[f"LLM_DAEMON_{name}"]


def own_environment() -> None:
    """Takes the user's settings away from us and our children; models stay where they are, or next to the tests' own."""
    kept = os.environ.get("LLM_DAEMON_CACHE_DIR", str(HERE.parent / ".cache" / "models"))
    for name in [n for n in os.environ if n.startswith("LLM_DAEMON_")]:
        del os.environ[name]
    os.environ["LLM_DAEMON_CACHE_DIR"] = kept


@contextmanager
def world(config: str = "") -> Iterator[World]:
    """Folders of our own for a daemon; at the end it is stopped and nothing is left."""
    base = Path(tempfile.mkdtemp(prefix="llmd-b-"))  # short: unix sockets have short names
    here = World(base)
    here.config.write_text(here.config.read_text() + config)
    for name, path in zip(FOLDERS, (here.runtime, here.state, here.config), strict=True):
        os.environ[f"LLM_DAEMON_{name}"] = str(path)
    try:
        yield here
    finally:
        try:
            here.close()
        finally:
            for name in FOLDERS:
                del os.environ[f"LLM_DAEMON_{name}"]
            shutil.rmtree(base)


def fake_model(here: World, **scenario: object) -> str:
    """The path of a model for the scripted engine (llm_daemon.testing.fake_engine)."""
    path = here.base / f"{len(list(here.base.glob('*.fake.json')))}.fake.json"
    path.write_text(json.dumps(scenario))
    return str(path)


def engine_socket(here: World) -> str:
    """The unix socket of the only engine that runs in this world: the way past us."""
    (path,) = here.runtime.glob(f"g-*/*/{SOCKET}")
    return str(path)


def gateway_address(base_url: str) -> tuple[str, int]:
    """Where a lease's `base_url` is, for a socket."""
    parts = urlsplit(base_url)
    assert parts.hostname and parts.port
    return parts.hostname, parts.port


def status() -> dict[str, Any]:
    """What the running daemon says of itself."""
    talk = sync.connect(start_daemon=False, lease=False)
    if talk is None:
        raise RuntimeError("the daemon has gone")
    try:
        result: dict[str, Any] = talk.ask("CALL", 10, method="status")["result"]
        return result
    finally:
        talk.close()


@contextmanager
def child(*argv: str) -> Iterator[subprocess.Popen[str]]:
    """A Python program that says one line when it is ready, and ends when its stdin does."""
    with subprocess.Popen([sys.executable, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            if not process.stdout.readline():
                raise RuntimeError(f"{argv[0]} did not start")
            yield process
        finally:
            process.stdin.close()
            process.wait()


class Load:
    """The load generator: load.py says what it can be asked."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.orders, self.answers = process.stdin, process.stdout

    def ask(self, do: str, **order: object) -> dict[str, Any]:
        """Raises RuntimeError if it could not be done."""
        print(json.dumps({"do": do, **order}), file=self.orders, flush=True)
        answer: dict[str, Any] = json.loads(self.answers.readline() or '{"error": "the load generator died"}')
        if "error" in answer:
            raise RuntimeError(f"{do} at {order.get('address')}: {answer['error']}")
        return answer


@contextmanager
def load() -> Iterator[Load]:
    with child(str(HERE / "load.py")) as process:
        yield Load(process)


def interleaved(ways: Mapping[str, Callable[[], float]], rounds: int, seed: int = 1) -> dict[str, list[float]]:
    """Each way once a round, in random order, so that whatever else the machine does meets all of them alike."""
    order, rng = list(ways), random.Random(seed)
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        rng.shuffle(order)
        for way in order:
            found[way].append(ways[way]())
    return found


def run_program(*argv: str) -> tuple[float, float]:
    """Milliseconds of wall clock and of CPU that a whole process takes, from spawn to its end."""
    began = time.perf_counter()
    pid = os.posix_spawn(argv[0], argv, os.environ)
    _, code, usage = os.wait4(pid, 0)
    wall = (time.perf_counter() - began) * 1e3
    if code:
        raise RuntimeError(f"{' '.join(argv)} ended with {os.waitstatus_to_exitcode(code)}")
    return wall, (usage.ru_utime + usage.ru_stime) * 1e3


class Http:
    """A client that does next to nothing: one connection, kept as long as the server keeps it."""

    def __init__(self, address: str | tuple[str, int]) -> None:
        self.address, self.sock = address, socket.socket()
        self.sock.close()

    def post(self, message: bytes) -> tuple[int, float, bytes]:
        """(status, microseconds, head).  Connecting is not counted."""
        if self.sock.fileno() < 0:
            self.sock = socket.socket(socket.AF_UNIX if isinstance(self.address, str) else socket.AF_INET)
            self.sock.settimeout(30)
            self.sock.connect(self.address)
            if not isinstance(self.address, str):
                self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        began = time.perf_counter_ns()
        self.sock.sendall(message)
        data = b""
        while not self._complete(data):
            if not (more := self.sock.recv(65536)):
                raise ConnectionError(f"{self.address} closed the connection: {data[:200]!r}")
            data += more
        took = (time.perf_counter_ns() - began) / 1e3
        head = data.partition(b"\r\n\r\n")[0]
        if b"connection: close" in head.lower():  # llama.cpp does so after 100 requests
            self.sock.close()
        return int(head.split(None, 2)[1]), took, head

    @staticmethod
    def _complete(data: bytes) -> bool:
        head, end, body = data.partition(b"\r\n\r\n")
        if not end:
            return False
        _, found, rest = head.lower().partition(b"content-length: ")
        return len(body) >= int(rest.partition(b"\r")[0]) if found else body.endswith(b"0\r\n\r\n")

    def close(self) -> None:
        self.sock.close()


def request(path: str, body: Mapping[str, object], token: str = "", headers: Mapping[str, str] = MappingProxyType({})) -> bytes:
    text = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n"
    if token:
        head += f"Authorization: Bearer {token}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return head.encode() + b"\r\n" + text


# -- what the kernel knows about a process


def switches(pid: int) -> int:
    """How often any thread of the process was put on a core: each time it gave one up, by itself or not."""
    total = 0
    for path in Path(f"/proc/{pid}/task").glob("*/status"):
        total += sum(int(line.split()[1]) for line in path.read_text().splitlines() if "_ctxt_switches" in line)
    return total


def cpu_ms(pid: int) -> float:
    """Milliseconds of CPU time of all living threads (schedstat counts nanoseconds; /proc/PID/stat only ticks of 10 ms)."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e6
