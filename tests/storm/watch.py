"""Looks at a world while the storm goes on: invariant S6, one engine for a model, a socket that is never taken away."""

from __future__ import annotations

import os
import time
from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from llm_daemon.daemon.process import ENGINE_TAG

ORPHAN = 1.0  # seconds, invariant S6
BEAT = 0.2  # seconds between two looks


@dataclass(frozen=True)
class Process:
    pid: int
    kind: str  # daemon, keeper, engine (all of its tree)
    parent: int
    group: int
    born: int  # clock ticks since boot: with the pid, its identity
    argv: tuple[str, ...]
    tag: str


def processes(runtime: Path) -> list[Process]:
    """Daemons and candidates, keepers and engine trees that work in this runtime folder, also when it was deleted."""
    return [found for entry in os.listdir("/proc") if entry.isdigit() and (found := _look(int(entry), str(runtime)))]


def _look(pid: int, runtime: str) -> Process | None:
    try:
        argv = tuple(os.fsdecode(part) for part in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1])
        program = next((os.path.basename(part) for part in argv[3:4]), "")
        kind = {"boot": "daemon", "keeper": "keeper", "_fake_server": "engine"}.get(program.partition(".")[0], "")
        if not kind or not os.readlink(f"/proc/{pid}/cwd").startswith(runtime):
            return None
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if kind != "daemon" else []
    except OSError:
        return None
    head = f"{ENGINE_TAG}=".encode()
    tag = next((os.fsdecode(part[len(head) :]) for part in environ if part.startswith(head)), "")
    return Process(pid, kind, int(fields[1]), int(fields[2]), int(fields[19]), argv, tag)


@dataclass
class Watch:
    """Call `look` several times a second; `broken` fills with what should never be."""

    runtime: Path
    broken: list[str] = field(default_factory=list)
    oldest: float = 0.0  # seconds, of any orphan
    pids: list[int] = field(default_factory=list)
    published: int | None = None  # inode of the runtime folder, once there was a socket in it
    excused: set[int] = field(default_factory=set)  # pids of what a double kill left, at the last look
    _age: dict[tuple[int, int], float] = field(default_factory=dict)  # seconds since an orphan was first seen
    _looked: float = 0.0
    _told: set[tuple[int, int]] = field(default_factory=set)
    _daemon_of: dict[str, int] = field(default_factory=dict)  # tag -> daemon
    _twins: set[tuple[int, ...]] = field(default_factory=set)

    def look(self, both: Set[int]) -> None:
        """`both`: daemons that were killed together with a keeper, and what they left: it stays until the next sweep."""
        now, found = time.monotonic(), processes(self.runtime)
        self.pids = [p.pid for p in found]
        daemons = {p.pid for p in found if p.kind == "daemon"}
        keepers = {p.tag: p for p in found if p.kind == "keeper"}
        with suppress(ValueError, IndexError):
            self._daemon_of |= {tag: int(p.argv[4]) for tag, p in keepers.items()}
        orphans = {}
        for p in found:
            if p.kind == "keeper" and self._daemon_of.get(p.tag) not in daemons:
                orphans[p.pid, p.born] = p
            elif p.kind == "engine" and p.tag not in keepers:
                orphans[p.pid, p.born] = p
        # A look that comes late, because the machine stood still, counts as one step: they had no chance to end either.
        passed, self._looked = min(now - self._looked, 2 * BEAT), now
        self._age = {one: self._age[one] + passed if one in self._age else 0.0 for one in orphans}
        # A keeper may have been killed before we ever saw whose it was: then its engine's pid must do.
        self.excused = {p.pid for p in orphans.values() if self._daemon_of.get(p.tag, p.pid) in both or p.pid in both}
        for one, p in orphans.items():
            age = self._age[one]
            self.oldest = max(self.oldest, age)
            if age > ORPHAN and one not in self._told and p.pid not in self.excused:
                self._told.add(one)
                self.broken.append(f"S6: {p.kind} {p.pid} is an orphan for {age:.1f} s: {' '.join(p.argv[3:6])}")
        self._look_for_twins(found, keepers)
        self._look_for_socket()

    def _look_for_socket(self) -> None:
        """The socket is only ever replaced (rule 4 of the design): where it vanishes, a daemon serves and nobody finds it."""
        try:
            inode = self.runtime.stat().st_ino
        except OSError:
            self.published = None
            return
        if (self.runtime / "sock").exists():
            self.published = inode
        elif self.published == inode:
            self.published = None
            self.broken.append("S2: the published socket was taken away")

    def _look_for_twins(self, found: list[Process], keepers: dict[str, Process]) -> None:
        serving: dict[tuple[int, str], list[int]] = {}
        for p in found:
            if p.kind == "engine" and p.group == p.pid and p.tag in keepers and p.parent == keepers[p.tag].pid:
                serving.setdefault((self._daemon_of.get(p.tag, 0), p.argv[4]), []).append(p.pid)
        twins = {tuple(sorted(pids)) for pids in serving.values() if len(pids) > 1}
        self.broken += [f"two engines of one daemon serve one model: {pids}" for pids in twins & self._twins]
        self._twins = twins  # told when seen twice: one look is not one moment
