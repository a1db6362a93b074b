"""What real daemons leave behind for `explain`: why models came and went, also after the daemon is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from llm_daemon import attach
from llm_daemon.testing.world import World, wait_gone


def texts(world: World) -> list[str]:
    """What `explain` says of models, oldest first."""
    done = world.llm_daemon("explain", "--json")
    assert done.returncode == 0, done.stderr
    return [event["text"] for event in reversed(json.loads(done.stdout)["events"])]


def test_the_story_of_a_model_outlives_its_daemon(world: World, quick: str) -> None:
    client, _, daemon = world.client(quick, LLM_DAEMON_TTL="0.3")
    loading, ready = texts(world)  # of the living daemon
    assert f"{quick} begins to load: " in loading and f"(pid {client.pid}) asked for it" in loading
    assert ready.startswith(f"{quick} is ready after ")
    world.leave(client)
    assert wait_gone(daemon, 30)
    world.wait_empty(within=30)
    after = texts(world)
    assert after[:2] == [loading, ready]
    (closed,) = after[2:]
    assert closed.startswith(f"{quick} is closed: nobody used it for ")
    assert (world.state / "history.sqlite").stat().st_mode & 0o777 == 0o600


def test_stopped_by_hand_and_killed(world: World, quick: str) -> None:
    with attach(quick):
        assert world.llm_daemon("stop", quick, "--force").returncode == 0
        with attach(quick) as again:
            os.kill(again.pid, signal.SIGKILL)
            assert wait_gone(again.pid, 30)
            told, end = [""], time.monotonic() + 30
            while len(told) < 2:  # its keeper tells the daemon
                assert time.monotonic() < end, told
                told = [text.partition(": ")[2] for text in texts(world) if "is closed" in text]
            with attach(quick) as third:
                assert third.pid != again._facts["pid"]
    assert told[0] == "it was stopped by hand" and "died" in told[1]


def test_a_failed_load_says_why(world: World, fake_model: Callable[..., str]) -> None:
    model = fake_model(crash_while_loading="out of luck", exit_code=3)
    assert world.llm_daemon("load", model).returncode == 69
    assert any(text.startswith(f"{model} did not load: ") for text in texts(world))


def test_no_history_when_none_is_wanted(world: World, quick: str) -> None:
    client, _, _ = world.client(quick, LLM_DAEMON_HISTORY_LIMIT="0")
    assert texts(world)[-1].startswith(f"{quick} is ready")  # from the daemon's memory
    world.leave(client)
    assert not (world.state / "history.sqlite").exists()


def test_a_daemon_killed_while_it_writes_leaves_a_file_that_can_be_read(world: World) -> None:
    code = (
        "from llm_daemon.daemon.history import History\n"
        f"h = History({str(world.state / 'history.sqlite')!r}, 100, 0.0); i = 0\n"
        "while True:\n"
        "    h.put(('events', float(i), 'ready', 'm', {'text': str(i)}, None)); h.flush(5.0); print(i, flush=True); i += 1\n"
    )
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        with child:
            assert child.stdout is not None
            said = [child.stdout.readline() for _ in range(150)]
            child.kill()  # it has gone on meanwhile
            said += child.stdout.readlines()
        last = [line.strip() for line in said if line.endswith("\n")][-1]
        told = texts(world)
        assert last in told and 18 <= len(told) <= 20
