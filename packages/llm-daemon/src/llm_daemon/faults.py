"""Fault points: where a test may stop, kill or break us.  Nothing happens unless LLM_DAEMON_FAULTS names a folder.

In that folder a file named like a point is a trap for the first process that gets there: it claims the file by renaming
it to `POINT.PID` and does what the file says.

| word | does |
| --- | --- |
| `KILL` | SIGKILL to this process |
| `STOP` | SIGSTOP to this process; whoever set the trap sends SIGCONT |
| `WAIT` | waits until the named pipe `POINT.go` is opened for writing and closed |
| `PAUSE seconds` | sleeps |
| any name of `errno` | raises that OSError, as the next system call might |

A file `chance` holds lines `PROBABILITY POINT WORD...`, with `*` for every point; it is read once by each process.  If a
file `log` exists, each point that is passed appends a line `MONOTONIC_NS PID POINT`.  If a folder `serving` exists, a
daemon that publishes its socket locks a file in it named by the runtime folder's inode: a second one that does so
while the first serves appends `VIOLATION` in place of the point (invariants S1 and S2).
"""

from __future__ import annotations

import os

FOLDER = os.environ.get("LLM_DAEMON_FAULTS", "")
_chances: list[tuple[float, str, str]] | None = None
_serving = -1


def fp(point: str) -> None:
    """A fault point.  May raise OSError, and only that."""
    if FOLDER:
        _pass(point)


def _pass(point: str) -> None:
    if point == "renamed":
        _begin_serving()
    elif point in ("listener_closed", "ghost_unlocked"):
        _end_serving()
    _log(point)
    mine = f"{FOLDER}/{point}.{os.getpid()}"
    try:
        os.rename(f"{FOLDER}/{point}", mine)
    except OSError:
        word = _by_chance(point)
    else:
        with open(mine) as f:
            word = f.read().strip()
    if word:
        _do(word, point)


def _do(word: str, point: str) -> None:
    import errno
    import signal
    import time

    word, _, argument = word.partition(" ")
    if word == "KILL":
        os.kill(os.getpid(), signal.SIGKILL)
    elif word == "STOP":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif word == "WAIT":
        with open(f"{FOLDER}/{point}.go", "rb") as f:
            f.read()
    elif word == "PAUSE":
        time.sleep(float(argument))
    else:
        number = getattr(errno, word)
        raise OSError(number, os.strerror(number), f"fault point {point}")


def _by_chance(point: str) -> str:
    global _chances
    if _chances is None:
        try:
            with open(f"{FOLDER}/chance") as f:
                lines = [line.split(maxsplit=2) for line in f]
        except FileNotFoundError:
            lines = []
        _chances = [(float(p), at, word.strip()) for p, at, word in lines]
    for probability, at, word in _chances:
        if at in ("*", point) and int.from_bytes(os.urandom(4), "big") < probability * 2**32:
            return word
    return ""


def _log(what: str) -> None:
    import time

    try:
        fd = os.open(f"{FOLDER}/log", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    except OSError:
        return
    os.write(fd, b"%d %d %s\n" % (time.monotonic_ns(), os.getpid(), what.encode()))
    os.close(fd)


def _begin_serving() -> None:
    global _serving
    import fcntl

    try:
        fd = os.open(f"{FOLDER}/serving/{os.stat('.').st_ino}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        _log("VIOLATION")
    _serving = fd


def _end_serving() -> None:
    global _serving
    if _serving >= 0:
        os.close(_serving)
        _serving = -1
