"""Fault points: each word does what it says, to the first process that gets there and to no other."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llm_daemon import faults

PASS = "import os; from llm_daemon.faults import fp; fp('here'); print('past', flush=True)"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(faults, "FOLDER", str(tmp_path))
    monkeypatch.setattr(faults, "_chances", None)
    return tmp_path


def passing(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PASS], env={**os.environ, "LLM_DAEMON_FAULTS": str(folder)}, stdout=subprocess.PIPE, text=True
    )


def test_without_a_folder_nothing_happens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "here").write_text("ENOSPC")
    (folder / "log").touch()
    monkeypatch.setattr(faults, "FOLDER", "")
    faults.fp("here")
    assert (folder / "here").exists()
    assert not (folder / "log").read_text()


def test_an_error_number_is_raised_once_and_only_at_its_point(folder: Path) -> None:
    (folder / "here").write_text("ENOSPC\n")
    faults.fp("elsewhere")
    with pytest.raises(OSError, match="No space") as caught:
        faults.fp("here")
    assert caught.value.errno == errno.ENOSPC
    faults.fp("here")
    assert (folder / f"here.{os.getpid()}").exists()


def test_kill(folder: Path) -> None:
    (folder / "here").write_text("KILL")
    with passing(folder) as child:
        assert child.communicate(timeout=60)[0] == ""
    assert child.returncode == -signal.SIGKILL


def test_stop(folder: Path) -> None:
    (folder / "here").write_text("STOP")
    with passing(folder) as child:
        assert os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1])
        os.kill(child.pid, signal.SIGCONT)
        assert child.communicate(timeout=60)[0] == "past\n"


def test_wait_lasts_until_the_pipe_is_closed(folder: Path) -> None:
    (folder / "here").write_text("WAIT")
    os.mkfifo(folder / "here.go")
    with passing(folder) as child:
        fd = os.open(folder / "here.go", os.O_WRONLY)  # returns when the other end is open
        assert child.poll() is None
        os.close(fd)
        assert child.communicate(timeout=60)[0] == "past\n"


def test_pause(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    (folder / "here").write_text("PAUSE 0.25")
    faults.fp("here")
    assert slept == [0.25]


def test_chances(folder: Path) -> None:
    (folder / "chance").write_text("1 there EMFILE\n0 * KILL\n1 * ENOSPC\n")
    with pytest.raises(OSError, match="Too many"):
        faults.fp("there")
    with pytest.raises(OSError, match="No space"):
        faults.fp("here")


def test_the_log_has_a_line_for_each_point_but_only_if_the_file_is_there(folder: Path) -> None:
    faults.fp("here")
    (folder / "log").touch()
    faults.fp("here")
    faults.fp("there")
    lines = [line.split() for line in (folder / "log").read_text().splitlines()]
    assert [words[1:] for words in lines] == [[str(os.getpid()), "here"], [str(os.getpid()), "there"]]
    assert int(lines[0][0]) <= int(lines[1][0])


SERVE = """
import sys
from llm_daemon.faults import fp
for point in sys.stdin:
    fp(point.strip())
    print("past", flush=True)
"""


@pytest.mark.parametrize("end", ["listener_closed", "ghost_unlocked", "SIGKILL"])
def test_who_publishes_while_another_serves_is_a_violation(folder: Path, end: str) -> None:
    (folder / "serving").mkdir()
    (folder / "log").touch()

    def daemon() -> subprocess.Popen[str]:
        env = {**os.environ, "LLM_DAEMON_FAULTS": str(folder)}
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, "-c", SERVE], env=env, cwd=folder, text=True, stdin=pipe, stdout=pipe, bufsize=1)

    def at(child: subprocess.Popen[str], point: str) -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(point + "\n")
        assert child.stdout.readline() == "past\n"

    def violations() -> int:
        return (folder / "log").read_text().count("VIOLATION")

    with daemon() as first, daemon() as second, daemon() as third:
        at(first, "renamed")
        if end == "SIGKILL":
            first.kill()
            first.wait()
        else:
            at(first, end)
        at(second, "renamed")
        assert violations() == 0
        at(third, "renamed")
        assert violations() == 1
