"""One running engine, as the daemon holds it: keeper, pipes, log, and the one report of its end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from socket import socket as Socket

from ..engines.base import Plan, Tcp
from ..errors import EngineError
from ..faults import FOLDER, fp
from . import cgroup, keeper
from .address import TCP
from .logs import RotatingLog, Tail

# Run from its cache where there is one (fresh, for it was just imported): a script is compiled anew each time.
_CACHED: str = getattr(keeper, "__cached__", "")
KEEPER = _CACHED if os.path.exists(_CACHED) else keeper.__file__
# In the environment of a whole engine tree: the daemon generation (for the next daemon's sweep), and this one engine.
GEN_TAG, ENGINE_TAG = "LLM_DAEMON_GEN", "LLMD_ENGINE"

_ALLOWED = re.compile(
    r"PATH|HOME|USER|LOGNAME|LANG|LANGUAGE|LC_\w+|TZ|TMPDIR|LD_LIBRARY_PATH|DYLD_LIBRARY_PATH|XDG_DATA_DIRS"
    r"|(CUDA|NVIDIA|HIP|ROCR|ROCM|HSA|AMD|VK|GGML|GPU|ONEAPI|SYCL|ZE|MTL)_\w+"
)
# NVIDIA_API_KEY is a cloud credential, not a device variable.
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH")


def scrubbed_env(environ: Mapping[str, str], gen: str) -> dict[str, str]:
    """What an engine may see of our environment: paths, locale and device choice, but no credential and no engine setting.

    >>> scrubbed_env({"PATH": "/bin", "OPENAI_API_KEY": "x", "LLAMA_ARG_PORT": "1", "CUDA_VISIBLE_DEVICES": "0"}, "g1")
    {'PATH': '/bin', 'CUDA_VISIBLE_DEVICES': '0', 'LLM_DAEMON_GEN': 'g1'}
    """
    kept = {k: v for k, v in environ.items() if _ALLOWED.fullmatch(k) and not _SECRET.search(k)}
    if FOLDER:
        kept["LLM_DAEMON_FAULTS"] = FOLDER
    return {**kept, GEN_TAG: gen}


def tagged(name: str, value: str) -> Iterator[tuple[int, int]]:
    """(pid, pidfd) of each living process of ours that was started with `name=value`; the caller closes the pidfds.

    The environment is read after the pidfd is open, so the pidfd is of that very process.  Linux; elsewhere nothing.
    """
    wanted = f"{name}={value}".encode()
    for entry in os.listdir("/proc") if sys.platform == "linux" else ():
        if not entry.isdigit():
            continue
        try:
            pidfd = os.pidfd_open(int(entry))
        except OSError:
            continue
        try:
            with open(f"/proc/{entry}/environ", "rb") as f:
                match = wanted in f.read().split(b"\0")  # empty for zombies
        except OSError:
            match = False
        if match:
            yield int(entry), pidfd
        else:
            os.close(pidfd)


def kill_tagged(name: str, value: str, within: float = 1.0) -> int:
    """SIGKILL for each such process, without a chance to hit another one; how many.

    Looks again until two looks in a row found nobody, for `within` seconds at most: one look misses whoever is forked
    during it, and whoever is in the middle of exec, when /proc shows no environment.
    """
    killed: set[int] = set()
    end, quiet = time.monotonic() + within, 0
    while quiet < 2 and time.monotonic() < end:
        quiet += 1
        for pid, pidfd in tagged(name, value):
            quiet = 0
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                killed.add(pid)
            except OSError:
                pass  # it ended by itself
            finally:
                os.close(pidfd)
        time.sleep(0.002)
    return len(killed)


@dataclass(frozen=True, slots=True)
class Exit:
    """How an engine ended: `status` or `signal`, or neither if nobody could see it.  `asked`: because we wanted it."""

    status: int | None
    signal: int | None
    asked: bool

    def __str__(self) -> str:
        if self.signal is not None:
            try:
                return f"killed by {signal.Signals(self.signal).name}"
            except ValueError:
                return f"killed by signal {self.signal}"
        return "ended" if self.status is None else f"exit status {self.status}"


class EngineProcess:
    """An engine under its keeper.  Use it on the event loop that `start` ran on.

    `pid` and `keeper_pid` are only for people and for reading /proc: never signal them.  `socket` is where to
    connect to, valid until the exit.  `last_activity` is the monotonic time of the last log byte (at first: of the start).
    """

    def __init__(self, plan: Plan, folder: str, log: RotatingLog, name: str, on_exit: Callable[[Exit], None]) -> None:
        self.plan, self.folder, self.log, self.name = plan, folder, log, name
        self.pid = 0
        self.start_time = 0
        self.exit: Exit | None = None
        self.last_activity = time.monotonic()
        self._on_exit: Callable[[Exit], None] | None = on_exit
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[Exit] = self._loop.create_future()
        self._tail = Tail()
        self._port = plan.address.port if isinstance(plan.address, Tcp) and not plan.address.told else 0
        self._tag = os.urandom(8).hex()
        self._box: str | None = None
        self._box_until = 0.0  # monotonic time: as long as we wait for what is in it
        self._keeper: subprocess.Popen[bytes] | None = None
        self.keeper_pid = 0
        self._fds: dict[str, int] = {}  # name -> fd, all ours to close
        self._report: dict[str, object] = {}
        self._status = b""
        self._asked = False
        self._bound: asyncio.TimerHandle | None = None

    @classmethod
    async def start(
        cls,
        plan: Plan,
        *,
        folder: str,
        env: Mapping[str, str],
        log: RotatingLog,
        name: str,
        on_exit: Callable[[Exit], None],
        reserved: Socket | None = None,
    ) -> EngineProcess:
        """Starts `plan` in `folder` (made if missing) and returns when the program runs; that says nothing about readiness.

        `env` is the complete environment (`scrubbed_env`); `plan.env` goes on top.  `reserved` holds the plan's TCP port
        (address.py) and is taken over.  `on_exit` is called once, on the
        loop, after the last process of the engine is gone and its log is read to the end.  Raises EngineError
        (`engine_start_failed`, or `keeper_died`) if it cannot be run at all; then, and when cancelled, nothing is left and
        `on_exit` is never called.
        """
        self = cls(plan, folder, log, name, on_exit)
        try:
            self._prepare(reserved)
            self._spawn({**env, **plan.env, ENGINE_TAG: self._tag})
        except (OSError, ValueError) as e:
            self._close_all()
            if self._keeper is not None:  # no file descriptor left for its pidfd, for instance
                self._keeper.kill()
                self._keeper.wait()
            if self._box is not None:
                cgroup.remove(self._box, folder, within=1.0)
            raise EngineError(
                f"cannot start {name}: {e}", code="engine_start_failed", hint="`llm-daemon doctor` may know why"
            ) from e
        try:
            await self._started
        except BaseException:
            self._on_exit = None
            self.kill_now()
            await asyncio.shield(self._ended)
            raise
        return self

    @property
    def socket(self) -> str:
        """Where the engine listens (address.py).  Port 0 until it has said which one it took.

        A unix socket goes through /proc/self/fd where the plain path does not fit into a socket address.
        """
        address = self.plan.address
        if isinstance(address, Tcp):
            return f"{TCP}{address.host}:{self._port}"
        path = os.path.join(self.folder, address)
        if len(os.fsencode(path)) <= 103:  # sun_path holds 108 bytes with the final NUL on Linux, 104 on macOS
            return path
        if "folder" not in self._fds:
            self._fds["folder"] = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return f"/proc/self/fd/{self._fds['folder']}/{address}"

    def last_words(self) -> str:
        """The last lines of the engine's output, at most 8 KiB."""
        return self._tail.text()

    def heard(self) -> str:
        """As `last_words`, of 32 KiB: what made an engine of several processes fail may be followed by as many tracebacks."""
        return self._tail.text(self._tail.limit)

    @property
    def lost_keeper(self) -> bool:
        """Whether it ended because its keeper did: no fault of the engine's."""
        return self.exit is not None and not {"exit", "error"} & self._report.keys()

    async def wait(self) -> Exit:
        """The exit, when it comes; `on_exit` has been called by then.  Cancelling stops the waiting only."""
        return await asyncio.shield(self._ended)

    async def stop(self, force: bool = False) -> Exit:
        """Walks the plan's stop ladder (`force`: SIGKILL at once) and returns when everything is gone.  May be called twice.

        Takes 2 * grace seconds and a little at most.  Cut the connections to the engine first: some wait for open streams.
        Cancelling stops the waiting, not the stopping.
        """
        if self.exit is None:
            self._asked = True
            self._command(b"kill\n" if force else b"stop %f\n" % self.plan.stop.grace)
            self._give_up_after(5.0 if force else 2 * self.plan.stop.grace + 5.0)
        return await self.wait()

    def kill_now(self) -> None:
        """Ends everything at once, without waiting: closes the lifeline."""
        if self.exit is None:
            self._asked = True
            self._wake_keeper()
            if "lifeline" in self._fds:
                os.close(self._fds.pop("lifeline"))
            self._give_up_after(5.0)

    # -- start --

    def _prepare(self, reserved: Socket | None) -> None:
        """Folder, files and port, as the plan wants them."""
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        for name, text in self.plan.files.items():
            fd = os.open(os.path.join(self.folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with open(fd, "w") as f:
                f.write(text)
        address = self.plan.address
        if reserved is not None:
            # BSD lets nobody bind beside us without SO_REUSEPORT, which Python's servers do not set.
            if sys.platform == "linux" and isinstance(address, Tcp) and address.rebinds and not address.told:
                self._fds["reserved"] = reserved.detach()
            else:
                reserved.close()  # not needed; or it could not bind beside it, and the proof of who listens must do

    def _spawn(self, env: dict[str, str]) -> None:
        self._box = cgroup.make(self.folder, env.get(GEN_TAG, ""))
        fds = self._fds
        life_r, fds["lifeline"] = os.pipe()
        fds["life_r"] = life_r
        fds["status"], fds["status_w"] = os.pipe()
        fds["log"], fds["log_w"] = os.pipe()
        box = [self._box] if self._box else []
        told = (str(os.getpid()), str(life_r), str(fds["status_w"]), *box)
        argv = [sys.executable, "-I", "-S", KEEPER, *told, "--", *self.plan.argv]
        # Popen without preexec_fn uses vfork, and a new session keeps a terminal's Ctrl-C away.
        self._keeper = subprocess.Popen(
            argv,
            cwd=self.folder,
            env=env,
            start_new_session=True,
            pass_fds=(life_r, fds["status_w"]),
            stdin=subprocess.DEVNULL,
            stdout=fds["log_w"],
            stderr=fds["log_w"],
        )
        self.keeper_pid = self._keeper.pid
        fp("keeper_spawned")
        for name in ("life_r", "status_w", "log_w"):
            os.close(fds.pop(name))
        for name, reader in (("log", self._read_log), ("status", self._read_status)):
            os.set_blocking(fds[name], False)
            self._loop.add_reader(fds[name], reader)
        if sys.platform == "linux":
            fds["keeper"] = os.pidfd_open(self.keeper_pid)
            self._loop.add_reader(fds["keeper"], self._keeper_ended)

    def _read_log(self) -> None:
        """One chunk at a time, so that a chatty engine shares the loop."""
        try:
            data = os.read(self._fds["log"], 65536)
        except BlockingIOError:
            return
        if data:
            self._heard(data)
        else:
            self._close("log")

    def _heard(self, data: bytes) -> None:
        self.last_activity = time.monotonic()
        self._tail.feed(data)
        self.log.write(data)
        address = self.plan.address
        if isinstance(address, Tcp) and address.told and not self._port:
            text = self.last_words() + ("\n" if data.endswith(b"\n") else "")
            if said := re.search(address.told + r"(?=\D)", text):  # the number's last digit has come, too
                self._port = int(said[1]) if (said[1] or "").isdecimal() and int(said[1]) < 65536 else 0

    def _read_status(self) -> None:
        try:
            data = os.read(self._fds["status"], 4096)
        except BlockingIOError:
            return
        *lines, self._status = (self._status + data).split(b"\n")
        for line in lines:
            self._report |= json.loads(line)
            if "pid" in self._report and not self.pid:
                self._engine_runs(int(str(self._report["pid"])), int(str(self._report["start"])))
        if not data:
            self._close("status")
            if sys.platform != "linux":  # there the keeper's end is seen here: it alone holds the other end
                self._keeper_ended()

    def _engine_runs(self, pid: int, start: int) -> None:
        self.pid, self.start_time = pid, start
        if sys.platform == "linux":
            try:
                self._fds["engine"] = os.pidfd_open(pid)
            except OSError:
                pass  # reaped already
            else:
                if keeper.start_time(pid) != start:
                    os.close(self._fds.pop("engine"))
        if not self._started.done():
            self._started.set_result(None)

    # -- end --

    def _command(self, line: bytes) -> None:
        self._wake_keeper()
        if "lifeline" in self._fds:
            try:
                os.write(self._fds["lifeline"], line)
            except BrokenPipeError:
                pass  # it has just ended

    def _wake_keeper(self) -> None:
        """Somebody may have stopped it."""
        self._signal_keeper(signal.SIGCONT)

    def _give_up_after(self, seconds: float) -> None:
        """A keeper that does not answer (wedged in a system call) is killed, and the kernel kills the engine after it."""
        if self._bound is not None:
            self._bound.cancel()
        self._bound = self._loop.call_later(seconds, self._signal_keeper, signal.SIGKILL)

    def _signal_keeper(self, number: int) -> None:
        if self._keeper is not None and self._keeper.returncode is None:
            os.kill(self.keeper_pid, number)  # our child, not yet reaped: the pid is its own

    def _keeper_ended(self) -> None:
        if "status" in self._fds:
            self._read_status()  # what it said last
        self._close("keeper")
        if self._keeper is not None:
            self._keeper.wait()
        if {"exit", "error"} & self._report.keys() or sys.platform != "linux":
            self._finish()
            return
        # The keeper was killed.  PDEATHSIG kills the engine at this moment; we kill what had left its tree, and wait.
        kill_tagged(ENGINE_TAG, self._tag, within=0.05)  # on the loop: the box and the next sweep have the rest
        self._unboxed()
        self._box_until = time.monotonic() + 5.0
        if "engine" in self._fds:
            self._loop.add_reader(self._fds["engine"], self._finish)
            self._bound = self._loop.call_later(5.0, self._finish)
        else:
            self._finish()

    def _finish(self) -> None:
        if self.exit is not None:
            return
        if self._bound is not None:
            self._bound.cancel()
        self._close("engine")
        if not self._unboxed() and time.monotonic() < self._box_until:
            self._loop.call_later(0.005, self._finish)  # nothing tells when a cgroup may be removed
            return
        self._drain_log()
        self._close_all()
        status, number = self._report.get("exit"), self._report.get("signal")
        if "exit" not in self._report:
            number = int(signal.SIGKILL)  # PDEATHSIG: see above
        self.exit = Exit(status if isinstance(status, int) else None, number if isinstance(number, int) else None, self._asked)
        if not self._started.done():
            text = self._report.get("error") or ("its keeper died" if self.lost_keeper else self.exit)
            self._started.set_exception(
                EngineError(
                    f"cannot run {self.plan.argv[0]}: {text}",
                    code="keeper_died" if self.lost_keeper else "engine_start_failed",
                    log=self.log.path,
                    last_words=self.last_words(),
                )
            )
        # Later than whoever awaits `start`: it has the object by then, or has taken `on_exit` away.
        self._loop.call_soon(self._notify)

    def _unboxed(self) -> bool:
        """Ends whatever is in the box; False while some of it is still dying."""
        return self._box is None or cgroup.remove(self._box, self.folder)

    def _notify(self) -> None:
        assert self.exit is not None
        try:
            if self._on_exit is not None:
                self._on_exit(self.exit)
        finally:
            self._ended.set_result(self.exit)

    def _drain_log(self) -> None:
        """All writers are dead: read what is in the pipe.  (One that escaped may still write; do not wait for it.)"""
        try:
            while "log" in self._fds and (data := os.read(self._fds["log"], 65536)):
                self._heard(data)
        except BlockingIOError:
            pass

    def _close(self, name: str) -> None:
        if name in self._fds:
            fd = self._fds.pop(name)
            self._loop.remove_reader(fd)
            os.close(fd)

    def _close_all(self) -> None:
        for name in list(self._fds):
            self._close(name)
