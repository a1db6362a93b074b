"""The fake engine plays its scenarios; the tests of the gateway and the daemon build on that."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from llm_daemon.daemon.logs import RotatingLog
from llm_daemon.daemon.probe import wait_ready
from llm_daemon.daemon.process import EngineProcess, scrubbed_env
from llm_daemon.engines.base import Grant, Location
from llm_daemon.spec import Artifact, Spec, Wish
from llm_daemon.testing.fake_engine import SERVER, FakeEngine
from llm_daemon.testing.running import Running

CHAT = {"messages": [{"role": "user", "content": "say what I say"}]}
Play = Callable[..., None]


@pytest.fixture
def play(fake_model: Callable[..., str], tmp_path: Path, generation: str) -> Play:
    """`play(script, **scenario)`: runs the coroutine function `script(engine)` against a ready fake engine."""

    def run(script: Callable[[Running], Awaitable[None]], slots: int = 1, **scenario: Any) -> None:
        async def main() -> None:
            adapter = FakeEngine()
            model = fake_model(**scenario)
            where = adapter.locate({})
            assert isinstance(where, Location)
            plan = adapter.plan(
                Spec(Wish(model), Artifact("file", model, model)), where, Grant(model, "m", "e.sock", 512, slots, 1)
            )
            process = await EngineProcess.start(
                plan,
                folder=str(tmp_path / "engine"),
                env=scrubbed_env(os.environ, generation),
                log=RotatingLog(str(tmp_path / "engine.log")),
                name="fake",
                on_exit=lambda exit: None,
            )
            try:
                await wait_ready(process, plan, adapter)
                await script(Running(process, plan))
            finally:
                await process.stop(force=True)
                process.log.close()

        asyncio.run(main())

    return run


async def said(engine: Running, line: str) -> None:
    deadline = time.monotonic() + 10
    while line not in engine.process.last_words().splitlines():
        assert time.monotonic() < deadline, engine.process.last_words()
        await asyncio.sleep(0.005)


def events(data: bytes) -> list[Any]:
    texts = [line.removeprefix(b"data: ") for line in data.splitlines() if line.startswith(b"data: ")]
    return [text.decode() if text == b"[DONE]" else json.loads(text) for text in texts]


def test_whole_and_streamed_answers_say_the_same(play: Play) -> None:
    async def script(engine: Running) -> None:
        _, whole = await engine.call("/v1/chat/completions", CHAT)
        assert whole["choices"][0]["message"]["content"] == "one two"
        assert whole["usage"]["completion_tokens"] == 2
        _connection, response = await engine.stream({**CHAT, "stream_options": {"include_usage": True}})
        rest = await asyncio.to_thread(response.read)
        *chunks, usage, done = events(rest)
        assert chunks[0]["choices"][0]["delta"] == {"content": " two"}  # `stream` has read the first event
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert usage["usage"] == whole["usage"]
        assert done == "[DONE]"
        _, text = await engine.call("/v1/completions", {"prompt": "x", "max_tokens": 1})
        assert text["choices"][0]["text"] == "one"
        _, native = await engine.call("/infill", {"n_predict": 1})
        assert native["content"] == "one"
        _connection.close()

    play(script, tokens=["one", " two"])


def test_echo_errors_and_other_routes(play: Play) -> None:
    async def script(engine: Running) -> None:
        _, answer = await engine.call("/v1/chat/completions", CHAT)
        assert answer["choices"][0]["message"]["content"] == "say what I say"
        _status, answer = await engine.call("/v1/embeddings", {"input": ["a", "bcd"]})
        assert [row["embedding"] for row in answer["data"]] == [[1.0, 1.0], [3.0, 1.0]]
        assert (await engine.call("/tokenize", {"content": "a bc"}))[1] == {"tokens": [1, 2]}
        assert (await engine.call("/none"))[0] == 404

    play(script, echo=True)


def test_error_status(play: Play) -> None:
    async def script(engine: Running) -> None:
        status, answer = await engine.call("/v1/chat/completions", CHAT)
        assert (status, answer["error"]["code"]) == (429, 429)

    play(script, error_status=429)


def test_slots_and_their_events(play: Play) -> None:
    """With one slot, the second request waits until the first one hangs up."""

    async def script(engine: Running) -> None:
        connection, response = await engine.stream(CHAT)
        second = asyncio.ensure_future(engine.call("/v1/chat/completions", {**CHAT, "max_tokens": 1}))
        await said(engine, "request 2 begin /v1/chat/completions")
        assert "request 2 slot" not in engine.process.last_words()
        response.close()
        connection.close()
        assert (await second)[0] == 200
        await said(engine, "request 1 disconnected")
        await said(engine, "request 2 end")

    play(script, tokens=2000, token_ms=5)


@pytest.mark.parametrize(
    ("ignores", "stream", "noticed"),
    [(True, True, False), ("nonstream", False, False), ("nonstream", True, True), (False, False, True)],
)
def test_who_notices_a_hang_up(play: Play, ignores: bool | str, stream: bool, noticed: bool) -> None:
    async def script(engine: Running) -> None:
        if stream:
            connection, response = await engine.stream(CHAT)
            response.close()
        else:
            from llm_daemon.testing.running import EngineConnection

            connection = EngineConnection(engine.process.socket)
            await asyncio.to_thread(connection.request, "POST", "/v1/chat/completions", json.dumps(CHAT))
            await said(engine, "request 1 slot")
        connection.close()
        await said(engine, "request 1 disconnected" if noticed else "request 1 end")

    # Who notices has not ended by itself before the hang-up, who does not ends soon.
    play(script, tokens=4000 if noticed else 40, token_ms=10, ignores_disconnect=ignores)


def test_crash_in_the_middle_of_a_stream(play: Play) -> None:
    async def script(engine: Running) -> None:
        connection, response = await engine.stream(CHAT)
        with pytest.raises(http.client.IncompleteRead):
            await asyncio.to_thread(response.read)
        connection.close()
        exit = await engine.process.wait()
        assert (exit.signal, exit.asked) == (6, False)
        assert "crashed in the middle" in engine.process.last_words()

    play(script, crash_after_tokens=3)


def test_a_slow_stop_ends_at_the_second_sigterm(play: Play) -> None:
    async def script(engine: Running) -> None:
        exit = await engine.process.stop()
        assert exit.status == 1

    play(script, stop_seconds=30, grace=0.1)


def test_it_starts_fast() -> None:
    """Hundreds of tests start it; imports are what a start costs."""

    def loaded(code: str) -> set[str]:
        argv = [sys.executable, "-I", "-S", "-c", f"import sys; {code}; print(*sys.modules)"]
        return set(subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split())

    own = loaded(f"import runpy; runpy.run_path({SERVER!r})") - loaded("import runpy")
    assert "json" in own
    assert not own & {"asyncio", "http", "ssl", "subprocess", "logging", "email", "urllib", "llm_daemon"}
    assert len(own) < 50
