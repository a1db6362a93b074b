"""Tickets in the core: lanes, supersede keys, deadlines, aborts; any order of them is in test_machine.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from llm_daemon.core import events as ev
from llm_daemon.core.instance import ABANDON_AFTER, State
from llm_daemon.core.machine import PACES, Machine

from .machines import CANCELLED, DIED, machine, running, spec, told

SUPERSEDED, EXPIRED = "superseded", "expired"


def test_the_newest_of_the_interactive_lane_goes_first_until_another_is_late() -> None:
    m = machine(max_overtake=10)
    running(m, slots=1)
    m.handle(ev.Arrived("t", spec()), 0)
    for now, (ticket, lane) in enumerate([("r", "regular"), ("a", "interactive"), ("b", "interactive")], start=1):
        assert m.handle(ev.Arrived(ticket, spec(), lane), now) == []
    assert [m.position(ticket, 4) for ticket in ("b", "a", "r", "t", "?")] == [0, 1, 2, None, None]
    assert m.handle(ev.Ended("t"), 5) == [ev.Run("b", "i1")]
    assert [m.position(ticket, 11) for ticket in ("r", "a")] == [0, 1]
    assert m.handle(ev.Ended("b"), 11) == [ev.Run("r", "i1")]


def test_a_full_interactive_lane_sheds_its_oldest_and_the_other_lane_has_its_own_bound() -> None:
    m = machine(queue_limit=1)
    running(m, slots=1)
    m.handle(ev.Arrived("t", spec()), 1)
    assert m.handle(ev.Arrived("r", spec()), 1) == []
    assert m.handle(ev.Arrived("a", spec(), "interactive"), 2) == []
    (shed,) = m.handle(ev.Arrived("b", spec(), "interactive"), 3)
    assert told(shed) == (ev.Refuse, "a", "queue_full", 503)
    assert shed.error["data"]["retry_after"] == 1  # type: ignore[union-attr]
    assert set(m.tickets) == {"t", "r", "b"}


def test_a_newer_ticket_of_the_same_key_ends_the_older_waiting_or_running() -> None:
    m = machine()
    running(m, slots=1)
    m.handle(ev.Joined("b"), 0)
    m.handle(ev.Want("b", 1, spec("n")), 0)
    m.handle(ev.Up("i2", 1), 0)
    assert m.handle(ev.Arrived("t1", spec(), supersede="k"), 1) == [ev.Run("t1", "i1")]
    (abort,) = m.handle(ev.Arrived("t2", spec(), supersede="k"), 2)  # waits: the slot is not free yet
    assert told(abort) == (ev.Abort, "t1", SUPERSEDED, 409)
    refuse, run = m.handle(ev.Arrived("t3", spec("n"), supersede="k"), 3)  # of another model, all the same
    assert told(refuse) == (ev.Refuse, "t2", SUPERSEDED, 409)
    assert run == ev.Run("t3", "i2")
    assert m.handle(ev.Arrived("t4", spec(), supersede="other"), 3) == []
    assert m.handle(ev.Ended("t1"), 4) == [ev.Run("t4", "i1")]
    m.handle(ev.Ended("t3"), 4)
    assert m.handle(ev.Arrived("t5", spec("n"), supersede="k"), 5) == [ev.Run("t5", "i2")]
    m.handle(ev.Ended("t4"), 5)
    m.handle(ev.Ended("t5"), 5)
    assert m.keys == {}


def test_the_older_ends_even_if_the_newer_is_refused() -> None:
    m = machine()
    running(m, slots=1)
    m.handle(ev.Arrived("t1", spec(), supersede="k"), 1)
    abort, refuse = m.handle(ev.Arrived("t2", spec(), supersede="k", deadline=1.5), 2)
    assert told(abort)[:3] == (ev.Abort, "t1", SUPERSEDED)
    assert told(refuse)[:3] == (ev.Refuse, "t2", EXPIRED)


def test_an_aborting_ticket_keeps_its_slot_and_its_model_and_is_aborted_once() -> None:
    m = machine(ttl=5)
    running(m, slots=1)
    m.handle(ev.Left("a"), 0)
    m.handle(ev.Arrived("t", spec(), supersede="k"), 1)
    m.handle(ev.Arrived("u", spec()), 1)
    assert m.handle(ev.Aborting("t"), 2) == []
    assert m.handle(ev.Aborting("t"), 2) == []
    assert m.handle(ev.Cancel("t", CANCELLED), 2) == []
    assert m.handle(ev.Arrived("v", spec(), supersede="k"), 2) == []
    assert m.instances["i1"].lanes.aborting == 1
    assert m.handle(ev.StopModel("i1"), 3) == []
    assert m.instances["i1"].state is State.DRAINING
    assert m.wake_at is None
    assert m.handle(ev.Ended("t"), 4) == [ev.Halt("i1", False)]


def test_cancelling_by_id_refuses_who_waits_and_aborts_who_runs() -> None:
    m = machine()
    running(m, slots=1)
    m.handle(ev.Arrived("t", spec()), 1)
    m.handle(ev.Arrived("u", spec()), 1)
    assert m.handle(ev.Cancel("u", CANCELLED), 2) == [ev.Refuse("u", CANCELLED)]
    assert m.handle(ev.Cancel("t", CANCELLED), 2) == [ev.Abort("t", CANCELLED)]
    assert m.handle(ev.Cancel("t", CANCELLED), 2) == []
    assert m.handle(ev.Cancel("?", CANCELLED), 2) == []
    m.handle(ev.Ended("t"), 3)
    assert m.tickets == {}


def test_a_client_that_is_gone_before_its_turn_leaves_no_ticket_behind() -> None:
    m = machine()
    m.handle(ev.Arrived("t", spec()), 1)
    assert m.handle(ev.Aborting("t"), 2) == []
    assert m.handle(ev.Ended("t"), 2) == []
    assert m.wake_at == 2 + ABANDON_AFTER
    assert m.tickets == {}


def test_a_ticket_that_is_not_started_by_its_deadline_is_refused_then() -> None:
    m = machine()
    running(m, slots=1)
    m.handle(ev.Arrived("t", spec()), 1)
    m.handle(ev.Arrived("u", spec(), deadline=5), 1)
    m.handle(ev.Arrived("v", spec(), deadline=4), 1)
    assert m.wake_at == 4
    assert m.handle(ev.Tick(), 3.9) == []
    assert [told(c) for c in m.handle(ev.Tick(), 4)] == [(ev.Refuse, "v", EXPIRED, 504)]
    assert m.wake_at == 5
    assert [told(c) for c in m.handle(ev.Ended("t"), 6)] == [(ev.Refuse, "u", EXPIRED, 504)]  # before the timer
    assert m.tickets == {}


def test_a_ticket_that_ends_in_the_moment_of_its_deadline_ends_once() -> None:
    m = machine()
    running(m, slots=1)
    m.handle(ev.Arrived("t", spec()), 1)
    m.handle(ev.Arrived("u", spec(), deadline=5), 1)
    assert m.handle(ev.Ended("u"), 6) == []
    m.handle(ev.Arrived("v", spec(), deadline=8), 6)
    assert m.handle(ev.Aborting("v"), 9) == []
    assert set(m.tickets) == {"t"}


def test_a_started_ticket_has_no_deadline() -> None:
    m = machine()
    running(m, slots=1)
    assert m.handle(ev.Arrived("t", spec(), deadline=1), 1) == [ev.Run("t", "i1")]
    assert m.handle(ev.Tick(), 2) == []
    assert [told(c) for c in m.handle(ev.Arrived("u", spec(), deadline=1), 2)] == [(ev.Refuse, "u", EXPIRED, 504)]


def test_a_deadline_that_cannot_be_met_is_refused_at_once_when_the_pace_is_known() -> None:
    m = machine()
    running(m, slots=1)
    m.handle(ev.Arrived("t", spec()), 1)
    assert m.handle(ev.Arrived("u", spec(), deadline=1.1), 1) == []  # nothing is known yet
    m.handle(ev.Ended("u"), 1)
    m.handle(ev.Ended("t", served=True), 5)
    m.handle(ev.Arrived("t", spec()), 10)
    m.handle(ev.Arrived("u", spec()), 10)
    (refused,) = m.handle(ev.Arrived("v", spec(), deadline=16), 11)
    assert told(refused) == (ev.Refuse, "v", EXPIRED, 504)
    assert "would wait about 7.0 s" in refused.error["message"]  # type: ignore[union-attr]
    assert m.handle(ev.Arrived("w", spec(), "interactive", deadline=16), 11) == []  # goes before `u`
    assert m.handle(ev.Arrived("x", spec(), deadline=23), 11) == []
    assert set(m.tickets) == {"t", "u", "w", "x"}


def loaded_once(m: Machine, seconds: float) -> None:
    """A model that took so long to load, and is gone."""
    m.handle(ev.Arrived("once", spec()), 0)
    m.handle(ev.Up("i1", 1), seconds)
    m.handle(ev.StopModel("i1", force=True), seconds)
    m.handle(ev.Ended("once"), seconds)
    m.handle(ev.Down("i1"), seconds)
    assert m.instances == {}


def test_the_time_a_load_takes_counts() -> None:
    m = machine()
    loaded_once(m, 20)
    (refused,) = m.handle(ev.Arrived("t", spec(), deadline=115), 100)
    assert told(refused) == (ev.Refuse, "t", EXPIRED, 504)
    assert m.instances == {}
    (start,) = m.handle(ev.Arrived("t", spec(), deadline=125), 100)
    assert isinstance(start, ev.Start)
    (refused,) = m.handle(ev.Arrived("u", spec(), deadline=112), 102)
    assert "would wait about 16.0 s" in refused.error["message"]  # type: ignore[union-attr]  # 18, once doubted, less 2
    assert m.handle(ev.Arrived("v", spec(), deadline=117), 110) == []


def test_slots_that_are_being_let_go_and_those_of_a_dead_engine_are_not_waited_for() -> None:
    m = machine()
    running(m, slots=1)
    m.handle(ev.Arrived("t", spec()), 1)
    m.handle(ev.Ended("t", served=True), 9)
    it = m.instances["i1"]
    assert it.pace.load == 0
    m.handle(ev.Arrived("t", spec()), 10)
    assert it.wait("regular", 11) == 7
    refused = m.handle(ev.Arrived("u", spec(), deadline=12), 11)
    assert [told(c)[2] for c in refused] == [EXPIRED]
    m.handle(ev.Aborting("t"), 11)
    assert it.wait("regular", 11) == 0
    m.handle(ev.Ended("t"), 11)
    m.handle(ev.Arrived("v", spec()), 11)
    m.handle(ev.Down("i1", DIED), 12)
    m.handle(ev.Arrived("w", spec(), "interactive"), 12)
    assert it.state is State.STARTING
    assert list(it.lanes.running) == ["v"]  # its relay has not told of its end yet
    assert (it.wait("interactive", 12), it.wait("regular", 12)) == (0, 8)


def test_only_a_load_that_matters_is_doubted() -> None:
    m = machine()
    m.handle(ev.Arrived("t", spec()), 0)
    m.handle(ev.Up("i1", 1), 20)
    m.handle(ev.Ended("t", served=True), 30)
    m.handle(ev.Arrived("t", spec()), 30)
    assert [told(c)[2] for c in m.handle(ev.Arrived("u", spec(), deadline=31), 30)] == [EXPIRED]
    assert m.instances["i1"].pace.load == 20


def test_a_load_time_that_only_refuses_is_tried_again_some_day() -> None:
    m = machine()
    loaded_once(m, 20)
    refused = 0
    while not isinstance(m.handle(ev.Arrived("t", spec(), deadline=110), 100)[0], ev.Start):
        refused += 1
    assert 3 < refused < 10


def test_a_download_is_no_load_time() -> None:
    m = machine()
    m.handle(ev.Arrived("t", spec()), 0)
    m.handle(ev.Progressed("i1", {"phase": "download"}), 1)
    m.handle(ev.Up("i1", 1), 600)
    assert m.instances["i1"].pace.load is None
    m.handle(ev.Down("i1", DIED), 700)
    m.handle(ev.Ended("t"), 700)
    m.handle(ev.Arrived("u", spec()), 700)
    m.handle(ev.Up("i1", 1), 703)
    assert m.instances["i1"].pace.load == 3


def test_what_a_ticket_waited_for_the_model_is_told_apart_from_the_queue() -> None:
    m = machine()
    m.handle(ev.Arrived("t1", spec()), 0)
    m.handle(ev.Arrived("t2", spec()), 1)
    assert m.handle(ev.Up("i1", 1), 3) == [ev.Run("t1", "i1", loaded_for=3)]
    m.handle(ev.Arrived("t3", spec()), 4)
    assert m.handle(ev.Ended("t1"), 5) == [ev.Run("t2", "i1", loaded_for=2)]
    m.handle(ev.Down("i1", DIED), 6)
    m.handle(ev.Ended("t2"), 6)
    m.handle(ev.Up("i1", 1), 9)
    m.handle(ev.Arrived("t4", spec()), 9)
    assert m.handle(ev.Ended("t3"), 10) == [ev.Run("t4", "i1")]


def test_paces_of_models_nobody_uses_are_forgotten_in_the_end() -> None:
    m = machine()
    for i in range(3 * PACES):
        m.handle(ev.Arrived(f"t{i}", spec(f"m{i}"), deadline=0), 1)
    assert len(m.paces) == PACES


def lines_run(act: Callable[[], object]) -> int:
    """How many lines of Python `act` takes: a measure of work that no busy machine disturbs."""
    count, before = 0, sys.gettrace()

    def trace(frame: object, event: str, arg: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)
    return count


def test_no_event_looks_at_everybody_who_waits() -> None:
    def work(waiting: int) -> int:
        m = machine(queue_limit=10_000)
        running(m, slots=1)
        for i in range(2 * waiting):
            lane = ("regular", "interactive")[i % 2]
            m.handle(ev.Arrived(f"t{i}", spec(), lane, f"k{i}", deadline=1e6 + i), i / waiting)
        m.handle(ev.Ended("t0"), 50)  # everybody comes of age here, once for all

        def events() -> None:
            for i in range(20):
                m.handle(ev.Arrived(f"u{i}", spec(), "interactive", f"k{3 + i}", deadline=1e6), 50 + i)
                m.handle(ev.Cancel(f"t{waiting + i}", CANCELLED), 50 + i)
                m.handle(ev.Ended(next(iter(m.instances["i1"].lanes.running)), served=True), 50 + i)
                m.handle(ev.Tick(), 50 + i)
                assert m.wake_at is not None

        return lines_run(events)

    assert work(2000) < 1.5 * work(50)
