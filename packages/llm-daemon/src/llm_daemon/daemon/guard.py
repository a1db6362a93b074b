"""Who may talk to the gateway: the checks of every request that came over TCP.

A loopback port is open to each program and each web page on the machine.  Three locks: the Host header must name
loopback (a page that rebinds its own name to 127.0.0.1 still sends its own name, CVE-2024-28224), an Origin must be
ours (pages of other sites), and the token must be known.  On the unix socket the kernel names the peer instead.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
import socket
import struct
import sys
from collections.abc import Callable

from ..errors import LlmDaemonError, UsageError
from .http1 import Request

_AUTHORITY = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]/@\s]+)(?::([0-9]{1,5}))?", re.ASCII)
_CACHED = 64


class Guard:
    """`token` None means no token is asked for.  `hosts` allows host names (lower case, no port) besides loopback's own."""

    def __init__(self, token: str | None, hosts: Callable[[str], bool] | frozenset[str] = frozenset()) -> None:
        self._token = None if token is None else token.encode()
        self._usual = b"Bearer " + (self._token or b"")
        self._allowed = hosts if callable(hosts) else hosts.__contains__
        self._known_good: set[tuple[bytes, int]] = set()  # Host values seen and found good: the usual case costs one look-up

    def check(self, request: Request, port: int, *, open_to_all: bool) -> LlmDaemonError | None:
        """The reason to refuse a request that came in on our TCP `port`, or None.  `open_to_all` routes need no token."""
        host = request.headers.get(b"host")
        if host is None or b"host" in request.repeated:
            return UsageError("the request needs one Host header", code="bad_host", status=400)
        if (host, port) not in self._known_good and not self._good_host(host, port):
            hint = f"use http://127.0.0.1:{port}"
            return UsageError(f"host {_show(host)} is not served here", code="bad_host", status=403, hint=hint)
        origin = request.headers.get(b"origin")
        if origin is not None and (b"origin" in request.repeated or not self._good_origin(origin, port)):
            return UsageError(f"web pages of {_show(origin)} may not use this endpoint", code="bad_origin", status=403)
        if open_to_all or self._token is None or hmac.compare_digest(request.headers.get(b"authorization", b""), self._usual):
            return None
        if not self._is_token(request, self._token):
            return UsageError(
                "the API key is missing or wrong",
                code="bad_token",
                status=401,
                hint="send `Authorization: Bearer TOKEN`; `llm-daemon env MODEL` prints the token",
            )
        return None

    def _good_host(self, value: bytes, port: int, *, needs_port: bool = False) -> bool:
        match = _AUTHORITY.fullmatch(value.decode("latin-1").lower())
        if match is None or (match[2] is None and needs_port) or (match[2] is not None and int(match[2]) != port):
            return False
        name = match[1].strip("[]")
        if not (is_loopback(name) or self._allowed(name)):
            return False
        if len(self._known_good) < _CACHED:
            self._known_good.add((value, port))
        return True

    def _good_origin(self, value: bytes, port: int) -> bool:
        scheme, _, authority = value.partition(b"://")
        return scheme.lower() == b"http" and self._good_host(authority, port, needs_port=port != 80)

    @staticmethod
    def _is_token(request: Request, token: bytes) -> bool:
        """Every comparison is in constant time.  OpenAI's clients send a bearer token, Anthropic's an API key."""
        scheme, _, bearer = request.headers.get(b"authorization", b"").partition(b" ")
        by_bearer = hmac.compare_digest(bearer.strip(), token) and scheme.lower() == b"bearer"
        return hmac.compare_digest(request.headers.get(b"x-api-key", b""), token) or by_bearer


def is_loopback(name: str) -> bool:
    """Whether a host name (no port, no brackets) can only mean this machine.

    >>> [is_loopback(n) for n in ("localhost", "127.0.0.1", "127.8.8.8", "::1", "127.1", "localhost.evil.example", "0.0.0.0")]
    [True, True, True, True, False, False, False]
    """
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def peer_is_us(sock: socket.socket) -> bool:
    """Whether the process at the other end of a unix socket belongs to our user, by the kernel's word."""
    try:
        if hasattr(socket, "SO_PEERCRED"):
            uid: int = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        elif sys.platform == "darwin":  # struct xucred by LOCAL_PEERCRED at level SOL_LOCAL, <sys/un.h>
            uid = struct.unpack_from("II", sock.getsockopt(0, 1, 76))[1]
        else:
            return False
    except (OSError, struct.error):
        return False
    return uid == os.geteuid()


def _show(value: bytes) -> str:
    return ascii(value[:100].decode("latin-1"))
