"""Many models in little memory: plain cases as tables, and any order of events with a bound on everybody's wait."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llm_daemon.core import events as ev
from llm_daemon.core.events import Command
from llm_daemon.core.instance import RESIDENCE_LEAST, RESIDENCE_MOST, Instance, State
from llm_daemon.core.lanes import Lanes
from llm_daemon.core.machine import Machine
from llm_daemon.core.pace import Pace
from llm_daemon.core.placement import Placement

from .machines import DIED, machine, spec as make_spec, told

spec = functools.cache(make_spec)

STAYS = RESIDENCE_LEAST  # of models that load in no time


def crowd(budget: int = 10, **more: Any) -> Machine:
    return machine(budget=budget, **more)


def weighed(m: Machine, commands: list[Command], need: int, now: float) -> list[Command]:
    """The answer to the Weigh among `commands`."""
    (weigh,) = [c for c in commands if isinstance(c, ev.Weigh)]
    return m.handle(ev.Weighed(weigh.instance, need), now)


def ask(m: Machine, ticket: str, name: str, need: int, now: float, **options: Any) -> list[Command]:
    """A request; what comes of it once its model is weighed, if it has to be."""
    commands = m.handle(ev.Arrived(ticket, spec(name, **options)), now)
    return weighed(m, commands, need, now) if any(isinstance(c, ev.Weigh) for c in commands) else commands


def loaded(m: Machine, ticket: str, name: str, need: int, now: float) -> str:
    """A ready model that served one request; its instance."""
    (start,) = ask(m, ticket, name, need, now)
    assert isinstance(start, ev.Start)
    m.handle(ev.Up(start.instance, 1), now)
    m.handle(ev.Ended(ticket, served=True), now)
    return start.instance


def kinds(commands: list[Command]) -> list[str]:
    return [type(c).__name__ for c in commands]


def test_a_model_is_weighed_before_it_starts_and_two_that_fit_run_side_by_side() -> None:
    m = crowd()
    assert m.handle(ev.Arrived("t", spec("a")), 0) == [ev.Weigh("i1", spec("a"))]
    assert m.instances["i1"].state is State.QUEUED
    assert m.handle(ev.Arrived("u", spec("a")), 0) == []  # asked already
    assert m.handle(ev.Weighed("i1", 4), 0) == [ev.Start("i1", spec("a"))]
    assert ask(m, "v", "b", 6, 0) == [ev.Start("i2", spec("b"))]


def test_the_least_recently_used_idle_one_leaves_and_no_more_than_needed() -> None:
    m = crowd()
    a, b, c = (loaded(m, f"t{name}", name, 3, now) for now, name in enumerate("abc"))
    m.handle(ev.Arrived("again", spec("a")), 5)
    m.handle(ev.Ended("again"), 5)
    halt, waits = ask(m, "t", "d", 4, 6)
    assert halt == ev.Halt(b, False, "d needs its memory")
    assert isinstance(waits, ev.Waits) and "d waits for memory: it needs 0 MB" in waits.text
    assert m.handle(ev.Down(b), 7) == [ev.Start("i4", spec("d"))]
    assert {m.instances[i].state for i in (a, c)} == {State.READY}


def test_a_large_one_that_does_alone_spares_the_small_ones() -> None:
    m = crowd()
    loaded(m, "t1", "small", 2, 0)
    large = loaded(m, "t2", "large", 8, 1)
    assert ask(m, "t", "new", 7, 5)[0] == ev.Halt(large, False, "new needs its memory")
    assert m.instances["i1"].state is State.READY


def test_a_lease_does_not_pin_and_its_holder_notices_nothing_but_time() -> None:
    m = crowd()
    m.handle(ev.Joined("l"), 0)
    assert weighed(m, m.handle(ev.Want("l", 1, spec("a")), 0), 6, 0) == [ev.Start("i1", spec("a"))]
    assert m.handle(ev.Up("i1", 1), 0) == [ev.TellReady("l", 1, "i1")]
    assert ask(m, "t", "b", 6, 5)[0] == ev.Halt("i1", False, "b needs its memory")
    m.handle(ev.Down("i1"), 6)
    m.handle(ev.Up("i2", 1), 7)
    m.handle(ev.Ended("t", served=True), 8)
    assert m.instances["i1"].state is State.ABSENT  # its lease still names it
    assert ask(m, "u", "a", 6, 9)[0] == ev.Halt("i2", False, "a needs its memory")
    assert m.handle(ev.Down("i2"), 10) == [ev.Start("i1", spec("a"))]
    assert m.handle(ev.Up("i1", 1), 11) == [ev.Run("u", "i1", loaded_for=2)]


def test_loading_and_busy_ones_stay_and_whoever_waits_is_told_for_whom() -> None:
    m = crowd()
    loaded(m, "t1", "a", 5, 0)
    m.handle(ev.Arrived("busy", spec("a")), 1)
    ask(m, "t2", "b", 5, 1)  # is loading
    m.handle(ev.Joined("l"), 2)
    told, waits = weighed(m, m.handle(ev.Want("l", 7, spec("c")), 2), 5, 2)
    assert isinstance(told, ev.TellProgress) and (told.lease, told.request, told.info["phase"]) == ("l", 7, "wait")
    assert isinstance(waits, ev.Waits) and waits.text == told.info["message"]
    assert "a (in use, 0 MB), b (loading, 0 MB)" in waits.text
    assert m.handle(ev.Tick(), 3) == []
    assert m.handle(ev.Up("i2", 1), 4) == [ev.Run("t2", "i2", loaded_for=3)]
    assert m.handle(ev.Ended("busy"), 5) == [ev.Halt("i1", False, "c needs its memory")]


def test_one_that_became_ready_a_moment_ago_stays_for_its_first_requests() -> None:
    m = crowd()
    m.handle(ev.Joined("l"), 0)
    weighed(m, m.handle(ev.Want("l", 1, spec("a")), 0), 6, 0)
    assert ask(m, "t", "b", 6, 1)[0] == ev.Waits("i2", m.placement.why(m.instances["i2"], m.instances.values()))
    assert m.handle(ev.Up("i1", 1), 2) == [ev.TellReady("l", 1, "i1")]  # took two seconds to load
    assert m.wake_at == 2 + 2
    assert m.handle(ev.Tick(), 3.9) == []
    assert m.handle(ev.Tick(), 4) == [ev.Halt("i1", False, "b needs its memory")]


def test_one_that_serves_without_a_pause_is_drained_for_another_in_the_end() -> None:
    m = crowd(max_overtake=10)
    loaded(m, "t", "a", 6, 0)
    m.handle(ev.Arrived("a0", spec("a")), 1)
    ask(m, "b", "b", 6, 2)
    for n in range(9):  # served before the swap: batched by model
        assert m.handle(ev.Arrived(f"a{n + 1}", spec("a")), 3 + n) == []
        assert m.handle(ev.Ended(f"a{n}", served=True), 3 + n) == [ev.Run(f"a{n + 1}", "i1")]
    assert m.wake_at == 12
    assert m.handle(ev.Arrived("late", spec("a")), 11.9) == []
    assert m.handle(ev.Tick(), 12) == []
    assert m.instances["i1"].state is State.DRAINING
    assert m.handle(ev.Ended("a9", served=True), 13) == [ev.Halt("i1", False, "b needs its memory")]
    down = m.handle(ev.Down("i1"), 14)
    assert [c for c in down if not isinstance(c, ev.Waits)] == [ev.Weigh("i1", spec("a")), ev.Start("i2", spec("b"))]
    assert kinds(m.handle(ev.Weighed("i1", 6), 14)) == ["Waits"]
    assert m.handle(ev.Up("i2", 1), 15) == [ev.Run("b", "i2", loaded_for=13)]
    assert m.handle(ev.Ended("b", served=True), 15.5) == []
    assert m.handle(ev.Tick(), 16) == [ev.Halt("i2", False, "a needs its memory")]
    m.handle(ev.Down("i2"), 17)
    (run,) = m.handle(ev.Up("i1", 1), 18)
    assert isinstance(run, ev.Run) and run.ticket == "late" and run.loaded_for == pytest.approx(6)


def test_a_small_one_may_go_first_but_not_into_what_is_kept_for_another() -> None:
    m = crowd(max_overtake=10)
    loaded(m, "t", "a", 6, 0)
    m.handle(ev.Arrived("busy", spec("a")), 1)
    ask(m, "b", "b", 8, 2)  # has to wait for `a`
    assert ask(m, "c", "c", 2, 3) == [ev.Start("i3", spec("c"))]
    m.handle(ev.Up("i3", 1), 3)
    m.handle(ev.Ended("c"), 3)
    assert kinds(ask(m, "d", "d", 3, 4)) == ["Halt", "Waits"]  # `c` leaves, unused for half a second
    m.handle(ev.Ended("busy"), 5)
    assert [(it.spec.model, it.state) for it in m.instances.values()] == [
        ("a", State.STOPPING), ("b", State.QUEUED), ("c", State.STOPPING), ("d", State.QUEUED),
    ]  # fmt: skip
    assert m.handle(ev.Down("i3"), 6) == []  # 4 are free, and 8 of all are kept for `b`
    assert m.handle(ev.Down("i1"), 6) == [ev.Start("i2", spec("b"))]


def test_nobody_passes_one_that_has_waited_for_long() -> None:
    m = crowd(max_overtake=3)
    loaded(m, "t", "a", 6, 0)
    m.handle(ev.Arrived("busy", spec("a")), 1)
    ask(m, "b", "b", 8, 2)
    m.handle(ev.Tick(), 5)
    assert m.instances["i1"].state is State.DRAINING
    assert kinds(ask(m, "c", "c", 3, 5)) == ["Waits"]  # it would fit beside `a`, and would be in the way
    m.handle(ev.Ended("busy"), 6)
    assert m.handle(ev.Down("i1"), 7) == [ev.Start("i2", spec("b"))]


def test_what_can_never_fit_is_refused_at_once_with_numbers() -> None:
    m = crowd(budget=6_000_000_000)
    m.handle(ev.Joined("l"), 0)
    weigh = m.handle(ev.Want("l", 1, spec("a")), 0)
    m.handle(ev.Arrived("t", spec("a")), 0)
    one, other = weighed(m, weigh, 43_100_000_000, 0)
    assert told(other) == (ev.Refuse, "t", "too_large", 400)
    assert isinstance(one, ev.TellError) and one.error == other.error  # type: ignore[union-attr]
    assert one.error["message"] == "a needs about 43.1 GB of memory, all models together may have 6.0 GB"
    assert "memory_budget and `llm-daemon stop`" in one.error["hint"] and "\n" not in one.error["hint"]
    assert m.instances["i1"].state is State.ABSENT
    m.handle(ev.Left("l"), 1)
    assert m.instances == {} and not m.placement.queue


def test_a_size_that_is_known_after_the_download_may_send_it_back_to_the_queue() -> None:
    m = crowd()
    loaded(m, "t", "a", 6, 0)
    m.handle(ev.Arrived("busy", spec("a")), 1)
    assert ask(m, "b", "b", 0, 1) == [ev.Start("i2", spec("b"))]  # nothing is known of it
    (halt,) = m.handle(ev.Weighed("i2", 8), 5)
    assert isinstance(halt, ev.Halt) and halt.instance == "i2" and halt.leaves_for
    assert kinds(weighed(m, m.handle(ev.Down("i2"), 5), 8, 5)) == ["Waits"]
    assert m.handle(ev.Ended("busy"), 6) == [ev.Halt("i1", False, "b needs its memory")]
    assert m.handle(ev.Down("i1"), 7) == [ev.Start("i2", spec("b"))]
    (refuse, halt) = m.handle(ev.Weighed("i2", 11), 8)
    assert told(refuse) == (ev.Refuse, "b", "too_large", 400)
    assert halt == ev.Halt("i2", False)


def test_one_that_grows_makes_idle_ones_leave_and_may_have_all_there_is() -> None:
    m = crowd()
    a, b = loaded(m, "ta", "a", 4, 0), loaded(m, "tb", "b", 5, 1)
    m.handle(ev.Arrived("busy", spec("b")), 5)
    assert m.handle(ev.Weighed(b, 6), 5) == []
    assert m.handle(ev.Weighed(b, 5), 5) == []  # what it took once, it may take again
    assert m.handle(ev.Weighed(b, 50), 6) == [ev.Halt(a, False, "more memory is used than memory_budget allows")]
    assert m.instances[b].need == 10
    m.handle(ev.Down(a), 7)
    m.handle(ev.Ended("busy"), 8)
    assert m.handle(ev.Tick(), 20) == []
    assert m.instances[b].state is State.READY


def test_a_crowd_of_those_that_just_came_waits_for_its_moment() -> None:
    m = crowd()
    a, b = loaded(m, "ta", "a", 5, 0), loaded(m, "tb", "b", 5, 1)
    assert m.handle(ev.Weighed(a, 6), 1.1) == [ev.Halt(a, False, "more memory is used than memory_budget allows")]
    m.handle(ev.Down(a), 1.2)
    c = loaded(m, "tc", "c", 5, 2)
    assert m.handle(ev.Weighed(c, 6), 2) == [ev.Halt(b, False, "more memory is used than memory_budget allows")]
    m.handle(ev.Down(b), 2)
    d = loaded(m, "td", "d", 4, 3)
    m.handle(ev.Arrived("busy", spec("c")), 3)
    assert m.handle(ev.Weighed(c, 7), 3.1) == []
    assert m.wake_at == 3 + STAYS
    assert m.handle(ev.Tick(), 3 + STAYS) == [ev.Halt(d, False, "more memory is used than memory_budget allows")]


def test_whoever_waits_and_leaves_costs_nobody_a_place() -> None:
    m = crowd()
    loaded(m, "t", "a", 6, 0)
    m.handle(ev.Arrived("busy", spec("a")), 1)
    ask(m, "b", "b", 6, 2)
    assert m.handle(ev.Ended("b"), 3) == []  # its client hung up
    assert set(m.instances) == {"i1"} and not m.placement.queue
    m.handle(ev.Joined("l"), 3)
    weighed(m, m.handle(ev.Want("l", 1, spec("b")), 3), 6, 3)
    (error,) = m.handle(ev.StopModel("i3"), 4)
    assert isinstance(error, ev.TellError) and error.error["code"] == "stopped"
    assert m.instances["i3"].state is State.ABSENT
    m.handle(ev.Ended("busy"), 5)
    assert m.instances["i1"].state is State.READY


def test_a_late_answer_about_one_that_is_gone_is_normal() -> None:
    m = crowd()
    m.handle(ev.Arrived("t", spec("a")), 0)
    m.handle(ev.Ended("t"), 0)
    assert m.handle(ev.Weighed("i1", 3), 1) == []
    assert m.instances == {}


def test_who_waits_for_a_smaller_context_is_served_by_the_larger_one() -> None:
    m = crowd()
    m.handle(ev.Joined("l"), 0)
    weighed(m, m.handle(ev.Want("l", 1, spec("a", context=8192)), 0), 7, 0)
    m.handle(ev.Joined("k"), 1)
    waits = weighed(m, m.handle(ev.Want("k", 2, spec("a")), 1), 5, 1)  # the larger one may fail: it gets a place of its own
    assert kinds(waits) == ["TellProgress", "Waits"]
    ask(m, "t", "a", 5, 2)
    ready = m.handle(ev.Up("i1", 1), 4)
    assert ready == [ev.TellReady("l", 1, "i1"), ev.TellReady("k", 2, "i1"), ev.Run("t", "i1", loaded_for=2)]
    assert set(m.instances) == {"i1"} and m.instances["i1"].leases == {"l", "k"} and not m.placement.queue
    m.handle(ev.Left("l"), 5)
    assert m.handle(ev.Ended("t"), 6) == []
    assert m.instances["i1"].leases == {"k"}


def test_what_would_happen_is_foreseen_and_changes_nothing() -> None:
    m = crowd()
    loaded(m, "ta", "a", 6, 0)

    def would(need: int, now: float) -> tuple[list[str], list[str]]:
        it = Instance("?", spec("new"), Lanes(1, 1.0), Pace(), now, now, State.QUEUED, need=need)
        moves = m.placement.foresee(it, list(m.instances.values()), now)
        return [it.id for it in moves.start], [gone.spec.model for gone, _ in moves.leave]

    assert would(4, 1) == (["?"], [])
    assert would(5, 1) == ([], ["a"])
    assert would(5, STAYS / 2) == ([], [])  # has to wait
    assert m.instances["i1"].state is State.READY and not m.placement.queue


def test_without_a_budget_nothing_is_weighed() -> None:
    m = machine()
    assert kinds(m.handle(ev.Arrived("t", spec("a")), 0)) == ["Start"]
    assert m.handle(ev.Weighed("i1", 10**15), 1) == []
    assert Placement(None, 1.0).moves(list(m.instances.values()), 1).leave == []


NEEDS = {"a": 3, "b": 4, "d": 6, "e": 10, "f": 12, "g": 0}  # g: unknown before its download
BUDGET, PATIENCE = 10, 3.0
FETCHED = 5  # bytes that `g` turns out to need
STEP = 1.0


class Crowd(RuleBasedStateMachine):
    """Any order of events; the shell is played faithfully.

    The sum of what was promised never exceeds the budget, nobody who loads or serves is evicted, each ticket has one end,
    and whoever waits for memory gets it within a bound, however many newcomers there are for others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.m = machine(ttl=500, leased_ttl=800, queue_limit=100, max_overtake=PATIENCE, budget=BUDGET)
        self.now = 0.0
        self.count = 0
        self.weighing: list[str] = []
        self.leases: set[str] = set()
        self.waiting: set[tuple[str, int]] = set()
        self.open: dict[str, str] = {}  # ticket -> waiting | running | aborting
        self.ended: set[str] = set()
        self.processes: dict[str, str] = {}  # instance -> starting | ready | stopping
        self.grew = False

    def name(self, instance: str) -> str:
        return self.m.instances[instance].spec.wish.model

    def send(self, event: ev.Event) -> None:
        for command in self.m.handle(event, self.now):
            match command:
                case ev.Weigh(instance):
                    self.weighing.append(instance)
                case ev.Start(instance):
                    assert instance not in self.processes
                    self.processes[instance] = "starting"
                    assert self.grew or self.promised() <= BUDGET
                case ev.Halt(instance, _, leaves_for):
                    if leaves_for and self.processes[instance] == "starting":
                        assert event == ev.Weighed(instance, FETCHED), "evicted while it was loading"
                    elif leaves_for:
                        busy = [t for t, s in self.open.items() if s != "waiting" and self.m.tickets[t].instance == instance]
                        assert not busy, "evicted while it was in use"
                    self.processes[instance] = "stopping"
                case ev.Run(ticket, instance):
                    assert self.open[ticket] == "waiting" and self.processes[instance] == "ready"
                    self.open[ticket] = "running"
                case ev.Refuse(ticket, error):
                    assert self.open.pop(ticket) == "waiting" and ticket not in self.ended
                    self.ended.add(ticket)
                    assert error["code"] in ("too_large", "stopped", "engine_died")
                case ev.TellReady(lease, request) | ev.TellError(lease, request):
                    self.waiting.remove((lease, request))
                case ev.TellProgress(lease, request):
                    assert (lease, request) in self.waiting

    def promised(self) -> int:
        return sum(self.m.instances[i].need or 0 for i in self.processes)

    @rule(step=st.floats(0, 4))
    def time_passes(self, step: float) -> None:
        self.now += step
        if self.m.wake_at is not None and self.m.wake_at <= self.now:
            self.send(ev.Tick())

    @rule(name=st.sampled_from(sorted(NEEDS)), context=st.sampled_from([None, None, 9000]))
    def arrive(self, name: str, context: int | None = None) -> None:
        self.count += 1
        self.open[f"t{self.count}"] = "waiting"
        self.send(ev.Arrived(f"t{self.count}", spec(name, context=context)))

    @rule(name=st.sampled_from(sorted(NEEDS)))
    def want(self, name: str) -> None:
        self.count += 1
        lease = f"c{self.count}"
        self.leases.add(lease)
        self.send(ev.Joined(lease))
        self.waiting.add((lease, self.count))
        self.send(ev.Want(lease, self.count, spec(name)))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(sorted(self.leases)))
        self.leases.remove(lease)
        self.waiting = {w for w in self.waiting if w[0] != lease}
        self.send(ev.Left(lease))

    @precondition(lambda self: self.weighing)
    @rule(data=st.data())
    def weigh(self, data: st.DataObject) -> None:
        self.answer(data.draw(st.sampled_from(sorted(set(self.weighing)))))

    def answer(self, instance: str) -> None:
        self.weighing.remove(instance)
        if it := self.m.instances.get(instance):
            need = NEEDS[self.name(instance)]
            self.send(ev.Weighed(instance, need + (2 if need and (it.spec.wish.context or 0) > 4096 else 0)))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), served=st.booleans())
    def end_ticket(self, data: st.DataObject, served: bool) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.open))), served)

    def end(self, ticket: str, served: bool = True) -> None:
        ran = self.open.pop(ticket) == "running"
        self.ended.add(ticket)
        self.send(ev.Ended(ticket, served and ran))

    @precondition(lambda self: self.processes)
    @rule(data=st.data(), good=st.booleans(), slots=st.integers(1, 2))
    def process_moves(self, data: st.DataObject, good: bool, slots: int) -> None:
        self.move(data.draw(st.sampled_from(sorted(self.processes))), good, slots)

    def move(self, instance: str, good: bool, slots: int = 1) -> None:
        state = self.processes[instance]
        if state == "starting" and good:
            if self.name(instance) == "g" and self.m.instances[instance].need == 0:
                self.send(ev.Weighed(instance, FETCHED))
                if self.processes[instance] == "stopping":
                    return
            self.processes[instance] = "ready"
            self.send(ev.Up(instance, slots))
        elif state == "stopping" or not good:
            del self.processes[instance]
            self.send(ev.Down(instance, None if state == "stopping" else DIED))

    @precondition(lambda self: "ready" in self.processes.values())
    @rule(data=st.data(), need=st.integers(1, 20))
    def grow(self, data: st.DataObject, need: int) -> None:
        self.grew = True
        self.send(ev.Weighed(data.draw(st.sampled_from(sorted(i for i, s in self.processes.items() if s == "ready"))), need))

    @precondition(lambda self: self.m.instances)
    @rule(data=st.data(), force=st.booleans())
    def stop(self, data: st.DataObject, force: bool) -> None:
        self.send(ev.StopModel(data.draw(st.sampled_from(sorted(self.m.instances))), force))

    @invariant()
    def every_ticket_is_in_one_place(self) -> None:
        assert self.open == {name: ticket.stage for name, ticket in self.m.tickets.items()}
        placed = [(t, it.id) for it in self.m.instances.values() for t in (*it.lanes.line(self.now), *it.lanes.running)]
        assert sorted(placed) == sorted((t, ticket.instance) for t, ticket in self.m.tickets.items())

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        for it in self.m.instances.values():
            assert (it.state is State.QUEUED) == (it.id in self.m.placement.queue)
            assert it.has_process == (it.id in self.processes)
            if it.waiters or it.lanes.waiting:
                assert it.has_process or it.state is State.QUEUED
                assert it.state is not State.QUEUED or it.need is not None or it.id in self.weighing

    @invariant()
    def a_queue_moves_by_itself_or_by_time(self) -> None:
        at_rest = set(self.processes.values()) <= {"ready"} and "running" not in self.open.values()
        if at_rest and any(it.need is not None for it in self.m.placement.queue.values()):
            assert self.m.wake_at is not None

    def teardown(self) -> None:
        """Newcomers for whatever is ready, without end: those that wait now get their turn within the bound.  Then all ends."""
        m = self.m
        waiting = {it.id: it.starts for it in m.placement.queue.values()}
        until = self.now + (len(waiting) + 1) * (PATIENCE + RESIDENCE_MOST + 4 * STEP)
        while waiting and self.now < until:
            for it in list(m.instances.values()):
                if it.state is State.READY and it.lanes.waiting < 2:
                    self.newcomer(it)
            self.step(every=2)
            waiting = {i: n for i, n in waiting.items() if i in m.placement.queue and m.instances[i].starts == n}
        assert not waiting, f"starve: {waiting}"
        for _ in range(1000):
            if not self.open and not self.waiting:
                break
            self.step(every=1)
        assert not self.open and not self.waiting, "somebody waits for ever"
        assert self.grew or self.promised() <= BUDGET

    def newcomer(self, it: Instance) -> None:
        self.count += 1
        self.open[f"t{self.count}"] = "waiting"
        self.send(ev.Arrived(f"t{self.count}", spec(self.name(it.id))))

    def step(self, every: int) -> None:
        """Some time in which the shell does all it should; of what runs, each `every`th ends."""
        for instance in list(self.weighing):
            self.answer(instance)
        for instance in list(self.processes):
            if instance in self.processes:
                self.move(instance, True)
        for ticket in [t for t, stage in self.open.items() if stage == "running"][::every]:
            self.end(ticket)
        self.now += STEP
        self.send(ev.Tick())


Crowd.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestCrowd = Crowd.TestCase


def test_a_model_of_unknown_weight_starts_once_where_more_is_used_than_there_is() -> None:
    m = crowd()
    a, b = loaded(m, "ta", "a", 5, 0), loaded(m, "tb", "b", 5, 0)
    for ticket, name in (("ua", "a"), ("ub", "b")):
        m.handle(ev.Arrived(ticket, spec(name)), 1)
    m.handle(ev.Weighed(a, 8), 1)
    (start,) = ask(m, "t", "unknown", 0, 2)
    assert isinstance(start, ev.Start)
    assert m.handle(ev.Weighed(start.instance, 0), 2) == []  # looked at anew once its file is here
    assert m.instances[start.instance].state is State.STARTING
    assert b in m.instances


def test_a_download_takes_no_memory() -> None:
    m = crowd()
    (start,) = ask(m, "t", "fetched", 9, 0)
    assert isinstance(start, ev.Start)
    m.handle(ev.Progressed(start.instance, {"phase": "download"}), 1)
    assert kinds(ask(m, "u", "here", 8, 2)) == ["Start"]
    m.handle(ev.Ended("u"), 3)


def test_a_wish_that_is_taken_over_brings_its_keep_alive() -> None:
    m = crowd()
    loaded(m, "busy", "a", 6, 0)
    m.handle(ev.Arrived("busy", spec("a")), 1)
    m.handle(ev.Joined("l"), 2)
    weighed(m, m.handle(ev.Want("l", 1, spec("b"), keep_alive=0.0), 2), 6, 2)
    (waiting,) = m.placement.queue.values()
    other = Instance("o", spec("b"), Lanes(1, 1.0), Pace(), 2, 2, State.READY)
    m.instances["o"] = other
    m._take_over(other, 3)
    assert other.keep_alive == waiting.keep_alive == 0.0
