"""One answer out of a stream, on events as llama.cpp writes them; tests/engines/test_real_assemble.py asks real engines."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st

from llm_daemon.core.assemble import NOT_IN_STREAM, Assembler, ask_to_stream
from llm_daemon.core.choices import Chat
from llm_daemon.errors import RemoteProtocolError

Json = dict[str, Any]
CHAT, TEXT, RESPONSES, MESSAGES, NATIVE = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/completion",
)
AROUND = {"created": 5, "id": "c1", "model": "m", "system_fingerprint": "b1"}
USAGE = {"completion_tokens": 2, "prompt_tokens": 9, "total_tokens": 11, "prompt_tokens_details": {"cached_tokens": 4}}
TIMES = {"prompt_n": 9, "predicted_n": 2, "predicted_ms": 1.5}
DONE = b"data: [DONE]\n\n"


def event(data: object, name: str = "") -> bytes:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data)}\n\n".encode()


def asked(path: str, **fields: object) -> tuple[Json, Assembler]:
    found = ask_to_stream(path, json.dumps(fields).encode())
    assert found
    return json.loads(found[0]), found[1]


def answer(path: str, *events: bytes, **fields: object) -> tuple[int, Any]:
    _, assembler = asked(path, **fields)
    for one in events:
        assembler.feed(one)
    status, body = assembler.finish()
    return status, json.loads(body)


def chunk(delta: Json | None = None, finish: str | None = None, index: int = 0, **more: object) -> bytes:
    choices = [] if delta is None else [{"finish_reason": finish, "index": index, "delta": delta}]
    return event({"choices": choices, **AROUND, "object": "chat.completion.chunk", **more})


def text(piece: str, finish: str | None = None, index: int = 0, logprobs: Json | None = None, **more: object) -> bytes:
    choice = {"text": piece, "index": index, "logprobs": logprobs, "finish_reason": finish}
    return event({"choices": [choice], **AROUND, "object": "text_completion", **more})


def native(piece: str, count: int, index: int = 0, **more: object) -> bytes:
    return event({"index": index, "content": piece, "tokens": [1], "stop": False, "tokens_predicted": count, **more})


def native_end(count: int, index: int = 0, **more: object) -> bytes:
    end = {"index": index, "content": "", "tokens": [], "stop": True, "stop_type": "eos", "tokens_predicted": count, **more}
    return event(end)


def message(*blocks: bytes, reason: str = "end_turn", tokens: int = 2) -> list[bytes]:
    began: Json = {"id": "c1", "type": "message", "role": "assistant", "content": [], "model": "m", "stop_reason": None,
             "stop_sequence": None, "usage": {"cache_read_input_tokens": 4, "input_tokens": 5, "output_tokens": 0}}  # fmt: skip
    ended = {"delta": {"stop_reason": reason, "stop_sequence": None}, "usage": {"output_tokens": tokens}}
    return [
        typed("message_start", message=began),
        *blocks,
        typed("message_delta", **ended),
        typed("message_stop"),
    ]


def typed(kind: str, **data: object) -> bytes:
    return event({"type": kind, **data}, kind)


def begin(index: int, **block: object) -> bytes:
    return typed("content_block_start", index=index, content_block=block)


def grow(index: int, kind: str, **delta: str) -> bytes:
    return typed("content_block_delta", index=index, delta={"type": kind, **delta})


# -- what is asked of the engine --


def test_the_body_keeps_each_digit_and_asks_for_usage() -> None:
    body = (
        b'{"messages": [], "seed": 123456789012345678901234567890, "top_p": 0.1000000000000000055511151231257827, "stream": null}'
    )
    found = ask_to_stream(CHAT, body)
    assert found
    assert found[0] == (
        b'{"messages":[],"seed":123456789012345678901234567890,"top_p":0.1000000000000000055511151231257827,'
        b'"stream":true,"stream_options":{"include_usage":true}}'
    )


@pytest.mark.parametrize(
    ("path", "fields", "added"),
    [
        (CHAT, {"stop": ["x"]}, {"stream_options": {"include_usage": True}, "timings_per_token": True}),
        (TEXT, {"prompt": "x"}, {"stream_options": {"include_usage": True}, "timings_per_token": True}),
        (RESPONSES, {"input": "x"}, {}),
        (RESPONSES, {"input": "x", "stop": "y"}, {"timings_per_token": True}),
        (MESSAGES, {"messages": [{"role": "user", "content": "x"}]}, {}),
        (NATIVE, {"prompt": "x", "return_tokens": False}, {}),
        ("/infill", {"input_prefix": "x", "stop": ["y"]}, {}),
    ],
)
def test_what_is_added(path: str, fields: Json, added: Json) -> None:
    assert asked(path, **fields)[0] == {**fields, "stream": True, **added}


def test_chosen_fields_are_chosen_here() -> None:
    assert asked(NATIVE, prompt="x", response_fields=["content"])[0] == {"prompt": "x", "stream": True}


ASSISTANT = {"role": "assistant", "content": "I"}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/embeddings", {}),
        (CHAT, {"verbose": True}),
        (CHAT, {"n_indent": 2}),
        (CHAT, {"logprobs": True}),
        (CHAT, {"n_probs": 1}),
        (CHAT, {"reasoning_format": "deepseek-legacy"}),
        (CHAT, {"messages": [{"role": "user", "content": "x"}, ASSISTANT]}),
        (CHAT, {"messages": [], "continue_final_message": True}),
        (MESSAGES, {"messages": [ASSISTANT]}),
        (RESPONSES, {"input": [ASSISTANT]}),
        (RESPONSES, {"input": [{"type": "function_call", "name": "f"}]}),
        (RESPONSES, {"input": "x", "n": 2}),
        (MESSAGES, {"messages": [], "n_cmpl": 2}),
        (TEXT, {"prompt": "x", "logprobs": 1, "stop": "y"}),
        (NATIVE, {"prompt": "x", "n_probs": 1, "stop": ["y"]}),
        (NATIVE, {"prompt": "x", "return_tokens": True}),
        (NATIVE, {"prompt": "x", "response_fields": "content"}),
        (NATIVE, {"prompt": "x", "response_fields": [1]}),
    ],
)
def test_what_no_stream_carries_is_asked_plainly(path: str, fields: Json) -> None:
    assert ask_to_stream(path, json.dumps(fields).encode()) is None


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"\xff": 1}', b'{"messages": ' + b"[" * 100_000])
def test_no_json_object_is_the_engines_to_refuse(body: bytes) -> None:
    assert ask_to_stream(CHAT, body) is None


# -- chat and completions --


def test_chat() -> None:
    events = [
        chunk({"role": "assistant", "content": None}),
        b": ping\n\n",
        chunk({"reasoning_content": "Hm"}, prompt_progress={"total": 1}),
        chunk({"reasoning_content": "m"}),
        chunk({"content": "Hé"}),
        chunk({"content": "llo"}),
        chunk({}, "stop"),
        chunk(usage=USAGE, timings=TIMES),
        DONE,
    ]
    said = {"role": "assistant", "content": "Héllo", "reasoning_content": "Hmm"}
    assert answer(CHAT, *events, messages=[]) == (
        200,
        {
            "choices": [{"finish_reason": "stop", "index": 0, "message": said}],
            **AROUND,
            "object": "chat.completion",
            "usage": USAGE,
            "timings": TIMES,
        },
    )


def test_an_empty_chat() -> None:
    _, got = answer(CHAT, chunk({"role": "assistant", "content": None}), chunk({}, "stop"), DONE)
    assert got["choices"][0]["message"] == {"role": "assistant", "content": ""}


def test_tool_calls_in_pieces_side_by_side() -> None:
    def call(index: int, **delta: object) -> bytes:
        return chunk({"tool_calls": [{"index": index, **delta}]})

    events = [
        call(0, id="a", type="function", function={"name": "get"}),
        call(0, id="a", type="function", function={"name": "get_all", "arguments": '{"x'}),  # the name grew
        call(1, id="b", type="function", function={"name": "put", "arguments": ""}),
        call(0, function={"arguments": '": 1}'}),
        call(2, function={"name": "nameless"}),
        chunk({}, "tool_calls"),
        DONE,
    ]
    _, got = answer(CHAT, *events)
    assert got["choices"][0]["finish_reason"] == "tool_calls"
    assert got["choices"][0]["message"]["tool_calls"] == [
        {"type": "function", "function": {"name": "get_all", "arguments": '{"x": 1}'}, "id": "a"},
        {"type": "function", "function": {"name": "put", "arguments": ""}, "id": "b"},
        {"type": "function", "function": {"name": "nameless", "arguments": ""}},
    ]


def test_several_choices_have_the_numbers_of_the_first() -> None:
    first, second = {**USAGE, "completion_tokens": 1}, {**USAGE, "completion_tokens": 2}
    events = [
        chunk({"content": "b"}, index=1),
        chunk({"content": "a"}, index=0),
        chunk({}, "length", index=0),
        chunk(usage=first, timings={"predicted_n": 1}),
        chunk({"content": "B"}, index=1),
        chunk({}, "stop", index=1),
        chunk(usage=second, timings={"predicted_n": 2}),
        DONE,
    ]
    _, got = answer(CHAT, *events, n=2)
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in got["choices"]] == [
        (0, "a", "length"),
        (1, "bB", "stop"),
    ]
    assert (got["usage"], got["timings"]) == (first, {"predicted_n": 1})


def test_unknown_fields_of_deltas_are_kept() -> None:
    events = [
        chunk({"refusal": "No", "audio": {"id": 1}, "annotations": [1]}),
        chunk({"refusal": "pe", "audio": {"id": 2}, "annotations": [2], "content": None}),
        chunk({}, "stop", service_tier="x"),
        DONE,
    ]
    _, got = answer(CHAT, *events)
    said = {"role": "assistant", "content": "", "refusal": "Nope", "audio": {"id": 2}, "annotations": [1, 2]}
    assert got["choices"][0]["message"] == said
    assert got["service_tier"] == "x"


def test_completions_with_probabilities() -> None:
    one, two = ({"id": n, "token": t, "bytes": [65], "logprob": -0.1, "top_logprobs": []} for n, t in enumerate("ab"))
    events = [
        text("a", logprobs={"content": [one]}, timings={"predicted_n": 1}),
        text("b", logprobs={"content": [two]}, timings={"predicted_n": 2}),
        text("", "length", usage=USAGE, timings=TIMES),
        DONE,
    ]
    _, got = answer(TEXT, *events, prompt="x", logprobs=1)
    assert got == {
        "choices": [{"text": "ab", "index": 0, "logprobs": {"content": [one, two]}, "finish_reason": "length"}],
        **AROUND,
        "object": "text_completion",
        "usage": USAGE,
        "timings": TIMES,
    }


# -- llama.cpp's own --


def test_native() -> None:
    settings = {"stream": True, "n_predict": 2}
    events = [
        native("", 0, prompt_progress={"total": 3}),
        native("a", 1, completion_probabilities=[{"id": 1}]),
        native("b", 2, completion_probabilities=[{"id": 2}]),
        native_end(2, prompt="x", generation_settings=settings),
    ]
    expected = {
        "index": 0, "content": "ab", "tokens": [], "stop": True, "stop_type": "eos", "tokens_predicted": 2, "prompt": "x",
        "generation_settings": {**settings, "stream": False}, "completion_probabilities": [{"id": 1}, {"id": 2}],
    }  # fmt: skip
    assert answer(NATIVE, *events, prompt="x", n_probs=1) == (200, expected)
    paths = ["content", "generation_settings/stream", "prompt/x", "no"]
    chosen = {"content": "ab", "generation_settings/stream": False}
    assert answer(NATIVE, *events, prompt="x", response_fields=paths) == (200, chosen)


def test_several_prompts_give_a_list() -> None:
    events = [event(None), native("b", 1, index=1), native("a", 1), native_end(1, index=1), native_end(1)]
    _, got = answer(NATIVE, *events, prompt=["x", "y"])
    assert [one["content"] for one in got] == ["a", "b"]


# -- responses and messages --


def test_responses() -> None:
    thought: Json = {"id": "rs_1", "type": "reasoning", "content": [{"text": "Hm", "type": "reasoning_text"}]}
    said = {"id": "msg_1", "type": "message", "status": "completed", "content": [{"type": "output_text", "text": "Hello"}]}
    whole = {"id": "resp_1", "object": "response", "created_at": 5, "status": "completed", "output": [thought, said]}
    events = [
        typed("response.created", response={"id": "resp_1", "status": "in_progress"}),
        typed("response.output_text.delta", item_id="msg_1", delta="Hello"),
        typed("response.completed", response=whole, timings=TIMES),
    ]
    expected = {"completed_at": 5, **whole, "output": [{**thought, "status": "completed"}, said]}
    assert answer(RESPONSES, *events, input="x") == (200, expected)


def test_a_message_with_all_kinds_of_blocks() -> None:
    blocks = [
        begin(0, type="thinking", thinking=""),
        grow(0, "thinking_delta", thinking="H"),
        grow(0, "thinking_delta", thinking="m"),
        begin(1, type="tool_use", id="a", name="get"),
        grow(1, "input_json_delta", partial_json='{"n": 123456789012'),
        begin(1, type="tool_use", id="a", name="get_all"),  # the name grew
        grow(1, "input_json_delta", partial_json="34567890}"),
        begin(2, type="tool_use", id="b", name="put"),
        grow(2, "input_json_delta", partial_json='{"cut": of'),
        begin(2, type="text", text=""),  # text after a call has the index of a call
        grow(2, "text_delta", text="Hel"),
        grow(2, "text_delta", text="lo"),
        begin(2, type="text", text=""),  # the last events say again what has begun
        grow(0, "signature_delta", signature=""),
        typed("content_block_stop", index=2),
    ]
    _, got = answer(MESSAGES, *message(*blocks, reason="tool_use"))
    assert got == {
        "id": "c1", "type": "message", "role": "assistant", "model": "m", "stop_reason": "tool_use", "stop_sequence": None,
        "usage": {"cache_read_input_tokens": 4, "input_tokens": 5, "output_tokens": 2},
        "content": [
            {"type": "thinking", "thinking": "Hm", "signature": ""},
            {"type": "text", "text": "Hello"},
            {"type": "tool_use", "id": "a", "name": "get_all", "input": {"n": 12345678901234567890}},
            {"type": "tool_use", "id": "b", "name": "put", "input": {}},
        ],
    }  # fmt: skip


# -- ends that are none, and errors --

HELLO = chunk({"content": "Hello"})
WHOLE: list[tuple[str, list[bytes]]] = [
    (CHAT, [HELLO, chunk({}, "stop"), DONE]),
    (TEXT, [text("Hello"), text("", "stop"), DONE]),
    (NATIVE, [native("Hello", 1), native_end(2)]),
    (RESPONSES, [typed("response.completed", response={"output": [{"type": "message"}]})]),
    (MESSAGES, message(begin(0, type="text", text=""), grow(0, "text_delta", text="Hello"))),
]


@pytest.mark.parametrize(("path", "events"), WHOLE)
def test_a_stream_without_its_end_is_no_answer(path: str, events: list[bytes]) -> None:
    assert answer(path, *events)[0] == 200
    for kept in range(len(events)):
        with pytest.raises(RemoteProtocolError, match="before its answer was whole"):
            answer(path, *events[:kept])


def test_done_alone_is_no_end() -> None:
    for events in ([DONE], [HELLO, DONE], [HELLO, chunk({}, "stop"), chunk({"content": "b"}, index=1), DONE]):
        with pytest.raises(RemoteProtocolError):
            answer(CHAT, *events)
    with pytest.raises(RemoteProtocolError):
        answer(NATIVE, native("a", 1), native("b", 1, index=1), native_end(1, index=1))


ERROR = {"code": 503, "message": "gone", "type": "server_error"}


@pytest.mark.parametrize(("path", "events"), WHOLE)
@pytest.mark.parametrize(
    ("failed", "status", "body"),
    [
        (event({"error": ERROR}), 503, ERROR),
        (event(ERROR, "error"), 503, ERROR),
        (event({"type": "error", "error": {"type": "overloaded_error"}}, "error"), 500, {"type": "overloaded_error"}),
        (event({"error": "gone"}), 500, {"message": "gone"}),
        (event({"error": {"code": 200}}), 500, {"code": 200}),
        (event({"error": {"code": True}}), 500, {"code": True}),
    ],
)
def test_an_error_in_mid_stream_is_the_answer(path: str, events: list[bytes], failed: bytes, status: int, body: Json) -> None:
    assert answer(path, *events[:-1], failed) == (status, {"error": body})
    assert answer(path, *events[:-1], failed, b"data: what follows\n\n") == (status, {"error": body})


def test_a_failed_response_is_an_error() -> None:
    assert answer(RESPONSES, typed("response.failed", response={"error": ERROR})) == (503, {"error": ERROR})


@pytest.mark.parametrize(("path", "events"), WHOLE)
@pytest.mark.parametrize(
    "strange",
    [b"data: {\n\n", b"data: \xff\n\n", b"data: " + b"[" * 100_000 + b"\n\n"],
)
def test_what_is_not_json_is_refused(path: str, events: list[bytes], strange: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="not JSON"):
        answer(path, strange, *events)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
NAMES = (
    "choices index delta text content finish_reason logprobs tool_calls function name arguments timings predicted_n usage object "
    "stop stop_type tokens_predicted completion_probabilities generation_settings type response output message content_block "
    "error code"
).split()
KINDS = (
    "message_start content_block_start content_block_delta message_delta message_stop response.completed response.failed x.delta"
).split()
hostile = st.recursive(
    json_values | st.sampled_from(KINDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=12,
)


@given(st.sampled_from(WHOLE), st.lists(hostile, max_size=4))
def test_no_event_breaks_us(whole: tuple[str, list[bytes]], strange: list[Any]) -> None:
    path, events = whole
    try:
        status, body = answer(path, *map(event, strange), *events)
    except RemoteProtocolError:
        return
    assert 200 <= status < 600
    assert body is not None


def test_what_is_kept_is_bounded() -> None:
    asked = dict.fromkeys(("stop", "logprobs", "n_probs"))
    long = Chat(asked, limit=5000)
    with pytest.raises(RemoteProtocolError, match="too large to be put together"):
        for _ in range(1000):
            long.feed(chunk({"content": "12345"}))
    many = Chat(asked, limit=5000)
    with pytest.raises(RemoteProtocolError, match="too large to be put together"):
        for index in range(1000):
            many.feed(chunk({}, index=index))
    large = Chat(asked, limit=5000)
    with pytest.raises(RemoteProtocolError, match="an event of more than 5000 bytes"):
        large.feed(b"data: " + b"x" * 6000)
    quiet = Chat(asked, limit=5000)
    for _ in range(1000):
        quiet.feed(b": ping\n\n" + chunk({}, prompt_progress={"total": 1}))


# -- what the stream lacks --

LIMITED = chunk({}, "length", timings={"predicted_n": 3})


@pytest.mark.parametrize(
    ("path", "fields", "events"),
    [
        (CHAT, {"stop": "lo!"}, [chunk({"content": "Hel"}, timings={"predicted_n": 2}), LIMITED, DONE]),
        (CHAT, {}, [LIMITED, DONE]),
        (CHAT, {}, [chunk({}, "stop", timings={"predicted_n": 2}), DONE]),
        (TEXT, {}, [text("x", timings={"predicted_n": 1}), text("", "length", timings={"predicted_n": 2}), DONE]),
        (TEXT, {"logprobs": 1}, [text("x", timings={"predicted_n": 1}), text("", "stop", timings={"predicted_n": 1}), DONE]),
        (NATIVE, {}, [native("x", 1), native_end(2, stop_type="limit")]),
        (NATIVE, {}, [native("x", 1), native("", 2), native_end(2, stop_type="limit")]),
        (NATIVE, {"n_probs": 1}, [native("x", 1), native_end(1)]),
        (RESPONSES, {"max_output_tokens": 6}, [typed("response.completed", response={"output": []}, timings={"predicted_n": 6})]),
        (MESSAGES, {}, message(begin(0, type="text", text=""), grow(0, "text_delta", text="x"))[1:]),
        (MESSAGES, {}, message()),
        (
            MESSAGES,
            {"stop_sequences": ["y"]},
            message(begin(0, type="text", text=""), grow(0, "text_delta", text="x"), reason="max_tokens"),
        ),
    ],
)
def test_what_the_stream_lacks_is_noticed(path: str, fields: Json, events: list[bytes]) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        answer(path, *events, **fields)
    assert caught.value.code == NOT_IN_STREAM


@pytest.mark.parametrize(
    ("path", "fields", "events"),
    [
        (CHAT, {"stop": "lo!"}, [chunk({"content": "Hel"}, timings={"predicted_n": 3}), LIMITED, DONE]),
        (CHAT, {}, [chunk({"content": "Hel"}), LIMITED, DONE]),
        (CHAT, {}, [chunk({}, "stop", timings={"predicted_n": 1}), DONE]),
        (TEXT, {}, [text("x"), text("", "length"), DONE]),
        (NATIVE, {}, [native("x", 1), native("", 2), native_end(2)]),
        (MESSAGES, {}, message(tokens=1)),
        (
            MESSAGES,
            {"stop_sequences": ["y"]},
            message(begin(0, type="text", text=""), grow(0, "text_delta", text="x"), reason="max_tokens", tokens=1),
        ),
    ],
)
def test_what_only_looks_short_is_an_answer(path: str, fields: Json, events: list[bytes]) -> None:
    assert answer(path, *events, **fields)[0] == 200


# -- a whole answer, cut into deltas anywhere --


def cut(draw: st.DrawFn, whole: str) -> list[str]:
    edges = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=4)))
    return [whole[a:b] for a, b in zip([0, *edges], [*edges, len(whole)], strict=True)]


words = st.text(max_size=12)
calls = st.lists(st.tuples(words.filter(bool), words), max_size=3)


@st.composite
def cut_chats(draw: st.DrawFn) -> tuple[Json, list[bytes]]:
    """The choice of an answer, and its chunks."""
    content, thought, wanted = draw(words), draw(words), draw(calls)
    said: Json = {"role": "assistant", "content": content, **({"reasoning_content": thought} if thought else {})}
    if wanted:
        said["tool_calls"] = [
            {"type": "function", "function": {"name": name, "arguments": arguments}, "id": str(index)}
            for index, (name, arguments) in enumerate(wanted)
        ]
    deltas = [chunk({"role": "assistant", "content": None})]
    deltas += [chunk({"reasoning_content": piece}) for piece in cut(draw, thought) if piece]
    deltas += [chunk({"content": piece}) for piece in cut(draw, content)]
    begun = [
        chunk({"tool_calls": [{"index": index, "id": str(index), "type": "function", "function": {"name": name}}]})
        for index, (name, _) in enumerate(wanted)
    ]
    rest = [
        chunk({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
        for index, (_, arguments) in enumerate(wanted)
        for piece in cut(draw, arguments)
    ]
    return {"finish_reason": "stop", "index": 0, "message": said}, [*deltas, *begun, *rest, chunk({}, "stop"), DONE]


@given(cut_chats(), st.integers(1, 200))
def test_a_chat_cut_anywhere_comes_back(chat: tuple[Json, list[bytes]], size: int) -> None:
    choice, events = chat
    stream = b"".join(events)
    _, got = answer(CHAT, *(stream[i : i + size] for i in range(0, len(stream), size)))
    assert got["choices"] == [choice]


@given(st.data(), words, words)
def test_other_answers_cut_anywhere_come_back(data: st.DataObject, first: str, second: str) -> None:
    def pieces(whole: str) -> list[str]:
        return data.draw(st.composite(lambda draw: cut(draw, whole))())

    natives = [native(p, 1) for p in pieces(first)] + [native(p, 1, index=1) for p in pieces(second)]
    _, got = answer(NATIVE, *natives, native_end(1, index=1), native_end(1))
    assert [one["content"] for one in got] == [first, second]
    texts = [text(p, index=0) for p in pieces(first)] + [text(p, index=1) for p in pieces(second)]
    _, got = answer(TEXT, *texts, text("", "stop", index=1), text("", "stop", index=0), DONE)
    assert [choice["text"] for choice in got["choices"]] == [first, second]
    blocks = [begin(0, type="text", text=""), *(grow(0, "text_delta", text=p) for p in pieces(first))]
    arguments = msgspec.json.encode({"x": second}).decode()
    blocks += [begin(1, type="tool_use", id="a", name="f")]
    blocks += [grow(1, "input_json_delta", partial_json=p) for p in pieces(arguments)]
    _, got = answer(MESSAGES, *message(*blocks))
    assert [block.get("text", block.get("input")) for block in got["content"]] == [first, {"x": second}]


@pytest.mark.parametrize(
    "path, event",
    [
        ("/v1/chat/completions", '{"choices":[{"delta":{"annotations":["%d"]}}]}'),
        ("/v1/chat/completions", '{"choices":[{"delta":{"new-%d":{}}}]}'),
        ("/v1/chat/completions", '{"choices":[{"new-%d":1}]}'),
        ("/v1/chat/completions", '{"choices":[],"new-%d":1}'),
        ("/v1/chat/completions", '{"choices":[{"delta":{"tool_calls":[{"index":0,"new-%d":1}]}}]}'),
        ("/v1/completions", '{"choices":[{"new-%d":1}]}'),
        ("/v1/messages", '{"type":"message_delta","delta":{"new-%d":1}}'),
        ("/v1/messages", '{"type":"content_block_start","index":0,"content_block":{"type":"text","id":"%d"}}'),
        ("/completion", '{"index":0,"completion_probabilities":[%d]}'),
        ("/completion", '{"index":%d}'),
    ],
)
def test_whatever_grows_is_bounded(path: str, event: str) -> None:
    asked = ask_to_stream(path, b"{}")
    assert asked is not None
    assembler = type(asked[1])(asked[1]._asked, limit=20_000)
    with pytest.raises(RemoteProtocolError, match="too large"):
        for n in range(2000):
            assembler.feed(b"data: %b\n\n" % (event % n).encode())
