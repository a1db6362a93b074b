"""Each reader of strangers' bytes, as a function of bytes that raises AssertionError when it does what it must not.

All are fed twice, whole and in pieces, and must say the same; where another parser exists, it must agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any
from zlib import crc32

import h11
import msgspec

from llm_daemon.core import control, firewall
from llm_daemon.core.assemble import Assembler, ask_to_stream
from llm_daemon.core.openai import read_form, read_wanted
from llm_daemon.core.sse import Event, Splitter
from llm_daemon.daemon.heads import Answers, Heads
from llm_daemon.daemon.http1 import Head, Request, RequestReader, ResponseReader
from llm_daemon.errors import RemoteProtocolError, UsageError

from . import corpus

SMALL = 8 * 1024  # bytes below which no limit (the least is that of a URL) depends on how the bytes arrived
ROUTES = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/completion"]
ASKED = [b"{}", b'{"stop":["a"]}', b'{"n_probs":2}', b'{"max_output_tokens":2,"stop_sequences":["a"],"response_fields":["a/b"]}']


def pieces(data: bytes) -> list[bytes]:
    return corpus.cut(Random(crc32(data)), data)


def requests(data: bytes) -> None:
    """RequestReader: any cut gives the same, and h11 agrees on whatever it accepts."""

    def read(parts: list[bytes], heads: Heads | None = None) -> list[Request]:
        reader = RequestReader(_judge, body_limit=10_000, heads=heads)
        return [request for part in parts for request in reader.feed(part)]

    whole = read([data])
    known = [_shown(r) for r in read([data], _HEADS)]
    assert known == [_shown(r) for r in whole], "a head that was read before makes a difference"
    for request in whole:
        message = request.error.message if request.error else ""
        assert "allback" not in message, f"a callback raised: {message}"
    if len(data) < SMALL:
        seen = [_shown(r) for r in read(pieces(data))]
        assert seen == [_shown(r) for r in whole], "the cut makes a difference"
    _compare(data, [r for r in whole if r.error is None])


_HEADS, _ANSWERS = Heads(), Answers()  # shared by all runs, as they are by all connections


def _judge(request: Request) -> None:
    request.tunnel = request.headers.get(b"upgrade", b"").lower() == b"websocket" and request.method == "GET"


def _shown(r: Request) -> tuple[Any, ...]:
    headers = {name: value for name, value in r.headers.items() if name != b"content-length"}  # nobody reads that any more
    what = r.error.status if r.error else (r.path, r.query, r.body, headers)
    return (r.method, r.keep_alive, r.tunnel, what)


def _compare(data: bytes, accepted: list[Request]) -> None:
    server = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    server.receive_data(data)
    with suppress(h11.RemoteProtocolError):  # it is stricter in places, and asks for a Host: the guard does so here
        for ours in accepted:
            theirs, body = server.next_event(), b""
            if not isinstance(theirs, h11.Request):
                return
            while isinstance(event := server.next_event(), h11.Data):
                body += event.data
            target = ours.path.encode("latin-1") + (b"?" + ours.query if ours.query else b"")
            assert theirs.method.decode() == ours.method
            assert theirs.target.rstrip(b"?") == target.rstrip(b"?"), (theirs.target, target)
            assert isinstance(event, h11.EndOfMessage), f"h11 waits for more of a request that was taken as whole: {event}"
            assert body == ours.body
            if not ours.keep_alive:
                return
            server.send(h11.Response(status_code=200, headers=[("Content-Length", "0")]))
            server.send(h11.EndOfMessage())
            if server.our_state is not h11.DONE or server.their_state is not h11.DONE:
                return
            server.start_next_cycle()


def answers(data: bytes) -> None:
    """ResponseReader: any cut gives the same, and h11 agrees on status and body."""

    def read(parts: list[bytes], known: Answers | None = None) -> tuple[Any, bytes, bool, bool]:
        reader, head, body = ResponseReader(known), None, b""
        reader.reset(may_switch)
        for part in parts:
            new, more, last = reader.feed(part)
            assert not (new and head), "two heads"
            head = head or new
            assert head or not more, "a body without a head"
            assert all(more), "an empty piece would end a chunked body"
            body += b"".join(more)
            if last:
                return head, body, True, reader.reusable
        return head, body, False, False

    may_switch = data.endswith(b"frames")
    try:
        head, body, last, reusable = read([data])
    except RemoteProtocolError as e:
        assert "allback" not in e.message, f"a callback raised: {e.message}"
        return
    known = read([data], _ANSWERS)
    assert (_same(head), body, last, reusable) == (_same(known[0]), *known[1:]), "a head that was read before makes a difference"
    try:
        assert (head, body, last) == read(pieces(data))[:3], "the cut makes a difference"
    except RemoteProtocolError as e:
        assert "larger" in e.message, e.message  # what comes in one read may be larger
    if not last or head is None:
        return
    assert 200 <= head.status <= 599, head.status
    client = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "h")]))
    client.send(h11.EndOfMessage())
    client.receive_data(data)
    with suppress(h11.RemoteProtocolError):
        theirs = b""
        while isinstance(event := client.next_event(), h11.InformationalResponse):
            pass
        assert isinstance(event, h11.Response) and event.status_code == head.status
        while isinstance(event := client.next_event(), h11.Data):
            theirs += event.data
        assert isinstance(event, h11.EndOfMessage) and theirs == body


def _same(head: Head | None) -> Any:
    return head and (head.status, head.reason, b"".join(head.lines), head.length, head.chunked, head.content_type)


def form(data: bytes) -> None:
    kind, _, body = data.partition(b"\n") if data.startswith(b"multipart") else (b"multipart/form-data; boundary=x", b"", data)
    with suppress(UsageError):
        firewall.check_form(read_form(body, kind)[1])


def wanted(data: bytes) -> None:
    """What a JSON body asks for: only UsageError, and a stream is asked for in the same words."""
    try:
        found = read_wanted(data)
        firewall.check(found, data)
    except UsageError:
        return
    finally:
        for path in ROUTES:
            if (asked := ask_to_stream(path, data)) is not None:
                fields = msgspec.json.decode(asked[0], type=dict[str, msgspec.Raw])
                assert bytes(fields["stream"]) == b"true"
    if b"\\u" not in data and (word := re.search(rb'"(?:image_url|file)":"(https?:[^"]*)"}$', data)):
        raise AssertionError(f"let through: {word[1]!r}")


def events(data: bytes) -> None:
    """Splitter: as the standard's own words say, however the bytes arrive."""

    def read(parts: list[bytes]) -> list[Event]:
        splitter = Splitter()
        return [event for part in parts for event in splitter.feed(part)]

    expected: list[Event] = []
    lines, name = [], ""
    for line in re.split(rb"\r\n|\r|\n", data.removeprefix(b"\xef\xbb\xbf"))[:-1]:
        field, _, value = line.partition(b":")
        value = value[1:] if value[:1] == b" " else value
        if field == b"data":
            lines.append(value)
        elif field == b"event":
            name = value.decode(errors="replace")
        elif not line:
            expected += [Event(b"\n".join(lines), name)] if lines else []
            lines, name = [], ""
    assert read([data]) == expected
    assert read(pieces(data)) == expected


def assembled(data: bytes) -> None:
    """Assembler: only RemoteProtocolError, and the cut makes no difference."""

    def read(parts: list[bytes]) -> tuple[int, bytes] | str:
        made = ask_to_stream(route, asked)
        if made is None:
            return ""
        assembler: Assembler = made[1]
        try:
            for part in parts:
                assembler.feed(part)
            status, body = assembler.finish()
        except RemoteProtocolError as e:
            return e.code
        msgspec.json.decode(body)
        assert 200 <= status <= 599
        return status, body

    route, asked = ROUTES[data[:1][0] % len(ROUTES)] if data else ROUTES[0], ASKED[len(data) % len(ASKED)]
    data = data[1:]
    assert read([data]) == read(pieces(data))


def messages(data: bytes) -> None:
    """control.Decoder: only RemoteProtocolError; what it takes can be said again."""

    def read(parts: list[bytes]) -> list[dict[str, Any]] | None:
        decoder, out = control.Decoder(), []
        try:
            for part in parts:
                out += decoder.feed(part)
        except RemoteProtocolError:
            return None
        return out

    whole = read([data])
    if len(data) < SMALL:
        assert repr(read(pieces(data))) == repr(whole)
    for message in whole or ():
        if not re.search(r"\b(nan|inf)\b", repr(message)):
            assert control.Decoder(1 << 30).feed(control.encode(message)) == [message]


TARGETS: list[Callable[[bytes], None]] = [requests, answers, form, wanted, events, assembled, messages]


def _sse(stream: list[bytes]) -> bytes:
    return b"".join(b"data: %b\n\n" % event for event in stream)


SEEDS: list[list[bytes]] = [
    [*corpus.REQUESTS, corpus.REQUESTS[0] + corpus.get(b"/health") * 3],
    corpus.ANSWERS,
    [corpus.FORM, b'multipart/form-data; boundary="y"\n--y--', b"--x"],
    corpus.BODIES,
    [*map(_sse, corpus.STREAMS), b": ping\r\revent: a\rdata\r\r", b"\xef\xbb\xbfdata: a\ndata: b\n\n"],
    [bytes([n]) + _sse(stream) for n, stream in enumerate(corpus.STREAMS)],
    corpus.CONTROL,
]


def one(data: bytes) -> None:
    """Runs the target that the first byte names."""
    if data:
        TARGETS[data[0] % len(TARGETS)](data[1:])


def spoilt(rng: Random) -> bytes:
    """A seed with a few changes, for `one`."""
    n = rng.randrange(len(TARGETS))
    return bytes([n]) + corpus.spoil(rng, rng.choice(SEEDS[n]), SEEDS[n])
