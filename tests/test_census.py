"""The census sees what it is there for: what a test leaves behind must not depend on nobody looking."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from llm_daemon.testing.world import World, wait_gone

NOTHING: dict[str, list[str]] = {"processes": [], "zombies": [], "cgroups": [], "leaked_fds": [], "files": []}


def leave_soon(world: World) -> None:
    world.config.write_text(world.config.read_text().replace("ttl = 30", "ttl = 0"))


def test_a_visit_leaves_nothing(world: World, quick: str) -> None:
    leave_soon(world)
    client, engine, daemon = world.client(quick)
    there = world.census()
    assert {f"{engine}", f"{daemon}"} <= {entry.split()[0] for entry in there["processes"]}
    assert len(there["processes"]) == 3
    assert there["leaked_fds"] == there["zombies"] == []
    assert client.stdin
    client.stdin.close()
    client.wait(20)
    world.wait_empty(20)
    assert world.census() == NOTHING


def test_leaks_are_seen(world: World, quick: str) -> None:
    _, _, daemon = world.client(quick)
    life = os.open(world.runtime, os.O_RDONLY)
    held = [fd for path in Path(f"/proc/{daemon}/fd").iterdir() if (fd := _opened_if_written_pipe(path)) is not None]
    try:
        found = world.census()["leaked_fds"]
    finally:
        for fd in (life, *held):
            os.close(fd)
    assert sorted(entry.rpartition(": ")[2] for entry in found) == ["LIFE", "lifeline"]
    assert all(entry.startswith(f"{os.getpid()} ") for entry in found)
    assert world.census()["leaked_fds"] == []


def _opened_if_written_pipe(path: Path) -> int | None:
    try:
        flags = Path(str(path).replace("/fd/", "/fdinfo/")).read_text().split()[3]
        if os.readlink(path).startswith("pipe:") and int(flags, 8) & os.O_ACCMODE == os.O_WRONLY:
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # the daemon closed it since the folder was listed
        pass
    return None


def test_what_escaped_and_what_lies_about_is_seen(world: World, fake_model: Callable[..., str], quick: str) -> None:
    """Daemon and keeper are killed together; the stray has no tag of ours.  The next daemon clears all that."""
    leave_soon(world)
    client, engine, daemon = world.client(fake_model(grandchild="scrubbed"))
    keeper = int(Path(f"/proc/{engine}/stat").read_text().rpartition(")")[2].split()[1])
    boxes = len(world.census()["cgroups"])
    os.kill(daemon, signal.SIGSTOP)
    client.kill()
    os.waitid(os.P_PID, client.pid, os.WEXITED | os.WNOWAIT)
    assert world.census()["zombies"] == [f"{client.pid} python"]
    for pid in (keeper, daemon):
        os.kill(pid, signal.SIGKILL)
    assert all(wait_gone(pid, 10) for pid in (keeper, daemon, engine))
    left = world.census()
    assert len(left["processes"]) == 1
    assert len(left["cgroups"]) == boxes
    assert [name[:2] for name in left["files"]] == ["g-"]
    if not boxes:  # no cgroup v2 of ours here: nobody but this test knows of it
        os.kill(int(left["processes"][0].split()[0]), signal.SIGKILL)
    client, _, _ = world.client(quick)
    assert client.stdin
    client.stdin.close()
    client.wait(20)
    world.wait_empty(20)
    for child in world.children:
        child.wait()
    assert world.census() == NOTHING
