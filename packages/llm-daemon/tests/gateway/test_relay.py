"""What passes through, what is written anew, and what an engine's misbehaviour looks like to a client."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llm_daemon.core.routes import RELAYED
from llm_daemon.daemon.gateway import Ask, Route
from llm_daemon.daemon.upstream import Pool
from llm_daemon.errors import EngineError, Unavailable, UsageError

from .fakes import BODY, CHAT, EngineCall, flood, until_gone

EVENTS = [b'data: {"n":%d}\n\n' % n for n in range(5)] + [b"data: [DONE]\n\n"]


async def stream(call: EngineCall) -> None:
    await call.begin_stream()
    for event in EVENTS:
        await call.chunk(event)
    await call.chunk(b"")


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/embeddings"])
@pytest.mark.parametrize("unix", [False, True])
def test_relay(run: Any, world: Any, path: str, unix: bool) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client(unix=unix)
            body = b'{"model": "smollm2-135m", "stream": false, "x": [1, {"model": "other"}]}'
            answer = await client.ask(path=path + "?api-version=1", body=body)
            assert (answer.status, answer.body, answer.reason) == (200, b'{"ok":true}', "OK")
            ask = w.desk.log.all("open")[0]
            assert ask == Ask(
                ask.ticket, path, "smollm2-135m", False, "unix" if unix else "tcp", RELAYED[path].lane, peer=os.getpid() * unix
            )
            assert answer.headers["x-llm-ticket"] == ask.ticket
            assert answer.headers["x-llm-instance"] == "m#1"
            assert re.fullmatch(r"queue;dur=[\d.]+, load;dur=[\d.]+, engine;dur=[\d.]+", answer.headers["server-timing"])
            assert w.engine.calls[0].body == body
            assert w.engine.calls[0].head.startswith(b"POST %b HTTP/1.1\r\n" % path.encode())
            assert [name for name, _ in w.desk.log.items] == ["open", "ended"]

    run(main())


def test_only_listed_headers_reach_the_engine_and_the_desks_own(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            w.desk.route = Route("m#1", w.engine.path, (("Authorization", "Bearer engine-key"),))
            client = await w.client()
            await client.ask(
                accept="text/event-stream", user_agent="Test/1", x_conversation_id="7", cookie="a=b", te="trailers",
                connection="keep-alive, x-mine", x_mine="1", x_llm_lane="interactive", accept_encoding="gzip", forwarded="for=x",
                content_type="application/json; charset=utf-8",
            )  # fmt: skip
            assert w.engine.calls[0].headers == {
                "host": "localhost", "content-length": str(len(BODY)), "content-type": "application/json; charset=utf-8",
                "accept": "text/event-stream", "user-agent": "Test/1", "authorization": "Bearer engine-key",
            }  # fmt: skip

    run(main())


def test_the_engines_headers_are_filtered_and_its_status_kept(run: Any, world: Any) -> None:
    async def script(call: EngineCall) -> None:
        await call.send(
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 418 I am a teapot\r\nServer: x\r\nAccess-Control-Allow-Origin: *\r\n"
            b"Keep-Alive: timeout=5\r\nX-LLM-Ticket: forged\r\nX-Kept: 1\r\nContent-Length: 2\r\n\r\nhi"
        )

    async def main() -> None:
        async with world() as w:
            w.engine.script = script
            answer = await (await w.client()).ask()
            assert (answer.status, answer.reason, answer.body) == (418, "I am a teapot", b"hi")
            assert set(answer.headers) == {"x-kept", "content-length", "x-llm-ticket", "x-llm-instance", "server-timing"}
            assert answer.headers["x-llm-ticket"] != "forged"

    run(main())


def test_a_stream_passes_chunk_by_chunk(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            step = asyncio.Semaphore(0)

            async def script(call: EngineCall) -> None:
                await call.begin_stream()
                for event in EVENTS:
                    await step.acquire()
                    await call.chunk(event)
                await call.chunk(b"")

            w.engine.script = script
            client = await w.client()
            client.request(body=b'{"model":"m","stream":true}')
            head = await client.head()  # before the first event exists
            assert (head.headers["transfer-encoding"], head.headers["content-type"]) == ("chunked", "text/event-stream")
            for event in EVENTS:
                step.release()
                assert await client.chunk() == event
            assert await client.chunk() == b""
            assert w.desk.log.all("open")[0].stream is True
            assert (await client.ask(method="GET", path="/health")).status == 200  # the connection goes on

    run(main())


def test_byte_by_byte_both_ways(run: Any, world: Any) -> None:
    async def script(call: EngineCall) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        for byte in head + b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n":
            await call.send(bytes([byte]))
            await asyncio.sleep(0)

    async def main() -> None:
        async with world() as w:
            w.engine.script = script
            client = await w.client()
            for byte in client.raw("POST", CHAT, BODY):
                client.send(bytes([byte]))
                await asyncio.sleep(0)
            answer = await client.answer()
            assert (answer.status, answer.body, answer.whole) == (200, b"hello world", True)

    run(main())


def test_big_bodies_both_ways(run: Any, world: Any) -> None:
    async def script(call: EngineCall) -> None:
        await call.answer(call.body)

    async def main() -> None:
        async with world() as w:
            w.engine.script = script
            body = b'{"model":"m","text":"' + b"abcdefgh" * 1_000_000 + b'"}'
            client = await w.client()
            for chunked in (False, True):
                if chunked:
                    client.request(body=b"", content_length=None, transfer_encoding="chunked")
                    client.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
                else:
                    client.request(body=body)
                answer = await client.answer()
                assert hashlib.sha256(answer.body).digest() == hashlib.sha256(body).digest()
            assert all(call.headers["content-length"] == str(len(body)) for call in w.engine.calls)

    run(main())


def test_an_answer_until_close_and_old_clients(run: Any, world: Any) -> None:
    async def until_close(call: EngineCall) -> None:
        await call.send(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nall of it")
        call.writer.close()

    async def main() -> None:
        async with world() as w:
            w.engine.script = until_close
            for version in ("1.1", "1.0"):
                client = await w.client()
                answer = await client.ask(version=version)
                assert (answer.body, answer.headers["connection"]) == (b"all of it", "close")
                assert await client.closed()
            w.engine.script = stream
            client = await w.client()
            answer = await client.ask(version="1.0")
            assert "transfer-encoding" not in answer.headers
            assert (answer.body, answer.headers["connection"]) == (b"".join(EVENTS), "close")
            assert await client.closed()
            w.engine.script = lambda call: call.answer(b"sized")
            client = await w.client()
            answer = await client.ask(version="1.0")
            assert (answer.body, answer.headers["content-length"], answer.headers["connection"]) == (b"sized", "5", "close")
            assert await client.closed()
            assert w.desk.log.all("cancel") == []

    run(main())


def test_connection_close_is_kept(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            for method, path in (("POST", CHAT), ("GET", "/health"), ("GET", "/nowhere")):
                client = await w.client()
                answer = await client.ask(method, path, connection="close")
                assert answer.headers["connection"] == "close"
                assert await client.closed()

    run(main())


def test_pipelined_requests_are_answered_in_order_and_one_at_a_time(run: Any, world: Any) -> None:
    async def script(call: EngineCall) -> None:
        await call.answer(call.body)

    async def main() -> None:
        async with world() as w:
            w.engine.script = script
            w.desk.hold()
            client = await w.client()
            bodies = [b'{"model":"%d"}' % n for n in range(5)]
            client.send(b"".join(client.raw("POST", CHAT, b) + client.raw("GET", "/health", None) for b in bodies))
            for n, body in enumerate(bodies):
                ask = await w.desk.log.until("open", n + 1)
                assert len(w.desk.log.all("open")) == n + 1
                w.desk.turns[ask.ticket].run(w.desk.route)
                assert (await client.answer()).body == body
                assert (await client.answer()).json == {"status": "ok"}

    run(main())


def test_too_many_pipelined_requests_cost_the_connection_not_the_memory(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world(pipeline=3) as w:
            w.desk.hold()
            client = await w.client()
            client.request()
            ask = await w.desk.log.until("open")
            health = client.raw("GET", "/health", None)
            client.send(health * 10)
            client.send(b"x" * 1_000_000)  # nobody listens any more
            await client.writer.drain()
            w.desk.turns[ask.ticket].run(w.desk.route)
            statuses = [(await client.answer()).status for _ in range(4)]
            assert statuses == [200] * 4
            assert await client.closed()

    run(main())


def test_a_flooding_client_can_still_hang_up(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world(pipeline=3) as w:
            w.desk.hold()
            client = await w.client()
            client.request()
            await w.desk.log.until("open")
            client.send(client.raw("GET", "/health", None) * 1000)
            await client.writer.drain()
            client.reset()
            await w.desk.log.until("cancel")

    run(main())


def test_a_slow_reader_holds_the_engine_back_with_bounded_memory(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            blocked, total = asyncio.Event(), 64 * 1024 * 1024
            w.engine.script = lambda call: flood(call, total, blocked)
            client = await w.client()
            client.request()
            head = await client.head()
            await blocked.wait()
            assert w.engine.calls[0].sent < 16 * 1024 * 1024, "the kernel's buffers and ours together hold less than that"
            (connection,) = w.gateway.connections
            assert connection.transport.get_write_buffer_size() < 1024 * 1024
            got = 0
            while got < int(head.headers["content-length"]):
                got += len(await client.reader.read(1 << 20))
            assert (await client.ask(method="GET", path="/health")).status == 200

    run(main())


def test_a_client_that_reads_nothing_gets_no_further_answers(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world(pipeline=10_000) as w:
            models: list[dict[str, object]] = w.desk.models()
            asked = 0

            def many() -> list[dict[str, object]]:
                nonlocal asked
                asked += 1
                return models * 10_000

            w.desk.models = many
            client = await w.client()
            client.send(client.raw("GET", "/v1/models", None) * 200)
            one = len(msgspec.json.encode({"object": "list", "data": models * 10_000}))
            await client.head()
            (connection,) = w.gateway.connections
            assert connection.transport.get_write_buffer_size() < 4 * one
            assert asked < 50

    run(main())


# -- refusals by the desk


def test_a_refusal_before_the_answer(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            errors = [
                Unavailable("the queue is full", code="queue_full", retry_after=2.1, hint="wait"),
                EngineError("it died", code="engine_start_failed", last_words="bad magic\nbye", log="x.log"),
                UsageError("no model 'm'", code="unknown_model", status=404),
            ]
            client = await w.client()
            answers = []
            for error in errors:
                w.desk.when_opened = lambda ask, turn, error=error: w.desk.refuse(ask.ticket, error)  # inside open()
                answers.append(await client.ask())
            assert [a.status for a in answers] == [503, 502, 404]
            assert answers[0].headers["retry-after"] == "3"
            assert "retry-after" not in answers[2].headers
            assert answers[0].error == {
                "message": "the queue is full", "type": "unavailable_error", "param": None, "code": "queue_full", "hint": "wait",
                "retry_after": 2.1,
            }  # fmt: skip
            assert (answers[1].error["last_words"], answers[1].error["log"]) == ("bad magic\nbye", "x.log")
            assert answers[0].headers["x-llm-ticket"] == w.desk.log.all("open")[0].ticket
            assert w.engine.calls == []

    run(main())


def test_a_desk_that_raises(run: Any, world: Any, tmp_path: Path) -> None:
    async def main() -> None:
        async with world() as w:

            def raising(ask: Ask, turn: Any) -> None:
                w.desk.open_tickets.remove(ask.ticket)
                raise Unavailable("draining", code="draining")

            w.desk.when_opened = raising
            answer = await (await w.client()).ask()
            assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (503, "draining", "1")

    run(main())


def test_a_bug_behind_the_desk_is_answered_and_reported(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            reported: list[Any] = []
            asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context["exception"]))
            bug = ZeroDivisionError("oops")

            def broken(*_: Any) -> Any:
                w.desk.open_tickets.clear()
                raise bug

            w.desk.when_opened = w.desk.models = broken
            client = await w.client()
            for answer in (await client.ask(), await client.ask("GET", "/v1/models")):
                assert (answer.status, answer.error["code"]) == (500, "bug")
            assert (await client.ask("GET", "/health")).status == 200
            assert reported == [bug, bug]

    run(main())


def test_a_refusal_of_a_running_ticket(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            w.engine.script = until_gone
            client = await w.client()
            client.request()
            call = await w.engine.log.until("request")
            w.desk.abort(w.desk.log.all("open")[0].ticket, Unavailable("superseded", code="superseded", status=409))
            answer = await client.answer()
            assert (answer.status, answer.error["code"]) == (409, "superseded")
            assert await w.engine.log.until("gone") == call.connection
            w.engine.script = stream
            assert (await client.ask()).body == b"".join(EVENTS)  # the client's connection goes on

    run(main())


# -- engines that misbehave


def test_nobody_listens(run: Any, world: Any, tmp_path: Path) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            for path in (tmp_path / "absent.sock", tmp_path / ("x" * 150), Path(w.engine.path)):
                if str(path) == w.engine.path:
                    await w.engine.stop()
                w.desk.route = Route("m#1", str(path))
                answer = await client.ask()
                assert (answer.status, answer.error["code"], answer.error["type"]) == (502, "engine_gone", "server_error")
                assert answer.error["message"].startswith("the engine of m did not answer")  # its model, not our own name for it
            assert len(w.desk.log.all("ended")) == 3

    run(main())


@pytest.mark.parametrize(
    "said", [b"", b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\nContent-Le", b"HTTP/1.1 100 Continue\r\n\r\n", b"rubbish\r\n\r\n"]
)
def test_death_before_the_head(run: Any, world: Any, said: bytes) -> None:
    async def script(call: EngineCall) -> None:
        await call.send(said)
        call.writer.close()

    async def main() -> None:
        async with world() as w:
            w.engine.script = script
            client = await w.client()
            answer = await client.ask()
            assert (answer.status, answer.error["code"]) == (502, "engine_gone")
            assert len(w.engine.calls) == 1  # a fresh connection is not tried again
            assert w.desk.log.all("ended") != []
            assert (await client.ask("GET", "/health")).status == 200

    run(main())


def test_the_desk_may_have_a_lost_request_run_once_more(run: Any, world: Any) -> None:
    async def script(call: EngineCall) -> None:
        bodies.append(call.body)
        if len(bodies) == 1:
            call.writer.close()
        else:
            await call.answer(b"{}")

    bodies: list[bytes] = []

    async def main() -> None:
        async with world() as w:
            w.engine.script, w.desk.takes_back = script, True
            client = await w.client()
            answer = await client.ask()
            assert (answer.status, answer.headers["x-llm-replayed"]) == (200, "1")
            assert bodies[0] == bodies[1] != b""
            assert len(w.desk.log.all("lost")) == len(w.desk.log.all("ended")) == 1

    run(main())


def test_a_request_is_never_run_a_third_time(run: Any, world: Any) -> None:
    async def script(call: EngineCall) -> None:
        call.writer.close()

    async def main() -> None:
        async with world() as w:
            w.engine.script, w.desk.takes_back = script, True
            client = await w.client()
            answer = await client.ask()
            assert (answer.status, answer.error["code"]) == (502, "engine_gone")
            assert len(w.desk.log.all("lost")) == len(w.desk.log.all("ended")) == 1

    run(main())


@pytest.mark.parametrize("tail", [b"", b"data: {", b"data: {}\n"])
@pytest.mark.parametrize("cut", [b"", b"20\r\npart of a ch", b"2", b"5;x\r\n"])
@pytest.mark.parametrize("reset", [False, True])
def test_death_in_mid_stream_ends_with_an_error_event(run: Any, world: Any, tail: bytes, cut: bytes, reset: bool) -> None:
    async def main() -> None:
        async with world() as w:
            relayed = asyncio.Event()

            async def script(call: EngineCall) -> None:
                await call.begin_stream()
                await call.chunk(EVENTS[0])
                if tail:
                    await call.chunk(tail)
                await call.send(cut)
                await relayed.wait()
                call.die() if reset else call.writer.close()

            w.engine.script = script
            client = await w.client()
            client.request(body=b'{"stream":true}')
            head = await client.head()
            seen = b""
            while len(seen) < len(EVENTS[0] + tail):
                seen += await client.chunk()
            relayed.set()
            while piece := await client.chunk():
                seen += piece
            assert head.status == 200
            assert seen.startswith(EVENTS[0] + tail)
            event = seen.removesuffix(b"\n\n").rsplit(b"\n\n", 1)[1]  # an event of its own, whatever came before
            error = msgspec.json.decode(event.removeprefix(b"data: "))["error"]
            assert (error["code"], error["type"]) == ("engine_gone", "server_error")
            assert len(w.desk.log.all("ended")) == 1
            assert (await client.ask("GET", "/health")).status == 200  # properly ended: the connection goes on

    run(main())


def test_death_in_mid_stream_for_an_old_client(run: Any, world: Any) -> None:
    async def script(call: EngineCall) -> None:
        await call.begin_stream()
        await call.chunk(EVENTS[0])
        call.die()

    async def main() -> None:
        async with world() as w:
            w.engine.script = script
            answer = await (await w.client()).ask(version="1.0")
            assert answer.body.startswith(EVENTS[0] + b'data: {"error":')

    run(main())


@pytest.mark.parametrize("framing", [b"Content-Length: 10\r\n\r\nhal", b"Transfer-Encoding: chunked\r\n\r\n3\r\nhal\r\n"])
def test_death_in_mid_body_is_never_taken_for_the_end(run: Any, world: Any, framing: bytes) -> None:
    async def script(call: EngineCall) -> None:
        await call.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + framing)
        call.writer.close()

    async def main() -> None:
        async with world() as w:
            w.engine.script = script
            client = await w.client()
            answer = await client.ask()
            assert (answer.body, answer.whole) == (b"hal", False)
            assert len(w.desk.log.all("ended")) == 1

    run(main())


def test_more_than_the_answer_is_not_relayed(run: Any, world: Any) -> None:
    async def script(call: EngineCall) -> None:
        one = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
        await call.send(one + one)

    async def main() -> None:
        async with world() as w:
            w.engine.script = script
            client = await w.client()
            assert (await client.ask()).body == b"hi"
            assert (await client.ask("GET", "/health")).json == {"status": "ok"}
            assert (await client.ask()).body == b"hi"
            assert [call.connection for call in w.engine.calls] == [1, 2]

    run(main())


# -- connections to engines


def test_engine_connections_are_reused(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world(pool=Pool(keep=2, idle=60)) as w:
            client = await w.client()
            for _ in range(3):
                await client.ask()
            assert [call.connection for call in w.engine.calls] == [1, 1, 1]

    run(main())


def test_engine_connections_are_closed_when_idle(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world(pool=Pool(keep=2, idle=0.05)) as w:
            client = await w.client()
            await client.ask()
            assert await w.engine.log.until("gone") == 1  # by itself
            await client.ask()
            assert w.engine.calls[-1].connection == 2

    run(main())


def test_only_a_few_idle_connections_are_kept(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world(pool=Pool(keep=2, idle=60)) as w:
            go = asyncio.Event()

            async def script(call: EngineCall) -> None:
                await go.wait()
                await call.answer(b"{}")

            w.engine.script = script
            clients = [await w.client() for _ in range(5)]
            for client in clients:
                client.request()
            await w.engine.log.until("request", 5)
            go.set()
            for client in clients:
                assert (await client.answer()).status == 200
            await w.engine.log.until("gone", 3)

    run(main())


def test_a_reused_connection_that_dies_is_tried_once_more(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world(pool=Pool(idle=60)) as w:
            deaths = 1

            async def script(call: EngineCall) -> None:
                nonlocal deaths
                if len(w.engine.calls) > 1 and deaths:
                    deaths -= 1
                    call.die()
                else:
                    await call.answer(call.body)

            w.engine.script = script
            client = await w.client()
            for expected in (200, 200):
                answer = await client.ask(body=b'{"model":"again"}')
                assert (answer.status, answer.body) == (expected, b'{"model":"again"}')
            assert [call.connection for call in w.engine.calls] == [1, 1, 2]
            deaths = 2
            answer = await client.ask()
            assert (answer.status, answer.error["code"]) == (502, "engine_gone")
            assert [call.connection for call in w.engine.calls] == [1, 1, 2, 2, 3]
            assert len(w.desk.log.all("ended")) == 3

    run(main())


def test_an_engine_that_closes_an_idle_connection_costs_nothing(run: Any, world: Any) -> None:
    async def script(call: EngineCall) -> None:
        await call.answer(b"{}")
        call.writer.close()

    async def main() -> None:
        async with world(pool=Pool(idle=60)) as w:
            w.engine.script = script
            client = await w.client()
            for n in range(5):
                assert (await client.ask()).status == 200
                if n % 2:
                    await w.engine.log.until("gone", n + 1)

    run(main())


def test_cut_closes_the_connections_to_one_engine(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world(pool=Pool(idle=60)) as w:
            idle, busy = await w.client(), await w.client()
            assert (await idle.ask()).status == 200
            w.engine.script = until_gone
            busy.request()
            await w.engine.log.until("request", 2)
            idle.request()
            await w.engine.log.until("request", 3)
            w.gateway.cut("elsewhere")
            assert w.gateway.busy == 2
            w.gateway.cut(w.engine.path)
            for client in (idle, busy):
                assert (await client.answer()).error["code"] == "engine_gone"
            await w.engine.log.until("gone", 2)
            assert len(w.desk.log.all("ended")) == 3

    run(main())


def test_an_engine_whose_accept_queue_is_full_is_waited_for(run: Any, world: Any, tmp_path: Path) -> None:
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
                listener.accept()[0].close()  # room for one more
                listener.setblocking(False)
                server, _ = await asyncio.get_running_loop().sock_accept(listener)
                with server:
                    assert (await asyncio.get_running_loop().sock_recv(server, 4096)).startswith(b"POST")
                    await asyncio.get_running_loop().sock_sendall(server, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                    assert (await client.answer()).body == b"ok"

    run(main())
