"""Requests that arrive by the clock, whether or not the others are answered; each is followed to its one end."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Sequence
from time import perf_counter
from typing import Any


class Asker(asyncio.Protocol):
    """One request.  `outcome`: `served`, the code of an error, `left` (we hung up) or `lost: ...` - an end that is none."""

    def __init__(self, message: bytes, leave: float | None) -> None:
        self.message, self.leave = message, leave
        self.data = bytearray()
        self.outcome = ""
        self.began, self.first, self.end = perf_counter(), 0.0, 0.0
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(self.message)
        if self.leave is not None:
            asyncio.get_running_loop().call_later(self.leave, self.finish, "left")

    def data_received(self, data: bytes) -> None:
        self.data += data
        if not self.first and b"data: {" in self.data:
            self.first = perf_counter()
        if is_complete(self.data):
            self.finish(judge(self.data))

    def connection_lost(self, exc: Exception | None) -> None:
        self.finish(f"lost: connection closed {'in the middle' if self.data else 'without a word'}")

    def finish(self, outcome: str) -> None:
        if not self.outcome:
            self.outcome, self.end = outcome, perf_counter()
            self.done.set_result(None)
            if hasattr(self, "transport"):
                self.transport.close()

    def told(self, start: float) -> dict[str, Any]:
        """Seconds since `start`, `first` None if there was no token."""
        first = self.first - start if self.first else None
        return {"sent": self.began - start, "first": first, "end": self.end - start, "outcome": self.outcome}


def is_complete(data: bytes | bytearray) -> bool:
    """Whether an answer is there in full, by its own framing.

    >>> head = b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\n"
    >>> is_complete(head + b"{"), is_complete(head + b"{}")
    (False, True)
    """
    head, end, body = bytes(data).partition(b"\r\n\r\n")
    if not end:
        return False
    _, found, rest = head.lower().partition(b"content-length: ")
    return len(body) >= int(rest.partition(b"\r")[0]) if found else body.endswith(b"0\r\n\r\n")


def judge(data: bytes | bytearray) -> str:
    """What a complete answer is: `served` only if it is a stream that came to its end.

    >>> judge(b'HTTP/1.1 503 X\\r\\nContent-Length: 37\\r\\n\\r\\n{"error": {"code": "queue_full"}}')
    'queue_full'
    >>> judge(b"HTTP/1.1 200 OK\\r\\n\\r\\n8\\r\\ndata: {}\\r\\n0\\r\\n\\r\\n")
    'lost: the stream ended without [DONE]'
    """
    head, _, body = bytes(data).partition(b"\r\n\r\n")
    if head.split(None, 2)[1] != b"200":
        try:
            return str(json.loads(body)["error"]["code"])
        except (ValueError, KeyError, TypeError):
            return f"lost: {head[:60]!r}"
    if b"data: [DONE]" in body:
        return "served"
    if (at := body.rfind(b'data: {"error"')) >= 0:
        return str(json.loads(body[at + 6 :].partition(b"\n")[0])["error"]["code"])
    return "lost: the stream ended without [DONE]"


async def open_one(address: Any, asker: Asker) -> None:
    loop = asyncio.get_running_loop()
    try:
        if not isinstance(address, str):
            await loop.create_connection(lambda: asker, *address)
            return
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        while True:  # an engine's accept queue may be short, and a unix socket does not wait for it
            try:
                sock.connect(address)
                break
            except BlockingIOError:
                await asyncio.sleep(0.002)
        await loop.create_unix_connection(lambda: asker, sock=sock)
    except OSError as e:
        asker.finish(f"lost: cannot connect: {e.strerror or e}")


async def flood(
    address: Any, messages: Sequence[str], times: Sequence[float], leave: Sequence[float | None], patience: float, stop: bool
) -> dict[str, Any]:
    """Sends `messages[i]` at `times[i]` seconds (rising); each hangs up after `leave[i]` seconds if that is not None.

    Waits `patience` seconds after the last arrival for all to end - or, with `stop`, for the first token of the newest
    alone; all others then hang up.  `requests`: one object each (`Asker.told`); `late`: how late we sent, worst, in seconds.
    """
    loop = asyncio.get_running_loop()
    start, late = perf_counter(), 0.0
    askers: list[Asker] = []
    opening = []
    for at, message, seconds in zip(times, messages, leave, strict=True):
        if (wait := start + at - perf_counter()) > 0:
            await asyncio.sleep(wait)
        late = max(late, perf_counter() - start - at)
        asker = Asker(message.encode(), seconds)
        askers.append(asker)
        opening.append(loop.create_task(open_one(address, asker)))
    newest = askers[-1]
    whole = asyncio.gather(*opening, *(asker.done for asker in askers), return_exceptions=True)
    deadline = loop.time() + patience
    while not whole.done() and loop.time() < deadline and not (stop and (newest.first or newest.outcome)):
        await asyncio.wait([whole], timeout=0.01)
    for task in opening:
        task.cancel()
    for asker in askers:
        asker.finish("left" if stop else f"lost: no end within {patience:g} s")
    await asyncio.gather(whole, return_exceptions=True)
    return {"requests": [asker.told(start) for asker in askers], "late": late}
