"""The daemon's HTTP face: reads requests, asks the desk for a turn, relays the engine's bytes.

Protocols on both sides, no streams and no task per request: a relayed chunk costs one parse and one write.  The desk
(the daemon's core behind it) decides who may run when and where; nothing here does.  Everything runs on the loop's
thread.  Why not a web framework: architecture.md section 7 has the numbers, `benchmarks/gateway.py` measures them.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import socket
import ssl
from collections.abc import Callable, Iterable
from contextlib import suppress
from math import isfinite
from typing import Protocol
from urllib.parse import unquote

import msgspec

from ..core import firewall
from ..core.openai import read_form, read_wanted
from ..core.routes import ASIDE, INTERACTIVE, REGULAR, Kind, Route as Way, find, is_open, known
from ..errors import LlmDaemonError, Unavailable, UsageError
from .connection import Connection
from .exchange import Exchange, report
from .guard import Guard
from .heads import Heads
from .http1 import Request
from .route import Route
from .turn import Ask, Turn
from .upstream import Pool
from .visit import Visit

__all__ = ["Ask", "Desk", "Exchange", "Gateway", "Route", "Turn"]

MB = 1024 * 1024
LOOK = 5.0  # seconds between two looks at slow clients, while there are any
METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE"
_BACKLOG = 1024
_EXPOSED = b"Access-Control-Expose-Headers: Retry-After, Server-Timing, X-LLM-Instance, X-LLM-Replayed, X-LLM-Ticket\r\n"
_KEY_LIMIT = 200
_NAMES = re.compile(rb"[\w!#$%&'*+.^`|~-]+(?:\s*,\s*[\w!#$%&'*+.^`|~-]+)*", re.ASCII)  # of headers (RFC 9110, section 5.1)


class Desk(Protocol):
    """Who decides.  Exactly one of `cancel`, `ended` and the desk's own `Turn.refuse` ends each ticket."""

    def open(self, ask: Ask, turn: Turn) -> None:
        """A new ticket.  `turn` may be called at once or later; raising an LlmDaemonError refuses it."""
        ...

    def cancel(self, ticket: str) -> None:
        """The client is gone while its ticket waited."""
        ...

    def aborting(self, ticket: str) -> None:
        """The client of a running ticket is gone.  The engine is being told; `ended` follows when it has let go."""
        ...

    def ended(self, ticket: str, served: bool = False) -> None:
        """After `Turn.run`: the engine has answered in full (`served`), has let go, or is gone."""
        ...

    def lost(self, ask: Ask, turn: Turn, error: LlmDaemonError) -> bool:
        """After `Turn.run`: the engine is gone before its first byte, and nothing was told to the client.

        True takes the ticket back: it waits again, `turn.run` or `turn.refuse` follows.  False: it is over, and `ended` follows.
        """
        ...

    def over(self, exchange: Exchange) -> None:
        """For its client a ticket is over: read its times and sizes, and keep nothing of it."""
        ...

    def models(self) -> list[dict[str, object]]:
        """The `data` of `GET /v1/models`, one object with an `id` for each model."""
        ...

    def health(self) -> dict[str, object]:
        """The body of `GET /health`."""
        ...

    async def admin(self) -> str:
        """The unix socket of the admin app, which is started when this is asked first."""
        ...


class Gateway:
    """Serves HTTP for a desk.

    `token` None asks for no token; `hosts` allows host names besides loopback's own, `origins` web pages besides our own
    (see guard.py).  A body may have `body_limit` bytes, all that are held at one time `held_limit`; `pipeline` requests of
    one connection may wait behind its current one.  A client may take `patience` seconds to send a request, or to take some
    of an answer.  `remote_media`: see core/firewall.py.
    """

    def __init__(
        self,
        desk: Desk,
        *,
        token: str | None,
        hosts: Callable[[str], bool] | frozenset[str] = frozenset(),
        origins: frozenset[str] = frozenset(),
        body_limit: int = 64 * MB,
        held_limit: int = 512 * MB,
        pipeline: int = 64,
        patience: float = 60.0,
        remote_media: bool = False,
        pool: Pool | None = None,
    ) -> None:
        self.desk, self.body_limit, self.held_limit = desk, body_limit, held_limit
        self.pipeline, self.patience = pipeline, patience
        self.pool = pool or Pool()
        self.connections: set[Connection] = set()
        self.slow: set[Connection] = set()  # who is in the middle of sending, or does not take an answer
        self.heads = {
            via: Heads() for via in ("tcp", "unix", "tls")
        }  # what was judged good stays good: no judge changes its mind
        self.closing = False
        self.busy = 0  # tickets that have no end yet
        self.held = 0  # bytes of bodies
        self._remote_media = remote_media
        self._guard = Guard(token, hosts, origins)
        self._remote_guard: Guard | None = None
        self._servers: dict[str, asyncio.Server] = {}
        # Tickets of two daemons in one log must differ.
        self._prefix, self._count = secrets.token_hex(3), 0
        self._empty = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    async def serve(self, tcp: socket.socket | None, unix: socket.socket | None) -> None:
        """Listens on bound sockets, which are ours from now on; returns once it does.

        Who bound the unix socket removes its file at the end (Python 3.13's own loop already does).
        """
        loop = asyncio.get_running_loop()
        if tcp is not None:
            tcp.setblocking(False)
            port = tcp.getsockname()[1]
            self._servers["tcp"] = await loop.create_server(lambda: Connection(self, "tcp", port), sock=tcp, backlog=_BACKLOG)
        if unix is not None:
            unix.setblocking(False)
            self._servers["unix"] = await loop.create_unix_server(
                lambda: Connection(self, "unix", 0), sock=unix, backlog=_BACKLOG
            )

    async def serve_remote(self, tls: socket.socket, context: ssl.SSLContext, key: str) -> None:
        """Listens for other machines too: only over TLS, and with a key of the user's own."""
        self._remote_guard = Guard(key, lambda name: True, self._guard.origins, scheme=b"https")
        tls.setblocking(False)
        port = tls.getsockname()[1]
        self._servers["tls"] = await asyncio.get_running_loop().create_server(
            lambda: Connection(self, "tls", port), sock=tls, backlog=_BACKLOG, ssl=context,
            ssl_handshake_timeout=self.patience, ssl_shutdown_timeout=self.patience,
        )  # fmt: skip

    def leave_port(self) -> None:
        """Accepts nobody any more on TCP; open connections stay."""
        if (server := self._servers.pop("tcp", None)) is not None:
            server.close()

    def close(self) -> None:
        """Stops listening, answers whoever still waits with 503, breaks off running answers and closes all connections."""
        self.closing = True
        for server in self._servers.values():
            server.close()
        if self._timer is not None:
            self._timer.cancel()
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

    def cut(self, socket_path: str, error: LlmDaemonError | None = None) -> None:
        """Closes every connection to one engine, before it is told to stop: an open stream would delay it (engines.md, 5).

        `error`: what their clients are told.
        """
        self.pool.cut(socket_path, error)

    # -- called by connections and exchanges

    def forget(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self.slow.discard(connection)
        if self.closing and not self.connections:
            self._empty.set()

    def over(self, exchange: Exchange) -> None:
        if not isinstance(exchange, Visit):
            self.desk.over(exchange)

    def hold(self, size: int) -> bool:
        """Room for `size` more bytes of a body; False if there is none."""
        if self.held + size > self.held_limit:
            return False
        self.held += size
        return True

    def watch(self, connection: Connection) -> None:
        """A client began something that it must not take too long for."""
        self.slow.add(connection)
        if self._timer is None and not self.closing:
            self._timer = asyncio.get_running_loop().call_later(min(LOOK, self.patience / 4), self._look)

    def _look(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        for connection in list(self.slow):
            connection.look(now)
        if self.slow:  # no wake-ups while nobody is slow
            self._timer = asyncio.get_running_loop().call_later(min(LOOK, self.patience / 4), self._look)

    def judge(self, connection: Connection, request: Request) -> LlmDaemonError | None:
        """The reason to refuse a request whose head was read."""
        path, via = request.path, connection.via
        if via != "unix":
            guard = self._guard if via == "tcp" else self._remote_guard
            assert guard is not None
            to_all = request.method == "OPTIONS" or (via == "tcp" and is_open(path))
            if (error := guard.check(request, connection.port, open_to_all=to_all)) is not None:
                return error
        request.route = way = find(path)
        if way is None:
            hint = f"routes are {', '.join(known())}"
            return UsageError(f"no route {path[:100]}", code="unknown_route", status=404, hint=hint)
        if request.method == "OPTIONS":
            return None
        if way.kind is Kind.RELAYED:
            return _judge_post(request, way)
        if way.kind is Kind.ANSWERED:
            return None if request.method in ("GET", "HEAD") else _wrong_method(request, "GET, HEAD")
        if request.method not in METHODS.split(", "):
            return _wrong_method(request, METHODS)
        if way.kind is Kind.ADMIN and request.method not in ("GET", "HEAD"):
            return _judge_post(request, way)
        upgrade = request.headers.get(b"upgrade", b"").lower() == b"websocket" and way.kind is Kind.PASSED
        upgrade = upgrade and b"upgrade" in request.headers.get(b"connection", b"").lower()
        request.tunnel = upgrade and request.method == "GET" and request.version == "1.1"
        return None

    def handle(self, request: Request, connection: Connection) -> Exchange | None:
        """Answers a request, or returns the exchange that will.  The exchange is not opened yet."""
        way = request.route
        try:
            if request.error is not None:
                raise request.error
            assert way is not None
            if request.method == "OPTIONS":
                connection.reply(request, 204, b"", self._preflight(request))
            elif way.kind is Kind.ANSWERED:
                body = msgspec.json.encode(self._answer(request.path))
                connection.reply(request, 200, body, self.cors(request))
            else:
                ask = self._ask(request, way, connection)
                return (Visit if way.kind is Kind.ADMIN else Exchange)(self, connection, request, way, ask)
        except LlmDaemonError as e:
            connection.reply_error(request, e, self.cors(request))
        except Exception as e:
            connection.reply_error(request, report(e), self.cors(request))
        return None

    # -- inside

    def _ask(self, request: Request, way: Way, connection: Connection) -> Ask:
        """What a request wants.  Raises UsageError for a body or header that cannot be meant."""
        model, stream, lane = unquote(way.model) if way.model else None, True, way.lane
        if way.kind is Kind.RELAYED or (way.kind is Kind.PASSED and request.body):
            kind = request.headers.get(b"content-type", b"")
            if kind.lower().startswith(b"multipart/"):
                found, fields = read_form(request.body, kind)
                firewall.check_form(fields, self._remote_media)
            elif way.kind is Kind.RELAYED or kind.lower().startswith(b"application/json"):
                found = read_wanted(request.body)
                firewall.check(found, request.body, self._remote_media)
            else:
                raise UsageError(
                    "a body must be sent as application/json or multipart/form-data", code="bad_content_type", status=415
                )
            model, stream = model or found.model or None, bool(found.stream)
        elif way.kind is Kind.PASSED:
            lane = ASIDE  # looking at an engine takes none of its slots
        self._count += 1
        ask = Ask(f"{self._prefix}-{self._count}", request.path, model, stream, connection.via, lane, peer=connection.peer)
        if request.wishes:
            ask = self._wished(ask, request)
        return ask

    @staticmethod
    def _wished(ask: Ask, request: Request) -> Ask:
        """The ask with what our own headers say."""
        given = request.headers
        lane, key = ask.lane, ask.supersede
        if (text := given.get(b"x-llm-lane")) is not None:
            named = text.lower().decode("latin-1")
            if named not in (INTERACTIVE, REGULAR):
                raise _bad_header("X-LLM-Lane", f"{INTERACTIVE} or {REGULAR}", text)
            lane = named if lane != ASIDE else lane
        if (text := given.get(b"x-llm-supersede")) is not None:
            key = text.decode("latin-1")
            if not 0 < len(key) <= _KEY_LIMIT:
                raise _bad_header("X-LLM-Supersede", f"a text of 1 to {_KEY_LIMIT} characters", text)
        deadline = _number(given, "X-LLM-Deadline-Ms", "milliseconds, 0 or more")
        keep_alive = _number(given, "X-LLM-Keep-Alive", "seconds, 0 or more")
        return msgspec.structs.replace(
            ask, lane=lane, supersede=key, deadline=None if deadline is None else deadline / 1e3, keep_alive=keep_alive
        )

    def cors(self, request: Request) -> Iterable[bytes]:
        """Header lines that let an allowed web page read the answer."""
        origin = request.headers.get(b"origin")
        if origin is None or not self._guard.is_allowed_origin(origin):
            return ()
        return (b"Access-Control-Allow-Origin: %b\r\nVary: Origin\r\n" % origin, _EXPOSED)

    def _preflight(self, request: Request) -> list[bytes]:
        """The answer to OPTIONS; to a page's question before the request itself (Fetch standard, CORS protocol)."""
        lines = [*self.cors(request), b"Allow: OPTIONS, %b\r\n" % METHODS.encode()]
        if len(lines) > 1 and b"access-control-request-method" in request.headers:
            lines.append(b"Access-Control-Allow-Methods: %b\r\nAccess-Control-Max-Age: 600\r\n" % METHODS.encode())
            # The page is allowed, so whatever its client library wants to say is (OpenAI's sends a dozen of its own).
            wanted = request.headers.get(b"access-control-request-headers", b"")
            if _NAMES.fullmatch(wanted):
                lines.append(b"Access-Control-Allow-Headers: %b\r\n" % wanted)
        return lines

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


def _judge_post(request: Request, way: Way) -> LlmDaemonError | None:
    if request.method != "POST":
        return _wrong_method(request, "POST")
    kind = request.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    wanted = ("multipart/form-data",) if way.multipart else ("application/json",)
    if kind.decode("latin-1") not in wanted or b"content-type" in request.repeated:
        return UsageError(f"the body must be sent as content-type {wanted[0]}", code="bad_content_type", status=415)
    if request.headers.get(b"content-encoding", b"identity").lower() != b"identity":
        return UsageError("the body must not be compressed", code="bad_content_type", status=415)
    return None


def _wrong_method(request: Request, allowed: str) -> LlmDaemonError:
    return UsageError(f"{request.path[:100]} answers {allowed}", code="wrong_method", status=405, allow=allowed)


def _bad_header(name: str, wanted: str, value: bytes) -> UsageError:
    return UsageError(f"header {name} must be {wanted}, not {value[:60].decode('latin-1')!r}", code="bad_header")


def _number(headers: dict[bytes, bytes], name: str, wanted: str) -> float | None:
    text = headers.get(name.lower().encode())
    if text is None:
        return None
    try:
        value = float(text.replace(b"_", b"?"))  # Python's own digit groups are nobody else's
    except ValueError:
        value = -1.0
    if not (isfinite(value) and 0 <= value <= 1e9):
        raise _bad_header(name, wanted, text)
    return value
