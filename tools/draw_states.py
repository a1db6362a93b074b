"""Draws the state diagrams of docs/reference/lifecycle.md by running the code, so that they cannot say anything else.

    python tools/draw_states.py            # print them (Mermaid)
    python tools/draw_states.py --write    # put them between the markers of the page

Two diagrams come from `core.machine.Machine`, driven breadth-first by every event there is; two from the pure halves of
client and candidate in `core.rendezvous`; two from the exhaustive model of the whole protocol, tests/lifecycle_model.py.
"""

from __future__ import annotations

import copy
import pickle
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, get_args

from llm_daemon import errors
from llm_daemon.core import events as ev, rendezvous
from llm_daemon.core.instance import State
from llm_daemon.core.lanes import Stage
from llm_daemon.core.leases import Leases
from llm_daemon.core.machine import FAILED_SHOWN, Machine
from llm_daemon.spec import Artifact, Spec, Wish

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.lifecycle_model import FAULT, Model  # noqa: E402

PAGE = ROOT / "docs" / "reference" / "lifecycle.md"
OUTSIDE = "[*]"  # Mermaid's name for where everything begins and ends
Edges = dict[tuple[str, str], set[str]]


def draw(edges: Edges, names: dict[str, str]) -> str:
    """One diagram.  `names`: state -> what it is called, in the order to list them; others go by their own name."""
    order = [OUTSIDE, *names]
    seen = {state for edge in edges for state in edge}
    lines = ["stateDiagram-v2"]
    lines += [f'    state "{text}" as {state}' for state, text in names.items() if state in seen and text != state]
    for (a, b), labels in sorted(edges.items(), key=lambda e: [order.index(state) for state in e[0]]):
        lines.append(f"    {a} --> {b}: {', '.join(_merged(labels))}")
    return "\n".join(lines)


def _merged(labels: set[str]) -> list[str]:
    """An event that does the same with and without its option is named once, without it."""
    names = [label.partition("(")[0] for label in labels]
    return sorted({name if names.count(name) > 1 else label for name, label in zip(names, labels, strict=True)})


# The daemon's core -------------------------------------------------------------------------------------------------
SPEC = Spec(Wish("m"), Artifact("file", "/m", "m"), Wish("m", engine="e", context=1, parallel=1))
DIED = errors.EngineError("died", code="engine_died").to_wire()
BUDGET = 2  # bytes of memory: enough for the one model, or not
# What the fields of events may hold: one client, one model, two requests for the one slot of its engine.
VALUES: dict[str, tuple[Any, ...]] = {
    "lease": ("a",), "request": (1,), "spec": (SPEC,), "keep_alive": (None,), "ticket": ("t", "u"), "info": ({},),
    "slots": (1,), "error": (None, DIED), "force": (False, True), "served": (False, True),
    "lane": ("regular",), "supersede": (None,), "deadline": (None,),
    "need": (1, BUDGET + 1),
}  # fmt: skip
OPTIONS = [name for name, values in VALUES.items() if values[1:] and not values[0]]
INSTANCE = {state.value: state.value for state in State}
DAEMON = {
    "lingering": "no reason to live, for linger at most",
    "held": "lease, ticket or engine",
    "retiring": "retiring, still held",
    "free": "retiring, free to go",
    "leaving": "told to leave",
}


@dataclass
class World:
    """A machine with the shell it may believe in: no Up without a Start, no Left without a Joined."""

    machine: Machine = field(
        default_factory=lambda: Machine(
            Leases.born(1.0, 0.0, grace=1.0), ttl=1.0, leased_ttl=2.0, queue_limit=1, max_overtake=1.0, budget=BUDGET
        )
    )
    now: float = 0.0
    leaving: bool = False  # it said Exit, and the shell looks at the door

    def key(self) -> object:
        """Worlds of one key count as one: of times it only matters what is due."""

        def when(moment: float | None) -> int | None:
            return None if moment is None else int(moment > self.now)

        m = self.machine
        its = [
            (
                it.state, bool(it.leases), bool(it.waiters), it.lanes.waiting, len(it.lanes.running),
                it.lanes.aborting, min(it.failures, 2), when(it.retry_at), when(it.retry_at + FAILED_SHOWN), when(it.abandon_at),
                when(m._closes_at(it)), it.need, bool(it.leaves_for),
            )
            for it in m.instances.values()
        ]  # fmt: skip
        return self.leaving, bool(m.leases.holders), m.leases.retiring, when(m.leases.exit_at), *its

    def moments(self) -> list[float]:
        """Now, and when something is due by time alone."""
        if self.leaving:
            return [self.now]
        later = [it.retry_at + more for it in self.machine.instances.values() for more in (0, FAILED_SHOWN)]
        later += [] if self.machine.wake_at is None else [self.machine.wake_at]
        return [self.now, *sorted({moment for moment in later if moment > self.now})]

    def events(self) -> Iterator[ev.Event]:
        if self.leaving:  # between the look at the door and the end nothing else can happen
            yield ev.ExitVetoed()
            return
        for kind in get_args(ev.Event):
            values = {**VALUES, "instance": tuple(self.machine.instances)}
            for combination in product(*(values[name] for name in kind.__struct_fields__)):
                if self.is_possible(event := kind(*combination)):
                    yield event

    def is_possible(self, event: ev.Event) -> bool:
        m = self.machine
        it = m.instances.get(getattr(event, "instance", ""))
        match event:
            case ev.Joined(lease):
                return lease not in m.leases.holders
            case ev.Left(lease):
                return lease in m.leases.holders
            case ev.Want(lease):
                return lease in m.leases.holders and not any(it.waiters for it in m.instances.values())
            case ev.Arrived(ticket):
                return ticket == next((t for t in VALUES["ticket"] if t not in m.tickets), None)  # which one makes no difference
            case ev.Ended(ticket) | ev.Cancel(ticket):
                return ticket in m.tickets and getattr(event, "error", DIED) is not None
            case ev.Aborting(ticket):
                return ticket in m.tickets and m.tickets[ticket].stage is Stage.RUNNING
            case ev.Weighed():
                return it is not None and (it.has_process or it.state is State.QUEUED)
            case ev.Up():
                return it is not None and it.state in (State.STARTING, State.STOPPING)  # also late, when the Halt is under way
            case ev.Down(_, error):
                return it is not None and (it.has_process if error else it.state is State.STOPPING)
            case ev.ExitVetoed():
                return False
            case _:
                return True

    @cached_property
    def frozen(self) -> bytes:
        return pickle.dumps(self.machine)  # copies from here cost a third of deepcopy's

    def after(self, event: ev.Event, now: float) -> World:
        machine: Machine = pickle.loads(self.frozen)
        return World(machine, now, any(isinstance(command, ev.Exit) for command in machine.handle(event, now)))

    def instance(self) -> str:
        return next((it.state.value for it in self.machine.instances.values()), OUTSIDE)

    def daemon(self) -> str:
        if self.leaving:
            return "leaving"
        leases = self.machine.leases
        if leases.retiring:
            return "retiring" if leases.exit_at is None else "free"
        return "held" if leases.exit_at is None else "lingering"


def explore_machine() -> tuple[Edges, Edges]:
    """What becomes of an instance, and of the daemon, by any event at any moment."""
    instance: Edges = {}
    daemon: Edges = {(OUTSIDE, "lingering"): {"born"}, ("leaving", OUTSIDE): {"nobody at the door"}}
    views: list[tuple[Edges, Callable[[World], str]]] = [(instance, World.instance), (daemon, World.daemon)]
    start = World()
    known, todo = {start.key()}, deque([start])
    while todo:
        world = todo.popleft()
        for now in world.moments():
            ticked = world.after(ev.Tick(), now)
            for event in world.events():
                after = world.after(event, now)
                for edges, view in views:
                    if (a := view(world)) != (b := view(after)):
                        # What a mere Tick does at that moment is time's doing, whatever event brought it about.
                        by_time = b == view(ticked) and not world.leaving
                        edges.setdefault((a, b), set()).add("Tick" if by_time else label(event))
                if after.key() not in known:
                    known.add(after.key())
                    todo.append(after)
    return instance, daemon


def label(event: ev.Event) -> str:
    """The event's name, with the option that it comes with or without."""
    name = type(event).__name__
    for option in OPTIONS:
        if hasattr(event, option):
            return f"{name}({'' if getattr(event, option) else 'no '}{option})"
    return name


# The start protocol ------------------------------------------------------------------------------------------------
CLIENT = {
    "I": "looks for a daemon",
    "Q": "in a daemon's backlog",
    "N": "found none, wants START",
    "T": "looks again",
    "J": "in a backlog, with START",
    "M": "must spawn",
    "W": "waits for the verdict",
    "A": "attached",
    "D": "detached",
}
CANDIDATE = {
    "Z": OUTSIDE,
    "E": "candidate",
    "O": "has the folder open",
    "L": "holds LIFE",
    "C": "holds LIFE of this folder",
    "S": "serves",
    "X": "decided to leave",
    "Y": "listener closed",
    "V": "told to retire",
    "H": "retiring, listener closed",
    "G": "ghost, serves its last leases",
}
KILLED = frozenset("FK")


def explore_model() -> tuple[Edges, Edges]:
    """What one client and one daemon go through in the exhaustive model; kills, possible everywhere, are left out."""
    client: Edges = {(OUTSIDE, "I"): {"attach"}}
    daemon: Edges = {}
    # Together they show all that two clients and two daemons with every fault do, which takes ten times as long.
    for model, faults in ((Model(1, 2), None), (Model(2, 1), None), (Model(2, 2), {"no-START"})):
        known, todo = {model.initial}, deque([model.initial])
        while todo:
            world = todo.popleft()
            for name, kind, after in model.steps(world):
                if kind == FAULT and faults is not None and name not in faults:
                    continue
                if after not in known:
                    known.add(after)
                    todo.append(after)
                if not name.startswith("KILL"):
                    _note(client, name, zip(world.clients, after.clients, strict=True), CLIENT)
                    _note(daemon, name, zip(world.daemons, after.daemons, strict=True), CANDIDATE)
    return client, daemon


def _note(edges: Edges, name: str, pairs: Iterable[tuple[Any, Any]], known: dict[str, str]) -> None:
    for (a, *_), (b, *_) in pairs:
        if a != b and not KILLED & {a, b}:
            shown = [OUTSIDE if known[state] == OUTSIDE else state for state in (a, b)]
            edges.setdefault((shown[0], shown[1]), set()).add(name)


STEPS = {
    "connect": "connect",
    "start": "take START",
    "again": "connect again, with START",
    "spawn": "spawn",
    "raise": "raises",
}


def explore_attempt() -> Edges:
    """The client's search as it is coded.  Which answers a step may have is the shell's knowledge (client/start.py)."""

    def view(step: str, attempt: rendezvous.Attempt) -> str:
        if step == rendezvous.CONNECT:
            return "again" if attempt.holds_start else "connect"
        return {rendezvous.TAKE_START: "start", rendezvous.SPAWN: "spawn"}[step]

    busy, died = errors.Unavailable("leaving"), errors.Bug("died")
    late = rendezvous.START_PATIENCE + 1
    answers: dict[str, list[tuple[str, Callable[[rendezvous.Attempt], str]]]] = {
        rendezvous.CONNECT: [("down", lambda a: a.down()), ("busy", lambda a: a.busy(busy))],
        rendezvous.TAKE_START: [
            ("start_taken", lambda a: a.start_taken()),
            ("start_gone", lambda a: a.start_gone()),
            ("start_busy(briefly)", lambda a: a.start_busy(0.0)),
            ("start_busy(for long)", lambda a: a.start_busy(late)),
        ],
        rendezvous.SPAWN: [
            ("verdict(no error)", lambda a: a.verdict(None, "READY")),
            ("verdict(error)", lambda a: a.verdict(died, "ERR")),
        ],
    }
    edges: Edges = {
        (OUTSIDE, "connect"): {"ensure"},
        ("connect", OUTSIDE): {"WELCOME"},
        ("again", OUTSIDE): {"WELCOME"},
        ("connect", "raise"): {"check(deadline)"},
        ("raise", OUTSIDE): {"error"},
    }
    first = rendezvous.Attempt(deadline=late)
    known, todo = set(), deque([(rendezvous.CONNECT, first)])
    while todo:
        step, attempt = todo.popleft()
        for name, answer in answers[step]:
            after = copy.copy(attempt)
            try:
                then = answer(after)
            except errors.LlmDaemonError:
                edges.setdefault((view(step, attempt), "raise"), set()).add(name)
                continue
            edges.setdefault((view(step, attempt), view(then, after)), set()).add(name)
            if (key := (then, *sorted((k, repr(v)) for k, v in vars(after).items()))) not in known:
                known.add(key)
                todo.append((then, after))
    return edges


ELECTION = {
    "lock": "asks for LIFE",
    **{
        step.replace(" ", "_"): step
        for step in (rendezvous.WAIT, rendezvous.WAKE, rendezvous.REOPEN, rendezvous.ALREADY, rendezvous.GIVE_UP)
    },
    rendezvous.WON: "holds LIFE",
}


def explore_election() -> Edges:
    """The candidate's way to LIFE as it is coded."""
    edges: Edges = {
        (OUTSIDE, "lock"): {"candidate"},
        ("wait", "lock"): {"again"},
        ("wake", "lock"): {"SIGCONT"},
        ("reopen", "lock"): {"open"},
    }
    election = rendezvous.Election(now=0.0)
    for name, then in (
        ("busy(PONG)", election.busy(True, 0.0)),
        ("busy(no PONG)", election.busy(False, 0.0)),
        ("busy(in doubt)", election.busy(False, rendezvous.DOUBT + 0.1)),
        ("busy(too long)", election.busy(False, rendezvous.ELECTION + 1)),
        ("locked(this folder)", election.locked(True)),
        ("locked(a deleted folder)", election.locked(False)),
    ):
        edges.setdefault(("lock", then.replace(" ", "_")), set()).add(name)
    return edges


def diagrams() -> dict[str, str]:
    """Every diagram of the page, by the name in its markers."""
    instance, daemon = explore_machine()
    client, candidate = explore_model()
    return {
        "client": draw(client, CLIENT),
        "candidate": draw(candidate, {k: v for k, v in CANDIDATE.items() if v != OUTSIDE}),
        "attempt": draw(explore_attempt(), STEPS),
        "election": draw(explore_election(), ELECTION),
        "daemon": draw(daemon, DAEMON),
        "instance": draw(instance, INSTANCE),
    }


def placed(page: str, drawn: dict[str, str]) -> str:
    """The page with each diagram between its markers.  Raises KeyError for a marker that no diagram belongs to."""

    def block(found: re.Match[str]) -> str:
        return f"{found[1]}\n```mermaid\n{drawn[found[2]]}\n```\n{found[3]}"

    return re.sub(r"(<!-- states: (\w+) -->).*?(<!-- /states -->)", block, page, flags=re.DOTALL)


def main() -> None:
    drawn = diagrams()
    if "--write" in sys.argv:
        PAGE.write_text(placed(PAGE.read_text(), drawn))
    else:
        print("\n\n".join(f"%% {name}\n{text}" for name, text in drawn.items()))


if __name__ == "__main__":
    main()
