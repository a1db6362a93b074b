"""The daemon's HTTP face: reads requests, asks the desk for a turn, relays the engine's bytes.

Protocols on both sides, no streams and no task per request: a relayed chunk costs one parse and one write.  The desk
(the daemon's core behind it) decides who may run when and where; nothing here does.  Everything runs on the loop's
thread.  Why not a web framework: architecture.md section 7 has the numbers, `benchmarks/gateway.py` measures them.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol
from urllib.parse import unquote

import msgspec

from ..core.openai import error_body, read_wanted
from ..errors import Bug, EngineError, LlmDaemonError, Unavailable, UsageError
from .connection import Connection
from .guard import Guard
from .http1 import Head, Request, chunk, request_bytes
from .upstream import Call, Pool

RELAYED = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings"})
ANSWERED = frozenset({"/health", "/v1/models"})
_BACKLOG = 1024
_FORWARDED = (b"content-type", b"accept", b"user-agent")


class Ask(msgspec.Struct, frozen=True):
    """A request that wants an engine.  `model` is None when the body names none; `via` is `tcp` or `unix`."""

    ticket: str
    path: str
    model: str | None
    stream: bool
    via: str


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes: the engine's unix socket.  `headers` are added to what the engine gets (a key of its own)."""

    instance: str
    socket: str
    headers: tuple[tuple[str, str], ...] = ()


class Turn(Protocol):
    """A waiting request, as the desk sees it.  Calls that come too late (the client is gone) do nothing."""

    def run(self, route: Route) -> None:
        """The slot is yours: relay now."""
        ...

    def refuse(self, error: LlmDaemonError) -> None:
        """Ends the ticket, waiting or running: the client gets the error, `Retry-After` from `error.data["retry_after"]`."""
        ...


class Desk(Protocol):
    """Who decides.  Exactly one of `cancel`, `ended` and the desk's own `Turn.refuse` ends each ticket."""

    def open(self, ask: Ask, turn: Turn) -> None:
        """A new ticket.  `turn` may be called at once or later; raising an LlmDaemonError refuses it."""
        ...

    def cancel(self, ticket: str) -> None:
        """The client is gone, waiting or running.  The engine's connection is closed already."""
        ...

    def ended(self, ticket: str, served: bool = False) -> None:
        """After `Turn.run`: the engine has answered in full (`served`), or is gone."""
        ...

    def lost(self, ask: Ask, turn: Turn, error: LlmDaemonError) -> bool:
        """After `Turn.run`: the engine is gone before its first byte, and nothing was told to the client.

        True takes the ticket back: it waits again, `turn.run` or `turn.refuse` follows.  False: it is over, and `ended` follows.
        """
        ...

    def models(self) -> list[dict[str, object]]:
        """The `data` of `GET /v1/models`, one object with an `id` for each model."""
        ...

    def health(self) -> dict[str, object]:
        """The body of `GET /health`."""
        ...


class Gateway:
    """Serves HTTP for a desk.

    `token` None asks for no token; `hosts` allows host names besides loopback's own (see guard.py).  A body may have
    `body_limit` bytes; `pipeline` requests of one connection may wait behind its current one.
    """

    def __init__(
        self,
        desk: Desk,
        *,
        token: str | None,
        hosts: Callable[[str], bool] | frozenset[str] = frozenset(),
        body_limit: int = 64 * 1024 * 1024,
        pipeline: int = 64,
        pool: Pool | None = None,
    ) -> None:
        self.desk, self.body_limit, self.pipeline = desk, body_limit, pipeline
        self.pool = pool or Pool()
        self.connections: set[Connection] = set()
        self.closing = False
        self.busy = 0  # tickets that have no end yet
        self._guard = Guard(token, hosts)
        self._tcp: asyncio.Server | None = None
        self._unix: asyncio.Server | None = None
        # Tickets of two daemons in one log must differ.
        self._prefix, self._count = secrets.token_hex(3), 0
        self._empty = asyncio.Event()

    async def serve(self, tcp: socket.socket | None, unix: socket.socket | None) -> None:
        """Listens on bound sockets, which are ours from now on; returns once it does.

        Who bound the unix socket removes its file at the end (Python 3.13's own loop already does).
        """
        loop = asyncio.get_running_loop()
        if tcp is not None:
            tcp.setblocking(False)
            port = tcp.getsockname()[1]
            self._tcp = await loop.create_server(lambda: Connection(self, port), sock=tcp, backlog=_BACKLOG)
        if unix is not None:
            unix.setblocking(False)
            self._unix = await loop.create_unix_server(lambda: Connection(self, None), sock=unix, backlog=_BACKLOG)

    def leave_port(self) -> None:
        """Accepts nobody any more on TCP; open connections stay."""
        if self._tcp is not None:
            self._tcp.close()
            self._tcp = None

    def close(self) -> None:
        """Stops listening, answers whoever still waits with 503, breaks off running answers and closes all connections."""
        self.closing = True
        for server in (self._tcp, self._unix):
            if server is not None:
                server.close()
        for connection in list(self.connections):
            connection.shut(Unavailable("the daemon is going", code="draining", retry_after=1))
        self.pool.cut()
        if not self.connections:
            self._empty.set()

    async def wait_closed(self, timeout: float = 1.0) -> None:
        """After `close`: until the last bytes are out, for `timeout` seconds at most; then connections are torn down."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._empty.wait()
        for connection in list(self.connections):
            connection.transport.abort()
        await self._empty.wait()

    def cut(self, socket_path: str) -> None:
        """Closes every connection to one engine, before it is told to stop: an open stream would delay it (engines.md, 5)."""
        self.pool.cut(socket_path)

    # -- called by connections

    def forget(self, connection: Connection) -> None:
        self.connections.discard(connection)
        if self.closing and not self.connections:
            self._empty.set()

    def judge(self, port: int | None, request: Request) -> LlmDaemonError | None:
        """The reason to refuse a request whose head was read; `port` is None on the unix socket."""
        path = request.path
        if port is not None and (error := self._guard.check(request, port, open_to_all=path == "/health")) is not None:
            return error
        if path in RELAYED:
            return _judge_post(request)
        if path in ANSWERED or path.startswith("/v1/models/"):
            return None if request.method in ("GET", "HEAD") else _wrong_method(request, "GET, HEAD")
        known = ", ".join(sorted(RELAYED | ANSWERED))
        return UsageError(f"no route {path[:100]}", code="unknown_route", status=404, hint=f"routes are {known}")

    def handle(self, request: Request, connection: Connection) -> Exchange | None:
        """Answers a request, or returns the exchange that will.  The exchange is not opened yet."""
        if request.error is not None:
            connection.reply_error(request, request.error)
        elif request.path in RELAYED:
            try:
                wanted = read_wanted(request.body)
            except UsageError as e:
                connection.reply_error(request, e)
            else:
                self._count += 1
                via = "unix" if connection.port is None else "tcp"
                ask = Ask(f"{self._prefix}-{self._count}", request.path, wanted.model or None, bool(wanted.stream), via)
                return Exchange(self, connection, request, ask)
        else:
            try:
                connection.reply(request, 200, msgspec.json.encode(self._answer(request.path)))
            except LlmDaemonError as e:
                connection.reply_error(request, e)
            except Exception as e:
                connection.reply_error(request, report(e))
        return None

    def _answer(self, path: str) -> dict[str, object]:
        if path == "/health":
            return self.desk.health()
        models = self.desk.models()
        if path == "/v1/models":
            return {"object": "list", "data": models}
        wanted = unquote(path.removeprefix("/v1/models/"))
        for model in models:
            if model.get("id") == wanted:
                return model
        raise UsageError(f"no model {wanted[:100]!r}", code="unknown_model", status=404, hint="GET /v1/models lists them")


class Exchange:
    """One ticket: a client's request, its turn with the desk, the engine's answer."""

    __slots__ = (
        "_call", "_chunked", "_connection", "_gateway", "_head", "_keep", "_opened",
        "_ran", "_replayed", "_request", "_route", "_state", "_tail", "ask",
    )  # fmt: skip

    def __init__(self, gateway: Gateway, connection: Connection, request: Request, ask: Ask) -> None:
        self.ask, self._gateway, self._connection, self._request = ask, gateway, connection, request
        self._state = "new"  # new → waiting → running → over
        self._route: Route | None = None
        self._call: Call | None = None
        self._opened = self._ran = 0.0
        self._head: Head | None = None
        self._chunked = False  # how the client gets the body
        self._replayed = False  # taken back by the desk once: never a second time
        self._keep = True  # the client can tell where the answer ends
        self._tail = b""  # last piece of an event stream

    def open(self) -> None:
        self._state, self._opened = "waiting", perf_counter()
        self._gateway.busy += 1
        try:
            self._gateway.desk.open(self.ask, self)
        except LlmDaemonError as e:
            self.refuse(e)
        except Exception as e:
            self.refuse(report(e))

    # -- called by the desk

    def run(self, route: Route) -> None:
        if self._state != "waiting":
            return
        self._state, self._route, self._ran = "running", route, perf_counter()
        given = self._request.headers
        headers = [(name, given[name]) for name in _FORWARDED if name in given]
        if route.headers:
            headers += [(name.encode("ascii"), value.encode("ascii")) for name, value in route.headers]
        message = request_bytes(self.ask.path, headers, self._request.body)
        self._call = self._gateway.pool.call(route.socket, message, self)

    def refuse(self, error: LlmDaemonError) -> None:
        if self._state != "over":
            self._stop()
            self._give(error)

    # -- called by the connection

    def hang_up(self) -> None:
        """The client is gone."""
        if self._state != "over":
            self._stop()
            self._gateway.desk.cancel(self.ask.ticket)

    def break_off(self, error: LlmDaemonError) -> None:
        """The daemon goes: the client gets the error, the ticket is cancelled."""
        if self._state != "over":
            self._stop()
            self._gateway.desk.cancel(self.ask.ticket)
            self._give(error)

    def pause(self) -> None:
        if self._call is not None:
            self._call.pause()

    def resume(self) -> None:
        if self._call is not None:
            self._call.resume()

    # -- called by the engine's side

    def answer(self, head: Head | None, body: list[bytes], last: bool) -> None:
        out = []
        if head is not None:
            self._request.body = b""  # no way back from here
            out.append(self._begin(head))
        if self._chunked:
            # Framed anew, piece by piece as they came: an engine that breaks off inside a chunk then leaves us at the
            # end of one, and nothing in its framing (extensions, trailers, lies) reaches the client.
            out += [chunk(piece) for piece in body]
            if last:
                out.append(b"0\r\n\r\n")
        else:
            out += body
        if body:
            self._tail = body[-1]
        if out:
            self._connection.write(b"".join(out))
        if last:
            self._end()
            self._gateway.desk.ended(self.ask.ticket, served=True)
            self._connection.finished(self._request, keep=self._keep)

    def lost(self, reason: str, error: LlmDaemonError | None = None) -> None:
        instance = self._route.instance if self._route else "?"
        error = error or EngineError(
            f"the engine of {instance} did not answer in full: {reason}",
            code="engine_gone",
            hint="ask again; `llm-daemon logs` shows the engine's last words",
        )
        if self._head is None and not self._replayed:
            self._replayed, self._state, self._call = True, "waiting", None
            if self._gateway.desk.lost(self.ask, self, error):
                return
            self._replayed = False
        self._end()
        self._gateway.desk.ended(self.ask.ticket)
        self._give(error)

    # -- inside

    def _stop(self) -> None:
        """Lets go of the engine, and of the ticket."""
        if self._call is not None:
            self._call.abort()
        self._end()

    def _end(self) -> None:
        self._state, self._call = "over", None
        self._gateway.busy -= 1

    def _own_headers(self) -> bytes:
        """Header lines of the ticket."""
        now, ticket = perf_counter(), self.ask.ticket
        if self._route is None:
            text = f"X-LLM-Ticket: {ticket}\r\nServer-Timing: queue;dur={(now - self._opened) * 1e3:.3f}\r\n"
        else:
            timing = f"queue;dur={(self._ran - self._opened) * 1e3:.3f}, engine;dur={(now - self._ran) * 1e3:.3f}"
            instance = self._route.instance
            if not (instance.isascii() and instance.isprintable()):  # a model's name may hold anything
                instance = ascii(instance)
            text = f"X-LLM-Ticket: {ticket}\r\nX-LLM-Instance: {instance}\r\nServer-Timing: {timing}\r\n"
            if self._replayed:
                text += "X-LLM-Replayed: 1\r\n"
        return text.encode("ascii")

    def _begin(self, head: Head) -> bytes:
        """Our head for the engine's answer: its status line and end-to-end headers, our framing."""
        self._head, old = head, self._request.version == "1.0"
        self._chunked = head.chunked and not old
        lines = [b"HTTP/1.1 %d %b\r\n" % (head.status, head.reason), *head.lines, self._own_headers()]
        if self._chunked:
            lines.append(b"Transfer-Encoding: chunked\r\n")
        elif head.chunked or head.until_close:
            self._keep = False
        elif head.length is not None:
            lines.append(b"Content-Length: %b\r\n" % head.length)
        if old or not (self._keep and self._request.keep_alive):
            lines.append(b"Connection: close\r\n")
        return b"".join(lines) + b"\r\n"

    def _give(self, error: LlmDaemonError) -> None:
        """The error in the way that is still open: an answer, an event at the end of a stream, a body cut short."""
        if self._head is None:
            self._connection.reply_error(self._request, error, [self._own_headers()])
            self._connection.finished(self._request)
            return
        keep = False
        if self._head.content_type.startswith(b"text/event-stream") and self._head.length is None:
            # An event broken off in its middle is closed first, else ours would be read as its end.
            gap = b"" if not self._tail or self._tail.endswith((b"\n\n", b"\r\n\r\n")) else b"\n\n"
            event = b"%bdata: %b\n\n" % (gap, error_body(error))
            self._connection.write(chunk(event) + b"0\r\n\r\n" if self._chunked else event)
            keep = self._chunked
        self._connection.finished(self._request, keep=keep)


def report(error: Exception) -> Bug:
    """Tells the loop's handler about a failure of our own, which must not cost the client its answer."""
    asyncio.get_running_loop().call_exception_handler({"message": "a request failed inside the daemon", "exception": error})
    return Bug(f"the daemon could not take the request: {error!r}")


def _judge_post(request: Request) -> LlmDaemonError | None:
    if request.method != "POST":
        return _wrong_method(request, "POST")
    kind = request.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json" or b"content-type" in request.repeated:
        return UsageError("the body must be sent as content-type application/json", code="bad_content_type", status=415)
    if request.headers.get(b"content-encoding", b"identity").lower() != b"identity":
        return UsageError("the body must not be compressed", code="bad_content_type", status=415)
    return None


def _wrong_method(request: Request, allowed: str) -> LlmDaemonError:
    return UsageError(f"{request.path[:100]} answers {allowed}", code="wrong_method", status=405, allow=allowed)
