"""Machines to test with, and what they say."""

from __future__ import annotations

from typing import Any

from llm_daemon import errors
from llm_daemon.core import events as ev
from llm_daemon.core.events import Command
from llm_daemon.core.leases import Leases
from llm_daemon.core.machine import Machine
from llm_daemon.spec import Artifact, Spec, Wish

DIED = errors.EngineError("boom", code="engine_died").to_wire()
CANCELLED = errors.Unavailable("cancelled", code="cancelled").to_wire()


def spec(name: str = "m", **options: Any) -> Spec:
    wish = Wish.of(name, **options)
    full = Wish.of(name, **{"engine": "e", "context": 4096, "parallel": 2, **options})
    return Spec(wish, Artifact("file", f"/{name}", f"key:{name}"), full)


def machine(
    ttl: float = 120.0, leased_ttl: float = 1800.0, linger: float = 10.0, queue_limit: int = 10, max_overtake: float = 10.0,
    budget: int | None = None,
) -> Machine:  # fmt: skip
    return Machine(Leases.born(linger, 0.0), ttl, leased_ttl, queue_limit, max_overtake, budget)


def running(m: Machine, lease: str = "a", now: float = 0.0, slots: int = 2) -> str:
    """A lease with a ready instance; returns the instance's id."""
    m.handle(ev.Joined(lease), now)
    (start,) = m.handle(ev.Want(lease, 1, spec()), now)
    assert isinstance(start, ev.Start)
    m.handle(ev.Up(start.instance, slots), now)
    return start.instance


def told(command: Command) -> tuple[type, str, str, int]:
    """What a client hears: Refuse or Abort, its ticket, code and status of the error."""
    assert isinstance(command, (ev.Refuse, ev.Abort))
    return type(command), command.ticket, command.error["code"], command.error["status"]
