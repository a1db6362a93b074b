"""Streams as servers send them, with what must be made of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_daemon_bench import reply as replies
from llm_daemon_bench.client import Raw
from llm_daemon_bench.records import Tokens
from llm_daemon_bench.reply import Reply


def raw(*events: tuple[float, Any], finish: str = "done", end: float = 99.0) -> Raw:
    """(ms, event) pairs; an event is JSON, or bytes as they come."""
    chunks = [(ms, e if isinstance(e, bytes) else b"data: " + json.dumps(e).encode() + b"\n\n") for ms, e in events]
    return Raw(0, connect_ms=0.2, headers_ms=1.0, status=200, chunks=chunks, end_ms=end, finish=finish)


def delta(finish: str | None = None, **content: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": content, "finish_reason": finish}]}


def text_of(reply: Reply) -> str:
    return "".join(p.text for p in reply.pieces)


DONE = b"data: [DONE]\n\n"


def test_an_early_role_chunk_is_no_token() -> None:
    found = replies.parse(
        raw((2.0, delta(role="assistant", content="")), (200.0, delta(content="Hi")), (220.0, delta("stop")), (221.0, DONE))
    )
    assert found.t_ms == {
        "first_event": 2.0, "first_token": 200.0, "first_content": 200.0, "last_token": 200.0,
        "headers": 1.0, "connect": 0.2, "done": 99.0,
    }  # fmt: skip
    assert (found.finish, found.error) == ("stop", None)


def test_reasoning_comes_before_content() -> None:
    found = replies.parse(
        raw(
            (5.0, delta(reasoning_content="hm")),
            (9.0, delta(reasoning="so")),
            (12.0, delta(content="Yes")),
            (13.0, delta("stop")),
            (14.0, DONE),
        )
    )
    assert (found.t_ms["first_token"], found.t_ms["first_content"]) == (5.0, 12.0)
    assert [p.reasoning for p in found.pieces] == ["hm", "so", "", ""]


def test_progress_and_comments_are_apart() -> None:
    progress = {"choices": [{"delta": {}, "finish_reason": None}], "prompt_progress": {"processed": 64, "total": 128}}
    found = replies.parse(
        raw((1.0, b": ping\n\n"), (2.0, progress), (9.0, delta(content="a")), (10.0, delta("length")), (11.0, DONE))
    )
    assert found.progress == [(2.0, {"processed": 64, "total": 128})]
    assert (found.t_ms["first_event"], found.t_ms["first_token"]) == (2.0, 9.0)
    assert len(found.pieces) == 2


def test_utf8_and_lines_split_anywhere_are_put_together() -> None:
    whole = (
        b"".join(
            b"data: " + json.dumps(delta(content=t), ensure_ascii=False).encode() + b"\r\n\r\n" for t in ("grün ", "日本", "🙂")
        )
        + b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\r\n\r\ndata: [DONE]\r\n\r\n'
    )
    for size in (1, 2, 3, 7):
        parts = [(float(i), whole[i : i + size]) for i in range(0, len(whole), size)]
        found = replies.parse(raw(*parts))
        assert text_of(found) == "grün 日本🙂"
        assert (found.finish, found.error) == ("stop", None)


def test_a_piece_is_stamped_when_its_event_was_whole() -> None:
    event = b"data: " + json.dumps(delta(content="a")).encode() + b"\n\n"
    found = replies.parse(raw((5.0, event[:20]), (50.0, event[20:]), (60.0, delta("stop")), (61.0, DONE)))
    assert found.t_ms["first_token"] == 50.0


@pytest.mark.parametrize(
    ("events", "error"),
    [
        ([delta(content="a"), {"error": {"code": 500, "message": "out of memory\nmore"}}], "out of memory"),
        ([delta(content="a"), b'error: {"code": 500, "message": "odd field"}\n\n'], "odd field"),
        ([delta(content="a")], "the stream ended without a finish reason"),
        ([b"<html>"], "the answer was no event stream, or empty"),
        ([], "the answer was no event stream, or empty"),
        ([b"data: {no\n\n"], "not JSON: b'{no'"),
    ],
)
def test_errors_in_the_stream_are_told(events: list[Any], error: str) -> None:
    found = replies.parse(raw(*[(float(i), e) for i, e in enumerate(events)]))
    assert found.error == error
    assert "done" not in found.t_ms or found.done


def test_four_tokens_in_a_chunk_are_shared_out() -> None:
    said = [(200.0 + 80 * i, delta(content="abcd")) for i in range(5)]
    usage = {
        "choices": [],
        "usage": {"prompt_tokens": 50, "completion_tokens": 20, "prompt_tokens_details": {"cached_tokens": 7}},
    }
    found = replies.parse(raw(*said, (600.0, delta("stop")), (601.0, usage), (602.0, DONE)))
    assert [p.tok for p in found.pieces] == [4, 8, 12, 16, 20, 20]
    assert replies.tokens(found) == Tokens(prompt=50, cached=7, out=20, first=4, source="usage")
    assert replies.decode_ms_per_token(found) == 20.0
    gaps = replies.gaps(found.said)
    assert gaps is not None
    assert (gaps.n, gaps.p50, gaps.max) == (4, 80.0, 80.0)


def test_exact_counts_with_each_chunk_win() -> None:
    def chunk(text: str, n: int) -> dict[str, Any]:
        return {
            **delta(content=text),
            "timings": {"predicted_n": n, "predicted_ms": 10.0 * n, "prompt_n": 30, "cache_n": 12, "prompt_ms": 80.0},
        }

    last = {
        **delta("stop"),
        "timings": {"predicted_n": 5, "predicted_ms": 44.0, "prompt_n": 30, "cache_n": 12, "prompt_ms": 80.0},
    }
    found = replies.parse(
        raw((100.0, chunk("a", 1)), (120.0, chunk("bc", 3)), (130.0, chunk("d", 4)), (140.0, last), (141.0, DONE))
    )
    assert [p.tok for p in found.pieces] == [1, 3, 4, 4]  # the fifth ended the reply and brought nothing
    assert replies.decode_ms_per_token(found) == 10.0
    assert replies.tokens(found) == Tokens(prompt=42, cached=12, out=5, first=1, source="timings")
    assert (replies.server_times(found).prompt, replies.server_times(found).decode) == (80.0, 44.0)


def test_without_counts_the_chunks_are_all_there_is() -> None:
    found = replies.parse(raw((1.0, delta(content="a")), (2.0, delta(content="b")), (3.0, delta("stop")), (4.0, DONE)))
    assert replies.tokens(found) == Tokens(out=2, first=1, source="chunks")
    assert replies.tokens(Reply()) == Tokens(source="none")


def test_a_token_that_only_ends_the_reply_is_not_timed() -> None:
    said = [(10.0 * i, delta(content="x")) for i in range(1, 65)]
    usage = {"choices": [], "usage": {"completion_tokens": 65}}
    found = replies.parse(raw(*said, (650.0, delta("stop")), (651.0, usage), (652.0, DONE)))
    assert replies.decode_ms_per_token(found) == 10.0


def test_llama_cpp_native_streams_are_read() -> None:
    found = replies.parse(
        raw(
            (1.0, {"content": "a", "stop": False}),
            (2.0, {"content": "b", "stop": False}),
            (3.0, {"content": "", "stop": True, "stop_type": "limit", "timings": {"predicted_n": 2}}),
        )
    )
    assert (text_of(found), found.finish, found.error) == ("ab", "length", None)
    assert [p.tok for p in found.pieces] == [1, 2, 2]


def test_completion_chunks_are_read() -> None:
    events = [{"choices": [{"text": "a", "finish_reason": None}]}, {"choices": [{"text": "", "finish_reason": "length"}]}]
    found = replies.parse(raw((1.0, events[0]), (2.0, events[1]), (3.0, DONE)))
    assert (text_of(found), found.finish, found.t_ms["first_content"]) == ("a", "length", 1.0)


def test_replies_that_say_the_same_have_one_name() -> None:
    from llm_daemon_bench.checkpoints import Call, Piece
    from llm_daemon_bench.reply import Reply, name_of

    def call(ident: str, arguments: str) -> Reply:
        return Reply(
            [Piece(1, calls=((0, Call("look", arguments[:3], ident)),)), Piece(2, calls=((0, Call("", arguments[3:])),))]
        )

    assert name_of(call("call_1", '{"a": 1}')) == name_of(call("call_2", '{"a": 1}')) != name_of(call("call_1", '{"a": 2}'))
    texts = [
        Reply([Piece(1, text="yes")]),
        Reply([Piece(1, reasoning="yes")]),
        Reply([Piece(1, reasoning="so", text="yes")]),
        Reply(),
    ]
    assert len({name_of(reply) for reply in texts}) == 4


def test_tool_calls_are_tokens_but_no_content() -> None:
    call = [{"index": 0, "id": "c1", "function": {"name": "find", "arguments": ""}}]
    more = [{"index": 0, "function": {"arguments": '{"q":1}'}}]
    found = replies.parse(
        raw((5.0, delta(tool_calls=call)), (8.0, delta(tool_calls=more)), (9.0, delta("tool_calls")), (10.0, DONE))
    )
    assert found.t_ms["first_token"] == 5.0
    assert "first_content" not in found.t_ms
    assert [c.arguments for p in found.pieces for _, c in p.calls] == ["", '{"q":1}']
