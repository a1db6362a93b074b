"""What happened: the core's events and the end of each ticket, for subscribers, for `/metrics` and for the history.

Told by the shell on the loop's thread; decides nothing.  What nobody looks at costs next to nothing: a request leaves one
record, and its way is told step by step only while somebody listens.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Literal

import msgspec

from ..core import events as ev
from ..core.events import Command, Event
from ..core.instance import Instance
from .history import BODY_LIMIT, History
from .tally import Tally

log = logging.getLogger("llm_daemon")
SIZE = 1000  # events in the ring
WORTH_A_WORD = 0.05  # seconds of waiting for memory
End = Literal["served", "shed", "superseded", "expired", "cancelled", "refused", "failed"]


class TicketRecord(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One request, from admission to its end.  It holds no text of the request or of its answer.

    `time`: wall time of its arrival, seconds since 1970.  `model`: the loaded model's id, or what was asked for if none was
    found.  `via`: `tcp` or `unix`; `pid` of the client where the system tells.  `status`: HTTP status the client got or would
    have got, `code` the error's.  Seconds, one after the other: `queue_s` waited for a slot, `load_s` for the model,
    `engine_s` from the slot to the head of the engine's answer; `total_s` from arrival to end.  `first_token_s`: from arrival to
    the first piece of the answer's body.  `chunks`: pieces of it.  Tokens are None where the answer did not tell.
    """

    ticket: str
    time: float
    path: str
    model: str
    end: End
    total_s: float
    instance: str = ""
    engine: str = ""
    lane: str = ""
    stream: bool = False
    via: str = "tcp"
    pid: int | None = None
    status: int = 0
    code: str = ""
    queue_s: float = 0.0
    load_s: float = 0.0
    engine_s: float = 0.0
    first_token_s: float | None = None
    bytes_in: int = 0
    bytes_out: int = 0
    chunks: int = 0
    replayed: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Happening(msgspec.Struct, frozen=True):
    """One event of the stream.  `n` counts from 1 in each journal; `time` is wall time.

    `kind` and the keys of `what`: `ticket` (a TicketRecord); `arrived` ticket, model, lane; `running` ticket, instance;
    `joined` and `left` lease; of a model, all with instance, model and a `text` for people: `queued` (waits for memory),
    `loading`, `ready` seconds, slots, `closing` why, `closed` why; `lost` count (of events that a slow reader missed).
    """

    n: int
    time: float
    kind: str
    what: TicketRecord | dict[str, Any]


class _Life(msgspec.Struct):
    """One instance, from its start to its end.  Times are monotonic seconds."""

    model: str
    began: float
    up: float | None = None
    closing: str = ""  # why
    text: str = ""


def _nobody(lease: str) -> str:
    return lease


class Journal:
    """One for the daemon.  Used on the loop's thread only, but for `history`.

    `instance` finds an instance of the core by id, `who` describes a lease's holder; both are asked when a model is loaded or
    closed.  `keeps_bodies`: whether `ticket` wants the request's body.
    """

    def __init__(
        self,
        history: History | None = None,
        *,
        keeps_bodies: bool = False,
        instance: Callable[[str], Instance | None] = lambda _: None,
        who: Callable[[str], str] = _nobody,
        size: int = SIZE,
    ) -> None:
        self.history, self.keeps_bodies, self.tally = history, keeps_bodies and history is not None, Tally()
        self.epoch = os.urandom(3).hex()  # ids of two journals differ
        self._ring: list[Happening | None] = [None] * size
        self._count = 0
        self._instance, self._who = instance, who
        self._lives: dict[str, _Life] = {}
        self._wishes: dict[str, tuple[str, float]] = {}  # instances that are weighed or wait: who wanted it, and when
        self._by_hand: set[str] = set()  # instances that somebody stopped and that finish what runs
        self._retiring = False
        self._readers: set[Subscription] = set()
        self._acts: dict[type, Callable[[Any, Any, float], None]] = {
            ev.Weigh: self._weigh, ev.Waits: self._wait, ev.Start: self._start, ev.Halt: self._halt, ev.Run: self._run,
        }  # fmt: skip
        self._notes: dict[type, Callable[[Any, float], None]] = {
            ev.Arrived: self._arrive, ev.Joined: self._join, ev.Left: self._leave,
            ev.Up: self._up, ev.Down: self._down, ev.StopModel: self._stop, ev.Retire: self._retire,
        }  # fmt: skip

    # Told by the shell ----------------------------------------------------------------------------------------
    def saw(self, event: Event, commands: list[Command], now: float) -> None:
        """The core took `event` at monotonic time `now` and answered with `commands`.  Never raises."""
        try:
            if note := self._notes.get(type(event)):
                note(event, now)
            for command in commands:
                if act := self._acts.get(type(command)):
                    act(command, event, now)
        except Exception:
            log.exception("the journal failed over %r", event)

    def ticket(self, record: TicketRecord, body: bytes = b"") -> None:
        """A ticket is over; once for each.  `body` is the request's, wanted if `keeps_bodies`; 64 KiB of it are kept."""
        self.tally.count(record)
        self._tell("ticket", record)
        if self.history is not None:
            kept = body[:BODY_LIMIT] if body and self.keeps_bodies else None
            self.history.put(("tickets", record.time, record.ticket, record.model, record, kept))

    def flush(self, timeout: float = 0.2) -> None:
        """Before the process leaves: the history's last rows, if the disk is quick enough."""
        if self.history is not None:
            self.history.flush(timeout)

    # Asked by readers -----------------------------------------------------------------------------------------
    def subscribe(self, last_id: str | None = None) -> Subscription:
        """Events from now on; with `last_id` (of `event_id`) also those after it that the ring still has.

        An id of another journal, a daemon before this one, gives all that the ring has.
        """
        after = self._count
        if last_id is not None:
            epoch, _, n = last_id.partition("-")
            known = epoch == self.epoch and n.isascii() and n.isdigit()
            after = min(after, int(n)) if known else max(0, after - len(self._ring))
        return Subscription(self, after)

    def event_id(self, event: Happening) -> str:
        return f"{self.epoch}-{event.n}"

    def recent(self, kinds: tuple[str, ...], limit: int) -> list[Happening]:
        """The last events of some kinds that the ring still has, newest first."""
        out: list[Happening] = []
        for n in range(self._count, max(0, self._count - len(self._ring)), -1):
            event = self._ring[n % len(self._ring)]
            if event is not None and event.kind in kinds and len(out) < limit:
                out.append(event)
        return out

    # Of the core ----------------------------------------------------------------------------------------------
    def _arrive(self, event: ev.Arrived, _now: float) -> None:
        if self._readers:
            self._tell("arrived", {"ticket": event.ticket, "model": event.spec.model, "lane": event.lane})

    def _run(self, command: ev.Run, _event: Event, _now: float) -> None:
        if self._readers:
            self._tell("running", {"ticket": command.ticket, "instance": command.instance})

    def _join(self, event: ev.Joined, _now: float) -> None:
        self._tell("joined", {"lease": event.lease})

    def _leave(self, event: ev.Left, _now: float) -> None:
        self._tell("left", {"lease": event.lease})

    def _retire(self, _event: ev.Retire, _now: float) -> None:
        self._retiring = True

    def _stop(self, event: ev.StopModel, _now: float) -> None:
        if event.instance in self._lives:
            self._by_hand.add(event.instance)

    def _weigh(self, command: ev.Weigh, event: Event, now: float) -> None:
        for gone in [name for name in self._wishes if self._instance(name) is None]:
            del self._wishes[gone]
        self._wishes[command.instance] = self._cause(event), now

    def _wait(self, command: ev.Waits, _event: Event, now: float) -> None:
        it = self._instance(command.instance)
        life = _Life(it.spec.model if it is not None else "", now)
        self._of(command.instance, life, "queued", command.text)

    def _start(self, command: ev.Start, event: Event, now: float) -> None:
        cause, since = self._wishes.pop(command.instance, (None, now))
        life = self._lives[command.instance] = _Life(command.spec.model, now)
        waited = f", after {now - since:.2f} s of waiting for memory" if now - since >= WORTH_A_WORD else ""
        if cause is not None:
            self.tally.memory_wait[self.tally.label(life.model),].add(now - since)
        self._of(command.instance, life, "loading", f"{life.model} begins to load{waited}: {cause or self._cause(event)}")

    def _cause(self, event: Event) -> str:
        match event:
            case ev.Arrived(ticket):
                return f"request {ticket} asked for it"
            case ev.Want(lease):
                return f"{self._who(lease)} asked for it"
            case ev.Down():
                return "it ended while requests waited for it"
            case _:
                return "requests wait for it"

    def _up(self, event: ev.Up, now: float) -> None:
        life = self._lives.get(event.instance)
        if life is None or life.closing:
            return
        life.up, seconds = now, now - life.began
        model = self.tally.label(life.model)
        self.tally.loads[model, "ready"] += 1
        self.tally.load[model,].add(seconds)
        text = f"{life.model} is ready after {seconds:.2f} s"
        self._of(event.instance, life, "ready", text, seconds=seconds, slots=event.slots)

    def _halt(self, command: ev.Halt, _event: Event, now: float) -> None:
        life = self._lives.get(command.instance)
        if life is None or life.closing:
            return
        it = self._instance(command.instance)
        if command.instance in self._by_hand:
            life.closing, life.text = "by_hand", "it was stopped by hand"
        elif command.leaves_for:
            life.closing, life.text = "evicted", command.leaves_for
        elif life.up is None:
            life.closing, life.text = "abandoned", "nobody waited for it any more"
        elif self._retiring:
            life.closing, life.text = "leaving", "the daemon leaves"
        else:
            idle = f" for {now - it.last_use:.0f} s" if it is not None else ""
            life.closing, life.text = "idle", f"nobody used it{idle}"
        self._of(command.instance, life, "closing", f"{life.model} is being closed: {life.text}", why=life.closing)

    def _down(self, event: ev.Down, _now: float) -> None:
        life = self._lives.pop(event.instance, None)
        self._by_hand.discard(event.instance)
        if life is None:
            return
        why, text, error = life.closing, life.text, event.error or {}
        if error and not why:
            code = str(error.get("code", ""))
            why = "failed" if life.up is None else "hung" if code == "engine_hung" else "died"
            text = str(error.get("message", ""))
        why = why or "gone"
        model = self.tally.label(life.model)
        if life.up is None:
            self.tally.loads[model, "failed" if why == "failed" else "abandoned"] += 1
        else:
            self.tally.closes[model, why] += 1
        told = f"{life.model} did not load: {text}" if why == "failed" else f"{life.model} is closed: {text}"
        more: dict[str, Any] = {"code": str(error["code"])} if "code" in error else {}
        self._of(event.instance, life, "closed", told, why=why, **more)

    # Out ------------------------------------------------------------------------------------------------------
    def _of(self, instance: str, life: _Life, kind: str, text: str, **more: Any) -> None:
        what = {"instance": instance, "model": life.model, "text": text, **more}
        self._tell(kind, what)
        if self.history is not None and kind != "closing":  # `closed` says the same
            self.history.put(("events", time.time(), kind, life.model, {"kind": kind, **what}, None))

    def _tell(self, kind: str, what: TicketRecord | dict[str, Any]) -> None:
        self._count += 1
        self._ring[self._count % len(self._ring)] = Happening(self._count, time.time(), kind, what)
        for reader in self._readers:
            reader.wake()

    def after(self, n: int) -> tuple[int, Happening | None]:
        """(how many events after number `n` the ring has lost, the first one it has or None)."""
        first = max(n + 1, self._count - len(self._ring) + 1)
        return first - n - 1, self._ring[first % len(self._ring)] if first <= self._count else None


class Subscription:
    """An async iterator over events, for one task.  It holds a place in the journal's ring and no events of its own:
    a reader that is slower than the ring is long gets one `lost` event in place of those it missed.
    """

    def __init__(self, journal: Journal, after: int) -> None:
        self._journal, self._after = journal, after
        self._event = asyncio.Event()
        journal._readers.add(self)

    def wake(self) -> None:
        self._event.set()

    def close(self) -> None:
        """Ends it; the journal forgets it.  May be called twice."""
        self._journal._readers.discard(self)

    def __aiter__(self) -> AsyncIterator[Happening]:
        return self

    async def __anext__(self) -> Happening:
        """The next event.  Cancelling it loses none."""
        while True:
            lost, event = self._journal.after(self._after)
            if lost:
                self._after += lost
                return Happening(self._after, time.time(), "lost", {"count": lost})
            if event is not None:
                self._after = event.n
                return event
            self._event.clear()
            await self._event.wait()


def as_dict(event: Happening) -> dict[str, Any]:
    """The event as one flat JSON object."""
    what = event.what if isinstance(event.what, Mapping) else msgspec.to_builtins(event.what)
    return {**what, "time": what.get("time", event.time), "kind": event.kind}
