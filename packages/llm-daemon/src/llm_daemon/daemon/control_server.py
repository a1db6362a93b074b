"""The control socket: an open, greeted connection is a lease; the kernel ends it when its process ends."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol, cast

from .. import errors
from ..core import control
from ..core.events import Joined, Left, Wire
from ..faults import fp
from . import identity

log = logging.getLogger("llm_daemon")
HELLO_WAIT = 2.0  # seconds a connection may stay silent
UNREAD = 64 * 2**20  # bytes a client may leave unread
OWN_FILES = 40  # open files we keep for ourselves and an engine: who is here must not suffer from who comes
Say = Callable[..., None]  # say(op, **fields): answers one question, any number of times


class Host(Protocol):
    """What the control server needs of the daemon."""

    def post(self, event: Any) -> None: ...
    def welcome(self) -> dict[str, object]: ...
    def is_deposed(self) -> bool: ...
    def retire(self) -> None: ...
    def ensure(self, lease: str, request: int, message: Wire) -> None: ...
    def call(self, method: str, params: Wire, say: Say) -> Awaitable[dict[str, object]]: ...


@dataclass(slots=True)
class Holder:
    """One lease, for `ps` and `who`.

    `kind`: `client` is a connection, `hold` a process watched for it, `ghost` a retired daemon whose port we serve.
    """

    id: str
    pid: int
    kind: str
    since: float = field(default_factory=monotonic)


class ControlServer:
    """Accepts control connections and keeps the list of holders."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.holders: dict[str, Holder] = {}
        self.connections: dict[str, Connection] = {}
        self.inner: dict[str, Callable[[str, Mapping[str, Any]], None]] = {}  # leases of the daemon's own, and who is told
        self.room = max(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - OWN_FILES)  # connections
        self._server: asyncio.AbstractServer | None = None
        self._born = 0

    async def serve(self, listener: socket.socket) -> None:
        """Begins to accept on a bound and listening socket."""
        listener.setblocking(False)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: Connection(self), sock=listener)

    def close(self) -> None:
        """Accepts nobody any more; open connections stay."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def name(self) -> str:
        self._born += 1
        return f"c{self._born}"

    def tell(self, lease: str, op: str, request: int, **fields: object) -> None:
        """Answers question `request` of a connection; one that has gone meanwhile is normal."""
        if told := self.inner.get(lease):
            told(op, fields)
        elif connection := self.connections.get(lease):
            connection.say(op, id=request, **fields)

    def hold(self, pid: int) -> None:
        """A lease for as long as process `pid` lives.  Raises UsageError if it is not a living process of ours."""
        if not hasattr(os, "pidfd_open"):
            raise errors.UsageError("this system cannot watch another process", hint="use `llm-daemon exec` or `serve` instead")
        try:
            fd = os.pidfd_open(pid)
        except (OSError, ValueError):
            raise errors.UsageError(f"there is no process {pid}") from None
        if os.stat(f"/proc/{pid}").st_uid != os.geteuid():
            os.close(fd)
            raise errors.UsageError(f"process {pid} is not yours")
        if any(h.kind == "hold" and h.pid == pid for h in self.holders.values()):
            os.close(fd)  # once is enough: the shell may ask again and again
            return
        self.keep(fd, pid, "hold")

    def keep(self, fd: int, pid: int, kind: str) -> None:
        """A lease until `fd`, which is ours from now on, becomes readable."""
        lease = self.name()
        self.holders[lease] = Holder(lease, pid, kind)
        self.host.post(Joined(lease))
        loop = asyncio.get_running_loop()

        def gone() -> None:
            loop.remove_reader(fd)
            os.close(fd)
            if self.holders.pop(lease, None):
                self.host.post(Left(lease))

        loop.add_reader(fd, gone)


class Connection(asyncio.Protocol):
    """One control connection, from accept to its end."""

    def __init__(self, server: ControlServer) -> None:
        self.server = server
        self.decoder = control.Decoder()
        self.lease: str | None = None  # name after HELLO
        self.holds = False
        self.is_strange = False  # of another version's protocol
        self.tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        try:
            self.pid, uid = identity.peer(transport.get_extra_info("socket"))
            fp("accepted")
        except OSError:
            self.transport.abort()
            return
        if uid != os.geteuid() and uid != 0 and sys.platform == "linux":  # the folder is ours alone; this is the second lock
            self.transport.abort()
            return
        self.silent = asyncio.get_running_loop().call_later(HELLO_WAIT, self._too_silent)

    def _too_silent(self) -> None:
        if self.lease is None:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        try:
            messages = self.decoder.feed(data)
        except errors.ProtocolError:
            self.transport.close()
            return
        for message in messages:
            if self.transport.is_closing():
                return
            self._message(message)

    def say(self, op: str, **fields: object) -> None:
        if self.transport.is_closing():
            return
        if self.transport.get_write_buffer_size() > UNREAD:  # it asks and does not read
            self.transport.abort()
            return
        self.transport.write(control.encode({"op": op, **fields}))

    def _message(self, message: dict[str, Any]) -> None:
        op = message["op"]
        if op == "PING":
            self.say("PONG")
        elif op == "RETIRE":
            self.server.host.retire()
        elif op == "HELLO":
            self._hello(message)
        elif self.is_strange:
            pass  # what it wanted, said in the same breath as HELLO; RETIRE may follow
        elif self.lease is None or not isinstance(message.get("id"), int):
            self.transport.close()
        elif op == "ENSURE" and self.holds:
            self.server.host.ensure(self.lease, message["id"], message)
        elif op == "CALL":
            task = asyncio.get_running_loop().create_task(self._call(message))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        else:
            error = errors.RemoteProtocolError(f"cannot answer {op!r} here")
            self.say("ERROR", id=message["id"], error=error.to_wire())

    def _hello(self, message: dict[str, Any]) -> None:
        fp("hello_read")
        host = self.server.host
        if self.lease is not None:
            self.transport.close()
            return
        if not control.accepts(message.get("proto")):
            self.say("OLD", proto=control.PROTO, version=host.welcome()["version"])
            self.is_strange = True
            return  # the connection stays for a RETIRE; silence ends it
        if host.is_deposed():
            self.say("GOING")
            self.transport.close()
            return
        if len(self.server.connections) >= self.server.room:
            full = errors.Unavailable(
                f"the daemon's open files are used up by {len(self.server.connections)} clients",
                code="no_resources", hint="end some, or raise the limit (ulimit -n) and restart the daemon",
            )  # fmt: skip
            self.say("ERROR", error=full.to_wire())
            self.transport.close()
            return
        self.silent.cancel()
        self.lease = self.server.name()
        self.server.connections[self.lease] = self
        self.holds = message.get("lease") is not False
        # The lease is counted before WELCOME leaves: whoever reads WELCOME is safe from an idle exit (invariant S4).
        if self.holds:
            self.server.holders[self.lease] = Holder(self.lease, self.pid, "client")
            host.post(Joined(self.lease))
            fp("lease_added")
        self.say("WELCOME", proto=control.PROTO, **host.welcome())
        fp("welcome_sent")

    async def _call(self, message: dict[str, Any]) -> None:
        request = message["id"]

        def say(op: str, **fields: object) -> None:
            self.say(op, id=request, **fields)

        try:
            params = message.get("params") or {}
            if not isinstance(params, dict):
                raise errors.RemoteProtocolError("params must be an object")
            result = await self.server.host.call(str(message.get("method")), params, say)
            say("RESULT", result=result)
        except errors.LlmDaemonError as e:
            say("ERROR", error=e.to_wire())
        except Exception as e:
            log.exception("%s failed", message.get("method"))
            bug = errors.Bug(f"{message.get('method')} failed inside the daemon: {e!r}", hint="please report this")
            say("ERROR", error=bug.to_wire())

    def connection_lost(self, exc: Exception | None) -> None:
        if hasattr(self, "silent"):
            self.silent.cancel()
        for task in self.tasks:
            task.cancel()
        if self.lease is not None:
            del self.server.connections[self.lease]
            if self.holds:
                del self.server.holders[self.lease]
                self.server.host.post(Left(self.lease))
