"""The journal: why models come and go, a ring for readers of any speed, numbers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from llm_daemon.core import events as ev
from llm_daemon.core.instance import Instance
from llm_daemon.daemon import explain, tally
from llm_daemon.daemon.journal import Journal, Subscription, as_dict
from llm_daemon.errors import UsageError

from .fakes import SPEC, load, record

GONE = {"code": "engine_died", "message": "xllamacpp died (signal 9)"}
HUNG = {"code": "engine_hung", "message": "xllamacpp hung"}


def told(journal: Journal, *kinds: str) -> list[dict[str, Any]]:
    """The ring's events, oldest first."""
    wanted = kinds or ("loading", "ready", "closing", "closed")
    return [as_dict(e) for e in reversed(journal.recent(wanted, 1000))]


@pytest.mark.parametrize(
    ("event", "cause"),
    [
        (ev.Arrived("t-1", SPEC), "request t-1 asked"),
        (ev.Want("c1", 1, SPEC), "vim (pid 9) asked"),
        (ev.Down("i1"), "it ended while requests waited"),
        (ev.Tick(), "requests wait"),
    ],
)
def test_why_a_model_is_loaded(event: ev.Event, cause: str) -> None:
    journal = Journal(who={"c1": "vim (pid 9)"}.__getitem__)
    journal.saw(event, [ev.Start("i1", SPEC)], 5.0)
    [loading] = told(journal)
    assert (loading["kind"], loading["instance"], loading["model"]) == ("loading", "i1", "smollm2-135m")
    assert loading["text"].startswith("smollm2-135m begins to load: " + cause)


def test_a_wait_for_memory_is_told_and_counted_and_the_load_remembers_who_asked() -> None:
    journal = Journal(instance=lambda _: cast(Instance, SimpleNamespace(spec=SPEC, last_use=0.0)))
    journal.saw(ev.Arrived("t-1", SPEC), [ev.Weigh("i1", SPEC)], 5.0)
    journal.saw(ev.Weighed("i1", 9), [ev.Waits("i1", "smollm2-135m waits for memory: ...")], 5.0)
    journal.saw(ev.Down("i0"), [ev.Start("i1", SPEC)], 7.5)
    queued, loading = told(journal, "queued", "loading")
    assert (queued["model"], queued["text"]) == ("smollm2-135m", "smollm2-135m waits for memory: ...")
    assert loading["text"] == "smollm2-135m begins to load, after 2.50 s of waiting for memory: request t-1 asked for it"
    assert journal.tally.memory_wait["smollm2-135m",].total == 2.5


def test_ready_says_how_long_it_took() -> None:
    journal = Journal()
    load(journal)
    assert told(journal)[-1]["seconds"] == 2.0 and told(journal)[-1]["slots"] == 2
    assert journal.tally.loads == {("smollm2-135m", "ready"): 1}
    assert journal.tally.load["smollm2-135m",].total == 2.0


def halted(journal: Journal, event: ev.Event, at: float = 130.0, leaves_for: str = "") -> None:
    journal.saw(event, [ev.Halt("i1", False, leaves_for)], at)
    journal.saw(ev.Down("i1"), [], at + 1)


def by_hand_after_the_last_answer(journal: Journal) -> None:
    journal.saw(ev.StopModel("i1"), [], 110.0)
    halted(journal, ev.Ended("t-1"))


def leaving(journal: Journal) -> None:
    journal.saw(ev.Retire(), [], 110.0)
    halted(journal, ev.Tick())


@pytest.mark.parametrize(
    ("end", "why", "text"),
    [
        (lambda j: halted(j, ev.Tick()), "idle", "nobody used it for 20 s"),
        (lambda j: halted(j, ev.StopModel("i1")), "by_hand", "stopped by hand"),
        (by_hand_after_the_last_answer, "by_hand", "stopped by hand"),
        (lambda j: halted(j, ev.Weighed("i2", 9), leaves_for="gemma3-270m needs its memory"), "evicted", "gemma3-270m needs it"),
        (lambda j: halted(j, ev.Ended("t-2"), leaves_for="more is used"), "evicted", "more is used"),
        (leaving, "leaving", "the daemon leaves"),
        (lambda j: j.saw(ev.Down("i1", GONE), [], 130.0), "died", "signal 9"),
        (lambda j: j.saw(ev.Down("i1", HUNG), [], 130.0), "hung", "xllamacpp hung"),
    ],
)
def test_why_a_model_is_closed(end: Callable[[Journal], None], why: str, text: str) -> None:
    journal = Journal(instance=lambda _: cast(Instance, SimpleNamespace(last_use=110.0)))
    load(journal)
    end(journal)
    closed = told(journal)[-1]
    assert (closed["kind"], closed["why"]) == ("closed", why) and text in closed["text"]
    assert journal.tally.closes == {("smollm2-135m", why): 1}
    assert [e["why"] for e in told(journal, "closing")] == ([why] if why not in ("died", "hung") else [])


def test_a_load_that_nobody_waits_for_and_one_that_fails() -> None:
    journal = Journal()
    journal.saw(ev.Arrived("t-1", SPEC), [ev.Start("i1", SPEC)], 100.0)
    halted(journal, ev.Tick())
    journal.saw(ev.Arrived("t-2", SPEC), [ev.Start("i1", SPEC)], 200.0)
    journal.saw(ev.Down("i1", GONE), [], 201.0)
    assert [(e["why"], e.get("code")) for e in told(journal, "closed")] == [("abandoned", None), ("failed", "engine_died")]
    assert "did not load: xllamacpp died" in told(journal)[-1]["text"]
    assert journal.tally.loads == {("smollm2-135m", "abandoned"): 1, ("smollm2-135m", "failed"): 1}
    assert journal.tally.closes == {}


def test_events_of_an_instance_it_never_saw_start_are_normal(caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal()
    journal.saw(ev.Up("i9", 1), [], 1.0)
    halted(journal, ev.StopModel("i9"))
    assert told(journal) == [] and caplog.records == []


def test_a_failure_of_its_own_costs_nobody_anything(caplog: pytest.LogCaptureFixture) -> None:
    def broken(lease: str) -> str:
        raise OSError("no /proc")

    with caplog.at_level(logging.ERROR, "llm_daemon"):
        Journal(who=broken).saw(ev.Want("c1", 1, SPEC), [ev.Start("i1", SPEC)], 1.0)
    assert "journal failed" in caplog.text


# Readers --------------------------------------------------------------------------------------------------------
async def take(subscription: Subscription, n: int) -> list[tuple[str, Any]]:
    async with asyncio.timeout(5):
        events = [await anext(subscription) for _ in range(n)]
    return [(e.kind, as_dict(e).get("ticket", as_dict(e).get("count"))) for e in events]


async def test_steps_are_told_only_while_somebody_listens() -> None:
    journal = Journal()
    journal.saw(ev.Arrived("t-1", SPEC), [ev.Run("t-1", "i1")], 1.0)
    subscription = journal.subscribe()
    journal.saw(ev.Arrived("t-2", SPEC), [ev.Run("t-2", "i1")], 1.0)
    journal.ticket(record("t-2"))
    assert await take(subscription, 3) == [("arrived", "t-2"), ("running", "t-2"), ("ticket", "t-2")]
    subscription.close()
    subscription.close()
    journal.saw(ev.Arrived("t-3", SPEC), [], 1.0)
    assert told(journal, "arrived", "running", "ticket")[-1]["ticket"] == "t-2"


async def test_a_reader_waits_and_is_woken() -> None:
    journal = Journal()
    subscription = journal.subscribe()
    waiting = asyncio.create_task(take(subscription, 1))
    await asyncio.sleep(0)
    assert not waiting.done()
    journal.ticket(record("t-1"))
    assert await waiting == [("ticket", "t-1")]


async def test_cancelling_a_reader_loses_nothing() -> None:
    journal = Journal()
    subscription = journal.subscribe()
    waiting = asyncio.create_task(take(subscription, 1))
    await asyncio.sleep(0)
    waiting.cancel()
    journal.ticket(record("t-1"))
    await asyncio.wait([waiting])
    assert await take(subscription, 1) == [("ticket", "t-1")]


async def test_a_slow_reader_loses_the_oldest_and_is_told() -> None:
    journal = Journal(size=4)
    slow, quick = journal.subscribe(), journal.subscribe()
    for i in range(10):
        journal.ticket(record(f"t-{i}"))
        assert await take(quick, 1) == [("ticket", f"t-{i}")]
    assert await take(slow, 5) == [("lost", 6), *(("ticket", f"t-{i}") for i in range(6, 10))]
    journal.ticket(record("t-10"))
    assert await take(slow, 1) == await take(quick, 1) == [("ticket", "t-10")]


async def test_a_late_reader_goes_on_where_it_was() -> None:
    journal = Journal(size=4)
    for i in range(6):
        journal.ticket(record(f"t-{i}"))
    ids = [journal.event_id(e) for e in reversed(journal.recent(("ticket",), 10))]
    rest = [("ticket", f"t-{i}") for i in range(2, 6)]
    assert await take(journal.subscribe(ids[1]), 2) == rest[2:]
    assert await take(journal.subscribe(f"{journal.epoch}-1"), 5) == [("lost", 1), *rest]
    assert await take(journal.subscribe("another-5"), 4) == rest  # of a daemon before this one
    assert await take(journal.subscribe("nonsense"), 4) == rest
    ahead = journal.subscribe(f"{journal.epoch}-99")
    journal.ticket(record("t-6"))
    assert await take(ahead, 1) == [("ticket", "t-6")]


# Numbers --------------------------------------------------------------------------------------------------------
def test_tickets_are_counted() -> None:
    journal = Journal()
    journal.ticket(record())
    journal.ticket(record("t-2", end="shed", lane="interactive", first_token_s=None, bytes_out=10))
    journal.ticket(record("t-3", end="refused", instance="", model="anything a client may say", replayed=False))
    rows = journal.tally.rows
    assert {key: row.ends for key, row in rows.items()} == {
        ("smollm2-135m", "regular"): {"served": 1},
        ("smollm2-135m", "interactive"): {"shed": 1},
        ("", "regular"): {"refused": 1},
    }
    regular, shed = rows["smollm2-135m", "regular"], rows["smollm2-135m", "interactive"]
    assert (regular.queue.total, shed.engine.total, shed.queue.total) == (0.5, 0.0, 0.5)
    assert (regular.completion_tokens, regular.prompt_tokens, regular.sent) == (52, 12, 2000)


def test_a_client_cannot_invent_numbers_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "MODELS", 2)
    journal = Journal()
    for i in range(5):
        journal.ticket(record(f"t-{i}", model=f"m{i}"))
    assert {model for model, _ in journal.tally.rows} == {"m0", "m1", "other"}


# Explaining without a file --------------------------------------------------------------------------------------
async def test_the_ring_explains_when_there_is_no_history() -> None:
    journal = Journal()
    load(journal)
    journal.ticket(record("t-1"))
    journal.ticket(record("t-2", end="failed"))
    all_of_it = await explain.explain(journal, None, 20, [])
    assert all_of_it["ticket"]["ticket"] == "t-2" and [r["ticket"] for r in all_of_it["recent"]] == ["t-2", "t-1"]
    assert all_of_it["summary"]["ends"] == {"failed": 1, "served": 1} and all_of_it["summary"]["total"]["p50"] == 2.5
    assert [e["kind"] for e in all_of_it["events"]] == ["ready", "loading"]
    one = await explain.explain(journal, "t-1", 1, [])
    assert one["ticket"]["parts"] == {"queue": 0.5, "load": 1.0, "engine": 0.25, "answer": 0.75}
    live = [{"ticket": "t-9", "state": "running", "total_s": 3.0}]
    assert (await explain.explain(journal, "t-9", 1, live))["ticket"]["state"] == "running"
    with pytest.raises(UsageError, match="no request 't-0' is known") as caught:
        await explain.explain(journal, "t-0", 1, live)
    assert caught.value.status == 404


@pytest.mark.parametrize("value", ["0", "-1", "x", "10001", "1.5"])
def test_limits_are_checked(value: str) -> None:
    with pytest.raises(UsageError, match="limit must be"):
        explain.limited(value)
