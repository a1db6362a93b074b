"""What every engine adapter must do, as tests.  For an adapter of your own:

    class TestMine(EngineConformance):
        adapter = "my_package.my_engine:MyEngine"

        @pytest.fixture
        def model_path(self) -> str:
            return "/models/small.gguf"

For one that the configuration describes, `adapter` is its name and `config` its table with `command`.

Real processes are started, with one thread each; a test is skipped, with the reason, where the engine is not installed, or
where its plan does not declare what the test is about: an engine without chat is not asked to chat.  Needs the fixtures of
`plugin.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ..daemon import hangup
from ..daemon.address import reserve
from ..daemon.logs import RotatingLog
from ..daemon.probe import wait_ready
from ..daemon.process import EngineProcess, Exit, scrubbed_env
from ..engines.base import ADDRESS, Grant, Location, Plan, Tcp
from ..errors import LlmDaemonError
from ..spec import Artifact, Spec, Wish
from .plugin import survivors
from .running import ALIAS, CHAT, COMPLETIONS, EMBEDDINGS, Running
from .stand_in import make_adapter

CONTEXT = 1024  # tokens
ROOM = 900  # of them, for an answer: some engines refuse a request that asks for more than there is


def read(path: str) -> bytes:
    return Path(path).read_bytes()


class EngineConformance:
    """Subclass it as the module says; `config` is the adapter's table of the configuration."""

    adapter: str = ""
    config: Mapping[str, Any] = {}
    # Long enough to be cut short, in words that make a model talk.
    long_request: Mapping[str, Any] = {
        "messages": [{"role": "user", "content": "Write a very long story about a river."}],
        "max_tokens": ROOM,
        "ignore_eos": True,
    }
    short_request: Mapping[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}

    natural = 3.0  # seconds that requests live whose hang-up is measured, if nobody stops them
    patience = 1.0  # seconds from a hang-up until one token of the next request
    soon = 5.0  # seconds until a second start on the same address has failed: what its imports take, and a little
    slack = 0.0  # seconds to add to each of the limits here, where other work may keep the machine busy meanwhile
    args: tuple[str, ...] = ()  # extra flags, as a user may give them

    @pytest.fixture
    def model_path(self) -> str:
        raise NotImplementedError("say which model to load")

    @pytest.fixture
    def broken_model(self, model_path: str, tmp_path: Path) -> tuple[str, str] | None:
        """A model that passes `accepts` and cannot be loaded, and a word that the engine's own complaint has in it.

        None for an engine that has its only model inside.
        """
        if os.path.isdir(model_path):
            path = Path(shutil.copytree(model_path, tmp_path / "broken"))
            whole = max(path.iterdir(), key=lambda file: file.stat().st_size)
            os.truncate(whole, whole.stat().st_size // 2)
            return str(path), ""
        path = tmp_path / ("broken" + os.path.splitext(model_path)[1])
        with open(model_path, "rb") as file:
            path.write_bytes(file.read(os.path.getsize(model_path) // 2))
        return str(path), "load"

    @pytest.fixture
    def engine_config(self) -> Mapping[str, Any]:
        """For a table that only a fixture can make."""
        return self.config

    @pytest.fixture(autouse=True)
    def _setting(
        self, engine_config: Mapping[str, Any], tmp_path: Path, generation: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.config = engine_config
        self.engine = make_adapter(self.adapter, self.config)
        self.places: dict[str, tuple[str, int]] = {}  # TCP addresses by folder
        where = self.engine.locate(self.config)
        if not isinstance(where, Location):
            pytest.skip(f"{self.engine.name}: {where.reason} ({where.hint})")
        self.where, self.folder, self.generation = where, tmp_path, generation
        monkeypatch.setenv("OPENAI_API_KEY", "a-secret-of-the-user")

    def planned(self, model: str, *, parallel: int = 1, alias: str = ALIAS, place: tuple[str, int] = ("127.0.0.1", 0)) -> Plan:
        grant = Grant(
            model, alias, "e.sock", context=CONTEXT, parallel=parallel, threads=1, args=self.args, host=place[0], port=place[1],
            key="a-key-of-ours",
        )  # fmt: skip
        return self.engine.plan(Spec(Wish(model), Artifact("file", model, model)), self.where, grant)

    def needs(self, model: str, *routes: str) -> Plan:
        """Skips the test of an engine that does not serve these."""
        plan = self.planned(model)
        served = self.engine.routes if plan.routes is None else plan.routes
        if lacking := [route for route in routes if route not in served]:
            pytest.skip(f"{self.engine.name} does not serve {', '.join(lacking)}")
        return plan

    async def start(self, model: str, folder: str = "a", **options: Any) -> Running:
        """A second start in a folder has the first one's address, without a reservation of its own."""
        with reserve() as fresh:
            reserved = fresh if folder not in self.places else None
            plan = self.planned(model, place=self.places.setdefault(folder, fresh.getsockname()), **options)
            exits: list[Exit] = []
            process = await EngineProcess.start(
                plan,
                folder=str(self.folder / folder),
                env=scrubbed_env(os.environ, self.generation),
                log=RotatingLog(str(self.folder / f"{folder}.log")),
                name=self.engine.name,
                on_exit=exits.append,
                reserved=reserved,
            )
        return Running(process, plan, exits)

    @contextlib.asynccontextmanager
    async def running(self, model: str, folder: str = "a", ready: bool = True, **options: Any) -> AsyncIterator[Running]:
        engine = await self.start(model, folder, **options)
        try:
            if ready:
                await wait_ready(engine.process, engine.plan, self.engine)
            yield engine
        finally:
            await engine.process.stop(force=True)
            engine.process.log.close()
            await asyncio.sleep(0)  # on_exit is called in the next round of the loop
            assert len(engine.exits) == 1

    # -- start --

    def asked(self, model: str) -> tuple[str, Mapping[str, Any]]:
        """The shortest thing to ask of it."""
        served = self.planned(model).routes or self.engine.routes
        return (CHAT, self.short_request) if CHAT in served else (EMBEDDINGS, {"input": "Hi"})

    def test_ready_then_answers_in_its_alias(self, model_path: str) -> None:
        async def main() -> None:
            route, request = self.asked(model_path)
            async with self.running(model_path) as engine:
                status, answer = await engine.call(route, request)
                assert status == 200, answer
                assert answer["model"] == engine.model
                if route == CHAT:
                    assert answer["choices"][0]["message"]["role"] == "assistant"
                    assert answer["usage"]["completion_tokens"] == 1
                status, models = await engine.call("/v1/models")
                if status != 404:
                    assert engine.model in [model["id"] for model in models["data"]]

        asyncio.run(main())

    def test_loading_is_not_dead(self, model_path: str) -> None:
        async def main() -> None:
            states: list[str] = []
            async with self.running(model_path, ready=False) as engine:
                await wait_ready(engine.process, engine.plan, self.engine, states.append)
            assert states[0] == "starting"
            assert states[-1] == "ready"

        asyncio.run(main())

    def test_second_start_on_the_same_address_fails_soon(self, model_path: str) -> None:
        address = self.planned(model_path).address
        if isinstance(address, Tcp) and address.told:
            pytest.skip("it chooses its address itself")

        async def main() -> None:
            async with self.running(model_path), self.running(model_path, ready=False) as second:
                began = time.monotonic()
                with pytest.raises(LlmDaemonError) as caught:
                    await wait_ready(second.process, second.plan, self.engine)
                assert caught.value.code == ADDRESS, caught.value.full()
                assert time.monotonic() - began < self.soon + self.slack

        asyncio.run(main())

    def test_a_stranger_at_its_port_is_never_taken_for_it(self, model_path: str) -> None:
        address = self.planned(model_path).address
        if not isinstance(address, Tcp) or address.told:
            pytest.skip("it does not listen on a port that was chosen for it")

        async def main() -> None:
            with reserve() as stranger:
                self.places["a"] = stranger.getsockname()
                stranger.listen()
                async with self.running(model_path, ready=False) as engine:
                    with pytest.raises(LlmDaemonError, match=r"answers in place of|did not start") as caught:
                        await wait_ready(engine.process, engine.plan, self.engine)
                    assert caught.value.code == ADDRESS, caught.value.full()

        asyncio.run(main())

    def test_stale_socket_file_is_named_or_overcome(self, model_path: str) -> None:
        if isinstance(self.planned(model_path).address, Tcp):
            pytest.skip("it listens on TCP")

        async def main() -> None:
            (self.folder / "a").mkdir()
            with socket.socket(socket.AF_UNIX) as stale:
                stale.bind(str(self.folder / "a" / "e.sock"))
            async with self.running(model_path, ready=False) as engine:
                try:
                    await wait_ready(engine.process, engine.plan, self.engine)
                except LlmDaemonError as e:
                    assert e.code == ADDRESS, e.full()

        asyncio.run(main())

    def test_broken_model_is_reported_in_the_engines_own_words(self, broken_model: tuple[str, str] | None) -> None:
        if broken_model is None:
            pytest.skip("its model is inside")

        async def main() -> None:
            path, word = broken_model
            assert self.engine.accepts(path) is None
            async with self.running(path, ready=False) as engine:
                with pytest.raises(LlmDaemonError) as caught:
                    await wait_ready(engine.process, engine.plan, self.engine)
                error = caught.value
                assert error.code == "bad_model", error.full()
                assert word in error.message
                assert error.message.count("\n") == 0
                assert error.data["last_words"]
                assert error.data["log"] == engine.process.log.path

        asyncio.run(main())

    def test_two_at_once(self, model_path: str) -> None:
        async def main() -> None:
            route, request = self.asked(model_path)
            async with self.running(model_path, "a") as one, self.running(model_path, "b", alias="other") as two:
                asked = [{"model": plan.served_id or alias} for plan, alias in ((one.plan, ALIAS), (two.plan, "other"))]
                answers = await asyncio.gather(*(e.call(route, {**request, **a}) for e, a in zip((one, two), asked, strict=True)))
                assert [{"model": answer["model"]} for _, answer in answers] == asked

        asyncio.run(main())

    def test_nothing_secret_in_argv_or_environment(self, model_path: str) -> None:
        async def main() -> None:
            async with self.running(model_path) as engine:
                for name in ("cmdline", "environ"):
                    assert b"a-secret-of-the-user" not in read(f"/proc/{engine.process.pid}/{name}")
                secrets = [v for k, v in engine.plan.env.items() if "KEY" in k or "TOKEN" in k]
                assert not set(secrets) & set(engine.plan.argv)
                assert "a-key-of-ours" not in " ".join(engine.plan.argv)

        asyncio.run(main())

    def test_its_key_is_needed(self, model_path: str) -> None:
        if not self.planned(model_path).headers:
            pytest.skip("it has no key")

        async def main() -> None:
            route, request = self.asked(model_path)
            async with self.running(model_path) as engine:
                assert (await engine.call(route, request, keyed=False))[0] in (401, 403)
                assert (await engine.call(route, request))[0] == 200

        asyncio.run(main())

    # -- requests --

    def test_declared_routes_exist(self, model_path: str) -> None:
        """501 is for a route that wants another kind of model; a plan that names its routes has none of those."""

        async def main() -> None:
            async with self.running(model_path) as engine:
                given = engine.plan.routes
                lacking = (404, 405) if given is None else (404, 405, 501)
                for route in sorted(self.engine.routes if given is None else given):
                    status, answer = await engine.call(
                        route, {**self.short_request, "prompt": "Hi", "content": "Hi", "input": "Hi", "n_predict": 1}
                    )
                    assert status not in lacking, (route, answer)
                assert (await engine.call("/no/such/route", {}))[0] in (404, 405, 501)

        asyncio.run(main())

    def test_completion(self, model_path: str) -> None:
        self.needs(model_path, COMPLETIONS)

        async def main() -> None:
            async with self.running(model_path) as engine:
                status, answer = await engine.call(COMPLETIONS, {"prompt": "Once upon", "max_tokens": 2})
                assert status == 200, answer
                assert answer["choices"][0]["text"]

        asyncio.run(main())

    def test_embeddings(self, model_path: str) -> None:
        self.needs(model_path, EMBEDDINGS)

        async def main() -> None:
            async with self.running(model_path) as engine:
                status, answer = await engine.call(EMBEDDINGS, {"input": ["a river", "a river", "the law of taxes"]})
                if status == 501 and engine.plan.routes is None:
                    pytest.skip("this model has no embeddings")
                assert status == 200, answer
                assert [item["index"] for item in answer["data"]] == [0, 1, 2]
                one, same, other = (item["embedding"] for item in answer["data"])
                assert one == pytest.approx(same, abs=1e-3)
                assert len(one) == len(other) > 1
                assert one != pytest.approx(other, abs=1e-3)
                status, single = await engine.call(EMBEDDINGS, {"input": "a river"})
                assert status == 200, single
                assert single["data"][0]["embedding"] == pytest.approx(one, abs=1e-2)

        asyncio.run(main())

    def test_stream_is_events_and_ends_in_done(self, model_path: str) -> None:
        self.needs(model_path, CHAT)

        async def main() -> None:
            async with self.running(model_path) as engine:
                connection, response = await engine.stream({**self.short_request, "max_tokens": 4})
                rest = await asyncio.to_thread(response.read)
                connection.close()
                assert response.headers["Content-Type"].startswith("text/event-stream")
                assert rest.rstrip().endswith(b"data: [DONE]")
                lines = [line for line in rest.splitlines() if line.startswith(b"data: {")]
                chunks = [json.loads(line.removeprefix(b"data: ")) for line in lines]
                assert chunks
                assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}

        asyncio.run(main())

    def test_hang_up_frees_the_slot(self, model_path: str) -> None:
        self.needs(model_path, CHAT)

        async def main() -> None:
            async with self.running(model_path) as engine:
                connection, response = await engine.stream(self.long_request)
                began = time.monotonic()
                response.close()
                connection.close()
                status, _ = await engine.call(CHAT, self.short_request)
                assert status == 200
                assert time.monotonic() - began < self.patience + self.slack

        asyncio.run(main())

    @pytest.mark.parametrize("slots", [1, 2])
    def test_hang_up_to_slot_free(self, model_path: str, slots: int, record_property: Callable[[str, object], None]) -> None:
        """What an engine declares of hang-ups holds, alone and beside a stream; how long each took is recorded."""
        self.needs(model_path, CHAT)
        if self.planned(model_path, parallel=slots).slots < slots:
            pytest.skip("it serves one at a time")

        async def main() -> tuple[Plan, dict[str, hangup.HangUps]]:
            async with self.running(model_path, parallel=slots) as engine:
                return engine.plan, await hangup.measure(
                    engine.process.socket, engine.plan, times=2, natural=self.natural, room=ROOM
                )

        plan, found = asyncio.run(main())
        for kind, ups in found.items():
            text = f"{kind}, {slots} slot(s): {ups.ms:.0f} ms" + ("" if ups.noticed else ", not before its end")
            record_property(f"{self.engine.name}: hang-up", text)
            print(f"{self.engine.name}: {text}")
        if plan.confirms_hangup:
            clients = [hangup.STREAMING, *([hangup.ASSEMBLED] if hangup.ROUTE in plan.assembled else [])]
            for one in [one for kind in clients for one in found[kind].each]:
                assert one.closed is not None, "it has not closed a half-closed connection"
                assert one.noticed, f"the slot was kept: {one}"

    # -- end --

    async def stopped(self, engine: Running) -> Exit:
        """Stops it; the limits here and the steps of its ladder keep their distance."""
        plan = engine.process.plan
        engine.process.plan = replace(plan, stop=replace(plan.stop, grace=plan.stop.grace + self.slack))
        return await engine.process.stop()

    def test_stop_idle(self, model_path: str) -> None:
        async def main() -> None:
            async with self.running(model_path) as engine:
                began = time.monotonic()
                exit = await self.stopped(engine)
                assert exit.asked
                assert time.monotonic() - began < 1.5 + self.slack

        asyncio.run(main())

    def test_stop_busy(self, model_path: str) -> None:
        self.needs(model_path, CHAT)

        async def main() -> None:
            async with self.running(model_path) as engine:
                connection, response = await engine.stream(self.long_request)
                began = time.monotonic()
                await self.stopped(engine)
                assert time.monotonic() - began < 4 + 2 * max(0.0, engine.process.plan.stop.grace - 2)
                response.close()
                connection.close()

        asyncio.run(main())

    def test_keeper_killed_takes_the_engine_along(self, model_path: str) -> None:
        async def main() -> None:
            async with self.running(model_path) as engine:
                os.kill(engine.process.keeper_pid, signal.SIGKILL)
                exit = await asyncio.wait_for(engine.process.wait(), 5 + self.slack)
                assert not exit.asked
                assert not survivors(self.generation, within=1.0 + self.slack)

        asyncio.run(main())

    def test_daemon_killed_leaves_nothing(self, model_path: str) -> None:
        folder = self.folder / "d"
        with stand_in(self.adapter, self.config, model_path, folder, self.generation, args=self.args) as daemon:
            assert daemon.stdout is not None
            assert daemon.stdout.readline() == "starting\n"
            assert daemon.stdout.readline().startswith("started ")
            assert daemon.stdout.readline() == "ready\n"
            daemon.kill()
            daemon.wait()
            assert not survivors(self.generation, within=1.0 + self.slack)


@contextlib.contextmanager
def stand_in(adapter: str, config: Mapping[str, Any], model: str, folder: Path, generation: str, **more: Any) -> Any:
    """A process in the daemon's place (`stand_in.py`), killed at the end if it still lives; read its standard output."""
    task = {"adapter": adapter, "config": dict(config), "model": model, "folder": str(folder), "generation": generation, **more}
    path = os.pathsep.join(p for p in sys.path if p)
    daemon = subprocess.Popen(
        [sys.executable, "-m", "llm_daemon.testing.stand_in", json.dumps(task)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        yield daemon
    finally:
        daemon.kill()
        daemon.wait()
        assert daemon.stdout is not None
        daemon.stdout.close()
