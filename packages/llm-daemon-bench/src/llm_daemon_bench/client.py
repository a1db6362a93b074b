"""One streaming request, measured: plain `http.client` in the calling thread, over TCP or a unix socket.

t0 is taken just before the first byte of the request is written; the connection is made before that.  Every read is stamped
before anybody looks into it, and kept.  Parsing is `reply.py`'s, after the stream.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Any
from urllib.parse import urlsplit

READ = 65536  # bytes of one read; a server's flush is far smaller
CONNECT_S = 10.0
ERROR_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server listens.  `socket`: path of a unix socket, then `host` and `port` are only for the Host header.

    `base`: path in front of `/v1/...`.  `headers`: sent with every request (a bearer token, say).
    """

    host: str = "127.0.0.1"
    port: int = 80
    socket: str | None = None
    base: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, url: str, headers: Mapping[str, str] | None = None) -> Endpoint:
        """From `http://host:port[/base][/v1]`.

        >>> Endpoint.of("http://127.0.0.1:8080/x/v1").base
        '/x'
        """
        place = urlsplit(url)
        base = place.path.rstrip("/").removesuffix("/v1")
        return cls(place.hostname or "127.0.0.1", place.port or 80, None, base, headers or {})

    def connection(self, timeout: float) -> http.client.HTTPConnection:
        """Not yet connected; `timeout` in seconds for every wait."""
        if self.socket is None:
            return http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        return _UnixConnection(self.socket, timeout)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(self.timeout)
            sock.connect(self.path)
        except BaseException:
            sock.close()
            raise
        self.sock = sock


@dataclass(slots=True)
class Raw:
    """What came back.  Times in milliseconds after `t0_ns` (perf_counter_ns), but `connect_ms`: how long connecting took.

    `end_ms`: when we stopped listening.  `finish`: `done` (the stream's own end), `early`, `stall` or `broken`; `error` is one
    line for the last two and for an HTTP status that is not 200.
    """

    t0_ns: int
    connect_ms: float = 0.0
    headers_ms: float | None = None
    status: int = 0
    chunks: list[tuple[float, bytes]] = field(default_factory=list)
    end_ms: float = 0.0
    finish: str = "done"
    error: str | None = None


def stream(
    endpoint: Endpoint,
    path: str,
    body: Mapping[str, Any],
    *,
    stall_s: float,
    timeout_s: float | None = None,
    enough: Callable[[float, bytes], bool] | None = None,
    t0_ns: int | None = None,
) -> Raw:
    """Sends a POST and reads the answer to its end.  Never raises for what the server does: `Raw.error` says it.

    `stall_s`: most seconds without a byte; `timeout_s`: for everything.  `enough(ms, chunk)`: after each read, hangs up if true.
    `t0_ns`: the intended time of an open-loop request, counted from instead of the true one.
    """
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream", "Connection": "close", **endpoint.headers}
    connection = endpoint.connection(CONNECT_S)
    began = perf_counter_ns()
    raw = Raw(t0_ns if t0_ns is not None else began)
    first = stall_s if timeout_s is None else min(stall_s, timeout_s)
    try:
        connection.connect()
        raw.connect_ms = (perf_counter_ns() - began) / 1e6
        if connection.sock.family != getattr(socket, "AF_UNIX", None):
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sock.settimeout(first)
        # One write: head and body in one segment where they fit, so the server does not wait for the second.
        connection.putrequest("POST", endpoint.base + path)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            connection.putheader(name, value)
        if t0_ns is None:
            raw.t0_ns = perf_counter_ns()
        connection.endheaders(data)
        _read(connection, raw, stall_s, timeout_s, enough)
    except TimeoutError:
        raw.finish, raw.error = "stall", f"nothing came for {first if raw.headers_ms is None else stall_s:g} s"
    except (OSError, http.client.HTTPException) as e:
        raw.finish, raw.error = "broken", _reason(e)
    finally:
        raw.end_ms = (perf_counter_ns() - raw.t0_ns) / 1e6
        connection.close()
    return raw


def _read(
    connection: http.client.HTTPConnection,
    raw: Raw,
    stall_s: float,
    timeout_s: float | None,
    enough: Callable[[float, bytes], bool] | None,
) -> None:
    t0 = raw.t0_ns
    sock = connection.sock
    with connection.getresponse() as response:  # takes the socket over: "Connection: close"
        raw.headers_ms = (perf_counter_ns() - t0) / 1e6
        raw.status = response.status
        if response.status != 200:
            raw.finish, raw.error = "broken", _refusal(response.status, response.read(ERROR_BYTES))
            return
        while True:
            if timeout_s is not None:
                left = timeout_s - (perf_counter_ns() - t0) / 1e9
                if left <= 0:
                    raw.finish, raw.error = "stall", f"not done after {timeout_s:g} s"
                    return
                sock.settimeout(min(stall_s, left))
            try:
                data = response.read1(READ)
            except TimeoutError:
                if timeout_s is not None and (perf_counter_ns() - t0) / 1e9 >= timeout_s:
                    continue
                raise
            ms = (perf_counter_ns() - t0) / 1e6
            if not data:
                return
            raw.chunks.append((ms, data))
            if enough is not None and enough(ms, data):
                raw.finish = "early"
                return


def _reason(error: Exception) -> str:
    if isinstance(error, http.client.RemoteDisconnected):
        return "the server closed the connection without an answer"
    if isinstance(error, http.client.IncompleteRead):
        return "the answer broke off"
    if isinstance(error, OSError):
        return f"connection lost: {error.strerror or error}"
    return f"not HTTP: {type(error).__name__} {error}".strip()


def _refusal(status: int, data: bytes) -> str:
    try:
        told = json.loads(data)["error"]
        text = str(told["message"] if isinstance(told, dict) else told)
    except (ValueError, KeyError, TypeError):
        text = data.decode(errors="replace").strip()
    return f"HTTP status {status}: {text.splitlines()[0][:300] if text else 'no reason given'}"


def get(endpoint: Endpoint, path: str, timeout: float) -> tuple[int, bytes]:
    """(status, body) of a GET.  Raises OSError or http.client.HTTPException."""
    connection = endpoint.connection(timeout)
    try:
        connection.request("GET", endpoint.base + path, headers={"Connection": "close", **endpoint.headers})
        response = connection.getresponse()
        return response.status, response.read(ERROR_BYTES)
    finally:
        connection.close()
