"""A world of its own for a test: folders, a real daemon in them, and the proof that nothing of it survives.  Linux."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from ..client import sync
from . import census

LLM_DAEMON = str(Path(sys.executable).with_name("llm-daemon"))
CONFIG = """
ttl = 30
linger = 0.2
[engines.fake]
adapter = "llm_daemon.testing.fake_engine:FakeEngine"
"""
GENERATION = re.compile(r"generation (\w+)$", re.MULTILINE)  # as the daemon logs it


class World:
    """Runtime, state and config folders, and what runs in them."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.runtime, self.state, self.config = base / "run", base / "state", base / "config.toml"
        self.config.write_text(CONFIG)
        self.children: list[subprocess.Popen[str]] = []

    @property
    def env(self) -> dict[str, str]:
        """For child processes."""
        return dict(os.environ)

    def llm_daemon(self, *args: str, timeout: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
        """Runs the command line to its end."""
        return subprocess.run(
            [LLM_DAEMON, *args],
            env={**self.env, **env},
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    def python(self, code: str, **env: str) -> subprocess.Popen[str]:
        """Starts a program of its own; talk to it by lines."""
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**self.env, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.children.append(child)
        return child

    def client(self, model: str, **env: str) -> tuple[subprocess.Popen[str], int, int]:
        """A process that holds a lease until its stdin ends: (process, engine pid, daemon pid)."""
        child = self.python(
            "import sys; from llm_daemon import attach\n"
            f"llm = attach({model!r}); print(llm.pid, llm.daemon_pid, flush=True); sys.stdin.read()",
            **env,
        )
        assert child.stdout is not None
        engine, daemon = map(int, child.stdout.readline().split())
        return child, engine, daemon

    def leave(self, client: subprocess.Popen[str]) -> None:
        """Ends a `client`, politely."""
        assert client.stdin is not None
        client.stdin.close()
        assert client.wait(timeout=30) == 0

    def generations(self) -> set[str]:
        """Nonces of the daemons of this world, from their folders and from what their log remembers."""
        said = [
            nonce for log in self.state.glob("logs/daemon.log*") for nonce in GENERATION.findall(log.read_text(errors="replace"))
        ]
        return {folder.name.removeprefix("g-") for folder in self.runtime.glob("g-*")} | set(said)

    def processes(self) -> dict[int, str]:
        """Every living daemon, keeper and engine of this world, and what an engine left: {pid: command}."""
        return census.processes(self.runtime, self.generations())

    def census(self) -> dict[str, list[str]]:
        """What there is now.  Once all have gone, every list is empty; `zombies` and `leaked_fds` are empty at all times.

        `processes` (`PID COMMAND`), `zombies` (ended children of the calling process), `cgroups` (boxes of engines),
        `leaked_fds` (who holds what only the daemon may), `files` (names in the runtime folder that should have gone).
        """
        generations = self.generations()
        return {
            "processes": [f"{pid} {command}" for pid, command in census.processes(self.runtime, generations).items()],
            "zombies": census.zombies(),
            "cgroups": census.boxes(generations),
            "leaked_fds": census.leaked_fds(self.runtime),
            "files": census.files(self.runtime),
        }

    def wait_empty(self, within: float) -> float:
        """Seconds until no process of this world lives; fails after `within`."""
        began = time.monotonic()
        while found := self.processes():
            left = within - (time.monotonic() - began)
            assert left > 0, f"still alive after {within} s: {found}"
            wait_gone(next(iter(found)), left)
        return time.monotonic() - began

    def close(self) -> None:
        for child in self.children:
            if child.stdin:
                child.stdin.close()
            child.kill()
            child.wait()
            if child.stdout:
                child.stdout.close()
        end = time.monotonic() + 20
        while found := self.processes():  # more than once: a client may have been killed while it started the next daemon
            if time.monotonic() > end:
                for pid in found:
                    os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"still alive, killed now: {found}")
            self._stop()
            wait_gone(next(iter(found)), 1.0)

    def _stop(self) -> None:
        talk = None
        try:
            talk = sync.connect(start_daemon=False, lease=False)
            if talk is not None:
                talk.ask("CALL", 10, method="stop", params={"force": True})
        except Exception:
            pass  # on its way out already, or broken: the census tells
        finally:
            if talk is not None:
                talk.close()


def wait_gone(pid: int, within: float) -> bool:
    """Waits for the end of a process that need not be our child; False if it lives on."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], within)[0])
    finally:
        os.close(fd)
