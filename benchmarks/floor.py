"""The least a relay in Python can be: httptools and uvloop on both sides, and nothing of what ours is for.

    python floor.py SOCKET    relays to an engine at a unix socket; says its port, ends when its stdin does

No token, no turn, no ticket, no bound, no hang-up, no error: POSTs of one kind, and bytes that pass.  What our gateway costs
above this is the price of what it does; what this costs above nginx is the price of Python.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import Any

import httptools
import uvloop

HEAD = b"POST %b HTTP/1.1\r\nHost: engine\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"


class Engine(asyncio.Protocol):
    """A connection to the engine; in `idle` while it serves nobody."""

    def __init__(self, idle: list[Engine]) -> None:
        self.idle, self.parser = idle, httptools.HttpResponseParser(self)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def send(self, client: Any, message: bytes) -> None:
        self.client = client
        self.transport.write(message)

    def data_received(self, data: bytes) -> None:
        self.client.write(data)  # first, so that it is on its way meanwhile
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        self.idle.append(self)


class Client(asyncio.Protocol):
    """A connection from a client."""

    def __init__(self, path: str, idle: list[Engine]) -> None:
        self.path, self.idle, self.parser = path, idle, httptools.HttpRequestParser(self)
        self.url = self.body = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self.url, self.body = url, b""

    def on_body(self, piece: bytes) -> None:
        self.body += piece

    def on_message_complete(self) -> None:
        message = HEAD % (self.url, len(self.body), self.body)
        if self.idle:
            self.idle.pop().send(self.transport, message)
        else:
            self.task = asyncio.get_running_loop().create_task(self.connect(message))

    async def connect(self, message: bytes) -> None:
        _, engine = await asyncio.get_running_loop().create_unix_connection(lambda: Engine(self.idle), self.path)
        engine.send(self.transport, message)


async def serve(path: str) -> None:
    loop, over, idle = asyncio.get_running_loop(), asyncio.Event(), list[Engine]()
    sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
    await loop.create_server(lambda: Client(path, idle), sock=sock, backlog=1024)
    print(sock.getsockname()[1], flush=True)
    loop.add_reader(0, over.set)
    await over.wait()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(sys.argv[1]))
