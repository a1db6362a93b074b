"""A desk and an engine that do as the test says, and a client that sends bytes."""

from __future__ import annotations

import asyncio
import gc
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import thread_time
from types import TracebackType
from typing import Any

import msgspec

from llm_daemon.core.routes import RELAYED
from llm_daemon.daemon.address import tcp
from llm_daemon.daemon.gateway import Ask, Exchange, Gateway, Route, Turn
from llm_daemon.daemon.upstream import Pool
from llm_daemon.errors import LlmDaemonError

TOKEN = "tök-1234"
CHAT = "/v1/chat/completions"
BODY = b'{"model":"m","messages":[]}'
FORMS = {path for path, route in RELAYED.items() if route.multipart}
FORM = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--x--\r\n'


async def grows_evenly(work: Callable[[int], Awaitable[None]], most: int) -> bool:
    """Whether `most` costs about as much CPU for each as an eighth of it does: four times as much is noise, eight is a square.

    A square is one each time; others who use the same cores and caches, and this process's own garbage, are not.
    """

    async def cost(size: int) -> float:
        gc.disable()
        try:
            began = thread_time()
            await work(size)
            return thread_time() - began
        finally:
            gc.enable()

    few = min([await cost(most // 8) for _ in range(3)])
    for _ in range(5):
        if await cost(most) < 4 * 8 * few:
            return True
    return False


class Log:
    """What happened, in order; `until` waits for it."""

    def __init__(self) -> None:
        self.items: list[tuple[str, Any]] = []
        self._news: list[asyncio.Future[None]] = []

    def add(self, what: str, about: Any = None) -> None:
        self.items.append((what, about))
        for future in self._news:
            if not future.done():
                future.set_result(None)
        self._news.clear()

    def all(self, what: str) -> list[Any]:
        return [about for name, about in self.items if name == what]

    async def news(self) -> None:
        """Waits until anything happens."""
        future = asyncio.get_running_loop().create_future()
        self._news.append(future)
        await future

    async def until(self, what: str, times: int = 1) -> Any:
        """Waits until it happened so many times; what it was about the last of those times."""
        while len(self.all(what)) < times:
            await self.news()
        return self.all(what)[times - 1]


class FakeDesk:
    """Runs each ticket at once on `route`, unless `when_opened` says otherwise; insists on one end for each ticket."""

    def __init__(self, route: Route) -> None:
        self.route, self.log = route, Log()
        self.turns: dict[str, Turn] = {}
        self.open_tickets: set[str] = set()
        self.told: set[str] = set()
        self.served: set[str] = set()  # of those that ended
        self.overs: list[Exchange] = []
        self.takes_back = False  # whether a ticket whose engine died before its first byte is run again
        self.when_opened: Callable[[Ask, Turn], None] = lambda ask, turn: turn.run(self.route)

    def hold(self) -> None:
        """From now on tickets wait until the test calls their turn."""
        self.when_opened = lambda ask, turn: None

    def open(self, ask: Ask, turn: Turn) -> None:
        assert ask.ticket not in self.turns, "a ticket was given out twice"
        self.turns[ask.ticket] = turn
        self.open_tickets.add(ask.ticket)
        self.log.add("open", ask)
        self.when_opened(ask, turn)

    def refuse(self, ticket: str, error: LlmDaemonError) -> None:
        self.open_tickets.remove(ticket)
        self.log.add("refuse", ticket)
        self.turns[ticket].refuse(error)

    def abort(self, ticket: str, error: LlmDaemonError) -> None:
        """Breaks off a running ticket; `ended` follows."""
        assert ticket in self.open_tickets
        self.log.add("abort", ticket)
        self.turns[ticket].abort(error)

    def aborting(self, ticket: str) -> None:
        assert ticket in self.open_tickets, f"{ticket} is no more"
        self.log.add("aborting", ticket)

    def over(self, exchange: Exchange) -> None:
        assert exchange.ask.ticket not in self.told, "told twice"
        self.told.add(exchange.ask.ticket)
        self.overs.append(exchange)

    async def admin(self) -> str:
        self.log.add("admin")
        return self.route.socket

    def cancel(self, ticket: str) -> None:
        assert ticket in self.open_tickets, f"{ticket} ended twice"
        self.open_tickets.remove(ticket)
        self.log.add("cancel", ticket)

    def ended(self, ticket: str, served: bool = False) -> None:
        assert ticket in self.open_tickets, f"{ticket} ended twice"
        self.open_tickets.remove(ticket)
        self.served |= {ticket} if served else set()
        self.log.add("ended", ticket)

    def lost(self, ask: Ask, turn: Turn, error: LlmDaemonError) -> bool:
        if self.takes_back:
            self.log.add("lost", ask.ticket)
            self.when_opened(ask, turn)
        return self.takes_back

    def models(self) -> list[dict[str, object]]:
        return [{"id": "m", "object": "model"}, {"id": "a/b?context=1", "object": "model"}]

    def health(self) -> dict[str, object]:
        return {"status": "ok"}


@dataclass
class EngineCall:
    """One request as the engine got it."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    connection: int
    head: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    sent: int = 0  # by `flood`

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, body: bytes, status: str = "200 OK", content_type: str = "application/json") -> None:
        head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
        await self.send(head.encode() + body)

    async def begin_stream(self) -> None:
        await self.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    def die(self) -> None:
        self.writer.transport.abort()


Script = Callable[[EngineCall], Awaitable[None]]


async def say_ok(call: EngineCall) -> None:
    await call.answer(b'{"ok":true}')


class FakeEngine:
    """An HTTP server at an address; `script` answers each request, `log` tells `request`, `connected` and `gone`."""

    def __init__(self, path: str) -> None:
        self.path, self.log = path, Log()
        self.script: Script = say_ok
        self.calls: list[EngineCall] = []
        self._connections = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._stopped = False
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        if (place := tcp(self.path)) is None:
            self._server = await asyncio.start_unix_server(self._accept, self.path)
        else:
            self._server = await asyncio.start_server(self._accept, *place)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        self._stopped = True
        for _ in range(10):  # a connection that is being accepted reaches us some rounds of the loop later
            await asyncio.sleep(0)
        for writer in self._writers:  # a task that has not begun yet closes nothing
            writer.transport.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        if self._stopped:
            writer.transport.abort()
            return
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        number = self._connections
        self.log.add("connected", number)
        try:
            while not writer.is_closing():
                call = EngineCall(reader, writer, number)
                call.head = await reader.readuntil(b"\r\n\r\n")
                lines = call.head.decode("latin-1").split("\r\n")[1:-2]
                call.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
                call.body = await reader.readexactly(int(call.headers.get("content-length", "0")))
                self.calls.append(call)
                self.log.add("request", call)
                await self.script(call)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.log.add("gone", number)
            writer.transport.abort()
            with suppress(ConnectionError):
                await writer.wait_closed()


async def flood(call: EngineCall, total: int, blocked: asyncio.Event, stall: float = 0.2) -> None:
    """Sends an answer of `total` bytes; sets `blocked` whenever nobody took any for `stall` seconds."""
    await call.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
    while call.sent < total:
        call.writer.write(b"x" * 65536)
        call.sent += 65536
        try:
            await asyncio.wait_for(call.writer.drain(), stall)
        except TimeoutError:
            blocked.set()
            await call.writer.drain()


async def until_gone(call: EngineCall) -> None:
    """A script that never answers, and ends when the gateway lets go."""
    assert await call.reader.read() == b""


@dataclass
class Answer:
    status: int
    reason: str
    headers: dict[str, str]
    body: bytes
    whole: bool = True  # False: the connection ended before the body did

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]


class Client:
    """A client connection, byte by byte if need be."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str) -> None:
        self.reader, self.writer, self.host = reader, writer, host

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def request(
        self,
        method: str = "POST",
        path: str = CHAT,
        body: bytes | None = BODY,
        version: str = "1.1",
        token: str | None = TOKEN,
        **headers: str | None,
    ) -> None:
        """Sends a request; keyword `content_type` is header `content-type`, None leaves a header out."""
        self.send(self.raw(method, path, body, version, token, **headers))

    def raw(
        self, method: str, path: str, body: bytes | None, version: str = "1.1", token: str | None = TOKEN, **headers: str | None
    ) -> bytes:
        given: dict[str, str | None] = {"host": self.host, "authorization": f"Bearer {token}" if token else None}
        if method == "POST" and body is not None:
            kind = "application/json"
            if path in FORMS and body == BODY:
                kind, body = "multipart/form-data; boundary=x", FORM
            given |= {"content-type": kind, "content-length": str(len(body))}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = "".join(f"{name}: {value}\r\n" for name, value in given.items() if value is not None)
        return f"{method} {path} HTTP/{version}\r\n{lines}\r\n".encode() + (body or b"" if method == "POST" else b"")

    async def head(self) -> Answer:
        text = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = text.split("\r\n")[:-2]
        version, status, reason = first.split(" ", 2)
        assert version == "HTTP/1.1"
        names = [line.partition(":")[0].lower() for line in lines]
        assert len(names) == len(set(names)), f"a header is doubled: {names}"
        return Answer(int(status), reason, {n.lower(): v.strip() for n, _, v in (line.partition(":") for line in lines)}, b"")

    async def chunk(self) -> bytes:
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        data = await self.reader.readexactly(size + 2)
        assert data.endswith(b"\r\n")
        return data[:-2]

    async def answer(self, method: str = "POST") -> Answer:
        answer = await self.head()
        headers = answer.headers
        assert not ("content-length" in headers and "transfer-encoding" in headers)
        try:
            if method == "HEAD" or answer.status == 204:
                pass
            elif "content-length" in headers:
                answer.body = await self.reader.readexactly(int(headers["content-length"]))
            elif headers.get("transfer-encoding") == "chunked":
                while piece := await self.chunk():
                    answer.body += piece
            else:
                assert headers.get("connection") == "close", "nothing tells where the body ends"
                answer.body = await self.reader.read()
        except (asyncio.IncompleteReadError, ConnectionError) as e:
            answer.body += getattr(e, "partial", b"")
            answer.whole = False
        return answer

    async def ask(self, method: str = "POST", path: str = CHAT, body: bytes | None = BODY, **more: Any) -> Answer:
        self.request(method, path, body, **more)
        return await self.answer(method)

    async def closed(self) -> bool:
        """Waits for the gateway to close the connection; whether it did so without another byte."""
        with suppress(ConnectionError):
            return await self.reader.read() == b""
        return True

    def reset(self) -> None:
        """Hangs up with RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.transport.abort()
        with suppress(ConnectionError):
            await self.writer.wait_closed()


class World:
    """A gateway between clients and one fake engine."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.unix = str(folder / "http.sock")
        self.engine = FakeEngine(str(folder / "e.sock"))
        self.desk = FakeDesk(Route("m#1", self.engine.path))
        # Whoever asks twice gets the same connection to the engine, however long a busy machine lets him wait between.
        given: dict[str, Any] = {"token": TOKEN, "pool": Pool(idle=60)} | options
        self.gateway = Gateway(self.desk, **given)
        self.port = 0
        self._clients: list[Client] = []

    async def __aenter__(self) -> World:
        await self.engine.start()
        tcp, unix = socket.socket(), socket.socket(socket.AF_UNIX)
        tcp.bind(("127.0.0.1", 0))
        self.port = tcp.getsockname()[1]
        unix.bind(self.unix)
        await self.gateway.serve(tcp, unix)
        return self

    async def client(self, *, unix: bool = False, limit: int = 2**16) -> Client:
        if unix:
            streams = await asyncio.open_unix_connection(self.unix, limit=limit)
        else:
            streams = await asyncio.open_connection("127.0.0.1", self.port, limit=limit)
        client = Client(*streams, host=f"127.0.0.1:{self.port}")
        self._clients.append(client)
        return client

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for client in self._clients:
            await client.close()
        self.gateway.close()
        await self.gateway.wait_closed()
        await self.engine.stop()
        if kind is None:
            assert not self.desk.open_tickets, "tickets without an end"
            assert self.gateway.busy == self.gateway.held == 0
            assert not self.gateway.pool.calls
