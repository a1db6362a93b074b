"""The product's own state machines beside the exhaustive model, step by step: what they decide is what the model says.

The twin is a world with a manual clock and a tiny kernel: folders, LIFE, START, the published socket, backlogs and
connections.  Each client in it follows the steps of a real `Attempt`; each daemon has a real `Election` and, once it
serves, a real `ControlServer`, `Machine` and `Leases`.  Only the shells, `client/start.py`, `daemon/boot.py` and
`daemon/app.py`, are played, by the methods below: they carry out what the machines say.  After every step the twin,
seen as the model sees it, must be a world that the model's step of the same name leads to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, ClassVar, cast

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from llm_daemon import errors
from llm_daemon.client.start import DEADLINE
from llm_daemon.core import control, events as ev
from llm_daemon.core.leases import VETO_PAUSE, Leases
from llm_daemon.core.machine import Machine
from llm_daemon.core.rendezvous import (
    ALREADY,
    CONNECT,
    DOUBT,
    ELECTION,
    FAILURES,
    GIVE_UP,
    SPAWN,
    SPAWNS,
    START_PATIENCE,
    TAKE_START,
    WAIT,
    WAKE,
    WON,
    Attempt,
    Election,
)
from llm_daemon.daemon.control_server import Connection, ControlServer

from .lifecycle_model import PROGRESS, Model, World, violation

LINGER = 3.0  # seconds
ROUNDS = 30  # in which everybody takes a step, until all are served; 12 were the most ever needed
MODEL = Model(2, 3)
# Every event of the model, and whose it is.
OF_CLIENT = (
    "connect refused START backoff no-START no-folder spawn reset no-answer verdict eof detach again KILL-client"
).split()
OF_DAEMON = (
    "open lock already give-up check reopen publish enoent accept going idle RETIRE close unlock drop ghost-exit exit dead reap "
    "KILL-daemon"
).split()
EVENTS = (*OF_CLIENT, *OF_DAEMON, "CLEAN")

# Traces to begin with, see `Twin.play`; together they have every event.
BORN = "refused:0 START:0 refused:0 spawn:0 open:0 lock:0 check:0"
UP = f"{BORN} publish:0 verdict:0"
AGAIN = "refused:0 START:0 refused:0 spawn:0 open:1"  # by slot 1
SECOND = "refused:1 no-START:1 refused:1 spawn:1 open:1"  # a second candidate beside the first
SCENES = {
    "a life": f"{UP} connect:0 accept:0 detach:0 idle:0 close:0 exit:0 reap:0 again:0",
    "a client comes as it leaves": f"{UP} idle:0 connect:0 close:0 reset:0 START:0 refused:0 spawn:0 open:1 look:1 exit:0 lock:1",
    "it comes by its second look": f"{BORN} refused:1 no-START:1 publish:0 connect:1 RETIRE:0 close:0 reset:1 spawn:1",
    "a client stands at the door": f"{UP} connect:0 night tick:0 stop:0 accept:0 night tick:0 detach:0",
    "two candidates": f"{BORN} {SECOND} look:1 publish:0 already:1 verdict:1 connect:1 accept:0",
    "START is busy, and busy for too long": "refused:0 START:0 refused:1 backoff:1 refused:1 no-START:1 refused:1 spawn:1",
    "a holder of LIFE that does nothing": f"{BORN} {SECOND} give-up:1 verdict:1",
    "the folder goes before the check": "refused:0 START:0 refused:0 spawn:0 open:0 lock:0 CLEAN reopen:0 open:0 lock:0 check:0",
    "the folder goes after the check": f"{BORN} CLEAN enoent:0 open:0 lock:0",
    "the folder goes under a client": "refused:0 CLEAN no-folder:0 refused:0 START:0",
    "it was deposed": f"{UP} connect:0 CLEAN going:0 refused:0 no-START:0 RETIRE:0 close:0 unlock:0 ghost-exit:0",
    "a ghost with leases": f"{UP} connect:0 accept:0 RETIRE:0 close:0 unlock:0 drop:0 eof:0 {AGAIN} lock:1",
    "killed, with a client": f"{UP} connect:0 accept:0 connect:1 no-answer:1 KILL-daemon:0 dead:0 eof:0 KILL-client:1",
    "killed before it says a word": "refused:0 START:0 refused:0 spawn:0 KILL-daemon:0 dead:0 verdict:0",
}


class Client:
    """A process in `ensure`, from one call to the next.  `peer`: the daemon it queues at, waits for or is attached to."""

    def __init__(self, id: int, twin: Twin) -> None:
        self.id = id
        self.twin = twin
        self.begin()

    def begin(self) -> None:
        """A call of `ensure`."""
        self.attempt = self.twin.attempt_class(self.twin.now + DEADLINE)
        self.deadline = self.twin.now + DEADLINE
        self.state = "searching"
        self.next = CONNECT
        self.peer: Daemon | None = None
        self.busy_since: float | None = None
        self.spawns = self.failures = 0

    def ask(self, answer: Callable[[], str]) -> None:
        """What the loop in `ensure` does with each answer of the Attempt."""
        twin = self.twin
        self.state, self.peer = "searching", None
        try:
            self.next = answer()
        except errors.LlmDaemonError:
            assert self.failures >= FAILURES or self.spawns >= SPAWNS, "it gave up, and had no reason to"
            self.let_go()
            self.begin()  # its user tries again
            return
        if not self.attempt.holds_start:
            self.let_go()
        if self.attempt.pause:
            self.attempt.pause = 0.0
            try:
                self.attempt.check(twin.now)
            except errors.DaemonUnresponsive:
                assert twin.now >= self.deadline, "L2: it gave up before its deadline"
                self.let_go()
                self.begin()
            else:
                assert twin.now < self.deadline, "L2: it went on after its deadline"

    def let_go(self) -> None:
        if self.twin.start is self:
            self.twin.start = None

    def __str__(self) -> str:
        """The model's letter."""
        if self.state == "searching":
            return {CONNECT: "IT"[self.attempt.holds_start], TAKE_START: "N", SPAWN: "M"}[self.next]
        if self.state == "queued":
            return "QJ"[self.attempt.holds_start]
        return {"waiting": "W", "attached": "A", "detached": "D", "killed": "F"}[self.state]


class Wire:
    """The daemon's end of a control connection: what asyncio and the kernel give to the real `Connection`."""

    def __init__(self) -> None:
        self.decoder = control.Decoder()
        self.said: list[str] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        self.said += [message["op"] for message in self.decoder.feed(data)]

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 0

    def close(self) -> None:
        self.closed = True

    def cancel(self) -> None:
        """As the timer that ends silent connections."""


class Daemon:
    """A candidate, and what becomes of it.  `state` is the model's letter: the place in the shell's program."""

    def __init__(self, slot: int, twin: Twin) -> None:
        self.slot = slot
        self.twin = twin
        self.state = "E"
        self.folder: int | None = None  # the inode it has opened
        self.verdict: str | None = None
        self.listening = False
        self.backlog: list[Client] = []
        self.connections: dict[Client, Connection] = {}
        self.leaving = False  # Exit was commanded
        self.elect()

    def elect(self) -> None:
        self.election = self.twin.election_class(self.twin.now)
        self.elects_since = self.twin.now
        self.woke = False

    def serve(self) -> None:
        leases = self.twin.leases_class.born(LINGER, self.twin.now)
        self.machine = Machine(leases, ttl=1.0, leased_ttl=1.0, queue_limit=1, max_overtake=1.0)
        self.server = ControlServer(cast(Any, self))

    @property
    def holds_life(self) -> bool:
        return self.folder is not None and self.twin.life.get(self.folder) is self

    def unlock(self) -> None:
        if self.holds_life:
            assert self.folder is not None
            del self.twin.life[self.folder]

    @property
    def has_names(self) -> bool:
        """Whether it can make files: its names are relative to the folder that it opened."""
        return self.folder == self.twin.folder

    @property
    def is_at_door(self) -> bool:
        """Whether the poll of the listener says that somebody waits."""
        return bool(self.backlog)

    def hang_up(self) -> None:
        self.listening = False
        self.backlog.clear()

    def end(self) -> None:
        """The kernel's part of a process's end."""
        self.unlock()
        self.hang_up()
        self.connections.clear()
        self.state = "Z"
        if self.verdict is None:
            self.twin.daemons[self.slot] = None

    def answer(self, op: str, client: Client | None = None) -> list[str]:
        """What the real control server says to a new connection; a client that is let in keeps it."""
        connection, wire = Connection(self.server), Wire()
        connection.transport = cast(asyncio.Transport, wire)
        connection.silent = cast(asyncio.TimerHandle, wire)
        connection.pid = 0
        connection.data_received(control.encode({"op": op, "proto": control.PROTO}))
        if client is not None and not wire.closed:
            self.connections[client] = connection
        return wire.said

    def lost(self, client: Client) -> None:
        """The client's end of its connection was closed."""
        if connection := self.connections.pop(client, None):
            if self.state not in "KZ":
                connection.connection_lost(None)

    # What the control server asks its host ----------------------------------------------------------------------
    def post(self, event: ev.Event) -> None:
        for command in self.machine.handle(event, self.twin.now):
            assert isinstance(command, ev.Exit)
            self.leaving = True

    def welcome(self) -> dict[str, object]:
        return {}

    def is_deposed(self) -> bool:
        return self.folder != self.twin.folder


class Twin(RuleBasedStateMachine):
    """One rule for each event of the model, enabled when the model enables it, and a few that the model does not see."""

    attempt_class: ClassVar[type[Attempt]] = Attempt
    election_class: ClassVar[type[Election]] = Election
    leases_class: ClassVar[type[Leases]] = Leases
    daemon_class: ClassVar[type[Daemon]] = Daemon
    scenes: ClassVar[tuple[str, ...]] = tuple(SCENES.values())

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.folder = 0  # the inode that the path leads to
        self.life: dict[int, Daemon] = {}  # inode -> who holds its lock
        self.start: Client | None = None
        self.sock: Daemon | None = None
        self.clients = [Client(i, self) for i in range(MODEL.clients)]
        self.daemons: list[Daemon | None] = [None] * MODEL.slots
        self.world = MODEL.initial
        self.happened: list[str] = []
        self.is_sound = True
        self.see()

    def see(self) -> None:
        """What the model has next: event -> [(who, world), ...]."""
        self.enabled: dict[str, list[tuple[int, World]]] = {}
        self.progress: list[tuple[str, int, World]] = []
        parts = [(i, MODEL.of_client(self.world, i)) for i in range(MODEL.clients)]
        parts += [(j, MODEL.of_daemon(self.world, j)) for j in range(MODEL.slots)]
        for who, steps in parts:
            for name, kind, after in steps:
                self.enabled.setdefault(name, []).append((who, after))
                if kind == PROGRESS:
                    self.progress.append((name, who, after))
        if clean := [after for name, _, after in MODEL.steps(self.world) if name == "CLEAN"]:
            self.enabled["CLEAN"] = [(0, clean[0])]

    def view(self) -> World:
        """The twin as the model sees it."""
        clients = tuple((str(c), c.peer.slot if c.peer else None) for c in self.clients)
        daemons = tuple(self._view_daemon(d) for d in self.daemons)
        living = [d for d in self.daemons if d is not None]
        backlog = sorted((d.slot, c.id) for d in living for c in d.backlog)
        leases = sorted((d.slot, c.id) for d in living for c in d.connections)
        sock = self.sock.slot if self.sock and self.sock.listening else None
        return World(clients, daemons, tuple(backlog), tuple(leases), self.folder, sock, self.start.id if self.start else None)

    @staticmethod
    def _view_daemon(d: Daemon | None) -> tuple[str, int | None, bool, str | None]:
        if d is None:
            return "Z", None, False, None
        holds = d.folder if d.state == "O" or d.holds_life else None
        return d.state, holds, d.listening, d.verdict

    # Lockstep -------------------------------------------------------------------------------------------------
    def do(self, name: str, who: int, after: World) -> None:
        """Lets `who` take the step that the model calls `name`, and looks whether that is what came of it."""
        self.is_sound = False
        self.happened.clear()
        if name == "CLEAN":
            self.folder, self.sock, self.start = 1, None, None
            self.was("CLEAN", who)
        elif name in OF_CLIENT:
            self._client_step(name, self.clients[who])
        else:
            d = self.daemons[who]
            assert d is not None
            self._daemon_step(name, d, after)
        # A START that is busy for too long by now is a hint no more, whatever the rule's name was.
        assert name in self.happened or (name == "backoff" and self.happened == ["no-START"]), f"{name}: {self.happened}"
        self.is_sound = True

    def was(self, name: str | None, who: int) -> None:
        """The event `name` happened; None for what the model does not see."""
        now = self.view()
        if name is None:
            expected = [self.world]
        else:
            self.happened.append(name)
            expected = [after for them, after in self.enabled.get(name, ()) if them == who]
        assert now in expected, f"{name} by {who}\nin    {self.world}\ntwin  {now}\nmodel {expected}"
        assert (broken := violation(name or "", now)) is None, broken
        self.world = now
        self.see()
        self._check_daemons()
        for d in self.daemons:  # Exit is carried out in the callback that brought it
            if d is not None and d.state == "S" and d.leaving:
                self._leave(d)

    def _check_daemons(self) -> None:
        for d in self.daemons:
            if d is None or d.state not in "SXYVHG":
                continue
            held = {c.lease for c in d.connections.values()}
            assert d.machine.leases.holders == held, "a lease is a connection"
            assert held or d.leaving or d.machine.wake_at is not None, "L3: unused, and nothing would ever end it"
            assert not (held and d.leaving), "S3: it leaves, and a lease exists"

    # Clients --------------------------------------------------------------------------------------------------
    def _client_step(self, name: str, c: Client) -> None:
        match name:
            case "connect" | "refused":
                if self.sock is not None and self.sock.listening:
                    c.state, c.peer = "queued", self.sock
                    self.sock.backlog.append(c)
                    self.was("connect", c.id)
                else:
                    c.ask(c.attempt.down)
                    self.was("refused", c.id)
            case "START" | "backoff":
                self._take_start(c)
            case "no-START" if self.start is not None and c.busy_since is not None:
                self.now = max(self.now, c.busy_since + START_PATIENCE + 0.1)
                self._take_start(c)
            case "no-START":
                c.ask(c.attempt.start_taken)  # no lock can be had in that folder
                self.was("no-START", c.id)
            case "no-folder":
                c.ask(c.attempt.start_gone)
                self.was("no-folder", c.id)
            case "spawn":
                used = {x.peer.slot for x in self.clients if x.peer}
                slot = next(j for j, d in enumerate(self.daemons) if d is None and j not in used)
                c.state, c.peer = "waiting", self.daemon_class(slot, self)
                self.daemons[slot] = c.peer
                self.was("spawn", c.id)
            case "reset":
                c.ask(c.attempt.down)
                self.was("reset", c.id)
            case "no-answer":
                assert c.peer is not None
                c.peer.backlog.remove(c)
                c.ask(lambda: c.attempt.busy(errors.DaemonUnresponsive("")))
                self.was("no-answer", c.id)
            case "verdict":
                self._verdict(c)
            case "eof" | "again":
                c.begin()
                self.was(name, c.id)
            case "detach" | "KILL-client":
                self._hang_up(c, name)
            case _:
                raise AssertionError(name)

    def _take_start(self, c: Client) -> None:
        if self.start is None:
            self.start = c
            c.ask(c.attempt.start_taken)
            self.was("START", c.id)
            return
        since = c.busy_since = self.now if c.busy_since is None else c.busy_since
        c.ask(lambda: c.attempt.start_busy(self.now))
        if c.attempt.holds_start:
            assert self.now - since > START_PATIENCE
            self.was("no-START", c.id)
        else:
            self.was("backoff", c.id)

    def _verdict(self, c: Client) -> None:
        assert c.peer is not None
        words = c.peer.verdict
        error: errors.LlmDaemonError | None = None
        if words not in ("READY", "ALREADY"):
            error = errors.Unavailable("", code="life_held") if words else errors.Bug("", code="daemon_start")
            c.failures += 1
        c.spawns += 1
        c.ask(lambda: c.attempt.verdict(error, words or ""))
        self.was("verdict", c.id)

    def _hang_up(self, c: Client, name: str) -> None:
        d, c.peer = c.peer, None
        c.state = "detached" if name == "detach" else "killed"
        c.let_go()
        if d is not None:
            if c in d.backlog:
                d.backlog.remove(c)
            d.lost(c)
        self.was(name, c.id)

    # Daemons --------------------------------------------------------------------------------------------------
    def _daemon_step(self, name: str, d: Daemon, after: World) -> None:
        match name:
            case "open":
                d.folder, d.state = self.folder, "O"
            case "lock" | "already" | "give-up":
                if name == "give-up":
                    self.now = max(self.now, d.elects_since + ELECTION + 0.1)
                self.try_life(d)
                if self.happened == [] and d.woke:  # the first look at a late hour is a WAKE
                    self.try_life(d)
                return
            case "check" | "reopen":
                same = d.folder == self.folder
                if d.election.locked(same) is WON:
                    name, d.state = "check", "C"
                else:
                    d.unlock()
                    name, d.state = "reopen", "E"
            case "publish" | "enoent":
                name = self.publish(d)
            case "accept" | "going":
                before = {p[1] for p in self.world.backlog if p[0] == d.slot}
                (who,) = before - {p[1] for p in after.backlog if p[0] == d.slot}
                name = self.let_in(d, self.clients[who])
            case "idle":
                assert d.machine.wake_at is not None
                self.now = max(self.now, d.machine.wake_at)
                return self.tick(d)
            case "RETIRE":
                d.state = "V"
            case "close":
                d.hang_up()
                d.state = {"X": "Y", "V": "H"}[d.state]
            case "unlock":
                d.unlock()
                d.state = "G"
                d.post(ev.Retire())
            case "drop":
                for c in list(d.connections):
                    d.lost(c)
            case "ghost-exit":
                if not d.leaving:
                    self.now += VETO_PAUSE
                    d.post(ev.Tick())
                assert d.leaving, "a ghost stays for nobody"
                d.end()
            case "exit" | "dead":
                d.end()
            case "reap":
                self.daemons[d.slot] = None
            case "KILL-daemon":
                if after.daemons[d.slot][2] == d.listening:  # the kernel drops LIFE first, or the listener
                    d.unlock()
                else:
                    d.hang_up()
                d.state = "K"
            case _:
                raise AssertionError(name)
        self.was(name, d.slot)

    def try_life(self, d: Daemon) -> None:
        """A candidate's turn in `elect`."""
        assert d.folder is not None
        if d.folder not in self.life:
            self.life[d.folder] = d
            d.state = "L"
            return self.was("lock", d.slot)
        # PING goes by the name "sock" in the folder that the candidate has opened.
        holder = self.sock if d.folder == self.folder and self.sock and self.sock.state == "S" else None
        step = d.election.busy(holder is not None and holder.answer("PING") == ["PONG"], self.now)
        if step in (WAIT, WAKE):
            doubts = not d.woke and self.now > d.elects_since + DOUBT
            assert (step is WAKE) == doubts, "SIGCONT comes once, and not at once"
            d.woke |= doubts
            return self.was(None, d.slot)
        assert step in (ALREADY, GIVE_UP)
        assert step is ALREADY or self.now > d.elects_since + ELECTION, "a candidate gave up before its time"
        d.verdict = "ALREADY" if step is ALREADY else "ERR"
        d.end()
        self.was("already" if step is ALREADY else "give-up", d.slot)

    def publish(self, d: Daemon) -> str:
        if not d.has_names:
            d.unlock()
            d.state = "E"
            d.elect()
            return "enoent"
        self.sock, d.listening, d.verdict, d.state = d, True, "READY", "S"
        d.serve()
        return "publish"

    def let_in(self, d: Daemon, c: Client) -> str:
        d.backlog.remove(c)
        said = d.answer("HELLO", c)
        if said == ["WELCOME"]:
            c.state = "attached"
            c.let_go()
            return "accept"
        assert said == ["GOING"]
        c.ask(lambda: c.attempt.busy(errors.Unavailable("")))
        return "going"

    def tick(self, d: Daemon) -> None:
        d.post(ev.Tick())
        self.was(None, d.slot)

    def _leave(self, d: Daemon) -> None:
        """`Daemon._leave`, up to its decision."""
        d.leaving = False
        if d.is_at_door:
            d.post(ev.ExitVetoed())
            self.was(None, d.slot)
        else:
            d.state = "X"
            self.was("idle", d.slot)

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        """Some way into a scene: by chance alone, few examples would get far."""
        words = data.draw(st.sampled_from(self.scenes)).split()
        self.play(" ".join(words[: data.draw(st.integers(0, len(words)))]))

    # What the model does not see ------------------------------------------------------------------------------
    def among(self, states: str) -> list[int]:
        return [d.slot for d in self.daemons if d is not None and d.state in states]

    def unseen(self, what: str, slot: int = 0) -> None:
        self.is_sound = False
        d = self.daemons[slot]
        if what == "night":
            self.now += 40_000.0  # asleep: whatever is due by then comes late
        elif what == "look":  # a candidate's turn
            assert d is not None
            self.try_life(d)
        elif what == "tick":  # perhaps out of turn
            assert d is not None
            self.tick(d)
        elif what == "stop":
            assert d is not None
            if not d.connections:  # else it is refused
                d.post(ev.Retire())
                self.was(None, slot)
        self.is_sound = True

    @rule(seconds=st.sampled_from([0.01, 0.5, 4.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def night(self) -> None:
        self.unseen("night")

    @precondition(lambda self: self.among("O"))
    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        self.unseen("look", data.draw(st.sampled_from(self.among("O"))))

    @precondition(lambda self: self.among("S"))
    @rule(data=st.data(), what=st.sampled_from(["tick", "stop"]))
    def tick_or_stop(self, data: st.DataObject, what: str) -> None:
        self.unseen(what, data.draw(st.sampled_from(self.among("S"))))

    @precondition(lambda self: self.progress)
    @rule(data=st.data(), steps=st.integers(1, 12))
    def go_on(self, data: st.DataObject, steps: int) -> None:
        """Some steps without faults, so that examples get far."""
        for _ in range(steps):
            if self.progress:
                self.do(*data.draw(st.sampled_from(self.progress)))

    # Liveness -------------------------------------------------------------------------------------------------
    def teardown(self) -> None:
        """L1: from here on without faults, everybody who takes a step when there is one, every client is served."""
        if not self.is_sound:
            return
        spawned = sum(c.spawns for c in self.clients)
        for _ in range(ROUNDS):
            if all(str(c) in "DF" or (str(c) == "A" and c.peer and c in c.peer.connections) for c in self.clients):
                return
            for kind in (OF_CLIENT, OF_DAEMON):
                for who in range(MODEL.slots):
                    if steps := [step for step in self.progress if step[1] == who and step[0] in kind]:
                        self.now += 0.01
                        self.do(*steps[0])
        raise AssertionError(f"L1: not served, after {sum(c.spawns for c in self.clients) - spawned} more starts: {self.world}")

    def play(self, trace: str) -> None:
        """Takes the steps of `trace`: names of events, each with `:` and whose it is, and what `unseen` knows."""
        for word in trace.split():
            name, _, who = word.partition(":")
            if name not in EVENTS:
                self.unseen(name, int(who or 0))
                continue
            steps = [step for step in self.enabled.get(name, ()) if step[0] == int(who or 0)]
            assert steps, f"the trace is wrong: no {word} in {self.world}"
            self.do(name, *steps[0])


def _as_rule(name: str) -> Any:
    def act(self: Twin, data: st.DataObject) -> None:
        steps = self.enabled[name]
        self.do(name, *(steps[0] if len(steps) == 1 else data.draw(st.sampled_from(steps))))

    act.__name__ = name.replace("-", "_")

    def may(self: Twin) -> bool:
        steps = self.enabled.get(name, ())
        return len(steps) > (name == "KILL-client")  # somebody has to be left, or nothing happens any more

    return precondition(may)(rule(data=st.data())(act))


for _name in EVENTS:
    setattr(Twin, f"event_{_name.replace('-', '_')}", _as_rule(_name))
