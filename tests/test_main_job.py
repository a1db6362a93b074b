"""The main job on real processes: start, share, survive, close.  The engine is scripted unless a test says `real`."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any

import pytest

import llm_daemon
from llm_daemon import attach, errors
from llm_daemon.client import sync
from llm_daemon.daemon.address import reserve
from llm_daemon.testing.world import World, wait_gone

PROMPT = "The capital of France is"
SOON = 10.0  # seconds for what the storm sees done within one, on a machine that does something else as well


def status() -> dict[str, Any]:
    talk = sync.connect(start_daemon=False, lease=False)
    assert talk is not None
    try:
        result: dict[str, Any] = talk.ask("CALL", 10, method="status")["result"]
        return result
    finally:
        talk.close()


def test_two_processes_share_one_engine_and_ps_says_so(world: World, quick: str) -> None:
    (_, engine1, daemon1), (_, engine2, daemon2) = world.client(quick), world.client(quick)
    assert (engine1, daemon1) == (engine2, daemon2)
    seen = json.loads(world.llm_daemon("ps", "--json").stdout)
    assert [i["state"] for i in seen["instances"]] == ["ready"]
    assert [lease["engine_pids"] for lease in seen["leases"]] == [[engine1], [engine1]]


def test_two_hundred_clients_start_at_once_and_one_daemon_is_born(world: World, quick: str) -> None:
    with ThreadPoolExecutor(200) as pool:
        leases = list(pool.map(lambda _: attach(quick, timeout=60), range(200)))
    assert len({lease.daemon_pid for lease in leases}) == 1
    assert len({lease.pid for lease in leases}) == 1
    assert len(list(world.runtime.glob("g-*"))) == 1
    for lease in leases:
        lease.close()


@pytest.mark.parametrize("how", ["leaves", "is killed"])
def test_everything_closes_after_the_last_client(world: World, quick: str, how: str) -> None:
    child, engine, daemon = world.client(quick, LLM_DAEMON_TTL="0.3", LLM_DAEMON_LINGER="0.2")
    assert {engine, daemon} <= set(world.processes())
    if how == "leaves":
        assert child.stdin is not None
        child.stdin.close()
    else:
        child.kill()
    child.wait()
    assert world.wait_empty(within=30) >= 0.4  # not before ttl and linger are over


def test_a_killed_daemon_takes_its_engine_along_and_open_leases_go_on(world: World, quick: str) -> None:
    lease = attach(quick)
    before, engine = lease.daemon_pid, lease.pid
    os.kill(before, signal.SIGKILL)
    assert wait_gone(engine, SOON), "the engine outlived its daemon"
    other = attach(quick)
    assert other.daemon_pid != before
    assert lease.daemon_pid == other.daemon_pid  # attached again by being used
    assert lease.pid == other.pid != engine
    lease.close()
    other.close()


def test_an_openai_client_survives_the_death_of_daemon_and_engine(world: World, quick: str) -> None:
    with attach(quick) as llm, llm.openai() as client:

        def ask() -> str | None:
            answer = client.chat.completions.create(model=llm.model, messages=[{"role": "user", "content": "hi"}])
            return answer.choices[0].message.content

        assert ask() == "Hello world"
        os.kill(llm.daemon_pid, signal.SIGKILL)
        assert wait_gone(llm._facts["pid"], SOON)
        assert ask() == "Hello world"
        engine = llm.pid
        os.kill(engine, signal.SIGKILL)
        assert wait_gone(engine, SOON)
        assert ask() == "Hello world"


def test_async_clients(world: World, quick: str) -> None:
    async def main() -> None:
        async with llm_daemon.aio.attach(quick) as llm, llm.openai() as client:
            stream = await client.chat.completions.create(
                model=llm.model, messages=[{"role": "user", "content": "hi"}], stream=True
            )
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
            assert text == "Hello world"
            os.kill(llm.daemon_pid, signal.SIGKILL)
            await llm.refresh()
            answer = await client.completions.create(model=llm.model, prompt="hi")
            assert answer.choices[0].text == "Hello world"
        one, two = await asyncio.gather(llm_daemon.aio.attach(quick), llm_daemon.aio.attach(quick))
        assert one.pid == two.pid
        await one.close()
        await two.close()

    asyncio.run(main())


def test_cancelling_an_attach_during_a_load_leaves_nothing_behind(world: World, fake_model: Callable[..., str]) -> None:
    world.config.write_text(world.config.read_text().replace("ttl = 30", "ttl = 0.1"))
    model = fake_model(never_ready=True)
    loading = threading.Event()

    async def main() -> None:
        waiting = asyncio.ensure_future(awaited())
        await asyncio.to_thread(loading.wait, 20)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    async def awaited() -> None:
        await llm_daemon.aio.attach(model, on_progress=lambda p: loading.set() if p.phase == "load" else None)

    asyncio.run(main())
    world.wait_empty(within=30)


def test_a_timeout_is_an_error_that_says_what_to_do(world: World, fake_model: Callable[..., str]) -> None:
    talk = sync.connect()  # how long a daemon takes to begin is not the subject
    assert talk is not None
    with pytest.raises(TimeoutError) as caught:
        attach(fake_model(never_ready=True), timeout=2.0)
    assert "not ready after 2 s" in str(caught.value)
    talk.close()


def test_a_forked_child_neither_keeps_nor_ends_the_parents_lease(world: World, quick: str) -> None:
    code = (
        "import os, sys, warnings; from llm_daemon import attach\n"
        f"llm = attach({quick!r})\n"
        "pid = os.fork()\n"
        "if not pid:\n"
        "    os.write(1, b'child %d\\n' % llm.pid)\n"  # in one piece: both write at one time
        "    sys.stdin.readline(); os._exit(0)\n"
        "llm.close(); os.write(1, b'parent\\n'); os.waitpid(pid, 0)\n"
    )
    child = world.python(code)
    assert child.stdout is not None and child.stdin is not None
    assert {child.stdout.readline().split()[0], child.stdout.readline().split()[0]} == {"child", "parent"}
    assert len(status()["leases"]) == 1
    child.stdin.write("\n")
    assert child.wait(10) == 0


def test_an_engine_that_dies_while_idle_is_started_again_by_the_next_request(world: World, quick: str) -> None:
    with attach(quick) as llm:
        os.kill(llm.pid, signal.SIGKILL)
        assert wait_gone(llm.pid, SOON)
        url = llm.base_url.removeprefix("http://").removesuffix("/v1")
        connection = HTTPConnection(url, timeout=20)
        body = json.dumps({"model": llm.model, "messages": [{"role": "user", "content": "hi"}]})
        headers = {"content-type": "application/json", "authorization": f"Bearer {llm.api_key}"}
        connection.request("POST", "/v1/chat/completions", body, headers)
        answer = connection.getresponse()
        assert (answer.status, b"Hello world" in answer.read()) == (200, True)
        connection.close()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address of this test's own: the daemons and servers of other tests take no port there."""
    with reserve() as sock:
        found: str = sock.getsockname()[0]
    monkeypatch.setenv("LLM_DAEMON_HOST", found)
    return found


def test_the_default_port_taken_gives_the_next_free_one_everywhere(world: World, quick: str, host: str) -> None:
    with socket.create_server((host, 28282)), attach(quick) as llm:
        port = int(llm.base_url.split(":")[2].split("/")[0])
        assert port != 28282
        daemon = status()["daemon"]
        assert daemon["port"] == port
        assert "28282 is taken by" in str(daemon["port_note"])
        log = (world.state / "logs" / "daemon.log").read_text()
        assert f"{host}:{port} (port 28282 is taken by" in log


def test_an_explicit_port_that_is_taken_is_one_clear_error_every_time(
    world: World, quick: str, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server((host, 0)) as holder:
        port = holder.getsockname()[1]
        monkeypatch.setenv("LLM_DAEMON_PORT", str(port))
        seen = set()
        for _ in range(25):
            with pytest.raises(errors.Unavailable) as caught:
                attach(quick)
            seen.add((caught.value.code, str(caught.value)))
        ((code, message),) = seen
        assert code == "port_taken"
        assert str(port) in message and f"pid {os.getpid()}" in message
        done = world.llm_daemon("load", quick)
        assert (done.returncode, message in done.stderr, "Traceback" in done.stderr) == (75, True, False)
    world.wait_empty(within=30)
    with attach(quick) as llm:
        assert f":{port}/" in llm.base_url


@pytest.mark.parametrize(
    ("spec", "code", "word"),
    [
        ("smollm2-135n", "unknown_model", "smollm2-135m"),
        ("/nonexistent/m.gguf", None, "/nonexistent/m.gguf"),
        ("smollm2-135m@Q9", "unknown_quant", "Q4_1"),
        ("smollm2-135m?context=0", "bad_spec", "context"),
        ("smollm2-135m?engine=nope", "unknown_engine", "nope"),
        ("", "bad_spec", "model"),
    ],
)
def test_a_bad_wish_is_the_callers_move(world: World, spec: str, code: str | None, word: str) -> None:
    with pytest.raises(errors.UsageError) as caught:
        attach(spec)
    assert code in (None, caught.value.code)
    assert word in caught.value.full()
    assert "\n" not in str(caught.value)


def test_bad_model_files_are_refused_in_one_line_and_leave_nothing(world: World) -> None:
    for name, data in (("text.gguf", b"hello"), ("empty.gguf", b""), ("cut.gguf", b"GGUF\3\0\0\0\1\0\0\0\0\0\0\0\1")):
        path = world.base / name
        path.write_bytes(data)
        with pytest.raises(errors.UsageError) as caught:
            attach(path)
        assert caught.value.code == "bad_model"
        assert name in str(caught.value)
    assert all("boot.py" in command for command in world.processes().values())


def test_an_engine_that_dies_while_loading_shows_its_last_words(world: World, fake_model: Callable[..., str]) -> None:
    with pytest.raises(errors.EngineError) as caught:
        attach(fake_model(crash_while_loading="ggml_abort: out of luck", exit_code=3))
    assert "out of luck" in caught.value.full()
    assert os.path.exists(str(caught.value.data["log"]))


def test_a_bad_config_names_file_and_line_and_starts_nothing(world: World, quick: str) -> None:
    world.config.write_text("ttl = 5\nlingr = 3\n")
    with pytest.raises(errors.UsageError, match="line 2: unknown setting 'lingr'"):
        attach(quick)
    world.wait_empty(within=30)


def test_a_runtime_folder_of_somebody_else_is_refused(world: World, quick: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to make a folder of another user")
    world.runtime.mkdir()
    os.chown(world.runtime, 12345, 12345)
    with pytest.raises(errors.UsageError, match="belongs to user id 12345"):
        attach(quick)
    os.chown(world.runtime, 0, 0)


def test_a_runtime_folder_deleted_under_a_daemon_makes_a_new_one(world: World, quick: str) -> None:
    old = sync.connect()  # without a model: while an engine starts, a daemon looks at its folder and lets all go
    assert old is not None
    before = old.welcome["pid"]
    shutil.rmtree(world.runtime)
    with attach(quick) as new:
        assert new.daemon_pid != before
        assert old.is_open()  # its lease still holds
    os.kill(before, signal.SIGKILL)
    old.close()


def test_a_daemon_that_cannot_finish_its_start_is_not_started_for_ever(
    world: World, quick: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = world.base / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("LLM_DAEMON_PYTHON", str(broken))
    began = time.monotonic()
    with pytest.raises(errors.Bug, match="status 3"):
        attach(quick)
    assert time.monotonic() - began < 60
    monkeypatch.setenv("LLM_DAEMON_PYTHON", "/nonexistent/python")
    with pytest.raises(errors.UsageError, match="/nonexistent/python"):
        attach(quick)


def test_models_are_unloaded_by_ttl_and_come_back_for_a_lease(world: World, quick: str) -> None:
    with attach(quick, keep_alive=0.2) as llm:
        first = llm.pid
        assert wait_gone(first, 30), "idle, and still loaded"
        with attach(quick) as again:
            assert again.pid != first
            assert again.daemon_pid == llm.daemon_pid


@pytest.mark.real
def test_the_starter_model_answers_and_is_loaded_once(world: World, smollm2: str) -> None:
    model = smollm2
    with attach(model) as llm, attach(model) as other, llm.openai() as client:
        assert llm.pid == other.pid
        whole = client.completions.create(model=llm.model, prompt=PROMPT, max_tokens=6, temperature=0)
        stream = client.completions.create(model=llm.model, prompt=PROMPT, max_tokens=6, temperature=0, stream=True)
        text = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
        assert "Paris" in text
        assert whole.choices[0].text == text
        (instance,) = status()["instances"]
        assert instance["memory_bytes"] > 50e6
