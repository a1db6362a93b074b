"""The daemon's side of the admin app (admin/facts.py): thin calls, and the answers of `explain` on the control socket."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

from .. import errors, paths
from ..config import Settings
from ..core import events as ev
from ..core.instance import Instance
from . import identity
from .history import History
from .journal import Journal

if TYPE_CHECKING:
    from .app import Daemon

TOLD = frozenset({"explain", "history"})  # methods of a CALL that are answered here
ANSWER_FIRST = 0.1  # seconds a `stop` waits, so that its answer is through the gateway before the gateway is gone


class DaemonFacts:
    """`Facts` of a daemon.  Everything on the loop's thread."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        settings: Settings = daemon.settings
        history = History(paths.history_file(), settings.history_limit) if settings.history_limit else None
        self._leaving: asyncio.Task[None] | None = None
        self._journal = Journal(history, keeps_bodies=settings.history_prompts, instance=self._instance, who=self._who)

    def _instance(self, instance: str) -> Instance | None:
        return self._daemon.machine.instances.get(instance)

    def _who(self, lease: str) -> str:
        holder = self._daemon.control.holders.get(lease)
        if holder is None:
            return "somebody at the dashboard or /api/load" if lease in self._daemon.control.inner else "a client"
        first, second, *rest = [*identity.program(holder.pid).split(), "", ""]  # interpreter and script, without their folders
        words = " ".join(filter(None, [os.path.basename(first), os.path.basename(second), *rest]))
        return f"{words or 'a client'} (pid {holder.pid})"

    # What there is --------------------------------------------------------------------------------------------
    @property
    def journal(self) -> Journal:
        """With the requests in it that ended a moment ago."""
        self._daemon.desk.tell()
        return self._journal

    def status(self) -> dict[str, Any]:
        from .status import status

        return status(self._daemon)

    def tickets(self) -> list[dict[str, Any]]:
        now, found = monotonic(), []
        machine = self._daemon.machine
        places = {name: place for it in machine.instances.values() for place, name in enumerate(it.lanes.line(now))}
        for name, ticket in machine.tickets.items():
            model = machine.instances[ticket.instance].spec.model
            one = {
                "ticket": name, "state": ticket.stage.value, "model": model, "instance": ticket.instance, "lane": ticket.lane,
                "position": places.get(name), "total_s": now - ticket.arrived,
            }  # fmt: skip
            ask = getattr(self._daemon.desk.turns.get(name), "ask", None)  # the gateway knows more of it
            one |= {key: value for key in ("path", "stream", "via") if (value := getattr(ask, key, None)) is not None}
            found.append(one)
        return found

    # What is to be done ---------------------------------------------------------------------------------------
    async def load(self, model: str) -> dict[str, Any]:
        daemon = self._daemon
        await daemon.supervisor.ready()
        spec = daemon.supervisor.resolve(model)
        lease = daemon.control.name()
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

        def told(op: str, fields: Mapping[str, Any]) -> None:
            if answer.done() or op == "PROGRESS":
                return
            if op == "READY":
                answer.set_result(dict(fields))
            else:
                answer.set_exception(errors.from_wire(dict(fields["error"])))

        daemon.control.inner[lease] = told
        try:
            daemon.post(ev.Joined(lease))  # a lease for as long as we wait: the daemon must not leave meanwhile
            daemon.post(ev.Want(lease, 0, spec))
            return await answer
        finally:
            del daemon.control.inner[lease]
            daemon.post(ev.Left(lease))

    async def unload(self, model: str, force: bool) -> dict[str, Any]:
        return await self._stop(model, force)

    async def stop(self, force: bool) -> dict[str, Any]:
        machine = self._daemon.machine
        if machine.leases.holders and not force:
            return await self._stop(None, force)  # says who is in the way
        stopped = [it.spec.model for it in machine.instances.values() if it.has_process]
        self._leaving = asyncio.create_task(self._leave(force))
        return {"stopped": stopped, "daemon": True}

    async def _leave(self, force: bool) -> None:
        await asyncio.sleep(ANSWER_FIRST)
        with suppress(errors.Unavailable):  # somebody came meanwhile
            await self._stop(None, force)

    async def _stop(self, model: str | None, force: bool) -> dict[str, Any]:
        return await self._daemon.call("stop", {"model": model, "force": force}, lambda *_, **__: None)

    def cancel(self, ticket: str) -> bool:
        if ticket not in self._daemon.machine.tickets:
            return False
        error = errors.Unavailable("the request was cancelled by hand", code="cancelled", status=499)
        self._daemon.post(ev.Cancel(ticket, error.to_wire()))
        return True

    # The control socket ---------------------------------------------------------------------------------------
    async def tell(self, method: str, params: Mapping[str, Any]) -> dict[str, object]:
        """Answers CALL `explain` (`ticket`, `limit`) and `history` (`model`, `limit`), both of explain.py."""
        from . import explain

        ticket, model, limit = params.get("ticket"), params.get("model"), explain.limited(params.get("limit"))
        if method == "explain":
            return await explain.explain(self.journal, None if ticket is None else str(ticket), limit, self.tickets())
        return {"tickets": await explain.recent(self.journal, limit, None if model is None else str(model))}
