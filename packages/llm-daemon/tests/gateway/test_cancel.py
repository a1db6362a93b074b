"""A client that hangs up: in each phase the engine is let go at once, and the ticket has exactly one end."""

from __future__ import annotations

import asyncio
import random
import socket
from pathlib import Path
from typing import Any

import pytest

from llm_daemon.daemon.gateway import Ask, Route, Turn
from llm_daemon.daemon.upstream import Pool
from llm_daemon.errors import Unavailable, UsageError

from .fakes import BODY, CHAT, Client, EngineCall, World, flood, until_gone

HANG_UPS = ["eof", "half-close", "reset"]


async def hang_up(client: Client, how: str) -> None:
    if how == "reset":
        client.reset()
    elif how == "half-close":
        client.writer.write_eof()
    else:
        await client.close()


@pytest.mark.parametrize("how", HANG_UPS)
def test_while_sending_the_request(run: Any, world: Any, how: str) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            client.send(client.raw("POST", CHAT, BODY)[:-5])
            await client.writer.drain()
            await hang_up(client, how)
            assert (await (await w.client()).ask()).status == 200
            assert len(w.desk.log.all("open")) == 1

    run(main())


@pytest.mark.parametrize("how", HANG_UPS)
def test_while_waiting(run: Any, world: Any, how: str) -> None:
    async def main() -> None:
        async with world() as w:
            w.desk.hold()
            client = await w.client()
            client.request()
            client.request()  # and one pipelined behind it, which never becomes a ticket
            ask = await w.desk.log.until("open")
            await hang_up(client, how)
            assert await w.desk.log.until("cancel") == ask.ticket
            w.desk.turns[ask.ticket].run(w.desk.route)  # too late: nothing happens
            w.desk.turns[ask.ticket].refuse(Unavailable("too late"))
            assert w.gateway.busy == 0
            assert w.engine.log.items == []
            assert len(w.desk.turns) == 1

    run(main())


@pytest.mark.parametrize("how", HANG_UPS)
def test_while_connecting(run: Any, world: Any, tmp_path: Path, how: str) -> None:
    async def main() -> None:
        async with world() as w:
            path = str(tmp_path / "full.sock")
            with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
                listener.bind(path)
                listener.listen(0)
                first.connect(path)
                w.desk.route = Route("m#1", path)
                client = await w.client()
                client.request()
                await w.desk.log.until("open")
                await hang_up(client, how)
                await w.desk.log.until("ended")
                assert not w.gateway.pool.calls

    run(main())


def test_in_each_turn_of_the_loop_after_the_request(run: Any, world: Any) -> None:
    """The connection to the engine takes some rounds of the loop; the hang-up comes in any of them."""

    async def main() -> None:
        async with world(pool=Pool(keep=0)) as w:
            w.engine.script = until_gone
            for rounds in range(12):
                client = await w.client()
                client.request()
                await w.desk.log.until("open", rounds + 1)
                for _ in range(rounds):
                    await asyncio.sleep(0)
                client.reset()
                await w.desk.log.until("ended", rounds + 1)
            assert not w.gateway.pool.calls

    run(main())


@pytest.mark.parametrize("how", HANG_UPS)
def test_before_the_first_byte(run: Any, world: Any, how: str) -> None:
    async def main() -> None:
        async with world() as w:
            w.engine.script = until_gone
            client = await w.client()
            client.request()
            call = await w.engine.log.until("request")
            await hang_up(client, how)
            assert await w.engine.log.until("gone") == call.connection
            assert await w.desk.log.until("ended") == w.desk.log.all("open")[0].ticket
            assert [name for name, _ in w.desk.log.items] == ["open", "aborting", "ended"]

    run(main())


@pytest.mark.parametrize("how", HANG_UPS)
def test_in_mid_stream(run: Any, world: Any, how: str) -> None:
    async def script(call: EngineCall) -> None:
        await call.begin_stream()
        await call.chunk(b"data: 1\n\n")
        await until_gone(call)

    async def main() -> None:
        async with world() as w:
            w.engine.script = script
            client = await w.client()
            client.request(body=b'{"stream":true}')
            await client.head()
            assert await client.chunk() == b"data: 1\n\n"
            await hang_up(client, how)
            await w.engine.log.until("gone")
            await w.desk.log.until("ended")

    run(main())


@pytest.mark.parametrize("how", HANG_UPS)
def test_while_the_client_is_slow(run: Any, world: Any, how: str) -> None:
    """The engine's side is paused then; the client's is not."""

    async def main() -> None:
        async with world() as w:
            blocked = asyncio.Event()
            w.engine.script = lambda call: flood(call, 10**11, blocked)
            client = await w.client(limit=1)
            client.request()
            await blocked.wait()
            await hang_up(client, how)
            await w.desk.log.until("ended")
            await w.engine.log.until("gone")

    run(main())


def test_the_engine_is_let_go_before_the_desk_hears_of_it(run: Any, world: Any) -> None:
    """Whoever gets the slot next must not meet its former user there."""

    async def main() -> None:
        async with world() as w:
            w.engine.script = until_gone
            client = await w.client()
            client.request()
            call: EngineCall = await w.engine.log.until("request")
            sock = call.writer.get_extra_info("socket").dup()
            seen: list[bytes] = []
            ended = w.desk.ended

            def look(ticket: str, served: bool = False) -> None:
                seen.append(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
                ended(ticket, served)

            w.desk.ended = look
            client.reset()
            await w.desk.log.until("ended")
            sock.close()
            assert seen == [b""]

    run(main())


@pytest.mark.parametrize("how", HANG_UPS)
def test_an_engine_that_confirms_keeps_the_slot_until_it_has_let_go(run: Any, world: Any, how: str) -> None:
    let_go = asyncio.Event()

    async def script(call: EngineCall) -> None:
        await call.begin_stream()
        await call.chunk(b"data: 1\n\n")
        await until_gone(call)
        await call.send(b"5\r\nmore\n\r\n")  # it had that on its way
        await let_go.wait()

    async def main() -> None:
        async with world() as w:
            w.desk.route, w.engine.script = Route("m#1", w.engine.path, confirms=True), script
            client = await w.client()
            client.request(body=b'{"stream":true}')
            await client.head()
            await client.chunk()
            await hang_up(client, how)
            await w.desk.log.until("aborting")
            assert w.desk.overs
            assert (await (await w.client()).ask("GET", "/health", None)).status == 200  # meanwhile life goes on
            assert w.desk.open_tickets
            let_go.set()
            await w.desk.log.until("ended")

    run(main())


def test_an_engine_that_does_not_let_go_is_cut_off(run: Any, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_daemon.daemon.upstream.LET_GO", 0.05)

    async def script(call: EngineCall) -> None:
        await call.reader.read()
        await asyncio.Event().wait()

    async def main() -> None:
        async with world() as w:
            w.desk.route, w.engine.script = Route("m#1", w.engine.path, confirms=True), script
            client = await w.client()
            client.request()
            await w.engine.log.until("request")
            await client.close()
            await w.desk.log.until("ended")
            assert not w.gateway.pool.leaving

    run(main())


def test_an_aborted_ticket_is_told_at_once(run: Any, world: Any) -> None:
    async def script(call: EngineCall) -> None:
        await call.begin_stream()
        await call.chunk(b"data: 1\n\n")
        await until_gone(call)

    async def main() -> None:
        async with world() as w:
            w.desk.route, w.engine.script = Route("m#1", w.engine.path, confirms=True), script
            client = await w.client()
            client.request(body=b'{"stream":true}')
            await client.head()
            await client.chunk()
            w.desk.abort(w.desk.log.all("open")[0].ticket, UsageError("a newer one came", code="superseded", status=409))
            assert b'"superseded"' in await client.chunk()
            assert await client.chunk() == b""
            await w.desk.log.until("ended")
            w.engine.script = until_gone
            client.request()
            ask = await w.desk.log.until("open", 2)
            await w.engine.log.until("request", 2)
            w.desk.abort(ask.ticket, UsageError("a newer one came", code="superseded", status=409))
            answer = await client.answer()
            assert (answer.status, answer.error["code"], answer.headers["x-should-retry"]) == (409, "superseded", "false")
            await w.desk.log.until("ended", 2)

    run(main())


def test_a_hang_up_after_the_answer_is_no_cancellation(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            assert (await client.ask()).status == 200
            client.reset()
            assert (await (await w.client()).ask()).status == 200
            assert [name for name, _ in w.desk.log.items] == ["open", "ended"] * 2

    run(main())


@pytest.mark.parametrize(
    ("last", "code"),
    [
        (b"data: [DONE]\n\n", ""),
        (b'event: message_stop\ndata: {"type": "message_stop"}\n\n', ""),
        (b"event: response.completed\ndata: {}\n\n", ""),
        (b'data: {"text": "data: [DONE]"}\n\n', "hung_up"),
        (b"data: 2\n\n", "hung_up"),
    ],
)
def test_who_leaves_with_the_last_event_has_all_it_wanted(run: Any, world: Any, last: bytes, code: str) -> None:
    """Clients do not wait for what ends a chunked body once they have read the end of the stream."""

    async def script(call: EngineCall) -> None:
        await call.begin_stream()
        await call.chunk(b"data: 1\n\n")
        await call.chunk(last)
        await until_gone(call)

    async def main() -> None:
        async with world() as w:
            w.engine.script = script
            client = await w.client()
            client.request()
            await client.head()
            told = b""
            while not told.endswith(last):
                told += await client.chunk()
            await client.close()
            ticket = await w.desk.log.until("ended")
            (over,) = w.desk.overs
            assert (over.status, over.code) == (200, code)
            assert (ticket in w.desk.served) is (not code)  # and the core hears the same

    run(main())


def test_closing_the_gateway_ends_everything(run: Any, world: Any) -> None:
    async def begun(call: EngineCall) -> None:
        await call.begin_stream()
        await call.chunk(b"data: 1\n\n")
        await until_gone(call)

    async def main() -> None:
        async with world() as w:
            waiting, quiet, streaming, idle = [await w.client() for _ in range(4)]
            assert (await idle.ask()).status == 200
            w.engine.script = until_gone
            quiet.request()
            await w.engine.log.until("request", 2)
            w.engine.script = begun
            streaming.request()
            await streaming.head()
            await streaming.chunk()
            w.desk.hold()
            waiting.request()
            await w.desk.log.until("open", 4)
            w.gateway.close()
            for client in (waiting, quiet):
                answer = await client.answer()
                assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (503, "draining", "1")
                assert await client.closed()
            assert b'"draining"' in await streaming.chunk()
            assert await streaming.chunk() == b""
            assert await idle.closed()
            await w.gateway.wait_closed()
            assert len(w.desk.log.all("cancel")) == 1
            assert len(w.desk.log.all("aborting")) == 2
            with pytest.raises(ConnectionError):
                await w.client()

    run(main())


@pytest.mark.parametrize("seed", range(6))
def test_any_mixture_gives_each_ticket_one_end(run: Any, world: Any, seed: int) -> None:
    """Random clients, a desk that runs, refuses and holds, an engine that answers, streams, dawdles, dies and lies."""
    rng = random.Random(seed)

    async def script(call: EngineCall) -> None:
        match rng.randrange(7):
            case 0:
                await call.answer(b"{}")
            case 1:
                await call.begin_stream()
                for _ in range(rng.randrange(20)):
                    await call.chunk(b"data: 1\n\n")
                    await asyncio.sleep(0)
                await call.chunk(b"")
            case 2:
                call.die()
            case 3:
                await call.begin_stream()
                await call.send(b"5\r\nab")
                call.writer.close()
            case 4:
                await until_gone(call)
            case 5:
                await call.send(b"rubbish")
            case 6:
                await call.answer(b"x" * rng.randrange(300_000))
                call.writer.close()

    def decide(world: World, held: list[Ask]) -> Any:
        def opened(ask: Ask, turn: Turn) -> None:
            match rng.randrange(4):
                case 0:
                    world.desk.refuse(ask.ticket, Unavailable("full"))
                case 1:
                    held.append(ask)
                case _:
                    turn.run(world.desk.route)

        return opened

    def let_one_go(world: World, held: list[Ask]) -> None:
        if held and (ask := held.pop(rng.randrange(len(held)))).ticket in world.desk.open_tickets:
            if rng.random() < 0.3:
                world.desk.refuse(ask.ticket, Unavailable("later"))
            else:
                world.desk.turns[ask.ticket].run(world.desk.route)

    async def live(world: World, held: list[Ask]) -> None:
        client = await world.client(unix=rng.random() < 0.5)
        for _ in range(rng.randrange(1, 4)):
            client.request(body=b'{"stream":true}')
        try:
            async with asyncio.timeout(rng.random() * 0.02):
                while await client.reader.read(65536):
                    pass
        except (TimeoutError, ConnectionError):
            pass
        let_one_go(world, held)
        await hang_up(client, rng.choice(HANG_UPS[:1] + HANG_UPS[2:]))

    async def main() -> None:
        async with world(pool=Pool(keep=3, idle=0.01)) as w:
            w.engine.script = script
            held: list[Ask] = []
            w.desk.when_opened = decide(w, held)
            for _ in range(5):
                await asyncio.gather(*(live(w, held) for _ in range(12)))
            while w.desk.open_tickets or len(w.desk.log.all("open")) < 60:  # the last of each client's first are on their way
                await w.desk.log.news()
            ends = [about for what, about in w.desk.log.items if what in ("ended", "cancel", "refuse")]
            assert sorted(ends) == sorted(ask.ticket for ask in w.desk.log.all("open"))
            assert len(ends) >= 60

    run(main())
