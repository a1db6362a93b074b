"""What `ps`, `who` and the status routes show.  Reads only: never wakes a model nor prolongs its life."""

from __future__ import annotations

import os
from dataclasses import asdict
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..config import Settings
from ..core.instance import Instance, State
from ..core.placement import used
from . import identity

if TYPE_CHECKING:
    from .app import Daemon

HIDDEN = ("catalog", "engines", "origins")  # tables, and what is for ourselves


def status(daemon: Daemon) -> dict[str, Any]:
    """One JSON object: `daemon`, `instances`, `leases`.  Times are seconds, sizes bytes; None where unknown or not due.

    Tickets of an instance: `running` is how many hold one of its `slots`, `aborting` how many of these were told to end and
    are still being let go by the engine; `waiting` counts both lanes, `waiting_interactive` one of them.
    Memory: `memory_bytes` is what an engine takes now, `memory_peak_bytes` what it took at most, as far as seen; `need_bytes`
    counts against the budget while it has a process, `memory_promised_bytes` is the sum.  `waits_for`: why one is `queued`.
    `stalled_seconds` of an instance that loads or answers: since its engine's last sign of life (core/silence.py).
    """
    now = monotonic()
    machine = daemon.machine
    return {
        "daemon": {
            **{k: v for k, v in daemon.welcome().items() if k != "api_key"},
            "uptime": now - daemon.started,
            "memory_bytes": identity.memory_bytes(os.getpid()),
            "exit_in": None if machine.leases.exit_at is None else max(0.0, machine.leases.exit_at - now),
            "leases": len(machine.leases.holders),
            "memory_budget_bytes": machine.budget,
            "memory_promised_bytes": used(machine.instances.values()),
            "settings": shown(daemon.settings),
        },
        "instances": [_instance(daemon, it, now) for it in machine.instances.values()],
        "leases": [_lease(daemon, lease, now) for lease in daemon.control.holders],
    }


def shown(settings: Settings) -> dict[str, Any]:
    """Settings as the status tells them."""
    return {k: v for k, v in asdict(settings).items() if k not in HIDDEN}


def _instance(daemon: Daemon, it: Instance, now: float) -> dict[str, Any]:
    live = daemon.supervisor.live.get(it.id)
    process = live.process if live else None
    starting = it.state is State.STARTING
    closes_at = it.closes_at(daemon.settings.ttl, daemon.settings.leased_ttl)
    return {
        "id": it.id,
        "model": it.spec.model,
        "state": it.state.value,
        "engine": live.engine if live else "",
        "engine_version": live.version if live else "",
        "pid": process.pid if process else None,
        "keeper_pid": process.keeper_pid if process else None,
        "memory_bytes": identity.memory_bytes(process.pid) if process else None,
        "memory_peak_bytes": live.peak if live else None,
        "need_bytes": it.need,
        "waits_for": daemon.machine.placement.why(it, daemon.machine.instances.values()) if it.state is State.QUEUED else None,
        "leases": sorted(it.leases),
        "running": it.lanes.taken,
        "aborting": it.lanes.aborting,
        "waiting": it.lanes.waiting,
        "waiting_interactive": len(it.lanes.interactive),
        "slots": it.lanes.slots,
        "context": live.context if live else None,
        "idle": None if it.is_wanted else max(0.0, now - it.last_use),
        "closes_in": None if closes_at is None else max(0.0, closes_at - now),
        "argv": list(live.plan.argv) if live and live.plan else [],
        "log": live.log_path if live else "",
        "error": it.error and {**it.error, "data": {k: v for k, v in it.error.get("data", {}).items() if k != "last_words"}},
        "stalled_seconds": live.pulse.silence.still if live and live.pulse and (it.lanes.running or starting) else None,
        "progress": live.progress if live and starting else None,
        "starts": it.starts,
    }


def _lease(daemon: Daemon, lease: str, now: float) -> dict[str, Any]:
    holder = daemon.control.holders[lease]
    mine = [it for it in daemon.machine.instances.values() if lease in it.leases]
    processes = [live.process for it in mine if (live := daemon.supervisor.live.get(it.id))]
    return {
        "id": lease,
        "pid": holder.pid,
        "program": identity.program(holder.pid),
        "kind": holder.kind,
        "since": now - holder.since,
        "models": [it.spec.model for it in mine],
        "instances": [it.id for it in mine],
        "engine_pids": [p.pid for p in processes if p is not None],
    }
