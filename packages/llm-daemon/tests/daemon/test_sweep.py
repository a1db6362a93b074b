"""What a new daemon clears away, and what it leaves alone."""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_daemon.daemon import cgroup, process
from llm_daemon.daemon.sweep import sweep


@pytest.fixture
def dead(tmp_path: Path, generation: str) -> Path:
    """The folder of a generation that nobody holds."""
    folder = tmp_path / f"g-{generation}"
    folder.mkdir()
    return folder


def tagged(generation: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(["/bin/sleep", "60"], env={"LLM_DAEMON_GEN": generation})
    end = time.monotonic() + 10
    while generation.encode() not in Path(f"/proc/{process.pid}/environ").read_bytes():
        assert time.monotonic() < end  # Popen returns in the middle of exec, a moment before /proc tells the environment
    return process


def test_a_dead_generation_goes_with_its_processes(dead: Path, generation: str) -> None:
    (dead / "i1-1").mkdir()
    process = tagged(generation)
    assert sweep(dead.parent, own="another") == 1
    assert process.wait(10) == -9
    assert not dead.exists()


def test_an_empty_folder_proves_nothing(dead: Path, generation: str) -> None:
    process = tagged(generation)
    assert sweep(dead.parent, own="another") == 1
    assert process.wait(10) == -9
    assert not dead.exists()


def test_who_is_forked_during_the_look_is_found_by_the_next(dead: Path, generation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen once in a storm: the child of a process that was killed in this very moment lived on for ever."""
    (dead / "i1-1").mkdir()
    parent, looks = tagged(generation), 0
    children: list[subprocess.Popen[bytes]] = []
    whole = process.tagged

    def look(name: str, value: str) -> Iterator[tuple[int, int]]:
        nonlocal looks
        looks += 1
        found = list(whole(name, value))
        if looks == 1:
            children.append(tagged(generation))
        yield from found

    monkeypatch.setattr(process, "tagged", look)
    assert sweep(dead.parent, own="another") == 2
    assert [one.wait(10) for one in (parent, *children)] == [-9, -9]


def test_one_that_lives_and_our_own_stay(dead: Path, generation: str) -> None:
    (dead / "i1-1").mkdir()
    process = tagged(generation)
    try:
        assert sweep(dead.parent, own=generation) == 0
        fd = os.open(dead, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            assert sweep(dead.parent, own="another") == 0
        finally:
            os.close(fd)
        assert process.poll() is None
        assert dead.exists()
    finally:
        process.kill()
        process.wait()


def test_sockets_that_were_never_published_go(tmp_path: Path) -> None:
    for name in ("s.0123456789abcdef", "h.0123456789abcdef", "s.fedcba9876543210", "sock"):
        (tmp_path / name).touch()
    sweep(tmp_path, own="fedcba9876543210")
    assert sorted(os.listdir(tmp_path)) == ["s.fedcba9876543210", "sock"]


def test_a_note_of_a_box_that_never_was(dead: Path, generation: str) -> None:
    """The daemon was killed between the two."""
    (dead / "i1-1.cgroup").symlink_to(f"/no/such/{cgroup.PREFIX}{generation}-i1-1")
    sweep(dead.parent, own="another")
    assert not dead.exists()


def test_a_note_that_is_not_ours_is_not_followed(tmp_path: Path, dead: Path) -> None:
    other = tmp_path / f"{cgroup.PREFIX}other-i1-1"
    other.mkdir()
    (other / "cgroup.kill").write_text("")
    (dead / "i1-1.cgroup").symlink_to(other)
    sweep(tmp_path, own="another")
    assert not dead.exists()
    assert (other / "cgroup.kill").read_text() == ""


def test_what_is_still_dying_keeps_its_folder(monkeypatch: pytest.MonkeyPatch, dead: Path) -> None:
    """For the next daemon: nothing else knows of that box."""
    (dead / "i1-1").mkdir()
    monkeypatch.setattr(cgroup, "sweep", lambda folder: False)
    sweep(dead.parent, own="another")
    assert (dead / "i1-1").exists()
