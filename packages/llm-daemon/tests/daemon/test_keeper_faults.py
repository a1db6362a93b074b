"""The daemon dies in every awkward moment; nothing of its engine stays.  A process of ours stands in for the daemon."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_daemon.daemon.sweep import sweep
from llm_daemon.testing.census import boxes
from llm_daemon.testing.conformance import stand_in
from llm_daemon.testing.plugin import survivors

FakeModel = Callable[..., str]


def daemon(model: str, folder: Path, generation: str, **more: Any) -> Any:
    return stand_in("llm_daemon.testing.fake_engine:FakeEngine", {}, model, folder / "engine", generation, **more)


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


@pytest.mark.parametrize("stopped", ["nobody", "keeper", "engine", "both"])
def test_daemon_killed(fake_model: FakeModel, tmp_path: Path, generation: str, stopped: str) -> None:
    """Also while keeper or engine are stopped; the engine ignores SIGTERM and has an escaped grandchild."""
    model = fake_model(grandchild=True, ignore_sigterm=True)
    with daemon(model, tmp_path, generation) as process:
        assert process.stdout.readline() == "starting\n"
        _, keeper, engine = process.stdout.readline().split()
        assert process.stdout.readline() == "ready\n"
        for pid in {"nobody": (), "keeper": (keeper,), "engine": (engine,), "both": (keeper, engine)}[stopped]:
            os.kill(int(pid), signal.SIGSTOP)
        kill(process)
        assert not survivors(generation, within=1.0)


def test_a_leaked_lifeline_does_not_keep_the_engine(fake_model: FakeModel, tmp_path: Path, generation: str) -> None:
    """A child of the daemon holds a copy of the pipe: no end of file, but the keeper watches the daemon's pidfd, too."""
    with daemon(fake_model(), tmp_path, generation, leak=True) as process:
        process.stdout.readline()
        process.stdout.readline()
        assert process.stdout.readline() == "ready\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (leak,) = [int(pid) for pid in children if b"keeper" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
        pidfd = os.pidfd_open(leak)
        try:
            kill(process)
            assert not survivors(generation, within=1.0)
        finally:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            select.select([pidfd], [], [], 5)
            os.close(pidfd)


def test_daemon_killed_while_loading(fake_model: FakeModel, tmp_path: Path, generation: str) -> None:
    with daemon(fake_model(never_ready=True, grandchild=True), tmp_path, generation, wait=False) as process:
        process.stdout.readline()
        assert process.stdout.readline().startswith("started")
        kill(process)
        assert not survivors(generation, within=1.0)


def test_daemon_killed_at_random_moments_of_a_start(fake_model: FakeModel, tmp_path: Path, generation: str) -> None:
    """Of the engine, and of its box after the next daemon's sweep: it is made before the keeper that removes it."""
    model = fake_model(grandchild=True, ignore_sigterm=True)
    rng = random.Random(7)
    with daemon(model, tmp_path / "whole" / f"g-{generation}", generation) as process:
        assert process.stdout.readline() == "starting\n"
        began = time.monotonic()
        assert process.stdout.readline().startswith("started")
        took = time.monotonic() - began
        kill(process)
        assert not survivors(generation)
    sweep(tmp_path / "whole", own="another")
    started = 0
    for trial in range(20):
        runtime = tmp_path / str(trial)
        with daemon(model, runtime / f"g-{generation}", generation) as process:
            assert process.stdout.readline() == "starting\n"
            # The moment is the subject here: from before the keeper's exec until after the engine has begun.
            moment = rng.uniform(0, 2 * took)
            select.select([], [], [], moment)
            kill(process)
            has_started = "started" in process.stdout.read()
            started += has_started
            if has_started == (moment < took):  # the machine is faster or slower than it was
                took = moment
            assert not survivors(generation, within=1.0)
        sweep(runtime, own="another")
        assert not boxes({generation})
        assert not (runtime / f"g-{generation}").exists()
    assert 0 < started < 20  # otherwise the moments missed the subject


def test_daemon_and_keeper_killed_together_take_the_engine_along(fake_model: FakeModel, tmp_path: Path, generation: str) -> None:
    """An escaped grandchild may survive this, until the next daemon's sweep; the engine itself may not."""
    with daemon(fake_model(ignore_sigterm=True), tmp_path, generation) as process:
        process.stdout.readline()
        _, keeper, _ = process.stdout.readline().split()
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGSTOP)  # it cannot react to the keeper's death
        os.kill(int(keeper), signal.SIGKILL)
        kill(process)
        assert not survivors(generation, within=1.0)
