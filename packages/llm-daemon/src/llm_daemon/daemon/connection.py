"""One client's HTTP connection: requests in order, answers in order, and the moment the client is gone.

Reading never stops, because only a reader learns of a hang-up.  What bounds memory instead: a client that sends more
requests than may wait, or bytes after its last one, is no longer listened to and loses the connection after its answer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, cast

from ..core.openai import error_body, retry_after
from ..errors import LlmDaemonError
from .guard import peer_is_us
from .http1 import PHRASES, Request, RequestReader

if TYPE_CHECKING:
    from .gateway import Exchange, Gateway

_LINGER = 2.0  # seconds a refused client may go on sending before its connection is torn down


class Connection(asyncio.Protocol):
    """`port` is our TCP port the client reached, None for the unix socket."""

    transport: asyncio.Transport

    def __init__(self, gateway: Gateway, port: int | None) -> None:
        self.port, self._gateway = port, gateway
        self._reader = RequestReader(partial(gateway.judge, port), body_limit=gateway.body_limit)
        self._waiting: deque[Request] = deque()
        self._exchange: Exchange | None = None
        self._paused = self._closing = self._gone = self._advancing = False
        self._linger: asyncio.TimerHandle | None = None

    # -- called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._gateway.connections.add(self)
        if self._gateway.closing or (self.port is None and not peer_is_us(transport.get_extra_info("socket"))):
            self._closing = True
            self._reader.stop()
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._reader.done:
            return
        self._waiting += self._reader.feed(data)
        while len(self._waiting) > 1 and self._is_too_much():
            self._waiting.pop()
            self._waiting[-1].keep_alive = False  # the client asks again for what is not answered (RFC 9112, section 9.3.2)
            self._reader.failed = True
            self._reader.stop()
        if self._exchange is None:
            self._advance()

    def eof_received(self) -> None:
        self._hang_up()

    def connection_lost(self, exc: Exception | None) -> None:
        self._hang_up()
        if self._linger is not None:
            self._linger.cancel()
        self._gateway.forget(self)

    def pause_writing(self) -> None:
        self._paused = True
        if self._exchange is not None:
            self._exchange.pause()

    def resume_writing(self) -> None:
        self._paused = False
        if self._exchange is not None:
            self._exchange.resume()
        elif not self._advancing:
            self._advance()

    # -- called by the gateway and by exchanges

    def write(self, data: bytes) -> None:
        if not self._gone:
            self.transport.write(data)

    def reply(self, request: Request, status: int, body: bytes, headers: Iterable[bytes] = ()) -> None:
        """Writes a whole JSON answer of our own; `headers` are lines."""
        lines = [
            b"HTTP/1.1 %d %b\r\n" % (status, PHRASES.get(status, b"")),
            b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body),
            *headers,
        ]
        if not self._keeps(request):
            lines.append(b"Connection: close\r\n")
        self.write(b"".join(lines) + b"\r\n" + (b"" if request.method == "HEAD" else body))

    def reply_error(self, request: Request, error: LlmDaemonError, headers: Iterable[bytes] = ()) -> None:
        lines = list(headers)
        if (seconds := retry_after(error)) is not None:
            lines.append(b"Retry-After: %d\r\n" % seconds)
        if error.status == 405:
            lines.append(b"Allow: %b\r\n" % str(error.data["allow"]).encode())
        if error.status == 401:
            lines.append(b"WWW-Authenticate: Bearer\r\n")
        self.reply(request, error.status, error_body(error), lines)

    def finished(self, request: Request, *, keep: bool = True) -> None:
        """The answer to `request` is written."""
        self._exchange = None
        if not keep or not self._keeps(request):
            self._close()
        elif not self._advancing:
            self._advance()

    def shut(self, error: LlmDaemonError) -> None:
        """The daemon goes."""
        self._reader.stop()
        self._waiting.clear()
        if self._exchange is not None:
            self._exchange.break_off(error)
        else:
            self._close()

    # -- inside

    def _keeps(self, request: Request) -> bool:
        # An HTTP/1.0 client is answered once: it would have to be told otherwise, and none of them needs it.
        return request.keep_alive and request.version == "1.1" and not self._gateway.closing

    def _is_too_much(self) -> bool:
        sizes = [len(request.body) for request in self._waiting]
        return len(sizes) > self._gateway.pipeline or sum(sizes) > self._gateway.body_limit

    def _advance(self) -> None:
        """Serves what waits, one at a time, while the client takes our answers."""
        self._advancing = True  # an answer may be given at once, inside _serve
        try:
            while self._waiting and self._exchange is None and not (self._paused or self._closing):
                self._serve(self._waiting.popleft())
        finally:
            self._advancing = False
        if self._reader.expecting and self._exchange is None and not (self._waiting or self._closing):
            self._reader.expecting = False
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _serve(self, request: Request) -> None:
        exchange = self._gateway.handle(request, self)
        if exchange is None:
            self.finished(request)
        else:
            self._exchange = exchange
            exchange.open()

    def _close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._waiting.clear()
        lingers = self._reader.failed and not self._gone
        self._reader.stop()
        if lingers and self.transport.can_write_eof():
            # The client may still be sending; closing now would reset the connection and lose it our answer.
            self.transport.write_eof()
            self._linger = asyncio.get_running_loop().call_later(_LINGER, self.transport.abort)
        else:
            self.transport.close()

    def _hang_up(self) -> None:
        if self._gone:
            return
        self._gone = self._closing = True
        self._waiting.clear()
        self._reader.stop()
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.hang_up()
