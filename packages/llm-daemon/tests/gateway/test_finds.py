"""What reading and fuzzing found: one test for each."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_daemon.core import firewall
from llm_daemon.core.openai import read_wanted
from llm_daemon.daemon.gateway import Ask, Route, Turn
from llm_daemon.daemon.heads import Answers
from llm_daemon.daemon.http1 import ResponseReader
from llm_daemon.errors import RemoteProtocolError, UsageError

from .fakes import BODY, CHAT, Client, World, grows_evenly, until_gone


def test_a_burst_of_tiny_requests_does_not_hold_up_the_loop(run: Any, world: Any) -> None:
    """One read brings fourteen thousand of them; trimming the queue one by one took seconds."""

    async def main() -> None:
        async with world() as w:
            w.desk.hold()

            async def burst(count: int) -> None:
                before, client = set(w.gateway.connections), await w.client()
                client.request()
                await w.desk.log.until("open", len(w.desk.log.all("open")) + 1)
                (connection,) = w.gateway.connections - before
                connection.data_received(b"GET / HTTP/1.1\r\n\r\n" * count)
                client.reset()
                await w.desk.log.until("cancel", len(w.desk.log.all("open")))

            assert await grows_evenly(burst, 14_000)

    run(main())


def test_a_client_that_goes_while_the_gateway_closes(run: Any, world: Any) -> None:
    """The standard loop raises when a socket is half-closed whose other end is gone, before it tells of that end."""

    async def main() -> None:
        async with world(pipeline=1) as w:
            w.desk.hold()
            with socket.create_connection(("127.0.0.1", w.port)) as sock:
                sock.sendall((await w.client()).raw("POST", CHAT, BODY) * 4)
                await w.desk.log.until("open")
            # The loop does not know of its end yet, and the kernel will when our answer meets it.
            w.gateway.close()

    run(main())


def test_a_request_cut_off_behind_too_many_gives_its_room_back(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world(pipeline=2, patience=1000.0) as w:
            w.desk.hold()
            client = await w.client()
            client.request()
            ask = await w.desk.log.until("open")
            (connection,) = w.gateway.connections
            connection.data_received(client.raw("GET", "/health", None) * 4 + client.raw("POST", CHAT, BODY)[:-5])
            assert w.gateway.held == len(BODY), "of the first"
            assert not connection._slow_since, "nothing is awaited from this client"
            w.desk.turns[ask.ticket].run(w.desk.route)
            assert (await client.answer()).status == 200

    run(main())


def test_a_late_client_is_told_once(run: Any, world: Any) -> None:
    """It may stay for a moment after that: the next look at it must not write behind the end."""

    async def main() -> None:
        async with world(patience=0.02) as w:
            late, other = await w.client(), await w.client()
            late.send(b"POST")
            assert (await late.answer()).status == 408
            assert await late.closed()
            other.send(b"POST")
            assert (await other.answer()).status == 408

    run(main())


def test_an_upgrade_that_its_connection_header_does_not_name_is_none(run: Any, world: Any) -> None:
    """RFC 9110, section 7.8."""

    async def main() -> None:
        async with world() as w:
            client = await w.client()
            assert (await client.ask("GET", "/upstream/m/ws", None, connection="x-upgrade", upgrade="websocket")).status == 200
            assert (await client.ask("GET", "/health", None)).status == 200
            assert "upgrade" not in w.engine.calls[0].headers

    run(main())


def test_an_aborted_ticket_is_told_why(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            seen: list[tuple[str, int]] = []
            w.desk.over = lambda exchange: seen.append((exchange.code, exchange.status))
            w.engine.script = until_gone
            client = await w.client()
            client.request()
            await w.engine.log.until("request")
            w.desk.abort(w.desk.log.all("open")[0].ticket, UsageError("a newer one came", code="superseded", status=409))
            assert (await client.answer()).status == 409
            await w.desk.log.until("ended")
            assert seen == [("superseded", 409)]

    run(main())


def test_cutting_an_engine_off_while_one_of_its_tickets_aborts_another(run: Any, world: Any) -> None:
    """The client of the first has one more request waiting, which supersedes the second."""

    async def ask(w: World) -> Client:
        client = await w.client()
        client.request()
        await w.engine.log.until("request", len(w.desk.turns) + 1)
        return client

    async def main() -> None:
        async with world() as w:
            w.engine.script = until_gone
            clients = [await ask(w), await ask(w)]
            for client in clients:
                client.request()  # the one that supersedes
            while sum(len(c._waiting) for c in w.gateway.connections) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0)
            running = [ask.ticket for ask in w.desk.log.all("open")]

            def opened(ask: Ask, turn: Turn) -> None:
                for ticket in running:
                    if ticket in w.desk.open_tickets:
                        w.desk.abort(ticket, UsageError("a newer one came", code="superseded", status=409))
                w.desk.refuse(ask.ticket, UsageError("enough"))

            w.desk.when_opened = opened
            w.gateway.pool.cut(w.engine.path)
            assert sorted([(await c.answer()).status for c in clients]) == [409, 502]

    run(main())


@pytest.mark.parametrize("status", [b"000", b"099", b"600", b"999"])
def test_a_status_that_is_none_is_refused(status: bytes) -> None:
    """Below 100 the parser waits for a body: it came to the client without a head."""
    with pytest.raises(RemoteProtocolError):
        ResponseReader().feed(b"HTTP/1.1 %b X\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na" % status)


@pytest.mark.parametrize("body", [b'{"image":"\xff"}', b'{"a":"\\u0041\xff"}', b'{"image":1e999}'])
def test_a_body_that_the_firewall_cannot_read_is_the_clients_fault(body: bytes) -> None:
    with pytest.raises(UsageError):
        firewall.check(read_wanted(body), body)


def test_an_empty_answer_has_no_piece() -> None:
    """Also when its head was read before: an empty piece is counted as the first one."""
    answers = Answers()
    for _ in range(2):
        assert ResponseReader(answers).feed(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")[1:] == ([], True)


@pytest.mark.parametrize("head", [b"HTTP/1.0 120 X\r\n", b"HTTP/1.1 150 X\r\nContent-Length: 4\r\n"])
def test_an_interim_answer_with_a_body_is_refused(head: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        ResponseReader().feed(head + b"\r\nbody")


def test_a_switch_that_the_headers_do_not_tell_is_refused() -> None:
    reader = ResponseReader()
    reader.reset(may_switch=True)
    with pytest.raises(RemoteProtocolError):
        reader.feed(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\nframes")


def test_a_control_message_that_is_not_json_needs_no_json_module() -> None:
    """CPython's scanner sets no exception when json.decoder, which has its class, was never imported."""
    code = (
        "import sys; from llm_daemon.core.control import Decoder; from llm_daemon.errors import RemoteProtocolError\n"
        "assert 'json.decoder' not in sys.modules\n"
        "try: Decoder().feed(b'{\"op\":1,}\\n')\n"
        "except RemoteProtocolError: pass\n"
        "else: sys.exit('taken')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_engine_that_has_said_all_before_it_was_told_all(run: Any, world: Any, tmp_path: Path) -> None:
    """It takes no more of a large request: with bytes unsent, the loop would wait for ever to close the connection."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nConnection: close\r\n\r\ntoo large")
        writer.write_eof()
        await done.wait()
        writer.transport.abort()

    done = asyncio.Event()

    async def main() -> None:
        path = str(tmp_path / "r.sock")
        server = await asyncio.start_unix_server(refuse, path)
        async with world() as w:
            w.desk.route = Route("m#1", path)
            answer = await (await w.client()).ask(body=b'{"prompt":"%b"}' % (b"x" * 8_000_000))
            assert (answer.status, answer.body) == (413, b"too large")
            done.set()
        server.close()

    run(main())


def test_a_last_answer_to_a_client_that_reads_again(run: Any, world: Any) -> None:
    """The standard loop reports the end of a connection twice if it is closed while it tells that there is room again."""

    async def main() -> None:
        async with world() as w:
            models = w.desk.models() * 100_000
            w.desk.models = lambda: models
            client = await w.client()
            client.send(client.raw("GET", "/v1/models", None) + client.raw("GET", "/health", None, connection="close"))
            while not any(connection._paused for connection in w.gateway.connections):  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert len((await client.answer()).body) > 1_000_000
            assert (await client.answer()).json == {"status": "ok"}
            assert await client.closed()

    run(main())
