"""Launcher and candidate: how one daemon is born, and only one (docs/adr/0002).

Run as a script: `python -I -S boot.py VERDICT_FD`, never imported by clients.  The launcher forks and leaves at
once; its child is the candidate: it takes LIFE (a lock on the runtime folder itself), binds, publishes the socket by
rename and says READY; only then it imports what takes long.  Names are relative to the runtime folder, which is the
working folder from the first step on: if somebody deletes it we fail, and never touch another daemon's.

Verdicts, one line on the pipe: READY, ALREADY, `ERR {json}`.  They are hints: only a WELCOME means "the daemon is up".
"""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import socket
import sys
import time

if __name__ == "__main__":
    # Last, not first: a backport in site-packages must not stand before the standard library.
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from llm_daemon.core.rendezvous import ALREADY, GIVE_UP, WAKE, WON, Election
from llm_daemon.faults import fp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from llm_daemon.config import Settings
    from llm_daemon.engines.registry import Registry
    from llm_daemon.models.catalog import Catalog

PING_WAIT = 1.0
OURS = frozenset("start sock http.sock token token.new ui.html ui.new logs user_state_dir user_cache_dir user_config_dir".split())
RETRIES = 5  # folder deleted under us while we begin


class Born:
    """What the candidate hands to the daemon: open fds and names; everything relative to the runtime folder."""

    settings: Settings
    catalog: Catalog
    registry: Registry
    log_dir: str
    token: str | None
    tcp: socket.socket
    http: socket.socket
    tls: socket.socket | None = None  # for other machines, see remote.py
    sock_inode: int  # of the published socket's file

    def __init__(self, runtime_dir: str, life_fd: int, generation: str, gen_fd: int, listener: socket.socket) -> None:
        self.runtime_dir = runtime_dir
        self.life_fd = life_fd
        self.generation = generation
        self.gen_fd = gen_fd
        self.listener = listener
        self.port_note = ""
        self.loan: socket.socket | None = None  # a ghost's, see loan.py


class Refused(Exception):
    """Carries the wire form of an error for the ERR verdict."""


def refuse(kind: str, code: str, message: str, hint: str = "", **data: object) -> Refused:
    return Refused({"kind": kind, "code": code, "message": message, "hint": hint, "data": data})


def open_runtime(path: str) -> int:
    """Makes and opens the runtime folder; returns its fd.  Refuses what is not ours alone."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as e:
        raise refuse(
            "UsageError", "runtime_dir", f"cannot use the runtime folder {path}: {e.strerror}",
            "set LLM_DAEMON_RUNTIME_DIR to a folder of yours on a local disk",
        ) from None  # fmt: skip
    st = os.fstat(fd)
    if st.st_uid != os.geteuid():
        raise refuse(
            "UsageError", "runtime_dir", f"the runtime folder {path} belongs to user id {st.st_uid}, not to you ({os.geteuid()})",
            "set LLM_DAEMON_RUNTIME_DIR to a folder of yours",
        )  # fmt: skip
    if st.st_mode & 0o077:
        if st.st_mode & 0o1000 or not all(name in OURS or name[:2] in ("g-", "s.", "h.") for name in os.listdir(fd)):
            raise refuse(
                "UsageError", "runtime_dir", f"the folder {path} is open to others and holds other things",
                "set LLM_DAEMON_RUNTIME_DIR to a folder of its own; it is made if missing",
            )  # fmt: skip
        os.fchmod(fd, 0o700)
    if (kind := network_filesystem(path)) is not None:
        raise refuse(
            "UsageError", "runtime_dir", f"the runtime folder {path} is on {kind}, where locks and sockets are not safe",
            "set LLM_DAEMON_RUNTIME_DIR to a folder on a local disk",
        )  # fmt: skip
    return fd


def network_filesystem(path: str) -> str | None:
    """The type of the file system under `path` if locks there cannot be trusted, else None (Linux only)."""
    try:
        with open("/proc/self/mounts") as f:
            mounts = [line.split()[1:3] for line in f]
    except OSError:
        return None
    real = os.path.realpath(path)
    under = [(len(at), kind) for at, kind in mounts if real == at or real.startswith(at.rstrip("/") + "/")]
    kind = max(under, default=(0, ""))[1]
    return kind if kind in ("nfs", "nfs4", "9p", "cifs", "smb3") or kind.startswith("fuse") else None


def serving(timeout: float) -> bool:
    """Whether somebody answers PING on the published socket."""
    s = socket.socket(socket.AF_UNIX)
    try:
        s.settimeout(timeout)
        s.connect("sock")
        s.sendall(b'{"op":"PING"}\n')
        return b"PONG" in s.recv(4096)
    except OSError:
        return False
    finally:
        s.close()


def holder(fd: int) -> int:
    """Pid of whoever holds the lock on this folder, proc_locks(5), for messages and SIGCONT; 0 if the system does not tell."""
    st = os.fstat(fd)
    wanted = f"{os.major(st.st_dev):02x}:{os.minor(st.st_dev):02x}:{st.st_ino}"
    try:
        with open("/proc/locks") as f:
            rows = [line.split() for line in f]
    except OSError:
        return 0
    return next((int(row[4]) for row in rows if row[1] == "FLOCK" and row[5] == wanted), 0)


def elect(path: str) -> int | None:
    """Takes LIFE: returns its fd, with the folder as working folder; None when another daemon serves."""
    election = Election(time.monotonic())
    fd = open_runtime(path)
    os.fchdir(fd)
    fp("dir_opened")
    while True:
        fp("lock_tried")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            step = election.busy(serving(PING_WAIT), time.monotonic())
            if step is ALREADY:
                return None
            if step in (WAKE, GIVE_UP):
                from llm_daemon.client.start import wake

                pid = holder(fd)
                if step is GIVE_UP:
                    raise refuse(
                        "Unavailable", "life_held", f"another daemon (pid {pid or 'unknown'}) holds the runtime folder and does "
                        "not answer", f"end it with: kill -9 {pid}" if pid else f"see what holds {path} (lsof, fuser)", pid=pid,
                    ) from None  # fmt: skip
                wake(pid)
            time.sleep(0.0005 + 0.002 * int.from_bytes(os.urandom(1)) / 255)
            continue
        fp("lock_got")
        try:
            same = os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
        except FileNotFoundError:
            same = False
        fp("ino_checked")
        if election.locked(same) is WON:
            return fd
        os.close(fd)
        fd = open_runtime(path)
        os.fchdir(fd)


def publish(life_fd: int, path: str) -> tuple[Born, str]:
    """Binds and renames; from here on clients queue in the backlog.  FileNotFoundError: the folder was deleted."""
    nonce = os.urandom(8).hex()
    os.mkdir("g-" + nonce, 0o700)
    gen_fd = os.open("g-" + nonce, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(gen_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("s." + nonce)
    fp("bound")
    listener.listen(1024)
    fp("listening")
    return Born(path, life_fd, nonce, gen_fd, listener), "s." + nonce


def bind_tcp(born: Born) -> None:
    """Binds the gateway's port: the asked one or an error, else 28282 or the next free one."""
    from llm_daemon.config import DEFAULT_PORT
    from llm_daemon.daemon.loan import borrow

    settings = born.settings
    host = "127.0.0.1" if settings.host == "localhost" else settings.host
    if (found := borrow(host, settings.port)) is not None:
        born.tcp, born.loan = found
        return
    ports = [settings.port] if settings.port else [*range(DEFAULT_PORT, DEFAULT_PORT + 100), 0]
    for port in ports:
        s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past connections in TIME_WAIT must not cost us the port
        try:
            s.bind((host, port))
            s.listen(1024)
        except OSError as e:
            s.close()
            if not settings.port and e.errno in (errno.EADDRINUSE, errno.EACCES):
                continue
            from llm_daemon.daemon.identity import port_holder

            why = f"is taken by {port_holder(port)}" if e.errno == errno.EADDRINUSE else f"cannot be used: {e.strerror}"
            raise refuse(
                "Unavailable", "port_taken", f"port {port} on {host} {why}",
                f"end that process, or choose another port (it was set by {settings.origin('port')})", port=port,
            ) from None  # fmt: skip
        born.tcp = s
        if not settings.port and s.getsockname()[1] != DEFAULT_PORT:
            from llm_daemon.daemon.identity import port_holder

            born.port_note = f"port {DEFAULT_PORT} is taken by {port_holder(DEFAULT_PORT)}"
        return


def candidate(path: str, verdict: Callable[[bytes], None]) -> Born | None:
    """Everything up to READY.  Returns Born, or None when another daemon serves."""
    for attempt in range(RETRIES):
        life_fd = elect(path)
        if life_fd is None:
            verdict(b"ALREADY")
            return None
        try:
            born, name = publish(life_fd, path)
            prepare(born)
            born.sock_inode = os.stat(name).st_ino
            os.rename(name, "sock")
            fp("renamed")
        except FileNotFoundError:
            os.close(life_fd)
            if attempt == RETRIES - 1:
                raise
            continue
        verdict(b"READY")
        fp("ready_sent")
        return born
    raise AssertionError


def prepare(born: Born) -> None:
    """Settings and the gateway's port, before anybody is told that we are up: errors here travel by the pipe."""
    import site

    here = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    site.main()  # -S kept the launcher quick; dependencies and editable installs are found from here on
    if here not in sys.path:
        site.addsitedir(here)  # installed for the user alone, or run from a source tree
    from llm_daemon import errors
    from llm_daemon.config import Settings

    try:
        born.settings = Settings.load()
    except errors.LlmDaemonError as e:
        raise Refused(e.to_wire()) from None
    open_log(born)
    bind_tcp(born)
    if born.settings.tls_host:
        from llm_daemon.daemon import remote

        try:
            born.tls = remote.bind(born.settings)
        except errors.LlmDaemonError as e:
            raise Refused(e.to_wire()) from None
    from llm_daemon.daemon.settings import catalog_and_engines

    try:
        born.catalog, born.registry = catalog_and_engines(born.settings)
    except errors.LlmDaemonError as e:
        raise Refused(e.to_wire()) from None
    born.token = read_token() if born.settings.auth == "token" else None
    born.http = socket.socket(socket.AF_UNIX)
    born.http.bind("h." + born.generation)
    born.http.listen(1024)
    os.rename("h." + born.generation, "http.sock")


def read_token() -> str:
    """The bearer token of this runtime folder, made once; it outlives the daemon so that clients can go on."""
    import base64

    try:
        with open("token") as f:
            if text := f.read().strip():
                return text
    except FileNotFoundError:
        pass
    token = base64.urlsafe_b64encode(os.urandom(32)).decode().rstrip("=")
    fd = os.open("token.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as f:
        f.write(token + "\n")
    os.rename("token.new", "token")
    return token


def open_log(born: Born) -> None:
    """Stdout and stderr into the first log folder that can be written: whatever goes wrong later leaves its words there."""
    from llm_daemon import paths

    for folder in paths.log_dirs():
        try:
            os.makedirs(folder, exist_ok=True)
            fd = os.open(paths.daemon_log(folder), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError:
            continue
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.close(fd)
        break
    born.log_dir = folder


class Report:
    """The pipe to whoever started us: one verdict, then closed."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        self._fd = fd

    def verdict(self, line: bytes) -> None:
        if self._fd >= 0:
            try:
                os.write(self._fd, line + b"\n")
            except OSError:
                pass  # the client is gone; somebody else will come
            os.close(self._fd)
            self._fd = -1

    def fail(self, wire: dict[str, object]) -> NoReturn:
        import json

        self.verdict(b"ERR " + json.dumps(wire).encode())
        os._exit(1)


def begin(report: Report) -> Born | None:
    """`candidate`, with everything that can go wrong put into the report."""
    from llm_daemon.paths import runtime_dir

    try:
        fp("launcher_forked")
        return candidate(runtime_dir(), report.verdict)
    except Refused as e:
        report.fail(e.args[0])
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EROFS)
        hint = "free some space or files, or set LLM_DAEMON_RUNTIME_DIR" if full else "please report this"
        where = f" ({e.filename})" if e.filename else ""
        message = f"the daemon cannot start in {runtime_dir()}: {e.strerror}{where}"
        report.fail({"kind": "Unavailable" if full else "Bug", "code": "daemon_start", "message": message, "hint": hint})
    except BaseException:
        import traceback

        data = {"last_words": traceback.format_exc()[-8000:]}
        report.fail({"kind": "Bug", "code": "daemon_start", "message": "the daemon failed to start", "data": data})


def settle_in() -> None:
    """Leaves behind what was the first client's alone: priority, signals, limits.  Where the system does not let us, it stays."""
    import _signal as signal  # type: ignore[import-not-found]  # the C half, as in keeper.py
    import resource

    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)  # ignored signals stay so across exec; SIGCHLD ignored would lose our children
    for name in ("CPU", "AS", "DATA", "FSIZE", "NOFILE", "NPROC", "MEMLOCK"):
        if (limit := getattr(resource, "RLIMIT_" + name, None)) is not None:
            _, hard = resource.getrlimit(limit)
            _try(resource.setrlimit, limit, (hard, hard))
    _try(os.setpriority, os.PRIO_PROCESS, 0, 0)
    if sys.platform == "linux":
        _try(os.sched_setscheduler, 0, os.SCHED_OTHER, os.sched_param(0))
        _try(_write, "/proc/self/oom_score_adj", b"0")


def _try(act: Callable[..., object], *args: object) -> None:
    try:
        act(*args)
    except (OSError, ValueError):
        pass


def _write(path: str, data: bytes) -> None:
    with open(path, "wb", 0) as f:
        f.write(data)


def main() -> None:
    gc.disable()  # everything made while starting stays; the daemon turns it on again
    os.umask(0o077)
    # Whoever started us reaps the launcher at once; the candidate belongs to init and to no terminal.
    if os.fork():
        os._exit(0)
    settle_in()
    born = begin(Report(int(sys.argv[1])))
    if born is None:
        os._exit(0)
    try:
        from llm_daemon.daemon.app import serve

        serve(born)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(70)


if __name__ == "__main__":
    main()
