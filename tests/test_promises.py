"""Promises of the lifecycle that no other test keeps an eye on (docs/reference/lifecycle.md)."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from llm_daemon import attach, errors
from llm_daemon.client import start, sync
from llm_daemon.core import rendezvous
from llm_daemon.daemon import app
from llm_daemon.testing.world import World, wait_gone


@pytest.fixture
def faults(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of fault points for the processes of this world."""
    folder = world.base / "faults"
    folder.mkdir()
    monkeypatch.setenv("LLM_DAEMON_FAULTS", str(folder))
    yield folder
    for go in folder.glob("*.go"):  # nobody waits for ever
        release(go)


def trap(folder: Path, point: str, word: str) -> Path:
    go = folder / f"{point}.go"
    if word == "WAIT":
        os.mkfifo(go)
    (folder / point).write_text(word)
    return go


def release(go: Path) -> None:
    try:
        os.close(os.open(go, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        pass  # nobody waits there


def until(made: Path) -> None:
    """Returns once a trap was sprung: `POINT` is then `POINT.PID`."""
    end = time.monotonic() + 20
    while made.exists():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_deadline_is_kept_while_the_daemon_does_not_answer(
    world: World, faults: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L2: the limits of one connection do not add to it."""
    talk = sync.connect()
    assert talk is not None
    monkeypatch.setattr(start, "ANSWER_WAIT", 60.0)
    go = trap(faults, "hello_read", "WAIT")
    began = time.monotonic()
    with pytest.raises(errors.DaemonUnresponsive, match=f"pid {talk.welcome['pid']}"):
        start.ensure(deadline=1.0)
    assert time.monotonic() - began < 30, "the limit of one answer is a minute"
    release(go)
    talk.close()


def test_a_candidate_that_was_stopped_with_the_lock_in_hand_is_woken(world: World, faults: Path) -> None:
    trap(faults, "listening", "STOP")
    first = world.python("from llm_daemon import connect; talk = connect(); print(talk.welcome['pid'], flush=True); input()")
    until(faults / "listening")
    (sprung,) = faults.glob("listening.*")
    stopped = int(sprung.suffix[1:])
    first.kill()  # it waits for the candidate's word; others wait for START, which goes with it
    first.wait()
    talk = sync.connect()
    assert talk is not None
    assert talk.welcome["pid"] == stopped
    talk.close()
    assert wait_gone(stopped, 20)


def test_a_start_that_is_held_for_ever_delays_and_no_more(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """S5: its holder may be stopped."""
    monkeypatch.setattr(rendezvous, "START_PATIENCE", 0.3)
    world.runtime.mkdir(mode=0o700)
    fd = os.open(world.runtime / "start", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    talk = sync.connect()
    assert talk is not None
    talk.close()
    os.close(fd)


def test_a_forked_child_does_not_keep_start(world: World, faults: Path) -> None:
    """Its copy of the lock would make everybody wait for START_PATIENCE seconds."""
    trap(faults, "verdict_read", "WAIT")
    code = (
        "import os, sys, threading\n"
        "from llm_daemon import connect\n"
        "worker = threading.Thread(target=connect)\n"
        "worker.start()\n"
        "sys.stdin.readline()\n"
        "if not os.fork(): print(os.getpid(), flush=True)\n"
        "sys.stdin.read()"
    )
    host = world.python(code)
    until(faults / "verdict_read")  # START is held by that thread
    assert host.stdin is not None
    assert host.stdout is not None
    host.stdin.write("\n")
    host.stdin.flush()
    child = int(host.stdout.readline())
    host.kill()
    host.wait()
    fd = os.open(world.runtime / "start", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while the child keeps it
    os.close(fd)
    host.stdin.close()
    os.kill(child, signal.SIGKILL)  # ours by descent: nobody else has waited for it
    assert wait_gone(child, 10)


def test_the_leases_of_a_daemon_whose_folder_was_deleted_move_to_the_next_one(world: World, quick: str) -> None:
    with attach(quick) as llm:
        old, engine = llm.daemon_pid, llm.pid
        shutil.rmtree(world.runtime)
        assert wait_gone(old, app.BEAT + 30)
        assert wait_gone(engine, 30)
        assert llm.daemon_pid != old
        assert llm.is_open()


def test_the_watchdog_ends_a_daemon_whose_loop_hangs(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    class Ended(Exception):
        pass

    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(app, "BEAT", 0.001)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended, match="70"):
        app.watch(SimpleNamespace(beats=1))  # type: ignore[arg-type]
    assert "test_the_watchdog" in capfd.readouterr().err, "the dump says where it hangs"


def test_the_watchdog_leaves_a_living_daemon_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Enough(Exception):
        pass

    class Alive:
        looks = 0

        @property
        def beats(self) -> int:
            self.looks += 1
            if self.looks > 50:
                raise Enough
            return self.looks

    monkeypatch.setattr(app, "BEAT", 0.001)
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("it lives"))
    with pytest.raises(Enough):
        app.watch(Alive())  # type: ignore[arg-type]


def test_who_only_looks_does_not_retire_an_older_daemon(world: World, tmp_path: Path) -> None:
    from .test_upgrade import version

    talk = sync.connect()
    assert talk is not None
    code = "from llm_daemon import connect\nconnect(start_daemon=False, lease=False)"
    env = {**os.environ, "PYTHONPATH": version(tmp_path, 2)}
    looked = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert "is older than this client" in looked.stderr
    assert talk.is_open()
    assert talk.ask("CALL", 10, method="status", params={})["op"] == "RESULT", "and it does not retire"
    talk.close()
    again = sync.connect(start_daemon=False)
    assert again is None or again.welcome["pid"] == talk.welcome["pid"]
    if again is not None:
        again.close()
