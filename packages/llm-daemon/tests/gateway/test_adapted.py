"""Engines that want things their own way: a TCP port, their own model id, paths and key, and those that do not hear a hang-up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from llm_daemon.daemon import upstream
from llm_daemon.daemon.address import TCP, reserve
from llm_daemon.daemon.gateway import Route

from .fakes import CHAT, EngineCall, FakeEngine, World, until_gone


@contextlib.asynccontextmanager
async def tcp_engine(w: World, **route: Any) -> AsyncIterator[FakeEngine]:
    """Another engine, on TCP, that the desk sends everything to."""
    with reserve() as reserved:
        engine = FakeEngine(f"{TCP}{reserved.getsockname()[0]}:{reserved.getsockname()[1]}")
        await engine.start()
        w.desk.route = Route("m#1", engine.path, **route)
        try:
            yield engine
        finally:
            w.gateway.pool.cut()
            await engine.stop()


def test_over_tcp(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w, tcp_engine(w) as engine:
            client = await w.client()
            assert [(await client.ask()).status for _ in range(2)] == [200, 200]
            assert {call.connection for call in engine.calls} == {1}  # kept, as on a unix socket
            assert not w.engine.calls

    run(main())


def test_a_hang_up_reaches_an_engine_on_tcp(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w, tcp_engine(w) as engine:
            engine.script = until_gone
            client = await w.client()
            client.request()
            await engine.log.until("request")
            await client.close()
            await engine.log.until("gone")
            await w.desk.log.until("ended")

    run(main())


def test_nobody_listens_on_tcp(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            with reserve() as reserved:
                w.desk.route = Route("m#1", f"{TCP}{reserved.getsockname()[0]}:{reserved.getsockname()[1]}")
                answer = await (await w.client()).ask()
            assert (answer.status, answer.error["code"]) == (502, "engine_gone")

    run(main())


def test_id_fields_path_and_key(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            w.desk.route = Route(
                "m#1", w.engine.path, headers=(("Authorization", "Bearer its-own"),), served_id="/models/x",
                drop=frozenset({"user"}), paths={CHAT: "/v3/chat/completions"},
            )  # fmt: skip
            client = await w.client()
            body = b'{"messages":[],"model":"x@Q4?context=9","user":"me","seed":12345678901234567890}'
            for _ in range(2):  # the head of the second one is known
                assert (await client.ask(body=body)).status == 200
            assert (await client.ask(path="/upstream/x/props", body=b'{"user":1}')).status == 200
            first, second, passed = w.engine.calls
            assert first.head == second.head
            assert first.head.startswith(b"POST /v3/chat/completions HTTP/1.1\r\n")
            assert first.headers["authorization"] == "Bearer its-own"
            assert first.body == second.body == b'{"messages":[],"model":"/models/x","seed":12345678901234567890}'
            assert passed.head.startswith(b"POST /props ")
            assert (passed.body, passed.headers["authorization"]) == (b'{"user":1}', "Bearer its-own")
            # The next engine gets what it wants, on the same connection of the client.
            w.desk.route = Route("m#2", w.engine.path)
            assert (await client.ask(body=body)).status == 200
            assert (w.engine.calls[-1].head.split()[1], w.engine.calls[-1].body) == (CHAT.encode(), body)
            assert "authorization" not in w.engine.calls[-1].headers

    run(main())


def test_a_form_is_left_alone(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            w.desk.route = Route("m#1", w.engine.path, served_id="y")
            client = await w.client()
            assert (await client.ask(path="/v1/audio/transcriptions")).status == 200
            assert w.engine.calls[0].body.startswith(b"--x\r\n")

    run(main())


def test_what_it_does_not_serve(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            w.desk.route = Route("m#1", w.engine.path, only=frozenset({"/v1/embeddings"}))
            client = await w.client()
            refused = await client.ask()
            assert (refused.status, refused.error["code"]) == (404, "not_served")
            assert "/v1/embeddings" in refused.error["hint"]
            assert (await client.ask(path="/v1/embeddings")).status == 200
            assert len(w.engine.calls) == 1
            assert len(w.desk.log.all("ended")) == 2

    run(main())


def test_a_deaf_engine_keeps_its_slot_until_it_has_said_all(run: Any, world: Any) -> None:
    say = asyncio.Event()

    async def script(call: EngineCall) -> None:
        await say.wait()
        await call.answer(b'{"ok":true}')
        if call.headers.get("connection") == "close":
            call.writer.close()

    async def main() -> None:
        async with world() as w:
            w.desk.route, w.engine.script = Route("m#1", w.engine.path, confirms=True, deaf=frozenset({CHAT})), script
            client = await w.client()
            client.request()
            call: EngineCall = await w.engine.log.until("request")
            assert call.headers["connection"] == "close"
            await client.close()
            await w.desk.log.until("aborting")
            assert len(w.gateway.pool.leaving) == 1
            assert not call.reader.at_eof()
            assert not w.desk.log.all("ended")
            say.set()
            await w.desk.log.until("ended")
            assert not w.gateway.pool.leaving
            assert (await (await w.client()).ask()).status == 200  # and who stays is served

    run(main())


def test_a_deaf_engine_hears_the_end_of_a_stream(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            w.desk.route, w.engine.script = Route("m#1", w.engine.path, deaf=frozenset({CHAT})), until_gone
            client = await w.client()
            client.request(body=b'{"stream":true}')
            await w.engine.log.until("request")
            await client.close()
            await w.desk.log.until("ended")
            await w.engine.log.until("gone")

    run(main())


def test_a_deaf_engine_is_not_waited_for_for_ever(run: Any, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "OUTLAST", 0.05)

    async def main() -> None:
        async with world() as w:
            w.desk.route, w.engine.script = Route("m#1", w.engine.path, deaf=frozenset({CHAT})), until_gone
            client = await w.client()
            client.request()
            await w.engine.log.until("request")
            await client.close()
            await w.desk.log.until("ended")
            await w.engine.log.until("gone")

    run(main())
