"""What a daemon does not take from whoever started it, and the clock that it does not look at."""

from __future__ import annotations

import ast
import os
import signal
import sys
from pathlib import Path

import pytest

import llm_daemon

from .faults import Client, child_of, stage, stat

SOURCE = Path(llm_daemon.__file__).parent
# Where the wall clock may be read: it is shown, and nothing is decided by it but what to show.
SHOWN = {
    ("cli/logs.py", "time.time"), ("cli/explain.py", "time.localtime"), ("cli/explain.py", "time.strftime"),
    ("daemon/journal.py", "time.time"), ("daemon/desk.py", "time.time"), ("cli/measure.py", "time.time"),
}  # fmt: skip
WALL = {
    *(f"time.{name}" for name in ("time", "time_ns", "localtime", "gmtime", "ctime", "strftime", "CLOCK_REALTIME")),
    *(f"{kind}.{name}" for kind in ("datetime", "date") for name in ("now", "utcnow", "today")),
}

# A client in a bad way: it spoils everything that a child could inherit, then attaches and says whom it met.
SPOILT = """
import fcntl, json, os, resource, shutil, signal, sys, termios
source, model, folder = sys.argv[1:4]
sys.path.insert(0, source)
os.setsid()
_, tty = os.openpty()
fcntl.ioctl(tty, termios.TIOCSCTTY, 0)
os.nice(10)
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
extra = os.open(os.path.join(folder, "extra"), os.O_RDWR | os.O_CREAT)
os.set_inheritable(extra, True)
os.set_inheritable(tty, True)
os.mkdir(os.path.join(folder, "gone"))
os.chdir(os.path.join(folder, "gone"))
os.rmdir(os.path.join(folder, "gone"))
for limit, soft in ((resource.RLIMIT_CPU, 600), (resource.RLIMIT_FSIZE, 2**20), (resource.RLIMIT_NOFILE, 64)):
    resource.setrlimit(limit, (soft, resource.getrlimit(limit)[1]))
os.umask(0)
os.environ |= dict.fromkeys(
    ("OPENAI_API_KEY", "MY_SECRET", "AWS_SECRET_ACCESS_KEY", "LD_PRELOAD", "LD_AUDIT", "PYTHONPATH", "PYTHONSTARTUP", "BASH_ENV",
     "LLAMA_ARG_PORT", "MALLOC_PERTURB_"), "spoilt")
from llm_daemon import attach
llm = attach(model)
print(json.dumps({"attached": [llm.daemon_pid, llm.pid]}), flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_of_the_first_client_sticks_to_daemon_keeper_and_engine(tmp_path: Path) -> None:
    with stage() as s:
        s.clients.append(client := Client(SPOILT, [s.model, str(tmp_path)], s.env, s.base / "stderr"))
        said = client.said()
        assert "attached" in said, said
        assert stat(client.pid)[16] == "10"  # else this test proves nothing
        daemon, engine = said["attached"]
        keeper = child_of(daemon)
        assert keeper == int(stat(engine)[1])
        for pid, folder in ((daemon, str(s.runtime)), (keeper, f"{s.runtime}/g-"), (engine, f"{s.runtime}/g-")):
            assert_clean(pid, folder, tmp_path, int(stat(client.pid)[3]))


def target(fd: Path) -> str:
    """What an open file is; empty if it was closed since the folder was listed."""
    try:
        return os.readlink(fd)
    except FileNotFoundError:
        return ""


def assert_clean(pid: int, folder: str, spoilt: Path, session: int) -> None:
    proc = Path(f"/proc/{pid}")
    who = (proc / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    assert b"spoilt" not in (proc / "environ").read_bytes(), who
    assert os.readlink(proc / "cwd").startswith(folder), who
    links = [link for fd in (proc / "fd").iterdir() if (link := target(fd))]
    assert not [link for link in links if link.startswith(("/dev/pts", "/dev/tty", str(spoilt)))], who

    fields = stat(pid)  # numbered from the third of proc_pid_stat(5) on
    assert int(fields[3]) != session, who
    assert fields[4] == "0", f"{who}: it has a terminal"
    if os.geteuid() == 0:  # only root may take its own niceness back
        assert fields[16] == "0", f"{who}: nice {fields[16]}"

    status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines() if ":\t" in line)
    ignored, blocked = int(status["SigIgn"], 16), int(status["SigBlk"], 16)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        assert not ignored >> (number - 1) & 1, f"{who}: ignores {number.name}"
    assert not blocked >> (signal.SIGTERM - 1) & 1, f"{who}: blocks SIGTERM"
    assert int(status["Umask"], 8) == 0o077, who

    for line in (proc / "limits").read_text().splitlines():
        if line.startswith(("Max cpu time", "Max file size", "Max open files")):
            soft, hard = line[26:].split()[:2]
            assert soft == hard, f"{who}: {line}"


def test_no_decision_depends_on_the_wall_clock() -> None:
    found = set()
    for path in SOURCE.rglob("*.py"):
        if "testing" in path.relative_to(SOURCE).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                base = node.value
                name = f"{base.id if isinstance(base, ast.Name) else getattr(base, 'attr', '')}.{node.attr}"
                names = {name}
            elif isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
            else:
                continue
            found |= {(path.relative_to(SOURCE).as_posix(), name) for name in names & WALL}
    assert found == SHOWN
