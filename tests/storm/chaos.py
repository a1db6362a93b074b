"""Who is killed, stopped or robbed while the clients run.  Each act does its harm once and is called again and again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol


class Target(Protocol):
    """What an act may see of the storm."""

    @property
    def runtime(self) -> Path: ...
    @property
    def workers(self) -> dict[int, int]: ...  # pid -> number; our children, not reaped
    @property
    def kills(self) -> dict[str, int]: ...
    def world(self) -> list[int]: ...  # pids of daemons, keepers, engines


Act = Callable[[Target, random.Random], None]


def kill_client(storm: Target, dice: random.Random) -> None:
    """kill -9 of a worker, in whatever it does."""
    if storm.workers:
        os.kill(dice.choice(list(storm.workers)), signal.SIGKILL)
        count(storm, "client")


def stop_client(storm: Target, dice: random.Random) -> None:
    if storm.workers:
        pid = dice.choice(list(storm.workers))
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.1 + dice.random() * 0.2)
        os.kill(pid, signal.SIGCONT)
        count(storm, "client stopped")


def suspend(storm: Target, dice: random.Random) -> None:
    """Everything stands still for a second, as when a lid is closed."""
    stopped = []
    for pid in [*storm.workers, *storm.world()]:
        with suppress(OSError):
            fd = os.pidfd_open(pid)
            stopped.append(fd)
            if pid in storm.workers or os.readlink(f"/proc/{pid}/cwd").startswith(str(storm.runtime)):
                signal.pidfd_send_signal(fd, signal.SIGSTOP)
    time.sleep(1)
    for fd in stopped:
        with suppress(OSError):
            signal.pidfd_send_signal(fd, signal.SIGCONT)
        os.close(fd)
    count(storm, "suspended")


def delete(storm: Target, dice: random.Random) -> None:
    """`rm -rf` of the runtime folder."""
    shutil.rmtree(storm.runtime, ignore_errors=True)
    count(storm, "deleted")


def lose_start(storm: Target, dice: random.Random) -> None:
    """START is lost: the next who wants it makes another.  Only a throttle may suffer (invariant S5)."""
    with suppress(OSError):
        os.unlink(storm.runtime / "start")
        count(storm, "START lost")


def fill(storm: Target, dice: random.Random) -> None:
    """The small disk is full for a moment: of bytes, or of files."""
    made = []
    room = storm.runtime.parent
    try:
        if dice.random() < 0.5:
            made.append(room / "full")
            with open(made[0], "wb", 0) as f:
                while f.write(bytes(4096)):
                    pass
        else:
            for number in range(1000):
                made.append(room / f"full{number}")
                made[-1].touch()
    except OSError:
        count(storm, "filled")
    time.sleep(0.1 + dice.random() * 0.4)
    for path in made:
        path.unlink(missing_ok=True)


def count(storm: Target, what: str) -> None:
    storm.kills[what] = storm.kills.get(what, 0) + 1
