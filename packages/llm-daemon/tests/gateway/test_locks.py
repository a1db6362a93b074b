"""Host, Origin, Sec-Fetch-Site and token on every kind of route, and clients that are slow or large on purpose."""

from __future__ import annotations

import asyncio
import hmac
import socket
from typing import Any

import pytest

from llm_daemon.core.routes import ANSWERED, RELAYED

from .fakes import BODY, CHAT, TOKEN, EngineCall, flood, grows_evenly, until_gone

KINDS = [
    *(("POST", path) for path in sorted(RELAYED)), *(("GET", path) for path in sorted(ANSWERED)),
    *(("POST", "/upstream/m" + path) for path in sorted(RELAYED) if not RELAYED[path].multipart),
    ("GET", "/v1/models/m"), ("GET", "/metrics"), ("GET", "/ui"), ("GET", "/ui/"), ("GET", "/ui/app.js"), ("GET", "/api/status"),
    ("POST", "/api/load"), ("POST", "/api/cancel/x-1"), ("GET", "/upstream/m/"), ("POST", "/upstream/m/slots/0"),
    ("DELETE", "/upstream/m/x"), ("GET", "/nowhere"), ("OPTIONS", CHAT),
]  # fmt: skip
OPEN = ("/health", "/ui")


@pytest.mark.parametrize(("method", "path"), KINDS)
def test_every_lock_on_every_route(run: Any, world: Any, method: str, path: str) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            ours = f"http://127.0.0.1:{w.port}"
            bad: list[tuple[int, dict[str, Any]]] = [
                (403, {"host": "evil.example"}), (403, {"host": f"evil.example:{w.port}"}), (400, {"host": None}),
                (403, {"origin": "https://evil.example"}), (403, {"origin": "null"}),
                # a page that rebound its name: Host and Origin agree, and are not ours
                (403, {"host": f"evil.example:{w.port}", "origin": f"http://evil.example:{w.port}"}),
            ]  # fmt: skip
            if not path.startswith("/ui"):  # that may be linked to
                bad += [(403, {"sec_fetch_site": "cross-site"}), (403, {"sec_fetch_site": "same-site"})]
            if method != "OPTIONS" and not path.startswith(OPEN):
                bad += [(401, {"token": None}), (401, {"token": TOKEN + "x"}), (401, {"token": TOKEN[:-1]})]
            for status, headers in bad:
                answer = await client.ask(method, path, **headers)

                assert answer.status == status, headers
                assert not any(name.startswith("access-control") for name in answer.headers)
            assert w.engine.calls == [] and w.desk.log.items == []
            for headers in ({}, {"origin": ours}, {"sec_fetch_site": "none"}, {"sec_fetch_site": "same-origin"}):
                status = (await client.ask(method, path, **headers)).status
                assert status == {"/nowhere": 404}.get(path, 204 if method == "OPTIONS" else 200)

    run(main())


def test_the_token_is_compared_in_constant_time(run: Any, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    honest = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append(a)
        return honest(bytes(a), bytes(b))

    class Watched(bytes):
        def __eq__(self, other: object) -> bool:
            raise AssertionError("compared in a time that tells how much of it was right")

        __hash__ = bytes.__hash__

    async def main() -> None:
        async with world() as w:
            w.gateway._guard._token, w.gateway._guard._usual = Watched(TOKEN.encode()), Watched(b"Bearer " + TOKEN.encode())
            client = await w.client()
            for headers in ({}, {"token": "wrong"}, {"token": None, "x_api_key": "wrong"}):
                status = (await client.ask(**headers)).status
                assert status == (401 if headers else 200)

    monkeypatch.setattr("hmac.compare_digest", compare)
    run(main())
    assert {b"Bearer wrong", b"wrong"} <= set(compared)


# -- slow clients


@pytest.mark.parametrize("what", ["nothing of the head", "half a head", "half a body", "half a chunk", "an upgrade's body"])
def test_a_trickled_request_ends_in_time(run: Any, world: Any, what: str) -> None:
    async def main() -> None:
        async with world(patience=0.3) as w:
            client = await w.client()
            whole = client.raw("POST", CHAT, BODY + b" " * 1000)
            begun = {
                "nothing of the head": b"\r\n",
                "half a head": whole[:40],
                "half a body": whole[:-1000],
                "half a chunk": client.raw("POST", CHAT, b"", content_length=None, transfer_encoding="chunked") + b"ff\r\nx",
                "an upgrade's body": client.raw("POST", CHAT, b" " * 1000, connection="upgrade", upgrade="h2c")[:-900],
            }[what]
            client.send(begun)
            answering = asyncio.ensure_future(client.answer())
            while not answering.done():  # a byte at a time gains it nothing
                client.send(b"\n" if what == "nothing of the head" else b"a")
                await asyncio.wait([answering], timeout=0.02)
            answer = await answering
            assert (answer.status, answer.error["code"], answer.headers["connection"]) == (408, "timeout", "close")
            assert w.gateway.held == 0 and w.engine.calls == []
            patient = await w.client()
            assert (await patient.ask()).status == 200

    run(main())


def test_an_idle_connection_is_nobodys_trouble(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world(patience=0.05) as w:
            client = await w.client()
            assert (await client.ask()).status == 200
            slow = await w.client()
            slow.send(b"G")
            assert (await slow.answer()).status == 408  # so that time has passed
            assert (await client.ask()).status == 200
            while w.gateway._timer is not None:  # noqa: ASYNC110  (and nobody is looked after for ever)
                await asyncio.sleep(0)
            assert not w.gateway.slow

    run(main())


@pytest.mark.parametrize("next_one", [b"\r\n", b"POST /v1/chat/compl"])
def test_a_slow_engine_is_not_the_clients_fault(run: Any, world: Any, next_one: bytes) -> None:
    """What a client has begun to send behind its request (old ones send a line feed) costs it no answer."""

    async def main() -> None:
        async with world(patience=0.1) as w:
            go = asyncio.Event()

            async def script(call: EngineCall) -> None:
                await go.wait()
                await call.answer(b"{}")

            w.engine.script = script
            client = await w.client()
            client.request()
            await w.engine.log.until("request")
            client.send(next_one)
            for _ in range(3):
                slow = await w.client()
                slow.send(b"G")
                assert (await slow.answer()).status == 408
            go.set()
            assert (await client.answer()).status == 200

    run(main())


@pytest.mark.parametrize("confirms", [False, True])
def test_a_client_that_never_reads_loses_its_slot(run: Any, world: Any, confirms: bool) -> None:
    async def main() -> None:
        async with world(patience=0.3) as w:
            blocked = asyncio.Event()

            async def script(call: EngineCall) -> None:
                await flood(call, 1 << 30, blocked, stall=0.05)

            w.engine.script = script
            w.desk.route = type(w.desk.route)("m#1", w.engine.path, confirms=confirms)
            client = await w.client(limit=1024)
            client.request(body=b'{"model":"m","stream":true}')
            await blocked.wait()
            assert w.engine.calls[0].sent < 32 << 20  # nothing is piled up here
            (connection,) = w.gateway.connections
            assert connection.transport.get_write_buffer_size() < 1 << 20
            await w.desk.log.until("ended")
            await w.engine.log.until("gone")
            assert not w.gateway.pool.leaving

    run(main())


def test_a_client_that_never_reads_the_rest_of_its_last_answer_is_let_go(run: Any, world: Any) -> None:
    """Too little of it is left for the loop to tell us that the client is slow."""

    async def main() -> None:
        async with world(patience=0.3) as w:
            client, gone = await w.client(unix=True, limit=1024), asyncio.Event()
            assert (await client.ask("GET", "/health")).status == 200  # so that its connection is there
            (connection,) = w.gateway.connections
            connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            forget = w.gateway.forget

            def forgotten(one: Any) -> None:
                forget(one)
                gone.set()

            w.gateway.forget = forgotten

            async def script(call: EngineCall) -> None:
                await call.answer(b"x" * 40_000)

            w.engine.script = script
            client.request(connection="close")
            await w.desk.log.until("ended")
            assert 0 < connection.transport.get_write_buffer_size() < 40_000
            await gone.wait()
            assert not w.gateway.connections | w.gateway.slow

    run(main())


def test_a_client_that_reads_slowly_but_reads_is_served(run: Any, world: Any) -> None:
    """Each time that it takes nothing lasts nine tenths of our patience, by our clock alone: nobody has to wait here."""

    async def main() -> None:
        async with world(patience=1000.0) as w:
            total = left = 64 << 20
            slow = 0

            async def script(call: EngineCall) -> None:
                await flood(call, total, asyncio.Event())

            w.engine.script = script
            client = await w.client(limit=1024)
            client.request()
            assert (await client.head()).status == 200
            (connection,) = w.gateway.connections
            pause = connection.pause_writing

            def pauses() -> None:
                nonlocal slow
                pause()
                slow += 1
                connection._slow_since -= 0.9 * w.gateway.patience

            connection.pause_writing = pauses
            while left:
                if connection._paused or w.desk.log.all("ended"):
                    piece = await client.reader.read(100_000)
                    assert piece, "it was let go"
                    left -= len(piece)
                else:
                    await asyncio.sleep(0)
                connection.look(asyncio.get_running_loop().time())
            assert slow > 2, "together it was slow for longer than our patience"

    run(main())


def test_ten_thousand_header_lines_cost_no_time(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            for line in (b"a:b\r\n", b"x-%d:\r\n"):

                async def ask(count: int, line: bytes = line) -> None:
                    lines = b"".join(line % n if b"%d" in line else line for n in range(count))
                    client.send(client.raw("GET", "/health", None)[:-2] + lines + b"\r\n")
                    assert (await client.answer()).status == 200

                assert await grows_evenly(ask, 6_000)
            client.send(client.raw("GET", "/health", None)[:-2] + b"a:b\r\n" * 20_000 + b"\r\n")
            assert (await client.answer()).status == 431

    run(main())


def test_ten_thousand_lines_from_an_engine_cost_no_time(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            lines = b""

            async def script(call: EngineCall) -> None:
                await call.send(b"HTTP/1.1 200 OK\r\n" + lines + b"Content-Length: 2\r\n\r\nok")

            async def ask(count: int) -> None:
                nonlocal lines
                named = b"Connection: " + b",".join(b"h%d" % n for n in range(count // 4)) + b"\r\n"
                lines = named + b"h1:x\r\n" * count
                client.request()
                text = await client.reader.readuntil(b"\r\n\r\n")
                assert text.startswith(b"HTTP/1.1 200") and b"h1" not in text
                assert await client.reader.readexactly(2) == b"ok"

            w.engine.script = script
            client = await w.client(limit=1 << 20)
            assert await grows_evenly(ask, 6_000)

    run(main())


def test_hundreds_of_connections_that_send_nothing_keep_nobody_out(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            for _ in range(300):
                await w.client()
            w.engine.script = until_gone
            busy = await w.client()
            busy.request()
            await w.engine.log.until("request")
            assert (await (await w.client()).ask("GET", "/health")).status == 200
            await busy.close()
            await w.desk.log.until("ended")

    run(main())
