"""Attach or start: connect, lock, connect again, spawn, await the report (docs/adr/0002, docs/reference/lifecycle.md).

Only a WELCOME received on a connection means "the daemon is up".  Lock, socket file and verdict are hints; everything
else loops until the deadline.  The lock taken here (START) only throttles spawning and may be lost without harm.

Imports nothing heavier than `os` at import: a whole process that attaches must stay fast.
"""

from __future__ import annotations

import _socket as socket  # the C half: the Python half imports enum and selectors, 10 ms
import errno
import os
import sys
import time

from .. import errors
from ..core import control
from ..paths import runtime_dir

TYPE_CHECKING = False  # the typing module costs more than everything here
if TYPE_CHECKING:
    from typing import Any, NoReturn

DEADLINE = 20.0  # seconds for the whole of `ensure`
CONNECT_WAIT = 2.0
ANSWER_WAIT = 3.0
START_PATIENCE = 5.0  # seconds a busy START is respected: its holder may be stopped
VERDICT_WAIT = 15.0
FAILURES = 3  # starts that may fail in one call
SPAWNS = 10  # starts in one call, failed or not: one that says READY and dies at once must not be started for ever

_DOWN = (errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.ENOTSOCK)
# What of the client's environment the daemon may see; engines see less still.
_ENV_NAMES = frozenset(
    "PATH HOME USER LOGNAME SHELL LANG LANGUAGE TZ TMPDIR LD_LIBRARY_PATH VIRTUAL_ENV NETRC SSL_CERT_FILE SSL_CERT_DIR "
    "REQUESTS_CA_BUNDLE CURL_CA_BUNDLE http_proxy https_proxy no_proxy all_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY ALL_PROXY "
    "XDG_CONFIG_HOME XDG_CACHE_HOME XDG_STATE_HOME XDG_DATA_HOME".split()
)
_ENV_PREFIXES = ("LLM_DAEMON_", "LC_", "PIP_", "UV_", "HF_", "CUDA_", "HIP_", "ROCR_", "NVIDIA_", "GGML_")


class Down(Exception):
    """Nobody serves here, as far as we can see."""


class Connection:
    """A greeted control connection: the socket, the daemon's WELCOME, and messages already read behind it."""

    def __init__(
        self, sock: socket.socket, welcome: dict[str, Any], decoder: control.Decoder, early: list[dict[str, Any]]
    ) -> None:
        self.sock = sock
        self.welcome = welcome
        self.decoder = decoder
        self.early = early


def ensure(
    hello: dict[str, object] | None = None, deadline: float = DEADLINE, start: bool = True, then: bytes = b""
) -> Connection | None:
    """A connection to the one daemon, started if need be; None if there is none and `start` is false.

    `hello`: extra fields for HELLO.  `then`: what the client says right behind it, saving a round trip.

    Raises UsageError or Unavailable with the daemon's own words if it cannot start, DaemonUnresponsive if one lives but
    does not answer, RemoteProtocolError if it is of another age.  Blocks for `deadline` seconds at most; may be called
    from any thread.
    """
    attempt = _Attempt(hello, then, time.monotonic() + deadline)
    while True:
        try:
            return attempt.connect()
        except Down:
            if not start:
                return None
        except errors.Unavailable:
            attempt.pause(0.02)
            continue
        if connection := attempt.start():
            return connection


class _Attempt:
    """State of one `ensure` call."""

    def __init__(self, hello: dict[str, object] | None, then: bytes, deadline: float) -> None:
        self.dir = runtime_dir()
        self.greeting = control.encode({"op": "HELLO", "proto": control.PROTO, **(hello or {})}) + then
        self.deadline = deadline
        self.failures = 0
        self.spawns = 0
        self.start_busy_since: float | None = None
        self.continued = False  # SIGCONT is sent once
        self.unresponsive: errors.DaemonUnresponsive | None = None
        self.peer = 0

    def pause(self, seconds: float) -> None:
        """Waits a jittered moment; raises at the deadline."""
        now = time.monotonic()
        if now >= self.deadline:
            raise self.unresponsive or errors.DaemonUnresponsive(
                "the daemon could not be reached in time", hint="`llm-daemon doctor` looks for the cause"
            )
        time.sleep(min(self.deadline - now, seconds * (0.25 + 0.75 * int.from_bytes(os.urandom(1), "big") / 255)))

    def connect(self) -> Connection:
        """Step A: one connection, one HELLO, one answer."""
        s = socket.socket(socket.AF_UNIX)
        try:
            self._connect_socket(s)
            self._check_peer(s)
            s.settimeout(ANSWER_WAIT)
            s.sendall(self.greeting)
            decoder = control.Decoder(control.ANSWER_LIMIT)
            messages: list[dict[str, Any]] = []
            while not messages:
                data = s.recv(65536)
                if not data:
                    raise Down
                messages = decoder.feed(data)
            return self._answered(s, decoder, messages)
        except TimeoutError:
            self._no_answer(s)
        except OSError as e:
            s.close()
            if e.errno == errno.EAGAIN:  # backlog full: busy, never a reason to start another
                raise errors.DaemonUnresponsive("the daemon accepts no connection") from None
            if e.errno in _DOWN:
                raise Down from None
            raise errors.UsageError(
                f"cannot reach the daemon in {self.dir}: {e.strerror}", hint="`llm-daemon doctor` looks for the cause"
            ) from None
        except BaseException:
            s.close()
            raise

    def _connect_socket(self, s: socket.socket) -> None:
        # A blocking connect with SO_SNDTIMEO: a non-blocking one reports a full backlog as "connected" (cpython#117208).
        import struct

        s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(CONNECT_WAIT), 0))
        path = os.path.join(self.dir, "sock")
        if len(os.fsencode(path)) < 104 or sys.platform != "linux":
            s.connect(path)
            return
        fd = os.open(self.dir, os.O_RDONLY | os.O_DIRECTORY)
        try:
            s.connect(f"/proc/self/fd/{fd}/sock")  # sun_path holds 107 bytes, unix(7)
        finally:
            os.close(fd)

    def _check_peer(self, s: socket.socket) -> None:
        uid = os.stat(self.dir).st_uid
        if hasattr(socket, "SO_PEERCRED"):
            import struct

            self.peer, uid, _gid = struct.unpack("3i", s.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != os.geteuid():
            raise errors.UsageError(
                f"the daemon in {self.dir} belongs to user id {uid}, not to you ({os.geteuid()})",
                hint="set LLM_DAEMON_RUNTIME_DIR to a folder of yours, or unset it", code="foreign_daemon",
            )  # fmt: skip

    def _answered(self, s: socket.socket, decoder: control.Decoder, messages: list[dict[str, Any]]) -> Connection:
        first, *early = messages
        op = first["op"]
        if op == "WELCOME":
            s.settimeout(None)
            return Connection(s, first, decoder, early)
        if op in ("GOING", "RETIRING"):
            raise errors.Unavailable("the daemon is leaving")
        if op == "OLD":
            theirs = first.get("proto")
            if isinstance(theirs, int) and theirs < control.PROTO:
                s.sendall(control.encode({"op": "RETIRE"}))  # only the newer side may ask: no ping-pong
                raise errors.Unavailable("an older daemon was asked to retire")
            raise errors.RemoteProtocolError(
                f"the running daemon ({first.get('version')}, protocol {theirs}) is newer than this client ({control.PROTO})",
                hint="upgrade llm-daemon in this environment, or stop the daemon: llm-daemon stop",
            )
        raise errors.RemoteProtocolError(f"the daemon answered {op!r} to HELLO")

    def _no_answer(self, s: socket.socket) -> NoReturn:
        """Connected, no answer: busy or stopped.  Never a reason to start another one."""
        state = ""
        if self.peer:
            try:
                with open(f"/proc/{self.peer}/stat") as f:
                    state = f.read().rpartition(")")[2].split()[0]
            except OSError:
                pass
        if state == "T" and not self.continued:
            self.continued = True
            _wake(self.peer)
        s.close()
        self.unresponsive = errors.DaemonUnresponsive(
            f"the daemon (pid {self.peer or 'unknown'}{', stopped' if state == 'T' else ''}) does not answer",
            hint=f"end it with: kill -9 {self.peer}" if self.peer else "", pid=self.peer, state=state,
        )  # fmt: skip
        raise self.unresponsive

    def start(self) -> Connection | None:
        """Step B: take START, look again, spawn.  A connection if somebody was quicker, else None: back to step A."""
        lock = self._take_start()
        if lock is False:
            self.pause(0.05)
            return None
        try:
            try:
                return self.connect()
            except Down:
                self._spawn()
            except errors.Unavailable:
                pass
            return None
        finally:
            if lock is not None:  # an fd (False was handled above)
                os.close(lock)

    def _take_start(self) -> int | bool | None:
        """The lock's fd; False if it is busy; None if it was busy for so long that we go on without."""
        import fcntl

        try:
            os.makedirs(self.dir, 0o700, exist_ok=True)
            if os.stat(self.dir).st_mode & 0o077:
                return None  # perhaps not ours at all: the candidate looks closer before anything is put there
        except OSError:
            return None  # the candidate says better what is wrong with the folder
        try:
            fd = os.open(os.path.join(self.dir, "start"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:
            return False  # deleted between two steps
        except OSError:
            return None  # the candidate says better what is wrong with the folder
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            now = time.monotonic()
            if self.start_busy_since is None:
                self.start_busy_since = now
            return None if now - self.start_busy_since > START_PATIENCE else False
        return fd

    def _spawn(self) -> None:
        verdict = spawn(self.deadline)
        self.spawns += 1
        if verdict in ("READY", "ALREADY") and self.spawns < SPAWNS:
            if self.spawns > 2:
                self.pause(0.05 * self.spawns)
            return
        self.failures += 1
        if verdict.startswith("ERR "):
            import json

            try:
                error = errors.from_wire(json.loads(verdict[4:]))
            except ValueError:
                error = errors.Bug(f"the daemon reported: {verdict[4:500]}", code="daemon_start", hint="please report this")
            if isinstance(error, errors.UsageError) or error.code == "port_taken" or self.failures >= FAILURES:
                raise error
        elif self.failures >= FAILURES or self.spawns >= SPAWNS:
            raise errors.Bug(
                f"the daemon failed to start {self.spawns} times (last report: {verdict})", code="daemon_start",
                hint="`llm-daemon logs --daemon` shows its last words; please report this",
            )  # fmt: skip


def python() -> str:
    """The interpreter for the daemon.  Raises UsageError where this program is not a usable Python."""
    given = os.environ.get("LLM_DAEMON_PYTHON")
    if given:
        return given
    if not sys.executable or getattr(sys, "frozen", False):
        raise errors.UsageError(
            "this program is not a Python interpreter that could run the daemon",
            code="no_python", hint="set LLM_DAEMON_PYTHON to one that has llm-daemon installed",
        )  # fmt: skip
    return sys.executable


def _wake(pid: int) -> None:
    """SIGCONT for a stopped process of ours, by pidfd so that no other process can be meant."""
    import signal

    try:
        fd = os.pidfd_open(pid)
        try:
            if os.stat(f"/proc/{pid}").st_uid == os.geteuid():
                signal.pidfd_send_signal(fd, signal.SIGCONT)
        finally:
            os.close(fd)
    except (OSError, AttributeError):
        pass  # it is gone, or this system has no pidfds; the error will say what was seen


def spawn(until: float) -> str:
    """Starts the launcher and waits for the verdict: `READY`, `ALREADY`, `ERR {...}`, or why there is none.

    Waits until the monotonic time `until` at most; a launcher that hangs is ended.
    """
    import select
    import subprocess

    boot = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "daemon", "boot.py")
    env = {k: v for k, v in os.environ.items() if k in _ENV_NAMES or k.startswith(_ENV_PREFIXES)}
    env["LLM_DAEMON_RUNTIME_DIR"] = runtime_dir()
    r, w = os.pipe()
    try:
        try:
            launcher = subprocess.Popen(
                [python(), "-I", "-S", boot, str(w)],
                close_fds=True, pass_fds=(w,), start_new_session=True, cwd="/", env=env,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        except OSError as e:
            raise errors.UsageError(
                f"cannot run {python()}: {e.strerror}", code="no_python", hint="check LLM_DAEMON_PYTHON"
            ) from None
        finally:
            os.close(w)
        deadline = min(time.monotonic() + VERDICT_WAIT, until)
        said = b""
        # Never wait for EOF alone: a fork of the host may hold a copy of the pipe's other end.
        while b"\n" not in said:
            if not select.select([r], [], [], max(0.0, deadline - time.monotonic()))[0]:
                launcher.kill()
                launcher.wait()
                return "no report in time"
            data = os.read(r, 65536)
            if not data:
                launcher.wait()
                return f"it ended with status {launcher.returncode}" if launcher.returncode else "it ended without a report"
            said += data
        launcher.wait()
        return said.split(b"\n")[0].decode(errors="replace")
    finally:
        os.close(r)
