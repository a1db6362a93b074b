"""The load generator, a process of its own: takes orders as JSON lines on stdin, answers each with a JSON line.

An order is `{"do": NAME, ...}` with the arguments of the function of that name here.  Each answer also says `cpu_share`: how
much of one core we used meanwhile, in percent; near 100, it is us who were measured.  Addresses are the path of a unix socket
or `[host, port]`; messages are whole HTTP requests as text.  Standard library and uvloop; nothing of ours.
"""

from __future__ import annotations

import asyncio
import json
import resource
import select
import socket
import struct
import sys
import time
from typing import Any

import uvloop

sys.path[0] = __file__.rpartition("/benchmarks/")[0]  # run as a script: our folder's name is the package

from benchmarks import flood  # noqa: E402

Address = Any  # str | list of host and port
held: list[socket.socket] = []


def connect(address: Address) -> socket.socket:
    if isinstance(address, str):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(address)
    else:
        sock = socket.create_connection((address[0], address[1]))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def exchange(sock: socket.socket, message: bytes, ending: bytes) -> None:
    """One request and its answer, which must be 200 and end with `ending`."""
    sock.sendall(message)
    data = sock.recv(65536)
    while not data.endswith(ending):
        if not (more := sock.recv(65536)):
            break
        data += more
    if not (data.startswith(b"HTTP/1.1 200") and data.endswith(ending)):
        raise RuntimeError(f"unexpected answer: {data[:300]!r}")


def latency(address: Address, message: str, ending: str, count: int) -> dict[str, Any]:
    """`us`: microseconds of each of `count` requests, one after the other on one connection."""
    text, end, times = message.encode(), ending.encode(), []
    with connect(address) as sock:
        for _ in range(count):
            began = time.perf_counter_ns()
            exchange(sock, text, end)
            times.append((time.perf_counter_ns() - began) / 1e3)
    return {"us": times}


def throughput(address: Address, message: str, ending: str, connections: int, seconds: float) -> dict[str, Any]:
    """`rate`: answers a second on so many connections, each of which asks again as soon as it is answered."""
    text, end = message.encode(), ending.encode()
    socks = {}
    with select.epoll() as poll:
        for _ in range(connections):
            sock = connect(address)
            socks[sock.fileno()] = sock
            poll.register(sock, select.EPOLLIN)
        parts = dict.fromkeys(socks, b"")
        done, open_ones = 0, connections
        began = time.perf_counter()
        for sock in socks.values():
            sock.sendall(text)
        while open_ones:
            for fd, _ in poll.poll(30):
                data = parts[fd] + socks[fd].recv(65536)
                parts[fd] = data
                if not data.endswith(end):
                    if not data or len(data) > 1 << 20 or not data.startswith(b"HTTP/1.1 200"):
                        raise RuntimeError(f"unexpected answer: {data[:300]!r}")
                    continue
                done += 1
                parts[fd] = b""
                if time.perf_counter() - began < seconds:
                    socks[fd].sendall(text)
                else:
                    open_ones -= 1
                    poll.unregister(fd)
        took = time.perf_counter() - began
        for sock in socks.values():
            sock.close()
    return {"rate": done / took, "requests": done}


class Listener(asyncio.Protocol):
    """Reads one stream of the stub; notes when each chunk came and how long it was on its way."""

    def __init__(self, message: bytes) -> None:
        self.message, self.done = message, asyncio.get_running_loop().create_future()
        self.came: list[int] = []
        self.delays: list[int] = []
        self.pending = b""

    def connection_made(self, transport: Any) -> None:
        self.transport, self.began = transport, time.monotonic_ns()
        transport.write(self.message)

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
            self.done.set_exception(exc or ConnectionError(f"the stream ended early: {self.pending[:300]!r}"))


async def _streams(address: Address, message: str, number: int, spread: float, patience: float) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    listeners = []
    for n in range(number):
        if isinstance(address, str):
            _, listener = await loop.create_unix_connection(lambda: Listener(message.encode()), address)
        else:
            _, listener = await loop.create_connection(lambda: Listener(message.encode()), *address)
        listeners.append(listener)
        await asyncio.sleep(spread / number if n + 1 < number else 0)
    await asyncio.wait_for(asyncio.gather(*(listener.done for listener in listeners)), patience)
    return {
        "gap": [(b - a) / 1e6 for it in listeners for a, b in zip(it.came, it.came[1:], strict=False)],
        "way": [delay / 1e6 for it in listeners for delay in it.delays],
        "first": [(it.came[0] - it.began) / 1e6 for it in listeners],
    }


def streams(address: Address, message: str, number: int, spread: float, patience: float) -> dict[str, Any]:
    """`number` streams of the stub at once, begun within `spread` seconds.

    Milliseconds: `gap` between chunks, `way` of each chunk, `first` one since its request.
    """
    return run(_streams(address, message, number, spread, patience))


def flooded(**order: Any) -> dict[str, Any]:
    """See flood.py."""
    return run(flood.flood(**order))


def run(job: Any) -> dict[str, Any]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found: dict[str, Any] = runner.run(job)
        return found


def hold(address: Address, message: str, ending: str, number: int) -> dict[str, Any]:
    """Opens connections and keeps them until `release`.  With an `ending` each is served once and then idle; else it waits."""
    for _ in range(number):
        sock = connect(address)
        held.append(sock)
        if ending:
            exchange(sock, message.encode(), ending.encode())
        else:
            sock.sendall(message.encode())
    return {"held": len(held)}


def release(reset: bool) -> dict[str, Any]:
    """Closes what `hold` opened; `spoken` counts those on which something came meanwhile, the other side's close included.

    `reset` leaves no port behind in TIME_WAIT: there are fewer ports than a few rounds of ten thousand need.
    """
    spoken = 0
    for sock in held:
        sock.setblocking(False)
        try:
            sock.recv(1)
            spoken += 1
        except BlockingIOError:
            pass
        except OSError:
            spoken += 1
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    held.clear()
    return {"spoken": spoken}


TASKS = {task.__name__: task for task in (latency, throughput, streams, flooded, hold, release)}


def main() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # Not sys.stdout: under PYTHONUNBUFFERED that loses the rest of a line that the pipe takes only in part.
    out = open(1, "w", closefd=False)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            answer = TASKS[order.pop("do")](**order)
        except Exception as e:  # told to whoever ordered it, who decides
            answer = {"error": f"{type(e).__name__}: {e}"}
        answer["cpu_share"] = round(100 * (time.process_time() - cpu) / (time.perf_counter() - wall), 1)
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
