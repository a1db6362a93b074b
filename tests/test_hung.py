"""Hung, not dead: engines that accept and say nothing, get stuck, load for ever or keep dying.  Each wait for them is bounded."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import openai
import pytest

from llm_daemon import Lease, Progress, attach, connect, errors
from llm_daemon.client import start, sync
from llm_daemon.testing.world import World, wait_gone

Model = Callable[..., str]
LATE = 30.0  # seconds, on the busiest machine
HI = [{"role": "user", "content": "hi"}]


def instance(world: World) -> dict[str, Any]:
    """What `llm-daemon ps --json` says of the newest instance."""
    *_, seen = json.loads(world.llm_daemon("ps", "--json").stdout)["instances"]
    return dict(seen)


def until(world: World, test: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    end = time.monotonic() + LATE
    while not test(seen := instance(world)):
        assert time.monotonic() < end, seen
    return seen


def post(llm: Lease, **body: Any) -> tuple[HTTPResponse, dict[str, Any]]:
    """A request whose answer is read whole; the lease is used only for its facts."""
    connection = HTTPConnection(str(llm._facts["base_url"]).removeprefix("http://").removesuffix("/v1"), timeout=LATE)
    headers = {"content-type": "application/json", "authorization": f"Bearer {llm._facts['api_key']}"}
    connection.request("POST", "/v1/chat/completions", json.dumps({"messages": HI, **body}), headers)
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer, json.loads(data)


def held() -> closing[sync.Conversation]:
    """Keeps the daemon alive without a model, so that `ps` has something to show after a failure."""
    talk = connect()
    assert talk is not None
    return closing(talk)


def nothing_survives(world: World) -> None:
    """The daemon is told to go; engines must go with it whatever state they are in."""
    world.llm_daemon("stop", "--force")
    world.wait_empty(within=LATE)


@pytest.mark.parametrize(
    ("scenario", "reason"),
    [
        ({"hang": True}, "accepted a connection but does not answer"),
        ({"never_ready": True}, "/health answers 503"),
        ({"never_ready": True, "while_loading": "refuse"}, "does not listen"),
    ],
    ids=["accepts and never answers", "loads for ever", "never listens"],
)
def test_a_load_without_progress_ends_and_says_so(world: World, fake_model: Model, scenario: dict[str, Any], reason: str) -> None:
    with held():
        with pytest.raises(errors.EngineTimeout, match=reason) as caught:
            attach(fake_model(stall=2, ignore_sigterm=True, **scenario))  # its program must have begun by then
        assert caught.value.code == "engine_timeout"
        if "while_loading" not in scenario:
            assert "listening" in str(caught.value.data["last_words"])
            assert os.path.exists(str(caught.value.data["log"]))
        seen = instance(world)
        assert (seen["state"], seen["error"]["code"], seen["pid"]) == ("failed", "engine_timeout", None)
        assert reason in world.llm_daemon("ps").stdout
    nothing_survives(world)


def test_requests_without_a_first_byte_are_put_to_the_next_process(world: World, fake_model: Model, tmp_path: Path) -> None:
    model = fake_model(
        stuck_after_tokens=0, stuck_once=str(tmp_path / "stuck"), stall=2, ignore_sigterm=True, tokens=["Hello", " world"]
    )
    with attach(model, parallel=1) as llm, ThreadPoolExecutor() as pool:
        stuck = llm.pid
        asked = [pool.submit(post, llm, model=llm.model) for _ in range(3)]  # one runs and is stuck, two wait
        for answer, body in (a.result(LATE) for a in asked):
            assert (answer.status, body["choices"][0]["message"]["content"]) == (200, "Hello world")
        assert sorted(a.result()[0].getheader("x-llm-replayed") or "" for a in asked)[-1] == "1"
        assert wait_gone(stuck, LATE)
        seen = instance(world)
        assert (seen["state"], seen["starts"], seen["error"]) == ("ready", 2, None)
        assert "hung and was ended: no sign of life for" in (world.state / "logs" / "daemon.log").read_text()
    nothing_survives(world)


def test_an_engine_that_always_hangs_is_replayed_once_and_then_backs_off(world: World, fake_model: Model) -> None:
    with attach(fake_model(stuck_after_tokens=0, stall=2, ignore_sigterm=True)) as llm:
        answer, body = post(llm, model=llm.model)
        assert (answer.status, body["error"]["code"]) == (504, "engine_hung")
        assert body["error"]["last_words"].endswith("stuck")
        assert os.path.exists(body["error"]["log"])
        assert answer.getheader("x-llm-replayed") == "1"
        seen = until(world, lambda i: i["state"] == "failed")
        assert (seen["starts"], seen["error"]["code"]) == (2, "engine_hung")
        answer, body = post(llm, model=llm.model)
        assert (answer.status, body["error"]["code"]) == (503, "engine_hung")
        assert int(answer.getheader("retry-after") or "0") >= 1
        with attach(llm._wish["model"]):  # asked for by name: at once
            assert (instance(world)["state"], instance(world)["starts"]) == ("ready", 4)
    nothing_survives(world)


def test_an_engine_that_keeps_dying_is_not_started_for_each_request(world: World, fake_model: Model) -> None:
    model = fake_model(crash_while_loading="out of luck")
    with attach(fake_model()) as other:
        for starts in (1, 2, 3, 4, 5):  # asked for by name: at once, each time
            with pytest.raises(errors.EngineError, match="out of luck") as caught:
                attach(model)
            assert "error: out of luck" in caught.value.full()
            seen = instance(world)
            assert (seen["state"], seen["starts"], seen["error"]["code"]) == ("failed", starts, "engine_start_failed")
        for _ in range(3):
            answer, body = post(other, model=model)
            assert (answer.status, body["error"]["code"]) == (503, "engine_start_failed")
            assert int(answer.getheader("retry-after") or "0") in range(1, 17)
            assert "error: out of luck" in body["error"]["last_words"]
        assert instance(world)["starts"] == 5
    nothing_survives(world)


def test_an_engine_that_falls_with_each_first_request_backs_off_too(world: World, fake_model: Model) -> None:
    with attach(fake_model(crash_after_tokens=0)) as llm:
        assert post(llm, model=llm.model)[0].status == 502
        until(world, lambda i: i["state"] == "failed")
        answer, body = post(llm, model=llm.model)
        assert (answer.status, body["error"]["code"]) == (503, "engine_died")
        assert "crashed in the middle" in body["error"]["message"]
        assert instance(world)["starts"] == 3
    nothing_survives(world)


def test_clients_that_give_up_early_do_not_hide_a_hang(world: World, fake_model: Model, tmp_path: Path) -> None:
    """Each of them waits for less than `stall`; together they see it."""
    model = fake_model(stuck_after_tokens=0, stuck_once=str(tmp_path / "stuck"), stall=4, tokens=["Hello"], silent=True)
    with attach(model) as llm, llm.openai(max_retries=0, timeout=2.5) as client:
        end, text = time.monotonic() + LATE, None
        while text is None:
            assert time.monotonic() < end
            try:
                text = client.chat.completions.create(model=llm.model, messages=HI).choices[0].message.content  # type: ignore[arg-type]
            except openai.APITimeoutError:
                continue
        assert (text, instance(world)["starts"]) == ("Hello", 2)
    nothing_survives(world)


def test_a_client_that_does_not_read_is_no_hang(world: World, fake_model: Model) -> None:
    with attach(fake_model(stall=0.6, silent=True, tokens=["x" * 50_000] * 300)) as llm:
        engine, port = llm.pid, int(llm.base_url.split(":")[2].split("/")[0])
        with socket.create_connection(("127.0.0.1", port), timeout=LATE) as client:
            body = json.dumps({"model": llm.model, "messages": HI, "stream": True})
            client.sendall(
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:{port}\r\nAuthorization: Bearer {llm.api_key}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            began = time.monotonic()
            while time.monotonic() < began + 5:
                assert instance(world)["pid"] == engine
            assert instance(world)["running"] == 1
            got = b""
            while b"data: [DONE]" not in got:
                got = got[-20:] + client.recv(1 << 20)
        assert instance(world)["pid"] == engine
    nothing_survives(world)


def test_ps_says_for_how_long_nothing_moved(world: World, fake_model: Model) -> None:
    with attach(fake_model(stuck_after_tokens=0, stall=60)) as llm, ThreadPoolExecutor() as pool:
        assert instance(world)["stalled_seconds"] is None
        asked = pool.submit(post, llm, model=llm.model)
        until(world, lambda i: (i["stalled_seconds"] or 0) >= 5)
        assert "ready, silent for " in world.llm_daemon("ps").stdout
        world.llm_daemon("stop", "--force")
        assert asked.result(LATE)[0].status == 503  # by hand, and not by a fault of the engine's


def test_an_answer_that_stops_in_its_middle_ends_in_an_error(world: World, fake_model: Model) -> None:
    model = fake_model(stuck_after_tokens=2, stall=2, ignore_sigterm=True)
    with attach(model) as llm, llm.openai(max_retries=0, timeout=LATE) as client:
        said = []
        stream = client.chat.completions.create(model=llm.model, messages=HI, stream=True)  # type: ignore[arg-type]
        with pytest.raises(openai.APIError) as caught:
            for chunk in stream:
                said.append(chunk.choices[0].delta.content)  # type: ignore[union-attr]
        assert said == ["Hello", " from"]
        assert caught.value.code == "engine_hung"
        assert "no sign of life" in caught.value.message
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["last_words"].endswith("stuck")
        seen = until(world, lambda i: i["state"] == "failed")
        assert (seen["error"]["code"], seen["pid"]) == ("engine_hung", None)
    nothing_survives(world)


def test_a_stopped_engine_is_hung(world: World, fake_model: Model) -> None:
    with attach(fake_model(stall=2)) as llm:
        os.kill(llm.pid, signal.SIGSTOP)
        answer, _ = post(llm, model=llm.model)
        assert (answer.status, answer.getheader("x-llm-replayed")) == (200, "1")
    nothing_survives(world)


@pytest.mark.parametrize(
    ("stream", "scenario"),
    [(True, {"token_ms": 400, "tokens": 8}), (False, {"first_token_ms": 3000, "token_burns_cpu": True})],
    ids=["speaks", "computes"],
)
def test_slow_is_not_hung(world: World, fake_model: Model, stream: bool, scenario: dict[str, Any]) -> None:
    with attach(fake_model(stall=2, silent=True, **scenario)) as llm, llm.openai(max_retries=0) as client:
        engine = llm.pid
        asked = client.with_raw_response.chat.completions.create(model=llm.model, messages=HI, stream=stream)  # type: ignore[arg-type]
        assert "x-llm-replayed" not in asked.headers
        if stream:
            assert len(list(asked.parse())) == 9
        assert instance(world)["pid"] == engine


def test_a_daemon_that_was_stopped_while_a_client_waits_is_woken(
    world: World, fake_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "QUIET", 0.5)
    monkeypatch.setattr(sync, "KNOCKS", 60)
    stopped: list[int] = []

    def stop(progress: Progress) -> None:
        if progress.phase == "load" and not stopped:
            stopped.append(talk.welcome["pid"])
            os.kill(stopped[0], signal.SIGSTOP)

    with held() as talk, attach(fake_model(load_seconds=0.5), on_progress=stop) as llm:
        assert stopped == [llm.daemon_pid]


def test_a_daemon_that_stays_stopped_is_an_error(world: World, quick: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "QUIET", 0.1)
    monkeypatch.setattr(start, "wake", lambda pid: None)
    with held() as talk:
        pid = talk.welcome["pid"]
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(errors.DaemonUnresponsive, match=rf"pid {pid}, stopped"):
                talk.ask("CALL", method="status")
        finally:
            os.kill(pid, signal.SIGCONT)


def test_a_daemon_that_answers_is_waited_for(world: World, fake_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "QUIET", 0.5)
    monkeypatch.setattr(sync, "KNOCKS", 3)
    with attach(fake_model(load_seconds=3, silent=True)):
        pass


def test_a_keeper_that_never_begins_is_an_error(
    world: World, fake_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_DAEMON_FAULTS", str(tmp_path / "traps"))
    (tmp_path / "traps").mkdir()
    (tmp_path / "traps" / "keeper_checked").write_text("STOP")
    model = fake_model(stall=2)
    with pytest.raises(errors.EngineTimeout, match="did not begin to run within 2 s"):
        attach(model)
    with attach(model):
        pass
    nothing_survives(world)
