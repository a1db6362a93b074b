"""One request that somebody else answers: its turn with the desk, the engine's answer, its one end.

Every way out ends the ticket exactly once: `Desk.cancel` (gone while waiting), the desk's own `Turn.refuse`, or
`Desk.ended` (after `Turn.run`).  A running ticket whose client is gone is over for the client at once, and for the desk
when the engine has let go of it: until then its slot is not free.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING

from ..core.assemble import NOT_IN_STREAM, Assembler, ask_to_stream
from ..core.openai import error_body, rewritten
from ..core.routes import Kind, Route as Way
from ..errors import Bug, EngineError, LlmDaemonError, RemoteProtocolError, UsageError
from .http1 import HEAD_LIMIT, Head, Request
from .route import Route
from .turn import Ask
from .upstream import Call
from .written import chunk, request_bytes

if TYPE_CHECKING:
    from .connection import Connection
    from .gateway import Gateway

# What of a request's head an engine gets to see; what only its own web page needs is for the passed routes.
_FORWARDED: tuple[bytes, ...] = (b"content-type", b"accept", b"user-agent")
_PASSED = (
    *_FORWARDED, b"accept-encoding", b"accept-language", b"cache-control", b"range", b"if-range", b"if-none-match",
    b"if-modified-since", b"last-event-id",
)  # fmt: skip
# With these an event stream is whole, and its client may hang up: chat and completions, messages, responses.
_LAST = re.compile(rb"(?:^|\n)(?:data: ?\[DONE\]|event: ?(?:message_stop|response\.completed))")
_SWITCHING = (b"sec-websocket-key", b"sec-websocket-version", b"sec-websocket-protocol", b"sec-websocket-extensions")


class Exchange:
    """One ticket."""

    # On the class, for most requests need few of them and each costs.
    _state = "new"  # new → waiting → running → over
    _route: Route | None = None
    _call: Call | None = None
    _assembler: Assembler | None = None
    _head: Head | None = None  # of the answer, once some of it was given to the client
    _chunked = False  # how the client gets the body
    _replayed = False  # taken back by the desk once: never a second time
    _keep = True  # the client can tell where the answer ends
    _tail = b""  # last piece of an event stream
    _early = b""  # what a client sent before the engine agreed to switch protocols
    _told = False
    opened = ran = loaded_for = 0.0
    headed = first = 0.0  # perf_counter at the engine's head, and at its first piece of body
    sent = pieces = status = 0
    code = ""

    def __init__(self, gateway: Gateway, connection: Connection, request: Request, way: Way, ask: Ask) -> None:
        self.ask, self._gateway, self._connection, self.request, self._way = ask, gateway, connection, request, way
        self.received = len(request.body)

    @property
    def instance(self) -> str:
        """Who served it, empty if nobody has."""
        return self._route.instance if self._route else ""

    @property
    def replayed(self) -> bool:
        return self._replayed

    def open(self) -> None:
        self._state, self.opened = "waiting", perf_counter()
        self._gateway.busy += 1
        try:
            self._open()
        except LlmDaemonError as e:
            self.refuse(e)
        except Exception as e:
            self.refuse(report(e))

    # -- called by the desk

    def run(self, route: Route, loaded_for: float = 0.0) -> None:
        if self._state != "waiting":
            return
        self._state, self._route, self.ran, self.loaded_for = "running", route, perf_counter(), loaded_for
        path, body = self._way.path, self.request.body
        if not self.ask.stream and path in route.assembled and (asked := ask_to_stream(path, body)) is not None:
            body, self._assembler = asked
        self._start(route, body)

    def _start(self, route: Route, body: bytes) -> None:
        deaf = False
        if not route.plain:
            try:
                body = self._adapted(route, body)
            except UsageError as e:
                self._end()
                self._ended(False)
                self._give(e)
                return
            deaf = self._is_deaf(route)
        self._call = self._gateway.pool.call(
            route.socket, self._message(route, body), self, confirms=route.confirms, may_switch=self.request.tunnel, deaf=deaf
        )

    def _adapted(self, route: Route, body: bytes) -> bytes:
        """The body as this engine wants it.  Raises UsageError for a request that it cannot serve."""
        way = self._way
        if way.kind is not Kind.RELAYED:
            return body
        if route.only is not None and way.path not in route.only:
            raise UsageError(
                f"the engine of {route.instance} does not serve {way.path}", code="not_served", status=404,
                hint="it serves " + ", ".join(sorted(route.only)) + "; another model or engine may do what you want",
            )  # fmt: skip
        if way.multipart and not self.request.headers.get(b"content-type", b"").startswith(b"application/json"):
            return body  # a form: its model is a field that no engine insists on
        return rewritten(body, route.served_id, route.drop) if route.served_id or route.drop else body

    def _is_deaf(self, route: Route) -> bool:
        """Whether the engine would finish this answer for nobody."""
        return self._way.path in route.deaf and not self.ask.stream and self._assembler is None

    def refuse(self, error: LlmDaemonError) -> None:
        if self._state == "waiting":
            self._end()
            self._give(error)

    def abort(self, error: LlmDaemonError) -> None:
        if self._state == "running":
            self._leave()
            self._give(error)

    # -- called by the connection

    def hang_up(self) -> None:
        """The client is gone: before its time, or with all it wanted but the framing behind it."""
        is_whole = _LAST.search(self._tail) is not None
        self.code = self.code or ("" if is_whole else "hung_up")
        if self._state == "running":
            self._aborting()
            self._leave(served=is_whole)
            self._over()
        elif self._state != "over":
            self._end()
            self._gone()

    def break_off(self, error: LlmDaemonError) -> None:
        """The daemon goes: the client gets the error, the ticket is cancelled."""
        if self._state != "over":
            self.hang_up()
            self._give(error)

    def client_sent(self, data: bytes) -> None:
        """Bytes behind a request that may switch protocols.

        The engine gets them when it has: an engine that declines would take them for the next request, unseen by us.
        """
        if self._is_switched:
            if self._call is not None:
                self._call.write(data)
        elif len(self._early) + len(data) > HEAD_LIMIT:
            self._connection.transport.abort()
        else:
            self._early += data

    @property
    def _is_switched(self) -> bool:
        return self._head is not None and self._head.status == 101

    def pause(self) -> None:
        if self._call is not None:
            self._call.pause()

    def resume(self) -> None:
        if self._call is not None:
            self._call.resume()

    # -- called by the engine's side

    def answer(self, head: Head | None, body: list[bytes], last: bool) -> None:
        if body:
            self.first = self.first or perf_counter()
            self.pieces += len(body)
        if self._assembler is not None and self._swallow(head, body, last):
            return
        out = []
        if head is not None:
            self.headed = perf_counter()
            self.request.body = b""  # no way back from here
            out.append(self._begin(head))
            if self.request.method == "HEAD":
                body, last = [], last or self._skip_body()
        if self._chunked:
            # Framed anew, piece by piece as they came: an engine that breaks off inside a chunk then leaves us at the
            # end of one, and nothing in its framing (extensions, trailers, lies) reaches the client.
            out += [chunk(piece) for piece in body]
            if last and self.request.method != "HEAD":
                out.append(b"0\r\n\r\n")
        else:
            out += body
        if body:
            self._tail = body[-1]
        if out:
            self._write(b"".join(out))
        if self._early and self._is_switched and self._call is not None:
            self._call.write(self._early)
            self._early = b""
        if last:
            self._finish()

    def lost(self, reason: str, error: LlmDaemonError | None = None) -> None:
        error = error or EngineError(
            f"the engine of {self.ask.model or self.instance or '?'} did not answer in full: {reason}",
            code="engine_gone",
            hint="ask again; `llm-daemon logs` shows the engine's last words",
        )
        if self._head is None and not self._replayed:
            self._replayed, self._state, self._call, self._assembler = True, "waiting", None, None
            if self._lost(error):
                return
            self._replayed = False
        self._end()
        self._ended(False)
        self._give(error)

    def hold_back(self, full: bool) -> None:
        # Of a request's body everything is here already, and a client we do not listen to cannot hang up.
        if self._is_switched:
            self._connection.hold_back(full)

    # -- the desk, for those who have a ticket; a visit has none

    def _open(self) -> None:
        self._gateway.desk.open(self.ask, self)

    def _gone(self) -> None:
        self._gateway.desk.cancel(self.ask.ticket)
        self._over()

    def _aborting(self) -> None:
        self._gateway.desk.aborting(self.ask.ticket)

    def _ended(self, served: bool) -> None:
        self._gateway.desk.ended(self.ask.ticket, served)

    def _lost(self, error: LlmDaemonError) -> bool:
        return self._gateway.desk.lost(self.ask, self, error)

    # -- inside

    def _message(self, route: Route, body: bytes) -> bytes:
        """What the engine is asked."""
        request, way = self.request, self._way
        memo = request.memo if self._assembler is None and route.plain else None
        if memo is not None and (head := memo.get(way.path)) is not None:
            return head % (len(body), body)
        given, names = request.headers, _FORWARDED
        target, method = route.paths.get(way.path, way.path).encode("latin-1"), b"POST"
        if way.kind is not Kind.RELAYED:
            names, method = _PASSED, request.method.encode()
            method = b"GET" if method == b"HEAD" else method  # its answer's head alone would not say where the body ends
            target += b"?" + request.query if request.query else b""
        headers = [(name, given[name]) for name in names if name in given]
        if self._assembler is not None:
            headers = [(b"content-type", b"application/json"), (b"accept", b"text/event-stream")]
        if request.tunnel:
            headers += [(name, given[name]) for name in _SWITCHING if name in given]
            headers += [(b"connection", b"upgrade"), (b"upgrade", b"websocket")]
        if route.headers:
            headers += [(name.encode("ascii"), value.encode("ascii")) for name, value in route.headers]
        if not route.plain and self._is_deaf(route):
            headers.append((b"connection", b"close"))  # its end is how we learn that the slot is free
        if memo is not None and way.kind is Kind.RELAYED:
            memo[way.path] = (
                request_bytes(target, headers, b"", b"POST")
                .replace(b"%", b"%%")
                .replace(b"Content-Length: 0\r\n\r\n", b"Content-Length: %d\r\n\r\n%b")
            )
        return request_bytes(target, headers, body, method)

    def _leave(self, served: bool = False) -> None:
        """Lets go of the engine; the ticket ends when the engine has let go of it."""
        call, self._call, self._state = self._call, None, "over"

        def let_go() -> None:
            self._gateway.busy -= 1
            self._ended(served)

        if call is None:
            let_go()
        else:
            call.abort(let_go)

    def _over(self) -> None:
        """For the client it is over, whatever the engine still does."""
        if not self._told:
            self._told = True
            self._gateway.over(self)

    def _end(self) -> None:
        self._state, self._call = "over", None
        self._gateway.busy -= 1

    def _finish(self) -> None:
        """The engine has answered in full."""
        self._end()
        self._ended(True)
        self._over()
        self._connection.finished(self.request, keep=self._keep)

    def _skip_body(self) -> bool:
        """For HEAD: the engine is asked for the whole and let go after its head."""
        call = self._call
        if call is not None:
            call.abort()
        return True

    def _write(self, data: bytes) -> None:
        self.sent += len(data)
        self._connection.write(data)

    def _swallow(self, head: Head | None, body: list[bytes], last: bool) -> bool:
        """Takes a piece of the stream that an answer is made of; False if the engine sent no stream: that is passed on."""
        assert self._assembler is not None
        if head is not None:
            self.headed = perf_counter()
            if head.status != 200 or not head.content_type.startswith(b"text/event-stream"):
                self._assembler = None
                return False
        try:
            for piece in body:
                self._assembler.feed(piece)
            if last:
                status, whole = self._assembler.finish()
        except RemoteProtocolError as e:
            call, self._call = self._call, None
            if call is not None and not last:
                call.abort()
            if e.code == NOT_IN_STREAM and self._route is not None:  # rare, and known only now: asked once more, plainly
                self._assembler = None
                self._start(self._route, self.request.body)
            else:
                self.lost(e.message)
            return True
        if last:
            self.status = status
            headers = [self._own_headers(), *self._gateway.cors(self.request)]
            self._connection.reply(self.request, status, whole, headers, kind=b"application/json; charset=utf-8")
            self.sent += len(whole)
            self._finish()
        return True

    def _own_headers(self) -> bytes:
        """Header lines of the ticket."""
        now, ticket, route = perf_counter(), self.ask.ticket, self._route
        if route is None:
            text = f"X-LLM-Ticket: {ticket}\r\nServer-Timing: queue;dur={(now - self.opened) * 1e3:.3f}\r\n"
        else:
            queue, load = max(0.0, self.ran - self.opened - self.loaded_for) * 1e3, self.loaded_for * 1e3
            text = (
                f"X-LLM-Ticket: {ticket}\r\nX-LLM-Instance: {route.label}\r\n"
                f"Server-Timing: queue;dur={queue:.3f}, load;dur={load:.3f}, engine;dur={(now - self.ran) * 1e3:.3f}\r\n"
            )
            if self._replayed:
                text += "X-LLM-Replayed: 1\r\n"
        return text.encode("ascii")

    def _begin(self, head: Head) -> bytes:
        """Our head for the engine's answer: its status line and end-to-end headers, our framing."""
        self._head, old = head, self.request.version == "1.0"
        self.status = head.status
        lines = [b"HTTP/1.1 %d %b\r\n" % (head.status, head.reason), *head.lines, self._own_headers()]
        if b"origin" in self.request.headers:
            lines += self._gateway.cors(self.request)
        if head.status == 101:
            self._keep = False
            return b"".join([*lines, b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n"])
        self._chunked = head.chunked and not old
        if self._chunked:
            lines.append(b"Transfer-Encoding: chunked\r\n")
        elif head.chunked or head.until_close:
            self._keep = False
        elif head.length is not None:
            lines.append(b"Content-Length: %b\r\n" % head.length)
        if old or not (self._keep and self.request.keep_alive):
            lines.append(b"Connection: close\r\n")
        return b"".join(lines) + b"\r\n"

    def _give(self, error: LlmDaemonError) -> None:
        """The error in the way that is still open: an answer, an event at the end of a stream, a body cut short."""
        self.code = error.code
        if self._head is None:
            self.status = error.status
            headers = [self._own_headers(), *self._gateway.cors(self.request)]
            self._over()
            self._connection.reply_error(self.request, error, headers)
            self._connection.finished(self.request)
            return
        self._over()
        keep = False
        if self._head.content_type.startswith(b"text/event-stream") and self._head.length is None:
            # An event broken off in its middle is closed first, else ours would be read as its end.
            gap = b"" if not self._tail or self._tail.endswith((b"\n\n", b"\r\n\r\n")) else b"\n\n"
            event = b"%bdata: %b\n\n" % (gap, error_body(error))
            self._connection.write(chunk(event) + b"0\r\n\r\n" if self._chunked else event)
            keep = self._chunked
        self._connection.finished(self.request, keep=keep)


def report(error: Exception) -> Bug:
    """Tells the loop's handler about a failure of our own, which must not cost the client its answer."""
    with suppress(RuntimeError):
        asyncio.get_running_loop().call_exception_handler({"message": "a request failed inside the daemon", "exception": error})
    return Bug(f"the daemon could not take the request: {error!r}")
