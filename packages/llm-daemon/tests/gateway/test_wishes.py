"""Our own request headers: what the desk is told, and what is refused before it hears of anything."""

from __future__ import annotations

from typing import Any

import pytest

from .fakes import CHAT


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, {"lane": "regular", "supersede": None, "deadline": None, "keep_alive": None}),
        ({"x_llm_lane": "interactive"}, {"lane": "interactive"}),
        ({"x_llm_lane": "Regular"}, {"lane": "regular"}),
        ({"x_llm_supersede": "editor-1"}, {"supersede": "editor-1"}),
        ({"x_llm_supersede": "x" * 200}, {"supersede": "x" * 200}),
        ({"x_llm_deadline_ms": "1500"}, {"deadline": 1.5}),
        ({"x_llm_deadline_ms": "0"}, {"deadline": 0.0}),
        ({"x_llm_deadline_ms": "0.5"}, {"deadline": 0.0005}),
        ({"x_llm_keep_alive": "60"}, {"keep_alive": 60.0}),
        ({"x_llm_keep_alive": "0"}, {"keep_alive": 0.0}),
        ({"X_LLM_LANE": "interactive", "x_llm_keep_alive": "1e3"}, {"lane": "interactive", "keep_alive": 1000.0}),
        ({"x_llm_unknown": "x"}, {"lane": "regular"}),
    ],
)
def test_what_the_desk_is_told(run: Any, world: Any, headers: dict[str, str], expected: dict[str, Any]) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            assert (await client.ask(**headers)).status == 200
            ask = w.desk.log.all("open")[0]
            assert {name: getattr(ask, name) for name in expected} == expected
            assert not any(name.startswith("x-llm") for name in w.engine.calls[0].headers)

    run(main())


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("X-LLM-Lane", ["", "fast", "aside", "interactive, regular", "\xef"]),
        ("X-LLM-Supersede", ["", "x" * 201]),
        ("X-LLM-Deadline-Ms", ["", "soon", "-1", "nan", "inf", "1e10", "1,5", "0x10", "1_0"]),
        ("X-LLM-Keep-Alive", ["", "-1", "forever", "NaN", "-inf", "10 s"]),
    ],
)
def test_what_is_refused(run: Any, world: Any, name: str, values: list[str]) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            for path in (CHAT, "/tokenize", "/upstream/m/x"):
                for value in values:
                    answer = await client.ask(path=path, **{name: value})
                    assert (answer.status, answer.error["code"]) == (400, "bad_header"), value
                    assert name in answer.error["message"] and answer.error["type"] == "invalid_request_error"
            assert w.desk.log.items == [] and w.gateway.held == 0
            assert (await client.ask()).status == 200  # the connection goes on

    run(main())


def test_who_looks_on_stays_aside(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            for method, path in (("POST", "/tokenize"), ("GET", "/upstream/m/props")):
                assert (await client.ask(method, path, x_llm_lane="interactive", x_llm_keep_alive="5")).status == 200
                ask = w.desk.log.all("open")[-1]
                assert (ask.lane, ask.keep_alive) == ("aside", 5.0)

    run(main())
