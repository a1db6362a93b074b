"""Who keeps the daemon alive, and until when."""

from __future__ import annotations

from dataclasses import dataclass, field

VETO_PAUSE = 0.05  # seconds until we try to leave again after somebody stood at the door


@dataclass(slots=True)
class Leases:
    """The daemon's reasons to live.  `linger`: seconds it outlives the last one; times are monotonic seconds.

    `exit_at` is None while there is a reason.  Whoever was just born gets `grace` seconds for its first client.
    """

    linger: float
    exit_at: float | None
    holders: set[str] = field(default_factory=set)
    retiring: bool = False  # one way: a daemon told to go, goes when it may

    @classmethod
    def born(cls, linger: float, now: float, grace: float = 10.0) -> Leases:
        return cls(linger, now + max(linger, grace))

    def settle(self, busy: bool, now: float) -> None:
        """Called after every event; `busy` means that an engine process or a ticket exists."""
        if self.holders or busy:
            self.exit_at = None
        elif self.retiring:
            self.exit_at = now if self.exit_at is None else min(self.exit_at, now + VETO_PAUSE)
        elif self.exit_at is None:
            self.exit_at = now + self.linger

    def is_due(self, now: float) -> bool:
        return self.exit_at is not None and now >= self.exit_at
