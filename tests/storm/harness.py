"""The storm: real client processes against real daemons that leave, die, are stopped and robbed (design: lifecycle.md 4).

    python -m tests.storm.harness [--seconds 60] [--only leaving,killed] [--mutant M1] [--json FILE]

Linux.  This process is a subreaper: every daemon becomes its child in the end, so that its CPU time is counted exactly.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llm_daemon
from llm_daemon.client import sync
from llm_daemon.daemon.address import reserve
from llm_daemon.errors import LlmDaemonError
from llm_daemon.testing import census
from llm_daemon.testing.world import CONFIG, World

from . import chaos, mutants, report
from .watch import BEAT, Watch

WORKER = Path(__file__).with_name("worker.py")
INSTALLED = Path(llm_daemon.__file__).parent
GRACE = 45.0  # seconds that a worker may need to end
CALM = 25.0  # seconds until all must have gone: a daemon that never saw a client waits 10
LEAVING = "0 0.001 0.005"
STARTING = "dir_opened lock_got ino_checked bound listening renamed accepted start_got keeper_spawned"
KILLS = STARTING + " launcher_forked ready_sent hello_read lease_added welcome_sent idle_decided listener_closed verdict_read"
RAISES = STARTING + " lock_tried keeper_checked"
NO_ROOM = r"No space left|Too many open files|ENOSPC|EMFILE|fault point"


@dataclass(frozen=True)
class Scenario:
    """`acts`: (chaos, seconds between two at least, at most).  `chances`: lines of the fault points' file."""

    name: str
    weight: float = 1.0
    mode: str = "mix"
    workers: int = 4
    lingers: str = LEAVING
    models: float = 0.02  # an engine keeps its daemon for a while: too many, and none leaves
    http: float = 0.05
    kill: float = 0.0
    stop: float = 0.0
    rest: float = 0.02
    chances: str = ""
    acts: tuple[tuple[chaos.Act, float, float], ...] = ()
    model: dict[str, object] = field(default_factory=lambda: {"tokens": ["x"]})
    crowd: int = 200
    nofile: int = 0
    fixed_port: bool = False
    newer: bool = False  # half of the workers are of the next protocol version
    tmpfs: bool = False
    namespace: tuple[str, ...] = ()
    may_tell: str = "(?!)"
    may_lose: bool = False
    by_point: bool = False
    http_may_fail: bool = False
    patience: float = 8.0


def chances(probability: float, points: str, word: str) -> str:
    return "".join(f"{probability} {point} {word}\n" for point in points.split())


PAUSES = chances(0.1, "ino_checked lock_got idle_decided listener_closed ghost_unlocked", "PAUSE 0.03")
ESCAPING: dict[str, object] = {"tokens": ["x"], "grandchild": True, "ignore_sigterm": True, "grace": 0.1}
SCENARIOS = [
    Scenario("steady", 0.5, lingers="3", rest=0.001, models=0.01),
    Scenario("leaving", 1.5),
    Scenario("killed", 1.5, kill=0.05, models=0.3, acts=((chaos.kill_client, 0.2, 1.0),), model=ESCAPING, http_may_fail=True),
    Scenario(
        "points", 1.5, models=0.25, by_point=True, may_tell=NO_ROOM, http_may_fail=True, acts=((chaos.kill_client, 1, 3),),
        chances=chances(0.01, KILLS, "KILL") + chances(0.01, RAISES, "ENOSPC") + chances(0.01, RAISES, "EMFILE")
        + chances(0.03, "*", "PAUSE 0.02"),
    ),
    Scenario(
        "stopped", 1.0, stop=0.05, models=0.4, patience=15,
        acts=((chaos.stop_client, 0.5, 1.5), (chaos.suspend, 3, 6)),
    ),
    Scenario("deleted", 1.0, acts=((chaos.delete, 0.5, 1.5),), may_lose=True, http_may_fail=True),
    Scenario("versions", 1.0, models=0.3, http=0.6, fixed_port=True, newer=True),
    Scenario("elections", 1.0, models=0.05, chances=PAUSES, acts=((chaos.lose_start, 0.005, 0.03), (chaos.kill_client, 0.3, 1))),
    Scenario("crowd", 1.0, mode="crowd", workers=1, models=0.0, http=0.0, patience=15),
    Scenario("forking", 1.0, mode="forking", workers=1),
    Scenario("few_files", 1.0, mode="hoard", models=0.0, nofile=48, may_tell=".", patience=15),
    Scenario("tiny_tmpfs", 0.7, tmpfs=True, acts=((chaos.fill, 0.1, 0.8),), may_tell=NO_ROOM, http_may_fail=True),
    Scenario("namespace", 0.7, mode="group", workers=2, namespace=("unshare", "-Urpf", "--mount-proc", "--kill-child")),
]  # fmt: skip
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


class Storm:
    """One scenario, from its folders to the census."""

    def __init__(self, scenario: Scenario, seconds: float, package: Path | None = None, until_caught: bool = False) -> None:
        self.scenario, self.seconds, self.package, self.until_caught = scenario, seconds, package, until_caught
        self.workers: dict[int, int] = {}
        self.kills: dict[str, int] = {}
        self.cpu = 0.0
        self.dice = random.Random(scenario.name)
        self.stack = ExitStack()

    # What the acts of chaos may see -----------------------------------------------------------------------------
    @property
    def runtime(self) -> Path:
        return self.the_world.runtime

    def world(self) -> list[int]:
        return self.watch.pids

    # Before -----------------------------------------------------------------------------------------------------
    def prepare(self) -> str:
        """Makes the folders; returns why this scenario cannot be had here, or nothing."""
        s = self.scenario
        if s.namespace and subprocess.run([*s.namespace, "true"], capture_output=True).returncode:
            return f"{' '.join(s.namespace[:2])} is not allowed here"
        self.base = Path(tempfile.mkdtemp(prefix="llmd-"))
        if not os.environ.get("STORM_KEEP"):  # for a look at the logs
            self.stack.callback(shutil.rmtree, self.base, ignore_errors=True)
        self.the_world = World(self.base)
        if s.tmpfs:
            room = self.base / "small"
            room.mkdir()
            mount = ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=100", "storm", str(room)]
            if subprocess.run(mount, capture_output=True).returncode:
                return "mount is not allowed here"
            self.stack.callback(subprocess.run, ["umount", "-l", str(room)], check=False)
            self.the_world.runtime = room / "run"
        config = CONFIG.replace("ttl = 30", "ttl = 0")
        if s.fixed_port:
            with reserve() as probe:  # on an address where nobody else wants a port
                config = 'host = "{}"\nport = {}\n'.format(*probe.getsockname()) + config
        self.the_world.config.write_text(config)
        faults = self.base / "faults"
        (faults / "serving").mkdir(parents=True)
        (faults / "log").touch()
        (faults / "chance").write_text(s.chances)
        (self.base / "events").touch()
        (self.base / "m.fake.json").write_text(json.dumps(s.model))
        for name, path in (("RUNTIME_DIR", self.runtime), ("STATE_DIR", self.the_world.state), ("CONFIG", self.the_world.config)):
            os.environ[f"LLM_DAEMON_{name}"] = str(path)
        os.environ |= {"LLM_DAEMON_FAULTS": str(faults), "LLM_DAEMON_LINGER": "0.01"}
        self.watch = Watch(self.runtime)
        self.tally = report.Tally(
            self.base / "events", faults / "log", s.may_tell, s.may_lose, s.by_point, s.patience, kills=self.kills
        )
        self.newer = mutants.patched(INSTALLED, self.base / "newer", "newer") if s.newer else None
        return ""

    def start_worker(self, number: int) -> None:
        s, config = self.scenario, {"id": number, "seed": self.dice.random(), "end": self.end, "package": "", "group": 3}
        package = self.newer if self.newer and number % 2 else self.package
        config |= {name: getattr(s, name) for name in "models http kill stop rest crowd nofile mode".split()}
        config |= {"events": str(self.base / "events"), "model": str(self.base / "m.fake.json"), "package": str(package or "")}
        inside = s.namespace if number == 0 else ()
        if s.mode == "group" and not inside:
            config["mode"] = "mix"
        argv = [*inside, sys.executable, str(WORKER), json.dumps(config)]
        lingers = s.lingers.split()
        words = str(self.base / "words")
        pid = os.posix_spawn(
            shutil.which(argv[0]) or argv[0], argv, {**os.environ, "LLM_DAEMON_LINGER": lingers[number % len(lingers)]},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 1, words, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
        )  # fmt: skip
        self.workers[pid] = number

    # During -----------------------------------------------------------------------------------------------------
    def run(self) -> dict[str, Any]:
        with self.stack:
            if why := self.prepare():
                return {"scenario": self.scenario.name, "skipped": why}
            self.began = time.monotonic()
            self.end = self.began + self.seconds
            try:
                self.rage()
                at_the_end = self.result()
                return at_the_end if self.caught() and self.until_caught else self.settle()
            finally:
                self.end_all()

    def rage(self) -> None:
        s = self.scenario
        due = [(time.monotonic() + self.dice.uniform(low, high), act, low, high) for act, low, high in s.acts]
        held = self.long_lived() if s.name == "steady" else None
        leaks: set[str] = set()
        look = leak_look = 0.0
        for number in range(s.workers):
            self.start_worker(number)
        while (now := time.monotonic()) < self.end + GRACE and self.workers:
            self.reap(restart=now < self.end - 0.5)
            if now > look:
                self.tally.read()
                self.watch.look(self.tally.both)
                look = time.monotonic() + BEAT
                if self.until_caught and self.caught():
                    return
            if now > leak_look:
                found = set(census.leaked_fds(self.runtime))
                self.tally.broken += [f"S7: {leak}" for leak in found & leaks]
                leaks, leak_look = found, time.monotonic() + (0.3 if found - leaks else 2.0)
            for n, (when, act, low, high) in enumerate(due):
                if when < now < self.end:
                    act(self, self.dice)
                    if act is chaos.delete:  # an inode may come again
                        self.watch.published = None
                    due[n] = (time.monotonic() + self.dice.uniform(low, high), act, low, high)
            time.sleep(0.005)
        self.tally.failed += [f"worker {number} hangs" for number in self.workers.values()]
        if held is not None:
            self.compare(*held)

    def reap(self, restart: bool) -> None:
        """Ended children: workers come again, daemons are only counted."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            self.cpu += usage.ru_utime + usage.ru_stime
            if (number := self.workers.pop(pid, None)) is None:
                continue
            if status not in (0, signal.SIGKILL) and not (self.scenario.namespace and os.WIFEXITED(status)):
                words = (self.base / "words").read_text(errors="replace")
                self.tally.failed.append(f"worker {number} ended with status {status}: {words[-2000:]}")
            if restart:
                self.start_worker(number)

    def long_lived(self) -> tuple[sync.Conversation, int]:
        """A lease of our own on a daemon that outlives the scenario, and its open files now."""
        for _ in range(3):  # what opens files for good has been opened then
            talk = sync.connect()
            assert talk is not None
            talk.ask("CALL", 10, method="status")
            talk.close()
        llm_daemon.attach(str(self.base / "m.fake.json"), keep_alive=0).close()
        talk = sync.connect()
        assert talk is not None
        return talk, self.open_files(talk)

    def compare(self, talk: sync.Conversation, before: int) -> None:
        """After thousands of leases only ours is left, and no open file more."""
        end = time.monotonic() + 30
        while (after := self.open_files(talk)) > before and time.monotonic() < end:
            time.sleep(0.1)  # engines are still closing
        self.tally.fds += max(0, after - before)
        if after > before:
            self.tally.broken.append(f"the daemon has {after} open files, {before} at first: {self.links(talk)}")
        talk.close()

    def open_files(self, talk: sync.Conversation) -> int:
        return len(os.listdir(f"/proc/{talk.welcome['pid']}/fd"))

    def links(self, talk: sync.Conversation) -> list[str]:
        folder = f"/proc/{talk.welcome['pid']}/fd"
        return sorted(os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder))

    # After ------------------------------------------------------------------------------------------------------
    def caught(self) -> bool:
        t = self.tally
        return bool(t.failed or t.broken or self.watch.broken or (t.http_failed and not self.scenario.http_may_fail))

    def settle(self) -> dict[str, Any]:
        """All go, but for what the last double kill left; a last daemon sweeps; the census."""
        (self.base / "faults" / "chance").write_text("")
        left = self.calm(unswept=True)
        began = time.monotonic()
        try:
            talk = sync.connect()
            assert talk is not None
            talk.close()
        except LlmDaemonError as e:
            self.tally.failed.append(f"the last attach, after all had gone: {e!r} ({time.monotonic() - began:.1f} s)")
        left += self.calm()
        # Whoever is just ending is no process any more and cannot be waited for yet.
        end = time.monotonic() + 20
        while census.zombies() and time.monotonic() < end:
            self.reap(restart=False)
            time.sleep(0.01)
        found = self.the_world.census()
        self.tally.read()
        return self.result(left, found)

    def calm(self, unswept: bool = False) -> list[str]:
        """Waits until no process is left; whoever was never attached to is attached to, so that it may leave.

        `unswept`: what escaped when daemon and keeper were killed together may stay, for no daemon was started after that.
        """
        end, visit = time.monotonic() + CALM, 0.0
        while found := self.the_world.processes():
            self.reap(restart=False)
            self.tally.read()
            self.watch.look(self.tally.both)
            if unswept and found.keys() <= self.watch.excused:
                break
            if (now := time.monotonic()) > end:
                return [f"{pid} {command}" for pid, command in found.items()]
            if now > visit:
                visit = now + 4.0  # rarer than any linger, or the visits would keep it
                with suppress(LlmDaemonError):
                    if (talk := sync.connect(start_daemon=False)) is not None:
                        talk.close()
            time.sleep(0.02)
        self.reap(restart=False)
        return []

    def result(self, left: list[str] | None = None, found: dict[str, list[str]] | None = None) -> dict[str, Any]:
        t, found = self.tally, found or {}
        return {
            "scenario": self.scenario.name,
            "seconds": time.monotonic() - self.began,
            "attaches": t.attaches,
            "with_model": t.with_model,
            "generations": t.generations,
            "candidates": t.candidates,
            "kills": dict(t.kills),
            "stops": dict(t.stops),
            "races": dict(t.races),
            "failed": t.failed,
            "told": dict(t.told),
            "lost": t.lost,
            "broken": t.broken + self.watch.broken,
            "http": t.http,
            "http_failed": t.http_failed,
            "http_may_fail": self.scenario.http_may_fail,
            "ms": t.ms,
            "orphan_ms": t.orphan_ms,
            "oldest_orphan_s": [round(self.watch.oldest, 2)],
            "survivors": dict(t.survivors),
            "left": (left or []) + found.get("cgroups", []) + found.get("leaked_fds", []),
            "fds": t.fds,
            "zombies": t.zombies + len(found.get("zombies", [])),
            "files": len(found.get("files", [])),
            "files_left": found.get("files", []),
            "cpu_s": self.cpu,
        }

    def end_all(self) -> None:
        """Whatever is left is ended, by pid."""
        for pid in self.workers:
            os.kill(pid, signal.SIGKILL)
        end = time.monotonic() + 10
        while (found := self.the_world.processes()) or self.workers:
            self.reap(restart=False)
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > end:
                break
            time.sleep(0.02)
        self.reap(restart=False)


def is_bad(part: dict[str, Any]) -> list[str]:
    """What speaks against the product."""
    if "skipped" in part:
        return []
    bad: list[str] = part["failed"] + part["broken"] + part["left"] + part["files_left"]
    bad += [] if part["http_may_fail"] else part["http_failed"]
    return bad + [f"{part[key]} {key} leaked" for key in ("fds", "zombies") if part[key]]


def divide(seconds: float, chosen: list[Scenario]) -> list[tuple[Scenario, float]]:
    weight = sum(s.weight for s in chosen)
    return [(s, seconds * s.weight / weight) for s in chosen]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--only", default="")
    parser.add_argument("--mutant", default="", help="M1 ... or `all`: each, and the product, in the scenario that tells")
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    for name in [n for n in os.environ if n.startswith("LLM_DAEMON_")]:
        del os.environ[name]
    result: dict[str, Any]
    if args.mutant:
        found = mutants.hunt(list(mutants.MUTANTS) if args.mutant == "all" else [args.mutant], args.seconds)
        text, result = mutants.table(found), {"mutants": found}
    else:
        chosen = [BY_NAME[name] for name in args.only.split(",")] if args.only else SCENARIOS
        parts = []
        for scenario, seconds in divide(args.seconds, chosen):
            parts.append(Storm(scenario, seconds).run())
            print(f"{scenario.name}: {len(is_bad(parts[-1]))} bad", file=sys.stderr, flush=True)
        total = report.summary([p for p in parts if "skipped" not in p])
        text = report.table([*parts, total])
        bad = [f"{part['scenario']}: {what}" for part in parts for what in is_bad(part)]
        result = {"parts": [p if "skipped" in p else report.figures(p) for p in [*parts, total]], "bad": bad}
    line = json.dumps(result)
    if args.json:
        Path(args.json).write_text(line)
    print(text)
    print(line)


if __name__ == "__main__":
    main()
