"""Readiness, told from loading, refusing, hanging, crashing, and from a stranger's answers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop

from llm_daemon.core import silence
from llm_daemon.daemon.logs import RotatingLog
from llm_daemon.daemon.probe import Pulse, wait_ready
from llm_daemon.daemon.process import EngineProcess, scrubbed_env
from llm_daemon.engines.base import Grant, Location, Plan, Probe, Tcp
from llm_daemon.errors import EngineError, EngineTimeout, UsageError
from llm_daemon.spec import Artifact, Spec, Wish
from llm_daemon.testing.fake_engine import FakeEngine

Runner = Callable[[Coroutine[Any, Any, None]], None]
Start = Callable[..., contextlib.AbstractAsyncContextManager[tuple[EngineProcess, Plan]]]
ADAPTER = FakeEngine()


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Runner:
    runner: Runner = request.param
    return runner


@pytest.fixture
def engine(fake_model: Callable[..., str], tmp_path: Path, generation: str) -> Start:
    """`async with engine(stall=..., **scenario) as (process, plan)`."""

    @contextlib.asynccontextmanager
    async def start(wrap: tuple[str, ...] = (), **scenario: Any) -> AsyncIterator[tuple[EngineProcess, Plan]]:
        model = fake_model(**scenario)
        where = ADAPTER.locate({})
        assert isinstance(where, Location)
        plan = ADAPTER.plan(Spec(Wish(model), Artifact("file", model, model)), where, Grant(model, "m", "e.sock", 512, 1, 1))
        plan = replace(plan, argv=(*wrap, *plan.argv))
        process = await EngineProcess.start(
            plan,
            folder=str(tmp_path / "engine"),
            env=scrubbed_env(os.environ, generation),
            log=RotatingLog(str(tmp_path / "engine.log")),
            name="fake",
            on_exit=lambda exit: None,
        )
        try:
            yield process, plan
        finally:
            await process.stop(force=True)
            process.log.close()

    return start


async def listens(process: EngineProcess) -> None:
    for _ in range(3000):
        if "listening" in process.last_words():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(process.last_words())


@pytest.mark.parametrize(("how", "states"), [("503", ["starting", "loading", "ready"]), ("refuse", ["starting", "ready"])])
def test_states(run: Runner, engine: Start, how: str, states: list[str]) -> None:
    async def main() -> None:
        seen: list[str] = []
        async with engine(load_seconds=0.2, while_loading=how) as (process, plan):
            await wait_ready(process, plan, ADAPTER, seen.append)
        assert seen == states

    run(main())


def test_readiness_is_noticed_within_25_ms(run: Runner, engine: Start) -> None:
    async def main() -> None:
        late: list[float] = []
        while len(late) < 12 and min(late, default=1.0) >= 0.025:  # the best of some: the machine may be busy
            async with engine(load_seconds=0.1) as (process, plan):
                await wait_ready(process, plan, ADAPTER)
                late.append(time.monotonic() - process.last_activity)  # its last line was "ready"
                assert "ready" in process.last_words()
            os.unlink(process.socket)
        assert min(late) < 0.025

    run(main())


def test_a_crash_while_loading_is_told_at_once_in_its_own_words(run: Runner, engine: Start) -> None:
    async def main() -> None:
        async with engine(crash_while_loading="the flux is off", exit_code=9, load_seconds=0.1) as (process, plan):
            began = time.monotonic()
            with pytest.raises(EngineError) as caught:
                await wait_ready(process, plan, ADAPTER)
            assert time.monotonic() - began < 30
            error = caught.value
            assert error.code == "engine_start_failed"
            assert error.message == "fake did not start (exit status 9): the flux is off"
            assert error.data["exit"] == {"status": 9, "signal": None}
            assert str(error.data["last_words"]).endswith("error: the flux is off")
            assert error.data["log"] == process.log.path

    run(main())


@pytest.mark.parametrize(
    ("message", "cls", "code"), [("bad model: no", UsageError, "bad_model"), ("out of memory", EngineError, "out_of_memory")]
)
def test_whose_move_it_is(engine: Start, message: str, cls: type[Exception], code: str) -> None:
    async def main() -> None:
        async with engine(crash_while_loading=message) as (process, plan):
            with pytest.raises(cls) as caught:
                await wait_ready(process, plan, ADAPTER)
            assert getattr(caught.value, "code") == code  # noqa: B009

    asyncio.run(main())


def test_killed_by_a_signal(engine: Start) -> None:
    async def main() -> None:
        async with engine(kill_self_while_loading=4) as (process, plan):
            with pytest.raises(EngineError, match="killed by SIGILL"):
                await wait_ready(process, plan, ADAPTER)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("scenario", "reason"),
    [
        ({"hang": True}, "does not answer"),
        ({"never_ready": True}, "answers 503"),
        ({"never_ready": True, "while_loading": "refuse"}, "does not listen"),
    ],
)
def test_no_progress_is_an_end(run: Runner, engine: Start, scenario: dict[str, Any], reason: str) -> None:
    async def main() -> None:
        async with engine(stall=0.6, **scenario) as (process, plan):
            if "while_loading" not in scenario:
                await listens(process)  # how long its program takes to begin is not the subject
            began = time.monotonic()
            with pytest.raises(EngineTimeout, match=reason):
                await wait_ready(process, plan, ADAPTER)
            assert 0.5 < time.monotonic() - began < 30
            assert process.exit is None  # stopping it is the caller's

    run(main())


def test_computing_for_ever_is_an_end_too(engine: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "MUTE", 3)

    async def main() -> None:
        async with engine(stall=1, never_ready=True, load_burns_cpu=True, silent=True) as (process, plan):
            pulse = Pulse(process, plan.stall)
            with pytest.raises(EngineTimeout):
                await wait_ready(process, plan, ADAPTER, pulse=pulse)
            assert pulse.silence.mute >= 3
            assert process.exit is None

    asyncio.run(main())


@pytest.mark.parametrize("sign_of_life", [{"load_noise_ms": 50}, {"load_burns_cpu": True, "silent": True}])
def test_slow_is_not_stuck(engine: Start, sign_of_life: dict[str, Any]) -> None:
    """Loads three times as long as it may be without progress."""

    async def main() -> None:
        async with engine(stall=0.8, load_seconds=2.4, while_loading="refuse", **sign_of_life) as (process, plan):
            await wait_ready(process, plan, ADAPTER)

    asyncio.run(main())


def test_a_stranger_on_the_socket_is_not_the_engine(run: Runner, engine: Start, tmp_path: Path) -> None:
    async def main() -> None:
        (tmp_path / "engine").mkdir()
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.bind(str(tmp_path / "engine" / "e.sock"))
            stranger.listen()
            async with engine(never_ready=True, while_loading="refuse") as (process, plan):
                with pytest.raises(EngineError, match=rf"process {os.getpid()} .* answers in place of fake") as caught:
                    await wait_ready(process, plan, ADAPTER)
                assert caught.value.code == "address_in_use"

    run(main())


def test_a_worker_below_the_engine_may_answer(engine: Start) -> None:
    """A wrapper script's child listens: not the engine's own pid, but in the keeper's tree."""

    async def main() -> None:
        async with engine(wrap=("/bin/sh", "-c", '"$@" & wait', "sh")) as (process, plan):
            await wait_ready(process, plan, ADAPTER)
        assert "ready" in process.last_words()

    asyncio.run(main())


def test_cancelling_leaves_no_task_and_the_engine_running(run: Runner, engine: Start) -> None:
    async def main() -> None:
        async with engine(never_ready=True) as (process, plan):
            tasks = asyncio.all_tasks()
            loading = asyncio.Event()
            states = {"starting": lambda: None, "loading": loading.set}
            waiting = asyncio.ensure_future(wait_ready(process, plan, ADAPTER, lambda state: states[state]()))
            await loading.wait()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert asyncio.all_tasks() == tasks
            assert process.exit is None

    run(main())


def test_an_answer_that_is_not_http_is_not_readiness(tmp_path: Path, generation: str) -> None:
    async def main() -> None:
        code = """
import socket
s = socket.socket(socket.AF_UNIX)
s.bind("e.sock")
s.listen()
while True:
    s.accept()[0].sendall(b"hello 200 OK" + bytes([13, 10]))
"""
        plan = Plan((sys.executable, "-I", "-S", "-c", code), "e.sock", stall=0.5)
        process = await EngineProcess.start(
            plan,
            folder=str(tmp_path / "engine"),
            env=scrubbed_env(os.environ, generation),
            log=RotatingLog(str(tmp_path / "engine.log")),
            name="odd",
            on_exit=lambda exit: None,
        )
        with pytest.raises(EngineTimeout):
            await wait_ready(process, plan, ADAPTER)
        await process.stop(force=True)

    asyncio.run(main())


def test_one_that_listens_on_every_interface_is_refused(tmp_path: Path, generation: str) -> None:
    async def main() -> None:
        code = """
import socket
s = socket.create_server(("0.0.0.0", 0))
print("port", s.getsockname()[1], flush=True)
while True:
    s.accept()
"""
        plan = Plan((sys.executable, "-I", "-S", "-c", code), Tcp("127.0.0.1", 0, told=r"port (\d+)"))
        process = await EngineProcess.start(
            plan,
            folder=str(tmp_path / "engine"),
            env=scrubbed_env(os.environ, generation),
            log=RotatingLog(str(tmp_path / "engine.log")),
            name="odd",
            on_exit=lambda exit: None,
        )
        with pytest.raises(EngineError, match="listens on every interface") as caught:
            await wait_ready(process, plan, ADAPTER)
        assert caught.value.code == "engine_unfit"
        await process.stop(force=True)

    asyncio.run(main())


def test_one_that_takes_any_key_is_refused(engine: Start) -> None:
    async def main() -> None:
        async with engine() as (process, plan):
            guarded = replace(plan, probes=(Probe(guarded=True),), headers=(("Authorization", "Bearer x"),))
            with pytest.raises(EngineError, match="do not have its key"):
                await wait_ready(process, guarded, ADAPTER)

    asyncio.run(main())


def test_the_next_probe_is_asked_where_a_route_is_missing(engine: Start) -> None:
    async def main() -> None:
        async with engine() as (process, plan):
            await wait_ready(process, replace(plan, probes=(Probe("/no/such"), Probe("/v1/models"))), ADAPTER)
            said = [line for line in process.last_words().splitlines() if line.startswith("get ")]
            assert said == ["get /no/such", "get /v1/models"]
            first = Probe("/v1/completions", body=b'{"prompt": "Hi", "max_tokens": 1}')
            await wait_ready(process, replace(plan, warm_up=first), ADAPTER)
            assert "request 1 end" in process.last_words()
            with pytest.raises(EngineError, match="answers its first request with 404"):
                await wait_ready(process, replace(plan, warm_up=Probe("/no/such", body=b"{}")), ADAPTER)

    asyncio.run(main())


def test_files_of_a_plan_are_for_its_user_alone(tmp_path: Path, generation: str) -> None:
    async def main() -> None:
        process = await EngineProcess.start(
            Plan(("/bin/sh", "-c", "stat -c %a key; cat key"), "e.sock", files={"key": "k3y"}),
            folder=str(tmp_path / "engine"),
            env=scrubbed_env(os.environ, generation),
            log=RotatingLog(str(tmp_path / "engine.log")),
            name="odd",
            on_exit=lambda exit: None,
        )
        await process.wait()
        assert process.last_words() == "600\nk3y"

    asyncio.run(main())
