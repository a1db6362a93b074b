"""The whole core: hands each event to its part and gathers commands.

One caller, one thread.  `handle` never raises for anything a client, an engine or the clock can do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from .. import errors
from ..spec import Spec
from . import events as ev
from .events import Command, Event, Wire
from .instance import ABANDON_AFTER, ACCIDENTS, Instance, State
from .lanes import Lane
from .leases import VETO_PAUSE, Leases

FAILED_SHOWN = 600.0  # seconds a failed instance stays in view after it may be tried again


@dataclass(slots=True)
class Machine:
    """State of the daemon.  The shell may read `instances` to show them; only `handle` changes anything.

    `ttl` and `leased_ttl` are seconds an idle model stays, `queue_limit` the requests that may wait for one.
    """

    leases: Leases
    ttl: float
    leased_ttl: float
    queue_limit: int
    instances: dict[str, Instance] = field(default_factory=dict)
    tickets: dict[str, str] = field(default_factory=dict)  # ticket -> instance
    born: int = 0

    def handle(self, event: Event, now: float) -> list[Command]:
        """Takes one event at monotonic time `now` (seconds); returns commands to be carried out in order."""
        out: list[Command] = []
        match event:
            case ev.Joined(lease):
                self.leases.holders.add(lease)
            case ev.Left(lease):
                self._left(lease, now)
            case ev.Want():
                self._want(event, now, out)
            case ev.Arrived(ticket, spec):
                self._arrived(ticket, spec, now, out)
            case ev.Ended(ticket, served):
                self._ended(ticket, served, now, out)
            case ev.Progressed(instance, info):
                if it := self.instances.get(instance):
                    out += [ev.TellProgress(lease, request, info) for lease, request in it.waiters]
            case ev.Up(instance, slots):
                self._up(self.instances[instance], slots, now, out)
            case ev.Down(instance, error):
                self._down(self.instances[instance], error, now, out)
            case ev.StopModel(instance, force):
                if it := self.instances.get(instance):
                    self._stop(it, force, out)
            case ev.Retire():
                self.leases.retiring = True
                self._tick(now, out)
            case ev.ExitVetoed():
                self.leases.exit_at = now + VETO_PAUSE
            case ev.Tick():
                self._tick(now, out)
                if self.leases.is_due(now):
                    out.append(ev.Exit())
        self._forget(now)
        busy = bool(self.tickets) or any(it.has_process for it in self.instances.values())
        self.leases.settle(busy, now)
        if self.leases.retiring and self.leases.is_due(now) and not isinstance(event, (ev.Tick, ev.ExitVetoed)):
            out.append(ev.Exit())
        return out

    @property
    def wake_at(self) -> float | None:
        """When the shell must send the next Tick (monotonic seconds); None if nothing is due by time alone."""
        return min(self._deadlines(), default=None)

    def _deadlines(self) -> Iterator[float]:
        if self.leases.exit_at is not None:
            yield self.leases.exit_at
        for it in self.instances.values():
            if (due := self._closes_at(it)) is not None:
                yield due
            if it.abandon_at is not None:
                yield it.abandon_at

    # Leases ---------------------------------------------------------------------------------------------------
    def _left(self, lease: str, now: float) -> None:
        self.leases.holders.discard(lease)
        for it in self.instances.values():
            if lease in it.leases:
                it.leases.discard(lease)
                it.waiters = [w for w in it.waiters if w[0] != lease]
                it.last_use = now
                self._check_abandoned(it, now)

    def _want(self, event: ev.Want, now: float, out: list[Command]) -> None:
        it = self._place(event.spec, now)
        it.leases.add(event.lease)
        it.last_use = now
        it.abandon_at = None
        if event.keep_alive is not None:
            it.keep_alive = event.keep_alive
        if it.state is State.READY:
            out.append(ev.TellReady(event.lease, event.request, it.id))
            return
        it.waiters.append((event.lease, event.request))
        if not it.has_process:  # an explicit wish starts again at once, whatever failed before
            self._start(it, out)

    # Tickets --------------------------------------------------------------------------------------------------
    def _arrived(self, ticket: str, spec: Spec, now: float, out: list[Command]) -> None:
        if self.leases.retiring and not self.leases.holders:
            leaving = errors.Unavailable("the daemon is leaving", code="draining", hint="ask again", retry_after=1)
            out.append(ev.Refuse(ticket, leaving.to_wire()))
            return
        it = self._place(spec, now)
        if it.state is State.FAILED and now < it.retry_at:
            out.append(ev.Refuse(ticket, _later(it, now)))
            return
        self.tickets[ticket] = it.id
        it.abandon_at = None
        self._shed(it, it.lane.submit(ticket), out)
        if it.state is State.READY:
            self._admit(it, out)
        elif not it.has_process:
            self._start(it, out)

    def _shed(self, it: Instance, tickets: list[str], out: list[Command]) -> None:
        for ticket in tickets:
            del self.tickets[ticket]
            full = errors.Unavailable(
                f"{len(it.lane.waiting)} requests already wait for {it.spec.model}",
                code="queue_full", hint="try again later, or raise queue_limit", retry_after=1,
            )  # fmt: skip
            out.append(ev.Refuse(ticket, full.to_wire()))

    def _ended(self, ticket: str, served: bool, now: float, out: list[Command]) -> None:
        it = self.instances.get(self.tickets.pop(ticket, ""))
        if it is None:  # a client's hang-up and an engine's end may both report the same ticket
            return
        it.lane.discard(ticket)
        it.last_use = now
        if served:
            it.failures = 0  # not when it came up: one that falls with each first request has a backoff too
        if it.state is State.READY:
            self._admit(it, out)
        elif it.state is State.DRAINING and not it.lane.running:
            self._halt(it, False, out)
        self._check_abandoned(it, now)

    def _admit(self, it: Instance, out: list[Command]) -> None:
        out += [ev.Run(ticket, it.id) for ticket in it.lane.admit()]

    # Instances ------------------------------------------------------------------------------------------------
    def _place(self, spec: Spec, now: float) -> Instance:
        """The instance that serves `spec`: the readiest that covers it, else a new one."""
        order = [State.READY, State.STARTING, State.DRAINING, State.STOPPING, State.ABSENT, State.FAILED]
        fits = [
            it
            for it in self.instances.values()
            if it.spec.covers(spec) and not (it.state is State.STARTING and it.spec.risks(spec))
        ]
        if fits:
            return min(fits, key=lambda it: order.index(it.state))
        self.born += 1
        it = Instance(f"i{self.born}", spec, Lane(self.queue_limit), now)
        self.instances[it.id] = it
        return it

    def _start(self, it: Instance, out: list[Command]) -> None:
        it.state = State.STARTING
        it.error = None
        it.starts += 1
        out.append(ev.Start(it.id, it.spec))

    def _halt(self, it: Instance, force: bool, out: list[Command]) -> None:
        it.state = State.STOPPING
        it.abandon_at = None
        it.lane.slots = 0
        out.append(ev.Halt(it.id, force))

    def _stop(self, it: Instance, force: bool, out: list[Command]) -> None:
        if it.state in (State.READY, State.DRAINING) and it.lane.running and not force:
            it.state = State.DRAINING
            return
        if it.state in (State.STARTING, State.READY, State.DRAINING) or (force and it.state is State.STOPPING):
            stopped = errors.Unavailable(f"{it.spec.model} was stopped by hand", code="stopped", hint="ask again to load it")
            self._turn_away(it, stopped.to_wire(), out)
            self._halt(it, force, out)
        elif it.state is State.FAILED:
            it.state = State.ABSENT

    def _turn_away(self, it: Instance, error: Wire, out: list[Command]) -> None:
        """Everybody who waits hears `error`; running tickets end with their engine."""
        out += [ev.TellError(lease, request, error) for lease, request in it.waiters]
        it.waiters = []
        for ticket in it.lane.clear_waiting():
            del self.tickets[ticket]
            out.append(ev.Refuse(ticket, error))

    def _up(self, it: Instance, slots: int, now: float, out: list[Command]) -> None:
        if it.state is not State.STARTING:  # stopped while it was getting ready: the Halt is under way
            return
        it.state = State.READY
        it.abandon_at = None  # loaded for nothing, but loaded: ttl decides now
        it.last_use = now
        it.lane.slots = slots
        out += [ev.TellReady(lease, request, it.id) for lease, request in it.waiters]
        it.waiters = []
        self._admit(it, out)

    def _down(self, it: Instance, error: Wire | None, now: float, out: list[Command]) -> None:
        before, it.abandon_at, it.lane.slots = it.state, None, 0
        if before is State.STARTING and error is not None:
            it.note_failure(error, now)
            self._turn_away(it, error, out)
        elif before in (State.READY, State.DRAINING) and error is not None:
            it.note_failure(error, now)
            if it.failures <= ACCIDENTS:
                it.retry_at = now  # it did come up: the next request may try at once
            if it.lane.waiting and it.failures <= ACCIDENTS:
                self._start(it, out)
            else:
                self._turn_away(it, error, out)
        else:
            it.state = State.ABSENT
            if it.waiters or it.lane.waiting:  # somebody came while it was stopping
                self._start(it, out)

    def _check_abandoned(self, it: Instance, now: float) -> None:
        if it.state is State.STARTING and not it.is_wanted and it.abandon_at is None:
            it.abandon_at = now + ABANDON_AFTER

    def _forget(self, now: float) -> None:
        for it in list(self.instances.values()):
            stale = it.state is State.ABSENT or (it.state is State.FAILED and now >= it.retry_at + FAILED_SHOWN)
            if stale and not (it.leases or it.is_wanted):
                del self.instances[it.id]

    # Time -----------------------------------------------------------------------------------------------------
    def _closes_at(self, it: Instance) -> float | None:
        if self.leases.retiring and not it.leases:
            return it.closes_at(0.0, 0.0)
        return it.closes_at(self.ttl, self.leased_ttl)

    def _tick(self, now: float, out: list[Command]) -> None:
        for it in list(self.instances.values()):
            due = self._closes_at(it)
            if (due is not None and now >= due) or (it.abandon_at is not None and now >= it.abandon_at):
                self._halt(it, False, out)


def _later(it: Instance, now: float) -> Wire:
    """The error of an instance that failed a moment ago, with the time to wait."""
    error = errors.from_wire(dict(it.error or {}))
    wait = error.data["retry_after"] = max(1, round(it.retry_at - now))
    if error.status >= 500:  # worth another try; what was the caller's move stays so
        error.status, error.hint = 503, f"a request starts it again in {wait} s at the earliest, `llm-daemon load` at once"
    return error.to_wire()
