"""Who waits, who runs: the queue in front of one instance.  Oldest first."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True)
class Lane:
    """Tickets of one instance.  A ticket is in `waiting` or in `running`, never in both.

    `slots`: requests the engine serves at once (0 while there is none).  `bound`: requests that may wait.
    Methods return tickets: those to run now, or those to turn away.
    """

    bound: int
    slots: int = 0
    waiting: deque[str] = field(default_factory=deque)
    running: set[str] = field(default_factory=set)

    def submit(self, ticket: str) -> list[str]:
        """Queues the ticket; returns the tickets shed for it.  The newest is shed: the others have waited longer."""
        self.waiting.append(ticket)
        if len(self.waiting) <= self.bound + max(0, self.slots - len(self.running)):
            return []
        return [self.waiting.pop()]

    def admit(self) -> list[str]:
        """Moves tickets into free slots, oldest first, and returns them."""
        admitted = []
        while self.waiting and len(self.running) < self.slots:
            ticket = self.waiting.popleft()
            self.running.add(ticket)
            admitted.append(ticket)
        return admitted

    def discard(self, ticket: str) -> None:
        """The ticket ended, wherever it was; an unknown one is normal (two sides may report the same end)."""
        self.running.discard(ticket)
        if ticket in self.waiting:
            self.waiting.remove(ticket)

    def clear_waiting(self) -> list[str]:
        """Turns everybody away who waits."""
        gone = list(self.waiting)
        self.waiting.clear()
        return gone
