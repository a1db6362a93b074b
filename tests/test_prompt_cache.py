"""A long conversation goes on after its model was unloaded: the engine does not read all of it again."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from llm_daemon.client import sync
from llm_daemon.testing.world import World

# Read now: the session takes LLM_DAEMON_* variables away.
LLAMA_SERVER = os.environ.get("LLM_DAEMON_TEST_LLAMA_SERVER")
pytestmark = pytest.mark.real
MODEL = "smollm2-135m?context=1024&parallel=1"
WORDS = "river stone light house green apple window cloud paper train garden winter music bread mountain".split()


class Talk:
    """A conversation over HTTP, and a daemon that stays while nobody holds its model."""

    def __init__(self) -> None:
        connection = sync.connect()
        assert connection is not None
        self.connection = connection
        headers = {"authorization": f"Bearer {connection.welcome['api_key']}"}
        base = connection.welcome["base_url"].removesuffix("/v1")
        self.http = httpx.Client(base_url=base, headers=headers, timeout=60)
        chance = random.Random(3)
        self.messages = [{"role": "user", "content": " ".join(chance.choices(WORDS, k=150))}]

    def turn(self, model: str = MODEL) -> tuple[int, int, str]:
        """The next answer: (tokens it had still to read, tokens it knew already, what it said)."""
        body = {"model": model, "messages": self.messages, "max_tokens": 4, "temperature": 0, "seed": 1}
        answer = self.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        text: str = found["choices"][0]["message"]["content"]
        self.messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "And then?"}]
        return found["timings"]["prompt_n"], found["timings"]["cache_n"], text

    def unload(self) -> None:
        answer = self.http.post("/api/unload", json={"model": MODEL})
        assert answer.status_code == 200, answer.text
        while any(it["state"] in ("ready", "draining", "stopping") for it in self.status()):
            self.connection.ask("CALL", 30, method="status", params={})

    def status(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.http.get("/api/status").json()["instances"]
        return found

    def close(self) -> None:
        self.http.close()
        self.connection.close()


@pytest.fixture(params=["xllamacpp", "llama-server"])
def talk(world: World, request: pytest.FixtureRequest) -> Iterator[Talk]:
    path = f'[engines.llama-server]\npath = "{LLAMA_SERVER}"\n' if LLAMA_SERVER else ""
    if request.param == "llama-server" and not LLAMA_SERVER:
        pytest.skip("no llama-server is built (make llama-server)")
    world.config.write_text(f'default_engine = "{request.param}"\n' + world.config.read_text() + path)
    talk = Talk()
    yield talk
    talk.close()


def kept(world: World) -> list[Path]:
    return sorted((world.state / "prompts").glob("*/slot-*.bin"))


def test_a_conversation_survives_the_unloading_of_its_model(talk: Talk, world: World) -> None:
    read, known, _ = talk.turn()
    assert read > 150 and known == 0
    talk.unload()
    (file,) = kept(world)
    assert file.stat().st_mode & 0o777 == 0o600 and file.stat().st_size > 10**6
    after, known, _ = talk.turn()
    assert known >= read and after < 40
    again, known, _ = talk.turn()
    assert known >= read and again < 40  # as ever while it stays loaded
    assert kept(world) == []  # taken: it is written again at the next unload


def test_other_options_read_it_anew(talk: Talk, world: World) -> None:
    read, *_ = talk.turn()
    talk.unload()
    assert talk.turn(MODEL.replace("1024", "1023"))[1] == 0
    assert len(kept(world)) == 1  # still there for the one it belongs to
    assert talk.turn()[1] >= read


@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_a_damaged_file_never_breaks_a_load(talk: Talk, world: World, damage: str) -> None:
    talk.turn()
    talk.unload()
    (file,) = kept(world)
    if damage == "cut":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.write_bytes(os.urandom(file.stat().st_size))
    assert talk.turn()[1] == 0
    assert "broken" in (world.state / "logs" / "daemon.log").read_text()


def test_it_can_be_switched_off(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_DAEMON_PROMPT_CACHE_LIMIT", "0")
    talk = Talk()
    try:
        talk.turn()
        talk.unload()
        assert talk.turn()[1] == 0 and not (world.state / "prompts").exists()
    finally:
        talk.close()
