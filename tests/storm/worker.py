"""A client program of the storm: attaches, holds, asks, lets go, and now and then kills or stops somebody.

Run by path, with one argument, a JSON object (`harness.Storm.worker` writes it); appends what happened to the file
`events`, one JSON line an event, each at once: whoever is killed has told all it did.
"""

from __future__ import annotations

import errno
import faulthandler
import json
import multiprocessing
import os
import random
import resource
import select
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPConnection
from multiprocessing.connection import wait
from typing import Any

CONFIG: dict[str, Any] = json.loads(sys.argv[1])
if CONFIG["package"]:
    sys.path.insert(0, CONFIG["package"])

from llm_daemon import attach, errors  # noqa: E402
from llm_daemon.client import start, sync  # noqa: E402

RUNTIME = os.environ["LLM_DAEMON_RUNTIME_DIR"]
EVENTS = os.open(CONFIG["events"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
END = CONFIG["end"]  # monotonic seconds
met = threading.local()  # what this thread met on its way in, by errno


def say(event: str, **facts: object) -> None:
    line = json.dumps({"e": event, "t": time.monotonic(), "w": CONFIG["id"], **facts}) + "\n"
    os.write(EVENTS, line.encode())


def count_races(connect: Callable[[start._Door], start.Connection]) -> Callable[[start._Door], start.Connection]:
    """The client's one try to be let in, with a note of why it failed."""

    def counted(self: start._Door) -> start.Connection:
        try:
            return connect(self)
        except start.Down as e:
            cause = e.__context__
            note(errno.errorcode.get(cause.errno or 0, "OSError") if isinstance(cause, OSError) else "EOF")
            raise
        except errors.DaemonUnresponsive as e:
            note("EAGAIN" if "no connection" in e.message else "no answer")
            raise
        except errors.Unavailable as e:
            note("RETIRE" if "retire" in e.message else "GOING")
            raise

    return counted


def note(name: str) -> None:
    met.races[name] = met.races.get(name, 0) + 1


class Held:
    """A lease with or without a model."""

    def __init__(self, dice: random.Random) -> None:
        self.lease = self.talk = None
        if dice.random() < CONFIG["models"]:
            self.lease = attach(CONFIG["model"], keep_alive=0)
            facts = self.lease._facts
            self.engine = int(facts["pid"] or 0)
            self.daemon = int(facts["daemon_pid"])
        else:
            self.talk = sync.connect()
            assert self.talk is not None
            facts = self.talk.welcome
            self.engine, self.daemon = 0, int(facts["pid"])
        self.base_url, self.key = str(facts["base_url"]), str(facts["api_key"])
        self.since = time.monotonic()

    def is_open(self) -> bool:
        return bool((self.lease or self.talk).is_open())  # type: ignore[union-attr]

    def close(self) -> None:
        (self.lease or self.talk).close()  # type: ignore[union-attr]


def hold(dice: random.Random) -> Held | None:
    """One attach, told as an event; None if it failed."""
    met.races = {}
    began = time.monotonic()
    try:
        held = Held(dice)
    except Exception as e:
        told = isinstance(e, errors.LlmDaemonError)
        say("failed", told=told, code=getattr(e, "code", ""), why=repr(e), ms=ms(began), races=met.races)
        return None
    say("attach", ms=ms(began), model=bool(held.lease), pid=held.daemon, races=met.races, after=getattr(met, "after", False))
    met.after = False
    return held


def ms(began: float) -> float:
    return round((time.monotonic() - began) * 1e3, 2)


def ask(held: Held, dice: random.Random) -> None:
    """One or two requests over the lease's endpoint, on one connection."""
    host, _, port = held.base_url.removeprefix("http://").removesuffix("/v1").rpartition(":")
    link = HTTPConnection(host, int(port), timeout=30)
    head = {"Authorization": f"Bearer {held.key}", "Content-Type": "application/json"}
    began = time.monotonic()
    try:
        for _ in range(dice.randint(1, 2)):
            if held.lease is not None:
                body = json.dumps({"model": held.lease._facts["model"], "prompt": "x", "max_tokens": 1})
                link.request("POST", "/v1/completions", body, head)
            else:
                link.request("GET", "/v1/models", headers=head)
            answer = link.getresponse()
            text = answer.read()
            say("http", ok=answer.status == 200, why=f"{answer.status} {text[:200]!r}" if answer.status != 200 else "")
    except Exception as e:
        say("http", ok=False, why=repr(e), ms=ms(began))
    finally:
        link.close()


def mix(dice: random.Random) -> None:
    """The common client: come, hold, perhaps ask, perhaps strike, go."""
    held = hold(dice)
    if held is not None:
        try:
            time.sleep(dice.random() * (0.002 if dice.random() < 0.97 else 0.1))
            if dice.random() < CONFIG["http"]:
                ask(held, dice)
            if dice.random() < CONFIG["kill"] * (4 if held.engine else 1):
                strike(held, dice)
            elif dice.random() < CONFIG["stop"]:
                pause(held, dice)
            if not held.is_open():
                met.after = True
                say("lost", pid=held.daemon, since=held.since)
        finally:
            held.close()
    time.sleep(dice.random() * CONFIG["rest"])


# Who is killed or stopped ---------------------------------------------------------------------------------------
class Orphans:
    """What a kill must take along, watched until it is gone."""

    def __init__(self) -> None:
        self.left: list[tuple[str, float, int]] = []  # (kind of kill, when, pidfd)

    def watch(self, kind: str, fds: list[int]) -> None:
        self.left += [(kind, time.monotonic(), fd) for fd in fds]
        end = time.monotonic() + 0.2
        while self.left and time.monotonic() < end:
            self.look(0.02)

    def look(self, timeout: float) -> None:
        gone, _, _ = select.select([fd for _, _, fd in self.left], [], [], timeout)
        for kind, when, fd in self.left:
            if fd in gone:
                say("orphan", kind=kind, ms=ms(when))
                os.close(fd)
        self.left = [one for one in self.left if one[2] not in gone]


orphans = Orphans()


def stat_of(pid: int) -> list[str]:
    with open(f"/proc/{pid}/stat") as f:
        return f.read().rpartition(")")[2].split()


def ours(pid: int) -> int | None:
    """A pidfd of that process if it lives in the runtime folder: a pid alone may be another's by now."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return None
    try:
        if os.readlink(f"/proc/{pid}/cwd").startswith(RUNTIME):
            return fd
    except OSError:
        pass
    os.close(fd)
    return None


def tree(held: Held) -> dict[str, list[int]]:
    """pidfds of the daemon that we hold, of our engine, of its keeper and of the engine's strays."""
    found: dict[str, list[int]] = {"daemon": [], "keeper": [], "engine": [], "stray": []}
    fd = ours(held.daemon)
    if fd is None:
        return found
    found["daemon"].append(fd)
    if held.engine and (fd := ours(held.engine)) is not None:
        found["engine"].append(fd)
        with suppress(OSError):
            keeper = int(stat_of(held.engine)[1])
            if (fd := ours(keeper)) is not None:
                found["keeper"].append(fd)
                with open(f"/proc/{keeper}/task/{keeper}/children") as f:
                    for pid in map(int, f.read().split()):
                        if pid != held.engine and (fd := ours(pid)) is not None:
                            found["stray"].append(fd)
    return found


VICTIMS = {"daemon": ("daemon",), "keeper": ("keeper",), "engine": ("engine",), "both": ("daemon", "keeper")}
LEAVES = {
    "daemon": ("keeper", "engine", "stray"),
    "keeper": ("engine", "stray"),
    "engine": ("stray",),
    "both": ("engine", "stray"),
}


def pid_of(pidfd: int) -> int:
    """proc_pid_fdinfo(5); -1 if it was reaped."""
    with open(f"/proc/self/fdinfo/{pidfd}") as f:
        return int(next(line for line in f if line.startswith("Pid:")).split()[1])


def strike(held: Held, dice: random.Random) -> None:
    """kill -9 of somebody; while our lease stands, the daemon's pid is its own."""
    kind = dice.choices(["daemon", "keeper", "engine", "both"], [4, 2, 2, 2])[0] if held.engine else "daemon"
    found = tree(held)
    victims = [fd for name in VICTIMS[kind] for fd in found[name]]
    watched = [fd for name in LEAVES[kind] for fd in found[name]]
    if held.is_open() and len(victims) == len(VICTIMS[kind]):
        say("kill", kind=kind, pid=held.daemon, left=[pid_of(fd) for fd in watched])
        for fd in victims:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        if kind in ("daemon", "both"):
            select.select([found["daemon"][0]], [], [], 5)
        orphans.watch(kind, watched)
    else:
        watched = []
    for fd in {fd for fds in found.values() for fd in fds} - set(watched):
        os.close(fd)


def pause(held: Held, dice: random.Random) -> None:
    """SIGSTOP for somebody, and SIGCONT a moment later."""
    found = tree(held)
    fds = [fd for fds in found.values() for fd in fds]
    kind = dice.choice([name for name, fds in found.items() if fds] or [""])
    try:
        if kind and held.is_open():
            say("stop", kind=kind, pid=held.daemon)
            signal.pidfd_send_signal(found[kind][0], signal.SIGSTOP)
            time.sleep(0.05 + dice.random() * 0.35)
            signal.pidfd_send_signal(found[kind][0], signal.SIGCONT)
    except ProcessLookupError:
        pass
    finally:
        for fd in fds:
            os.close(fd)


# Other kinds of clients -----------------------------------------------------------------------------------------
def crowd(dice: random.Random) -> None:
    """Many cold processes at once, and one daemon for all of them."""
    barrier, go = os.pipe()
    done, tell = os.pipe()
    release, let_go = os.pipe()
    children = []
    for number in range(CONFIG["crowd"]):
        pid = os.fork()
        if not pid:
            try:
                os.close(go)
                os.close(let_go)
                os.read(barrier, 1)
                held = hold(random.Random(number))
                os.write(tell, struct.pack("i", held.daemon if held else 0))
                os.read(release, 1)
                if held is not None and not held.is_open():
                    say("lost", pid=held.daemon, since=held.since)
            finally:
                os._exit(0)
        children.append(pid)
    os.close(go)
    daemons: list[int] = []
    end = time.monotonic() + 40
    while len(daemons) < len(children) and select.select([done], [], [], max(0.0, end - time.monotonic()))[0]:
        daemons += (n for (n,) in struct.iter_unpack("i", os.read(done, 4)))
    if len(daemons) < len(children):
        say("failed", told=False, code="hung", why=f"{len(children) - len(daemons)} of {len(children)} hang", ms=40e3, races={})
    if len(set(daemons) - {0}) > 1:
        say("violation", why=f"one crowd, {len(set(daemons))} daemons")
    os.close(let_go)
    for pid in children:
        if len(daemons) < len(children):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    for fd in (barrier, done, tell, release):
        os.close(fd)
    time.sleep(dice.random() * 0.1)


def forking(dice: random.Random) -> None:
    """A host whose threads attach while others of its threads fork."""

    def attaching(seed: int) -> None:
        mine = random.Random(seed)
        while time.monotonic() < END:
            mix(mine)

    def splitting(seed: int) -> None:
        mine = random.Random(seed)
        context = multiprocessing.get_context("fork")
        while time.monotonic() < END:
            child = context.Process(target=forked, args=(mine.random(),))
            child.start()
            if not wait([child.sentinel], 40):
                say("failed", told=False, code="hung", why="a forked worker hangs", ms=40e3, races={})
                child.kill()
            # Not `join`: each start() reaps every ended child, the other thread's too, and a join that loses this race
            # returns at once and knows no exit code yet.
            while child.exitcode is None:
                time.sleep(0.001)
            child.close()

    threads = [threading.Thread(target=attaching, args=(dice.random(),)) for _ in range(8)]
    threads += [threading.Thread(target=splitting, args=(dice.random(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def forked(seed: float) -> None:
    faulthandler.dump_traceback_later(20)
    dice = random.Random(seed)
    if dice.random() < 0.3:
        mix(dice)
    else:
        time.sleep(dice.random() * 0.05)


def hoard(dice: random.Random) -> None:
    """More leases than there are files: in one half of each period all grab, in the other all is free and must be well."""
    period, patience = 8.0, 4.0
    held: list[sync.Conversation] = []
    where = time.monotonic() % period
    while where < period / 2 and time.monotonic() < END:
        met.races = {}
        began = time.monotonic()
        try:
            connection = start.ensure(deadline=patience)
            assert connection is not None
            held.append(sync.Conversation(connection))
            say("attach", ms=ms(began), model=False, pid=connection.welcome["pid"], races=met.races, after=False)
        except Exception as e:
            told = isinstance(e, errors.LlmDaemonError) and time.monotonic() < began + patience + 5
            say("failed", told=told, full=True, code=getattr(e, "code", ""), why=repr(e), ms=ms(began), races=met.races)
            time.sleep(0.2)
            break
        where = time.monotonic() % period
    for talk in held:
        if not talk.is_open():
            say("lost", pid=talk.welcome["pid"], since=began)
        talk.close()
    while (where := time.monotonic() % period) < period * 0.75 and time.monotonic() < END:
        time.sleep(0.1)
    if where < period * 0.9:
        if (free := hold(dice)) is not None:
            free.close()
    time.sleep(max(0.0, min(END - time.monotonic(), period - time.monotonic() % period)))


def group() -> None:
    """Process 1 of a namespace: several common clients, and whatever they leave."""
    children = []
    for number in range(CONFIG["group"]):
        pid = os.fork()
        if not pid:
            CONFIG["id"] += number / 10
            common(mix)
            os._exit(0)
        children.append(pid)
    while children:
        pid, _ = os.wait()
        if pid in children:
            children.remove(pid)
    # Our end is the end of all in this namespace, and clients outside hold leases on a daemon in here.
    with suppress(ChildProcessError):
        while True:
            os.wait()


def common(step: Callable[[random.Random], None]) -> None:
    dice = random.Random(CONFIG["seed"] + CONFIG["id"])
    rounds, before = 0, 0
    while time.monotonic() < END:
        step(dice)
        orphans.look(0) if orphans.left else None
        rounds += 1
        if rounds == 5:  # by now everything is loaded that opens files for good
            before = open_files()
    end = time.monotonic() + 5
    while orphans.left and time.monotonic() < end:
        orphans.look(0.1)
    for kind, _, _ in orphans.left:
        say("survivor", kind=kind)
    after = open_files() - len(orphans.left)
    say("end", fds=max(0, after - before) if before else 0, zombies=zombies())


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def zombies() -> int:
    """Children that ended and that we never waited for."""
    count = 0
    for pid in os.listdir("/proc"):
        with suppress(OSError, ValueError):
            fields = stat_of(int(pid))
            if fields[0] == "Z" and int(fields[1]) == os.getpid():
                count += 1
    return count


def main() -> None:
    start._Door.connect = count_races(start._Door.connect)  # type: ignore[assignment,method-assign]
    if CONFIG["nofile"]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (CONFIG["nofile"], CONFIG["nofile"]))
    if CONFIG["mode"] == "group":
        group()
    else:
        common({"mix": mix, "crowd": crowd, "forking": forking, "hoard": hoard}[CONFIG["mode"]])


if __name__ == "__main__":
    main()
