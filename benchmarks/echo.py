"""The least a server can do: sends back what it gets on a unix socket, until stdin ends.  `python echo.py PATH`."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import uvloop


class Echo(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


async def serve(path: str) -> None:
    loop = asyncio.get_running_loop()
    await loop.create_unix_server(Echo, path)
    print("ready", flush=True)
    over = asyncio.Event()
    loop.add_reader(0, over.set)
    await over.wait()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(sys.argv[1]))
