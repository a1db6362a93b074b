"""Where the time of a request went, and why models came and went: from the history's file, or from the journal's ring.

Used by the daemon and, when none runs, by the command line alone.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from ..errors import Unavailable, UsageError
from .history import read_events, read_tickets
from .journal import Journal, as_dict

LAST = 20  # requests and events that a summary looks at
MOST = 10_000
STORIES = ("queued", "loading", "ready", "closed")
Record = Mapping[str, Any]


def parts(record: Record) -> dict[str, float]:
    """Seconds of a request in order: waiting for a slot, for the model, for the engine's answer, for the answer's end.

    >>> parts({"queue_s": 0.5, "load_s": 2.0, "engine_s": 0.25, "total_s": 3.0})
    {'queue': 0.5, 'load': 2.0, 'engine': 0.25, 'answer': 0.25}
    """
    queue, load, engine = (float(record.get(f"{name}_s") or 0.0) for name in ("queue", "load", "engine"))
    return {
        "queue": queue, "load": load, "engine": engine,
        "answer": max(0.0, float(record.get("total_s") or 0.0) - queue - load - engine),
    }  # fmt: skip


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """Of some requests: how many had which `ends`; of those served the p50 and p95 of each part and of the total, in seconds."""
    served = [{**parts(r), "total": float(r.get("total_s") or 0.0)} for r in records if r.get("end") == "served"]
    out: dict[str, Any] = {"requests": len(records), "ends": dict(Counter(str(r.get("end")) for r in records))}
    for name in served[0] if served else ():
        values = sorted(s[name] for s in served)
        out[name] = {"p50": quantile(values, 0.5), "p95": quantile(values, 0.95)}
    return out


def quantile(values: Sequence[float], q: float) -> float:
    """Of sorted values, the smallest that at least the part `q` of them does not exceed.

    >>> quantile([1.0, 2.0, 3.0, 4.0], 0.5), quantile([1.0, 2.0, 3.0, 4.0], 0.95)
    (2.0, 4.0)
    """
    return values[max(0, ceil(q * len(values)) - 1)]


def story(
    ticket: str | None, found: Record | None, recent: Sequence[Record], events: Sequence[Record], live: Sequence[Record] = ()
) -> dict[str, Any]:
    """The answer of `explain`, from records and events newest first.

    `ticket`: the record asked for, or the last one, with its `parts`; None if there is none.  `recent`, `summary`: of the last
    requests.  `events`: what became of the models, newest first.  `live`: requests that have no end yet.
    Raises UsageError (`unknown_ticket`) if a ticket was named that nobody knows.
    """
    if ticket is None:
        found = recent[0] if recent else None
    elif found is None:
        found = next((r for r in live if r.get("ticket") == ticket), None)
        if found is None:
            hint = "the history forgets the oldest ones; `llm-daemon explain` without a ticket shows the last"
            raise UsageError(f"no request {ticket[:100]!r} is known", code="unknown_ticket", status=404, hint=hint)
    return {
        "ticket": None if found is None else {**found, "parts": parts(found)},
        "recent": list(recent),
        "summary": summary(recent),
        "events": list(events),
        "live": list(live),
    }


def from_file(path: str, ticket: str | None = None, limit: int = LAST, live: Sequence[Record] = ()) -> dict[str, Any]:
    """`story` from the history's file.  Raises Unavailable (`history`) if it cannot be read."""
    found = next(iter(read_tickets(path, 1, ticket=ticket)), None) if ticket else None
    until = found["time"] + float(found["total_s"]) if found else None
    model = str(found["model"]) if found else None
    return story(ticket, found, read_tickets(path, limit), read_events(path, limit, model, until), live)


def from_ring(journal: Journal, ticket: str | None = None, limit: int = LAST, live: Sequence[Record] = ()) -> dict[str, Any]:
    """`story` of what the daemon itself remembers, for when there is no history."""
    records = [as_dict(e) for e in journal.recent(("ticket",), MOST)]
    found = next((r for r in records if r["ticket"] == ticket), None)
    return story(ticket, found, records[:limit], [as_dict(e) for e in journal.recent(STORIES, limit)], live)


async def explain(journal: Journal, ticket: str | None, limit: int, live: Sequence[Record]) -> dict[str, Any]:
    """`story`, from the file if there is a history that can be read, else from the ring.  Keeps the loop free meanwhile."""
    history = journal.history
    if history is not None and not history.is_failing:
        try:
            await asyncio.to_thread(history.flush, 1.0)
            told = await asyncio.to_thread(from_file, history.path, ticket, limit, live)
            if told["recent"] or ticket:
                return told
        except (Unavailable, UsageError):
            pass  # the ring may know more
    return from_ring(journal, ticket, limit, live)


async def recent(journal: Journal, limit: int, model: str | None) -> list[dict[str, Any]]:
    """Records of the last requests, newest first; from where `explain` has them."""
    history = journal.history
    if history is not None and not history.is_failing:
        try:
            await asyncio.to_thread(history.flush, 1.0)
            return await asyncio.to_thread(read_tickets, history.path, limit, model)
        except Unavailable:
            pass
    records = [as_dict(e) for e in journal.recent(("ticket",), MOST)]
    return [r for r in records if model is None or r["model"] == model][:limit]


def limited(value: object, default: int = LAST) -> int:
    """A limit as it came from outside.  Raises UsageError (`bad_limit`) for anything but a whole number from 1 to 10000.

    >>> limited(None), limited("7")
    (20, 7)
    """
    if value is None:
        return default
    try:
        number = int(str(value))
    except ValueError:
        number = 0
    if not 1 <= number <= MOST:
        raise UsageError(f"limit must be a whole number from 1 to {MOST}, not {str(value)[:50]!r}", code="bad_limit")
    return number
