"""EngineProcess and its keeper with small programs in the engine's place: start, log, stop, and every kind of death."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from llm_daemon.daemon.logs import RotatingLog
from llm_daemon.daemon.process import KEEPER, EngineProcess, Exit, scrubbed_env
from llm_daemon.engines.base import Plan, Stop
from llm_daemon.errors import EngineError
from llm_daemon.testing.plugin import survivors

Runner = Callable[[Coroutine[Any, Any, None]], None]

# Leaves a grandchild in a session of its own that ignores SIGTERM, as the engine itself does; says its pid when all is set.
ESCAPER = """
import os, signal
signal.signal(signal.SIGTERM, lambda *_: print("sigterm", flush=True))
r, w = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("grandchild", os.getpid(), flush=True)
        os.write(w, b"set")
        while True:
            signal.pause()
    os._exit(0)
os.read(r, 3)
"""
STUBBORN = ESCAPER + "while True: signal.pause()"


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Runner:
    runner: Runner = request.param
    return runner


class Bench:
    """Starts programs as engines, and ends them with the test."""

    def __init__(self, folder: Path, generation: str) -> None:
        self.folder, self.generation = folder, generation
        self.exits: list[Exit] = []

    async def start(self, *argv: str, grace: float = 0.1, env: dict[str, str] | None = None) -> EngineProcess:
        return await EngineProcess.start(
            Plan(argv, "e.sock", env=env or {}, stop=Stop(grace)),
            folder=str(self.folder / "engine"),
            env=scrubbed_env(os.environ, self.generation),
            log=RotatingLog(str(self.folder / "engine.log")),
            name="engine",
            on_exit=self.exits.append,
        )

    @contextlib.asynccontextmanager
    async def engine(self, *argv: str, **options: Any) -> AsyncIterator[EngineProcess]:
        process = await self.start(*argv, **options)
        try:
            yield process
        finally:
            await process.stop(force=True)
            await asyncio.sleep(0)
            assert self.exits == [process.exit]
            process.log.close()

    async def python(self, code: str, **options: Any) -> EngineProcess:
        return await self.start(sys.executable, "-I", "-S", "-c", code, **options)


@pytest.fixture
def bench(tmp_path: Path, generation: str) -> Bench:
    return Bench(tmp_path, generation)


def read(path: str) -> str:
    return Path(path).read_text()


async def said(process: EngineProcess, word: str) -> str:
    """The first line of the engine's output with this word, when it comes."""
    for _ in range(1000):
        for line in process.last_words().splitlines():
            if word in line:
                return line
        await asyncio.sleep(0.01)
    raise AssertionError(f"never said {word!r}: {process.last_words()}")


def test_the_whole_output_and_the_status_arrive(run: Runner, bench: Bench) -> None:
    async def main() -> None:
        process = await bench.start("/bin/sh", "-c", "seq 1 30000; echo last >&2; exit 7")
        assert await process.wait() == Exit(7, None, False)
        assert process.last_words().endswith("30000\nlast")
        assert read(process.log.path) == "".join(f"{i}\n" for i in range(1, 30001)) + "last\n"
        await asyncio.sleep(0)
        assert bench.exits == [Exit(7, None, False)]
        with pytest.raises(ProcessLookupError):  # reaped, no zombie
            os.pidfd_open(process.keeper_pid)
        process.log.close()

    run(main())


def test_what_is_in_the_pipe_when_it_ends_is_read(run: Runner, bench: Bench) -> None:
    """More than one chunk is there, and the loop sees log and end at the same time."""

    async def main() -> None:
        r, w = os.pipe()
        code = f"open('/proc/{os.getpid()}/fd/{r}').read(1); print('x' * 900_000); print('last')"
        process = await bench.python(code)
        fcntl.fcntl(process._fds["log"], fcntl.F_SETPIPE_SZ, 1 << 20)
        keeper = os.pidfd_open(process.keeper_pid)
        os.write(w, b"!")
        assert select.select([keeper], [], [], 10)[0]  # the loop stands still meanwhile, on purpose
        await process.wait()
        assert process.last_words() == "last"
        assert os.path.getsize(process.log.path) == 900_006
        process.log.close()
        for fd in (r, w, keeper):
            os.close(fd)

    run(main())


def test_an_engine_killed_by_a_signal_says_so(bench: Bench) -> None:
    async def main() -> None:
        process = await bench.start("/bin/sh", "-c", "kill -SEGV $$")
        exit = await process.wait()
        assert exit == Exit(None, signal.SIGSEGV, False)
        assert str(exit) == "killed by SIGSEGV"
        process.log.close()

    asyncio.run(main())


def test_its_world(bench: Bench) -> None:
    """Working folder, environment, file descriptors, signals and core limit are what an engine should have."""

    async def main() -> None:
        code = (
            "import os, resource, signal; print(os.getcwd()); print(sorted(os.listdir('/proc/self/fd'))[:4]);"
            "print(os.environ['EXTRA'], os.environ['LLM_DAEMON_GEN'], 'OPENAI_API_KEY' in os.environ);"
            "print([line for line in open('/proc/self/status') if line.startswith('SigBlk')]);"
            "print(resource.getrlimit(resource.RLIMIT_CORE)[0], os.getpgid(0) == os.getpid(), os.read(0, 1))"
        )
        os.environ["OPENAI_API_KEY"] = "secret"
        try:
            process = await bench.python(code, env={"EXTRA": "yes"})
        finally:
            del os.environ["OPENAI_API_KEY"]
        await process.wait()
        words = process.last_words().splitlines()
        assert words[0] == str(bench.folder / "engine")
        assert words[1] == "['0', '1', '2', '3']"  # 3 is the listing itself
        assert words[2] == f"yes {bench.generation} False"
        assert "0000000000000000" in words[3]
        assert words[4] == "0 True b''"
        assert (bench.folder / "engine").stat().st_mode & 0o777 == 0o700
        process.log.close()

    asyncio.run(main())


def test_only_standard_streams_are_inherited_and_sigpipe_kills(bench: Bench) -> None:
    async def main() -> None:
        process = await bench.start("/bin/sh", "-c", "ls /proc/$$/fd; grep SigIgn /proc/$$/status")
        await process.wait()
        *fds, ignored = process.last_words().splitlines()
        assert set(fds) <= {"0", "1", "2", "10"}  # a shell may keep its own at 10
        assert not int(ignored.split()[1], 16) & (1 << (signal.SIGPIPE - 1))
        process.log.close()

    asyncio.run(main())


@pytest.mark.parametrize(("argv", "text"), [("/no/such/program", "No such file"), (KEEPER, "Permission denied")])
def test_a_program_that_cannot_be_run(run: Runner, bench: Bench, argv: str, text: str) -> None:
    async def main() -> None:
        with pytest.raises(EngineError, match=text) as caught:
            await bench.start(argv)
        assert caught.value.code == "engine_start_failed"
        await asyncio.sleep(0)
        assert bench.exits == []

    run(main())


def test_without_file_descriptors_it_is_an_error_and_nothing_is_left(bench: Bench) -> None:
    """With 0, 1, 2, ... left, until there are enough: each place that can fail fails once."""

    async def attempt(allowed: int) -> bool:
        used = {int(fd) for fd in os.listdir("/proc/self/fd")}
        free = [fd for fd in range(max(used) + allowed + 2) if fd not in used]
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[allowed], limits[1]))
        try:
            process = await bench.start("/bin/sleep", "60")
        except EngineError as e:
            assert "Too many open files" in e.message
            return False
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        await process.stop(force=True)
        process.log.close()
        return True

    async def main() -> None:
        gc.collect()  # what earlier tests left to it
        before = set(os.listdir("/proc/self/fd"))
        allowed = 0
        while not await attempt(allowed):
            allowed += 1
            assert set(os.listdir("/proc/self/fd")) == before
            assert not survivors(bench.generation)
        assert allowed > 5

    asyncio.run(main())


def test_no_file_descriptor_stays_open(bench: Bench) -> None:
    async def main() -> None:
        await (await bench.start("/bin/true")).wait()  # whatever is opened once and for all
        gc.collect()  # what earlier tests left to it
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            process = await bench.start("/bin/true")
            await process.wait()
            process.log.close()
        assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(main())


def test_a_cancelled_start_leaves_nothing(run: Runner, bench: Bench) -> None:
    async def main() -> None:
        for rounds in range(6):
            starting = asyncio.ensure_future(bench.start("/bin/sleep", "60"))
            for _ in range(rounds):
                await asyncio.sleep(0)
            starting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await starting
            assert not survivors(bench.generation, within=0)
        assert bench.exits == []

    run(main())


# -- stopping --


def test_the_ladder(run: Runner, bench: Bench) -> None:
    """SIGTERM, SIGTERM, SIGKILL; and what escaped the tree goes with it."""

    async def main() -> None:
        process = await bench.python(STUBBORN, grace=0.5)  # in which it must get to say that it heard
        await said(process, "grandchild")
        began = time.monotonic()
        exit = await process.stop()
        assert exit == Exit(None, signal.SIGKILL, True)
        assert process.last_words().count("sigterm") == 2
        assert 1.0 <= time.monotonic() - began < 30
        assert not survivors(bench.generation, within=0)
        process.log.close()

    run(main())


def test_a_polite_engine_ends_at_the_first_sigterm(bench: Bench) -> None:
    async def main() -> None:
        async with bench.engine("/bin/sleep", "60", grace=30) as process:
            first, second = await asyncio.gather(process.stop(), process.stop())
            assert first == second == Exit(None, signal.SIGTERM, True)

    asyncio.run(main())


def test_a_stopped_engine_and_a_stopped_keeper_still_stop(bench: Bench) -> None:
    async def main() -> None:
        async with bench.engine("/bin/sleep", "60", grace=30) as process:
            os.kill(process.pid, signal.SIGSTOP)
            os.kill(process.keeper_pid, signal.SIGSTOP)
            assert (await asyncio.wait_for(process.stop(), 10)).signal == signal.SIGTERM

    asyncio.run(main())


def test_kill_now_needs_no_waiting(run: Runner, bench: Bench) -> None:
    async def main() -> None:
        process = await bench.python(STUBBORN)
        await said(process, "grandchild")
        process.kill_now()
        assert await process.wait() == Exit(None, signal.SIGKILL, True)
        assert not survivors(bench.generation, within=0)
        process.kill_now()
        assert await process.stop() == process.exit
        process.log.close()

    run(main())


# -- deaths --


def test_what_an_ended_engine_leaves_is_killed(bench: Bench) -> None:
    async def main() -> None:
        process = await bench.python(ESCAPER + "os._exit(3)")
        assert await process.wait() == Exit(3, None, False)
        assert "grandchild" in process.last_words()
        assert not survivors(bench.generation, within=0)
        process.log.close()

    asyncio.run(main())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_keeper_takes_everything_along(run: Runner, bench: Bench, number: int) -> None:
    async def main() -> None:
        process = await bench.python(STUBBORN)
        await said(process, "grandchild")
        os.kill(process.keeper_pid, number)
        exit = await asyncio.wait_for(process.wait(), 10)
        assert exit == Exit(None, signal.SIGKILL, False)
        assert not survivors(bench.generation)
        process.log.close()

    run(main())


def test_the_keeper_reaps_strays(bench: Bench) -> None:
    """Orphans of a long-lived engine do not pile up as zombies under the keeper."""

    async def main() -> None:
        async with bench.engine(
            "/bin/sh", "-c", "(sh -c 'exit 0' &) ; (sh -c 'exit 0' &) ; echo spawned; exec sleep 60"
        ) as process:
            await said(process, "spawned")
            children = f"/proc/{process.keeper_pid}/task/{process.keeper_pid}/children"
            deadline = time.monotonic() + 5
            while read(children).split() != [str(process.pid)]:
                assert time.monotonic() < deadline, read(children)
                await asyncio.sleep(0.005)

    asyncio.run(main())


def test_a_keeper_whose_parent_is_not_the_daemon_starts_nothing(tmp_path: Path) -> None:
    """The daemon died before the keeper looked: its pid may be another's by now."""
    life_r, life_w = os.pipe()
    try:
        other = os.getppid()  # lives, and is not the parent of what we start
        done = subprocess.run(
            [
                sys.executable,
                "-I",
                "-S",
                KEEPER,
                str(other),
                str(life_r),
                str(life_r),
                "--",
                "/bin/touch",
                str(tmp_path / "started"),
            ],
            pass_fds=(life_r,),
            timeout=10,
            check=False,
        )
    finally:
        os.close(life_r)
        os.close(life_w)
    assert done.returncode == 0
    assert not (tmp_path / "started").exists()


def test_a_long_folder_name_still_has_a_usable_socket(tmp_path: Path, generation: str) -> None:
    async def main() -> None:
        bench = Bench(tmp_path / ("x" * 100), generation)
        bench.folder.mkdir()
        code = """
import socket
s = socket.socket(socket.AF_UNIX)
s.bind("e.sock")
s.listen()
print("listening", flush=True)
s.accept()[0].send(b"hello")
"""
        process = await bench.python(code)
        await said(process, "listening")
        assert len(process.socket) < 104
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(process.socket)
            assert sock.recv(5) == b"hello"
        await process.wait()
        process.log.close()

    asyncio.run(main())


def test_a_blocked_log_does_not_block_the_engine(bench: Bench) -> None:
    """The log's folder cannot be written: the engine runs on, its last words are kept."""

    async def main() -> None:
        (bench.folder / "blocked").write_text("a file where the log's folder should be")
        process = await EngineProcess.start(
            Plan(("/bin/sh", "-c", "seq 1 50000; echo done"), "e.sock"),
            folder=str(bench.folder / "engine"),
            env=scrubbed_env(os.environ, bench.generation),
            log=RotatingLog(str(bench.folder / "blocked" / "engine.log")),
            name="engine",
            on_exit=bench.exits.append,
        )
        assert (await process.wait()).status == 0
        assert process.last_words().endswith("done")
        assert process.log.dropped > 100_000

    asyncio.run(main())


def test_last_activity_follows_the_log(bench: Bench) -> None:
    async def main() -> None:
        r, w = os.pipe()
        try:
            async with bench.engine("/bin/cat", f"/proc/{os.getpid()}/fd/{r}") as process:
                before = process.last_activity
                os.write(w, b"word\n")
                await said(process, "word")
                assert process.last_activity > before
        finally:
            os.close(r)
            os.close(w)

    asyncio.run(main())


def test_scrubbed_env() -> None:
    kept = {
        "PATH": "p",
        "HOME": "h",
        "LC_ALL": "C",
        "CUDA_VISIBLE_DEVICES": "0",
        "HIP_VISIBLE_DEVICES": "1",
        "GGML_VK_VISIBLE_DEVICES": "0",
    }
    gone = {
        "LLAMA_ARG_HOST": "0.0.0.0",
        "LLAMA_API_KEY": "k",
        "AIP_MODE": "x",
        "http_proxy": "u",
        "HTTPS_PROXY": "u",
        "HF_TOKEN": "t",
        "OPENAI_API_KEY": "k",
        "NVIDIA_API_KEY": "k",
        "AWS_SECRET_ACCESS_KEY": "k",
        "LD_PRELOAD": "x",
        "PYTHONPATH": "x",
        "OMP_NUM_THREADS": "9",
        "XDG_CONFIG_HOME": "x",
    }
    assert scrubbed_env({**kept, **gone}, "g") == {**kept, "LLM_DAEMON_GEN": "g"}


def test_pidfd_of_the_engine_is_closed_in_the_end(bench: Bench) -> None:
    """A pidfd kept here becomes readable: the engine is gone when `wait` returns, not some time later."""

    async def main() -> None:
        process = await bench.start("/bin/sleep", "60")
        pidfd = os.pidfd_open(process.pid)
        await process.stop(force=True)
        assert select.select([pidfd], [], [], 0)[0]
        os.close(pidfd)
        process.log.close()

    asyncio.run(main())
