"""Who waits, who runs: the queue in front of one instance.

Two lanes.  `interactive`: newest first, because an editor cares for its last keystroke.  `regular`: oldest first.  The
interactive lane goes first, but whoever has waited `max_overtake` seconds is late, and nobody who came after a late
ticket runs before it.  Every event costs the same, however many wait.

Tickets of the lane `aside` (core/routes.py) take no slot: they wait for the model alone.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import StrEnum
from heapq import heapify, heappop, heappush
from itertools import chain

import msgspec

from .routes import ASIDE, INTERACTIVE


class Stage(StrEnum):
    """Where a ticket is, until its end."""

    WAITING = "waiting"
    RUNNING = "running"
    ABORTING = "aborting"  # told to end; keeps its slot until the engine has let go


class Ticket(msgspec.Struct, eq=False):
    """One request from its arrival to its one end.  Times are monotonic seconds.

    `lane`: `interactive`, `aside`, or anything else for regular.  `unready`: the instance's `unready` seconds when it arrived.
    `key`: its supersede key.  `order`: it came as the how-many-th of its instance.
    """

    id: str
    instance: str
    lane: str
    arrived: float
    unready: float = 0.0
    key: str | None = None
    stage: Stage = Stage.WAITING
    ran_at: float = 0.0
    order: int = 0


Queue = OrderedDict[str, Ticket]  # a dict whose first is found at once, however many were taken before it


def _first(queue: Queue) -> Ticket:
    return next(iter(queue.values()))


class Lane(msgspec.Struct, eq=False):
    """Those who wait in one lane, oldest first: the late ones, then the others."""

    late: Queue = msgspec.field(default_factory=OrderedDict)
    fresh: Queue = msgspec.field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self.late) + len(self.fresh)

    def note_late(self, max_overtake: float, now: float) -> None:
        """Each ticket comes of age once, so that this costs nothing in the long run."""
        while self.fresh and now - _first(self.fresh).arrived >= max_overtake:
            ticket, it = self.fresh.popitem(last=False)
            self.late[ticket] = it

    def oldest(self) -> Ticket:
        return (self.late or self.fresh).popitem(last=False)[1]

    def newest(self) -> Ticket:
        return (self.fresh or self.late).popitem()[1]

    def discard(self, ticket: str) -> bool:
        return self.late.pop(ticket, None) is not None or self.fresh.pop(ticket, None) is not None


@dataclass(slots=True)
class Lanes:
    """Tickets of one instance.  A ticket is in one of the lanes or in `running` (aborting ones too), never in both.

    Of those in `running`, `beside` take no slot.

    `bound`: tickets that may wait in each lane.  `max_overtake`: seconds newcomers may go before somebody who waits.
    `slots`: requests the engine serves at once (0 while there is none).
    """

    bound: int
    max_overtake: float
    slots: int = 0
    interactive: Lane = field(default_factory=Lane)
    regular: Lane = field(default_factory=Lane)
    aside: Queue = field(default_factory=OrderedDict)
    running: dict[str, Ticket] = field(default_factory=dict)
    waiting: int = 0  # in all lanes
    beside: int = 0
    came: int = 0

    @property
    def taken(self) -> int:
        """Slots in use."""
        return len(self.running) - self.beside

    @property
    def aborting(self) -> int:
        """How many of those that hold a slot were told to end."""
        return sum(it.stage is Stage.ABORTING for it in self.running.values())

    def may_run(self, lane: str) -> bool:
        """Whether a ticket that comes now runs at once."""
        return not self.waiting and lane != ASIDE and len(self.running) - self.beside < self.slots

    def run(self, ticket: Ticket, now: float) -> None:
        """Gives it a free slot."""
        self.came += 1
        ticket.order = self.came
        ticket.stage, ticket.ran_at = Stage.RUNNING, now
        self.running[ticket.id] = ticket

    def submit(self, ticket: Ticket) -> None:
        """Queues the ticket, whatever the bound: `admit` and `shed` follow."""
        self.came += 1
        self.waiting += 1
        ticket.order = self.came
        if ticket.lane == ASIDE:
            self.aside[ticket.id] = ticket
        else:
            self._lane(ticket).fresh[ticket.id] = ticket

    def admit(self, now: float) -> list[Ticket]:
        """Moves tickets into free slots and returns them."""
        if self.waiting > 1:  # whoever waits alone is passed by nobody
            self._note_late(now)
        admitted = []
        while self.aside and self.slots:
            admitted.append(self.aside.popitem(last=False)[1])
            self.beside += 1
            self._run(admitted[-1], now)
        while self.waiting and self.taken < self.slots and (ticket := self._next()) is not None:
            admitted.append(ticket)
            self._run(ticket, now)
        return admitted

    def _run(self, ticket: Ticket, now: float) -> None:
        self.waiting -= 1
        ticket.stage, ticket.ran_at = Stage.RUNNING, now
        self.running[ticket.id] = ticket

    def shed(self) -> list[Ticket]:
        """Turns away those beyond the bound.

        Of the interactive lane the oldest, whose asker has most likely moved on; of the regular one the newest: the
        others have waited longer.
        """
        gone = [self.interactive.oldest() for _ in range(len(self.interactive) - self.bound)]
        gone += [self.aside.popitem()[1] for _ in range(len(self.aside) - self.bound)]
        gone += [self.regular.newest() for _ in range(len(self.regular) - self.bound)]
        self.waiting -= len(gone)
        return gone

    def discard(self, ticket: Ticket) -> None:
        """The ticket ended, wherever it was."""
        if self.running.pop(ticket.id, None) is not None:
            self.beside -= ticket.lane == ASIDE
        elif ticket.lane == ASIDE:
            self.waiting -= self.aside.pop(ticket.id, None) is not None
        else:
            self.waiting -= self._lane(ticket).discard(ticket.id)

    def clear_waiting(self) -> list[Ticket]:
        """Turns everybody away who waits, oldest first."""
        gone = sorted(self._everybody(), key=lambda it: it.order)
        self.interactive, self.regular, self.aside, self.waiting = Lane(), Lane(), OrderedDict(), 0
        return gone

    def ahead(self, lane: str, now: float) -> int:
        """How many of those who wait would run before one that came now into `lane`, if nobody came after it."""
        self._note_late(now)
        if lane == ASIDE:
            return 0
        return len(self.interactive.late) + len(self.regular.late) if lane == INTERACTIVE else self.waiting - len(self.aside)

    def line(self, now: float) -> list[str]:
        """Who waits, in the order in which they would run if slots became free now.

        Looks at everybody: for a person who asks, not for every event.
        """

        def turn(it: Ticket) -> tuple[int, int]:
            if it.lane == ASIDE or now - it.arrived >= self.max_overtake:
                return (-1 if it.lane == ASIDE else 0), it.order
            return (1, -it.order) if it.lane == INTERACTIVE else (2, it.order)

        return [it.id for it in sorted(self._everybody(), key=turn)]

    def _lane(self, ticket: Ticket) -> Lane:
        return self.interactive if ticket.lane == INTERACTIVE else self.regular

    def _everybody(self) -> chain[Ticket]:
        lanes = self.interactive, self.regular
        queues = (self.aside, *(queue for lane in lanes for queue in (lane.late, lane.fresh)))
        return chain.from_iterable(queue.values() for queue in queues)

    def _note_late(self, now: float) -> None:
        self.interactive.note_late(self.max_overtake, now)
        self.regular.note_late(self.max_overtake, now)

    def _next(self) -> Ticket | None:
        """Takes out whose turn it is."""
        late = [lane for lane in (self.interactive, self.regular) if lane.late]
        if late:
            return min(late, key=lambda lane: _first(lane.late).order).oldest()
        if self.interactive:
            return self.interactive.newest()
        return self.regular.oldest() if self.regular else None


class Deadlines(msgspec.Struct, eq=False):
    """Tickets that must not start later than a moment each (monotonic seconds)."""

    moments: dict[str, float] = msgspec.field(default_factory=dict)
    heap: list[tuple[float, str]] = msgspec.field(default_factory=list)  # entries that `moments` does not know are void

    def add(self, ticket: str, moment: float) -> None:
        self.moments[ticket] = moment
        heappush(self.heap, (moment, ticket))

    def discard(self, ticket: str) -> None:
        """Unknown ones are normal.  The heap stays within twice what is alive, however far off the deadlines are."""
        if self.moments.pop(ticket, None) is not None and len(self.heap) > 2 * len(self.moments):
            self.heap = [(moment, ticket) for ticket, moment in self.moments.items()]
            heapify(self.heap)

    @property
    def first(self) -> float | None:
        """The next moment; None if there is none."""
        while self.heap and self.moments.get(self.heap[0][1]) != self.heap[0][0]:
            heappop(self.heap)
        return self.heap[0][0] if self.heap else None

    def due(self, now: float) -> list[str]:
        """Takes out the tickets whose moment has come, the earliest first."""
        gone = []
        while (first := self.first) is not None and first <= now:
            gone.append(heappop(self.heap)[1])
            del self.moments[gone[-1]]
        return gone
