"""One client's HTTP connection: requests in order, answers in order, and the moment the client is gone.

Reading never stops, because only a reader learns of a hang-up.  What bounds memory instead: a client that sends more
requests than may wait, or bytes after its last one, is no longer listened to and loses the connection after its answer.
A client that is too slow, in sending a request or in taking an answer, loses it too, and with it the engine's slot.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, cast

from ..core.openai import error_body, retry_after
from ..core.routes import UPSTREAM
from ..errors import LlmDaemonError, UsageError
from .guard import peer_is_us
from .http1 import HEAD_LIMIT, PHRASES, Request, RequestReader
from .identity import peer

if TYPE_CHECKING:
    from .gateway import Exchange, Gateway

# What asking again would only make worse.  The OpenAI clients ask again after 409 and 5xx, unless told not to.
FINAL = frozenset({"superseded", "expired", "cancelled"})
_LINGER = 2.0  # seconds a refused client may go on sending before its connection is torn down


class Connection(asyncio.Protocol):
    """`via` is `tcp`, `unix` or `tls`, `port` our port that the client reached; `peer` its process id, where that is known."""

    transport: asyncio.Transport

    def __init__(self, gateway: Gateway, via: str, port: int) -> None:
        self.via, self.port, self._gateway = via, port, gateway
        self.peer = 0
        self._reader = RequestReader(
            partial(gateway.judge, self), body_limit=gateway.body_limit, hold=gateway.hold, heads=gateway.heads[via]
        )
        self._slow_since = 0.0  # loop time; 0 while nothing is begun that could take too long
        self._waiting: deque[Request] = deque()
        self._exchange: Exchange | None = None
        self._tunnel: Exchange | None = None  # the same, if it may switch protocols
        self._paused = self._closing = self._gone = self._advancing = False
        self._held_back = False  # a tunnel's engine takes no more for now
        self._linger: asyncio.TimerHandle | None = None

    # -- called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._gateway.connections.add(self)
        sock = transport.get_extra_info("socket")
        stranger = self.via == "unix" and not peer_is_us(sock)
        if self.via == "unix" and not stranger:
            self.peer, _ = peer(sock)
        if self._gateway.closing or stranger:
            self._closing = True
            self._reader.stop()
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        reader = self._reader
        if reader.done:
            self._follow(data)
            return
        requests = reader.feed(data)
        if len(requests) == 1 and self._exchange is None and not (self._waiting or self._paused or self._closing):
            self._slow_since = 0.0  # by far the most usual: one whole request, and nothing else to do
            self._serve_alone(requests[0])
            return
        self._waiting += requests
        if len(self._waiting) > 1:
            self._trim()
        if reader.is_partial:
            self._is_slow_from_here()
        elif not self._paused:
            self._slow_since = 0.0
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
        self._is_slow_from_here()
        if self._exchange is not None:
            self._exchange.pause()

    def resume_writing(self) -> None:
        self._paused = False
        if not (self._reader.is_partial or self._held_back):
            self._slow_since = 0.0
        if self._exchange is not None:
            self._exchange.resume()
        else:  # not in here: the standard loop reports the end of a transport that is closed in here twice
            asyncio.get_running_loop().call_soon(self._advance)

    # -- called by the gateway and by exchanges

    def write(self, data: bytes) -> None:
        if not self._gone:
            self.transport.write(data)

    def hold_back(self, full: bool) -> None:
        """Listens no more, or again.  Nobody sees a hang-up meanwhile, so this may take as long as a slow client may."""
        if self._gone or self._held_back == full:
            return
        self._held_back = full
        if full:
            self._is_slow_from_here()
            self.transport.pause_reading()
        else:
            if not self._paused:
                self._slow_since = 0.0
            self.transport.resume_reading()

    def reply(
        self, request: Request, status: int, body: bytes, headers: Iterable[bytes] = (), kind: bytes = b"application/json"
    ) -> None:
        """Writes a whole JSON answer of our own; `headers` are lines."""
        lines = [
            b"HTTP/1.1 %d %b\r\n" % (status, PHRASES.get(status, b"")),
            b"Content-Type: %b\r\nContent-Length: %d\r\n" % (kind, len(body)),
            *headers,
        ]
        if status == 204:
            lines[1] = b""
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
            is_page = self.via == "tls" or request.path.startswith(UPSTREAM)
            asks_person = is_page and b"text/html" in request.headers.get(b"accept", b"")
            kind = b'Basic realm="llm-daemon: the token is the password"' if asks_person else b"Bearer"
            lines.append(b"WWW-Authenticate: %b\r\n" % kind)
        if error.code in FINAL:
            lines.append(b"X-Should-Retry: false\r\n")
        self.reply(request, error.status, error_body(error), lines)

    def finished(self, request: Request, *, keep: bool = True) -> None:
        """The answer to `request` is written."""
        self._exchange = self._tunnel = None
        self._release(request)
        if not keep or not self._keeps(request):
            self._close()
        elif not self._advancing:
            self._advance()

    def shut(self, error: LlmDaemonError) -> None:
        """The daemon goes."""
        self._forget_waiting()
        if self._exchange is not None:
            self._exchange.break_off(error)
        else:
            self._close()

    def look(self, now: float) -> None:
        """Ends a client that is too slow."""
        if not self._slow_since:
            self._gateway.slow.discard(self)
        elif now - self._slow_since >= self._gateway.patience:
            if self._paused or self._held_back or (self._closing and self.transport.get_write_buffer_size()):
                self.transport.abort()
            elif self._exchange is not None:  # it waits for us, and its next request may take its time from then on
                self._slow_since = now
            elif self._closing:  # it was answered; _LINGER bounds the rest
                self._slow_since = 0.0
            else:
                self._reader.failed = True  # it may still be sending
                error = UsageError("the request did not come in time", code="timeout", status=408)
                self.reply_error(Request(keep_alive=False), error)
                self._close()

    # -- inside

    def _follow(self, data: bytes) -> None:
        """Bytes behind the last request: its own if it may switch protocols, also while it waits behind others."""
        if self._tunnel is not None:
            self._tunnel.client_sent(data)
        elif self._waiting and self._waiting[-1].tunnel:
            self._reader.rest += data
            if len(self._reader.rest) > HEAD_LIMIT:
                self.transport.abort()

    def _is_slow_from_here(self) -> None:
        if not self._slow_since:
            self._slow_since = asyncio.get_running_loop().time()
            self._gateway.watch(self)

    def _release(self, request: Request) -> None:
        """Its body is no longer ours."""
        self._gateway.held -= request.held
        request.held = 0

    def _forget_waiting(self) -> None:
        self._gateway.held -= self._reader.stop()
        for request in self._waiting:
            self._release(request)
        self._waiting.clear()

    def _keeps(self, request: Request) -> bool:
        # An HTTP/1.0 client is answered once: it would have to be told otherwise, and none of them needs it.
        return request.keep_alive and request.version == "1.1" and not self._gateway.closing

    def _trim(self) -> None:
        """Drops what may not wait; the client asks again for what is not answered (RFC 9112, section 9.3.2)."""
        waiting, size = self._waiting, sum([len(request.body) for request in self._waiting])
        while len(waiting) > 1 and (len(waiting) > self._gateway.pipeline or size > self._gateway.body_limit):
            size -= len(waiting[-1].body)
            self._release(waiting.pop())
            waiting[-1].keep_alive = False
            self._reader.failed = True
        if self._reader.failed:
            self._gateway.held -= self._reader.stop()

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

    def _serve_alone(self, request: Request) -> None:
        self._advancing = True
        try:
            self._serve(request)
        finally:
            self._advancing = False
        if self._reader.is_partial:
            self._is_slow_from_here()
        if self._exchange is None and (self._waiting or self._reader.expecting):
            self._advance()

    def _serve(self, request: Request) -> None:
        exchange = self._gateway.handle(request, self)
        if exchange is None:
            self.finished(request)
        else:
            self._exchange = exchange
            if request.tunnel:
                self._tunnel = exchange
            exchange.open()
            if request.tunnel and self._reader.rest:  # the client did not wait for our answer
                exchange.client_sent(self._reader.rest)

    def _close(self) -> None:
        if self._closing:
            return
        self._closing = True
        lingers = self._reader.failed and not self._gone
        self._forget_waiting()
        if lingers and self.transport.can_write_eof():
            # The client may still be sending; closing now would reset the connection and lose it our answer.
            with suppress(OSError):  # reset, and the standard loop has not told us yet
                self.transport.write_eof()
            self._linger = asyncio.get_running_loop().call_later(_LINGER, self.transport.abort)
        else:
            self.transport.close()
            if self.transport.get_write_buffer_size():  # too little to be paused for, and yet it may never be taken
                self._is_slow_from_here()

    def _hang_up(self) -> None:
        if self._gone:
            return
        self._gone = self._closing = True
        self._forget_waiting()
        exchange, self._exchange, self._tunnel = self._exchange, None, None
        if exchange is not None:
            exchange.hang_up()
            self._release(exchange.request)
