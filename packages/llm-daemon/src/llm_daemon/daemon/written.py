"""HTTP/1.1 as we write it: what http1.py reads is said anew."""

from __future__ import annotations

from collections.abc import Iterable


def request_bytes(target: bytes, headers: Iterable[tuple[bytes, bytes]], body: bytes, method: bytes = b"POST") -> bytes:
    """A request to an engine.  The head is ours from the first to the last byte; `headers` come from an allow-list."""
    lines = b"".join([b"%b: %b\r\n" % pair for pair in headers])
    if body or method not in (b"GET", b"HEAD"):
        lines += b"Content-Length: %d\r\n" % len(body)
    return b"%b %b HTTP/1.1\r\nHost: localhost\r\n%b\r\n%b" % (method, target, lines, body)


def chunk(piece: bytes) -> bytes:
    """One chunk of a chunked body.

    >>> chunk(b"hello, chunks")
    b'd\\r\\nhello, chunks\\r\\n'
    """
    return b"%x\r\n%b\r\n" % (len(piece), piece)
