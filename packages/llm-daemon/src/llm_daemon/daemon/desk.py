"""The gateway's way to the core: a request becomes a ticket, the core's word on it becomes the request's turn."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from time import monotonic, perf_counter
from typing import TYPE_CHECKING

import msgspec

from .. import errors
from ..core import events as ev
from ..core.instance import State
from ..core.lanes import Stage
from ..core.routes import MODES
from ..engines.base import options_of
from ..spec import Spec
from .journal import End, TicketRecord
from .route import Route

if TYPE_CHECKING:
    from .app import Daemon
    from .exchange import Exchange
    from .process import EngineProcess
    from .turn import Ask, Turn

log = logging.getLogger("llm_daemon")
RECORD_AFTER = 0.02  # seconds without the end of a request until records are made, so that no request meets them
RECORD_WITHIN, PUT_OFF = 0.5, 300  # seconds for which, and how many of them, may be put off for that
AT_ONCE, BACKLOG = 16, 1000  # records made in one go; more of them than that, and all are
ROUTES = 64  # remembered
DEATH_NOTICE = 1.0  # seconds an engine that broke off is given to turn out dead
ENDS: dict[str, End] = {
    "queue_full": "shed", "superseded": "superseded", "expired": "expired", "cancelled": "cancelled", "hung_up": "cancelled",
    "draining": "cancelled",
}  # fmt: skip


class DaemonDesk:
    """`gateway.Desk` of a daemon.  Everything on the loop's thread."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self.turns: dict[str, Turn] = {}
        self._told: list[tuple[Exchange, float]] = []
        self._routes: dict[str, tuple[EngineProcess, Route]] = {}  # by instance
        self._asking: dict[str, asyncio.Task[None]] = {}  # tickets whose model is being looked up, or whose engine is gone

    # Commands of the core -------------------------------------------------------------------------------------
    def run(self, ticket: str, instance: str, loaded_for: float) -> None:
        daemon = self._daemon
        process = daemon.supervisor.live[instance].process
        if process is not None and (known := self._routes.get(instance)) is not None and known[0] is process:
            route = known[1]
        elif process is not None:
            plan = process.plan
            route = Route(
                instance, process.socket, plan.headers, plan.assembled, plan.confirms_hangup, plan.deaf, plan.routes,
                plan.served_id, plan.drop, plan.paths,
            )  # fmt: skip
            if len(self._routes) >= ROUTES:
                self._routes.clear()
            self._routes[instance] = process, route
        else:  # died in this very moment; its Down is on the way
            self.turns.pop(ticket).refuse(errors.EngineError("the engine died", code="engine_died"))
            daemon.post(ev.Ended(ticket))
            return
        self.turns[ticket].run(route, loaded_for)
        assert daemon.gateway is not None  # whose turn it is
        daemon.supervisor.watch(instance, daemon.gateway.pool)

    def refuse(self, ticket: str, error: errors.LlmDaemonError) -> None:
        self.turns.pop(ticket).refuse(error)

    def abort(self, ticket: str, error: errors.LlmDaemonError) -> None:
        if (task := self._asking.pop(ticket, None)) is None:
            self.turns[ticket].abort(error)
            return
        task.cancel()  # it was being taken back from an engine that is gone: nobody has to let go of it
        self.turns.pop(ticket).refuse(error)
        self._daemon.post(ev.Ended(ticket))

    # What the gateway asks ------------------------------------------------------------------------------------
    def open(self, ask: Ask, turn: Turn) -> None:
        deadline = None if ask.deadline is None else monotonic() + ask.deadline
        if self._daemon.supervisor.is_ready:
            self._arrive(ask, turn, deadline)
        else:
            self.when_ready(ask.ticket, lambda: self._arrive(ask, turn, deadline))

    def _arrive(self, ask: Ask, turn: Turn, deadline: float | None) -> None:
        try:
            spec = self._meant(ask.model)
            if (need := MODES.get(ask.path, spec.mode)) != spec.mode:
                self._refuse_mode(spec, ask.path, need)
        except Exception as e:
            turn.refuse(known(e))
            return
        self.turns[ask.ticket] = turn
        self._daemon.post(ev.Arrived(ask.ticket, spec, ask.lane, ask.supersede, deadline, ask.keep_alive))

    def _refuse_mode(self, spec: Spec, path: str, need: str) -> None:
        """UsageError (`wrong_mode`), unless the engine knows no modes: then its own answer counts."""
        engine = spec.full.engine if spec.full else None
        if engine and "mode" in options_of(self._daemon.supervisor.registry.get(engine)):
            raise errors.UsageError(
                f"{spec.model} is loaded for mode {spec.mode}, and {path} needs mode {need}", code="wrong_mode",
                hint=f"ask for the model {replace(spec.wish, mode=need)}",
            )  # fmt: skip

    def when_ready(self, name: str, act: Callable[[], None]) -> None:
        """Calls `act` now, or as soon as the engines are located (the first tenth of a second of our life)."""
        supervisor = self._daemon.supervisor
        if supervisor.is_ready:
            act()
            return

        async def later() -> None:
            await supervisor.ready()
            if self._asking.pop(name, None):
                act()

        self._asking[name] = asyncio.create_task(later())

    def _meant(self, model: str | None) -> Spec:
        """The spec of a request's `model` field: none named means the only loaded one, else the default."""
        daemon = self._daemon
        if not model:
            loaded = [it for it in daemon.machine.instances.values() if it.has_process]
            if len(loaded) == 1:
                return loaded[0].spec
            model = daemon.settings.default_model
        return daemon.supervisor.resolve(model)

    def cancel(self, ticket: str) -> None:
        if task := self._asking.pop(ticket, None):
            task.cancel()
        self.ended(ticket)

    def aborting(self, ticket: str) -> None:
        self._daemon.post(ev.Aborting(ticket))

    def ended(self, ticket: str, served: bool = False) -> None:
        if self.turns.pop(ticket, None) is not None:
            self._daemon.post(ev.Ended(ticket, served))

    def lost(self, ask: Ask, turn: Turn, error: errors.LlmDaemonError) -> bool:
        """The engine went before its first byte: if it is dead, the request is put to the next one, once."""
        machine, supervisor = self._daemon.machine, self._daemon.supervisor
        place = machine.tickets.get(ask.ticket)
        instance = machine.instances.get(place.instance) if place else None
        if place is None or place.stage is Stage.ABORTING:
            return False
        if instance is None or instance.state is State.STOPPING:  # stopped by hand: that is an end, not an accident
            return False
        live = supervisor.live.get(instance.id)
        process = live.process if live else None

        async def later() -> None:
            dead = True
            if live is not None and process is not None:  # its end is noticed a moment after its sockets close
                with suppress(TimeoutError):
                    async with asyncio.timeout(None if live.hung else DEATH_NOTICE):  # being killed: that is bounded itself
                        await process.wait()
                dead = process.exit is not None
            if self._asking.pop(ask.ticket, None) is None:
                return
            self.ended(ask.ticket)
            if dead:
                left = None if ask.deadline is None else max(0.0, ask.deadline - (monotonic() - place.arrived))
                self.open(msgspec.structs.replace(ask, deadline=left), turn)
            else:
                turn.refuse(error)

        self._asking[ask.ticket] = asyncio.create_task(later())
        return True

    def over(self, exchange: Exchange) -> None:
        # Its record can wait; the next request cannot.
        if not self._told:
            asyncio.get_running_loop().call_later(RECORD_AFTER, self._tell_some)
        self._told.append((exchange, perf_counter()))

    def _tell_some(self) -> None:
        """A few at a time, and while nobody asks if that is soon: a request that comes meanwhile must not wait for them."""
        if not self._told:
            return
        now, later = perf_counter(), asyncio.get_running_loop().call_later
        (_, oldest), (_, newest) = self._told[0], self._told[-1]
        if now - newest < RECORD_AFTER and now - oldest < RECORD_WITHIN and len(self._told) < PUT_OFF:
            later(RECORD_AFTER, self._tell_some)
            return
        few = len(self._told) if len(self._told) > BACKLOG else AT_ONCE
        some, self._told = self._told[:few], self._told[few:]
        for exchange, ended in some:
            self._record(exchange, ended)
        if self._told:
            later(RECORD_AFTER / 10, self._tell_some)

    def tell(self) -> None:
        """Records what is over.  Whoever reads the journal calls this first."""
        told, self._told = self._told, []
        for exchange, ended in told:
            self._record(exchange, ended)

    def _record(self, exchange: Exchange, now: float) -> None:
        ask, e = exchange.ask, exchange
        began, total = e.ran or now, now - e.opened
        live = self._daemon.supervisor.live.get(e.instance)
        end = ENDS.get(e.code) or ("served" if not e.code else "failed" if e.ran else "refused")
        record = TicketRecord(
            ticket=ask.ticket, time=time.time() - (perf_counter() - e.opened), path=ask.path,
            model=live.model if live else ask.model or "", end=end, total_s=total, instance=e.instance,
            engine=live.engine if live else "", lane=ask.lane, stream=ask.stream, via=ask.via, pid=ask.peer or None,
            status=e.status, code="" if end == "served" else e.code, queue_s=max(0.0, began - e.opened - e.loaded_for),
            load_s=e.loaded_for, engine_s=(e.headed or now) - began if e.ran else 0.0,
            first_token_s=e.first - e.opened if e.first else None, bytes_in=e.received, bytes_out=e.sent, chunks=e.pieces,
            replayed=e.replayed,
        )  # fmt: skip
        journal = self._daemon.journal
        journal.ticket(record, body=e.request.body if journal.keeps_bodies else b"")

    async def admin(self) -> str:
        return await self._daemon.admin.socket()

    def models(self) -> list[dict[str, object]]:
        """GET /v1/models: everything loaded, then everything in the catalog."""
        daemon = self._daemon
        loaded = {it.spec.model: it.state.value for it in daemon.machine.instances.values() if it.has_process}
        names = [*loaded, *(e.name for e in daemon.supervisor.catalog.entries() if e.name not in loaded)]
        return [
            {"id": name, "object": "model", "created": 0, "owned_by": "llm-daemon", "state": loaded.get(name, "absent")}
            for name in dict.fromkeys(names)
        ]

    def health(self) -> dict[str, object]:
        return {"status": "ok", "version": self._daemon.welcome()["version"], "pid": os.getpid()}


def known(e: Exception) -> errors.LlmDaemonError:
    """The error for the wire: our own as it is, anything else as a bug, which goes into the log too."""
    if isinstance(e, errors.LlmDaemonError):
        return e
    log.exception("a request failed inside the daemon", exc_info=e)
    return errors.Bug(f"the daemon failed: {e!r}", hint="please report this")
