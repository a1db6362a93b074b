"""Heads of messages that were read and found good, by their bytes: what comes again is read once (docs/adr/0014)."""

from __future__ import annotations

import re

import msgspec

from .http1 import Head, Request

_LENGTH = re.compile(rb"\r\nContent-Length: ?([0-9]{1,8})(?=\r\n|$)", re.IGNORECASE)


class Heads:
    """Request heads that were read and judged: a client mostly says the same head again, with another length.

    Keyed by every byte of the head but the digits of its only Content-Length, so that what is known of one is true of the
    other.  Only plain, good requests are remembered, and few: whoever sends many different ones gains nothing.
    """

    MOST, LONGEST = 64, 2048

    def __init__(self) -> None:
        self._known: dict[bytes, Request] = {}

    def find(self, data: bytes) -> tuple[Request, int, int] | None:
        """(request without body, where its body begins, how long it is) if `data` begins with a head that is known."""
        end = data.find(b"\r\n\r\n", 0, self.LONGEST)
        if end < 0 or (match := _LENGTH.search(data, 0, end)) is None:
            return None
        a, b = match.span(1)
        known = self._known.get(data[:a] + data[b:end])
        return None if known is None else (known, end + 4, int(data[a:b]))

    def learn(self, data: bytes, request: Request) -> None:
        """`request` is all that `data` held."""
        end = data.find(b"\r\n\r\n", 0, self.LONGEST)
        match = _LENGTH.search(data, 0, end) if end >= 0 else None
        if (
            match is None or request.error or request.tunnel or request.repeated or not request.keep_alive
            or request.version != "1.1" or len(data) - end - 4 != len(request.body) or int(match[1]) != len(request.body)
            or request.headers.keys() & {b"transfer-encoding", b"expect", b"upgrade"}
        ):  # fmt: skip
            return
        if len(self._known) >= self.MOST:
            self._known.clear()
        a, b = match.span(1)
        self._known[data[:a] + data[b:end]] = msgspec.structs.replace(request, body=b"", held=0, memo={})


class Answers:
    """Heads of whole, plain answers that were read before: the same for an engine's, with another length each time."""

    MOST, LONGEST = 64, 1024

    def __init__(self) -> None:
        self._known: dict[bytes, Head] = {}

    def find(self, data: bytes) -> tuple[Head, int] | None:
        """(head, where the body begins) if `data` is one whole answer with a head that is known."""
        end = data.find(b"\r\n\r\n", 0, self.LONGEST)
        if end < 0 or (match := _LENGTH.search(data, 0, end)) is None:
            return None
        a, b = match.span(1)
        if len(data) != end + 4 + int(data[a:b]) or (known := self._known.get(data[:a] + data[b:end])) is None:
            return None
        return Head(known.status, known.reason, known.lines, data[a:b], False, known.content_type), end + 4

    def learn(self, data: bytes, head: Head) -> None:
        """`data` was one whole answer on a connection that may be used again."""
        end = data.find(b"\r\n\r\n", 0, self.LONGEST)
        match = _LENGTH.search(data, 0, end) if end >= 0 else None
        if match is None or head.chunked or head.length != match[1] or len(data) != end + 4 + int(match[1]) or head.status != 200:
            return
        if len(self._known) >= self.MOST:
            self._known.clear()
        a, b = match.span(1)
        self._known[data[:a] + data[b:end]] = Head(200, head.reason, [b"".join(head.lines)], None, False, head.content_type)
