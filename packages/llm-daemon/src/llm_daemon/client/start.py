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
from _thread import RLock

from .. import errors
from ..core import control
from ..core.rendezvous import CONNECT, TAKE_START, VANISHED, Attempt
from ..faults import fp
from ..paths import runtime_dir

TYPE_CHECKING = False  # the typing module costs more than everything here
if TYPE_CHECKING:
    import subprocess
    from typing import Any, NoReturn

DEADLINE = 20.0  # seconds for the whole of `ensure`
CONNECT_WAIT = 2.0
ANSWER_WAIT = 3.0
VERDICT_WAIT = 15.0

_DOWN = (errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.ENOTSOCK)
# What of the client's environment the daemon may see; engines see less still.
_ENV_NAMES = frozenset(
    "PATH HOME USER LOGNAME SHELL LANG LANGUAGE TZ TMPDIR LD_LIBRARY_PATH VIRTUAL_ENV NETRC SSL_CERT_FILE SSL_CERT_DIR "
    "REQUESTS_CA_BUNDLE CURL_CA_BUNDLE http_proxy https_proxy no_proxy all_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY ALL_PROXY "
    "XDG_CONFIG_HOME XDG_CACHE_HOME XDG_STATE_HOME XDG_DATA_HOME".split()
)
_ENV_PREFIXES = ("LLM_DAEMON_", "LC_", "PIP_", "UV_", "HF_", "CUDA_", "HIP_", "ROCR_", "NVIDIA_", "GGML_")


# Held while something is imported for the first time.  A fork waits for it: in a child that was forked in the middle of an
# import by another thread, that import would wait for ever.
importing = RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=importing.acquire, after_in_parent=importing.release, after_in_child=importing.release)


class Down(Exception):
    """Nobody serves here, as far as we can see."""


class Connection:
    """A greeted control connection: the socket, the daemon's WELCOME, and messages already read behind it."""

    def __init__(
        self, sock: socket.socket, welcome: dict[str, Any], decoder: control.Decoder, early: list[dict[str, Any]], peer: int
    ) -> None:
        self.sock = sock
        self.welcome = welcome
        self.decoder = decoder
        self.early = early
        self.peer = peer  # pid, 0 if unknown: for messages and SIGCONT


def ensure(
    hello: dict[str, object] | None = None, deadline: float = DEADLINE, start: bool = True, then: bytes = b""
) -> Connection | None:
    """A connection to the one daemon, started if need be; None if there is none and `start` is false.

    `hello`: extra fields for HELLO.  `then`: what the client says right behind it, saving a round trip.

    Raises UsageError or Unavailable with the daemon's own words if it cannot start, DaemonUnresponsive if one lives but
    does not answer, RemoteProtocolError if it is of another age.  Blocks for `deadline` seconds at most; may be called
    from any thread.
    """
    attempt = Attempt(time.monotonic() + deadline)
    door = _Door(hello, then, attempt.deadline, start)
    step, lock = CONNECT, None
    try:
        while True:
            if step is CONNECT:
                try:
                    return door.connect()
                except Down:
                    if not start:
                        return None
                    step = attempt.down()
                except errors.Unavailable as e:
                    if e.code == "no_resources":
                        raise
                    step = attempt.busy(e)
            elif step is TAKE_START:
                step, lock = _take_start(door.dir, attempt)
            else:
                attempt.check(time.monotonic())
                step = attempt.verdict(*spawn(attempt.deadline))
            if lock is not None and not attempt.holds_start:
                _let_go(lock)
                lock = None
            if attempt.pause:
                _pause(attempt)
    except OSError as e:
        if isinstance(e, errors.LlmDaemonError):
            raise
        raise _unreachable(e, door.dir) from None
    finally:
        if lock is not None:
            _let_go(lock)


def _unreachable(e: OSError, folder: str) -> errors.LlmDaemonError:
    if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return errors.Unavailable(
            f"cannot reach the daemon: {e.strerror}", code="no_resources",
            hint="close something, or raise the limit: ulimit -n" if e.errno != errno.ENOMEM else "",
        )  # fmt: skip
    return errors.UsageError(
        f"cannot reach the daemon in {folder}: {e.strerror or e}", hint="`llm-daemon doctor` looks for the cause"
    )


_starts: set[int] = set()  # START, where we hold it


def _let_go(lock: int) -> None:
    _starts.discard(lock)
    os.close(lock)


def in_child() -> None:
    """After os.fork in the child: its copy of START would keep the lock when we are done.  Close, never unlock."""
    while _starts:
        os.close(_starts.pop())


def _pause(attempt: Attempt) -> None:
    """A jittered moment, so that those who wait for one thing do not come together."""
    now = time.monotonic()
    attempt.check(now)
    chance = int.from_bytes(os.urandom(1), "big") / 255
    time.sleep(min(attempt.deadline - now, attempt.pause * (0.25 + 0.75 * chance)))
    attempt.pause = 0.0


def _take_start(folder: str, attempt: Attempt) -> tuple[str, int | None]:
    """The next step, and the lock's fd if it is ours."""
    with importing:
        import fcntl

    try:
        os.makedirs(folder, 0o700, exist_ok=True)
        if os.stat(folder).st_mode & 0o077:
            return attempt.start_taken(), None  # perhaps not ours at all: the candidate looks before anything is put there
    except OSError:
        return attempt.start_taken(), None
    try:
        fd = os.open(os.path.join(folder, "start"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        return attempt.start_gone(), None
    except OSError:
        return attempt.start_taken(), None
    _starts.add(fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fp("start_got")
    except OSError:
        _let_go(fd)
        return attempt.start_busy(time.monotonic()), None
    return attempt.start_taken(), fd


class _Door:
    """One try after the other to be let in."""

    def __init__(self, hello: dict[str, object] | None, then: bytes, deadline: float, start: bool) -> None:
        self.dir = runtime_dir()
        self.deadline, self.start = deadline, start
        self.greeting = control.encode({"op": "HELLO", "proto": control.PROTO, **(hello or {})}) + then
        self.continued = False  # SIGCONT is sent once
        self.peer = 0

    def connect(self) -> Connection:
        """Step A: one connection, one HELLO, one answer."""
        s = socket.socket(socket.AF_UNIX)
        try:
            self._connect_socket(s)
            self._check_peer(s)
            s.settimeout(self._left(ANSWER_WAIT))
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
            raise
        except BaseException:
            s.close()
            raise

    def _left(self, most: float) -> float:
        """Seconds, `most` or until the deadline; never nothing, which would mean for ever."""
        return max(0.001, min(most, self.deadline - time.monotonic()))

    def _connect_socket(self, s: socket.socket) -> None:
        # A blocking connect with SO_SNDTIMEO: a non-blocking one reports a full backlog as "connected" (cpython#117208).
        with importing:
            import struct

        wait = self._left(CONNECT_WAIT)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(wait), int(wait % 1 * 1e6)))
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
            return Connection(s, first, decoder, early, self.peer)
        if op in ("GOING", "RETIRING"):
            raise errors.Unavailable("the daemon is leaving")
        if op == "OLD":
            theirs = first.get("proto")
            if isinstance(theirs, int) and theirs < control.PROTO and not self.start:  # who only looks changes nothing
                raise errors.RemoteProtocolError(
                    f"the running daemon ({first.get('version')}, protocol {theirs}) is older than this client ({control.PROTO})",
                    hint="the next use of a model from here replaces it",
                )
            if isinstance(theirs, int) and theirs < control.PROTO:
                s.sendall(control.encode({"op": "RETIRE"}))  # only the newer side may ask: no ping-pong
                raise errors.Unavailable("an older daemon was asked to retire")
            raise errors.RemoteProtocolError(
                f"the running daemon ({first.get('version')}, protocol {theirs}) is newer than this client ({control.PROTO})",
                hint="upgrade llm-daemon in this environment, or try again when the newer daemon's clients are gone",
            )
        if op == "ERROR":
            raise errors.from_wire(first.get("error") or {})
        raise errors.RemoteProtocolError(f"the daemon answered {op!r} to HELLO")

    def _no_answer(self, s: socket.socket) -> NoReturn:
        """Connected, no answer: busy or stopped.  Never a reason to start another one."""
        s.close()
        error = unresponsive(self.peer, wake_it=not self.continued)
        self.continued = self.continued or error.data["state"] == "T"
        raise error


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


def unresponsive(pid: int, wake_it: bool) -> errors.DaemonUnresponsive:
    """The error for a daemon that does not answer (pid 0 is unknown).  `wake_it`: SIGCONT if it was stopped."""
    state = _state(pid)
    if wake_it:
        wake(pid)
    return errors.DaemonUnresponsive(
        f"the daemon (pid {pid or 'unknown'}{', stopped' if state == 'T' else ''}) does not answer",
        hint=f"end it with: kill -9 {pid}" if pid else "", pid=pid, state=state,
    )  # fmt: skip


def wake(pid: int) -> None:
    """SIGCONT for a process of ours, if it is stopped; by pidfd, so that no other process can be meant."""
    if _state(pid) != "T":
        return
    with importing:
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


def _state(pid: int) -> str:
    """The letter of proc_pid_stat(5), `T` for stopped; empty if it is not known."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def spawn(until: float) -> tuple[errors.LlmDaemonError | None, str]:
    """Starts the launcher and waits for its verdict: the words, and the error in them; None for READY and ALREADY.

    Waits until the monotonic time `until` at most; a launcher that hangs is ended.
    """
    with importing:
        import select

    r, w = os.pipe()
    try:
        try:
            launcher = _launch(w)
        finally:
            os.close(w)
        deadline = min(time.monotonic() + VERDICT_WAIT, until)
        said = b""
        # Never wait for EOF alone: a fork of the host may hold a copy of the pipe's other end.
        while b"\n" not in said:
            if not select.select([r], [], [], max(0.0, deadline - time.monotonic()))[0]:
                launcher.kill()
                launcher.wait()
                return errors.Unavailable(
                    "the daemon that was started did not report in time", code="daemon_start",
                    hint="is the machine very busy? `llm-daemon logs --daemon` shows what it says",
                ), "no report in time"  # fmt: skip
            data = os.read(r, 65536)
            if not data:
                if status := _reap(launcher, deadline):
                    return _failed(f"it ended with status {status}")
                return _failed("it ended without a report", VANISHED)
            said += data
        _reap(launcher, deadline)
        fp("verdict_read")
        return _verdict(said.split(b"\n")[0].decode(errors="replace"))
    finally:
        os.close(r)


def _launch(w: int) -> subprocess.Popen[bytes]:
    """The launcher; `w` is where it reports."""
    with importing:
        import subprocess

    boot = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "daemon", "boot.py")
    env = {k: v for k, v in os.environ.items() if k in _ENV_NAMES or (k.startswith(_ENV_PREFIXES) and k != "NVIDIA_API_KEY")}
    env["LLM_DAEMON_RUNTIME_DIR"] = runtime_dir()
    try:
        return subprocess.Popen(
            [python(), "-I", "-S", boot, str(w)],
            close_fds=True, pass_fds=(w,), start_new_session=True, cwd="/", env=env,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    except OSError as e:
        if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN):
            raise
        raise errors.UsageError(
            f"cannot run {python()}: {e.strerror}", code="no_python", hint="check LLM_DAEMON_PYTHON"
        ) from None


def _reap(launcher: subprocess.Popen[bytes], deadline: float) -> int:
    """Its exit status.  It has nothing left to do but end; somebody may have stopped it."""
    with importing:
        import subprocess
    try:
        return launcher.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        launcher.kill()
        return launcher.wait()


def _verdict(words: str) -> tuple[errors.LlmDaemonError | None, str]:
    if words in ("READY", "ALREADY"):
        return None, words
    if words.startswith("ERR "):
        with importing:
            import json
        try:
            return errors.from_wire(json.loads(words[4:])), words[:500]
        except ValueError:
            pass
    return _failed(words[:500])


def _failed(words: str, code: str = "daemon_start") -> tuple[errors.LlmDaemonError, str]:
    return errors.Bug(
        f"the daemon failed to start ({words})", code=code,
        hint="`llm-daemon logs --daemon` shows its last words; please report this",
    ), words  # fmt: skip
