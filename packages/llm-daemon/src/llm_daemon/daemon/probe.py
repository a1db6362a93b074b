"""When is an engine ready, and is it ours who answers?"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from ..core.silence import Silence
from ..engines.base import ADDRESS, BAD_MODEL, CRASHED, OUT_OF_MEMORY, Adapter, Plan
from ..errors import EngineError, EngineTimeout, LlmDaemonError, UsageError
from .identity import peer
from .process import EngineProcess

# Fast while a small model loads (readiness noticed within 25 ms), then slower up to `LAZY`: each probe costs the engine a little.
EAGER, LAZY, EAGER_FOR = 0.020, 0.250, 10.0
# One probe may hang, e.g. in an engine that accepts before it loads.
PATIENCE = 2.0
# Of one core: more is work.  Answering our probes costs something; a running engine is not probed, and a GPU's work shows little.
PROBED, UNPROBED = 0.05, 0.01
_TICK = os.sysconf("SC_CLK_TCK")


async def wait_ready(
    process: EngineProcess,
    plan: Plan,
    adapter: Adapter,
    on_state: Callable[[str], None] | None = None,
    pulse: Pulse | None = None,
) -> None:
    """Returns when the engine answers its probe on its own socket, and the one who answers is in the keeper's tree.

    `on_state` hears `starting`, `loading` (it answers, but not yet), `ready`, each when it begins.  There is no total
    deadline: a load may take hours, but not `plan.stall` seconds without a byte of log, a change of state, CPU time or
    disk reads, nor core.silence.MUTE times as long without one of the first two (counted by `pulse`, for whoever shows
    it); then EngineTimeout.  EngineError if it ended (at once) or somebody else answers; UsageError (`bad_model`) if it
    ended because of the model file.  After an error the process may still run: stop it.
    """
    polling = asyncio.ensure_future(_poll(process, plan, on_state or (lambda state: None), pulse or Pulse(process, plan.stall)))
    ending = asyncio.ensure_future(process.wait())
    try:
        await asyncio.wait({polling, ending}, return_when=asyncio.FIRST_COMPLETED)
        if ending.done() and not (polling.done() and polling.exception()):
            raise failure(process, adapter)
        polling.result()
    except _Stalled as stalled:
        raise EngineTimeout(
            f"{process.name} made no progress for {plan.stall:g} s while loading ({stalled})",
            hint="look at its log; a very slow disk or device may need a longer wait",
            **_details(process),
        ) from None
    except _Stranger as stranger:
        raise EngineError(
            f"{stranger} answers in place of {process.name}",
            code=ADDRESS,
            hint="nobody but the engine should be in its private folder: end that process",
            **_details(process),
        ) from None
    finally:
        polling.cancel()
        ending.cancel()
        await asyncio.gather(polling, ending, return_exceptions=True)


def failure(process: EngineProcess, adapter: Adapter) -> LlmDaemonError:
    """The error for an engine that ended by itself, in its own words."""
    exit = process.exit
    status = None if exit is None else exit.status if exit.signal is None else -exit.signal
    kind, line = adapter.diagnose(status, process.last_words())
    details = _details(process)
    if kind == BAD_MODEL:
        return UsageError(
            f"{process.name} cannot load this model: {line}",
            code=BAD_MODEL,
            hint="is the file complete, and made for this engine?",
            **details,
        )
    hint = {OUT_OF_MEMORY: "try a smaller context or quantization, or stop another model"}.get(kind, "see its log for more")
    code = "keeper_died" if process.lost_keeper else "engine_start_failed" if kind == CRASHED else kind
    return EngineError(f"{process.name} did not start ({exit}): {line}", code=code, hint=hint, **details)


def _details(process: EngineProcess) -> dict[str, Any]:
    exit = process.exit
    return {
        "last_words": process.last_words(),
        "log": process.log.path,
        "exit": None if exit is None else {"status": exit.status, "signal": exit.signal},
    }


class _Stalled(Exception):
    pass


class _Stranger(Exception):
    pass


async def _poll(process: EngineProcess, plan: Plan, on_state: Callable[[str], None], pulse: Pulse) -> None:
    state, began, pause = "starting", time.monotonic(), EAGER
    on_state(state)
    reason = "it does not listen"
    while True:
        try:
            # Not wait_for: before Python 3.12 it loses a cancellation that meets a result (cpython#86296).
            async with asyncio.timeout(min(PATIENCE, plan.stall)):
                status = await _ask(process, plan.probe.path)
        except TimeoutError:
            reason = "it accepted a connection but does not answer"
        except OSError:
            pass  # not yet there; or it hung up, which is no different
        else:
            if status in plan.probe.ready:
                pulse.silence.heard()
                on_state("ready")
                return
            reason = f"{plan.probe.path} answers {status}"
            if state != "loading":
                state = "loading"
                on_state(state)
                pulse.silence.heard()
        if pulse.look(PROBED):
            raise _Stalled(reason)
        if time.monotonic() - began > EAGER_FOR:
            pause = min(LAZY, pause * 1.2)
        await asyncio.sleep(pause)


async def post(process: EngineProcess, path: str, body: object) -> tuple[int, dict[str, Any]]:
    """Status and JSON object of one POST, on a connection of its own.  OSError or ValueError if there is no such answer."""
    loop, data = asyncio.get_running_loop(), json.dumps(body).encode()
    with _connected(process) as sock:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        await loop.sock_sendall(sock, f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        answer = b""
        while chunk := await loop.sock_recv(sock, 65536):
            answer += chunk
    first, _, said = answer.partition(b"\r\n\r\n")
    words, found = first.split(None, 2), json.loads(said)
    if not isinstance(found, dict) or len(words) < 2:
        raise ValueError("not the answer of an engine")
    return int(words[1]), found


def _connected(process: EngineProcess) -> socket.socket:
    """A connection to the engine and nobody else; the caller closes it."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.setblocking(False)
        # Not loop.sock_connect: it takes EAGAIN of a full backlog for "in progress".  On a unix socket connect is immediate.
        sock.connect(process.socket)
        _must_be_ours(sock, process)
    except BaseException:
        sock.close()
        raise
    return sock


async def _ask(process: EngineProcess, path: str) -> int:
    """The status of one GET on a connection of its own.  OSError if there is no answer."""
    loop = asyncio.get_running_loop()
    with _connected(process) as sock:
        await loop.sock_sendall(sock, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        head = b""
        while b"\r\n" not in head:
            data = await loop.sock_recv(sock, 4096)
            if not data:
                raise ConnectionResetError("closed without an answer")
            head += data
    words = head.split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        raise ConnectionError("not HTTP")
    return int(words[1])


def _must_be_ours(sock: socket.socket, process: EngineProcess) -> None:
    """SO_PEERCRED names who called listen(): it must be the engine or a process below the keeper."""
    pid, uid = peer(sock)
    if sys.platform != "linux" or pid == process.pid:
        return  # without pid and /proc, the folder's being fresh and 0700 must do
    at = pid
    for _ in range(64):
        if at == process.keeper_pid:
            return
        at = _stat(at)[1] if at > 1 else 0
        if not at:
            break
    raise _Stranger(f"process {pid} of user {uid}")


def _stat(pid: int) -> list[int]:
    """/proc/PID/stat from the parent's pid on, at the indexes 1, 2, ...; zeros if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            return [0, *map(int, f.read().rpartition(b")")[2].split()[1:])]
    except OSError:
        return [0] * 50


class Pulse:
    """An engine's signs of life, and the count of its silence."""

    def __init__(self, process: EngineProcess, stall: float) -> None:
        self.process = process
        self.silence = Silence(stall, time.monotonic())
        self._logged = process.last_activity
        self._work = self._read_work()

    def begin(self) -> None:
        """A new watch: what went on before it does not count."""
        self.silence.begin(time.monotonic())
        self._work = self._read_work()

    def look(self, share: float, words: bool = False, unseen: bool = False) -> str | None:
        """Looks if it is time to; the reason why the engine counts as hung, or None.

        `share` of one core it may use without being at work.  `words`: it has spoken, on a connection.  `unseen`: whether
        it counts as working where the system does not tell.
        """
        now, silence = time.monotonic(), self.silence
        if self.process.last_activity > self._logged:
            self._logged, words = self.process.last_activity, True
        if now - silence.looked >= silence.step * 0.99:
            before, self._work = self._work, self._read_work()
            works = unseen
            if before is not None and self._work is not None:
                cpu, disk = self._work[0] - before[0], self._work[1] - before[1]
                works = disk != 0 or cpu >= max(0.03, share * (now - silence.looked))
            silence.look(now, words, works)
        elif words:
            silence.heard()
        return silence.verdict

    def _read_work(self) -> tuple[float, int] | None:
        """CPU seconds, and page faults plus bytes read from disk, of the engine's whole tree; None if there is no /proc."""
        if not os.path.exists("/proc/self/stat"):
            return None
        cpu, disk = 0.0, 0
        todo = [self.process.pid]
        while todo:
            pid = todo.pop()
            stat = _stat(pid)
            cpu += (stat[11] + stat[12]) / _TICK  # utime, stime
            disk += stat[9]  # majflt
            try:
                with open(f"/proc/{pid}/io") as f:
                    disk += next((int(line.split()[1]) for line in f if line.startswith("read_bytes")), 0)
                for task in os.listdir(f"/proc/{pid}/task"):
                    with open(f"/proc/{pid}/task/{task}/children") as f:
                        todo += map(int, f.read().split())
            except OSError:
                pass  # it ended
        return cpu, disk
