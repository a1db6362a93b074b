"""Lanes, deadlines and pace: examples, and each against a naive model that looks at everybody every time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llm_daemon.core.lanes import Deadlines, Lane, Lanes, Stage, Ticket
from llm_daemon.core.pace import DOUBT, Pace

LANES = ("interactive", "regular")


def lanes(slots: int = 1, bound: int = 10, max_overtake: float = 10.0) -> Lanes:
    return Lanes(bound, max_overtake, slots)


def come(it: Lanes, names: str, now: float = 0.0) -> None:
    """Tickets of these one-letter names, a second apart; capitals are interactive."""
    for i, name in enumerate(names):
        it.submit(Ticket(name, "i1", "interactive" if name.isupper() else "regular", now + i))


def ran(it: Lanes, now: float, count: int = 99) -> str:
    """Who runs from `now` on, one after the other, each in the slot of the one before."""
    out = ""
    for _ in range(count):
        for ticket in list(it.running.values()):
            it.discard(ticket)
        out += "".join(ticket.id for ticket in it.admit(now))
    return out


@pytest.mark.parametrize(
    ("names", "now", "order"),
    [
        ("abc", 3, "abc"),
        ("ABC", 3, "CBA"),
        ("aBcD", 4, "DBac"),
        ("aBcD", 10, "aDBc"),  # `a` has waited as long as it has to
        ("aBcD", 11, "aBDc"),
        ("AbCd", 12, "AbCd"),
        ("AbCd", 100, "AbCd"),
    ],
)
def test_newest_first_then_oldest_first_and_who_is_late_before_all(names: str, now: float, order: str) -> None:
    it = lanes()
    come(it, names)
    assert "".join(it.line(now)) == order
    assert ran(it, now) == order


def test_without_overtaking_both_lanes_are_one_queue() -> None:
    it = lanes(max_overtake=0)
    come(it, "aBcDE")
    assert ran(it, 5) == "aBcDE"


def test_newcomers_pass_nobody_who_is_late() -> None:
    it = lanes()
    come(it, "ab", 0)
    come(it, "XYZ", 7)
    assert ran(it, 9.9, 1) == "Z"
    come(it, "V", 10)
    assert ran(it, 10.5, 3) == "aVY"
    assert ran(it, 11) == "bX"


@pytest.mark.parametrize(("names", "shed", "left"), [("ABCD", "AB", "DC"), ("abcd", "dc", "ab"), ("AabBCc", "Ac", "CBab")])
def test_a_full_lane_sheds_the_oldest_editor_and_the_newest_of_the_others(names: str, shed: str, left: str) -> None:
    for now in (6.0, 100.0):  # late or not
        it = lanes(bound=2)
        come(it, names)
        it.ahead("regular", now)
        assert "".join(ticket.id for ticket in it.shed()) == shed
        assert it.shed() == []
        assert sorted(it.line(now)) == sorted(left)


def test_an_aborting_ticket_keeps_its_slot() -> None:
    it = lanes()
    come(it, "ab")
    (a,) = it.admit(1)
    a.stage = Stage.ABORTING
    assert it.admit(2) == []
    assert (len(it.running), it.aborting, it.waiting) == (1, 1, 1)
    it.discard(a)
    assert [ticket.id for ticket in it.admit(3)] == ["b"]
    assert it.aborting == 0


def test_ahead_counts_those_who_run_before_a_newcomer() -> None:
    it = lanes(slots=0)
    come(it, "aBcD")
    assert [it.ahead(lane, 5) for lane in LANES] == [0, 4]
    assert [it.ahead(lane, 11) for lane in LANES] == [2, 4]


class Queues(RuleBasedStateMachine):
    """Any order of arrivals, ends, aborts and new engines; the model is one list in order of arrival."""

    bound = 3
    max_overtake = 5.0

    def __init__(self) -> None:
        super().__init__()
        self.it = lanes(0, self.bound, self.max_overtake)
        self.now = 0.0
        self.waiting: list[Ticket] = []
        self.running: dict[str, Ticket] = {}
        self.count = 0

    def choose(self) -> Ticket:
        if late := [t for t in self.waiting if self.now - t.arrived >= self.max_overtake]:
            return late[0]
        newest = [t for t in self.waiting if t.lane == "interactive"]
        return newest[-1] if newest else self.waiting[0]

    def fill(self) -> None:
        line = self.it.line(self.now)
        assert len(line) == len(set(line)) == len(self.waiting)
        for at, ticket in enumerate(self.it.admit(self.now)):
            assert ticket is self.choose()
            assert ticket.id == line[at]
            assert (ticket.stage, ticket.ran_at) == (Stage.RUNNING, self.now)
            for other in self.waiting:  # said again, because it is what we promise
                if other.order < ticket.order:
                    assert self.now - other.arrived < self.max_overtake, "one who is late was passed"
            self.waiting.remove(ticket)
            self.running[ticket.id] = ticket
            assert len(self.running) <= self.it.slots

    @rule(step=st.sampled_from([0.0, 0.5, 2.0, 5.0, 40_000.0]))
    def time_passes(self, step: float) -> None:
        self.now += step

    @rule(lane=st.sampled_from(LANES), count=st.integers(1, 3))
    def arrive(self, lane: str, count: int) -> None:
        for _ in range(count):
            self.count += 1
            ticket = Ticket(f"t{self.count}", "i1", lane, self.now)
            self.it.submit(ticket)
            self.waiting.append(ticket)
            self.fill()
            mine = [t for t in self.waiting if t.lane == lane]
            shed = [mine[0 if lane == "interactive" else -1]] if len(mine) > self.bound else []
            assert self.it.shed() == shed
            self.waiting = [t for t in self.waiting if t not in shed]

    @precondition(lambda self: self.running or self.waiting)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from([*self.running.values(), *self.waiting]))
        self.it.discard(ticket)
        self.it.discard(ticket)  # told twice
        self.running.pop(ticket.id, None)
        self.waiting = [t for t in self.waiting if t is not ticket]
        self.fill()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.running[data.draw(st.sampled_from(sorted(self.running)))].stage = Stage.ABORTING
        self.fill()

    @rule(slots=st.integers(0, 4))
    def engine_changes(self, slots: int) -> None:
        self.it.slots = slots
        if slots >= len(self.running):
            self.fill()
        else:  # those of the engine before have not ended yet
            assert self.it.admit(self.now) == []

    @precondition(lambda self: len(self.waiting) > 3)
    @rule()
    def turn_away(self) -> None:
        assert self.it.clear_waiting() == self.waiting
        self.waiting = []

    @invariant()
    def counts_agree(self) -> None:
        assert self.it.running == self.running
        assert self.it.aborting == sum(t.stage is Stage.ABORTING for t in self.running.values())
        assert [len(self.it.interactive), len(self.it.regular)] == [sum(t.lane == lane for t in self.waiting) for lane in LANES]
        assert self.it.waiting == len(self.waiting)

    @invariant()
    def ahead_is_the_place_a_newcomer_would_get(self) -> None:
        late = sum(self.now - t.arrived >= self.max_overtake for t in self.waiting)
        assert [self.it.ahead(lane, self.now) for lane in LANES] == [late, len(self.waiting)]


Queues.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestQueues = Queues.TestCase


def test_a_lane_that_everybody_leaves_is_empty() -> None:
    lane = Lane()
    assert not lane
    lane.fresh["t"] = Ticket("t", "i1", "regular", 0.0)
    lane.note_late(1.0, 5.0)
    assert (len(lane), list(lane.late)) == (1, ["t"])
    lane.discard("t")
    assert not lane


# Deadlines ----------------------------------------------------------------------------------------------------------
steps = st.one_of(
    st.tuples(st.just("add"), st.sampled_from("abcde"), st.integers(0, 5)),
    st.tuples(st.just("discard"), st.sampled_from("abcde"), st.just(0)),
    st.tuples(st.just("due"), st.just(""), st.integers(0, 5)),
)


@given(st.lists(steps, max_size=40))
def test_deadlines_say_who_is_due_and_forget_who_is_not_there(script: list[tuple[str, str, int]]) -> None:
    deadlines, model = Deadlines(), dict[str, float]()
    for what, ticket, moment in script:
        if what == "add" and ticket not in model:
            deadlines.add(ticket, moment)
            model[ticket] = moment
        elif what == "discard":
            deadlines.discard(ticket)
            model.pop(ticket, None)
        elif what == "due":
            due = deadlines.due(moment)
            assert sorted(due) == sorted(t for t, at in model.items() if at <= moment)
            at = [model.pop(t) for t in due]
            assert at == sorted(at)
        assert deadlines.first == min(model.values(), default=None)
        assert deadlines.moments == model


def test_far_deadlines_of_those_who_have_gone_take_no_memory() -> None:
    deadlines = Deadlines()
    deadlines.add("near", 1.0)
    for i in range(1000):
        deadlines.add(f"t{i}", 1e9 + i)
        deadlines.discard(f"t{i}")
    assert deadlines.first == 1.0
    assert len(deadlines.heap) <= 3


# Pace ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("slots", "ahead", "running", "wait"),
    [
        (1, 0, [], 0.0),
        (1, 0, [1.0], 3.0),
        (1, 0, [9.0], 0.0),  # it takes longer than others did: any moment now
        (1, 2, [1.0], 11.0),
        (2, 0, [1.0], 0.0),
        (2, 0, [1.0, 3.0], 1.0),
        (2, 1, [1.0, 3.0], 3.0),
        (2, 2, [1.0, 3.0], 5.0),
        (2, 3, [1.0, 3.0], 7.0),
        (2, 3, [], 4.0),
        (2, 0, [1.0, 2.0, 3.0], 1.0),  # one is left over from an engine with more slots
    ],
)
def test_the_wait_is_what_served_tickets_took(slots: int, ahead: int, running: list[float], wait: float) -> None:
    assert Pace(service=4.0, slots=slots).wait(ahead, running) == wait
    assert Pace(slots=slots).wait(ahead, running) == 0.0


def test_pace_follows_what_it_sees() -> None:
    pace = Pace()
    pace.doubt_load()
    assert (pace.load, pace.service) == (None, None)
    pace.note_service(1.0)
    for _ in range(40):
        pace.note_service(3.0)
    assert pace.service == pytest.approx(3.0, abs=0.01)
    pace.note_load(60.0)
    pace.note_load(2.0)
    assert pace.load == 2.0
    pace.note_load(7.0)
    assert pace.load == pytest.approx(3.0)
    pace.doubt_load()
    assert pace.load == pytest.approx(3.0 * DOUBT)
