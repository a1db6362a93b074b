"""The core: plain cases as tables of events and commands, and a stateful property test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llm_daemon.core import events as ev
from llm_daemon.core.events import Command
from llm_daemon.core.instance import ABANDON_AFTER, ACCIDENTS, State

from .machines import CANCELLED, DIED, machine, running, spec


def test_two_clients_share_one_instance_and_hear_of_it_together() -> None:
    m = machine()
    m.handle(ev.Joined("a"), 0)
    m.handle(ev.Joined("b"), 0)
    assert m.handle(ev.Want("a", 1, spec()), 0) == [ev.Start("i1", spec())]
    assert m.handle(ev.Want("b", 7, spec()), 1) == []
    assert m.handle(ev.Progressed("i1", {"done": 1}), 1) == [
        ev.TellProgress("a", 1, {"done": 1}),
        ev.TellProgress("b", 7, {"done": 1}),
    ]
    assert m.handle(ev.Up("i1", 2), 2) == [ev.TellReady("a", 1, "i1"), ev.TellReady("b", 7, "i1")]


@pytest.mark.parametrize(
    ("options", "shared"),
    [
        ({}, True),
        ({"context": 2048}, True),
        ({"context": 4096, "engine": "e"}, True),
        ({"context": 8192}, False),
        ({"parallel": 3}, False),
        ({"engine": "other"}, False),
        ({"gpu_layers": 4}, False),
        ({"args": ["--flag"]}, False),
    ],
)
def test_an_instance_serves_every_wish_that_it_covers(options: dict[str, Any], shared: bool) -> None:
    m = machine()
    running(m)
    m.handle(ev.Joined("b"), 0)
    (command,) = m.handle(ev.Want("b", 1, spec(**options)), 0)
    assert isinstance(command, ev.TellReady if shared else ev.Start)


def test_idle_model_is_unloaded_after_ttl_then_the_daemon_leaves_after_linger() -> None:
    m = machine(ttl=5, linger=3)
    running(m)
    m.handle(ev.Left("a"), 10)
    assert m.wake_at == 15
    assert m.handle(ev.Tick(), 14.9) == []
    assert m.handle(ev.Tick(), 15) == [ev.Halt("i1", False)]
    assert m.wake_at is None
    assert m.handle(ev.Down("i1"), 16) == []
    assert m.wake_at == 19
    assert m.handle(ev.Tick(), 19) == [ev.Exit()]
    assert m.handle(ev.ExitVetoed(), 19) == []
    m.handle(ev.Joined("b"), 19)
    assert m.wake_at is None
    assert m.handle(ev.Tick(), 30) == []


def test_a_leased_idle_model_stays_for_leased_ttl_and_comes_back_on_request() -> None:
    m = machine(ttl=5, leased_ttl=50)
    running(m)
    assert m.wake_at == 50
    assert m.handle(ev.Tick(), 50) == [ev.Halt("i1", False)]
    m.handle(ev.Down("i1"), 51)
    assert m.wake_at is None  # the lease keeps the daemon
    assert m.handle(ev.Arrived("t", spec()), 60) == [ev.Start("i1", spec())]
    assert m.handle(ev.Up("i1", 1), 61) == [ev.Run("t", "i1", loaded_for=1)]


def test_keep_alive_of_a_client_goes_before_the_settings() -> None:
    m = machine()
    m.handle(ev.Joined("a"), 0)
    m.handle(ev.Want("a", 1, spec(), keep_alive=7.0), 0)
    m.handle(ev.Up("i1", 1), 1)
    assert m.wake_at == 8
    m.handle(ev.Arrived("t", spec(), keep_alive=30.0), 2)
    m.handle(ev.Ended("t", served=True), 3)
    assert m.wake_at == 33


def test_requests_run_oldest_first_as_slots_allow_and_hold_the_model() -> None:
    m = machine(ttl=5)
    running(m, slots=1)
    assert m.handle(ev.Arrived("t1", spec()), 1) == [ev.Run("t1", "i1")]
    assert m.handle(ev.Arrived("t2", spec()), 2) == []
    assert m.handle(ev.Arrived("t3", spec()), 3) == []
    m.handle(ev.Left("a"), 3)
    assert m.wake_at is None  # in use: nothing is due
    assert m.handle(ev.Ended("t1"), 4) == [ev.Run("t2", "i1")]
    assert m.handle(ev.Ended("t3"), 5) == []  # its client left the queue
    assert m.handle(ev.Ended("t3"), 5) == []  # told twice
    assert m.handle(ev.Ended("t2"), 6) == []
    assert m.wake_at == 11


def test_a_full_queue_sheds_the_newest_with_a_clear_error() -> None:
    m = machine(queue_limit=1)
    running(m, slots=1)
    m.handle(ev.Arrived("t1", spec()), 1)
    m.handle(ev.Arrived("t2", spec()), 1)
    (refused,) = m.handle(ev.Arrived("t3", spec()), 1)
    assert isinstance(refused, ev.Refuse)
    assert refused.ticket == "t3"
    assert refused.error["code"] == "queue_full"
    assert m.handle(ev.Ended("t1"), 2) == [ev.Run("t2", "i1")]


def test_a_failed_start_tells_everybody_and_holds_requests_off_but_not_clients() -> None:
    m = machine()
    m.handle(ev.Joined("a"), 0)
    m.handle(ev.Want("a", 1, spec()), 0)
    m.handle(ev.Arrived("t", spec()), 0)
    assert m.handle(ev.Down("i1", DIED), 1) == [ev.TellError("a", 1, DIED), ev.Refuse("t", DIED)]
    (refused,) = m.handle(ev.Arrived("t2", spec()), 1.5)
    assert isinstance(refused, ev.Refuse)
    assert refused.error["data"]["retry_after"] == 1
    assert m.handle(ev.Want("a", 2, spec()), 1.6) == [ev.Start("i1", spec())]
    m.handle(ev.Down("i1", DIED), 2)
    assert m.instances["i1"].retry_at == 4  # 1, 2, 4 ... seconds


def test_an_engine_that_falls_with_each_first_request_is_held_off_until_one_is_served() -> None:
    m = machine()
    running(m)
    for accident in range(ACCIDENTS):
        ticket = f"t{accident}"
        m.handle(ev.Arrived(ticket, spec()), 1)
        m.handle(ev.Down("i1", DIED), 2)
        m.handle(ev.Ended(ticket), 2)
        assert m.handle(ev.Arrived("next", spec()), 2) == [ev.Start("i1", spec())]
        m.handle(ev.Ended("next"), 2)
        m.handle(ev.Up("i1", 1), 3)
    m.handle(ev.Down("i1", DIED), 4)
    (refused,) = m.handle(ev.Arrived("t", spec()), 4)
    assert isinstance(refused, ev.Refuse)
    assert (refused.error["code"], refused.error["status"], refused.error["data"]["retry_after"]) == ("engine_died", 503, 4)
    assert m.handle(ev.Arrived("t", spec()), 8) == [ev.Start("i1", spec())]
    m.handle(ev.Up("i1", 1), 9)
    m.handle(ev.Ended("t", served=True), 10)
    assert m.instances["i1"].failures == 0


def test_a_crash_restarts_for_those_who_wait_and_leaves_running_tickets_to_the_relay() -> None:
    m = machine()
    running(m, slots=1)
    m.handle(ev.Arrived("t1", spec()), 1)
    m.handle(ev.Arrived("t2", spec()), 1)
    assert m.handle(ev.Down("i1", DIED), 2) == [ev.Start("i1", spec())]
    assert m.handle(ev.Ended("t1"), 2) == []
    assert m.handle(ev.Up("i1", 1), 3) == [ev.Run("t2", "i1", loaded_for=1)]


def test_a_start_that_nobody_waits_for_is_given_up_after_a_grace() -> None:
    m = machine()
    m.handle(ev.Joined("a"), 0)
    m.handle(ev.Want("a", 1, spec()), 0)
    m.handle(ev.Left("a"), 1)
    assert m.wake_at == 1 + ABANDON_AFTER
    m.handle(ev.Joined("b"), 2)
    m.handle(ev.Want("b", 1, spec()), 2)  # somebody came in time
    assert m.handle(ev.Tick(), 4) == []
    m.handle(ev.Left("b"), 5)
    assert m.handle(ev.Tick(), 5 + ABANDON_AFTER) == [ev.Halt("i1", False)]
    assert m.handle(ev.Down("i1"), 8) == []
    assert m.instances == {}


def test_who_comes_while_it_stops_is_served_by_the_next_start() -> None:
    m = machine(ttl=1)
    running(m)
    m.handle(ev.Left("a"), 0)
    m.handle(ev.Tick(), 1)
    m.handle(ev.Joined("b"), 1)
    assert m.handle(ev.Want("b", 1, spec()), 1) == []
    assert m.handle(ev.Down("i1"), 2) == [ev.Start("i1", spec())]
    assert m.handle(ev.Up("i1", 1), 3) == [ev.TellReady("b", 1, "i1")]


def test_stop_by_hand_lets_running_requests_finish_unless_forced() -> None:
    m = machine()
    running(m)
    m.handle(ev.Arrived("t", spec()), 1)
    assert m.handle(ev.StopModel("i1"), 2) == []
    assert m.instances["i1"].state is State.DRAINING
    assert m.handle(ev.Ended("t"), 3) == [ev.Halt("i1", False)]
    assert m.handle(ev.StopModel("i1", force=True), 3) == [ev.Halt("i1", True)]


def test_a_late_up_after_halt_does_not_revive() -> None:
    m = machine()
    m.handle(ev.Joined("a"), 0)
    m.handle(ev.Want("a", 1, spec()), 0)
    (told, halt) = m.handle(ev.StopModel("i1", force=True), 0)
    assert isinstance(told, ev.TellError)
    assert halt == ev.Halt("i1", True)
    assert m.handle(ev.Up("i1", 2), 0) == []
    assert m.instances["i1"].state is State.STOPPING


def test_a_retiring_daemon_stops_idle_models_at_once_and_leaves_without_linger() -> None:
    m = machine()
    running(m)
    m.handle(ev.Retire(), 1)
    assert m.instances["i1"].state is State.READY  # leased
    assert m.handle(ev.Left("a"), 2) == []
    assert m.wake_at == 2
    assert m.handle(ev.Tick(), 2) == [ev.Halt("i1", False)]
    assert m.handle(ev.Down("i1"), 3) == [ev.Exit()]


@dataclass
class Facts:
    """What the model of the queues knows of a ticket."""

    arrived: float
    lane: str
    key: str | None
    deadline: float | None
    instance: str = ""
    loaded_for: float = 0.0


class Storm(RuleBasedStateMachine):
    """Any order of events; the shell is played faithfully: a Start is answered by Up or Down, a Halt by Down.

    Who runs next, and who is shed, is decided once more by looking at everybody each time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.m = machine(ttl=3, leased_ttl=8, linger=2, queue_limit=2, max_overtake=3)
        self.now = 0.0
        self.leases: set[str] = set()
        self.waiting: set[tuple[str, int]] = set()
        self.open: dict[str, str] = {}  # ticket -> waiting | running | aborting
        self.facts: dict[str, Facts] = {}  # of every ticket there ever was
        self.arriving = ""
        self.slots: dict[str, int] = {}
        self.processes: dict[str, str] = {}  # instance -> starting | ready | stopping
        self.exited = False
        self.count = 0

    def send(self, event: ev.Event) -> None:
        commands: list[Command] = self.m.handle(event, self.now)
        for command in commands:
            match command:
                case ev.Start(instance, _):
                    assert instance not in self.processes, "two processes for one instance"
                    self.processes[instance] = "starting"
                case ev.Halt(instance, _):
                    assert instance in self.processes
                    self.processes[instance] = "stopping"
                case ev.Run():
                    self.runs(command)
                case ev.Refuse(ticket, error):
                    self.refused(ticket, error["code"])
                case ev.Abort(ticket, _):
                    assert self.open[ticket] == "running"
                    self.open[ticket] = "aborting"
                case ev.TellReady(lease, request, instance):
                    self.waiting.remove((lease, request))
                    assert self.processes[instance] == "ready"
                case ev.TellError(lease, request, _):
                    self.waiting.remove((lease, request))
                case ev.TellProgress(lease, request, _):
                    assert (lease, request) in self.waiting
                case ev.Exit():
                    assert not self.leases, "S3: a voluntary exit while a lease exists"
                    assert not self.processes
                    assert not self.open
                    self.exited = True

    def waiting_for(self, instance: str) -> list[str]:
        """Oldest first."""
        return [t for t, stage in self.open.items() if stage == "waiting" and self.facts[t].instance == instance]

    def runs(self, run: ev.Run) -> None:
        line, facts = self.waiting_for(run.instance), self.facts[run.ticket]
        late = [t for t in line if self.now - self.facts[t].arrived >= self.m.max_overtake]
        newest = [t for t in reversed(line) if self.facts[t].lane == "interactive"]
        assert run.ticket == [*late, *newest, *line][0]
        assert self.processes[run.instance] == "ready"
        assert facts.deadline is None or self.now <= facts.deadline
        assert run.loaded_for == pytest.approx(facts.loaded_for, abs=1e-6)
        self.open[run.ticket] = "running"
        taken = [t for t, stage in self.open.items() if stage != "waiting" and self.facts[t].instance == run.instance]
        assert len(taken) <= self.slots[run.instance]

    def refused(self, ticket: str, code: str) -> None:
        facts = self.facts[ticket]
        if code == "queue_full":
            lane = [t for t in self.waiting_for(facts.instance) if self.facts[t].lane == facts.lane]
            assert len(lane) > self.m.queue_limit
            assert ticket == lane[0 if facts.lane == "interactive" else -1]
        elif code == "expired":
            assert facts.deadline is not None
            assert facts.deadline <= self.now or ticket == self.arriving
        assert self.open.pop(ticket) == "waiting"

    @rule(step=st.one_of(st.floats(0, 4), st.just(40_000.0)))  # the last as after a night asleep
    def time_passes(self, step: float) -> None:
        self.now += step
        for ticket, stage in self.open.items():
            if stage == "waiting" and self.m.instances[self.facts[ticket].instance].state is not State.READY:
                self.facts[ticket].loaded_for += step
        if self.m.wake_at is not None and self.m.wake_at <= self.now:
            self.send(ev.Tick())

    @rule()
    def tick_out_of_turn(self) -> None:
        self.send(ev.Tick())

    @rule()
    def retire(self) -> None:
        self.send(ev.Retire())

    @rule()
    def join(self) -> None:
        self.count += 1
        self.leases.add(f"c{self.count}")
        self.send(ev.Joined(f"c{self.count}"))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(sorted(self.leases)))
        self.leases.remove(lease)
        self.waiting = {w for w in self.waiting if w[0] != lease}
        self.send(ev.Left(lease))

    @precondition(lambda self: self.leases)
    @rule(
        data=st.data(),
        name=st.sampled_from("mn"),
        context=st.sampled_from([None, 100, 9000]),
        keep_alive=st.sampled_from([None, 0.0, 6.0]),
    )
    def want(self, data: st.DataObject, name: str, context: int | None, keep_alive: float | None) -> None:
        self.count += 1
        lease = data.draw(st.sampled_from(sorted(self.leases)))
        self.waiting.add((lease, self.count))
        self.send(ev.Want(lease, self.count, spec(name, context=context), keep_alive))

    @rule(
        name=st.sampled_from("mn"),
        lane=st.sampled_from(["interactive", "regular"]),
        key=st.sampled_from([None, None, "k", "l"]),
        patience=st.sampled_from([None, None, -1.0, 0.0, 2.0, 5.0]),
        keep_alive=st.sampled_from([None, None, 0.0, 6.0]),
    )
    def arrive(self, name: str, lane: str, key: str | None, patience: float | None, keep_alive: float | None) -> None:
        self.count += 1
        ticket, deadline = f"t{self.count}", None if patience is None else self.now + patience
        self.open[ticket] = "waiting"
        facts = self.facts[ticket] = Facts(self.now, lane, key, deadline)
        arrived = ev.Arrived(ticket, spec(name), lane, key, deadline, keep_alive)
        facts.instance = self.m._place(arrived.spec, self.now).id  # which one it is, is no matter of lanes
        self.arriving = ticket
        self.send(arrived)
        self.arriving = ""

    @precondition(lambda self: self.open)
    @rule(data=st.data(), served=st.booleans())
    def end_ticket(self, data: st.DataObject, served: bool) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.open)))
        ran = self.open.pop(ticket) == "running"
        self.send(ev.Ended(ticket, served and ran))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def hang_up(self, data: st.DataObject) -> None:
        """As the gateway does it: who waits has ended at once, who runs when the engine has let go (`end_ticket`)."""
        ticket = data.draw(st.sampled_from(sorted(self.open)))
        if self.open[ticket] == "waiting":
            del self.open[ticket]
            self.send(ev.Ended(ticket))
        else:
            self.open[ticket] = "aborting"
            self.send(ev.Aborting(ticket))

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.send(ev.Cancel(data.draw(st.sampled_from([*sorted(self.open), "?"])), CANCELLED))

    @precondition(lambda self: self.processes)
    @rule(data=st.data(), slots=st.integers(1, 3), good=st.booleans())
    def process_moves(self, data: st.DataObject, slots: int, good: bool) -> None:
        instance = data.draw(st.sampled_from(sorted(self.processes)))
        state = self.processes[instance]
        if state == "starting" and good:
            self.processes[instance] = "ready"
            self.slots[instance] = slots
            self.send(ev.Up(instance, slots))
        else:
            del self.processes[instance]
            self.send(ev.Down(instance, None if state == "stopping" else DIED))

    @precondition(lambda self: self.processes)
    @rule(data=st.data())
    def progress(self, data: st.DataObject) -> None:
        self.send(ev.Progressed(data.draw(st.sampled_from(sorted(self.processes))), {}))

    @precondition(lambda self: self.processes)
    @rule(data=st.data(), force=st.booleans())
    def stop(self, data: st.DataObject, force: bool) -> None:
        self.send(ev.StopModel(data.draw(st.sampled_from(sorted(self.processes))), force))

    @precondition(lambda self: self.exited)
    @rule()
    def vetoed(self) -> None:
        self.exited = False
        self.send(ev.ExitVetoed())

    @invariant()
    def every_ticket_is_in_one_place(self) -> None:
        for it in self.m.instances.values():
            assert sorted(it.lanes.line(self.now)) == sorted(self.waiting_for(it.id))
        assert self.open == {name: ticket.stage for name, ticket in self.m.tickets.items()}
        placed = {t: it.id for it in self.m.instances.values() for t in (*it.lanes.line(self.now), *it.lanes.running)}
        assert placed == {t: self.facts[t].instance for t in self.open}

    @invariant()
    def lanes_keep_their_bound(self) -> None:
        for it in self.m.instances.values():
            assert max(len(it.lanes.interactive), len(it.lanes.regular)) <= self.m.queue_limit

    @invariant()
    def no_slot_is_free_while_somebody_waits(self) -> None:
        for it in self.m.instances.values():
            assert it.state is not State.READY or not it.lanes.waiting or len(it.lanes.running) >= self.slots[it.id]

    @invariant()
    def one_ticket_of_a_key_is_alive(self) -> None:
        alive = {t: key for t, stage in self.open.items() if stage != "aborting" and (key := self.facts[t].key)}
        assert len(alive) == len(set(alive.values()))
        assert {key: ticket.id for key, ticket in self.m.keys.items() if ticket.stage != "aborting"} == {
            key: t for t, key in alive.items()
        }
        assert all(ticket.id in self.open for ticket in self.m.keys.values())

    @invariant()
    def nobody_waits_beyond_a_deadline(self) -> None:
        deadlines = {t: d for t, stage in self.open.items() if stage == "waiting" and (d := self.facts[t].deadline) is not None}
        assert self.m.deadlines.moments == deadlines
        assert all(deadline >= self.now for deadline in deadlines.values())
        assert not deadlines or (self.m.wake_at is not None and self.m.wake_at <= min(deadlines.values()))

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        for it in self.m.instances.values():
            if it.waiters or it.lanes.waiting:
                assert it.id in self.processes, f"somebody waits for {it.state}"

    @invariant()
    def states_match_processes(self) -> None:
        with_process = {it.id for it in self.m.instances.values() if it.has_process}
        assert with_process == set(self.processes)

    @invariant()
    def something_is_always_due_when_unused(self) -> None:
        if not self.leases and not self.open and not any(s == "stopping" or s == "starting" for s in self.processes.values()):
            assert self.m.wake_at is not None, "L3: unused, and nothing would ever end it"

    def teardown(self) -> None:
        """L3: when everybody has gone and engines end as they are told to, time alone brings the exit."""
        for ticket in list(self.open):
            if self.open.pop(ticket, None):
                self.send(ev.Ended(ticket))
        for lease in list(self.leases):
            self.leases.remove(lease)
            self.waiting = {w for w in self.waiting if w[0] != lease}
            self.send(ev.Left(lease))
        self.exited = False
        self.send(ev.ExitVetoed())
        for _ in range(10):
            for instance in [i for i, state in self.processes.items() if state == "stopping"]:
                del self.processes[instance]
                self.send(ev.Down(instance))
            if self.exited:
                return
            assert self.m.wake_at is not None, "L3: unused, and nothing would ever end it"
            self.now = max(self.now, self.m.wake_at)
            self.send(ev.Tick())
        raise AssertionError("L3: unused, and it stays")


Storm.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestStorm = Storm.TestCase
