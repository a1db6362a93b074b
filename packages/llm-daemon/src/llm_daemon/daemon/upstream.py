"""One call to an engine at its address (address.py); closing the connection is what stops a generation.

Idle connections are kept for a moment, because a new one costs more than the rest of a relayed request.  A reused
one may have been closed by the engine at that very time: then, if not one byte came back, the call is made once more
on a fresh connection.

An engine that `confirms` is told of a hang-up by half-closing the connection, and its own closing tells us that it has
let go: only then its slot is free.  One that is `deaf` to hang-ups is waited for: it closes when it has said all.  The others
are closed at once.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Protocol, cast

from ..errors import LlmDaemonError, RemoteProtocolError
from .address import connect_tcp, tcp
from .heads import Answers
from .http1 import Head, ResponseReader

LET_GO = 5.0  # seconds an engine that confirms may need to let go of a request; then its connection is torn down
OUTLAST = 600.0  # seconds a deaf one may need for the rest of its answer
_BACKLOG_WAIT = 5.0  # seconds to go on knocking while the engine's accept queue is full (cpp-httplib's holds 5)


class Sink(Protocol):
    """Who gets the answer of a call: any number of `answer`, ended by one with `last`, or one `lost`.  Nothing after `abort`."""

    def answer(self, head: Head | None, body: list[bytes], last: bool) -> None:
        """The head with the first call, pieces of the body as they came, whether the answer is complete."""
        ...

    def lost(self, reason: str, error: LlmDaemonError | None = None) -> None:
        """The engine cannot be reached, broke off or broke the protocol; `error` if somebody knows better why."""
        ...

    def hold_back(self, full: bool) -> None:
        """Whether more sent to the engine would only pile up here."""
        ...


class Call:
    """One request on its way; `abort` tells the engine at once, before it returns."""

    __slots__ = ("_link", "_pool", "_task", "confirms", "deaf", "may_switch", "message", "path", "sink", "started")

    def __init__(
        self, pool: Pool, path: str, message: bytes, sink: Sink, confirms: bool, may_switch: bool, deaf: bool = False
    ) -> None:
        self.path, self.message, self.sink, self._pool = path, message, sink, pool
        self.confirms, self.may_switch, self.deaf = confirms, may_switch, deaf
        self.started = False  # a byte came back
        self._link: Link | None = None
        self._task: asyncio.Task[None] | None = None
        if (link := pool.take(path)) is not None:
            self._send(link)
        else:
            self.connect()

    def abort(self, let_go: Callable[[], None] | None = None) -> None:
        """`let_go` is called once, when the engine has: before this returns, or within LET_GO (OUTLAST) seconds."""
        task, link = self._task, self._link
        self.close()
        if task is not None:
            task.cancel()
        if link is not None and let_go is not None and (self.confirms or self.deaf):
            link.leave(let_go, self.deaf)
            return
        if link is not None:
            link.kill()
        if let_go is not None:
            let_go()

    def write(self, data: bytes) -> None:
        """More bytes for the engine, behind an answer that switched protocols."""
        if self._link is not None:
            self._link.transport.write(data)

    def pause(self) -> None:
        """Reads no more of the answer until `resume`: the client is slower than the engine."""
        if self._link is not None:
            self._link.transport.pause_reading()

    def resume(self) -> None:
        if self._link is not None:
            self._link.transport.resume_reading()

    @property
    def is_paused(self) -> bool:
        return self._link is not None and not self._link.transport.is_reading()

    def connect(self) -> None:
        """Makes the call on a connection of its own."""
        self._link = None
        self._task = asyncio.get_running_loop().create_task(self._connect())

    def close(self) -> None:
        """Forgets everything: the call is over."""
        self._pool.calls.discard(self)
        self._task = self._link = None
        self.message = b""

    def _send(self, link: Link) -> None:
        self._link = link
        link.send(self)

    async def _connect(self) -> None:
        try:
            link = await self._pool.link(self.path)
        except OSError as e:
            self.close()
            self.sink.lost(f"cannot connect to it: {e.strerror or e}")
        else:
            self._task = None
            self._send(link)


class Link(asyncio.Protocol):
    """One connection to an engine, and the call that uses it now, if any."""

    transport: asyncio.Transport

    def __init__(self, pool: Pool, path: str, sock: socket.socket) -> None:
        self.path, self._pool, self._sock = path, pool, sock
        self._reader = ResponseReader(pool.answers)
        self._call: Call | None = None
        self._used = self._dead = False
        self._let_go: Callable[[], None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def send(self, call: Call) -> None:
        self._call = call
        self._reader.reset(call.may_switch)
        if self._dead:  # closed by the engine between connect and now
            self._lost(call, None)
            return
        self.transport.write(call.message)

    def kill(self) -> None:
        """Closes the connection now: the transport alone would do so only in the loop's next round."""
        self._call, self._dead = None, True
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self.transport.abort()
        self._gone()

    def leave(self, let_go: Callable[[], None], deaf: bool = False) -> None:
        """Tells the engine that nobody waits any more (a `deaf` one nothing), and `let_go` when it has closed its side."""
        self._call, self._let_go = None, let_go
        if self._dead:
            self._gone()
            return
        self._pool.leaving.add(self)
        if not deaf:
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)
        self.transport.resume_reading()  # a slow client may have paused it: its end would not be seen
        self._timer = asyncio.get_running_loop().call_later(OUTLAST if deaf else LET_GO, self.kill)

    def _gone(self) -> None:
        self._pool.leaving.discard(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        let_go, self._let_go = self._let_go, None
        if let_go is not None:
            let_go()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        call = self._call
        if self._let_go is not None:  # what it had still to say
            return
        if call is None:  # an answer nobody asked for
            self._pool.forget(self)
            self.kill()
            return
        call.started, call.message = True, b""  # from here on it is not made again
        self._pool.speaking.add(self.path)
        try:
            head, body, last = self._reader.feed(data)
        except RemoteProtocolError as e:
            self.kill()
            call.close()
            call.sink.lost(e.message)
            return
        if last:
            self._call = None
            call.close()
            self._used = True
            # First: whoever is served next may want it.  Fit is what is alive and had its last request read in full.
            self._pool.put(self, self._reader.reusable and self.transport.get_write_buffer_size() == 0)
        if last or body or head is not None:
            call.sink.answer(head, body, last)

    def eof_received(self) -> None:
        if self.transport.get_write_buffer_size():  # the loop would close it only when the engine has taken that
            self.transport.abort()

    def pause_writing(self) -> None:
        if self._call is not None:
            self._call.sink.hold_back(True)

    def resume_writing(self) -> None:
        if self._call is not None:
            self._call.sink.hold_back(False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._dead = True
        self._pool.forget(self)
        self._gone()
        call, self._call = self._call, None
        if call is not None:
            self._lost(call, exc)

    def _lost(self, call: Call, exc: Exception | None) -> None:
        self._call = None
        head = self._reader.head
        if head is not None and head.until_close and exc is None:
            call.close()
            call.sink.answer(None, [], True)
        elif self._used and not call.started:
            call.connect()
        else:
            call.close()
            call.sink.lost("it closed the connection")


class Pool:
    """Calls, and idle connections by address: at most `keep` for each, closed after about `idle` seconds."""

    def __init__(self, *, keep: int = 8, idle: float = 2.0) -> None:
        self._keep, self._idle_for = keep, idle
        self._idle: dict[str, list[tuple[Link, float]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self.calls: set[Call] = set()
        self.answers = Answers()
        self.leaving: set[Link] = set()  # told to let go of their last call
        self.speaking: set[str] = set()  # paths of engines that sent something since `heard` was asked

    def call(
        self, path: str, message: bytes, sink: Sink, *, confirms: bool = False, may_switch: bool = False, deaf: bool = False
    ) -> Call:
        """Sends `message` to the engine at the address `path`; the sink hears of it later, never before this returns.

        `confirms`: the engine notices a half-closed connection and closes it when it has let go of the request.  `deaf`: it
        notices nothing, and was asked to close the connection after its answer.
        `may_switch`: its answer may switch protocols; then `Call.write` sends more.
        """
        call = Call(self, path, message, sink, confirms, may_switch, deaf)
        self.calls.add(call)
        return call

    def open(self, path: str) -> list[Call]:
        """Calls to `path` that are on their way."""
        return [call for call in self.calls if call.path == path]

    def heard(self, path: str) -> bool:
        """Whether a byte came from `path` since this was asked last."""
        spoke = path in self.speaking
        self.speaking.discard(path)
        return spoke

    def cut(self, path: str | None = None, error: LlmDaemonError | None = None) -> None:
        """Closes every connection to `path` (None: to all).  Open calls are lost; an engine stops faster without them."""
        for call in [c for c in self.calls if path in (None, c.path)]:
            if call in self.calls:  # the loss of one may end another
                call.abort()
                call.sink.lost("its connections were cut", error)
        for link in [link for link in self.leaving if path in (None, link.path)]:
            link.kill()
        for key in list(self._idle) if path is None else [path]:
            for link, _ in self._idle.pop(key, ()):
                link.kill()
        if not self._idle and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def link(self, path: str) -> Link:
        """A fresh connection.  Raises OSError."""
        loop = asyncio.get_running_loop()
        if (place := tcp(path)) is not None:
            sock = await connect_tcp(place)
        else:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if place is not None:
                _, link = await loop.create_connection(lambda: Link(self, path, sock), sock=sock)
                return link
            sock.setblocking(False)
            deadline = loop.time() + _BACKLOG_WAIT
            while True:
                try:  # a unix socket connects at once or not at all, so there is nothing to wait for but the accept queue
                    sock.connect(path)
                    break
                except BlockingIOError:
                    if loop.time() > deadline:
                        raise
                    await asyncio.sleep(0.005)
            _, link = await loop.create_unix_connection(lambda: Link(self, path, sock), sock=sock)
        except BaseException:
            sock.close()
            raise
        return link

    # -- called by calls and links

    def take(self, path: str) -> Link | None:
        """An idle connection that still seems alive; the last one used, so that the others can grow old."""
        idle = self._idle.get(path)
        if not idle:
            return None
        link, _ = idle.pop()
        if not idle:
            del self._idle[path]
        return link

    def put(self, link: Link, fit: bool) -> None:
        """Keeps a connection whose call is complete and that is fit for another, or closes it."""
        idle = self._idle.get(link.path, [])
        if not fit or len(idle) >= self._keep:
            link.kill()
            return
        link.transport.resume_reading()  # a slow client may have paused it with its last piece
        idle.append((link, monotonic()))
        self._idle[link.path] = idle
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._idle_for, self._sweep)

    def forget(self, link: Link) -> None:
        """Drops a connection that the engine closed while it was idle."""
        idle = [pair for pair in self._idle.pop(link.path, ()) if pair[0] is not link]
        if idle:
            self._idle[link.path] = idle

    def _sweep(self) -> None:
        self._timer = None
        for idle in list(self._idle.values()):
            for link, since in list(idle):
                if monotonic() - since >= self._idle_for * 0.99:
                    self.forget(link)
                    link.kill()
        if self._idle:  # no wake-ups once nothing is left
            self._timer = asyncio.get_running_loop().call_later(self._idle_for, self._sweep)
