"""HTTP/1.1 messages without IO: bytes in, requests or response parts out.

Both readers sit on llhttp (httptools) in its strict mode, which refuses what makes two parsers disagree: content-length
beside transfer-encoding, two content-lengths, folded headers, bare line feeds, odd chunk sizes (RFC 9112, section 11.2).
What llhttp does not bound - heads, trailers, chunk extensions - is bounded here.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING

import httptools
import msgspec

from ..core.routes import Route
from ..errors import LlmDaemonError, RemoteProtocolError, Unavailable, UsageError

if TYPE_CHECKING:
    from .heads import Answers, Heads

HEAD_LIMIT = 64 * 1024
URL_LIMIT = 8 * 1024
PHRASES = {status.value: status.phrase.encode() for status in HTTPStatus}

# Hop-by-hop (RFC 9110, section 7.6.1), written anew by us, or said by an engine about itself where we are the server.
_DROPPED = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade "
    b"content-length server set-cookie server-timing x-llm-ticket x-llm-instance x-llm-replayed".split()
)


# Structs and not dataclasses here and in gateway.py: made for each request, at a third of the cost.
class Request(msgspec.Struct):
    """One request.  `headers` has lower-case names; `repeated` names those that came more than once (the last one counts).

    `path` is the target without its query, `query` what follows the question mark.  With an `error` the request is only
    to be refused, and `body` was thrown away.  `keep_alive` is False for the last request of a connection.  `tunnel`
    means that its answer may switch protocols; then it is the last one, and what follows it is not HTTP.
    """

    method: str = ""
    path: str = ""
    query: bytes = b""
    version: str = "1.1"
    keep_alive: bool = True
    headers: dict[bytes, bytes] = {}
    repeated: frozenset[bytes] = frozenset()
    body: bytes = b""
    error: LlmDaemonError | None = None
    route: Route | None = None  # left here by the judge
    tunnel: bool = False
    held: int = 0  # bytes of body that `RequestReader`'s `hold` granted
    wishes: bool = False  # it has headers of our own
    memo: dict[str, bytes] | None = None  # what was made of a head that is known, by whoever makes it


class RequestReader:
    """Bytes of one client connection in, requests out.

    `judge` sees each request once its head is known; the error it returns is kept in the request, whose body is then
    not stored.  It must not raise.  `expecting` is True while a client waits for `100 Continue`.  After `failed` (the
    connection cannot be understood or trusted any further) and after a last request, all further bytes are ignored.
    `hold` is asked before bytes of a body are kept, and may refuse; `is_partial` is True in the middle of a request.
    `heads` may be shared by all readers with the same judge.
    """

    def __init__(
        self,
        judge: Callable[[Request], LlmDaemonError | None],
        *,
        body_limit: int,
        hold: Callable[[int], bool] = lambda size: True,
        heads: Heads | None = None,
    ) -> None:
        self._judge, self._body_limit, self._hold, self._heads = judge, body_limit, hold, heads
        self._parser = httptools.HttpRequestParser(self)
        self._request: Request | None = None
        self._url = b""
        self._pairs: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._size = 0
        # Bytes since the parser last gave us something: bounds what it holds back itself, with one read of leeway.
        self._unfruitful = 0
        self._upgrade = self._resuming = False
        self._ready: list[Request] = []
        self.expecting = self.done = self.failed = False
        self.rest = b""  # what came behind a request that switches protocols

    @property
    def is_partial(self) -> bool:
        return not self.done and (self._request is not None or self._unfruitful > 0)

    def feed(self, data: bytes) -> list[Request]:
        """The requests that these bytes complete, in order."""
        if self.done:
            return []
        heads = None if self._request is not None or self._unfruitful else self._heads
        if heads is not None and (found := heads.find(data)) is not None:
            known, at, size = found
            if len(data) == at + size <= self._body_limit and self._hold(size):
                return [
                    Request(
                        known.method, known.path, known.query, "1.1", True, known.headers, known.repeated, data[at:], None,
                        known.route, False, size, known.wishes, known.memo,
                    )
                ]  # fmt: skip
        self._unfruitful += len(data)
        whole = data
        while data:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                if self.done:  # a tunnel
                    self.rest = data
                self._resume()
                if not self.done:
                    continue
            except httptools.HttpParserError as e:
                self._fail(400, f"malformed HTTP request: {e}")
            break
        if self._unfruitful > HEAD_LIMIT:
            self._fail(431, f"request head larger than {HEAD_LIMIT} bytes")
        ready, self._ready = self._ready, []
        if heads is not None and len(ready) == 1 and not self.is_partial:
            heads.learn(whole, ready[0])
        return ready

    def stop(self) -> int:
        """Forgets the unfinished request and ignores all further bytes; returns how many bytes of body it had."""
        held = self._request.held if self._request is not None else 0
        self.done, self.expecting, self._request, self._body = True, False, None, []
        return held

    def _resume(self) -> None:
        """Goes on after a head that offered an upgrade, which a server may ignore (RFC 9110, section 7.8).

        Java's HTTP client offers h2c with its first request, a POST too; llhttp then takes the body for another
        protocol's bytes.  So a fresh parser is told the framing again and reads the body.
        """
        if self.done or self._request is None:
            return
        told = (b"transfer-encoding", b"content-length", b"connection")
        again = [b"%b: %b\r\n" % (name, self._request.headers[name]) for name in told if name in self._request.headers]
        self._parser, self._resuming = httptools.HttpRequestParser(self), True
        self._parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % b"".join(again))
        self._resuming = False

    def _fail(self, status: int, message: str, code: str = "bad_request") -> None:
        if self.done:
            return
        request = self._request or Request()
        kind = Unavailable if status == 503 else UsageError  # the one may be asked again
        self.failed, request.error = True, kind(message, code=code, status=status)
        self._finish(request, keep_alive=False)

    def _finish(self, request: Request, keep_alive: bool) -> None:
        request.keep_alive = keep_alive
        request.body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._ready.append(request)
        self._request, self._body, self.expecting = None, [], False
        self.done = self.done or not keep_alive

    # -- called by httptools

    def on_message_begin(self) -> None:
        if not (self.done or self._resuming):
            self._request, self._url, self._size, self._pairs = Request(), b"", 0, []

    def on_url(self, url: bytes) -> None:
        if self.done or self._resuming:
            return
        self._url += url
        if len(self._url) > URL_LIMIT:
            self._fail(414, f"URL longer than {URL_LIMIT} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._pairs.append((name.lower(), value.strip()))

    def on_headers_complete(self) -> None:
        unfruitful, self._unfruitful = self._unfruitful, 0
        request = self._request
        if self.done or self._resuming or request is None:
            return
        pairs, self._pairs = self._pairs, []  # what comes from here on are trailers: nothing in them is of use to us
        self._upgrade = self._parser.should_upgrade()
        request.method = self._parser.get_method().decode("ascii")
        request.version = self._parser.get_http_version()
        path, _, request.query = self._url.partition(b"?")
        request.path = path.decode("latin-1")
        request.headers = headers = dict(pairs)
        request.wishes = any(name.startswith(b"x-llm-") for name in headers)
        if len(headers) < len(pairs):
            seen: set[bytes] = set()  # and never a count for each: a head of many short lines would take seconds
            request.repeated = frozenset(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        coding = headers.get(b"transfer-encoding")
        if request.version not in ("1.1", "1.0"):
            return self._fail(505, f"HTTP/{request.version} is not spoken here")
        if unfruitful > HEAD_LIMIT and sum([len(name) + len(value) + 4 for name, value in pairs]) > HEAD_LIMIT:
            return self._fail(431, f"request head larger than {HEAD_LIMIT} bytes")
        if not self._url.startswith(b"/"):
            return self._fail(400, "the request target must be a path")
        if coding is not None and (
            coding.lower() != b"chunked" or request.version == "1.0" or b"transfer-encoding" in request.repeated
        ):
            return self._fail(400, "only transfer-encoding chunked of HTTP/1.1 is understood")
        if int(headers.get(b"content-length") or 0) > self._body_limit:
            return self._fail(413, f"request body larger than {self._body_limit} bytes")
        request.error = self._judge(request)
        request.tunnel = request.tunnel and self._upgrade  # `Upgrade` alone, without `Connection`, offers nothing
        if headers.get(b"expect", b"").lower() == b"100-continue" and request.version == "1.1":
            if request.error is None:
                self.expecting = True
            else:  # the client waits with its body; whether it will still send it is unknown, so nothing can follow
                self.failed = True
                self._finish(request, keep_alive=False)

    def on_body(self, piece: bytes) -> None:
        self._unfruitful, self.expecting = 0, False
        request = self._request
        if request is None:
            return
        if self._size + len(piece) > self._body_limit:
            self._body = []
            self._fail(413, f"request body larger than {self._body_limit} bytes")
        elif request.error is None:
            if not self._hold(len(piece)):
                self._body = []
                self._fail(503, "too many large requests are being sent at once", "busy")
                return
            self._size += len(piece)
            request.held += len(piece)
            self._body.append(piece)

    def on_message_complete(self) -> None:
        self._unfruitful = 0
        request = self._request
        if request is None or self.done or self._resuming:
            return
        if self._upgrade:  # llhttp reports the end of the head as the end of the message; see _resume
            self._upgrade = False
            if b"transfer-encoding" in request.headers or int(request.headers.get(b"content-length") or 0):
                request.tunnel = False  # no protocol begins with a body
                return
        self._finish(request, keep_alive=self._parser.should_keep_alive() and not request.tunnel)


class Head(msgspec.Struct):
    """The head of an engine's answer: `lines` are its end-to-end headers, ready to be written.

    `length` is the content-length as sent, None if there is none; with neither `length` nor `chunked` the body ends
    with the connection (`until_close`), unless the status allows none.
    """

    status: int
    reason: bytes
    lines: list[bytes] = []
    length: bytes | None = None
    chunked: bool = False
    content_type: bytes = b""

    @property
    def until_close(self) -> bool:
        return not (self.chunked or self.length is not None or self.status in (204, 304))


class ResponseReader:
    """Bytes of one engine connection in, answers out; interim (1xx) answers are swallowed.

    One reader reads answer after answer: `reset` before each request.  After a complete answer `reusable` tells
    whether the connection may carry another one.
    """

    def __init__(self, answers: Answers | None = None) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._answers = answers
        self._unfruitful = 0
        self.reset()

    def reset(self, may_switch: bool = False) -> None:
        """`may_switch`: an answer of status 101 is one, and all bytes behind it are its body."""
        self._may_switch, self._switched, self._begun = may_switch, False, False
        self._reason = b""
        self._pairs: list[tuple[bytes, bytes]] = []
        self._broken = ""
        self._new_head: Head | None = None
        self._body: list[bytes] = []
        self._interim = self._complete = False
        self.head: Head | None = None
        self.reusable = False

    def feed(self, data: bytes) -> tuple[Head | None, list[bytes], bool]:
        """(head if these bytes complete it, pieces of body without their framing, whether the answer is complete).

        Raises RemoteProtocolError when this is not an answer that can be relayed.
        """
        if self._switched:
            return None, [data], False
        answers = self._answers
        begins = answers is not None and not self._begun and not self._may_switch
        self._begun = True
        if answers is not None and begins and (found := answers.find(data)) is not None:
            self.head, at = found
            self._complete = self.reusable = True
            return self.head, [data[at:]] if at < len(data) else [], True
        self._unfruitful += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as e:
            if self._switched and isinstance(e, httptools.HttpParserUpgrade):
                self._complete, self._unfruitful = False, 0
                self._body = [rest] if (rest := data[e.args[0] :]) else []
            elif not self._complete:  # what follows a complete answer only costs the connection
                raise RemoteProtocolError(f"malformed HTTP answer: {e}") from None
            self.reusable = False
        if self._switched and self._complete:
            self._broken = "it switched protocols and did not say so in its headers"
        if self._broken:
            raise RemoteProtocolError(self._broken)
        if self._unfruitful > HEAD_LIMIT:
            raise RemoteProtocolError(f"answer head larger than {HEAD_LIMIT} bytes")
        head, self._new_head = self._new_head, None
        body, self._body = self._body, []
        if answers is not None and begins and head is not None and self._complete and self.reusable:
            answers.learn(data, head)
        return head, body, self._complete

    # -- called by httptools

    def on_message_begin(self) -> None:
        if self._complete:
            self.reusable = False  # more than was asked for

    def on_status(self, reason: bytes) -> None:
        if not self._complete:
            self._reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        self._pairs.append((name, value.strip()))

    def on_headers_complete(self) -> None:
        unfruitful, self._unfruitful = self._unfruitful, 0
        pairs, self._pairs = self._pairs, []
        if self._complete:
            return
        status = self._parser.get_status_code()
        if not 100 <= status <= 599:
            self._broken = f"status {status}"
            return
        self._switched = status == 101 and self._may_switch
        if status < 200 and not self._switched:
            self._interim, self._reason = True, b""
            if status == 101:
                self._broken = "the engine switched protocols"
            return
        head = Head(status, self._reason or PHRASES.get(status, b""))
        hops = b""
        for name, value in pairs:
            low = name.lower()
            if low in _DROPPED:
                if low == b"content-length":
                    head.length = value
                elif low == b"transfer-encoding":
                    if head.chunked or value.lower() != b"chunked":
                        self._broken = "transfer-encoding other than chunked"
                    head.chunked = True
                elif low == b"connection":
                    hops += b"," + value.lower()
            elif not low.startswith(b"access-control-"):
                if low == b"content-type":
                    head.content_type = value.lower()
                head.lines.append(b"%b: %b\r\n" % (name, value))
        if hops not in (b"", b",close", b",keep-alive"):
            named = {token.strip() for token in hops.split(b",")}
            head.lines = [line for line in head.lines if line.partition(b":")[0].lower() not in named]
        if status in (204, 304):
            head.length, head.chunked = None, False
        if unfruitful > HEAD_LIMIT and sum([len(name) + len(value) + 4 for name, value in pairs]) > HEAD_LIMIT:
            self._broken = f"answer head larger than {HEAD_LIMIT} bytes"
        self.head = self._new_head = head

    def on_body(self, piece: bytes) -> None:
        self._unfruitful = 0
        if self._interim:  # llhttp knows which of them have no body, up to 103
            self._broken = "an interim answer with a body"
        elif not self._complete:
            self._body.append(piece)

    def on_message_complete(self) -> None:
        self._unfruitful = 0
        if self._interim:
            self._interim = False
        elif not self._complete:
            self._complete, self.reusable = True, self._parser.should_keep_alive()
