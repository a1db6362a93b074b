"""WebSockets through `/upstream/{model}/...`: RFC 6455's handshake and then bytes, both ways, until either side is gone."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from typing import Any

import pytest

from .fakes import BODY, CHAT, Client, EngineCall, until_gone

PATH = "/upstream/m/realtime?x=1"
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
OFFER: dict[str, Any] = {
    "connection": "keep-alive, Upgrade", "upgrade": "WebSocket", "sec_websocket_key": KEY, "sec_websocket_version": "13",
    "sec_websocket_protocol": "chat", "sec_websocket_extensions": "permessage-deflate",
}  # fmt: skip


async def accept(call: EngineCall) -> None:
    """The engine's side of the handshake."""
    told = call.headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    answer = base64.b64encode(hashlib.sha1(told.encode()).digest()).decode()
    await call.send(
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Protocol: chat\r\nSec-WebSocket-Accept: %b\r\n\r\n" % answer.encode()
    )


async def echo(call: EngineCall) -> None:
    await accept(call)
    while data := await call.reader.read(65536):
        await call.send(data)


async def switch(client: Client) -> None:
    client.request("GET", PATH, **OFFER)
    answer = await client.head()
    assert (answer.status, answer.headers["upgrade"], answer.headers["connection"]) == (101, "websocket", "upgrade")
    assert answer.headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455, section 1.3
    assert not answer.headers.keys() & {"content-length", "transfer-encoding"}


def test_bytes_go_both_ways(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            w.engine.script = echo
            client = await w.client()
            await switch(client)
            seen = w.engine.calls[0]
            assert seen.head.startswith(b"GET /realtime?x=1 HTTP/1.1\r\n")
            assert seen.headers["sec-websocket-protocol"] == "chat" and "authorization" not in seen.headers
            frames = [b"\x81\x05hello", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 1_000_000, b"x"]
            for frame in frames:
                client.send(frame)
                assert await client.reader.readexactly(len(frame)) == frame
            assert (w.desk.log.all("open")[0].lane, w.gateway.busy) == ("aside", 1)
            assert len(w.engine.calls) == 1

    run(main())


def test_the_engine_closes(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:

            async def script(call: EngineCall) -> None:
                await accept(call)
                await call.send(b"bye")
                call.writer.close()

            w.engine.script = script
            client = await w.client()
            await switch(client)
            assert await client.reader.read() == b"bye"
            await w.desk.log.until("ended")

    run(main())


@pytest.mark.parametrize("how", ["close", "reset"])
def test_the_client_closes(run: Any, world: Any, how: str) -> None:
    async def main() -> None:
        async with world() as w:
            w.engine.script = echo
            client = await w.client()
            await switch(client)
            client.send(b"x")
            assert await client.reader.readexactly(1) == b"x"
            if how == "close":
                client.writer.close()
            else:
                client.reset()
            await w.engine.log.until("gone")
            await w.desk.log.until("ended")

    run(main())


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_early_bytes_wait_until_the_engine_has_agreed(run: Any, world: Any, held: bool, together: bool) -> None:
    async def main() -> None:
        async with world() as w:
            agreed = asyncio.Event()

            async def script(call: EngineCall) -> None:
                peek = asyncio.ensure_future(call.reader.read(100))
                await agreed.wait()
                assert not peek.done(), "it came before the engine agreed"
                await accept(call)
                await call.send(await peek)
                await until_gone(call)

            w.engine.script = script
            if held:
                w.desk.hold()
            client = await w.client()
            head = client.raw("GET", PATH, None, **OFFER)
            if together:
                client.send(head + b"early")
            else:
                client.send(head)
                await w.desk.log.until("open")
                client.send(b"early")
            await w.desk.log.until("open")
            if held:
                w.desk.turns[w.desk.log.all("open")[0].ticket].run(w.desk.route)
            await w.engine.log.until("request")
            await (await w.client()).ask("GET", "/health")  # a round for what is on its way
            agreed.set()
            assert (await client.head()).status == 101
            assert await client.reader.readexactly(5) == b"early"

    run(main())


async def behind_another(w: Any) -> Client:
    """A client whose first request waits, with the offer of a tunnel and a first byte for it right behind."""
    w.desk.hold()
    client: Client = await w.client()
    client.send(client.raw("POST", CHAT, BODY) + client.raw("GET", PATH, None, **OFFER) + b"e")
    await w.desk.log.until("open")
    return client


def test_early_bytes_wait_also_while_their_request_waits_behind_another(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:

            async def script(call: EngineCall) -> None:
                await (echo(call) if "upgrade" in call.headers else call.answer(b"first"))

            w.engine.script = script
            client, other = await behind_another(w), await w.client()
            for byte in (b"a", b"r", b"l", b"y"):
                client.send(byte)
                await other.ask("GET", "/health")  # a round for what is on its way
            w.desk.when_opened = lambda ask, turn: turn.run(w.desk.route)
            w.desk.turns[w.desk.log.all("open")[0].ticket].run(w.desk.route)
            assert (await client.answer()).body == b"first"
            assert (await client.head()).status == 101
            assert await client.reader.readexactly(5) == b"early"

    run(main())


def test_too_many_early_bytes_behind_another_cost_the_connection(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            client = await behind_another(w)
            client.send(b"x" * 200_000)
            assert await client.closed()
            await w.desk.log.until("cancel")

    run(main())


@pytest.mark.parametrize("status", ["200 OK", "400 Bad Request", "426 Upgrade Required"])
def test_an_engine_that_declines_never_sees_what_follows(run: Any, world: Any, status: str) -> None:
    async def main() -> None:
        async with world() as w:

            async def script(call: EngineCall) -> None:
                await call.answer(b"no", status)

            w.engine.script = script
            client = await w.client()
            smuggled = b'POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: 16\r\n\r\n{"n_discard":-1}'
            client.send(client.raw("GET", PATH, None, **OFFER) + smuggled)
            answer = await client.answer()
            assert (answer.status, answer.body, answer.headers["connection"]) == (int(status[:3]), b"no", "close")
            assert await client.closed()
            assert (await (await w.client()).ask()).status == int(status[:3])
            assert [call.head.split()[1] for call in w.engine.calls] == [b"/realtime?x=1", CHAT.encode()]

    run(main())


def test_too_many_early_bytes_cost_the_connection(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            w.desk.hold()
            client = await w.client()
            client.request("GET", PATH, **OFFER)
            await w.desk.log.until("open")
            client.send(b"x" * 200_000)
            assert await client.closed()
            await w.desk.log.until("cancel")

    run(main())


def test_an_engine_that_takes_nothing_holds_the_client_back(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world(patience=0.4) as w:

            async def script(call: EngineCall) -> None:
                await accept(call)
                await asyncio.Event().wait()  # reads nothing beyond its first buffer

            w.engine.script = script
            client = await w.client()
            await switch(client)
            piece, sent = b"x" * 65536, 0
            with pytest.raises(ConnectionError):  # in the end it is cut off: its hang-up could not be seen
                while sent < 64 << 20:
                    client.send(piece)
                    sent += len(piece)
                    await client.writer.drain()
            assert sent < 16 << 20  # what sockets and buffers between the two hold
            await w.desk.log.until("ended")

    run(main())


@pytest.mark.parametrize(
    "change",
    [
        {"connection": "keep-alive"}, {"upgrade": "h2c"}, {"upgrade": None}, {"connection": None},
        {"content_length": "3"}, {"transfer_encoding": "chunked"},
    ],
)  # fmt: skip
def test_what_is_no_websocket_is_a_plain_request(run: Any, world: Any, change: dict[str, Any]) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            client.request("GET", PATH, **OFFER | change)
            if "content_length" in change:
                client.send(b"{ }")
            if "transfer_encoding" in change:
                client.send(b"0\r\n\r\n")
            answer = await client.answer()
            assert answer.status == (415 if "content_length" in change else 200)
            assert (await client.ask("GET", "/health")).status == 200  # and the connection speaks HTTP still
            assert all(not call.headers.keys() & {"upgrade", "sec-websocket-key"} for call in w.engine.calls)

    run(main())


@pytest.mark.parametrize(("method", "path", "version"), [("POST", PATH, "1.1"), ("GET", PATH, "1.0"), ("GET", "/health", "1.1")])
def test_elsewhere_an_offered_websocket_is_ignored(run: Any, world: Any, method: str, path: str, version: str) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            client.request(method, path, version=version, **OFFER)
            assert (await client.answer()).status == 200
            assert all("upgrade" not in call.headers for call in w.engine.calls)

    run(main())


def test_a_stranger_gets_no_tunnel(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            client.request("GET", PATH, token="wrong", **OFFER)
            client.send(b"GET /health HTTP/1.1\r\n\r\n")
            assert (await client.answer()).status == 401
            evil = await w.client()
            evil.request("GET", PATH, origin="https://evil.example", **OFFER)  # browsers let any page open a WebSocket
            assert (await evil.answer()).status == 403
            assert w.engine.calls == []

    run(main())
