"""The process above each engine: whoever dies, daemon or engine, nothing of the engine stays behind.

Run as `python -I -S keeper.py DAEMON_PID LIFELINE STATUS [BOX] -- ENGINE ARGV...` in a session of its own, with the
engine's working folder and environment.  Standard library only and single-threaded, because PR_SET_PDEATHSIG
follows the *thread* that forked, see prctl(2).  It waits for the first of

- the daemon's death (pidfd) or end of file on LIFELINE: SIGKILL for everything, at once;
- a line on LIFELINE: `stop GRACE` (SIGTERM, GRACE seconds, SIGTERM, GRACE seconds, SIGKILL) or `kill`;
- the engine's own end;

then kills every process left in its tree (as a subreaper it inherits double-forked and setsid'ed ones) and ends.
BOX is a cgroup (cgroup.py): the engine is born there where the kernel allows it; what is in it is killed, too, and it is removed.
STATUS receives JSON lines: `{"pid","start"}` after a successful exec, `{"error","errno"}` after a failed one, and
`{"exit","signal"}`.  Signals go only to its own unreaped children, so never to a recycled pid.

Without pidfd and prctl (macOS) the same loop runs on kqueue NOTE_EXIT; there, an engine outlives daemon and keeper
killed together.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # the C half: the Python half imports enum, 6 ms of a start
import os
import select
import sys
import time

if "LLM_DAEMON_FAULTS" in os.environ:  # tests only
    sys.path.append(__file__.rpartition(f"{os.sep}llm_daemon{os.sep}")[0])
    from llm_daemon.faults import fp
else:

    def fp(point: str) -> None:
        pass


# <linux/prctl.h>
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
# <linux/sched.h>; the number of clone3 is one for all architectures but alpha
CLONE_INTO_CGROUP, SYS_CLONE3 = 0x200000000, 435


def prctl(option: int, value: int) -> None:
    import ctypes  # 3 ms, only where there is a prctl

    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


class Watch:
    """Which of our file descriptors and processes have something to say: pidfds in poll(2), or kqueue."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        if sys.platform == "linux":
            self.poll = select.poll()
        else:
            self.queue = select.kqueue()

    def file(self, fd: int, name: str) -> None:
        self.names[fd] = name
        if sys.platform == "linux":
            self.poll.register(fd, select.POLLIN)
        else:
            self.queue.control([select.kevent(fd, select.KQ_FILTER_READ, select.KQ_EV_ADD)], 0)

    def process(self, pid: int, name: str) -> None:
        """Raises ProcessLookupError if it is gone already."""
        if sys.platform == "linux":
            self.file(os.pidfd_open(pid), name)
        else:
            self.names[-pid] = name
            event = select.kevent(pid, select.KQ_FILTER_PROC, select.KQ_EV_ADD, select.KQ_NOTE_EXIT)
            self.queue.control([event], 0)

    def forget(self, fd: int) -> None:
        del self.names[fd]
        if sys.platform == "linux":
            self.poll.unregister(fd)
        os.close(fd)  # closing takes it out of a kqueue

    def wait(self, timeout: float | None) -> set[str]:
        """Names that are ready; a process that ended is so once.  `timeout` in seconds, None is for ever."""
        if sys.platform == "linux":
            return {self.names[fd] for fd, _ in self.poll.poll(None if timeout is None else max(0.0, timeout) * 1000)}
        else:
            events = self.queue.control(None, 8, timeout)
            return {self.names[-e.ident if e.filter == select.KQ_FILTER_PROC else e.ident] for e in events}


class Keeper:
    def __init__(self, daemon: int, lifeline: int, status: int, box: str | None, argv: list[str]) -> None:
        self.daemon, self.lifeline, self.status, self.box, self.argv = daemon, lifeline, status, box, argv
        self.engine = 0  # pid while it is unreaped
        self.code: int | None = None  # wait status
        self.ladder: list[tuple[float, int]] = []  # (monotonic time, signal) still to come
        self.buffer = b""
        self.watch = Watch()

    def run(self) -> None:
        """Everything, from the promise not to be orphaned to the engine's end."""
        if sys.platform == "linux":
            prctl(PR_SET_PDEATHSIG, signal.SIGCONT)  # wakes us if we were stopped when the daemon died; else harmless
            prctl(PR_SET_CHILD_SUBREAPER, 1)
        if not self.watch_daemon():
            if self.box:
                unbox(self.box, 0.0)
            return
        fp("keeper_checked")
        self.watch.file(self.lifeline, "lifeline")
        if sys.platform == "linux":
            self.wake_on_child()
        broken = True
        try:
            if self.start():
                self.loop()
            broken = False
        finally:  # also after SIGTERM to us, and after a bug of ours
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            self.slay()
            if self.box:
                unbox(self.box, 1.0)
            if self.code is not None and not broken:  # else the fault is ours: told nothing, the daemon knows that
                code = os.waitstatus_to_exitcode(self.code)
                self.say(b'{"exit":%s,"signal":%s}' % ((b"%d" % code, b"null") if code >= 0 else (b"null", b"%d" % -code)))

    def watch_daemon(self) -> bool:
        """False if it died before we looked: the pid we watch may be another's."""
        try:
            self.watch.process(self.daemon, "daemon")
        except ProcessLookupError:
            return False
        return os.getppid() == self.daemon

    def wake_on_child(self) -> None:
        """A file descriptor becomes readable when a child ends: strays that re-parented to us are reaped soon."""
        self.wake, w = os.pipe()
        os.set_blocking(self.wake, False)
        os.set_blocking(w, False)
        self.watch.file(self.wake, "child")
        signal.signal(signal.SIGCHLD, lambda *_: None)  # a wakeup fd needs some handler
        signal.set_wakeup_fd(w, warn_on_full_buffer=False)

    def start(self) -> bool:
        """Forks and execs the engine; a failed exec comes back through a pipe that a successful one closes."""
        failed, tell = os.pipe()
        me = os.getpid()
        self.engine = self.fork()
        if not self.engine:
            try:
                self.become_engine(me)
            except BaseException as e:
                os.write(tell, b"%d" % (getattr(e, "errno", None) or 0))
            finally:
                os._exit(127)
        os.close(tell)
        try:
            os.setpgid(self.engine, self.engine)  # both sides do it: whoever comes first
        except OSError:
            pass  # it has already called exec
        self.failed = failed
        self.watch.file(failed, "exec")
        try:
            self.watch.process(self.engine, "engine")
        except ProcessLookupError:
            return False  # kqueue says so of a zombie
        return True

    def fork(self) -> int:
        if self.box:
            try:
                return clone_into(self.box)
            except OSError:
                pass  # forbidden after all: as if there was no box
        return os.fork()

    def become_engine(self, keeper: int) -> None:
        import resource

        os.setpgid(0, 0)
        if sys.platform == "linux":
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:
            os._exit(127)
        fp("server_forked")
        # Python ignores these two, and ignored signals stay so across exec; those with a handler do not.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        # The working folder may be on a tmpfs; a core file of a few gigabytes there would be memory.
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        os.execvpe(self.argv[0], self.argv, os.environ)

    def loop(self) -> None:
        while True:
            due = self.ladder[0][0] - time.monotonic() if self.ladder else None
            ready = self.watch.wait(due)
            if "exec" in ready and not self.exec_done():
                return
            if ready & {"daemon", "engine"} or ("lifeline" in ready and not self.command()):
                return
            if "child" in ready:
                self.reap_strays()
            while self.ladder and self.ladder[0][0] <= time.monotonic():
                _, number = self.ladder.pop(0)
                if number == signal.SIGKILL:
                    return
                self.signal_group(number)
                self.signal_group(signal.SIGCONT)  # a stopped process would not notice

    def exec_done(self) -> bool:
        text = os.read(self.failed, 16)
        self.watch.forget(self.failed)
        if not text:
            fp("server_execed")
            self.say(b'{"pid":%d,"start":%d}' % (self.engine, start_time(self.engine)))
            return True
        self.say(b'{"error":"%s","errno":%d}' % (os.strerror(int(text)).encode(), int(text)))
        return False

    def command(self) -> bool:
        """Reads the lifeline; False when it is time to kill."""
        data = os.read(self.lifeline, 4096)
        if not data:
            return False
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        for line in lines:
            word, _, grace = line.partition(b" ")
            if word != b"stop":
                return False
            now, step = time.monotonic(), float(grace)
            self.ladder = [(now, signal.SIGTERM), (now + step, signal.SIGTERM), (now + 2 * step, signal.SIGKILL)]
        return True

    def reap_strays(self) -> None:
        try:
            while os.read(self.wake, 512):
                pass
        except BlockingIOError:
            pass
        while True:  # look without reaping, for the engine must stay a zombie as long as we may signal its group
            try:
                child = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if child is None or child.si_pid == self.engine:
                return
            os.waitpid(child.si_pid, 0)

    def signal_group(self, number: int) -> None:
        """To the engine's process group; the unreaped engine keeps the group's number from being used again."""
        if self.engine:
            try:
                os.killpg(self.engine, number)
            except (ProcessLookupError, PermissionError):  # not yet its own group; macOS: EPERM for a zombie's
                send(self.engine, number)

    def slay(self) -> None:
        """SIGKILL until there is no child left, whatever the tree looked like."""
        if self.box:
            kill_box(self.box)
        self.signal_group(signal.SIGKILL)
        while True:
            strays = children()
            for pid in strays:
                send(pid, signal.SIGKILL)
            # With nobody killed, a blocking wait could be for one that re-parented after we looked.
            try:
                pid, code = os.waitpid(-1, 0 if strays or self.engine else os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                time.sleep(0.001)
            elif pid == self.engine:
                self.engine, self.code = 0, code

    def say(self, line: bytes) -> None:
        try:
            os.write(self.status, line + b"\n")
        except OSError:
            pass  # the daemon is gone


def clone_into(box: str) -> int:
    """As os.fork, but the child is born in the cgroup `box`: clone3(2) with CLONE_INTO_CGROUP, Linux 5.7.

    A child that moves itself there by `cgroup.procs` waits 9 to 24 ms for all processors (measured, Linux 6.18).
    """
    import ctypes

    fd = os.open(box, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    args = (ctypes.c_uint64 * 11)(CLONE_INTO_CGROUP, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, fd)  # struct clone_args
    api = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter's lock: both sides need it
    api.PyOS_BeforeFork()
    pid: int = api.syscall(ctypes.c_long(SYS_CLONE3), args, ctypes.c_size_t(ctypes.sizeof(args)))
    if not pid:
        api.PyOS_AfterFork_Child()
        return 0
    api.PyOS_AfterFork_Parent()
    os.close(fd)
    if pid < 0:
        raise OSError(ctypes.get_errno(), "clone3")
    return pid


def kill_box(box: str) -> None:
    """SIGKILL for everything in the cgroup, whatever it did to get away; who forks meanwhile is taken along by the kernel."""
    try:
        with open(os.open(box + "/cgroup.kill", os.O_WRONLY | os.O_CLOEXEC), "wb", 0) as f:  # never makes a file
            f.write(b"1")
    except OSError:
        pass  # removed already


def unbox(box: str, within: float) -> bool:
    """`kill_box`, and away with it.  False if it was not empty after `within` seconds; then, all there is still dying."""
    kill_box(box)
    end = time.monotonic() + within
    while True:
        try:
            os.rmdir(box)
            return True
        except FileNotFoundError:
            return True
        except OSError:  # EBUSY: SIGKILL takes a moment, longer with gigabytes to give back
            if time.monotonic() > end:
                return False
        for folder, _, _ in os.walk(box, topdown=False):  # an engine may have made boxes in its own
            if folder != box:
                try:
                    os.rmdir(folder)
                except OSError:
                    pass
        time.sleep(0.001)


def send(child: int, number: int) -> None:
    """A signal to a child that we have not reaped, so that the number is still its own."""
    try:
        os.kill(child, number)
    except (ProcessLookupError, PermissionError):
        pass  # it changed its user id: not ours to kill


def children() -> list[int]:
    """Pids of our children, zombies too; none where there is no /proc (there, the process group must do)."""
    me = os.getpid()
    try:
        with open(f"/proc/self/task/{me}/children") as f:
            return [int(pid) for pid in f.read().split()]
    except OSError:
        pass  # a kernel without CONFIG_PROC_CHILDREN
    try:
        return [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and stat_field(int(pid), 4) == me]
    except OSError:
        return []


def stat_field(pid: int, number: int) -> int:
    """Field `number` (from 4 on) of /proc/PID/stat, proc_pid_stat(5); 0 if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            return int(f.read().rpartition(b")")[2].split()[number - 3])
    except OSError:
        return 0


def start_time(pid: int) -> int:
    """When the process began, in clock ticks since boot: together with the pid it names a process for ever."""
    return stat_field(pid, 22)


def main(args: list[str]) -> None:
    daemon, lifeline, status = map(int, args[:3])
    for fd in (lifeline, status):
        os.set_inheritable(fd, False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))  # whoever ends us politely ends the engine too
    dashes = args.index("--")
    Keeper(daemon, lifeline, status, args[3] if dashes > 3 else None, args[dashes + 1 :]).run()


if __name__ == "__main__":
    main(sys.argv[1:])
