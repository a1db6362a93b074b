"""The whole core: hands each event to its part and gathers commands.

One caller, one thread.  `handle` never raises for anything a client, an engine or the clock can do.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..spec import Spec
from . import events as ev, refusals
from .events import Command, Event, Wire
from .instance import ABANDON_AFTER, ACCIDENTS, Instance, State
from .lanes import Deadlines, Lanes, Stage, Ticket
from .leases import VETO_PAUSE, Leases
from .pace import Pace
from .placement import Fit, Placement
from .routes import ASIDE

READIEST = (State.READY, State.STARTING, State.QUEUED, State.DRAINING, State.STOPPING, State.ABSENT, State.FAILED)
FAILED_SHOWN = 600.0  # seconds a failed instance stays in view after it may be tried again
PACES = 64  # specs whose pace is remembered when nobody uses them


@dataclass(slots=True)
class Machine:
    """State of the daemon.  The shell may read `instances` to show them; only `handle` changes anything.

    `ttl` and `leased_ttl` are seconds an idle model stays, `queue_limit` the requests that may wait for one in each of
    its lanes, `max_overtake` the seconds for which newcomers may go before one that waits, for a slot or for memory.
    `budget`: bytes of memory for all engines together, None: no bound.
    """

    leases: Leases
    ttl: float
    leased_ttl: float
    queue_limit: int
    max_overtake: float
    budget: int | None = None
    instances: dict[str, Instance] = field(default_factory=dict)
    tickets: dict[str, Ticket] = field(default_factory=dict)
    keys: dict[str, Ticket] = field(default_factory=dict)  # of those that supersede: the newest ticket with each
    deadlines: Deadlines = field(default_factory=Deadlines)  # of those that wait
    paces: dict[Spec, Pace] = field(default_factory=dict)  # the last used last
    born: int = 0
    placement: Placement = field(init=False)

    def __post_init__(self) -> None:
        self.placement = Placement(self.budget, self.max_overtake)

    def handle(self, event: Event, now: float) -> list[Command]:
        """Takes one event at monotonic time `now` (seconds); returns commands to be carried out in order."""
        out: list[Command] = []
        if self.deadlines.heap:
            if isinstance(event, (ev.Ended, ev.Aborting)):
                self.deadlines.discard(event.ticket)  # over already: nobody is there to hear of a deadline
            for expired in self.deadlines.due(now):  # first, so that nobody is started too late
                self._cut_short(self.tickets[expired], refusals.expired("was not started by its deadline"), now, out)
        kind = type(event)
        if kind is ev.Arrived:  # the two that come with every request are asked for first
            self._arrived(event, now, out)  # type: ignore[arg-type]
        elif kind is ev.Ended:
            self._ended(event.ticket, event.served, now, out)  # type: ignore[union-attr]
        else:
            self._take(event, now, out)
        if self.placement.queue or self.placement.crowded:
            self._make_room(now, out)
        if self.tickets and len(self.instances) == 1:  # it is in use: nothing to clear up, no reason to leave
            self.leases.exit_at = None
            return out
        busy = bool(self.tickets)
        for it in list(self.instances.values()):
            if it.state is State.ABSENT or it.state is State.FAILED:
                self._forget(it, now)
            else:
                busy = True
        self.leases.settle(busy, now)
        if self.leases.retiring and self.leases.is_due(now) and kind is not ev.Tick and kind is not ev.ExitVetoed:
            out.append(ev.Exit())
        return out

    def _take(self, event: Event, now: float, out: list[Command]) -> None:
        match event:
            case ev.Joined(lease):
                self.leases.holders.add(lease)
            case ev.Left(lease):
                self._left(lease, now)
            case ev.Want():
                self._want(event, now, out)
            case ev.Aborting(ticket):
                self._aborting(ticket, now, out)
            case ev.Cancel(ticket, error):
                if ticket in self.tickets:
                    self._cut_short(self.tickets[ticket], error, now, out)
            case ev.Progressed(instance, info):
                if it := self.instances.get(instance):
                    if info.get("phase") == "download" and not it.has_fetched:
                        it.has_fetched = True
                        if self.budget is not None and it.state is State.STARTING:
                            it.need = 0  # nothing of it is in memory yet: Weighed follows when it is here
                    out += [ev.TellProgress(lease, request, info) for lease, request in it.waiters]
            case ev.Up(instance, slots):
                self._up(self.instances[instance], slots, now, out)
            case ev.Down(instance, error):
                self._down(self.instances[instance], error, now, out)
            case ev.Weighed(instance, need):
                if it := self.instances.get(instance):
                    self._weighed(it, need, now, out)
            case ev.StopModel(instance, force):
                if it := self.instances.get(instance):
                    self._stop(it, force, now, out)
            case ev.Retire():
                self.leases.retiring = True
                self._tick(now, out)
            case ev.ExitVetoed():
                self.leases.exit_at = now + VETO_PAUSE
            case ev.Tick():
                self._tick(now, out)
                if self.leases.is_due(now):
                    out.append(ev.Exit())

    @property
    def wake_at(self) -> float | None:
        """When the shell must send the next Tick (monotonic seconds); None if nothing is due by time alone."""
        due = self.leases.exit_at
        if (at := self.placement.wake_at(self.instances.values())) is not None:
            due = at if due is None else min(due, at)
        if self.deadlines.heap and (first := self.deadlines.first) is not None:
            due = first if due is None else min(due, first)
        for it in self.instances.values():
            for at in (self._closes_at(it), it.abandon_at):
                if at is not None and (due is None or at < due):
                    due = at
        return due

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
        if it.state is State.QUEUED and it.need is not None:
            self._tell_wait(it, it.waiters[-1:], out)
        elif not it.has_process and it.state is not State.QUEUED:  # an explicit wish starts again at once, whatever failed before
            self._begin(it, now, out)

    # Tickets --------------------------------------------------------------------------------------------------
    def _arrived(self, event: ev.Arrived, now: float, out: list[Command]) -> None:
        if (
            event.supersede is not None and event.supersede in self.keys
        ):  # whatever becomes of the newer one: nobody wants the older any more
            self._cut_short(self.keys[event.supersede], refusals.superseded(), now, out)
        if self.leases.retiring and not self.leases.holders:
            out.append(ev.Refuse(event.ticket, refusals.leaving()))
            return
        it = self._place(event.spec, now)
        if it.state is State.FAILED and now < it.retry_at:
            out.append(ev.Refuse(event.ticket, refusals.later(it, now)))
            return
        if event.deadline is not None and now + (wait := it.wait(event.lane, now)) > event.deadline:
            if it.load_left(now):
                it.pace.doubt_load()
            what = f"would wait about {wait:.1f} s, longer than its deadline allows" if wait else "came after its deadline"
            out.append(ev.Refuse(event.ticket, refusals.expired(what)))
            return
        if event.keep_alive is not None:
            it.keep_alive = event.keep_alive
        it.abandon_at = None
        if it.state is State.READY and it.lanes.may_run(event.lane):  # nobody waits: straight into a free slot
            ticket = Ticket(event.ticket, it.id, event.lane, now, 0.0, event.supersede)
            self.tickets[ticket.id] = ticket
            if ticket.key is not None:
                self.keys[ticket.key] = ticket
            it.lanes.run(ticket, now)
            out.append(ev.Run(ticket.id, it.id, 0.0))
            return
        self._queue(event, it, now)
        if it.state is State.READY:
            self._admit(it, now, out)
        elif not it.has_process and it.state is not State.QUEUED:
            self._begin(it, now, out)
        if it.lanes.waiting > it.lanes.bound:
            self._shed(it, out)

    def _queue(self, event: ev.Arrived, it: Instance, now: float) -> None:
        ticket = Ticket(event.ticket, it.id, event.lane, now, it.unready(now), event.supersede)
        self.tickets[ticket.id] = ticket
        it.lanes.submit(ticket)
        if ticket.key is not None:
            self.keys[ticket.key] = ticket
        if event.deadline is not None:
            self.deadlines.add(ticket.id, event.deadline)

    def _admit(self, it: Instance, now: float, out: list[Command]) -> None:
        for ticket in it.lanes.admit(now):
            self.deadlines.discard(ticket.id)
            out.append(ev.Run(ticket.id, it.id, max(0.0, it.unready(now) - ticket.unready)))

    def _shed(self, it: Instance, out: list[Command]) -> None:
        for ticket in it.lanes.shed():
            self._let_go(ticket)
            out.append(ev.Refuse(ticket.id, refusals.queue_full(it.spec, self.queue_limit)))

    def _cut_short(self, ticket: Ticket, error: Wire, now: float, out: list[Command]) -> None:
        """Ends the ticket before its time: at once if it waits, else by way of its engine; one that is aborting is ending."""
        it = self.instances[ticket.instance]
        if ticket.stage is Stage.WAITING:
            it.lanes.discard(ticket)
            self._let_go(ticket)
            out.append(ev.Refuse(ticket.id, error))
            self._check_abandoned(it, now)
        elif ticket.stage is Stage.RUNNING:
            ticket.stage = Stage.ABORTING
            out.append(ev.Abort(ticket.id, error))

    def _aborting(self, name: str, now: float, out: list[Command]) -> None:
        ticket = self.tickets.get(name)
        if ticket is not None and ticket.stage is Stage.WAITING:
            self._ended(name, False, now, out)  # its client has gone: there is no engine that has to let go of it
        elif ticket is not None:
            ticket.stage = Stage.ABORTING

    def _ended(self, name: str, served: bool, now: float, out: list[Command]) -> None:
        ticket = self.tickets.get(name)
        if ticket is None:  # a client's hang-up and an engine's end may both report the same ticket
            return
        it = self.instances[ticket.instance]
        it.lanes.discard(ticket)
        self._let_go(ticket)
        it.last_use = now
        if served:
            it.failures = 0  # not when it came up: one that falls with each first request has a backoff too
            if ticket.lane != ASIDE:
                it.pace.note_service(now - ticket.ran_at)
        if it.state is State.READY:
            if it.lanes.waiting:
                self._admit(it, now, out)
        elif it.state is State.DRAINING and not it.lanes.running:
            self._halt(it, False, now, out)
        else:
            self._check_abandoned(it, now)

    def _let_go(self, ticket: Ticket) -> None:
        """Forgets a ticket that is in no lane any more."""
        del self.tickets[ticket.id]
        self.deadlines.discard(ticket.id)
        if ticket.key is not None and self.keys.get(ticket.key) is ticket:
            del self.keys[ticket.key]

    def position(self, ticket: str, now: float) -> int | None:
        """How many run before this one, if slots became free now and nobody else came; None if it does not wait.

        Looks at everybody who waits: for a person who asks, not for every event.
        """
        it = self.tickets.get(ticket)
        if it is None or it.stage is not Stage.WAITING:
            return None
        return self.instances[it.instance].lanes.line(now).index(ticket)

    # Instances ------------------------------------------------------------------------------------------------
    def serving(self, spec: Spec) -> Instance | None:
        """The readiest instance that covers `spec`, if there is one."""
        fits = []
        for it in self.instances.values():
            if it.state is State.READY and it.served is spec:  # what nearly every request finds
                return it
            if it.spec.covers(spec) and not (it.state in (State.STARTING, State.QUEUED) and it.spec.risks(spec)):
                fits.append(it)
        return min(fits, key=lambda it: READIEST.index(it.state), default=None)

    def _place(self, spec: Spec, now: float) -> Instance:
        """The instance that serves `spec`: the readiest that covers it, else a new one."""
        if (it := self.serving(spec)) is not None:
            it.served = spec
            return it
        self.born += 1
        lanes = Lanes(self.queue_limit, self.max_overtake)
        it = Instance(f"i{self.born}", spec, lanes, self._pace(spec), now, changed_at=now)
        self.instances[it.id] = it
        return it

    def _pace(self, spec: Spec) -> Pace:
        """What earlier instances of this spec have taught us."""
        pace = self.paces[spec] = self.paces.pop(spec) if spec in self.paces else Pace()
        if len(self.paces) > PACES:
            del self.paces[next(iter(self.paces))]
        return pace

    def _begin(self, it: Instance, now: float, out: list[Command]) -> None:
        """Starts it, or has it wait for a place in memory: what it needs is asked first, and `_make_room` follows each event."""
        if self.budget is None:
            self._start(it, now, out)
            return
        it.enter(State.QUEUED, now)
        it.leaves_for = ""
        self.placement.join(it)
        out.append(ev.Weigh(it.id, it.spec))

    def _start(self, it: Instance, now: float, out: list[Command]) -> None:
        it.enter(State.STARTING, now)
        it.has_fetched = False
        it.error = None
        it.leaves_for = ""
        it.starts += 1
        out.append(ev.Start(it.id, it.spec))

    def _halt(self, it: Instance, force: bool, now: float, out: list[Command]) -> None:
        it.enter(State.STOPPING, now)
        it.abandon_at = None
        it.lanes.slots = 0
        out.append(ev.Halt(it.id, force, it.leaves_for))

    def _stop(self, it: Instance, force: bool, now: float, out: list[Command]) -> None:
        if it.state in (State.READY, State.DRAINING) and it.lanes.running and not force:
            it.enter(State.DRAINING, now)
            return
        if it.state in (State.STARTING, State.READY, State.DRAINING) or (force and it.state is State.STOPPING):
            self._turn_away(it, refusals.stopped(it.spec), out)
            it.leaves_for = ""
            self._halt(it, force, now, out)
        elif it.state is State.QUEUED:
            self._turn_away(it, refusals.stopped(it.spec), out)  # `_make_room` follows: nobody wants it any more
        elif it.state is State.FAILED:
            it.enter(State.ABSENT, now)

    def _turn_away(self, it: Instance, error: Wire, out: list[Command]) -> None:
        """Everybody who waits hears `error`; running tickets end with their engine."""
        out += [ev.TellError(lease, request, error) for lease, request in it.waiters]
        it.waiters = []
        for ticket in it.lanes.clear_waiting():
            self._let_go(ticket)
            out.append(ev.Refuse(ticket.id, error))

    def _up(self, it: Instance, slots: int, now: float, out: list[Command]) -> None:
        if it.state is not State.STARTING:  # stopped while it was getting ready: the Halt is under way
            return
        if not it.has_fetched:  # a download says nothing about the next start
            it.pace.note_load(now - it.changed_at)
        it.enter(State.READY, now)
        it.abandon_at = None  # loaded for nothing, but loaded: ttl decides now
        it.last_use = now
        it.lanes.slots = it.pace.slots = slots
        self._take_over(it, now)
        out += [ev.TellReady(lease, request, it.id) for lease, request in it.waiters]
        it.waiters = []
        self._admit(it, now, out)
        if it.lanes.waiting > it.lanes.bound:
            self._shed(it, out)

    def _down(self, it: Instance, error: Wire | None, now: float, out: list[Command]) -> None:
        before, it.abandon_at, it.lanes.slots = it.state, None, 0
        if before is State.STARTING and error is not None:
            it.note_failure(error, now)
            self._turn_away(it, error, out)
        elif before in (State.READY, State.DRAINING) and error is not None:
            it.note_failure(error, now)
            if it.failures <= ACCIDENTS:
                it.retry_at = now  # it did come up: the next request may try at once
            if it.lanes.waiting and it.failures <= ACCIDENTS:
                self._begin(it, now, out)
            else:
                self._turn_away(it, error, out)
        else:
            it.enter(State.ABSENT, now)
            if it.waiters or it.lanes.waiting:  # somebody came while it was stopping
                self._begin(it, now, out)

    # Memory ---------------------------------------------------------------------------------------------------
    def _weighed(self, it: Instance, need: int, now: float, out: list[Command]) -> None:
        match self.placement.weighed(it, need, self.instances.values()):
            case Fit.NEVER:
                self._turn_away(it, refusals.too_large(it.spec, need, self.budget or 0), out)
                if it.state is State.STARTING:
                    self._halt(it, False, now, out)
            case Fit.LATER:  # its clients go on waiting, and start it again
                it.leaves_for = "its size is known now that it is here, and it has to wait for memory"
                self._halt(it, False, now, out)

    def _make_room(self, now: float, out: list[Command]) -> None:
        """Follows every event while somebody waits for memory, or too much is used."""
        for it in [it for it in self.placement.queue.values() if not it.is_wanted]:
            self.placement.leave(it)
            it.enter(State.ABSENT, now)
        moves = self.placement.moves(self.instances.values(), now)
        for it, model in moves.leave:
            it.leaves_for = f"{model} needs its memory" if model else "more memory is used than memory_budget allows"
            if it.lanes.running:
                it.enter(State.DRAINING, now)
            else:
                self._halt(it, False, now, out)
        for it in moves.start:
            self.placement.leave(it)
            self._start(it, now, out)
        for it in self.placement.untold():
            out.append(ev.Waits(it.id, self._tell_wait(it, it.waiters, out)))

    def _tell_wait(self, it: Instance, waiters: list[tuple[str, int]], out: list[Command]) -> str:
        text = self.placement.why(it, self.instances.values())
        out += [ev.TellProgress(lease, request, {"phase": "wait", "message": text}) for lease, request in waiters]
        return text

    def _take_over(self, it: Instance, now: float) -> None:
        """Whoever waits for memory and can be served by `it`, ready now, needs none."""
        for other in [other for other in self.placement.queue.values() if it.spec.covers(other.spec)]:
            self.placement.leave(other)
            it.leases |= other.leases
            it.waiters += other.waiters
            if other.keep_alive is not None:
                it.keep_alive = other.keep_alive
            moved = other.lanes.clear_waiting()
            for ticket in moved:
                ticket.instance, ticket.unready = it.id, it.unready(now) - (other.unready(now) - ticket.unready)
            for ticket in sorted(it.lanes.clear_waiting() + moved, key=lambda ticket: ticket.arrived):
                it.lanes.submit(ticket)
            other.leases, other.waiters = set(), []
            other.enter(State.ABSENT, now)

    def _check_abandoned(self, it: Instance, now: float) -> None:
        if it.state is State.STARTING and not it.is_wanted and it.abandon_at is None:
            it.abandon_at = now + ABANDON_AFTER

    def _forget(self, it: Instance, now: float) -> None:
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
                self._halt(it, False, now, out)
