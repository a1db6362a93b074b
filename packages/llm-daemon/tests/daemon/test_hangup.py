"""Measured hang-ups: engines that notice, that do not, and that do not answer as they should."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm_daemon.daemon import hangup
from llm_daemon.daemon.logs import RotatingLog
from llm_daemon.daemon.probe import wait_ready
from llm_daemon.daemon.process import EngineProcess, scrubbed_env
from llm_daemon.engines.base import Grant, Location, Plan
from llm_daemon.errors import EngineError, EngineTimeout
from llm_daemon.spec import Artifact, Spec, Wish
from llm_daemon.testing.fake_engine import FakeEngine

Start = Callable[..., contextlib.AbstractAsyncContextManager[tuple[EngineProcess, Plan]]]
ADAPTER = FakeEngine()
NATURAL = 3.0  # seconds: half of them are what a busy machine may add to a hang-up that is noticed at once


@pytest.fixture
def engine(fake_model: Callable[..., str], tmp_path: Path, generation: str) -> Start:
    """`async with engine(slots=2, **scenario) as (process, plan)`: ready."""

    @contextlib.asynccontextmanager
    async def start(slots: int = 1, **scenario: Any) -> AsyncIterator[tuple[EngineProcess, Plan]]:
        model = fake_model(**{"tokens": 4000, "token_ms": 2, **scenario})
        where = ADAPTER.locate({})
        assert isinstance(where, Location)
        grant = Grant(model, "m", "e.sock", 512, slots, 1)
        plan = ADAPTER.plan(Spec(Wish(model), Artifact("file", model, model)), where, grant)
        process = await EngineProcess.start(
            plan, folder=str(tmp_path / "engine"), env=scrubbed_env(os.environ, generation),
            log=RotatingLog(str(tmp_path / "engine.log")), name="fake", on_exit=lambda exit: None,
        )  # fmt: skip
        try:
            await wait_ready(process, plan, ADAPTER)
            yield process, plan
        finally:
            await process.stop(force=True)
            process.log.close()

    return start


async def measured(process: EngineProcess, plan: Plan, **options: Any) -> dict[str, hangup.HangUps]:
    return await hangup.measure(process.socket, plan, **{"times": 1, "natural": NATURAL, **options})


@pytest.mark.parametrize("slots", [1, 3])
def test_an_engine_that_notices_only_streams(engine: Start, slots: int) -> None:
    async def main() -> None:
        steps: list[str] = []
        async with engine(slots, ignores_disconnect="nonstream") as (process, plan):
            found = await measured(process, plan, on_step=steps.append)
        assert steps == list(hangup.KINDS) == list(found)
        assert {kind: ups.noticed for kind, ups in found.items()} == {"streaming": True, "non-streaming": True, "plain": False}
        for kind in ("streaming", "non-streaming"):
            [one] = found[kind].each
            assert one.closed is not None and max(one.closed, one.freed) == one.ms < one.left
        assert found["plain"].ms > 250

    asyncio.run(main())


def test_a_deaf_engine(engine: Start) -> None:
    async def main() -> None:
        async with engine(2, ignores_disconnect=True) as (process, plan):
            found = await measured(process, plan)
        assert not any(ups.noticed for ups in found.values())
        assert [one.closed for ups in found.values() for one in ups.each] == [None] * 3
        assert found["plain"] is found["non-streaming"]  # the gateway asks it as the client does

    asyncio.run(main())


def test_an_engine_that_is_said_to_confirm_and_does_not(engine: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hangup, "LET_GO", 0.3)

    async def main() -> None:
        async with engine(ignores_disconnect=True) as (process, plan):
            found = await measured(process, replace(plan, confirms_hangup=True))
        [one] = found["streaming"].each
        assert one.closed is None and not one.noticed

    asyncio.run(main())


def test_company_that_ends_is_replaced(engine: Start) -> None:
    async def main() -> None:
        async with engine(2, tokens=1600) as (process, plan):  # three seconds of company: less than all this takes
            found = await measured(process, plan, times=8, natural=2.4)
        assert all(len(ups.each) == 8 and ups.noticed for ups in found.values())

    asyncio.run(main())


def test_more_slots_than_declared_are_an_error(engine: Start) -> None:
    async def main() -> None:
        async with engine(2) as (process, plan):
            with pytest.raises(EngineError, match="serves more at once") as caught:
                await measured(process, replace(plan, slots=1), natural=0.4)
        assert caught.value.code == "not_measured"

    asyncio.run(main())


def test_an_engine_that_refuses_is_quoted(engine: Start) -> None:
    async def main() -> None:
        async with engine(error_status=500) as (process, plan):
            with pytest.raises(EngineError, match=r"500 Internal Server Error.*as the scenario wants") as caught:
                await measured(process, plan)
        assert caught.value.code == "not_measured"
        with pytest.raises(EngineError, match="cannot connect"):
            await measured(process, plan)

    asyncio.run(main())


def test_an_engine_that_speaks_http_1_0(tmp_path: Path) -> None:
    """As mlx-lm: Python's own server, whose answers end with the connection."""
    slot = asyncio.Lock()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        [length] = re.findall(rb"Content-Length: (\d+)", head)
        tokens = json.loads(await reader.readexactly(int(length)))["max_tokens"]
        async with slot:
            writer.write(b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n: keepalive 38/39\n\n")
            while tokens and not writer.is_closing():
                writer.write(b"data: {}\n\n")
                await asyncio.sleep(0.002)
                tokens -= 1
        writer.close()

    async def main() -> None:
        path = str(tmp_path / "e.sock")
        async with await asyncio.start_unix_server(answer, path):
            found = await hangup.measure(path, Plan((), path), times=1, natural=NATURAL)
        assert found["streaming"].noticed

    asyncio.run(main())


def test_an_engine_that_gets_stuck(engine: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hangup, "PATIENCE", 0.5)

    async def main() -> None:
        async with engine(stuck_after_tokens=0) as (process, plan):
            with pytest.raises(EngineTimeout, match=r"within 0\.5 s"):
                await measured(process, plan)

    asyncio.run(main())


def test_cancelled_it_hangs_up_everywhere(engine: Start, tmp_path: Path) -> None:
    async def main() -> None:
        async with engine(2, tokens=100_000) as (process, plan):
            begun = asyncio.Event()
            task = asyncio.create_task(measured(process, plan, natural=60, on_step=lambda kind: begun.set()))
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            # Both slots are free again long before anything ends by itself: company has tokens for 200 s.
            async with asyncio.timeout(60):
                found = await measured(process, plan)
            assert found["streaming"].noticed

    asyncio.run(main())
