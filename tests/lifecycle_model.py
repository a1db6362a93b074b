"""The start, attach and exit protocol as an exhaustive model: every order of steps and faults, and what must never happen.

Clients are (state, daemon): I idle, Q in a daemon's backlog, N wants START, T has it or goes on without (looks again
first), J in a backlog by that second look, M must spawn, W waits for a verdict, A attached, D detached, F killed, B told
"it is up" and found nothing; R is the client of mutant M1, which trusts the verdict.  Daemons are (state, folder,
listening, verdict): E electing, O has the folder open, L holds LIFE, C knows that the folder is still the one, S serving,
X decided to leave, Y listener closed, V and H retiring, G a ghost that serves its last leases, K being killed, Z free.
A world is (clients, daemons, backlog, leases, folder, published daemon, holder of START).

`tests/lifecycle_twin.py` drives the product's own machines beside it, step by step.

Run as a script for the large instance: `python tests/lifecycle_model.py 2 3 [M1 ...] [nofault]`.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

Client = tuple[str, int | None]
Daemon = tuple[str, int | None, bool, str | None]
Pair = tuple[int, int]  # (daemon, client)
FREE: Daemon = ("Z", None, False, None)
HOLDS_LIFE = frozenset("LCSXYVHK")
PROGRESS, CHOICE, FAULT = 0, 1, 2
MUTANTS = {
    "M1": "the verdict is trusted, and a busy lock means leaving",
    "M2": "the socket is unlinked after the lock is gone",
    "M3": "the lock object is unlinked at exit, and its inode not looked at again",
    "M4": "the decision to leave does not look at leases",
    "M6": "names are absolute: a deleted folder lets an old candidate overwrite a new daemon",
}


class World(NamedTuple):
    clients: tuple[Client, ...]
    daemons: tuple[Daemon, ...]
    backlog: tuple[Pair, ...] = ()
    leases: tuple[Pair, ...] = ()
    folder: int = 0  # inode of the runtime folder
    sock: int | None = None  # whose socket the path leads to
    start: int | None = None  # the client that holds START


Step = tuple[str, int, World]


def without(pairs: tuple[Pair, ...], gone: Callable[[Pair], bool]) -> tuple[Pair, ...]:
    return tuple(p for p in pairs if not gone(p))


@dataclass(frozen=True)
class Model:
    """`mutants` break the protocol on purpose; without `faults` nothing is killed, deleted or timed out."""

    clients: int
    slots: int  # daemons at once; more than clients, or ghosts use them up
    mutants: frozenset[str] = frozenset()
    faults: bool = True

    @property
    def initial(self) -> World:
        return World((("I", None),) * self.clients, (FREE,) * self.slots)

    def steps(self, w: World) -> Iterator[Step]:
        for i in range(self.clients):
            yield from self.of_client(w, i)
        for j in range(self.slots):
            yield from self.of_daemon(w, j)
        if self.faults and w.folder < 1 and "M3" not in self.mutants:
            yield "CLEAN", FAULT, w._replace(folder=1, sock=None, start=None)  # somebody removes the runtime folder

    def of_client(self, w: World, i: int) -> Iterator[Step]:
        state, d = w.clients[i]

        def to(new: str, daemon: int | None = None, **more: Any) -> World:
            return w._replace(clients=(*w.clients[:i], (new, daemon), *w.clients[i + 1 :]), **more)

        freed = None if w.start == i else w.start
        if state in "ITR":
            if w.sock is not None and w.daemons[w.sock][2]:
                queue = "J" if state == "T" else "Q"
                yield "connect", PROGRESS, to(queue, w.sock, backlog=tuple(sorted((*w.backlog, (w.sock, i)))))
            elif state == "R":
                yield "broken", PROGRESS, to("B")
            else:
                yield "refused", PROGRESS, to("N" if state == "I" else "M")
        elif state == "M":
            free = [j for j in range(self.slots) if w.daemons[j] == FREE and all(c[1] != j for c in w.clients)]
            if free:
                j = free[0]
                yield "spawn", PROGRESS, to("W", j, daemons=(*w.daemons[:j], ("E", None, False, None), *w.daemons[j + 1 :]))
        elif state == "N":
            yield ("START", PROGRESS, to("T", start=i)) if w.start is None else ("backoff", PROGRESS, to("I"))
            if self.faults:
                yield "no-START", FAULT, to("T")  # busy for too long, or no lock can be had there: go on without
                yield "no-folder", FAULT, to("I")  # deleted between two steps
        elif d is not None:
            if state in "QJ":
                if (d, i) not in w.backlog:
                    yield "reset", PROGRESS, to("N" if state == "Q" else "M")
                elif self.faults:  # stopped, or too busy: it hangs up and begins again, and never starts another
                    yield "no-answer", FAULT, to("I", backlog=without(w.backlog, lambda p: p == (d, i)), start=freed)
            if state == "W" and (w.daemons[d][3] or w.daemons[d][0] == "Z"):
                yield "verdict", PROGRESS, to("R" if "M1" in self.mutants else "I", start=freed)
            if state == "A":
                if (d, i) not in w.leases:
                    yield "eof", PROGRESS, to("I")
                yield "detach", CHOICE, to("D", leases=without(w.leases, lambda p: p == (d, i)))
        if state == "D":
            yield "again", CHOICE, to("I")
        if self.faults and state not in "DFB":
            left: dict[str, Any] = {
                "backlog": without(w.backlog, lambda p: p[1] == i),
                "leases": without(w.leases, lambda p: p[1] == i),
            }
            yield "KILL-client", FAULT, to("F", start=freed, **left)

    def of_daemon(self, w: World, j: int) -> Iterator[Step]:
        state, folder, listening, verdict = w.daemons[j]

        def to(*new: object, **more: Any) -> World:
            return w._replace(daemons=(*w.daemons[:j], new, *w.daemons[j + 1 :]), **more)  # type: ignore[arg-type]

        def mine(pair: Pair) -> bool:
            return pair[0] == j

        queued = [p for p in w.backlog if mine(p)]
        leased = any(map(mine, w.leases))
        unpublished = None if w.sock == j else w.sock  # a socket nobody listens on is like none
        if state == "E":
            yield "open", PROGRESS, to("O", w.folder, False, None)
        elif state == "O":
            if not any(x[1] == folder and x[0] in HOLDS_LIFE for x in w.daemons):
                yield "lock", PROGRESS, to("L", folder, False, None)
            elif "M1" in self.mutants or (folder == w.folder and w.sock is not None and w.daemons[w.sock][0] == "S"):
                yield "already", PROGRESS, to("Z", None, False, "ALREADY")  # busy, and it answered PING
            elif self.faults:
                yield "give-up", FAULT, to("Z", None, False, "ERR")  # its holder neither answers nor goes
        elif state == "L":
            if folder == w.folder or "M3" in self.mutants:
                yield "check", PROGRESS, to("C", folder, False, None)
            else:
                yield "reopen", PROGRESS, to("E", None, False, None)
        elif state == "C":
            if folder == w.folder or self.mutants & {"M3", "M6"}:
                yield "publish", PROGRESS, to("S", folder, True, "READY", sock=j)
            else:
                yield "enoent", PROGRESS, to("E", None, False, None)  # names are relative: a deleted folder has none
        elif state == "S":
            deposed = folder != w.folder
            for p in queued:
                client = (*w.clients[: p[1]], ("I", None) if deposed else ("A", j), *w.clients[p[1] + 1 :])
                leases = w.leases if deposed else tuple(sorted((*w.leases, p)))
                rest = without(w.backlog, lambda r, p=p: r == p)  # type: ignore[misc]
                start = None if w.start == p[1] else w.start
                after = w._replace(clients=client, backlog=rest, leases=leases, start=start)
                yield "going" if deposed else "accept", PROGRESS, after
            if not queued and (not leased or "M4" in self.mutants):
                yield "idle", CHOICE, to("X", folder, True, verdict)
            # A newer client's word, or `stop --force`; a deposed daemon looks at itself now and then, and goes this way.
            yield "RETIRE", PROGRESS if deposed else CHOICE, to("V", folder, True, verdict)
        elif state in "XV":
            closed = to({"X": "Y", "V": "H"}[state], folder, False, verdict, backlog=without(w.backlog, mine), sock=unpublished)
            yield "close", PROGRESS, closed
        elif state == "H":
            yield "unlock", PROGRESS, to("G", None, False, verdict)
        elif state == "G" and leased:  # deposed, or forced: the clients shall find the next daemon
            yield "drop", CHOICE, to("G", None, False, verdict, leases=without(w.leases, mine))
        elif state == "G":
            yield "ghost-exit", PROGRESS, to("Z", None, False, verdict)
        elif state == "Y":
            gone = {"backlog": without(w.backlog, mine), "leases": without(w.leases, mine)}
            if "M2" in self.mutants:
                yield "exit", PROGRESS, to("U", None, False, verdict, leases=gone["leases"])
            else:
                inode = min(2, w.folder + ("M3" in self.mutants))
                yield "exit", PROGRESS, to("Z", None, False, verdict, **gone, folder=inode, sock=unpublished)
        elif state == "U":
            yield "late-unlink", PROGRESS, to("Z", None, False, verdict, sock=None)
        elif state == "K":
            gone = {"backlog": without(w.backlog, mine), "leases": without(w.leases, mine)}
            yield "dead", PROGRESS, to("Z", None, False, verdict, **gone, sock=unpublished)
        elif state == "Z" and verdict and ("W", j) not in w.clients:
            yield "reap", PROGRESS, to(*FREE)
        if self.faults and state in "EOLCSXYVHG":  # SIGKILL; the kernel may drop LIFE or the listener first
            yield "KILL-daemon", FAULT, to("K", None, listening, verdict)
            if listening:
                yield "KILL-daemon", FAULT, to("K", folder, False, verdict, backlog=without(w.backlog, mine), sock=unpublished)


def violation(name: str, w: World) -> str | None:
    """Which of the invariants S1 to S5 this world breaks, reached by the step `name`."""
    for inode in {d[1] for d in w.daemons} - {None}:
        if sum(d[1] == inode and d[0] in HOLDS_LIFE for d in w.daemons) > 1:
            return "S1: two holders of LIFE"
    if name == "publish" and any(j != w.sock and d[0] == "S" and d[1] == w.folder for j, d in enumerate(w.daemons)):
        return "S2: published over a living daemon"
    if any(d[0] in "XY" and any(p[0] == j for p in w.leases) for j, d in enumerate(w.daemons)):
        return "S3: a voluntary exit while a lease exists"
    if any(c[0] == "B" for c in w.clients):
        return "S4: told it is up, found nothing"
    if w.start is not None and w.clients[w.start][0] not in "TJMW":
        return "S5: START is held by nobody"
    return None


@dataclass(frozen=True)
class Verdict:
    """`broken`: the invariant and the steps that break it; `stuck`: the steps to where a client is never served."""

    states: int
    broken: str | None = None
    stuck: str | None = None


def explore(model: Model) -> Verdict:
    """Breadth first through everything that can happen, then backwards from the worlds in which every client is served."""
    came_from: dict[World, tuple[World, str] | None] = {model.initial: None}
    before: dict[World, list[World]] = {}
    todo = deque([model.initial])

    def path(w: World) -> str:
        steps = []
        while (edge := came_from[w]) is not None:
            w, name = edge
            steps.append(name)
        return " ".join(reversed(steps))

    while todo:
        w = todo.popleft()
        for name, kind, after in model.steps(w):
            if after not in came_from:
                came_from[after] = w, name
                todo.append(after)
            if kind == PROGRESS:
                before.setdefault(after, []).append(w)
            if broken := violation(name, after):
                return Verdict(len(came_from), broken=f"{broken}: {path(w)} {name}")
    served = deque(w for w in came_from if all(_is_served(w, i) for i in range(model.clients)))
    reached = set(served)
    while served:
        for w in before.get(served.popleft(), ()):
            if w not in reached:
                reached.add(w)
                served.append(w)
    stuck = next((w for w in came_from if w not in reached), None)
    return Verdict(len(came_from), stuck=None if stuck is None else path(stuck))


def _is_served(w: World, i: int) -> bool:
    state, d = w.clients[i]
    return state in "DF" or (state == "A" and d is not None and (d, i) in w.leases)


if __name__ == "__main__":
    words = set(sys.argv[3:])
    print(explore(Model(int(sys.argv[1]), int(sys.argv[2]), frozenset(words & set(MUTANTS)), "nofault" not in words)))
