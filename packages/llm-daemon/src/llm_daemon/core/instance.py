"""The life of one instance: absent, starting, ready, draining, stopping, failed."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from ..spec import Spec
from .events import Wire
from .lanes import Lanes, Stage
from .pace import Pace
from .routes import ASIDE

BACKOFF_FIRST, BACKOFF_MOST = 1.0, 60.0  # seconds between starts of an engine that keeps failing
ACCIDENTS = 2  # deaths in a row, with no request served between, that do not hold the next request off
ABANDON_AFTER = 2.0  # seconds a start goes on when nobody waits for it any more: a client that retries finds it warm


class State(StrEnum):
    """Where an instance is.  Only `ready` admits tickets; the three middle ones own a process."""

    ABSENT = "absent"  # nothing runs; kept while a lease names it
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"  # finishes what runs, admits nobody
    STOPPING = "stopping"
    FAILED = "failed"


@dataclass(slots=True)
class Instance:
    """One spec and, most of the time, one engine process serving it.  Times are monotonic seconds.

    `waiters` are (lease, request) pairs that want to hear of readiness.  `last_use` is the end of the last
    request, the last wish, or the moment the last lease left.  `changed_at` is when `state` last changed, `unready_before`
    the seconds up to then in which it was not ready.  `has_fetched`: this start had to download first.
    """

    id: str
    spec: Spec
    lanes: Lanes
    pace: Pace
    last_use: float
    changed_at: float
    state: State = State.ABSENT
    leases: set[str] = field(default_factory=set)
    waiters: list[tuple[str, int]] = field(default_factory=list)
    keep_alive: float | None = None
    error: Wire | None = None
    failures: int = 0
    retry_at: float = 0.0
    abandon_at: float | None = None
    starts: int = 0
    unready_before: float = 0.0
    has_fetched: bool = False
    served: Spec | None = None  # the last one that it was found to cover

    @property
    def has_process(self) -> bool:
        return self.state in (State.STARTING, State.READY, State.DRAINING, State.STOPPING)

    @property
    def is_wanted(self) -> bool:
        """Somebody waits for it or is served by it right now (a lease alone is no use)."""
        return bool(self.waiters or self.lanes.waiting or self.lanes.running)

    def enter(self, state: State, now: float) -> None:
        self.unready_before = self.unready(now)
        self.state, self.changed_at = state, now

    def unready(self, now: float) -> float:
        """Seconds of its life in which it was not ready."""
        return self.unready_before + (0.0 if self.state is State.READY else now - self.changed_at)

    def load_left(self, now: float) -> float:
        """Seconds until it is ready, by what loads of its spec took; 0 if that is not known."""
        if self.state is State.READY or self.pace.load is None:
            return 0.0
        return max(0.0, self.pace.load - (now - self.changed_at if self.state is State.STARTING else 0.0))

    def wait(self, lane: str, now: float) -> float:
        """Seconds until a ticket that came now into `lane` would run: at least, by what is known; 0 if nothing is."""
        if lane == ASIDE:
            return self.load_left(now)
        taken = self.lanes.running.values() if self.state is State.READY else ()
        # Aborting ones let go any moment.
        running = [now - it.ran_at for it in taken if it.stage is Stage.RUNNING and it.lane != ASIDE]
        return self.load_left(now) + self.pace.wait(self.lanes.ahead(lane, now), running)

    def closes_at(self, ttl: float, leased_ttl: float) -> float | None:
        """When a ready instance is unloaded if nothing else happens; None while it is in use or not ready."""
        if self.state is not State.READY or self.is_wanted:
            return None
        if self.keep_alive is not None:
            return self.last_use + self.keep_alive
        return self.last_use + (leased_ttl if self.leases else ttl)

    def note_failure(self, error: Wire, now: float) -> None:
        """A start failed or a process died: 1, 2, 4 ... seconds until a request may start it again, 60 at most."""
        self.enter(State.FAILED, now)
        self.error = error
        self.failures += 1
        self.retry_at = now + min(BACKOFF_MOST, BACKOFF_FIRST * 2 ** min(self.failures - 1, 10))
