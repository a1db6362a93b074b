"""What our HTTP relay costs, beside nginx and beside no relay at all, in one run on one machine.

Three ways to the same stub server on a unix socket: straight, through nginx (unbuffered, kept alive; left out when it is
not installed) and through our gateway with token and Host check.  All processes of our own, loopback only.
The rounds of the three ways alternate, so that whatever else the machine does meets all of them.

    python benchmarks/gateway.py [--json FILE] [--quick] [--loop asyncio]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

TOKEN = "benchmark"
BODY = b'{"model":"m","messages":[{"role":"user","content":"%b"}],"max_tokens":16}' % (b"word " * 20)
ANSWER = b'{"id":"c","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"%b"}}]}' % (
    b"word " * 30
)
INTERVAL = 0.02  # seconds between two chunks of a stream
WAYS = ("direct", "nginx", "relay")


# -- the servers, each in a process of its own


def loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if name == "asyncio":
        return asyncio.new_event_loop
    import uvloop

    return uvloop.new_event_loop


class Stub(asyncio.Protocol):
    """Answers each POST at once; a body with `"stream":true,"n":N` gets N chunks, each with the time it was written."""

    def connection_made(self, transport: Any) -> None:
        self.transport, self.pending = transport, b""

    def data_received(self, data: bytes) -> None:
        self.pending += data
        while (end := self.pending.find(b"\r\n\r\n")) >= 0:
            length = int(self.pending[:end].lower().partition(b"content-length: ")[2].partition(b"\r")[0])
            if len(self.pending) < end + 4 + length:
                return
            body, self.pending = self.pending[end + 4 : end + 4 + length], self.pending[end + 4 + length :]
            if (found := body.find(b'"stream":true,"n":')) >= 0:
                self.stream(int(body[found + 18 :].rstrip(b"}")))
            else:
                self.transport.write(
                    b"HTTP/1.1 200 OK\r\nServer: stub\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                    % (len(ANSWER), ANSWER)
                )

    def stream(self, count: int) -> None:
        self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        loop = asyncio.get_running_loop()
        begin = loop.time()

        def step(number: int) -> None:
            if self.transport.is_closing():
                return
            if number == count:
                self.transport.write(b"0\r\n\r\n")
                return
            event = b"data: %d\n\n" % time.monotonic_ns()
            self.transport.write(b"%x\r\n%b\r\n" % (len(event), event))
            loop.call_at(begin + (number + 1) * INTERVAL, step, number + 1)

        step(0)


class Desk:
    """Everybody's turn is at once."""

    def __init__(self, path: str) -> None:
        from llm_daemon.daemon.gateway import Route

        self.route = Route("m#1", path)

    def open(self, ask: Any, turn: Any) -> None:
        turn.run(self.route)

    def cancel(self, ticket: str) -> None:
        pass

    def ended(self, ticket: str, served: bool = False) -> None:
        pass

    def lost(self, ask: Any, turn: Any, error: Any) -> bool:
        return False

    def models(self) -> list[dict[str, object]]:
        return []

    def health(self) -> dict[str, object]:
        return {"status": "ok"}


async def serve(role: str, path: str) -> None:
    """Serves until stdin ends: the parent's death ends us too."""
    loop = asyncio.get_running_loop()
    if role == "stub":
        await loop.create_unix_server(Stub, path, backlog=256)
        print("ready", flush=True)
    else:
        from llm_daemon.daemon.gateway import Gateway

        tcp = socket.socket()
        tcp.bind(("127.0.0.1", 0))
        await Gateway(Desk(path), token=TOKEN).serve(tcp, None)
        print(tcp.getsockname()[1], flush=True)
    over = asyncio.Event()
    loop.add_reader(0, over.set)
    await over.wait()


@contextmanager
def child(role: str, path: str, loop: str) -> Iterator[str]:
    """Runs a server; yields the line it says when it is ready."""
    argv = [sys.executable, __file__, "--role", role, "--path", path, "--loop", loop]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            line = process.stdout.readline().strip()
            if not line:
                raise SystemExit(f"the {role} did not start")
            yield line
        finally:
            process.stdin.close()
            process.wait(10)


NGINX = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr crit;
events {{ worker_connections 1024; }}
http {{
  access_log off; keepalive_requests 10000000;
  client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u;
  scgi_temp_path {folder}/s;
  upstream engine {{ server unix:{path}; keepalive 64; keepalive_requests 10000000; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_request_buffering on;
    }}
  }}
}}
"""


@contextmanager
def nginx(folder: Path, path: str) -> Iterator[int | None]:
    """Runs nginx in front of the stub; yields its port, or None where it is not installed."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        yield None
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, path=path, port=port))
    with subprocess.Popen([program, "-p", str(folder), "-e", "stderr", "-c", str(config)]) as process:
        try:
            deadline = time.monotonic() + 5
            while process.poll() is None and time.monotonic() < deadline:
                with suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                time.sleep(0.01)  # nginx has no way to say that it listens
            yield port
        finally:
            process.terminate()
            process.wait(10)


# -- the measurements


Address = str | tuple[str, int]


def request(body: bytes) -> bytes:
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %b\r\nContent-Type: application/json\r\n"
        b"Accept: application/json\r\nUser-Agent: bench\r\nContent-Length: %d\r\n\r\n%b" % (TOKEN.encode(), len(body), body)
    )


def latencies(address: Address, count: int) -> list[float]:
    """Microseconds of `count` requests, one after the other on one connection."""
    message, times = request(BODY), []
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as sock:
        if not isinstance(address, str):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.connect(address)
        for _ in range(count):
            start = time.perf_counter_ns()
            sock.sendall(message)
            data = sock.recv(65536)
            while not data.endswith(ANSWER):
                if not (more := sock.recv(65536)):
                    raise SystemExit(f"unexpected answer: {data[:200]!r}")
                data += more
            times.append((time.perf_counter_ns() - start) / 1e3)
            if not data.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"unexpected answer: {data[:200]!r}")
    return times


class Listener(asyncio.Protocol):
    """Reads one stream; notes when each chunk came and how long it was on its way."""

    def __init__(self, count: int) -> None:
        self.count, self.done = count, asyncio.get_running_loop().create_future()
        self.came: list[int] = []
        self.delays: list[int] = []
        self.pending = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(request(b'{"model":"m","stream":true,"n":%d}' % self.count))

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        *whole, self.pending = (self.pending + data).split(b"\n\n")
        for event in whole:
            self.came.append(now)
            self.delays.append(now - int(event.rpartition(b"data: ")[2]))
        if self.pending.endswith(b"0\r\n\r\n") and not self.done.done():
            self.done.set_result(None)
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError("the stream ended early"))


async def streams(address: Address, number: int, count: int) -> dict[str, list[float]]:
    """`number` streams of `count` chunks at once: milliseconds between chunks, and of each chunk's way."""
    loop = asyncio.get_running_loop()
    listeners = []
    for n in range(number):
        if isinstance(address, str):
            _, listener = await loop.create_unix_connection(lambda: Listener(count), address)
        else:
            _, listener = await loop.create_connection(lambda: Listener(count), *address)
        listeners.append(listener)
        await asyncio.sleep(INTERVAL / number if n + 1 < number else 0)  # spread over the interval, as real ones are
    await asyncio.wait_for(asyncio.gather(*(listener.done for listener in listeners)), count * INTERVAL * 4 + 10)
    return {
        "gaps": [(b - a) / 1e6 for it in listeners for a, b in zip(it.came, it.came[1:], strict=False)],
        "delays": [delay / 1e6 for it in listeners for delay in it.delays],
        "first": [it.delays[0] / 1e6 for it in listeners],
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": round(cuts[49], 3), "p99": round(cuts[98], 3)}


def measure(ways: dict[str, Address], rounds: int, count: int, chunks: int, loop: str) -> dict[str, Any]:
    for address in ways.values():
        latencies(address, min(count, 500))  # warm
    times: dict[str, list[float]] = {way: [] for way in ways}
    medians: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, address in ways.items():
            taken = latencies(address, count)
            times[way] += taken
            medians[way].append(statistics.median(taken))
    result: dict[str, Any] = {"latency_us": {way: quantiles(v) for way, v in times.items()}, "streams_ms": {}}
    for way, per_round in medians.items():
        result["latency_us"][way]["p50_of_rounds"] = [round(m, 1) for m in per_round]
    for number in (1, 64):
        found: dict[str, dict[str, list[float]]] = {way: {"gaps": [], "delays": [], "first": []} for way in ways}
        for _ in range(3 if number == 1 else 2):
            for way, address in ways.items():
                with asyncio.Runner(loop_factory=loop_factory(loop)) as runner:
                    for key, values in runner.run(streams(address, number, chunks)).items():
                        found[way][key] += values
        result["streams_ms"][str(number)] = {
            way: {"gap": quantiles(v["gaps"]), "delay": quantiles(v["delays"]), "first": quantiles(v["first"])}
            for way, v in found.items()
        }
    if "nginx" in ways:
        ours, theirs = (result["latency_us"][way]["p50"] for way in ("relay", "nginx"))
        result["relay_p50_over_nginx"] = round(ours / theirs, 3)
    return result


def table(result: dict[str, Any]) -> str:
    latency = result["latency_us"]
    base = latency["direct"]["p50"]
    lines = [f"{'one request':<22}{'p50 us':>10}{'p99 us':>10}{'added p50':>12}{'x nginx':>10}"]
    for way, found in latency.items():
        ratio = f"{found['p50'] / latency['nginx']['p50']:.2f}" if "nginx" in latency else "-"
        lines.append(f"{way:<22}{found['p50']:>10.1f}{found['p99']:>10.1f}{found['p50'] - base:>12.1f}{ratio:>10}")
    for number, by_way in result["streams_ms"].items():
        title = f"{number} stream{'s' if number != '1' else ''}, ms"
        lines.append(f"\n{title:<22}{'gap p50':>10}{'gap p99':>10}{'way p50':>12}{'way p99':>10}{'first p99':>11}")
        for way, v in by_way.items():
            lines.append(
                f"{way:<22}{v['gap']['p50']:>10.2f}{v['gap']['p99']:>10.2f}{v['delay']['p50']:>12.3f}{v['delay']['p99']:>10.3f}"
                f"{v['first']['p99']:>11.3f}"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; `--json FILE` (or `-`) also writes the numbers.  Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the numbers as JSON; - for standard output instead of the table")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work: shows that it runs, proves nothing")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop", help="event loop of our relay")
    parser.add_argument("--role", choices=("stub", "relay"), help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.role:
        with asyncio.Runner(loop_factory=loop_factory(options.loop)) as runner:
            runner.run(serve(options.role, options.path))
        return 0
    rounds, count, chunks = (2, 300, 20) if options.quick else (10, 2000, 100)
    with tempfile.TemporaryDirectory(prefix="llmd-") as name:
        path = os.path.join(name, "stub.sock")
        with child("stub", path, "uvloop"), child("relay", path, options.loop) as port, nginx(Path(name), path) as other:
            places: dict[str, Address | None] = {
                "direct": path,
                "nginx": ("127.0.0.1", other) if other else None,
                "relay": ("127.0.0.1", int(port)),
            }
            ways = {way: address for way in WAYS if (address := places[way]) is not None}
            result = measure(ways, rounds, count, chunks, "uvloop")
    result["machine"] = {
        "python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count(), "loop": options.loop,
        "requests": rounds * count, "quick": options.quick,
    }  # fmt: skip
    if options.json == "-":
        print(json.dumps(result, indent=1))
        return 0
    print(table(result))
    if "nginx" not in ways:
        print("\nnginx is not installed: no ratio (Debian: apt-get install nginx-light)")
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
