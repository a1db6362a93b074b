"""The gateway of a real daemon, over the wire: who waits, who ends, and what is told of it.  The engine is scripted."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2 as httpx
import openai
import pytest

from llm_daemon import attach
from llm_daemon.client.sync import Lease
from llm_daemon.daemon.address import reserve
from llm_daemon.testing.world import World, wait_gone

CHAT = "/v1/chat/completions"


class Line:
    """Clients of one daemon; `pool` is for those that wait."""

    def __init__(self, lease: Lease, pool: ThreadPoolExecutor) -> None:
        self.lease, self.pool = lease, pool
        headers = {"authorization": f"Bearer {lease.api_key}"}
        self.http = httpx.Client(base_url=lease.base_url.removesuffix("/v1"), headers=headers, timeout=30)

    def body(self, **more: Any) -> dict[str, Any]:
        return {"model": self.lease.model, "messages": [{"role": "user", "content": "hi"}], **more}

    def ask(self, path: str = CHAT, body: dict[str, Any] | None = None, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.http.post(path, json=body or self.body(), headers=named)

    def later(self, path: str = CHAT, body: dict[str, Any] | None = None, **headers: str) -> Future[httpx.Response]:
        return self.pool.submit(lambda: self.ask(path, body, **headers))

    def tickets(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.http.get("/api/tickets").json()["tickets"]
        return found

    def until(self, *states: str) -> list[dict[str, Any]]:
        """Waits for tickets in these states, in the order of their arrival."""
        end = time.monotonic() + 30
        while True:
            found = self.tickets()
            if [it["state"] for it in found] == list(states):
                return found
            assert time.monotonic() < end, found
            time.sleep(0.01)

    def cancel(self, ticket: str) -> httpx.Response:
        return self.http.post(f"/api/cancel/{ticket}", json={})

    def ends(self) -> dict[str, float]:
        """How many requests had which end, by `/metrics`."""
        text = self.http.get("/metrics").text
        found: dict[str, float] = {}
        for end, count in re.findall(r'^llm_daemon_requests_total\{.*end="(\w+)".*\} ([\d.]+)$', text, re.MULTILINE):
            found[end] = found.get(end, 0) + float(count)
        return found


@pytest.fixture
def line(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Line]]:
    """Makes clients of a daemon whose engines have one slot, with the model that they hold."""
    monkeypatch.setenv("LLM_DAEMON_PARALLEL", "1")
    made: list[Line] = []
    with ThreadPoolExecutor(8) as pool:

        def make(model: str) -> Line:
            made.append(Line(attach(model), pool))
            return made[-1]

        yield make
        for it in made:
            for ticket in it.tickets():
                it.cancel(ticket["ticket"])
            it.http.close()
            it.lease.close()


@pytest.fixture
def slow(fake_model: Callable[..., str]) -> str:
    """A model that needs a hundred seconds for an answer, unless it is asked for less."""
    return fake_model(tokens=2000, token_ms=50)


def code(answer: httpx.Response) -> tuple[int, str, str | None]:
    return answer.status_code, answer.json()["error"]["code"], answer.headers.get("x-should-retry")


def test_a_newer_request_of_the_same_key_ends_the_older_one(line: Callable[[str], Line], slow: str) -> None:
    it = line(slow)
    first = it.later(x_llm_supersede="editor")
    it.until("running")
    second = it.later(CHAT, it.body(max_tokens=1), x_llm_supersede="editor")  # ends a running one
    assert code(first.result()) == (409, "superseded", "false")
    assert second.result().status_code == 200
    blocker = it.later()
    (running,) = it.until("running")
    waits = it.later(x_llm_supersede="editor")
    it.until("running", "waiting")
    newest = it.later(CHAT, it.body(max_tokens=1), x_llm_supersede="editor")  # ends a waiting one
    assert code(waits.result()) == (409, "superseded", "false")
    other = it.later(CHAT, it.body(max_tokens=1), x_llm_supersede="another")  # and nobody else
    it.until("running", "waiting", "waiting")
    assert it.cancel(running["ticket"]).json() == {"cancelled": running["ticket"]}
    assert code(blocker.result())[1:] == ("cancelled", "false")
    assert [newest.result().status_code, other.result().status_code] == [200, 200]
    assert it.ends() == {"superseded": 2, "cancelled": 1, "served": 3}


def test_who_is_cut_off_by_hand_is_told_so(world: World, line: Callable[[str], Line], slow: str) -> None:
    it = line(slow)
    model = it.lease.model
    whole = it.later()
    it.until("running")
    assert world.llm_daemon("stop", model, "--force").returncode == 0
    assert code(whole.result()) == (503, "stopped", None)
    assert whole.result().json()["error"]["message"] == f"{model} was stopped by hand"
    with it.http.stream("POST", CHAT, json=it.body(stream=True)) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: {")
        assert world.llm_daemon("stop", model, "--force").returncode == 0
        events = [json.loads(text[6:]) for text in lines if text.startswith("data: {")]
    assert events[-1]["error"]["code"] == "stopped"


def test_openai_clients_do_not_ask_again_what_was_superseded(line: Callable[[str], Line], slow: str) -> None:
    it = line(slow)

    def whole() -> object:
        with it.lease.openai() as llm:
            assert llm.max_retries == openai.DEFAULT_MAX_RETRIES > 0
            return llm.with_options(default_headers={"X-LLM-Supersede": "k"}).chat.completions.create(**it.body())

    def streamed() -> list[Any]:
        with it.lease.openai() as llm:
            return list(llm.chat.completions.create(**it.body(stream=True), extra_headers={"X-LLM-Supersede": "k"}))

    first = it.pool.submit(whole)
    it.until("running")
    second = it.pool.submit(streamed)
    with pytest.raises(openai.ConflictError, match="newer request") as caught:
        first.result()
    assert caught.value.code == "superseded"
    it.until("running")
    assert it.ask(CHAT, it.body(max_tokens=1), x_llm_supersede="k").status_code == 200
    with pytest.raises(openai.APIError, match="newer request"):  # some of it was told: an event at its end
        second.result()
    assert it.ends() == {"superseded": 2, "served": 1}


def test_deadlines(line: Callable[[str], Line], slow: str) -> None:
    it = line(slow)
    blocker = it.later()
    (running,) = it.until("running")
    began = time.monotonic()
    assert code(it.ask(x_llm_deadline_ms="150")) == (504, "expired", "false")
    assert time.monotonic() - began < 20  # long before there was a free slot
    assert code(it.ask(x_llm_deadline_ms="0")) == (504, "expired", "false")
    patient = it.later(CHAT, it.body(max_tokens=1), x_llm_deadline_ms="20000")
    it.until("running", "waiting")
    it.cancel(running["ticket"])
    blocker.result()
    assert patient.result().status_code == 200  # a deadline is for the start
    assert it.ends() == {"expired": 2, "cancelled": 1, "served": 1}


def test_cancelled_by_id(line: Callable[[str], Line], slow: str) -> None:
    it = line(slow)
    with it.http.stream("POST", CHAT, json=it.body(stream=True)) as answer:
        text = answer.iter_text()
        assert next(text).startswith("data: ")
        waits = it.later()
        running, waiting = it.until("running", "waiting")
        assert running["ticket"] == answer.headers["x-llm-ticket"]
        assert it.cancel(waiting["ticket"]).status_code == 200
        assert code(waits.result())[1:] == ("cancelled", "false")
        assert it.cancel(running["ticket"]).status_code == 200
        assert '"code":"cancelled"' in "".join(text)  # an event of its own, and then the end
    it.until()
    for ticket in (running["ticket"], "nobody"):
        gone = it.cancel(ticket)
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "unknown_ticket")
    assert it.http.get(f"/api/cancel/{ticket}").status_code == 405  # no state is changed by GET
    assert it.ask(CHAT, it.body(max_tokens=1)).status_code == 200


def test_one_clients_hang_up_is_no_others_end(world: World, fake_model: Callable[..., str]) -> None:
    with attach(fake_model(tokens=30, token_ms=20)) as lease, lease.openai() as llm:
        body: dict[str, Any] = {"model": lease.model, "messages": [{"role": "user", "content": "hi"}], "stream": True}
        victim = llm.chat.completions.create(**body)
        pieces = [next(iter(victim))]
        gone = llm.chat.completions.create(**body)
        next(iter(gone))
        gone.close()
        pieces += list(victim)
        assert "".join(c.choices[0].delta.content or "" for c in pieces) == "".join(f" t{i}" for i in range(30))


def test_a_full_queue_sheds(line: Callable[[str], Line], slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_DAEMON_QUEUE_LIMIT", "1")
    it = line(slow)
    it.later()
    running = it.until("running")
    regular = it.later()
    it.until("running", "waiting")
    refused = it.ask()  # the newest of the regular lane
    assert code(refused) == (503, "queue_full", None) and int(refused.headers["retry-after"]) >= 1
    old = it.later(x_llm_lane="interactive")
    it.until("running", "waiting", "waiting")
    new = it.later(x_llm_lane="interactive")
    assert code(old.result())[:2] == (503, "queue_full")  # the oldest of the interactive one
    states = it.until("running", "waiting", "waiting")
    assert [(one["lane"], one["position"]) for one in states[1:]] == [("regular", 1), ("interactive", 0)]
    for one in (*running, *states):
        it.cancel(one["ticket"])
    assert {regular.result().status_code, new.result().status_code} <= {409, 499, 503}
    assert it.ends()["shed"] == 2


def instances(it: Line) -> dict[str, str]:
    return {one["model"]: one["state"] for one in it.http.get("/api/status").json()["instances"]}


def until_state(it: Line, model: str, *states: str) -> None:
    end = time.monotonic() + 30
    while instances(it).get(model, "absent") not in states:
        assert time.monotonic() < end, instances(it)
        time.sleep(0.02)


def test_keep_alive_by_header(line: Callable[[str], Line], fake_model: Callable[..., str]) -> None:
    it, brief, lasting = line(fake_model()), fake_model(tokens=["a"]), fake_model(tokens=["b"])
    assert it.ask(CHAT, it.body() | {"model": lasting}).status_code == 200
    assert it.ask(CHAT, it.body() | {"model": brief}, x_llm_keep_alive="0.1").status_code == 200
    until_state(it, brief, "absent", "stopping")
    assert instances(it)[lasting] == "ready"  # for the default of its config
    assert it.ask(CHAT, it.body() | {"model": brief}).status_code == 200  # and comes back when asked


def test_a_load_that_nobody_waits_for_is_abandoned(line: Callable[[str], Line], fake_model: Callable[..., str]) -> None:
    it, endless = line(fake_model()), fake_model(never_ready=True)
    head = f"Host: localhost\r\nAuthorization: Bearer {it.lease.api_key}\r\nContent-Type: application/json"
    body = json.dumps(it.body() | {"model": endless}).encode()
    with socket.create_connection(("127.0.0.1", it.http.base_url.port)) as client:
        client.sendall(f"POST {CHAT} HTTP/1.1\r\n{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        until_state(it, endless, "starting")
        left = time.monotonic()
    until_state(it, endless, "absent", "stopping")
    assert time.monotonic() - left > 0.5  # it goes on for a moment: who asks again finds it under way
    assert it.ask().status_code == 200


def test_where_the_time_went(world: World, line: Callable[[str], Line], fake_model: Callable[..., str]) -> None:
    it, loads = line(fake_model()), fake_model(load_seconds=0.4, tokens=["x"], first_token_ms=100)
    began = time.monotonic()
    cold = it.ask(CHAT, it.body() | {"model": loads})
    took = (time.monotonic() - began) * 1e3
    warm = it.ask(CHAT, it.body() | {"model": loads})

    def times(answer: httpx.Response) -> dict[str, float]:
        return {name: float(ms) for name, ms in re.findall(r"(\w+);dur=([\d.]+)", answer.headers["server-timing"])}

    assert times(cold)["load"] >= 400 and times(cold)["engine"] >= 100
    assert sum(times(cold).values()) <= took  # nothing counts twice
    assert times(warm)["load"] == 0 and times(warm)["engine"] >= 100
    assert cold.headers["x-llm-instance"] == warm.headers["x-llm-instance"]
    told = it.http.get(f"/api/explain/{cold.headers['x-llm-ticket']}").json()["ticket"]
    assert (told["model"], told["end"], told["via"], told["status"]) == (loads, "served", "tcp", 200)
    assert abs(told["load_s"] * 1e3 - times(cold)["load"]) < 50
    done = world.llm_daemon("explain", warm.headers["x-llm-ticket"])
    assert done.returncode == 0 and warm.headers["x-llm-ticket"] in done.stdout
    assert it.ends() == {"served": 2}


def test_the_engine_itself_through_upstream(line: Callable[[str], Line], fake_model: Callable[..., str]) -> None:
    it, other = line(fake_model()), fake_model(tokens=["other"])
    before = instances(it)
    for path in ("/health", "/v1/models", "/metrics", "/api/status", "/api/tickets", "/ui/"):
        assert it.http.get(path).status_code == 200
    assert instances(it) == before  # who looks wakes nobody
    page = it.http.get(f"/upstream/{quote(other, safe='')}/")
    assert (page.text, page.headers["content-type"]) == ("<h1>fake engine</h1>", "text/html")
    assert it.http.get(f"/upstream/{quote(other, safe='')}/props?x=1").json()["scenario"] == {"tokens": ["other"]}
    answer = it.ask(f"/upstream/{quote(other, safe='')}{CHAT}", it.body())
    assert answer.json()["choices"][0]["message"]["content"] == "other"  # the path decides, not the body
    missing = it.http.get(f"/upstream/{quote(other, safe='')}/nothing")
    assert (missing.status_code, missing.json()["error"]["message"]) == (404, "File Not Found")  # the engine's own word
    unknown = it.http.get("/upstream/nobody-knows-it/")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_model")
    refused = it.ask(f"/upstream/{quote(other, safe='')}/completion", {"prompt": "x", "n_discard": -1})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "refused_parameter")


# -- an engine's death


@pytest.mark.parametrize("assembled", [False, True])
def test_before_the_first_byte_it_is_run_again(
    line: Callable[[str], Line], fake_model: Callable[..., str], tmp_path: Path, assembled: bool
) -> None:
    """A whole answer counts as unsent, however many tokens the engine had said."""
    tokens, stuck = [f"w{n} " for n in range(20)], tmp_path / "stuck"
    late = "nonstream" if assembled else False
    it = line(fake_model(tokens=tokens, stuck_after_tokens=7, stuck_once=str(stuck), ignores_disconnect=late))
    engine = it.lease.pid
    asked = it.later()
    end = time.monotonic() + 30
    while not stuck.exists():  # then some tokens were said
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(engine, signal.SIGKILL)
    assert wait_gone(engine, 10)
    answer = asked.result()
    assert (answer.status_code, answer.headers["x-llm-replayed"]) == (200, "1")
    assert answer.json()["choices"][0]["message"]["content"] == "".join(tokens)
    assert it.ends() == {"served": 1}


def test_and_no_third_time(line: Callable[[str], Line], fake_model: Callable[..., str]) -> None:
    it = line(fake_model(tokens=4, crash_after_tokens=2, ignores_disconnect="nonstream"))
    answer = it.ask()
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_gone")
    assert sum(it.ends().values()) == 1


def by_openai(it: Line) -> list[str]:
    seen: list[str] = []
    with it.lease.openai() as llm, pytest.raises(openai.APIError, match="did not answer in full") as caught:
        for chunk in llm.chat.completions.create(**it.body(stream=True)):
            seen.append(chunk.choices[0].delta.content or "")
    assert caught.value.code == "engine_gone"
    return seen


def by_openai_completions(it: Line) -> list[str]:
    seen: list[str] = []
    with it.lease.openai() as llm, pytest.raises(openai.APIError, match="did not answer in full"):
        for chunk in llm.completions.create(model=it.lease.model, prompt="x", stream=True):
            seen.append(chunk.choices[0].text)
    return seen


def by_async_openai(it: Line) -> list[str]:
    async def main() -> list[str]:
        seen: list[str] = []
        async with openai.AsyncOpenAI(base_url=it.lease.base_url, api_key=it.lease.api_key) as llm:
            with pytest.raises(openai.APIError, match="did not answer in full"):
                async for chunk in await llm.chat.completions.create(**it.body(stream=True)):
                    seen.append(chunk.choices[0].delta.content or "")
        return seen

    return asyncio.run(main())


def by_lines(it: Line) -> list[str]:
    """As any reader of event streams sees it."""
    with it.http.stream("POST", CHAT, json=it.body(stream=True)) as answer:
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert (answer.status_code, events[-1]["error"]["code"]) == (200, "engine_gone")
    return [event["choices"][0]["delta"].get("content", "") for event in events[:-1]]


@pytest.mark.parametrize("client", [by_openai, by_openai_completions, by_async_openai, by_lines])
def test_in_mid_stream_every_client_reports_an_error(
    line: Callable[[str], Line], fake_model: Callable[..., str], client: Callable[[Line], list[str]]
) -> None:
    it = line(fake_model(tokens=["a", "b", "c", "d"], token_ms=30, crash_after_tokens=2))
    assert client(it) == ["a", "b"]
    assert it.ends() == {"failed": 1}


def test_the_history_of_all_this_is_kept(world: World, line: Callable[[str], Line], quick: str) -> None:
    it = line(quick)
    ticket = it.ask().headers["x-llm-ticket"]
    told = [row["ticket"] for row in it.http.get("/api/history").json()["tickets"]]
    assert told == [ticket]
    assert not any(b"content" in Path(file).read_bytes() for file in world.state.glob("history.sqlite*"))  # no prompt text


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
def test_other_machines_come_in_by_tls_alone(
    world: World, line: Callable[[str], Line], quick: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=x -addext"
    with reserve() as sock:
        host, port = sock.getsockname()  # of its own: nobody else asks for that port there
    extension = [f"subjectAltName=IP:{host}", "-keyout", "tls.key", "-out", "tls.crt"]
    subprocess.run([*command.split(), *extension], cwd=tmp_path, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    (tmp_path / "token").write_text("remote-" + "x" * 30)
    for name in ("token", "tls.key"):
        (tmp_path / name).chmod(0o600)
    given = {"host": host, "port": port, "cert": tmp_path / "tls.crt", "key": tmp_path / "tls.key"}
    for key, value in {**given, "token_file": tmp_path / "token"}.items():
        monkeypatch.setenv(f"LLM_DAEMON_TLS_{key.upper()}", str(value))
    it = line(quick)
    with httpx.Client(base_url=f"https://{host}:{port}", verify=ssl.create_default_context(cafile=tmp_path / "tls.crt")) as far:
        for key, status in ((it.lease.api_key, 401), ("remote-" + "x" * 30, 200)):
            answer = far.post(CHAT, json=it.body(), headers={"authorization": f"Bearer {key}"})
            assert answer.status_code == status
    assert answer.json()["choices"][0]["message"]["content"] == "Hello world"
    assert it.http.get("/api/history").json()["tickets"][0]["via"] == "tls"
    assert f"https://{host}:{port}" in (world.state / "logs" / "daemon.log").read_text()
    (tmp_path / "token").chmod(0o644)
    refused = world.llm_daemon("load", quick, LLM_DAEMON_RUNTIME_DIR=str(world.base / "other"))
    assert refused.returncode == 2 and "can be read by others" in refused.stderr
