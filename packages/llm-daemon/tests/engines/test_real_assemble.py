"""Answers put together from a stream against what the same engine sends without one: equal, field for field.

Only what cannot be the same twice is normalised: random ids, times of day and of work, the slot's number.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from llm_daemon.core.assemble import NOT_IN_STREAM, ask_to_stream
from llm_daemon.daemon.logs import RotatingLog
from llm_daemon.daemon.probe import wait_ready
from llm_daemon.daemon.process import EngineProcess, Exit, scrubbed_env
from llm_daemon.engines.base import Adapter, Grant, Location
from llm_daemon.errors import RemoteProtocolError
from llm_daemon.spec import Artifact, Spec, Wish
from llm_daemon.testing.running import EngineConnection

# Read now: the session takes LLM_DAEMON_* variables away.
GIVEN = os.environ.get("LLM_DAEMON_TEST_LLAMA_SERVER")
pytestmark = pytest.mark.real

Case = tuple[str, dict[str, Any]]
CHAT, TEXT, RESPONSES, MESSAGES, NATIVE = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/completion",
)

# A template of a model that thinks and calls tools; the starter model's own does neither.  Content is wrapped, so that
# the grammar of `tool_choice: required` leaves the model no way to talk first.
TEMPLATE = """\
{%- if tools %}<|im_start|>system
Tools:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' and message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}
{%- if message.role != 'assistant' %}{{ message.content or '' }}
{%- elif message.content %}<answer>{{ message.content }}</answer>{% endif %}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

HI = [{"role": "user", "content": "Say hi"}]
ONCE = "Once upon a time"
EMOJI = 'root ::= "x😀y 형"'  # each of the two takes several tokens, most of which are no whole character
THINK = 'root ::= "<think>\\nwell now\\n</think>\\n\\n<answer>surely</answer>"'
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rom"]}, "n": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "n"],
    "additionalProperties": False,
}
FUNCTIONS = [{"type": "function", "function": {"name": n, "description": "x", "parameters": SCHEMA}} for n in ("get", "get_all")]
CALL = {"messages": HI, "tools": FUNCTIONS, "tool_choice": "required", "logit_bias": [["tool", 50], ["<", 12]]}
# A converted message loses the bias, so the model is shown what to do.
ROUNDS: list[dict[str, Any]] = [
    message
    for number, city in enumerate(("Paris", "Rom", "Paris"))
    for message in (
        {"role": "user", "content": f"Weather in {city}?"},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": str(number), "name": "get", "input": {"city": city, "n": 1}}],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": str(number), "content": "sun"}]},
    )
]
USE = {
    "messages": [*ROUNDS, {"role": "user", "content": "Weather in Rom?"}],
    "tools": [{"name": "get", "description": "x", "input_schema": SCHEMA}],
    "tool_choice": {"type": "any"},
}
RESPONSE_CALL = {
    "input": "Weather?",
    "tools": [{"type": "function", "name": "get", "description": "x", "parameters": SCHEMA}],
    "tool_choice": "required",
    "logit_bias": CALL["logit_bias"],
}

EQUAL: list[Case] = [
    (CHAT, {"messages": HI}),
    (CHAT, {"messages": HI, "max_tokens": 8}),
    (CHAT, {"messages": HI, "max_tokens": 1}),
    (CHAT, {"messages": HI, "max_tokens": 0}),
    (CHAT, {"messages": [], "max_tokens": 4}),
    (CHAT, {"messages": "no list"}),
    (CHAT, {"messages": HI, "max_tokens": 4, "model": "any", "user": "u", "stream": False, "stream_options": None}),
    (CHAT, {"messages": HI, "max_tokens": 20, "stop": ["here"]}),
    (CHAT, {"messages": HI, "max_tokens": 4, "stop": "never said"}),
    (CHAT, {"messages": HI, "max_tokens": 6, "n": 2}),
    (CHAT, {"messages": HI, "max_tokens": 6, "n": 3, "temperature": 1.0}),
    (CHAT, {"messages": HI, "n": 99}),
    (CHAT, {"messages": HI, "max_tokens": 20, "response_format": {"type": "json_object"}}),
    (
        CHAT,
        {
            "messages": HI,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
            "max_tokens": 40,
        },
    ),
    (CHAT, {"messages": HI, "max_tokens": 5, "timings_per_token": True, "return_progress": True}),
    (CHAT, {"messages": HI, "max_tokens": 5, "logprobs": False, "top_logprobs": None}),
    (CHAT, {"messages": HI, "grammar": EMOJI}),
    (CHAT, {"messages": HI, "grammar": EMOJI, "max_tokens": 3}),
    (TEXT, {"prompt": ONCE, "max_tokens": 8}),
    (TEXT, {"prompt": ONCE, "max_tokens": 0}),
    (TEXT, {"prompt": "", "max_tokens": 3}),
    (TEXT, {"max_tokens": 3}),
    (TEXT, {"prompt": ONCE, "max_tokens": 4, "logprobs": 3}),
    (TEXT, {"prompt": ONCE, "max_tokens": 4, "n_probs": 2, "post_sampling_probs": True}),
    (TEXT, {"prompt": [ONCE, "Two"], "max_tokens": 4}),
    (TEXT, {"prompt": [ONCE, "Two"], "max_tokens": 3, "n": 2, "logprobs": 1}),
    (TEXT, {"prompt": [[1, 2, 3], [4, 5]], "max_tokens": 3}),
    (TEXT, {"prompt": ONCE, "max_tokens": 20, "stop": [",", "\n"]}),
    (TEXT, {"prompt": ONCE, "max_tokens": 4, "return_progress": True, "timings_per_token": True}),
    (TEXT, {"prompt": ONCE, "max_tokens": 20, "grammar": EMOJI, "logprobs": 2}),
    (RESPONSES, {"input": "Say hi"}),
    (RESPONSES, {"input": "Say hi", "max_output_tokens": 6, "instructions": "Be nice", "metadata": {"a": "b"}}),
    (RESPONSES, {"input": [{"role": "user", "content": "Say hi"}], "max_output_tokens": 6}),
    (RESPONSES, {"input": "Say hi", "max_output_tokens": 20, "stop": ["here"]}),
    (RESPONSES, {"input": "Say hi", "grammar": EMOJI}),
    (RESPONSES, {"input": "Say hi", "grammar": EMOJI, "max_output_tokens": 3}),
    (RESPONSES, {"input": 5}),
    (MESSAGES, {"messages": HI, "max_tokens": 6}),
    (MESSAGES, {"messages": HI, "max_tokens": 60, "system": "Be nice"}),
    (MESSAGES, {"messages": HI, "max_tokens": 60, "stop_sequences": ["here"]}),
    (MESSAGES, {"messages": 5, "max_tokens": 6}),
    (NATIVE, {"prompt": ONCE, "n_predict": 6}),
    (NATIVE, {"prompt": ONCE, "n_predict": 0}),
    (NATIVE, {"n_predict": 3}),
    (NATIVE, {"prompt": ONCE, "n_predict": 3, "grammar": "no grammar"}),
    (NATIVE, {"prompt": ONCE, "n_predict": 4, "n_probs": 2}),
    (NATIVE, {"prompt": ONCE, "n_predict": 4, "n_probs": 2, "post_sampling_probs": True}),
    (NATIVE, {"prompt": [ONCE, "A", "B"], "n_predict": 3, "n_probs": 1}),
    (NATIVE, {"prompt": [ONCE], "n_predict": 3}),
    (NATIVE, {"prompt": [ONCE, [1, 2]], "n_predict": 3}),
    (NATIVE, {"prompt": ONCE, "n_predict": 4, "n": 2, "temperature": 1.0}),
    (NATIVE, {"prompt": ONCE, "n_predict": 30, "stop": [","]}),
    (NATIVE, {"prompt": ONCE, "n_predict": 20, "grammar": EMOJI, "n_probs": 1}),
    (NATIVE, {"prompt": ONCE, "n_predict": 4, "return_progress": True, "timings_per_token": True, "n_probs": 1}),
    (NATIVE, {"prompt": ONCE, "n_predict": 3, "response_fields": ["content", "generation_settings/stream", "prompt/no", "no"]}),
    (NATIVE, {"prompt": [ONCE, "A"], "n_predict": 3, "response_fields": ["timings/predicted_n"]}),
    (NATIVE, {"prompt": ONCE, "n_predict": 3, "response_fields": []}),
    ("/infill", {"input_prefix": "a", "input_suffix": "b", "n_predict": 2}),
]
# With what the engine's own answer must have in it, lest the comparisons compare nothing but small talk.
TOOLS_EQUAL: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {**CALL, "max_tokens": 100}, '},{"type":"function","function"'),
    (CHAT, {**CALL, "max_tokens": 25}, '"tool_calls":[{"type"'),
    (CHAT, {**CALL, "max_tokens": 40, "n": 2, "temperature": 1.0}, '"tool_calls":[{"type"'),
    (CHAT, {**CALL, "max_tokens": 40, "parallel_tool_calls": False}, '"tool_calls":[{"type"'),
    (CHAT, {"messages": HI, "grammar": THINK}, '"content":"surely","reasoning_content":"well now'),
    (CHAT, {"messages": HI, "grammar": THINK, "reasoning_format": "none"}, "<think>"),
    (CHAT, {"messages": HI, "grammar": THINK, "max_tokens": 9}, '"content":"","reasoning_content"'),
    (CHAT, {"messages": HI, "grammar": EMOJI}, '"error"'),  # not wrapped as the template wants it: fails in mid-stream
    (RESPONSES, {**RESPONSE_CALL, "max_output_tokens": 60}, '"type":"function_call"'),
    (RESPONSES, {"input": "Say hi", "grammar": THINK}, '"type":"reasoning_text"'),
    (MESSAGES, {**USE, "max_tokens": 60}, '"input":{"city":"'),
    (MESSAGES, {**USE, "max_tokens": 26}, '"type":"tool_use"'),
]
LOST: list[Case] = [
    (CHAT, {"messages": HI, "max_tokens": 4, "stop": ["I'm glad you're HERE"]}),
    (RESPONSES, {"input": "Say hi", "max_output_tokens": 4, "stop": ["I'm glad you're HERE"]}),
    (MESSAGES, {"messages": HI, "max_tokens": 4, "stop_sequences": ["I'm glad you're HERE"]}),
    (TEXT, {"prompt": ONCE, "max_tokens": 3, "grammar": EMOJI}),
    (NATIVE, {"prompt": ONCE, "n_predict": 3, "grammar": EMOJI}),
]
TOOLS_LOST: list[Case] = [
    (CHAT, {**CALL, "max_tokens": 9}),
    (CHAT, {"messages": HI, "grammar": THINK, "max_tokens": 4}),
    (RESPONSES, {"input": "Say hi", "grammar": THINK, "max_output_tokens": 4}),
]


class Engine:
    """A real engine, run by an event loop in a thread of its own; `ask` blocks."""

    def __init__(self, adapter: Adapter, where: Location, model: str, folder: str, args: tuple[str, ...]) -> None:
        grant = Grant(model, "the-alias", "e.sock", context=1024, parallel=3, threads=1, args=args)
        self._plan = adapter.plan(Spec(Wish(model), Artifact("file", model, model)), where, grant)
        self._adapter, self._folder = adapter, folder
        self._exit: Future[Exit] = Future()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Engine:
        self._thread.start()
        self._log = RotatingLog(self._folder + ".log")
        try:
            asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(60)
        except BaseException:
            self.__exit__()
            raise
        return self

    async def _start(self) -> None:
        self._process = await EngineProcess.start(
            self._plan,
            folder=self._folder,
            env=scrubbed_env(os.environ, "test-assemble"),
            log=self._log,
            name=self._adapter.name,
            on_exit=self._exit.set_result,
        )
        await wait_ready(self._process, self._plan, self._adapter)

    def __exit__(self, *exc: object) -> None:
        if hasattr(self, "_process"):
            asyncio.run_coroutine_threadsafe(self._process.stop(force=True), self._loop).result(30)
            self._exit.result(30)
        self._log.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def ask(self, route: str, body: bytes) -> tuple[int, str, bytes]:
        """Status, media type and body of the answer."""
        with contextlib.closing(EngineConnection(self._process.socket)) as connection:
            connection.request("POST", route, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.headers.get_content_type(), response.read()


@pytest.fixture(scope="module", params=["xllamacpp:Xllamacpp", "llama_server:LlamaServer"])
def adapter(request: pytest.FixtureRequest) -> tuple[Adapter, Location]:
    module, _, name = str(request.param).partition(":")
    adapter: Adapter = getattr(importlib.import_module(f"llm_daemon.engines.{module}"), name)()
    where = adapter.locate({"path": GIVEN} if GIVEN and module == "llama_server" else {})
    if not isinstance(where, Location):
        pytest.skip(f"{adapter.name}: {where.reason} ({where.hint})")
    return adapter, where


@pytest.fixture(scope="module")
def plain(adapter: tuple[Adapter, Location], smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(*adapter, smollm2, str(tmp_path_factory.mktemp("e") / "a"), ()) as engine:
        yield engine


@pytest.fixture(scope="module")
def tools(adapter: tuple[Adapter, Location], smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(*adapter, smollm2, str(tmp_path_factory.mktemp("e") / "a"), ("--chat-template", TEMPLATE)) as engine:
        yield engine


VOLATILE = {"id", "created", "created_at", "completed_at", "call_id", "id_slot"}


def normal(value: Any, key: str = "") -> Any:
    """The answer with its type alone in place of what differs from one time to the next; key order does not count."""
    if isinstance(value, dict):
        return {name: normal(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [normal(inner) for inner in value]
    return (
        type(value).__name__ if key in VOLATILE or (isinstance(value, float) and "_per_" in key) or key.endswith("_ms") else value
    )


def body_of(route: str, fields: dict[str, Any]) -> bytes:
    return json.dumps({"temperature": 0, "seed": 7, "cache_prompt": False, **fields}).encode()


def both(engine: Engine, route: str, fields: dict[str, Any]) -> tuple[tuple[int, bytes], tuple[int, bytes]]:
    """The engine's own answer, and ours; raises what the assembler raises."""
    body = body_of(route, fields)
    if route == MESSAGES:
        engine.ask(route, body)  # a message cannot turn the prompt cache off: so it is warm both times
    status, _, own = engine.ask(route, body)
    found = ask_to_stream(route, body)
    assert found
    streaming, assembler = found
    code, media_type, stream = engine.ask(route, streaming)
    if media_type != "text/event-stream":  # refused before the first token
        return (status, own), (code, stream)
    for begin in range(0, len(stream), 1000):
        assembler.feed(stream[begin : begin + 1000])
    return (status, own), assembler.finish()


def check_equal(engine: Engine, route: str, fields: dict[str, Any], sign: str = "") -> None:
    (status, own), (code, ours) = both(engine, route, fields)
    assert (code, normal(json.loads(ours))) == (status, normal(json.loads(own)))
    assert sign in own.decode()


def check_lost(engine: Engine, route: str, fields: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        both(engine, route, fields)
    assert caught.value.code == NOT_IN_STREAM


@pytest.mark.parametrize(("route", "fields"), EQUAL)
def test_equal(plain: Engine, route: str, fields: dict[str, Any]) -> None:
    check_equal(plain, route, fields)


@pytest.mark.parametrize(("route", "fields", "sign"), TOOLS_EQUAL)
def test_equal_with_tools_and_thoughts(tools: Engine, route: str, fields: dict[str, Any], sign: str) -> None:
    check_equal(tools, route, fields, sign)


@pytest.mark.parametrize(("route", "fields"), LOST)
def test_what_the_stream_lacks_is_noticed(plain: Engine, route: str, fields: dict[str, Any]) -> None:
    check_lost(plain, route, fields)


@pytest.mark.parametrize(("route", "fields"), TOOLS_LOST)
def test_what_the_stream_lacks_with_tools_and_thoughts_is_noticed(tools: Engine, route: str, fields: dict[str, Any]) -> None:
    check_lost(tools, route, fields)
