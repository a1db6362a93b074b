"""What a load would be, without one: artifact, engine, command line, memory, and who would have to leave."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import paths
from ..core.instance import Instance, State
from ..core.lanes import Lanes
from ..core.machine import Machine
from ..core.pace import Pace
from ..core.placement import used
from ..core.refusals import amount, too_large
from ..engines.base import Grant
from ..models.engine import split as own_model
from ..models.store import Store
from ..spec import Spec
from .memory import room
from .supervisor import SOCKET, Supervisor, loaded_beside


def look(supervisor: Supervisor, spec: Spec, threads: int) -> dict[str, Any]:
    """All but the outcome.  Blocks for some milliseconds; starts and fetches nothing.

    Raises what the load itself would: UsageError for a bad file or option, EngineError where no engine can run it.
    """
    store = Store(Path(paths.cache_dir()))
    artifact, full, memory = spec.artifact, spec.full or spec.wish, supervisor.memory
    path = store.path(artifact)
    own = own_model(artifact.locator)[1] if artifact.source == "engine" else None
    beside = [(extra, str(store.path(extra.artifact) or store.place(extra.artifact))) for extra in spec.extras]
    found = own if own is not None else str(path) if path else None
    adapter, where = supervisor.registry.choose(found, full.engine, spec.special)
    shown = own if own is not None else str(path or store.place(artifact))
    context, parallel, _ = room(supervisor.settings, spec, shown if path else "")
    grant = Grant(
        model_path=shown, alias=spec.model, socket=SOCKET, context=context, parallel=parallel, threads=threads,
        gpu_layers=full.gpu_layers, args=(*supervisor.configured(adapter.name), *full.args),
        mode=spec.mode, **loaded_beside(beside),
    )  # fmt: skip
    weight = memory.weigh(spec)
    parts = weight.parts
    return {
        "model": spec.model,
        "artifact": {
            "source": artifact.source, "locator": artifact.locator, "quant": artifact.quant, "license": artifact.license,
            "path": str(path) if path else None, "size_bytes": store.size(artifact) if path else artifact.size,
        },
        "engine": {"name": adapter.name, "version": where.version, "origin": where.origin},
        "argv": list(adapter.plan(spec, where, grant).argv),
        "context": context,
        "parallel": parallel,
        "threads": threads,
        "memory": {
            "need_bytes": weight.need, "basis": weight.basis, "note": weight.note, "learned_bytes": weight.learned,
            "weights_bytes": parts.weights if parts else None, "cache_bytes": parts.cache if parts else None,
            "compute_bytes": parts.compute if parts else None, "process_bytes": parts.process if parts else None,
            "host_bytes": memory.host,
        },
    }  # fmt: skip


def outcome(machine: Machine, spec: Spec, need: int, now: float) -> dict[str, Any]:
    """What the core would do if `spec` were wished for now.

    `does`: `shares` an instance, `starts`, `evicts` the `models` (and then starts), `waits` for memory, or is `refused`; `text`
    for people.  `promised_bytes` of `budget_bytes` (None: no bound) are taken.
    """
    its = list(machine.instances.values())
    facts = {"budget_bytes": machine.budget, "promised_bytes": used(its)}
    found = machine.serving(spec)
    if found is not None and (found.has_process or found.state is State.QUEUED):
        return {**facts, "does": "shares", "models": [found.spec.model], "text": f"{found.spec.model} serves it ({found.state})"}
    if machine.budget is not None and need > machine.budget:
        return {**facts, "does": "refused", "models": [], "text": str(too_large(spec, need, machine.budget)["message"])}
    it = Instance("?", spec, Lanes(1, 1.0), Pace(), now, now, State.QUEUED, need=need)
    moves = machine.placement.foresee(it, its, now)
    if machine.budget is None or it in moves.start:
        return {**facts, "does": "starts", "models": [], "text": "it starts at once"}
    gone = [other.spec.model for other, _ in moves.leave]
    if gone:
        return {
            **facts,
            "does": "evicts",
            "models": gone,
            "text": f"it starts when {_and(gone)} left: nobody uses {_them(gone)} now",
        }
    return {**facts, "does": "waits", "models": [], "text": machine.placement.why(it, its)}


def _and(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last} have" if most else f"{last} has"


def _them(names: list[str]) -> str:
    return "it" if len(names) == 1 else "them"


def taken(plan: dict[str, Any]) -> str:
    """The budget in one line.

    >>> taken({"outcome": {"budget_bytes": 6_000_000_000, "promised_bytes": 500_000_000}})
    '500 MB of 6.0 GB are kept for models now'
    """
    budget = plan["outcome"]["budget_bytes"]
    kept = amount(plan["outcome"]["promised_bytes"])
    return (
        f"{kept} are kept for models now, without a bound"
        if budget is None
        else f"{kept} of {amount(budget)} are kept for models now"
    )
