"""Who has a place in memory: which instances must leave for those that wait, whose turn it is, and who can never have one.

Pure arithmetic over what each instance needs (bytes).  What has a process counts with all it needs, from its start to its
end: a place is taken before the load, so that a burst of first requests cannot overbook.  Whoever waits stands in a queue:

- the first in the queue goes first; somebody behind may go before it only into memory that it cannot use, and not once it has
  waited for `patience` seconds;
- those that nobody uses leave for it, the least recently used first and no more of them than needed, unless they became ready
  a moment ago (`Instance.stays_until`): the first requests for them are on their way, and a model should serve for as long as
  its load took;
- one that is in use, or loads, never leaves.  But if the first in the queue has waited for `patience` seconds, those in use
  admit nobody any more, the longest ready first, and leave when they have finished what runs.  Until then all that comes for
  them is served: requests are batched by model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from .instance import Instance, State
from .refusals import amount

LEAVING = (State.STOPPING, State.DRAINING)
DOING = {State.STARTING: "loading", State.DRAINING: "finishing", State.STOPPING: "ending"}


class Fit(Enum):
    """Whether one has its place: also LATER, when others have left, or NEVER."""

    YES, LATER, NEVER = range(3)


@dataclass(slots=True)
class Moves:
    """What is to be done now: `start` those, `leave` are (who, the model it leaves for, or None: too much is used)."""

    start: list[Instance] = field(default_factory=list)
    leave: list[tuple[Instance, str | None]] = field(default_factory=list)


@dataclass(slots=True)
class Placement:
    """The queue for memory.  `budget`: bytes for all instances together, None: no bound.  `patience`: seconds.

    `queue`: those that wait, first come first, in state QUEUED.  One whose `need` is None is still being weighed: it is
    passed by.  `crowded`: more is used than the budget allows, because somebody grew.
    """

    budget: int | None
    patience: float
    queue: dict[str, Instance] = field(default_factory=dict)
    crowded: bool = False
    told: set[str] = field(default_factory=set)  # of those, whose clients know that they wait
    looked_at: float = 0.0  # when `moves` was asked last: what was due by then is done

    def join(self, it: Instance) -> None:
        it.need = None
        self.queue[it.id] = it

    def leave(self, it: Instance) -> None:
        del self.queue[it.id]
        self.told.discard(it.id)

    def untold(self) -> list[Instance]:
        """Those that have to wait, and whose clients do not know it yet; each once."""
        found = [it for it in self.queue.values() if it.need is not None and it.id not in self.told]
        self.told.update(it.id for it in found)
        return found

    def weighed(self, it: Instance, need: int, instances: Collection[Instance]) -> Fit:
        """Notes what `it` needs."""
        if self.budget is None or not (it.has_process or it.state is State.QUEUED):
            return Fit.YES
        if it.state in (State.QUEUED, State.STARTING):
            it.need = need
            fit = Fit.NEVER if need > self.budget else Fit.LATER if need and used(instances) > self.budget else Fit.YES
            if it.state is State.STARTING and fit is not Fit.YES:
                it.need = 0  # its engine does not run yet
            return Fit.YES if it.state is State.QUEUED and fit is Fit.LATER else fit
        # An engine that turns out to take more is not ended for it: alone, it may have all there is.
        it.need = max(it.need or 0, min(need, self.budget))
        self.crowded |= used(instances) > self.budget
        return Fit.YES

    def moves(self, instances: Collection[Instance], now: float) -> Moves:
        """Changes no instance; the caller carries the moves out and asks again after the next event."""
        self.looked_at, out = now, Moves()
        if self.budget is None:
            return out
        free = self.budget - used(instances)
        coming = free + sum(it.need or 0 for it in instances if it.state in LEAVING)  # free soon, and claimed by nobody
        resident = [it for it in instances if it.state is State.READY and now >= it.stays_until]
        idle = sorted((it for it in resident if not it.is_wanted), key=lambda it: it.last_use)
        in_use = sorted((it for it in resident if it.is_wanted), key=lambda it: it.changed_at)  # the longest ready first
        self.crowded = coming < 0
        for it in idle[: len([it for it in instances if it.has_process]) - 1]:  # never the last one: it has all the memory
            if coming < 0:
                idle.remove(it)
                out.leave.append((it, None))
                coming += it.need or 0
        for it in self.queue.values():
            if it.need is None:
                continue
            if it.need == 0 or it.need <= min(free, coming):
                out.start.append(it)
                free, coming = free - it.need, coming - it.need
                continue
            is_late = now - it.changed_at >= self.patience
            if it.need > coming:
                for gone in _enough(idle, in_use if is_late else [], it.need - coming):
                    (in_use if gone.is_wanted else idle).remove(gone)
                    out.leave.append((gone, it.spec.model))
                    coming += gone.need or 0
            if it.need <= coming:
                coming -= it.need  # its place is kept for it until it is free
            elif is_late:
                break
        return out

    def wake_at(self, instances: Iterable[Instance]) -> float | None:
        """When time alone may change what `moves` says (monotonic seconds); None if it cannot."""
        if not self.queue and not self.crowded:
            return None
        moments = [it.stays_until for it in instances if it.state is State.READY]
        moments += [it.changed_at + self.patience for it in self.queue.values() if it.need is not None]
        return min((moment for moment in moments if moment > self.looked_at), default=None)

    def why(self, it: Instance, instances: Iterable[Instance]) -> str:
        """What `it` waits for, in one line for people."""
        others = [
            f"{other.spec.model} ({DOING.get(other.state) or ('in use' if other.is_wanted else 'idle')}, {amount(other.need)})"
            for other in instances
            if other.has_process and other.need
        ]
        before = list(self.queue).index(it.id) if it.id in self.queue else len(self.queue)
        return (
            f"{it.spec.model} waits for memory: it needs {amount(it.need or 0)}; in the {amount(self.budget or 0)} there are: "
            + (", ".join(others) or "nobody")
            + (f"; {before} wait before it" if before else "")
        )

    def foresee(self, it: Instance, instances: Collection[Instance], now: float) -> Moves:
        """`moves` as they would be if `it`, whose need is known, were queued now; changes nothing."""
        trial = Placement(self.budget, self.patience, {**self.queue, it.id: it})
        return trial.moves(instances, now)


def used(instances: Iterable[Instance]) -> int:
    """Bytes taken or promised: of all that have a process, loading and ending ones too."""
    return sum(it.need or 0 for it in instances if it.has_process)


def _enough(idle: Sequence[Instance], in_use: Sequence[Instance], lacking: int) -> list[Instance]:
    """Who leaves, so that `lacking` bytes become free; nobody if that would not do."""
    chosen: list[Instance] = []
    for it in (*idle, *in_use):
        if lacking > 0 and it.need:
            chosen.append(it)
            lacking -= it.need
    if lacking > 0:
        return []
    for it in chosen[::-1]:  # a large one that comes late in the line may do alone
        if lacking + (it.need or 0) <= 0:
            chosen.remove(it)
            lacking += it.need or 0
    return chosen
