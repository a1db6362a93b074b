"""The readers without IO: any cut of the bytes gives the same messages; what two parsers could read differently is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from llm_daemon.daemon.http1 import HEAD_LIMIT, URL_LIMIT, Request, RequestReader, ResponseReader
from llm_daemon.errors import LlmDaemonError, RemoteProtocolError, UsageError

LIMIT = 200_000


def reader() -> RequestReader:
    return RequestReader(lambda request: None, body_limit=LIMIT)


def feed(data: bytes, cuts: list[int] | None = None) -> list[Request]:
    parser, out = reader(), []
    edges = [0, *sorted(cuts or []), len(data)]
    for a, b in pairwise(edges):
        out += parser.feed(data[a:b])
    return out


def refused(data: bytes, step: int | None = None) -> LlmDaemonError:
    *_, last = feed(data, list(range(0, len(data), step)) if step else None)
    assert last.error is not None
    assert not last.keep_alive
    return last.error


def post(body: bytes, headers: str = "") -> bytes:
    return f"POST /p?q HTTP/1.1\r\nHost: h\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


CHUNKED = b"POST /c HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n2\r\nde\r\n0\r\nX-Trailer: t\r\n\r\n"
UPGRADE = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
GET = b"GET /g HTTP/1.1\r\nHost: h\r\n\r\n"
STREAM = post(b"one") + b"\r\n" + CHUNKED + GET + post(b"two", UPGRADE) + post(b"last", "Connection: close\r\n")


@given(st.lists(st.integers(0, len(STREAM)), max_size=40))
def test_any_cut_gives_the_same_requests(cuts: list[int]) -> None:
    requests = feed(STREAM, cuts)
    assert [(r.method, r.path, r.body, r.keep_alive, r.error) for r in requests] == [
        ("POST", "/p", b"one", True, None),
        ("POST", "/c", b"abcde", True, None),
        ("GET", "/g", b"", True, None),
        ("POST", "/p", b"two", True, None),
        ("POST", "/p", b"last", False, None),
    ]
    assert requests[0].path == "/p"
    assert b"x-trailer" not in requests[1].headers


def test_byte_by_byte() -> None:
    assert [r.body for r in feed(STREAM, list(range(len(STREAM))))] == [b"one", b"abcde", b"", b"two", b"last"]


@pytest.mark.parametrize(
    ("data", "bodies"),
    [
        (b"GET /a HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n" + post(b"x"), [b"", b"x"]),
        (CHUNKED.replace(b"Host: h\r\n", b"Host: h\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n") + post(b"x"), [b"abcde", b"x"]),
        (post(b"x", "Connection: upgrade, close\r\nUpgrade: h2c\r\n") + post(b"not read"), [b"x"]),
        (post(b"x", "Connection: close\r\n") + b"\0 rubbish after the last request", [b"x"]),
    ],
)
def test_an_offered_upgrade_is_ignored_and_its_body_read(data: bytes, bodies: list[bytes]) -> None:
    for cuts in ([], list(range(len(data)))):
        requests = feed(data, cuts)
        assert [r.body for r in requests] == bodies
        assert all(r.error is None for r in requests)


@pytest.mark.parametrize("step", [None, 1])
@pytest.mark.parametrize(
    "head",
    [
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1, 1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: +1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0x1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: xchunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n",
        b"POST / HTTP/1.0\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: x\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1\nx\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nxx\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\ng\r\nx\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\nx\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nX: a\r\n folded\r\n\r\n",
        b"GET / HTTP/1.1\nHost: h\n\n",
        b"GET / HTTP/1.1\r\nHost: h\nX: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nX: a\rb\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nX: a\0b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : h\r\n\r\n",
        b"GET / HTTP/1.1\r\n Host: h\r\n\r\n",
        b"GET http://h/ HTTP/1.1\r\nHost: h\r\n\r\n",
        b"CONNECT h:1 HTTP/1.1\r\nHost: h\r\n\r\nrubbish",
        b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/2.0\r\nHost: h\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /\xc3\xa9 HTTP/1.1\r\nHost: h\r\n\r\n",
    ],
)
def test_shapes_that_smuggle_are_refused(head: bytes, step: int | None) -> None:
    assert refused(head + b"GET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n", step).status in (400, 505)


def test_nothing_after_a_refused_head_is_read() -> None:
    parser = reader()
    bad = b"GET / HTTP/1.1\r\nHost : h\r\n\r\n"
    assert len(parser.feed(post(b"a") + bad + post(b"b"))) == 2
    assert parser.failed
    assert parser.feed(post(b"c")) == []


@pytest.mark.parametrize("step", [64 * 1024, 4096])
@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /" + b"a" * URL_LIMIT + b" HTTP/1.1\r\nHost: h\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"a" * HEAD_LIMIT + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: h\r\n" + b"X: y\r\n" * (HEAD_LIMIT // 6) + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"a" * 4 * HEAD_LIMIT, 431),  # and no end in sight
        (b"\r\n" * HEAD_LIMIT, 431),
        (CHUNKED[:-2] + b"Y: " + b"a" * 4 * HEAD_LIMIT, 431),
        (CHUNKED[: CHUNKED.index(b"x=y")] + b"a" * 4 * HEAD_LIMIT, 431),
        (post(b"x" * (LIMIT + 1)), 413),
        (CHUNKED[: CHUNKED.index(b"3;x")] + b"%x\r\n" % (LIMIT + 1) + b"x" * (LIMIT + 1), 413),
    ],
)
def test_limits(data: bytes, status: int, step: int | None) -> None:
    assert refused(data, step).status == status


def test_limits_are_not_off_by_one() -> None:
    (request,) = feed(post(b"x" * LIMIT))
    assert request.error is None
    assert len(request.body) == LIMIT
    (request,) = feed(b"GET /" + b"a" * (URL_LIMIT - 1) + b" HTTP/1.1\r\nHost: h\r\n\r\n")
    assert request.error is None


def test_a_declared_length_is_refused_before_the_body_comes() -> None:
    assert refused(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999999\r\n\r\n").status == 413


def test_a_judged_request_keeps_no_body_and_the_connection_goes_on() -> None:
    parser = RequestReader(lambda request: UsageError("no") if request.path == "/p" else None, body_limit=LIMIT)
    first, second = parser.feed(post(b"x" * 1000) + CHUNKED)
    assert (str(first.error), first.body, first.keep_alive) == ("no", b"", True)
    assert (second.error, second.body) == (None, b"abcde")


def test_expect_is_told_until_the_body_comes() -> None:
    parser = reader()
    whole = post(b"ab", "Expect: 100-continue\r\n")
    assert parser.feed(whole[:-2]) == []
    assert parser.expecting
    assert parser.feed(whole[-2:])[0].body == b"ab"
    assert not parser.expecting


def test_a_refused_request_that_expects_is_answered_without_its_body() -> None:
    parser = RequestReader(lambda request: UsageError("no"), body_limit=LIMIT)
    (request,) = parser.feed(post(b"ab", "Expect: 100-continue\r\n")[:-2])
    assert (str(request.error), request.keep_alive, parser.failed) == ("no", False, True)


# -- answers


def read(data: bytes, cuts: list[int] | None = None) -> tuple[ResponseReader, bytes, bool]:
    parser, body, done = ResponseReader(), b"", False
    edges = [0, *sorted(cuts or []), len(data)]
    for a, b in pairwise(edges):
        if a < b:
            _, pieces, done = parser.feed(data[a:b])
            body += b"".join(pieces)
    return parser, body, done


ANSWERED = (
    b"HTTP/1.1 103 Early\r\nContent-Length: 7\r\nX-Early: 1\r\n\r\n"
    b"HTTP/1.1 200 Fine by me\r\nServer: llama.cpp\r\nX-Kept: yes\r\n"
    b"Connection: X-Hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\nSet-Cookie: a=b\r\nAccess-Control-Allow-Origin: *\r\n"
    b"X-LLM-Ticket: forged\r\nContent-Type: text/event-stream\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n4\r\ndata\r\n3;ext=1\r\n: x\r\n0\r\nX-Trailer: 1\r\n\r\n"
)


@given(st.lists(st.integers(0, len(ANSWERED)), max_size=40))
def test_any_cut_gives_the_same_answer(cuts: list[int]) -> None:
    parser, body, done = read(ANSWERED, cuts)
    assert parser.head is not None
    assert (parser.head.status, parser.head.reason, body, done, parser.reusable) == (200, b"Fine by me", b"data: x", True, True)
    assert parser.head.lines == [b"X-Kept: yes\r\n", b"Content-Type: text/event-stream\r\n"]
    assert (parser.head.chunked, parser.head.length, parser.head.until_close) == (True, None, False)


@pytest.mark.parametrize(
    ("data", "body", "reusable"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab", b"ab", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nabHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nc", b"ab", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nabrubbish", b"ab", False),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nabrubbish", b"ab", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nab", b"ab", False),
        (b"HTTP/1.1 204 None\r\n\r\n", b"", True),
        (b"HTTP/1.1 204 None\r\nTransfer-Encoding: chunked\r\n\r\n", b"", True),
    ],
)
def test_the_end_of_an_answer(data: bytes, body: bytes, reusable: bool) -> None:
    for cuts in ([], list(range(len(data)))):
        parser, got, done = read(data, cuts)
        assert (got, done, parser.reusable) == (body, True, reusable)
        assert parser.head is not None
        assert not parser.head.until_close


def test_an_answer_until_close() -> None:
    parser, body, done = read(b"HTTP/1.1 200 OK\r\n\r\nabc")
    assert parser.head is not None
    assert (body, done, parser.head.until_close) == (b"abc", False, True)


@pytest.mark.parametrize(
    "data",
    [
        b"rubbish",
        b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 1\n\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 4 * HEAD_LIMIT,
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * HEAD_LIMIT + b"\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: " + b"a" * 4 * HEAD_LIMIT,
    ],
)
def test_answers_that_cannot_be_relayed(data: bytes) -> None:
    for step in (64 * 1024, 1 if len(data) < 1000 else 4096):
        with pytest.raises(RemoteProtocolError):
            read(data, list(range(0, len(data), step)))


def test_one_reader_for_many_answers() -> None:
    parser = ResponseReader()
    for text in (b"one", b"two"):
        parser.reset()
        head, body, done = parser.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n" + text)
        assert head is not None
        assert (b"".join(body), done, parser.reusable) == (text, True, True)
