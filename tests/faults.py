"""Real processes at fault points (`llm_daemon/faults.py`): one world, its traps, and what became of everybody.

A `Stage` knows its folders by itself and never touches this process's environment, so that several can play side by
side.  A `Cell` is one place of the matrix point x fault x victim; `play` does one trial of it.  Linux.
"""

from __future__ import annotations

import errno
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import llm_daemon
from llm_daemon.testing import census
from llm_daemon.testing.world import World, wait_gone

# Who passes each point, in the order of a life: attach and load, idle exit, RETIRE while somebody holds a lease.
START = {
    "start_got": "client",
    **dict.fromkeys(
        "launcher_forked dir_opened lock_tried lock_got ino_checked bound listening renamed ready_sent".split(), "daemon"
    ),
    "verdict_read": "client",
    **dict.fromkeys("accepted hello_read lease_added welcome_sent keeper_spawned".split(), "daemon"),
    "keeper_checked": "keeper",
    "server_forked": "engine",  # the keeper's child, just before exec
    "server_execed": "keeper",
}
LEAVE = {"idle_decided": "daemon", "listener_closed": "daemon"}
RETIRE = {"ghost_unlocked": "daemon"}
OWNER = {**START, **LEAVE, **RETIRE}
POINTS = tuple(OWNER)
FAULTS = ("KILL", "STOP", "ENOSPC", "EMFILE")
VICTIMS = ("daemon", "keeper", "client")
STOPPED = 0.2  # seconds
SOON = 45.0  # seconds for anything that must happen: more than every bound in the product
SOURCE = str(Path(llm_daemon.__file__).parent.parent)

CONFIG = """
ttl = 0.05
linger = 0.2
[engines.fake]
adapter = "llm_daemon.testing.fake_engine:FakeEngine"
"""
# Says {"attached": [daemon pid, engine pid], "answer": text if asked} or {"told": [class, code, message, hint]}.
CLIENT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from llm_daemon import attach, errors
try:
    llm = attach(sys.argv[2])
    said = {"attached": [llm.daemon_pid, llm.pid]}
    if "ask" in sys.argv:
        from http.client import HTTPConnection
        link = HTTPConnection("127.0.0.1", int(llm.base_url.rpartition(":")[2].partition("/")[0]), timeout=20)
        head = {"Authorization": "Bearer " + llm.api_key, "Content-Type": "application/json"}
        link.request("POST", "/v1/completions", json.dumps({"model": llm.model, "prompt": "hi"}), head)
        said["answer"] = json.load(link.getresponse())["choices"][0]["text"]
except errors.LlmDaemonError as e:
    said = {"told": [type(e).__name__, e.code, str(e), e.hint]}
print(json.dumps(said), flush=True)
sys.stdin.read()
"""
# A lease without a model: says the daemon's pid.
HOLDER = """
import sys
sys.path.insert(0, sys.argv[1])
from llm_daemon import connect
talk = connect()
print(talk.welcome["pid"], flush=True)
sys.stdin.read()
"""
# A client without START that starts a daemon and trusts nothing: it says the verdict and never connects.
SPAWNER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from llm_daemon.client import start
print(start.spawn(time.monotonic() + 30)[1], flush=True)
"""

T = TypeVar("T")


class Missed(Exception):
    """What had to happen did not, in time."""


def until(look: Callable[[], T | None], what: str, within: float = SOON) -> T:
    """Polls where there is no event; raises Missed."""
    end = time.monotonic() + within
    while (found := look()) is None:
        if time.monotonic() > end:
            raise Missed(f"{what}: not within {within:g} s")
        time.sleep(0.002)
    return found


class Traps:
    """A fault folder.  The log and the oracle `serving` may be shared with others, the traps never are."""

    def __init__(self, folder: Path, shared: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "log").symlink_to(shared / "log")
        (folder / "serving").symlink_to(shared / "serving")

    def set(self, point: str, word: str) -> None:
        """The next process at `point` does `word`."""
        if word == "WAIT":
            os.mkfifo(self.folder / f"{point}.go")
        fresh = self.folder / f".{point}"
        fresh.write_text(word)
        fresh.rename(self.folder / point)  # whole at once: somebody may be on the way there

    def struck(self, point: str) -> int | None:
        """Pid of the process that went into the trap."""
        return next((int(p.name.rpartition(".")[2]) for p in self.folder.glob(f"{point}.*") if p.suffix != ".go"), None)

    def wait(self, point: str, client: Client | None = None) -> int:
        """`struck`, when it is; or Missed, at once if `client` ended its part without."""

        def look() -> int | None:
            if (pid := self.struck(point)) is None and client is not None and client.has_spoken():
                raise Missed(f"{point} was not passed: {client.said(1.0)}")
            return pid

        return until(look, f"somebody at {point}")

    def release(self, point: str) -> None:
        """Lets the one go on that WAITs there, if it lives."""
        pid = self.wait(point)

        def opened() -> bool | None:
            try:
                os.close(os.open(self.folder / f"{point}.go", os.O_WRONLY | os.O_NONBLOCK))
            except OSError as e:
                if e.errno != errno.ENXIO:
                    raise
                return True if is_dead(pid) else None  # it has not opened its end yet
            return True

        until(opened, f"{point} released")


class Client:
    """A process that attaches, says what came of it, and holds its lease until it is told to end."""

    def __init__(self, code: str, args: list[str], env: dict[str, str], errors: Path) -> None:
        self.errors = errors
        with open(errors, "wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", code, SOURCE, *args],
                env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
            )  # fmt: skip
        self.pid = self.process.pid

    def has_spoken(self) -> bool:
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], 0)[0])

    def line(self, within: float = SOON) -> str:
        """Its one line; empty if it ended without."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], within)[0]:
            raise Missed(f"a client said nothing for {within:g} s")
        return self.process.stdout.readline().decode()

    def said(self, within: float = SOON) -> dict[str, Any]:
        text = self.line(within)
        if not text:
            return {"ended": self.process.wait(), "stderr": self.errors.read_text()[-3000:]}
        said: dict[str, Any] = json.loads(text)
        return said

    def end(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Stage(World):
    """A `World` for trials."""

    def __init__(self, base: Path, **scenario: object) -> None:
        super().__init__(base)
        self.config.write_text(CONFIG)
        self.model = str(base / "m.fake.json")
        Path(self.model).write_text(json.dumps({"tokens": ["Hello"], **scenario}))
        (base / "serving").mkdir()
        (base / "log").touch()
        self.clients: list[Client] = []
        self.count = 0

    @property
    def env(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("LLM_DAEMON_")}
        return {
            **kept,
            "LLM_DAEMON_RUNTIME_DIR": str(self.runtime),
            "LLM_DAEMON_STATE_DIR": str(self.state),
            "LLM_DAEMON_CONFIG": str(self.config),
        }

    def traps(self) -> Traps:
        self.count += 1
        return Traps(self.base / f"faults{self.count}", self.base)

    def actor(self, code: str, *args: str, traps: Traps | None = None) -> Client:
        traps = traps or self.traps()
        self.count += 1
        env = {**self.env, "LLM_DAEMON_FAULTS": str(traps.folder)}
        client = Client(code, list(args), env, self.base / f"stderr{self.count}")
        self.clients.append(client)
        return client

    def attach(self, traps: Traps | None = None, ask: bool = False) -> Client:
        """A client that attaches to the scripted model; with `ask` it puts a request too."""
        return self.actor(CLIENT, self.model, *(["ask"] if ask else []), traps=traps)

    def holder(self, traps: Traps) -> Client:
        return self.actor(HOLDER, traps=traps)

    def come_and_go(self) -> None:
        """A lease begins and ends, so that the daemon leaves when its linger is over."""
        guest = self.holder(self.traps())
        guest.line()
        guest.end()

    def spawner(self, traps: Traps) -> Client:
        return self.actor(SPAWNER, traps=traps)

    def passed(self) -> list[tuple[int, str]]:
        """(pid, point) of everything that was passed, in order."""
        lines = [line.split() for line in (self.base / "log").read_text().splitlines()]
        return [(int(pid), point) for _, pid, point in sorted(lines, key=lambda words: int(words[0]))]

    def pids(self, point: str) -> list[int]:
        return [pid for pid, at in self.passed() if at == point]

    def retire(self) -> None:
        """Says RETIRE, as a newer client would."""
        import socket

        with socket.socket(socket.AF_UNIX) as s:
            s.connect(str(self.runtime / "sock"))
            s.sendall(b'{"op":"RETIRE"}\n')

    def aftermath(self, files: bool = True) -> list[str]:
        """Ends the clients; what is wrong then: survivors, files left (if asked), cgroups, two daemons at once."""
        for client in self.clients:
            client.end()
        wrong = []
        try:
            self.wait_empty(20)
        except AssertionError as e:
            wrong.append(f"survivors: {e}")
            kill(self.processes())
        if files and (names := census.files(self.runtime)):
            wrong.append(f"files left: {names}")
        if boxes := census.boxes(self.generations()):
            wrong.append(f"cgroups left: {boxes}")
        if double := self.pids("VIOLATION"):
            wrong.append(f"two daemons served at once: {double}")
        return wrong


def kill(pids: dict[int, str]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        wait_gone(pid, 5)


@contextmanager
def stage(**scenario: object) -> Iterator[Stage]:
    """A stage in a folder with a short name (unix sockets), which is empty and gone afterwards."""
    base = Path(tempfile.mkdtemp(prefix="llmd-"))
    made = Stage(base, **scenario)
    try:
        yield made
    finally:
        for client in made.clients:
            client.end()
        end = time.monotonic() + 20
        while (found := made.processes()) and time.monotonic() < end:  # a client may have been just about to start one
            kill(found)
        shutil.rmtree(base)


def stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on (the third), proc_pid_stat(5); empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def is_dead(pid: int) -> bool:
    fields = stat(pid)
    return not fields or fields[0] in "ZX"


def child_of(parent: int) -> int | None:
    """A living child, the newest."""
    found = [int(p) for p in os.listdir("/proc") if p.isdigit() and stat(int(p))[1:2] == [str(parent)] and not is_dead(int(p))]
    return max(found, default=None)


class Cell(NamedTuple):
    point: str
    fault: str
    victim: str

    def __str__(self) -> str:
        return f"{self.point}/{self.fault}/{self.victim}"

    @property
    def own(self) -> bool:
        return self.victim == OWNER[self.point]

    def makes_sense(self) -> bool:
        """Whether the victim exists at the point; an error number can only come to the process that is there."""
        if self.own:
            return True
        if self.fault not in ("KILL", "STOP"):
            return False
        place = POINTS.index(self.point)
        return {
            "client": True,
            "daemon": place >= POINTS.index("launcher_forked"),
            "keeper": place >= POINTS.index("keeper_spawned") and self.point not in LEAVE,  # engines go before the daemon
            "engine": False,
        }[self.victim]


def cells() -> list[Cell]:
    """The matrix without what makes no sense; `server_forked` is passed by the engine itself, which is its own victim there."""
    every = [Cell(p, f, v) for p in POINTS for f in FAULTS for v in dict.fromkeys((*VICTIMS, OWNER[p]))]
    return [cell for cell in every if cell.makes_sense()]


@dataclass
class Outcome:
    """One trial.  `wrong` is empty if everything held."""

    cell: Cell
    attached: bool = False  # the client of the trial; False for one that was killed
    told: str = ""  # or the error it was told
    survivors: int = 0
    wrong: tuple[str, ...] = ()
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.cell}: " + "; ".join(self.wrong)


def play(cell: Cell) -> Outcome:
    """One trial in a world of its own."""
    began = time.monotonic()
    out = Outcome(cell)
    with stage() as s:
        wrong = []
        try:
            wrong += _strike(s, cell, out)
        except Missed as e:
            wrong.append(str(e))
        after = s.aftermath()
        out.survivors = sum(text.startswith("survivors") for text in after)
        wrong += after
        if wrong:
            logs = [*s.state.glob("logs/daemon.log"), *s.runtime.glob("logs/daemon.log")]
            wrong += [f"\n--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs]
            wrong.append("\n--- points: " + " ".join(f"{pid}:{point}" for pid, point in s.passed()))
    out.wrong = tuple(wrong)
    out.seconds = time.monotonic() - began
    return out


def _strike(s: Stage, cell: Cell, out: Outcome) -> list[str]:
    traps = s.traps()
    word = cell.fault if cell.own else "WAIT"
    if cell.point in START:
        traps.set(cell.point, word)
        client = s.attach(traps)
    else:
        first = s.attach(traps)
        if "attached" not in (said := first.said()):
            return [f"the first client was not attached: {said}"]
        traps.set(cell.point, word)
        if cell.point in LEAVE:
            first.end()
        else:
            s.retire()
        traps.wait(cell.point)
        client = s.attach(traps)  # who comes while the daemon leaves is the client of the trial
    try:
        _fault(s, cell, traps, client)
    except Missed as e:
        return [str(e)]
    wrong = []
    if not (cell.victim == "client" and cell.fault == "KILL"):
        said = client.said()
        out.attached = "attached" in said
        if "told" in said:
            out.told = " ".join(said["told"][:3])
        # An engine killed from outside is told, and not started again: the next victim of an exhausted machine it would be.
        may_be_told = cell.fault in ("ENOSPC", "EMFILE") or cell.victim == "engine"
        if not out.attached and not ("told" in said and may_be_told):
            wrong.append(f"the client was not attached: {said}")
        elif out.told and said["told"][0] == "Bug":
            wrong.append(f"no clear error: {said}")
        elif client.errors.read_text():
            wrong.append(f"the client is not silent: {client.errors.read_text()}")
    said = s.attach(ask=True).said()
    if said.get("answer") != "Hello":
        wrong.append(f"the second client was not served: {said}")
    if cell.point in RETIRE and not wrong:  # a ghost leaves its folder to the next start
        wrong += s.aftermath(files=False)
        if "attached" not in (said := s.attach().said()):
            wrong.append(f"the last client was not attached: {said}")
    return wrong


def _fault(s: Stage, cell: Cell, traps: Traps, client: Client) -> None:
    at = traps.wait(cell.point, client)
    if cell.own:
        if cell.fault == "STOP":
            until(lambda: True if stat(at)[:1] == ["T"] or _went_on(s, at, cell.point) else None, "stopped")
            time.sleep(STOPPED)
            with suppress(ProcessLookupError):  # somebody may have woken it before us
                os.kill(at, signal.SIGCONT)
        return
    pid = _victim(s, cell, at, client)
    os.kill(pid, signal.SIGKILL if cell.fault == "KILL" else signal.SIGSTOP)
    if cell.fault == "KILL":
        until(lambda: True if is_dead(pid) else None, f"{cell.victim} dead")
    traps.release(cell.point)
    if cell.fault == "STOP":
        time.sleep(STOPPED)
        os.kill(pid, signal.SIGCONT)


def _went_on(s: Stage, pid: int, point: str) -> bool:
    """Whether it was at the point and has passed another one, or the same again, or is dead."""
    passed = [at for who, at in s.passed() if who == pid]
    return is_dead(pid) or len(passed) > passed.index(point) + 1


def _victim(s: Stage, cell: Cell, at: int, client: Client) -> int:
    daemon = s.pids("launcher_forked")[-1] if cell.victim != "client" else 0
    return {
        "client": lambda: client.pid,
        "daemon": lambda: daemon,
        "keeper": lambda: until(lambda: child_of(daemon), "a keeper"),
    }[cell.victim]()
