"""When is an engine ready, and is it ours who answers?"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ..core.silence import Silence
from ..engines.base import ADDRESS, BAD_MODEL, CRASHED, OUT_OF_MEMORY, Adapter, Plan, Probe
from ..errors import EngineError, EngineTimeout, LlmDaemonError, UsageError
from .address import connect_tcp, holds, listeners, tcp, tree
from .identity import peer, port_holder
from .process import EngineProcess

# Fast while a small model loads (readiness noticed within 25 ms), then slower up to `LAZY`: each probe costs the engine a little.
EAGER, LAZY, EAGER_FOR = 0.020, 0.250, 10.0
# One probe may hang, e.g. in an engine that accepts before it loads.
PATIENCE = 2.0
# Of one core: more is work.  Answering our probes costs something; a running engine is not probed, and a GPU's work shows little.
PROBED, UNPROBED = 0.05, 0.01
LACKING = frozenset({404, 405, 501})  # statuses that mean: no such route here
_TICK = os.sysconf("SC_CLK_TCK")


async def wait_ready(
    process: EngineProcess,
    plan: Plan,
    adapter: Adapter,
    on_state: Callable[[str], None] | None = None,
    pulse: Pulse | None = None,
) -> None:
    """Returns when the engine answers its probes at its own address, and the one who answers is in the keeper's tree.

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
            hint="nobody but the engine should be at its private address: end that process",
            **_details(process),
        ) from None
    except _Failed as failed:
        raise failure(process, adapter, str(failed)) from None
    except _Unfit as unfit:
        raise EngineError(
            f"{process.name} {unfit}", code="engine_unfit", hint="see its log for more", **_details(process)
        ) from None
    finally:
        polling.cancel()
        ending.cancel()
        await asyncio.gather(polling, ending, return_exceptions=True)


def failure(process: EngineProcess, adapter: Adapter, how: str = "") -> LlmDaemonError:
    """The error for an engine that ended by itself, or failed as `how` says, in its own words."""
    exit = process.exit
    status = None if exit is None else exit.status if exit.signal is None else -exit.signal
    kind, line = adapter.diagnose(status, process.heard())
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
    return EngineError(f"{process.name} did not start ({how or exit}): {line}", code=code, hint=hint, **details)


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


class _Failed(Exception):
    """It runs, but has not loaded its model."""


class _Unfit(Exception):
    """It is ours, and must not serve."""


async def _poll(process: EngineProcess, plan: Plan, on_state: Callable[[str], None], pulse: Pulse) -> None:
    state, began, pause = "starting", time.monotonic(), EAGER
    on_state(state)
    reason, strangers = "it does not listen", 0
    while True:
        try:
            # Not wait_for: before Python 3.12 it loses a cancellation that meets a result (cpython#86296).
            async with asyncio.timeout(min(PATIENCE, plan.stall)):
                probe, status = await _ask_in_turn(process, plan)
        except TimeoutError:
            reason = "it accepted a connection but does not answer"
        except OSError:
            strangers = 0  # not yet there; or it hung up, which is no different
        except _Stranger:
            strangers += 1  # for a moment, an engine that dies has let go of its files and still listens
            if strangers > 1:
                raise
        else:
            if status in probe.ready:
                pulse.silence.heard()
                if plan.warm_up is None or await _warm_up(process, plan, plan.warm_up, pulse):
                    on_state("ready")
                    return
                reason = "it hung up on its first request"
            else:
                reason = f"{probe.path} answers {status}"
            if state != "loading":
                state = "loading"
                on_state(state)
                pulse.silence.heard()
        await _not_given_up(process, plan)
        if pulse.look(PROBED):
            raise _Stalled(reason)
        if time.monotonic() - began > EAGER_FOR:
            pause = min(LAZY, pause * 1.2)
        await asyncio.sleep(pause)


async def post(process: EngineProcess, path: str, body: object) -> tuple[int, dict[str, Any]]:
    """Status and JSON object of one POST, on a connection of its own.  OSError or ValueError if there is no such answer."""
    answer = b""
    with await _asked(process, Probe(path, body=json.dumps(body).encode()), process.plan.headers) as sock:
        while chunk := await asyncio.get_running_loop().sock_recv(sock, 65536):
            answer += chunk
    first, _, said = answer.partition(b"\r\n\r\n")
    words, found = first.split(None, 2), json.loads(said)
    if not isinstance(found, dict) or len(words) < 2:
        raise ValueError("not the answer of an engine")
    return int(words[1]), found


async def _asked(process: EngineProcess, probe: Probe, headers: Sequence[tuple[str, str]]) -> socket.socket:
    """A connection to the engine and nobody else, on which this was asked; the caller closes it."""
    lines = [f"{'POST' if probe.body else 'GET'} {probe.path} HTTP/1.1", "Host: localhost", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers]
    if probe.body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(probe.body)}"]
    sock = await _connected(process)
    try:
        await asyncio.get_running_loop().sock_sendall(sock, "\r\n".join([*lines, "\r\n"]).encode() + probe.body)
    except BaseException:
        sock.close()
        raise
    return sock


async def _ask_in_turn(process: EngineProcess, plan: Plan) -> tuple[Probe, int]:
    """The first probe whose route there is, and the answer to it."""
    for probe in plan.probes:
        status = await ask(process, probe, plan.headers)
        if status not in LACKING:
            break
    if probe.guarded and status in probe.ready and await ask(process, probe) not in (401, 403):
        raise _Unfit("answers those who do not have its key")
    return probe, status


async def _warm_up(process: EngineProcess, plan: Plan, first: Probe, pulse: Pulse) -> bool:
    """The engine's first request, for as long as it shows signs of life; False if it hung up, perhaps because it died."""
    asking = asyncio.ensure_future(ask(process, first, plan.headers))
    try:
        while not asking.done():
            await asyncio.wait({asking}, timeout=min(LAZY, pulse.silence.step))
            await _not_given_up(process, plan)
            if pulse.look(UNPROBED):
                raise _Stalled("it does not answer its first request")
        status = asking.result()
    except OSError:
        return False
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    if status not in first.ready:
        raise _Failed(f"it answers its first request with {status}")
    return True


async def _not_given_up(process: EngineProcess, plan: Plan) -> None:
    if plan.fatal and re.search(plan.fatal, process.last_words()):
        await asyncio.sleep(LAZY)  # the rest of what it has to say
        raise _Failed("it has given up")


async def ask(process: EngineProcess, probe: Probe, headers: Sequence[tuple[str, str]] = ()) -> int:
    """The status of one request on a connection of its own, made to nobody but the engine.  OSError if there is no answer."""
    loop = asyncio.get_running_loop()
    with await _asked(process, probe, headers) as sock:
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


async def _connected(process: EngineProcess) -> socket.socket:
    """A connection to the engine and to nobody else.  OSError if nobody listens."""
    if (place := tcp(process.socket)) is not None:
        if not place[1]:
            raise ConnectionRefusedError("it has not said its port")
        sock = await connect_tcp(place)
        prove: Callable[[socket.socket, EngineProcess], None] = _port_must_be_ours
    else:
        sock, prove = socket.socket(socket.AF_UNIX), _must_be_ours
    try:
        if place is None:
            sock.setblocking(False)
            # Not loop.sock_connect: it takes EAGAIN of a full backlog for "in progress".  On a unix socket connect is immediate.
            sock.connect(process.socket)
        prove(sock, process)
    except BaseException:
        sock.close()
        raise
    return sock


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


def _port_must_be_ours(sock: socket.socket, process: EngineProcess) -> None:
    """Whoever may accept at this port must be in the keeper's tree, and reachable from this machine alone."""
    if sys.platform != "linux":
        return  # there, the reservation must do, and a key where the engine takes one
    host, port = sock.getpeername()
    found = listeners(host, port)
    if not found:
        raise ConnectionResetError("it listens no more")
    if set(found) - holds(process.keeper_pid, set(found)):
        raise _Stranger(port_holder(port))
    if any(found.values()):
        raise _Unfit(f"listens on every interface instead of {host} alone: other machines could use it")


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
        for pid in tree(self.process.pid):
            stat = _stat(pid)
            cpu += (stat[11] + stat[12]) / _TICK  # utime, stime
            disk += stat[9]  # majflt
            with suppress(OSError), open(f"/proc/{pid}/io") as f:
                disk += next((int(line.split()[1]) for line in f if line.startswith("read_bytes")), 0)
        return cpu, disk
