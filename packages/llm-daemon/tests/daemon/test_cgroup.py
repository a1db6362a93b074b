"""An engine's box: nothing gets out of it, whoever dies, and no box stays.  Where there can be none, all is as without."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from llm_daemon.daemon import cgroup
from llm_daemon.daemon.logs import RotatingLog
from llm_daemon.daemon.process import EngineProcess, scrubbed_env
from llm_daemon.daemon.sweep import sweep
from llm_daemon.engines.base import Plan, Stop
from llm_daemon.errors import EngineError
from llm_daemon.testing.census import boxes
from llm_daemon.testing.conformance import stand_in
from llm_daemon.testing.fake_engine import SERVER

FakeModel = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path, generation: str) -> str:
    """An engine's folder, where the daemon has it."""
    (tmp_path / f"g-{generation}").mkdir()
    return str(tmp_path / f"g-{generation}" / "i1-1")


@pytest.fixture
def boxed(tmp_path: Path) -> None:
    """Skips where the system lets us have no box."""
    probe = str(tmp_path / "probe")
    if (box := cgroup.make(probe, f"test-{os.getpid()}")) is None:
        pytest.skip("no cgroup v2 here that we may write in")
    assert cgroup.remove(box, probe)


def until(true: Callable[[], object], what: str) -> None:
    """There is no event for the end of a cgroup."""
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.002)


def grandchild_of(log: str) -> int:
    found: list[str] = []

    def said() -> bool:
        with contextlib.suppress(FileNotFoundError):
            found[:] = re.findall(r"grandchild (\d+)", Path(log).read_text())
        return bool(found)

    until(said, "the grandchild says its pid")
    return int(found[0])


@contextlib.contextmanager
def watched(*pids: int) -> Iterator[Callable[[float], list[int]]]:
    """The pids that still live after some seconds; those are killed in the end."""
    fds = {os.pidfd_open(pid): pid for pid in pids}

    def alive(within: float) -> list[int]:
        end = time.monotonic() + within
        return [pid for fd, pid in fds.items() if not select.select([fd], [], [], max(0.0, end - time.monotonic()))[0]]

    try:
        yield alive
    finally:
        for fd in fds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            os.close(fd)


Fault = Callable[["subprocess.Popen[str]", int, int], None]


def engine_crashes(daemon: subprocess.Popen[str], keeper: int, engine: int) -> None:
    os.kill(engine, signal.SIGSEGV)


def keeper_killed(daemon: subprocess.Popen[str], keeper: int, engine: int) -> None:
    os.kill(keeper, signal.SIGKILL)


def keeper_ended(daemon: subprocess.Popen[str], keeper: int, engine: int) -> None:
    os.kill(keeper, signal.SIGTERM)


def daemon_killed(daemon: subprocess.Popen[str], keeper: int, engine: int) -> None:
    daemon.kill()


def keeper_stopped_daemon_killed(daemon: subprocess.Popen[str], keeper: int, engine: int) -> None:
    os.kill(keeper, signal.SIGSTOP)
    daemon.kill()


def engine_stopped_daemon_killed(daemon: subprocess.Popen[str], keeper: int, engine: int) -> None:
    os.kill(engine, signal.SIGSTOP)
    daemon.kill()


def daemon_and_keeper_killed(daemon: subprocess.Popen[str], keeper: int, engine: int) -> None:
    daemon.send_signal(signal.SIGSTOP)  # it cannot react to the keeper's death
    os.kill(keeper, signal.SIGKILL)
    daemon.kill()
    daemon.wait()


FAULTS: list[Fault] = [
    engine_crashes, keeper_killed, keeper_ended, daemon_killed, keeper_stopped_daemon_killed, engine_stopped_daemon_killed,
    daemon_and_keeper_killed,
]  # fmt: skip


@pytest.fixture(params=["tagged, no box", "scrubbed, box"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "scrubbed, box":
        request.getfixturevalue("boxed")
    return str(request.param)


@pytest.mark.parametrize("fault", FAULTS)
def test_no_orphan(kind: str, fault: Fault, fake_model: FakeModel, folder: str, generation: str) -> None:
    """The engine ignores SIGTERM, its grandchild left tree and session; without a box its environment must tell."""
    has_box = kind == "scrubbed, box"
    model = fake_model(grandchild="scrubbed" if has_box else True, ignore_sigterm=True)
    adapter = "llm_daemon.testing.fake_engine:FakeEngine"
    with stand_in(adapter, {}, model, Path(folder), generation, box=has_box) as daemon:
        assert daemon.stdout.readline() == "starting\n"
        _, keeper, engine = daemon.stdout.readline().split()
        assert daemon.stdout.readline() == "ready\n"
        assert len(boxes({generation})) == has_box
        with (
            watched(int(keeper), int(engine)) as tree_alive,
            watched(int(keeper), int(engine), grandchild_of(folder + ".log")) as alive,
        ):
            fault(daemon, int(keeper), int(engine))
            if fault is daemon_and_keeper_killed:
                assert tree_alive(10.0) == []  # the grandchild may have got away
                sweep(Path(folder).parent.parent, own="another")
                assert not Path(folder).parent.exists()
            assert alive(10.0) == []
        until(lambda: not boxes({generation}), "the box is gone")


@contextlib.asynccontextmanager
async def engine(folder: str, generation: str, *argv: str) -> AsyncIterator[EngineProcess]:
    process = await EngineProcess.start(
        Plan(argv, "e.sock", stop=Stop(0.1)),
        folder=folder,
        env=scrubbed_env(os.environ, generation),
        log=RotatingLog(folder + ".log"),
        name="engine",
        on_exit=lambda exit: None,
    )
    try:
        yield process
    finally:
        await process.stop(force=True)
        process.log.close()


@pytest.mark.usefixtures("boxed")
@pytest.mark.parametrize("force", [False, True])
def test_stop(fake_model: FakeModel, folder: str, generation: str, force: bool) -> None:
    """The engine is in its box from its first breath, and when `stop` returns all is gone."""

    async def main() -> None:
        model = fake_model(grandchild="scrubbed", ignore_sigterm=True)
        async with engine(folder, generation, sys.executable, SERVER, model, "--alias", "a", "--socket", "e.sock") as process:
            (box,) = boxes({generation})
            assert Path(f"/proc/{process.pid}/cgroup").read_text().rstrip().endswith("/" + os.path.basename(box))
            grandchild = await asyncio.to_thread(grandchild_of, folder + ".log")
            with watched(process.pid, process.keeper_pid, grandchild) as alive:
                await process.stop(force)
                assert alive(0) == []
            assert boxes({generation}) == []
            assert not Path(folder + cgroup.NOTE).is_symlink()

    asyncio.run(main())


@pytest.mark.usefixtures("boxed")
def test_boxes_in_the_box_go_too(folder: str, generation: str) -> None:
    async def main() -> None:
        inner = f"{cgroup.home()}/{cgroup.PREFIX}{generation}-i1-1/inner"
        code = f"mkdir {inner} && echo 0 > {inner}/cgroup.procs && echo inside; sleep 60 & exit"
        async with engine(folder, generation, "/bin/sh", "-c", code) as process:
            await process.wait()
            assert process.last_words() == "inside"
            assert boxes({generation}) == []

    asyncio.run(main())


@pytest.mark.usefixtures("boxed")
def test_the_runtime_folder_is_deleted_and_the_keeper_killed(folder: str, generation: str) -> None:
    async def main() -> None:
        async with engine(folder, generation, "/bin/sleep", "60") as process:
            assert len(boxes({generation})) == 1
            shutil.rmtree(Path(folder).parent)
            os.kill(process.keeper_pid, signal.SIGKILL)
            await process.wait()
            assert boxes({generation}) == []

    asyncio.run(main())


@pytest.mark.usefixtures("boxed")
def test_a_program_that_cannot_be_run_leaves_no_box(folder: str, generation: str) -> None:
    async def main() -> None:
        with pytest.raises(EngineError, match="No such file"):
            async with engine(folder, generation, "/no/such/program"):
                pass

    asyncio.run(main())
    assert boxes({generation}) == []
    assert os.listdir(os.path.dirname(folder)) == ["i1-1"]


def test_a_box_that_the_kernel_refuses(monkeypatch: pytest.MonkeyPatch, folder: str, generation: str) -> None:
    """The engine runs without: a filter may forbid clone3, or the cgroup be of a type that takes no process."""
    monkeypatch.setattr(cgroup, "make", lambda folder, generation: folder + "/no-such-box")

    async def main() -> None:
        async with engine(folder, generation, "/bin/sh", "-c", "echo here; exit 3") as process:
            assert (await process.wait()).status == 3
            assert process.last_words() == "here"

    asyncio.run(main())


@pytest.mark.parametrize("where", [None, "ordinary", "missing"])
def test_no_box_leaves_no_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str, where: str | None) -> None:
    """No cgroup2; one without cgroup.kill (before Linux 5.14), for which an ordinary folder stands; one that is not there."""
    (tmp_path / "ordinary").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(cgroup, "home", lambda: where and str(tmp_path / where))
        assert cgroup.make(folder, "g") is None
    assert os.listdir(os.path.dirname(folder)) == []
    assert os.listdir(tmp_path / "ordinary") == []


@pytest.mark.parametrize(
    ("own", "mounts", "found"),
    [
        ("0::/\n", "cgroup2 /sys/fs/cgroup cgroup2 ro 0 0\n", "/sys/fs/cgroup"),
        ("1:cpu:/\n0::/a/b\n", "proc /proc proc rw 0 0\ncgroup2 /c cgroup2 rw 0 0\n", "/c/a/b"),
        ("0::/../other\n", "cgroup2 /c cgroup2 rw 0 0\n", None),
        ("1:cpu:/\n", "cgroup2 /c cgroup2 rw 0 0\n", None),
        ("0::/\n", "cgroup /c cgroup rw 0 0\n", None),
    ],
)
def test_find(own: str, mounts: str, found: str | None) -> None:
    assert cgroup.find(own, mounts) == found


def test_another_system(tmp_path: Path) -> None:
    """Where there is none of Linux's, the modules load and there is no box."""
    code = """
import os, select, sys
sys.platform = "darwin"
for module, names in ((os, ("pidfd_open", "waitid")), (select, ("poll", "epoll"))):
    for name in names:
        vars(module).pop(name, None)
from llm_daemon.daemon import cgroup, keeper
assert cgroup.make("folder", "g") is None and not os.path.lexists("folder.cgroup")
assert "ctypes" not in sys.modules
"""
    path = os.pathsep.join(p for p in sys.path if p)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
