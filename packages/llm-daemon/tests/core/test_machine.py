"""The core: plain cases as tables of events and commands, and a stateful property test."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llm_daemon import errors
from llm_daemon.core import events as ev
from llm_daemon.core.events import Command
from llm_daemon.core.instance import ABANDON_AFTER, ACCIDENTS, State
from llm_daemon.core.leases import Leases
from llm_daemon.core.machine import Machine
from llm_daemon.spec import Artifact, Spec, Wish

DIED = errors.EngineError("boom", code="engine_died").to_wire()


def spec(name: str = "m", **options: Any) -> Spec:
    wish = Wish.of(name, **options)
    full = Wish.of(name, **{"engine": "e", "context": 4096, "parallel": 2, **options})
    return Spec(wish, Artifact("file", f"/{name}", f"key:{name}"), full)


def machine(ttl: float = 120.0, leased_ttl: float = 1800.0, linger: float = 10.0, queue_limit: int = 10) -> Machine:
    return Machine(Leases.born(linger, 0.0), ttl, leased_ttl, queue_limit)


def running(m: Machine, lease: str = "a", now: float = 0.0, slots: int = 2) -> str:
    """A lease with a ready instance; returns the instance's id."""
    m.handle(ev.Joined(lease), now)
    (start,) = m.handle(ev.Want(lease, 1, spec()), now)
    assert isinstance(start, ev.Start)
    m.handle(ev.Up(start.instance, slots), now)
    return start.instance


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
    assert m.handle(ev.Up("i1", 1), 61) == [ev.Run("t", "i1")]


def test_keep_alive_of_a_client_goes_before_the_settings() -> None:
    m = machine()
    m.handle(ev.Joined("a"), 0)
    m.handle(ev.Want("a", 1, spec(), keep_alive=7.0), 0)
    m.handle(ev.Up("i1", 1), 1)
    assert m.wake_at == 8


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
    assert m.handle(ev.Up("i1", 1), 3) == [ev.Run("t2", "i1")]


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


class Storm(RuleBasedStateMachine):
    """Any order of events; the shell is played faithfully: a Start is answered by Up or Down, a Halt by Down."""

    def __init__(self) -> None:
        super().__init__()
        self.m = machine(ttl=3, leased_ttl=8, linger=2, queue_limit=2)
        self.now = 0.0
        self.leases: set[str] = set()
        self.waiting: set[tuple[str, int]] = set()
        self.open: dict[str, str] = {}  # ticket -> waiting | running
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
                case ev.Run(ticket, instance):
                    assert self.open[ticket] == "waiting"
                    assert self.processes[instance] == "ready"
                    self.open[ticket] = "running"
                case ev.Refuse(ticket, _):
                    assert self.open.pop(ticket) == "waiting"
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

    @rule(step=st.one_of(st.floats(0, 4), st.just(40_000.0)))  # the last as after a night asleep
    def time_passes(self, step: float) -> None:
        self.now += step
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

    @rule(name=st.sampled_from("mn"))
    def arrive(self, name: str) -> None:
        self.count += 1
        self.open[f"t{self.count}"] = "waiting"
        self.send(ev.Arrived(f"t{self.count}", spec(name)))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def end_ticket(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.open)))
        del self.open[ticket]
        self.send(ev.Ended(ticket))

    @precondition(lambda self: self.processes)
    @rule(data=st.data(), slots=st.integers(1, 3), good=st.booleans())
    def process_moves(self, data: st.DataObject, slots: int, good: bool) -> None:
        instance = data.draw(st.sampled_from(sorted(self.processes)))
        state = self.processes[instance]
        if state == "starting" and good:
            self.processes[instance] = "ready"
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
        places = [t for it in self.m.instances.values() for t in (*it.lane.waiting, *it.lane.running)]
        assert len(places) == len(set(places))
        assert set(places) == set(self.open) == set(self.m.tickets)

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        for it in self.m.instances.values():
            if it.waiters or it.lane.waiting:
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


Storm.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestStorm = Storm.TestCase
