"""Server-sent events: any way of cutting the bytes gives the same events."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from llm_daemon.core.sse import Event, Splitter
from llm_daemon.errors import RemoteProtocolError

# Each with what the standard says comes out.
STREAMS = [
    (b"", []),
    (b"data: 1\n\ndata: 2\n\n", [Event(b"1"), Event(b"2")]),
    (b"data: 1\r\n\r\ndata: 2\r\n\r\n", [Event(b"1"), Event(b"2")]),
    (b"data: 1\r\rdata: 2\r\r", [Event(b"1"), Event(b"2")]),
    (b"data: 1\r\n\ndata: 2\n\r\n", [Event(b"1"), Event(b"2")]),
    (b"data:1\ndata:  2\ndata\n\n", [Event(b"1\n 2\n")]),
    (b": ping\n\n:\n\ndata: 1\n: ping\n\n", [Event(b"1")]),
    (b"event: message_start\ndata: {}\n\ndata: 2\n\n", [Event(b"{}", "message_start"), Event(b"2")]),
    (b"event: alone\n\ndata: 1\n\n", [Event(b"1")]),
    (b"id: 7\nretry: 10\nunknown: x\ndata: a: b\n\n", [Event(b"a: b")]),
    (b"\xef\xbb\xbfdata: 1\n\n", [Event(b"1")]),
    ("data: 비형 🐿\n\n".encode(), [Event("비형 🐿".encode())]),
    (b"data:\n\n", [Event(b"")]),
    (b"data: 1\n\ndata: never ended\n", [Event(b"1")]),
    (b"data: 1\n\ndata: never ended", [Event(b"1")]),
]


def split(stream: bytes, cuts: list[int]) -> list[Event]:
    splitter = Splitter()
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    return [event for begin, end in pairwise(edges) for event in splitter.feed(stream[begin:end])]


@pytest.mark.parametrize(("stream", "events"), STREAMS)
def test_as_the_standard_says(stream: bytes, events: list[Event]) -> None:
    assert split(stream, []) == events
    assert split(stream, list(range(len(stream)))) == events
    for cut in range(len(stream)):
        assert split(stream, [cut]) == events


parts = st.sampled_from([b"data", b":", b" ", b"\r", b"\n", b"\r\n", b"event", b"x", b"\xef\xbb\xbf", "é".encode()])


@given(st.lists(parts, max_size=40).map(b"".join), st.lists(st.integers(0, 100), max_size=8))
def test_any_cutting_of_any_bytes_gives_the_same_events(stream: bytes, cuts: list[int]) -> None:
    assert split(stream, cuts) == split(stream, [])


lines = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=10)
events = st.lists(st.tuples(st.lists(lines, min_size=1, max_size=3), lines), max_size=5)


@given(events, st.sampled_from([b"\n", b"\r", b"\r\n"]), st.lists(st.integers(0, 200), max_size=8))
def test_what_was_written_is_read(written: list[tuple[list[str], str]], end: bytes, cuts: list[int]) -> None:
    stream = b""
    for data, name in written:
        stream += b"event: " + name.encode() + end + b"".join(b"data: " + line.encode() + end for line in data) + b": c" + end * 2
    assert split(stream, cuts) == [Event("\n".join(data).encode(), name) for data, name in written]


@pytest.mark.parametrize("piece", [b"data: 12345", b"data: 1\n", b"x", b"data: 123456789\n\n"])
def test_an_event_without_end_is_refused(piece: bytes) -> None:
    splitter = Splitter(limit=10)
    with pytest.raises(RemoteProtocolError, match="more than 10 bytes"):
        for _ in range(20):
            splitter.feed(piece)


def test_many_events_are_no_large_event() -> None:
    splitter = Splitter(limit=10)
    assert len([event for _ in range(100) for event in splitter.feed(b"data: 123\n\n: comment\n")]) == 100
