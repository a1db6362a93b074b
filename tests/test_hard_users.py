"""What clumsy and hostile users found, and what must not come back."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llm_daemon
from llm_daemon import attach, errors
from llm_daemon.client import sync
from llm_daemon.core import control
from llm_daemon.testing.world import World, wait_gone


def ask(method: str, **params: object) -> Any:
    talk = sync.connect(start_daemon=False, lease=False)
    assert talk is not None
    try:
        return talk.ask("CALL", 10, method=method, params=params)["result"]
    finally:
        talk.close()


@pytest.mark.parametrize(
    "options",
    [
        {"args": [os.fsdecode(b"--\xff")]},
        {"args": ["a\0b"]},
        {"keep_alive": float("nan")},
        {"keep_alive": -1},
        {"timeout": 0},
        {"timeout": "x"},
        {"engine": ""},
        {"on_progress": 5},
        {"quant": "x" * 20000},
    ],
    ids=repr,
)
def test_an_impossible_wish_is_refused_and_harms_nobody(world: World, quick: str, options: dict[str, Any]) -> None:
    with attach(quick) as llm:
        with pytest.raises(errors.UsageError):
            attach(quick, **options)
        assert llm.is_open()
        assert [i["state"] for i in ask("status")["instances"]] == ["ready"]


@pytest.mark.parametrize(
    "name", [None, 5, b"m.gguf", "a" * 1_000_000, "x\0.gguf", "/tmp/\udcff.gguf"], ids=lambda n: repr(n)[:20]
)
def test_what_is_no_name_is_a_usage_error(world: World, name: Any) -> None:
    with pytest.raises(errors.UsageError):
        attach(name)


def test_rubbish_questions_are_answered_and_cost_nobody_the_daemon(world: World, quick: str) -> None:
    with attach(quick) as llm:
        daemon = llm.daemon_pid
        for method, params in (
            ("hold", {"pid": "abc"}),
            ("stop", {"model": 5}),
            ("pull", {}),
            ("status", [1]),
            ("no", {}),
            (3, None),
        ):
            talk = sync.connect(start_daemon=False, lease=False)
            assert talk is not None
            with pytest.raises(errors.LlmDaemonError):
                talk.ask("CALL", 10, method=method, params=params)
            talk.close()
        wishes: list[object] = ["abc", {}, {"model": []}, {"model": {"?": 1}}, {"model": "m", "colour": 1}, None]
        for wish in wishes:
            talk = sync.connect(start_daemon=False)
            assert talk is not None
            with pytest.raises(errors.LlmDaemonError):
                talk.ask("ENSURE", 10, wish=wish)
            talk.close()
        assert (llm.daemon_pid, llm.is_open()) == (daemon, True)


def test_stop_by_force_ends_this_daemon_even_if_its_clients_come_back_at_once(world: World, quick: str) -> None:
    child = world.python(
        f"import time; from llm_daemon import attach\nllm = attach({quick!r}); print(llm.daemon_pid, flush=True)\n"
        "while True: llm.refresh(); time.sleep(0.001)"
    )
    assert child.stdout is not None
    daemon = int(child.stdout.readline())
    assert world.llm_daemon("stop").returncode == 75  # somebody uses it
    assert world.llm_daemon("stop", "--force").returncode == 0
    assert wait_gone(daemon, 30)


def test_a_client_that_does_not_read_delays_no_end(world: World, quick: str) -> None:
    attach(quick).close()
    s = socket.socket(socket.AF_UNIX)
    s.connect(str(world.runtime / "sock"))
    s.sendall(control.encode({"op": "HELLO", "proto": control.PROTO, "lease": False}))
    s.setblocking(False)
    try:
        while True:
            s.send(b'{"op":"PING"}\n' * 1000)
    except OSError:
        pass  # full, or cut off
    (daemon,) = {p for p, c in world.processes().items() if "boot" in c}
    ask("stop", force=True)
    assert wait_gone(daemon, 30)
    s.close()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[catalog]\nx = 3\n", "catalog.x"),
        ("[catalog.x]\nfoo = 1\n", "catalog.x"),
        ('[engines.x]\nadapter = "no.such:Thing"\n', "no.such:Thing"),
        ("[engines.nope]\n", "nope"),
        ("[engines.llama-server]\nargs = [1, 2]\n", "list of texts"),
        ('default_engine = "nope"\n', "nope"),
        ('default_model = "nope"\n', "nope"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_a_daemon_is_up(world: World, text: str, word: str) -> None:
    world.config.write_text(text)
    with pytest.raises(errors.UsageError, match=word):
        attach("smollm2-135m")
    done = world.llm_daemon("config")
    assert (done.returncode, word in done.stderr) == (2, True)


@pytest.mark.parametrize("mode", [0o1777, 0o755])
def test_a_folder_with_other_things_in_it_is_not_made_private(world: World, quick: str, mode: int) -> None:
    world.runtime.mkdir()
    world.runtime.chmod(mode)
    (world.runtime / "mine.txt").write_text("x")
    with pytest.raises(errors.UsageError, match="holds other things"):
        attach(quick)
    assert world.runtime.stat().st_mode & 0o7777 == mode
    assert [p.name for p in world.runtime.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("folder", ["/proc/nothing", "relative/run"])
def test_an_unusable_runtime_folder_is_told_at_once(
    world: World, quick: str, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.setenv("LLM_DAEMON_RUNTIME_DIR", folder)
    began = time.monotonic()
    with pytest.raises(errors.UsageError):
        attach(quick)
    assert time.monotonic() - began < 10
    monkeypatch.setenv("LLM_DAEMON_RUNTIME_DIR", str(world.runtime))


def test_somebody_elses_greedy_start_is_not_joined(world: World, fake_model: Callable[..., str]) -> None:
    model = fake_model(load_seconds=30)
    greedy = world.python(
        f"from llm_daemon import attach; attach({model!r}, context=9999, on_progress=lambda p: print(p, flush=True))"
    )
    assert greedy.stdout is not None
    while "load" not in greedy.stdout.readline():
        pass
    states: list[tuple[bool, str]] = []

    class SeenEnough(Exception):
        pass

    def look(progress: sync.Progress) -> None:
        if progress.phase == "load":
            states.extend((i["model"] != model, i["state"]) for i in ask("status")["instances"])
            raise SeenEnough

    with pytest.raises(SeenEnough):
        attach(model, on_progress=look)
    assert (True, "starting") in states and (False, "starting") in states


@pytest.mark.parametrize("error", [BrokenPipeError("mine"), TimeoutError("mine"), KeyError("mine"), KeyboardInterrupt()])
def test_an_error_of_the_callers_own_report_is_the_callers(world: World, quick: str, error: BaseException) -> None:
    def report(progress: object) -> None:
        raise error

    with pytest.raises(type(error)):
        attach(quick, on_progress=report)


def test_the_engines_own_timeout_arrives_whole(world: World, fake_model: Callable[..., str]) -> None:
    with pytest.raises(errors.EngineTimeout, match="no progress"):
        attach(fake_model(never_ready=True, silent=True, stall=0.3))


def test_a_dropped_lease_ends(world: World, quick: str) -> None:
    kept = attach(quick)
    dropped = attach(quick)
    assert len(ask("status")["leases"]) == 2
    del dropped
    gc.collect()
    assert len(ask("status")["leases"]) == 1
    kept.close()


def test_attaching_again_does_not_block_the_event_loop(world: World, fake_model: Callable[..., str], tmp_path: Path) -> None:
    """The second load goes on when the loop says so, which it cannot while somebody blocks it."""
    gate = tmp_path / "gate"
    gate.touch()

    def wait_for_load() -> None:
        end = time.monotonic() + 30
        while not is_loading():
            assert time.monotonic() < end
            time.sleep(0.01)

    def is_loading() -> bool:
        talk = sync.connect(start_daemon=False, lease=False)
        if talk is None:
            return False
        try:
            return [i["state"] for i in talk.ask("CALL", 10, method="status")["result"]["instances"]] == ["starting"]
        finally:
            talk.close()

    async def let_it_load() -> None:
        await asyncio.to_thread(wait_for_load)
        gate.touch()

    async def main() -> None:
        async with llm_daemon.aio.attach(fake_model(load_until=str(gate), tokens=["x"])) as llm:
            client = llm.openai()
            gate.unlink()
            os.kill(llm.daemon_pid, signal.SIGKILL)
            assert wait_gone(llm.pid, 30)
            async with asyncio.timeout(60):
                await asyncio.gather(let_it_load(), *(client.completions.create(model=llm.model, prompt="x") for _ in range(2)))

    asyncio.run(main())


def test_a_daemon_killed_by_every_load_is_not_started_for_ever(world: World, fake_model: Callable[..., str]) -> None:
    model = fake_model(load_seconds=20)

    def kill(progress: sync.Progress) -> None:
        if progress.phase == "load":
            for pid, command in world.processes().items():
                if "boot" in command:
                    os.kill(pid, signal.SIGKILL)

    with pytest.raises(errors.Unavailable, match="died 8 times"):
        attach(model, on_progress=kill)


def test_a_deadline_is_kept_while_the_launcher_hangs(world: World, quick: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = world.base / "python"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o755)
    monkeypatch.setenv("LLM_DAEMON_PYTHON", str(hanging))
    began = time.monotonic()
    with pytest.raises(errors.LlmDaemonError):
        attach(quick, timeout=1)
    assert time.monotonic() - began < 30  # it hangs for a minute
    assert world.processes() == {}


def test_a_status_of_many_leases_is_read_whole(world: World, quick: str) -> None:
    leases = [attach(quick) for _ in range(400)]
    assert len(ask("status")["leases"]) == 400
    for lease in leases:
        lease.close()


def test_an_error_shows_its_hint_in_a_traceback() -> None:
    with pytest.raises(errors.UsageError) as caught:
        attach("")
    assert any("smollm2-135m" in note for note in caught.value.__notes__)


def test_a_file_with_a_question_mark_in_its_name(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.base)
    Path("what is?.gguf").write_bytes(b"GGUF")
    with pytest.raises(errors.UsageError) as caught:
        attach("what is?.gguf")
    assert "relative" not in str(caught.value)
