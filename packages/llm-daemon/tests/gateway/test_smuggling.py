"""Request smuggling: whatever two parsers could read differently is refused, and no engine sees a second or altered request.

RFC 9112, section 11.2, and the cases that desynchronised others.  Each attack ends with a request of its own, which must
reach no engine unless our parser and everybody's read it as one.
"""

from __future__ import annotations

from typing import Any

import pytest

from .fakes import BODY, CHAT, TOKEN, World

HOST = b"Host: localhost\r\n"
SMUGGLED = b"POST /completion HTTP/1.1\r\n" + HOST + b'Content-Length: 16\r\n\r\n{"n_discard":-1}'
JSON = b"Content-Type: application/json\r\nAuthorization: Bearer %b\r\n" % TOKEN.encode()
POST = b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST + JSON
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)

CASES = {
    # lengths and codings that contradict each other
    "CL.TE": POST + LENGTH + CHUNKED + b"\r\n" + CHUNKS,
    "TE.CL": POST + CHUNKED + LENGTH + b"\r\n" + CHUNKS,
    "CL.0 and TE": POST + b"Content-Length: 0\r\n" + CHUNKED + b"\r\n" + CHUNKS,
    "two lengths": POST + LENGTH + b"Content-Length: 0\r\n\r\n" + BODY,
    "two equal lengths": POST + LENGTH + LENGTH + b"\r\n" + BODY,
    "a list of lengths": POST + b"Content-Length: %d, %d\r\n\r\n" % (len(BODY), len(BODY)) + BODY,
    # lengths that are none
    "length with a plus": POST + b"Content-Length: +%d\r\n\r\n" % len(BODY) + BODY,
    "length with a minus": POST + b"Content-Length: -1\r\n\r\n" + BODY,
    "length in hex": POST + b"Content-Length: 0x1b\r\n\r\n" + BODY,
    "length with a space": POST + b"Content-Length: 2 7\r\n\r\n" + BODY,
    "length with an underscore": POST + b"Content-Length: 2_7\r\n\r\n" + BODY,
    "length with an exponent": POST + b"Content-Length: 2e1\r\n\r\n" + BODY,
    "empty length": POST + b"Content-Length: \r\n\r\n" + BODY,
    "length beyond 64 bits": POST + b"Content-Length: 18446744073709551643\r\n\r\n" + BODY,
    "length in other digits": POST + "Content-Length: ２７\r\n\r\n".encode() + BODY,
    # codings (TE.TE)
    "coding xchunked": POST + b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNKS,
    "coding chunked twice": POST + CHUNKED + CHUNKED + b"\r\n" + CHUNKS,
    "coding chunked, identity": POST + CHUNKED + b"Transfer-Encoding: identity\r\n\r\n" + CHUNKS,
    "coding identity, chunked": POST + b"Transfer-Encoding: identity\r\n" + CHUNKED + b"\r\n" + CHUNKS,
    "coding in a list": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKS,
    "coding quoted": POST + b'Transfer-Encoding: "chunked"\r\n\r\n' + CHUNKS,
    "coding with a parameter": POST + b"Transfer-Encoding: chunked;q=1\r\n\r\n" + CHUNKS,
    "coding before the colon": POST + b"Transfer-Encoding : chunked\r\n\r\n" + CHUNKS,
    "coding behind a control": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n" + CHUNKS,
    "coding folded": POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n" + CHUNKS,
    "coding behind a fold": POST + b"X: y\r\n Transfer-Encoding: chunked\r\n\r\n" + CHUNKS,
    "coding behind a bare LF": POST + b"X: y\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKS,
    "coding behind a bare CR": POST + b"X: y\rTransfer-Encoding: chunked\r\n\r\n" + CHUNKS,
    "coding of HTTP/1.0": POST.replace(b"1.1", b"1.0", 1) + CHUNKED + b"\r\n" + CHUNKS,
    "empty coding": POST + b"Transfer-Encoding: \r\n\r\n" + CHUNKS,
    # chunks
    "chunk size with a sign": POST + CHUNKED + b"\r\n+1b\r\n" + BODY + b"\r\n0\r\n\r\n",
    "chunk size with 0x": POST + CHUNKED + b"\r\n0x1b\r\n" + BODY + b"\r\n0\r\n\r\n",
    "chunk size behind a space": POST + CHUNKED + b"\r\n 1b\r\n" + BODY + b"\r\n0\r\n\r\n",
    "chunk size beyond 64 bits": POST + CHUNKED + b"\r\n1000000000000001b\r\n" + BODY + b"\r\n0\r\n\r\n",
    "empty chunk size": POST + CHUNKED + b"\r\n\r\n" + BODY + b"\r\n0\r\n\r\n",
    "chunk ended by LF": POST + CHUNKED + b"\r\n1b\n" + BODY + b"\r\n0\r\n\r\n",
    "chunk longer than it says": POST + CHUNKED + b"\r\n5\r\n" + BODY + b"\r\n0\r\n\r\n",
    "extension with a bare LF": POST + CHUNKED + b"\r\n1b;a\nb\r\n" + BODY + b"\r\n0\r\n\r\n",
    "extension with a bare CR": POST + CHUNKED + b"\r\n1b;a\rb\r\n" + BODY + b"\r\n0\r\n\r\n",
    "last chunk ended by LF": POST + CHUNKED + b"\r\n1b\r\n" + BODY + b"\r\n0\n\n",
    "length in a trailer": POST + CHUNKED + b"\r\n1b\r\n" + BODY + b"\r\n0\r\nContent-Length: 9\r\n\r\n",
    # heads
    "space before the colon": b"POST /v1/chat/completions HTTP/1.1\r\nHost : localhost\r\n" + JSON + LENGTH + b"\r\n" + BODY,
    "space in a name": POST + b"Content Length: 5\r\n" + LENGTH + b"\r\n" + BODY,
    "a name with a NUL": POST + b"X\0Y: z\r\n" + LENGTH + b"\r\n" + BODY,
    "a value with a NUL": POST + b"X: a\0b\r\n" + LENGTH + b"\r\n" + BODY,
    "a value with a CR": POST + b"X: a\rb\r\n" + LENGTH + b"\r\n" + BODY,
    "no name": POST + b": x\r\n" + LENGTH + b"\r\n" + BODY,
    "no colon": POST + b"Transfer-Encoding chunked\r\n" + LENGTH + b"\r\n" + BODY,
    "bare line feeds": (POST + LENGTH + b"\r\n").replace(b"\r\n", b"\n") + BODY,
    "folded": POST + b"X: a\r\n\tb\r\n" + LENGTH + b"\r\n" + BODY,
    "folded at the start": POST.replace(HOST, b" X: y\r\n" + HOST) + LENGTH + b"\r\n" + BODY,
    # request lines
    "absolute target": POST.replace(b"/v1", b"http://localhost/v1", 1) + LENGTH + b"\r\n" + BODY,
    "target of another host": POST.replace(b"/v1", b"http://evil.example/v1", 1) + LENGTH + b"\r\n" + BODY,
    "CONNECT": b"CONNECT localhost:80 HTTP/1.1\r\n" + HOST + b"\r\n",
    "asterisk": b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n",
    "a space in the target": POST.replace(b"/v1/chat", b"/v1/ chat", 1) + LENGTH + b"\r\n" + BODY,
    "a tab for a space": POST.replace(b"POST ", b"POST\t", 1) + LENGTH + b"\r\n" + BODY,
    "a CR in the target": POST.replace(b"/v1/chat", b"/v1/\rchat", 1) + LENGTH + b"\r\n" + BODY,
    "no version": POST.replace(b" HTTP/1.1", b"", 1) + LENGTH + b"\r\n" + BODY,
    "version 1.2": POST.replace(b"1.1", b"1.2", 1) + LENGTH + b"\r\n" + BODY,
    "version 0.9": POST.replace(b"1.1", b"0.9", 1) + LENGTH + b"\r\n" + BODY,
    "version 2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "unknown method": POST.replace(b"POST", b"SMUGGLE", 1) + LENGTH + b"\r\n" + BODY,
    "two hosts": POST + HOST + LENGTH + b"\r\n" + BODY,
}
# Refused once the request is understood: where it ends is beyond doubt, and the connection may go on.
UNDERSTOOD = {"two hosts"}


@pytest.mark.parametrize("name", CASES)
def test_what_smuggles_is_refused(run: Any, world: Any, name: str) -> None:
    async def main() -> None:
        async with world() as w:
            known = await w.client()
            for _ in range(3):  # a head that was read before is not read again
                known.send(POST + LENGTH + b"\r\n" + BODY)
                assert (await known.answer()).status == 200
            before = len(w.engine.calls), len(w.desk.log.items)
            for step in (0, 1):
                client = await w.client()
                data = CASES[name] + (SMUGGLED if name not in UNDERSTOOD else b"")
                for at in range(0, len(data), step or len(data)):
                    client.send(data[at : at + (step or len(data))])
                answer = await client.answer()
                assert answer.status in (400, 404, 505), answer
                if name not in UNDERSTOOD:
                    assert answer.headers["connection"] == "close"
                    assert await client.closed()
            assert (len(w.engine.calls), len(w.desk.log.items)) == before

    run(main())


KNOWN = POST + LENGTH + b"\r\n"


@pytest.mark.parametrize(
    ("data", "bodies"),
    [
        (KNOWN + BODY + KNOWN + BODY, [BODY, BODY]),
        (POST + b"Content-Length: 2\r\n\r\n{}", [b"{}"]),
        (POST + b"Content-Length: 002\r\n\r\n{}", [b"{}"]),
        (POST + b"content-length:2\r\n\r\n{}", [b"{}"]),
        (KNOWN.replace(b"\r\n\r\n", b"\r\nX-A: Content-Length: 3\r\n\r\n") + BODY, [BODY]),
        (KNOWN.replace(HOST, b"X-A: b\r\n" + HOST) + BODY, [BODY]),
    ],
)
def test_a_known_head_is_still_read_right(run: Any, world: Any, data: bytes, bodies: list[bytes]) -> None:
    async def main() -> None:
        async with world() as w:
            for step in (0, 1, 0):
                client = await w.client()
                client.send(KNOWN + BODY)
                assert (await client.answer()).status == 200
                before = len(w.engine.calls)
                for at in range(0, len(data), step or len(data)):
                    client.send(data[at : at + (step or len(data))])
                for _ in bodies:
                    assert (await client.answer()).status == 200
                assert [call.body for call in w.engine.calls[before:]] == bodies

    run(main())


async def seen(w: World, data: bytes, answers: int) -> list[bytes]:
    """Bodies that reached the engine."""
    client = await w.client()
    client.send(data)
    assert [(await client.answer()).status for _ in range(answers)] == [200] * answers
    return [call.body for call in w.engine.calls]


@pytest.mark.parametrize(
    ("data", "bodies"),
    [
        # read as RFC 9112 says, and written anew: the engine sees no coding, extension or trailer
        (POST + CHUNKED + b"\r\n" + CHUNKS, [BODY]),
        (POST + b"transfer-encoding:\tCHUNKED \r\n\r\n" + CHUNKS, [BODY]),
        (POST + CHUNKED + b'\r\n1b;a="x;y"\r\n' + BODY + b"\r\n0\r\nHost: evil\r\nX-LLM-Lane: nowhere\r\n\r\n", [BODY]),
        (POST + CHUNKED + b"\r\n00001B\r\n" + BODY + b"\r\n000\r\n\r\n", [BODY]),
        (POST + b"Content-Length: 027\r\n\r\n" + BODY, [BODY]),
        (POST + LENGTH + b"\r\n" + BODY + POST + CHUNKED + b"\r\n" + CHUNKS, [BODY, BODY]),
        (b"\r\n\r\n" + POST + LENGTH + b"\r\n" + BODY, [BODY]),
        (POST + b"Content_Length: 5\r\nTransfer_Encoding: chunked\r\n" + LENGTH + b"\r\n" + BODY, [BODY]),
        (POST + b"Connection: upgrade\r\nUpgrade: h2c\r\n" + LENGTH + b"\r\n" + BODY, [BODY]),
        (POST + b"Connection: upgrade\r\nUpgrade: websocket\r\n" + CHUNKED + b"\r\n" + CHUNKS, [BODY]),
        (POST + b"Connection: content-length, host\r\n" + LENGTH + b"\r\n" + BODY, [BODY]),
    ],
)
def test_what_everybody_reads_alike_passes_in_our_own_words(run: Any, world: Any, data: bytes, bodies: list[bytes]) -> None:
    async def main() -> None:
        async with world() as w:
            assert await seen(w, data, len(bodies)) == bodies
            for call in w.engine.calls:
                assert call.head.startswith(b"POST %b HTTP/1.1\r\nHost: localhost\r\n" % CHAT.encode())
                assert call.headers["content-length"] == str(len(BODY))
                assert call.headers.keys() <= {"host", "content-type", "content-length"}

    run(main())


def test_a_body_that_looks_like_requests_is_one_body(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            body = b'{"model":"m","x":"' + SMUGGLED.replace(b'"', b"'").replace(b"\r\n", b"\\r\\n") + b'"}'
            data = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
            assert await seen(w, data, 1) == [body]

    run(main())


def test_a_get_with_a_body_smuggles_nothing(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            head = b"GET /health HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED)
            client.send(head + SMUGGLED + b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n")
            assert [(await client.answer()).status for _ in range(2)] == [200, 200]
            client.send(
                b"GET /upstream/m/x HTTP/1.1\r\n" + HOST + JSON + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED
            )
            assert (await client.answer()).error["code"] == "bad_json"
            assert w.engine.calls == []

    run(main())


@pytest.mark.parametrize("name", ["%0d%0aX:%20y", "%00", "a%0d%0a%0d%0aGET%20%2F"])
def test_a_model_of_line_feeds_makes_no_header(run: Any, world: Any, name: str) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            assert (await client.ask("GET", f"/upstream/{name}/x")).status == 200
            assert w.engine.calls[0].head.startswith(b"GET /x HTTP/1.1\r\n")
            assert (await client.ask("GET", f"/upstream/m/{name}?{name}")).status == 200
            assert w.engine.calls[1].head.startswith(b"GET /%b?%b HTTP/1.1\r\n" % (name.encode(), name.encode()))

    run(main())
