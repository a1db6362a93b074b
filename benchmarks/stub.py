"""An engine that costs next to nothing: answers at once, streams by the clock.  Run by the daemon as its engine.

    [engines.fake] path = ".../stub.py"  ->  python -I -S stub.py MODEL --socket PATH --alias NAME ...

A body that asks for a stream gets `max_tokens` events, one each INTERVAL seconds, each with the time it was written
(`data: NANOSECONDS`, monotonic); any other POST gets ANSWER.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

INTERVAL = 0.02  # seconds between two events of a stream
ANSWER = b'{"object":"list","model":"m","data":[{"object":"embedding","index":0,"embedding":[%b0.5]}]}' % (b"0.25," * 40)


class Stub(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        self.transport, self.pending = transport, b""

    def data_received(self, data: bytes) -> None:
        self.pending += data
        while (end := self.pending.find(b"\r\n\r\n")) >= 0:
            _, found, rest = self.pending[:end].lower().partition(b"content-length: ")
            whole = end + 4 + (int(rest.partition(b"\r")[0]) if found else 0)
            if len(self.pending) < whole:
                return
            body, self.pending = self.pending[end + 4 : whole], self.pending[whole:]
            if b'"stream"' in body:
                self.stream(int(json.loads(body)["max_tokens"]))
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


async def serve(path: str) -> None:
    loop = asyncio.get_running_loop()
    await loop.create_unix_server(Stub, path, backlog=1024)
    await loop.create_future()  # until SIGTERM


def main(argv: list[str]) -> None:
    import site

    site.main()  # -I -S left it out: uvloop is in the environment's packages
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(argv[argv.index("--socket") + 1]))


if __name__ == "__main__":
    main(sys.argv[1:])
