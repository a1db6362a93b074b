"""The daemon's side of the admin app, on the real core and control server; only engines are missing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from llm_daemon import errors
from llm_daemon.config import Settings
from llm_daemon.core import events as ev
from llm_daemon.core.leases import Leases
from llm_daemon.core.machine import Machine
from llm_daemon.daemon import facts as module
from llm_daemon.daemon.app import Daemon
from llm_daemon.daemon.control_server import ControlServer, Holder
from llm_daemon.daemon.facts import DaemonFacts
from llm_daemon.daemon.pump import Pump
from llm_daemon.spec import Spec

from .fakes import IN_USE, SPEC, record


class Turn:
    ask = SimpleNamespace(path="/v1/completions", stream=True, via="unix")


class Core:
    """A daemon whose engines are started by the test: `up`, `down`."""

    def __init__(self) -> None:
        self.settings = Settings(history_limit=0)
        self.machine = Machine(Leases.born(10.0, 0.0), 120.0, 1800.0, 10, 10.0)
        self.control = ControlServer(cast(Any, self))
        self.supervisor = self
        self.desk = self
        self.turns: dict[str, Turn] = {}
        self.ended: list[ev.Refuse | ev.Abort] = []
        self.calls: list[tuple[str, Mapping[str, Any]]] = []
        self.refusal: errors.LlmDaemonError | None = None
        self.started = asyncio.Event()
        self.called = asyncio.Event()
        self.facts = DaemonFacts(cast(Daemon, self))
        self.pump = Pump(self.machine, self._do, saw=self.facts.journal.saw)

    async def ready(self) -> None: ...

    def tell(self) -> None: ...

    def resolve(self, model: str) -> Spec:
        if model != "smollm2-135m":
            raise errors.UsageError(f"no model {model!r}", code="unknown_model")
        return SPEC

    def post(self, event: ev.Event) -> None:
        self.pump.post(event)

    def _do(self, command: ev.Command) -> None:
        match command:
            case ev.Start():
                self.started.set()
            case ev.Refuse() | ev.Abort():
                self.ended.append(command)
            case ev.TellReady(lease, request, instance):
                self.control.tell(lease, "READY", request, model="smollm2-135m", instance=instance, pid=1, engine="e")
            case ev.TellProgress(lease, request, info):
                self.control.tell(lease, "PROGRESS", request, info=info)
            case ev.TellError(lease, request, error):
                self.control.tell(lease, "ERROR", request, error=error)

    async def call(self, method: str, params: Mapping[str, Any], say: Any) -> dict[str, object]:
        say("PROGRESS", info={})
        self.calls.append((method, params))
        self.called.set()
        if self.refusal:
            raise self.refusal
        return {"stopped": [], "daemon": not params["model"]}


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_DAEMON_STATE_DIR", str(tmp_path))


async def test_load_waits_until_the_model_answers() -> None:
    core = Core()
    loading = asyncio.create_task(core.facts.load("smollm2-135m"))
    await core.started.wait()
    assert core.machine.leases.holders  # the daemon must not leave now
    core.post(ev.Progressed("i1", {"phase": "load"}))
    core.post(ev.Up("i1", 2))
    assert (await loading)["instance"] == "i1"
    assert not core.machine.leases.holders and not core.control.inner
    assert "somebody at the dashboard or /api/load asked for it" in core.facts.journal.recent(("loading",), 1)[0].what["text"]  # type: ignore[index]
    assert (await core.facts.load("smollm2-135m"))["instance"] == "i1"  # at once


async def test_a_load_that_fails_says_why() -> None:
    core = Core()
    with pytest.raises(errors.UsageError, match="no model 'x'"):
        await core.facts.load("x")
    loading = asyncio.create_task(core.facts.load("smollm2-135m"))
    await core.started.wait()
    core.post(ev.Down("i1", errors.EngineError("out of luck", code="start_failed").to_wire()))
    with pytest.raises(errors.EngineError, match="out of luck"):
        await loading
    assert not core.machine.leases.holders and not core.control.inner


async def test_a_load_whose_client_hangs_up_holds_nothing() -> None:
    core = Core()
    loading = asyncio.create_task(core.facts.load("smollm2-135m"))
    await core.started.wait()
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    assert not core.machine.leases.holders and not core.control.inner
    assert core.machine.instances["i1"].abandon_at is not None


async def test_live_tickets_and_cancelling() -> None:
    core, waiting, running = Core(), Turn(), Turn()
    core.turns = {"t-1": running, "t-2": waiting}
    for ticket in ("t-1", "t-2", "t-3"):
        core.post(ev.Arrived(ticket, SPEC, "interactive" if ticket == "t-3" else "regular"))
    core.post(ev.Up("i1", 1))
    live = core.facts.tickets()
    assert [(t["ticket"], t["state"], t["lane"], t["position"], t.get("path")) for t in live] == [
        ("t-1", "waiting", "regular", 0, "/v1/completions"),
        ("t-2", "waiting", "regular", 1, "/v1/completions"),
        ("t-3", "running", "interactive", None, None),
    ]
    assert all(t["total_s"] >= 0 and t["model"] == "smollm2-135m" and t["instance"] == "i1" for t in live)
    assert core.facts.cancel("t-1") and not core.facts.cancel("t-1") and not core.facts.cancel("t-9")
    assert core.facts.cancel("t-3")
    assert [(c.ticket, c.error["code"]) for c in core.ended] == [("t-1", "cancelled"), ("t-3", "cancelled")]
    assert [(t["ticket"], t["state"]) for t in core.facts.tickets()] == [("t-2", "waiting"), ("t-3", "aborting")]


async def test_unload_and_stop_are_those_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core()
    assert await core.facts.unload("m", True) == {"stopped": [], "daemon": False}
    core.control.holders["c1"] = Holder("c1", os.getpid(), "client")
    core.post(ev.Joined("c1"))
    core.refusal = IN_USE
    with pytest.raises(errors.Unavailable, match="pid 9"):
        await core.facts.stop(False)
    assert [params for _, params in core.calls] == [{"model": "m", "force": True}, {"model": None, "force": False}]


async def test_stop_answers_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_FIRST", 0.01)
    core = Core()
    assert await core.facts.stop(True) == {"stopped": [], "daemon": True}
    assert core.calls == []
    core.refusal = IN_USE  # too late to be told: somebody came meanwhile
    await core.called.wait()
    assert core.calls == [("stop", {"model": None, "force": True})]
    assert core.facts._leaving is not None
    await core.facts._leaving


async def test_what_the_control_socket_is_told() -> None:
    core = Core()
    core.facts.journal.ticket(record("t-1"))
    core.facts.journal.ticket(record("t-2", model="other"))
    assert (await core.facts.tell("explain", {"ticket": "t-1"}))["ticket"]["ticket"] == "t-1"  # type: ignore[index]
    assert [r["ticket"] for r in (await core.facts.tell("history", {"model": "other"}))["tickets"]] == ["t-2"]  # type: ignore[attr-defined]
    with pytest.raises(errors.UsageError, match="limit must be"):
        await core.facts.tell("history", {"limit": 0})


async def test_who_asked() -> None:
    core = Core()
    core.control.holders["c1"] = Holder("c1", os.getpid(), "client")
    assert core.facts._who("c1").endswith(f"(pid {os.getpid()})")
    assert core.facts._who("c2") == "a client"
