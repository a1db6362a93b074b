"""The reference itself: it sends what its script says, when it says so, and owns up to what it sent."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from llm_daemon_bench.testing.script import Script, Truth, made, plan
from llm_daemon_bench.testing.scripted import ScriptedServer

CHAT = "/v1/chat/completions"
SCRIPTS = {
    "plain": Script(("a", " b", " c"), prefill_ms=20, token_ms=10),
    "wide": Script((" 한", "국"), cut=True, token_ms=10),
    "torn": Script(("a", " b"), end="torn"),
    "busy": Script(status=503, prefill_ms=0),
    "long": Script(("a",) * 1000, token_ms=10),
    "asked": Script(None, prefill_ms=1, token_ms=0.1),
}


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(SCRIPTS) as server:
        yield server


def ask(server: ScriptedServer, model: str, path: str = CHAT, **more: Any) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request("POST", path, json.dumps({"model": model, "stream": True, **more}))
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def deltas(body: bytes) -> list[str]:
    events = [json.loads(e.removeprefix("data: ")) for e in body.decode().split("\n\n") if e.startswith("data: {")]
    return [c["delta"]["content"] for e in events for c in e["choices"] if c["delta"].get("content")]


def test_what_is_sent_is_the_script(server: ScriptedServer) -> None:
    status, body = ask(server, "plain")
    assert (status, deltas(body)) == (200, ["a", " b", " c"])
    assert body.endswith(b"data: [DONE]\n\n")
    truth = server.truths()[-1]
    assert (truth.text, truth.tokens) == ("a b c", 3)
    assert list(truth.events()) == ["headers", "first_event", "first_token", "first_content", "last_token", "done"]


def test_no_piece_is_early_and_stamps_are_of_our_own_clock(server: ScriptedServer) -> None:
    before = time.perf_counter_ns()
    ask(server, "plain")
    after = time.perf_counter_ns()
    truth = server.truths()[-1]
    stamps = [s.at_ns for s in truth.sent]
    assert before < truth.read_ns < stamps[0] and stamps == sorted(stamps) and stamps[-1] < after
    events = truth.events()
    assert events["first_token"] - truth.read_ns >= 20e6
    assert events["last_token"] - truth.read_ns >= 40e6  # on the script's time, however late the one before was


def test_a_character_is_cut_and_whole_again(server: ScriptedServer) -> None:
    pieces = plan(SCRIPTS["wide"], CHAT, {"stream": True})
    half = next(p for p in pieces if p.kind == "half")
    with pytest.raises(UnicodeDecodeError):
        half.data.decode()
    _, body = ask(server, "wide")
    assert deltas(body) == [" 한", "국"]
    truth = server.truths()[-1]
    first = truth.events()["first_token"]
    assert first == truth.sent[2].at_ns and truth.sent[1].kind == "half"  # what came half has not come


def test_torn_and_refused(server: ScriptedServer) -> None:
    with pytest.raises(http.client.IncompleteRead):
        ask(server, "torn")
    assert "done" not in server.truths()[-1].events()
    status, body = ask(server, "busy")
    assert (status, json.loads(body)["error"]["code"]) == (503, 503)
    assert server.truths()[-1].tokens == 0


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/completion", "/infill"])
def test_each_route_gives_as_many_tokens_as_were_asked_for(server: ScriptedServer, path: str) -> None:
    wanted = {"n_predict": 17} if path in ("/completion", "/infill") else {"max_tokens": 17}
    _, body = ask(server, "asked", path, **wanted, prompt="one two three")
    assert server.truths()[-1].tokens == 17
    last = [json.loads(e.removeprefix("data: ")) for e in body.decode().split("\n\n") if e.startswith("data: {")][-1]
    assert last["timings"]["predicted_n"] == 17 and last["timings"]["prompt_n"] == 3


def test_a_client_that_hangs_up_is_noticed(server: ScriptedServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("POST", CHAT, json.dumps({"model": "long", "stream": True}))
    response = connection.getresponse()
    response.close()
    connection.close()
    assert server.truths()[-1].tokens < 900  # and asking for the truth has waited for the end


def test_lateness_does_not_add_up() -> None:
    script = Script(tuple("abcdefgh"), prefill_ms=10, token_ms=2, stall_after=4, stall_ms=100)
    assert [t.at_ms for t in made(script, 99)] == [10, 12, 14, 16, 118, 120, 122, 124]


def test_scripts_and_truths_survive_the_wire() -> None:
    script = Script(("é",), thoughts=("hm",), call=("f", "{}"), stall_after=1)
    assert Script.from_json(json.loads(json.dumps(script.to_json()))) == script
    truth = Truth.from_json({"read_ns": 5, "sent": [[7, "token", "x", "", "", 1]]})
    assert truth.events()["first_token"] == 7 and truth.reached(lambda said: said == "x") == 7
