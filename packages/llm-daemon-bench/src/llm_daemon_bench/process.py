"""A server process that cannot outlive us: under llm-daemon's keeper, which watches us and ends the whole tree when we end.

See llm_daemon/daemon/keeper.py for the pipes and lines used here.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic, perf_counter_ns

from llm_daemon.daemon.process import ENGINE_TAG, KEEPER, kill_tagged

WORDS = 4096  # bytes of a log's end that are worth showing
SPAWN_S = 30.0  # for the keeper to say that the program runs


class Died(Exception):
    """The program could not be run or has ended; the message is one line."""


class Process:
    """One server.  `pid`: of the program (only for reading /proc).  `spawn_ns`: just before its keeper was started.

    `running_ms`: from then until the program ran.  One thread at a time.
    """

    def __init__(self, argv: Sequence[str], folder: str, env: Mapping[str, str], log: Path, grace: float) -> None:
        """Starts it in `folder` and returns once it runs.  Raises Died; then nothing is left."""
        self.argv, self.log, self.grace = tuple(argv), log, grace
        self.pid = 0
        self.running_ms = 0.0
        self.tag = os.urandom(8).hex()
        self._told = b""
        self._report: dict[str, object] = {}
        life_r, self._lifeline = os.pipe()
        self._status, status_w = os.pipe()
        command = [sys.executable, "-I", "-S", KEEPER, str(os.getpid()), str(life_r), str(status_w), "--", *argv]
        self.spawn_ns = perf_counter_ns()
        try:
            with open(log, "ab") as out:
                self._keeper = subprocess.Popen(
                    command, cwd=folder, env={**env, ENGINE_TAG: self.tag}, start_new_session=True,
                    pass_fds=(life_r, status_w), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                )  # fmt: skip
        except BaseException:
            self._close()
            raise
        finally:
            os.close(life_r)
            os.close(status_w)
        try:
            self._listen(SPAWN_S)
            if not self.pid:
                raise Died(f"cannot run {argv[0]}: {self._report.get('error') or 'its keeper did not answer'}")
        except BaseException:
            self.stop(force=True)
            raise
        self.running_ms = (perf_counter_ns() - self.spawn_ns) / 1e6

    def _listen(self, within: float) -> None:
        """Reads what the keeper says, until the program runs or ended, `within` seconds at most (0: what there is)."""
        end = monotonic() + within
        while select.select([self._status], [], [], max(0.0, end - monotonic()))[0]:
            data = os.read(self._status, 4096)
            *lines, self._told = (self._told + data).split(b"\n")
            for line in lines:
                self._report |= json.loads(line)
            self.pid = int(str(self._report.get("pid", 0)))
            if not data or (within and (self.pid or "error" in self._report)):
                return

    def exit(self, within: float = 0.0) -> str | None:
        """How it ended, in words; None while it lives.  One that is just dying gets `within` seconds to be seen dead."""
        if self._lifeline < 0:
            return "stopped"
        end = monotonic() + within
        self._listen(0)
        while "exit" not in self._report and self._keeper.poll() is None and (left := end - monotonic()) > 0:
            select.select([self._status], [], [], left)  # whatever the keeper says next, or its end
            self._listen(0)
        if self._keeper.poll() is None and "exit" not in self._report:
            return None
        status, number = self._report.get("exit"), self._report.get("signal")
        if isinstance(number, int):
            with suppress(ValueError):
                return f"killed by {signal.Signals(number).name}"
        return f"exit status {status}" if status is not None else "killed with its keeper"

    def last_words(self) -> str:
        """The end of its log."""
        return tail(self.log)

    def stop(self, force: bool = False) -> None:
        """SIGTERM, `grace` seconds, SIGTERM, `grace` seconds, SIGKILL, for the whole tree; returns when all is gone."""
        if self._lifeline < 0:
            return
        with suppress(OSError):
            os.write(self._lifeline, b"kill\n" if force else b"stop %f\n" % self.grace)
        try:
            self._keeper.wait(5.0 if force else 2 * self.grace + 5.0)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
        finally:
            os.close(self._lifeline)
            self._lifeline = -1
        self._keeper.wait()
        self._listen(0)
        if not {"exit", "error"} & self._report.keys():  # the keeper was killed: what left its tree is still there
            kill_tagged(ENGINE_TAG, self.tag)
        self._close()

    def _close(self) -> None:
        for fd in (self._lifeline, self._status):
            if fd >= 0:
                os.close(fd)
        self._lifeline = self._status = -1


def tail(path: Path) -> str:
    """The last lines of a file, without control characters."""
    try:
        with open(path, "rb") as f:
            f.seek(max(0, os.fstat(f.fileno()).st_size - WORDS))
            text = f.read().decode(errors="replace")
    except OSError:
        return ""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text).strip()
