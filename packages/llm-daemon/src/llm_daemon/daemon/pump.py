"""Inbox -> core.handle(event, now) -> commands.  The only writer of the core's state."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from time import monotonic

from ..core.events import Arrived, Command, Event, Tick
from ..core.machine import Machine

log = logging.getLogger("llm_daemon")


class Pump:
    """Feeds the machine on the event loop's thread and carries its commands out with `do`.

    `post` handles the event before it returns, unless it is called from inside `do`: then the event waits its
    turn, so that commands of one event are never mixed with those of another.  `saw` is told of each event and its
    commands once they were carried out; it must not raise.
    """

    def __init__(
        self,
        machine: Machine,
        do: Callable[[Command], None],
        now: Callable[[], float] = monotonic,
        saw: Callable[[Event, list[Command], float], None] | None = None,
    ) -> None:
        self.machine = machine
        self._do = do
        self._saw = saw
        self._now = now
        self._inbox: deque[Event] = deque()
        self._busy = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None

    def post(self, event: Event) -> None:
        """Not thread-safe: call it on the loop's thread."""
        if self._busy:
            self._inbox.append(event)
            return
        self._busy = True
        # A request that came makes nothing due that was not, but its own deadline; whatever came of it may.
        arms = self._timer is None or type(event) is not Arrived or event.deadline is not None
        try:
            self._handle(event)
            while self._inbox:
                arms = True
                self._handle(self._inbox.popleft())
        finally:
            self._busy = False
        if arms:
            self._arm()

    def _handle(self, event: Event) -> None:
        now = self._now()
        commands = self.machine.handle(event, now)
        for command in commands:
            try:
                self._do(command)
            except Exception:  # one command that fails must not cost those behind it
                log.exception("%r failed", command)
        if self._saw is not None:  # last: a request must not wait for its record
            self._saw(event, commands, now)

    def _arm(self) -> None:
        wake_at = self.machine.wake_at
        if wake_at is None:
            return  # the timer that may be left is stale, harmless and rare
        if self._timer is not None and (self._timer_at is None or wake_at < self._timer_at):
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            # A deadline that moved back leaves the old, earlier timer, whose Tick is stale too.
            self._timer_at = wake_at
            self._timer = asyncio.get_running_loop().call_later(max(0.0, wake_at - self._now()), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.post(Tick())
