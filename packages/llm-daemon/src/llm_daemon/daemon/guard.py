"""Who may talk to the gateway: the checks of every request that came over TCP.

A loopback port is open to each program and each web page on the machine.  Three locks: the Host header must name
loopback (a page that rebinds its own name to 127.0.0.1 still sends its own name, CVE-2024-28224), an Origin must be
ours or allowed (pages of other sites), and the token must be known.  On the unix socket the kernel names the peer instead.

The port in a Host header may be any, for a tunnel (`ssh -L`) has its own; a page is ours if its origin is that very host.
"""

from __future__ import annotations

import binascii
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
    """`token` None means no token is asked for.  `hosts` allows host names (lower case, no port) besides loopback's own.

    `origins` are the web pages besides our own that may use us (`https://app.example`, lower case); our own have `scheme`.
    """

    def __init__(
        self,
        token: str | None,
        hosts: Callable[[str], bool] | frozenset[str] = frozenset(),
        origins: frozenset[str] = frozenset(),
        scheme: bytes = b"http",
    ) -> None:
        self.origins, self._scheme = origins, scheme
        self._token = None if token is None else token.encode()
        self._usual = b"Bearer " + (self._token or b"")
        self._allowed = hosts if callable(hosts) else hosts.__contains__
        self._known_good: set[bytes] = set()  # Host values seen and found good: the usual case costs one look-up

    def check(self, request: Request, port: int, *, open_to_all: bool) -> LlmDaemonError | None:
        """The reason to refuse a request that came in on our TCP `port`, or None.  `open_to_all` routes need no token."""
        headers, repeated = request.headers, request.repeated
        host = headers.get(b"host")
        if host is None or (repeated and b"host" in repeated):
            return UsageError("the request needs one Host header", code="bad_host", status=400)
        if host not in self._known_good and not self._good_host(host):
            hint = f"use http://127.0.0.1:{port}"
            return UsageError(f"host {_show(host)} is not served here", code="bad_host", status=403, hint=hint)
        origin = headers.get(b"origin")
        if origin is not None and (b"origin" in repeated or not self._good_origin(origin, host, port)):
            return UsageError(f"web pages of {_show(origin)} may not use this endpoint", code="bad_origin", status=403)
        # A page's images, scripts and links carry no Origin, but browsers tell where they come from (Fetch metadata).
        if (
            origin is None
            and headers.get(b"sec-fetch-site") in (b"cross-site", b"same-site")
            and not request.path.startswith("/ui")
        ):
            return UsageError("other web pages may not use this endpoint", code="bad_origin", status=403)
        if open_to_all or self._token is None or hmac.compare_digest(headers.get(b"authorization", b""), self._usual):
            return None
        if not self._is_token(request, self._token):
            is_remote = self._scheme == b"https"  # whose key is another
            where = "it is in the file that the setting tls_token_file names" if is_remote else "`llm-daemon env MODEL` prints it"
            hint = f"send `Authorization: Bearer TOKEN`; {where}"
            return UsageError("the API key is missing or wrong", code="bad_token", status=401, hint=hint)
        return None

    def is_allowed_origin(self, value: bytes) -> bool:
        """Whether a page that is not ours may read our answers."""
        return bool(self.origins) and value.decode("latin-1").lower() in self.origins

    def _good_host(self, value: bytes) -> bool:
        match = _AUTHORITY.fullmatch(value.decode("latin-1").lower())
        if match is None or not 0 < int(match[2] or 80) < 65536:
            return False
        name = match[1].strip("[]")
        if not (is_loopback(name) or self._allowed(name)):
            return False
        if len(self._known_good) < _CACHED:
            self._known_good.add(value)
        return True

    def _good_origin(self, value: bytes, host: bytes, port: int) -> bool:
        """Ours is a page from the very host that was asked, or from any of loopback's names at our port."""
        scheme, _, authority = value.lower().partition(b"://")
        if (
            scheme == self._scheme
            and (authority == host.lower() or authority.endswith(b":%d" % port))
            and self._good_host(authority)
        ):
            return True
        return self.is_allowed_origin(value)

    @staticmethod
    def _is_token(request: Request, token: bytes) -> bool:
        """Every comparison is in constant time.  OpenAI's clients send a bearer token, Anthropic's an API key.

        A browser that opens an engine's own page can only ask its person: the password is the token (RFC 7617).
        """
        scheme, _, given = request.headers.get(b"authorization", b"").partition(b" ")
        given, scheme = given.strip(), scheme.lower()
        if scheme == b"basic":
            try:
                given = binascii.a2b_base64(given).partition(b":")[2]
            except binascii.Error:
                return False
        is_right = hmac.compare_digest(given, token) and scheme in (b"bearer", b"basic")
        return hmac.compare_digest(request.headers.get(b"x-api-key", b""), token) or is_right


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
