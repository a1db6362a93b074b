"""The whole HTTP front in one process: a real Gateway between clients and an engine that send whatever a scenario says.

Clients come over socket pairs, the engine listens on a real unix socket.  After each scenario: every ticket had one end,
nothing is held, no connection or link is left, the loop heard of no exception, clients got well-formed answers and the
engine whole well-formed requests.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from collections import Counter
from random import Random
from time import perf_counter
from typing import Any, cast

import msgspec

from llm_daemon.core.assemble import _KINDS
from llm_daemon.daemon.connection import Connection
from llm_daemon.daemon.exchange import Exchange
from llm_daemon.daemon.gateway import Gateway
from llm_daemon.daemon.http1 import Request
from llm_daemon.daemon.route import Route
from llm_daemon.daemon.turn import Ask, Turn
from llm_daemon.daemon.upstream import Pool
from llm_daemon.errors import LlmDaemonError, Unavailable, UsageError

from . import corpus

HANG = 15.0  # seconds after which a scenario that is not over hangs
HANG_UPS = 4  # close, half-close, reset, stays until the gateway closes
ENDS = 4  # of an engine's answer: stays, close, reset, half-close
VERDICTS = 10  # of the desk, see Desk.open
_REQUEST = re.compile(
    rb"(GET|POST|PUT|PATCH|DELETE) (/[!-~\x80-\xff]*) HTTP/1\.1\r\nHost: localhost\r\n((?:[!-9;-~]+: [^\r\n\0]*\r\n)*)\r\n"
)
_HEAD = re.compile(rb"HTTP/1\.1 ([1-5][0-9][0-9]) [^\r\n]*\r\n((?:[!-9;-~]+:[^\r\n]*\r\n)*)\r\n")
_CHUNKED = re.compile(rb"^transfer-encoding: *chunked\r$", re.IGNORECASE | re.MULTILINE)
_LENGTH = re.compile(rb"^content-length: *([0-9]+)\r$", re.IGNORECASE | re.MULTILINE)


class Scenario(msgspec.Struct):
    """`clients` are the segments each one sends, `order` who sends next, `answers` the engine's, in pieces."""

    clients: list[list[bytes]]
    hang_ups: list[int]
    order: list[int]
    answers: list[list[bytes]]
    ends: list[int]
    verdicts: list[int]
    confirms: bool = False
    deaf: bool = False  # the first client reads nothing
    pipeline: int = 64
    held_limit: int = 1 << 20


def scenario(rng: Random) -> Scenario:
    """A random one."""
    clients = []
    for _ in range(rng.randint(1, 4)):
        data = b"".join(corpus.request(rng) for _ in range(rng.choice((1, 1, 2, 4))))
        clients.append(corpus.cut(rng, data))
    numbers = range(rng.randint(1, 6))
    return Scenario(
        clients,
        [rng.randrange(HANG_UPS) for _ in clients],
        [rng.randrange(len(clients)) for _ in range(rng.randrange(8))],
        [corpus.cut(rng, corpus.engine_answer(rng)) for _ in numbers],
        [rng.randrange(ENDS) for _ in numbers],
        [rng.randrange(VERDICTS) if rng.random() < 0.5 else 0 for _ in range(6)],
        rng.random() < 0.3,
        rng.random() < 0.2,
        rng.choice((1, 3, 64)),
        rng.choice((60, 1 << 20)),
    )


class Desk:
    """Gives each ticket a fate of the scenario's, and counts its ends."""

    def __init__(self, world: World, plan: Scenario) -> None:
        self.world, self.plan, self.asked, self.lost_ones = world, plan, 0, 0
        self.open_tickets: set[str] = set()
        self.told: Counter[str] = Counter()
        self.route = Route("m#1", world.path, assembled=frozenset(_KINDS), confirms=plan.confirms)

    def open(self, ask: Ask, turn: Turn) -> None:
        verdict = self.plan.verdicts[self.asked % len(self.plan.verdicts)] if self.plan.verdicts else 0
        self.asked += 1
        if verdict == 9:
            self.told[ask.ticket] += 0
            raise UsageError("not here", code="unknown_model", status=404)
        self.open_tickets.add(ask.ticket)
        soon = asyncio.get_running_loop().call_soon
        match verdict:
            case 1:
                self.refuse(ask, turn)
            case 2:
                soon(self.run, ask, turn)
            case 3:
                soon(self.refuse, ask, turn)
            case 4 | 5:
                self.run(ask, turn)
                soon(soon, self.abort, ask, turn) if verdict == 4 else self.abort(ask, turn)
            case 6:
                pass  # waits until its client is gone
            case 7:
                soon(soon, self.run, ask, turn)
            case _:
                self.run(ask, turn)

    def run(self, ask: Ask, turn: Turn) -> None:
        if ask.ticket in self.open_tickets:
            turn.run(self.route, 0.1)

    def refuse(self, ask: Ask, turn: Turn) -> None:
        if ask.ticket in self.open_tickets:
            self.open_tickets.remove(ask.ticket)
            turn.refuse(Unavailable("full", code="queue_full", retry_after=1))

    def abort(self, ask: Ask, turn: Turn) -> None:
        if ask.ticket in self.open_tickets:
            turn.abort(UsageError("a newer one came", code="superseded", status=409))

    def cancel(self, ticket: str) -> None:
        self.ended(ticket)

    def aborting(self, ticket: str) -> None:
        if ticket not in self.open_tickets:
            self.world.complain(f"{ticket} aborts after its end")

    def ended(self, ticket: str, served: bool = False) -> None:
        if ticket not in self.open_tickets:
            self.world.complain(f"{ticket} ended twice")
        self.open_tickets.discard(ticket)

    def lost(self, ask: Ask, turn: Turn, error: LlmDaemonError) -> bool:
        self.lost_ones += 1
        soon = asyncio.get_running_loop().call_soon
        match self.lost_ones % 4:
            case 0:
                return False
            case 1:
                soon(self.run, ask, turn)
            case 2:
                soon(self.refuse, ask, turn)
            case _:
                self.run(ask, turn)
        return True

    def over(self, exchange: Exchange) -> None:
        self.told[exchange.ask.ticket] += 1

    def models(self) -> list[dict[str, object]]:
        return [{"id": "m"}]

    def health(self) -> dict[str, object]:
        return {"status": "ok"}

    async def admin(self) -> str:
        await asyncio.sleep(0)
        return self.world.path


class Front(Gateway):
    """Remembers the methods of each connection's requests, without which its answers cannot be read."""

    def handle(self, request: Request, connection: Connection) -> Exchange | None:
        cast(Any, connection).methods.append(request.method)
        return super().handle(request, connection)


class Client(asyncio.Protocol):
    """Keeps what it gets."""

    transport: asyncio.Transport

    def __init__(self, connection: Connection) -> None:
        self.connection, self.got = connection, bytearray()
        cast(Any, connection).methods = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.got += data

    def hang_up(self, how: int) -> None:
        if how == 1 and not self.transport.is_closing():
            self.transport.write_eof()
        elif how == 2:
            sock = self.transport.get_extra_info("socket")
            if sock is not None and sock.fileno() >= 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
        elif how == 0:
            self.transport.close()


class Engine(asyncio.Protocol):
    """Answers each whole request as the scenario says; complains of any other bytes."""

    transport: asyncio.Transport

    def __init__(self, world: World) -> None:
        self.world, self.buffer, self.switched, self.cut = world, b"", False, False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.world.links.add(self)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while self.buffer and not (self.switched or self.cut):
            if (head := _REQUEST.match(self.buffer)) is None:
                if b"\r\n\r\n" in self.buffer or not b"GET POST PUT PATCH DELETE".count(self.buffer[:3]):
                    self.world.complain(f"the engine got {self.buffer[:200]!r}")
                    self.buffer = b""
                return
            length = _LENGTH.search(head[3])
            end = head.end() + (int(length[1]) if length else 0)
            if len(self.buffer) < end:
                return
            self.buffer = self.buffer[end:]
            self.world.executed += 1
            self.answer(b"\r\nupgrade: websocket" in head[0])

    def answer(self, may_switch: bool) -> None:
        plan, n = self.world.plan, self.world.answered
        self.world.answered += 1
        if not plan.answers:
            return
        pieces, end = plan.answers[n % len(plan.answers)], plan.ends[n % len(plan.ends)] if plan.ends else 0
        self.switched = may_switch and b"".join(pieces).find(b"HTTP/1.1 101") >= 0
        if pieces:
            self.transport.write(pieces[0])
        asyncio.get_running_loop().call_soon(self._go_on, pieces[1:], end)

    def _go_on(self, pieces: list[bytes], end: int) -> None:
        if self.transport.is_closing():
            return
        if pieces:
            self.transport.write(pieces[0])
            asyncio.get_running_loop().call_soon(self._go_on, pieces[1:], end)
        elif end == 1:
            self.cut = True
            self.transport.close()
        elif end == 2:
            self.cut = True
            self.transport.abort()
        elif end == 3:
            self.cut = True
            self.transport.write_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        self.world.links.discard(self)


class World:
    """Runs scenarios one after the other on the running loop; `problems` are those of the last one."""

    def __init__(self, path: str) -> None:
        self.path, self.problems = path, [""]
        self.links: set[Engine] = set()
        self.executed = self.answered = 0  # requests that engines got, in all and in this scenario
        self.plan = Scenario([], [], [], [], [], [])

    def complain(self, what: str) -> None:
        self.problems.append(what)

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: self.complain(f"the loop heard of {context}"))
        self._server = await loop.create_unix_server(lambda: Engine(self), self.path)

    async def stop(self) -> None:
        self._server.close()
        await asyncio.sleep(0)

    async def run(self, plan: Scenario) -> list[str]:
        """What went wrong."""
        self.plan, self.problems, self.answered = plan, [], 0
        desk = Desk(self, plan)
        front = Front(
            desk, token="t", pool=Pool(keep=2, idle=0.5), patience=60, body_limit=100_000, held_limit=plan.held_limit,
            pipeline=plan.pipeline,
        )  # fmt: skip
        clients = [await self._connect(front, n) for n in range(len(plan.clients))]
        if plan.deaf and clients:
            clients[0].transport.pause_reading()
        await self._talk(clients)
        for client, how in zip(clients, plan.hang_ups, strict=False):
            client.hang_up(how)
        await asyncio.sleep(0)
        stays = any(how == 3 for how in plan.hang_ups)
        if not (stays or plan.deaf):
            await self._until(lambda: not (front.connections or front.busy), "clients are gone, their requests are not", front)
        front.close()
        await front.wait_closed(0.05)
        await self._until(lambda: not (front.busy or self.links), "the gateway is closed, its requests are not over", front)
        for client in clients:
            client.transport.abort()
        await asyncio.sleep(0)
        self._judge(front, desk)
        for client in clients:
            if (wrong := misformed(bytes(client.got), cast(Any, client.connection).methods)) is not None:
                self.complain(f"a client got {wrong}")
        return self.problems

    async def _connect(self, front: Front, n: int) -> Client:
        loop = asyncio.get_running_loop()
        near, far = socket.socketpair()
        near.setblocking(False)
        far.setblocking(False)
        connection = Connection(front, "unix" if n % 2 else "tcp", 1)
        client = Client(connection)
        await loop.connect_accepted_socket(lambda: connection, near)
        await loop.connect_accepted_socket(lambda: client, far)
        return client

    async def _talk(self, clients: list[Client]) -> None:
        left = [list(segments) for segments in self.plan.clients]
        turns = [*self.plan.order, *(n for n, segments in enumerate(left) for _ in segments)]
        for n in turns:
            if n < len(left) and left[n] and not clients[n].transport.is_closing():
                clients[n].transport.write(left[n].pop(0))
            await asyncio.sleep(0)
        for _ in range(8):
            await asyncio.sleep(0)

    async def _until(self, done: Any, what: str, front: Front) -> None:
        began = perf_counter()
        while not done():
            await asyncio.sleep(0 if perf_counter() - began < 0.02 else 0.002)
            if perf_counter() - began > HANG:
                state = (len(front.connections), front.busy, len(front.pool.calls), len(front.pool.leaving), len(self.links))
                self.complain(f"{what}: connections, busy, calls, leaving, links = {state}")
                return

    def _judge(self, front: Front, desk: Desk) -> None:
        pool = front.pool
        left = {
            "tickets": desk.open_tickets, "connections": front.connections, "slow": front.slow, "calls": pool.calls,
            "leaving": pool.leaving, "idle": pool._idle, "busy": front.busy, "held": front.held,
        }  # fmt: skip
        self.problems += [f"left: {name} {what}" for name, what in left.items() if what]
        self.problems += [f"{ticket} was told {n} times" for ticket, n in desk.told.items() if n != 1]


def misformed(got: bytes, methods: list[str]) -> str | None:
    """What is wrong with the answers one client got, None if nothing; the last may be cut off."""
    at, n = 0, 0
    while at < len(got):
        if (head := _HEAD.match(got, at)) is None:
            return None if b"\r\n\r\n" not in got[at:] else f"no head: {got[at : at + 200]!r}"
        at, status, lines = head.end(), int(head[1]), head[2].lower()
        if status == 101:
            return None
        if status < 200:
            continue
        method = methods[n] if n < len(methods) else ""
        if (n := n + 1) > len(methods) + 1:
            return f"more answers than requests: {got[at:][:200]!r}"
        length, chunked = _LENGTH.search(lines), _CHUNKED.search(lines)
        if length and chunked:
            return "two framings"
        if method == "HEAD" or status in (204, 304):
            continue
        if chunked:
            while (size := re.compile(rb"([0-9a-f]+)\r\n").match(got, at)) is not None:
                end = size.end() + int(size[1], 16)
                if got[end : end + 2] not in (b"\r\n", b"", b"\r"):
                    return f"a chunk that does not end: {got[at : at + 100]!r}"
                at = end + 2
                if size[1] == b"0":
                    break
            else:
                return None if b"\r\n" not in got[at:] else f"no chunk: {got[at : at + 100]!r}"
        elif length:
            at += int(length[1])
        else:
            return None if b"connection: close" in lines else "nothing tells where an answer ends"
    return None
