"""The measuring client against a server that sends given bytes at given moments."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llm_daemon_bench.client import Endpoint, Raw, get, stream

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
Handler = Callable[[socket.socket, bytes], None]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Server:
    """Answers each connection with `handler(socket, request)`, in a thread."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.listen()
        self.handler: Handler = lambda client, request: None
        self.threads: list[threading.Thread] = []

    def serve(self, handler: Handler, times: int = 1) -> None:
        def run() -> None:
            for _ in range(times):
                client, _ = self.sock.accept()
                with client:
                    handler(client, self.request(client))

        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()

    def request(self, client: socket.socket) -> bytes:
        data = b""
        while b"\r\n\r\n" not in data:
            data += client.recv(65536)
        head, _, body = data.partition(b"\r\n\r\n")
        length = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)
        while len(body) < length:
            body += client.recv(65536)
        return head + b"\r\n\r\n" + body

    def close(self) -> None:
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()
        self.sock.close()


@pytest.fixture(params=["tcp", "unix"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Server, Endpoint]]:
    if request.param == "tcp":
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        endpoint = Endpoint("127.0.0.1", sock.getsockname()[1])
    else:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(tmp_path / "s"))
        endpoint = Endpoint(socket=str(tmp_path / "s"), headers={"Authorization": "Bearer k"})
    server = Server(sock)
    yield server, endpoint
    server.close()


def test_each_read_is_stamped_and_kept(place: tuple[Server, Endpoint]) -> None:
    server, endpoint = place
    seen: list[bytes] = []
    go = threading.Event()

    def handler(client: socket.socket, request: bytes) -> None:
        seen.append(request)
        client.sendall(HEAD + chunk(b"data: 1\n\n"))
        go.wait(10)
        client.sendall(chunk(b"data: 2\n\n") + b"0\r\n\r\n")

    def look(ms: float, data: bytes) -> bool:
        go.set()
        return False

    server.serve(handler)
    raw = stream(endpoint, "/v1/x", {"a": 1}, stall_s=10, enough=look)
    assert [data for _, data in raw.chunks] == [b"data: 1\n\n", b"data: 2\n\n"]
    assert (raw.finish, raw.error, raw.status) == ("done", None, 200)
    times = [raw.headers_ms or 0, *(ms for ms, _ in raw.chunks), raw.end_ms]
    assert times == sorted(times)
    assert times[0] > 0
    assert raw.connect_ms > 0
    assert seen[0].startswith(b"POST /v1/x HTTP/1.1\r\n")
    assert seen[0].endswith(b'{"a": 1}')
    assert (b"Authorization: Bearer k" in seen[0]) == (endpoint.socket is not None)


def failing(place: tuple[Server, Endpoint], handler: Handler, stall_s: float = 10.0, timeout_s: float | None = None) -> Raw:
    server, endpoint = place
    server.serve(handler)
    return stream(endpoint, "/", {}, stall_s=stall_s, timeout_s=timeout_s)


def test_a_stall_is_told_and_what_came_is_kept(place: tuple[Server, Endpoint]) -> None:
    def handler(client: socket.socket, request: bytes) -> None:
        client.sendall(HEAD + chunk(b"data: 1\n\n"))
        assert client.recv(1) == b""  # until the other side hangs up

    raw = failing(place, handler, stall_s=1.0)  # so long the first piece may take on a busy machine
    assert (raw.finish, raw.error, len(raw.chunks)) == ("stall", "nothing came for 1 s", 1)
    assert raw.end_ms >= 1000


def test_a_trickle_ends_at_the_time_limit(place: tuple[Server, Endpoint]) -> None:
    over = threading.Event()

    def handler(client: socket.socket, request: bytes) -> None:
        client.sendall(HEAD)
        try:
            while not over.wait(0.02):
                client.sendall(chunk(b": ping\n\n"))
        except OSError:
            pass

    raw = failing(place, handler, timeout_s=0.3)
    over.set()
    assert (raw.finish, raw.error) == ("stall", "not done after 0.3 s")
    assert 250 < raw.end_ms < 9000  # the server would go on for ever


def test_enough_hangs_up(place: tuple[Server, Endpoint]) -> None:
    server, endpoint = place
    ended: list[bytes] = []

    def handler(client: socket.socket, request: bytes) -> None:
        client.sendall(HEAD + chunk(b"data: 1\n\n"))
        ended.append(client.recv(1))

    server.serve(handler)
    raw = stream(endpoint, "/", {}, stall_s=10, enough=lambda ms, data: True)
    assert (raw.finish, raw.error) == ("early", None)
    server.threads[0].join(10)
    assert ended == [b""]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (HEAD + b"5\r\nda", "the answer broke off"),
        (b"", "the server closed the connection without an answer"),
        (b"what?\r\n\r\n", "not HTTP: BadStatusLine"),
        (b'HTTP/1.1 503 x\r\nContent-Length: 35\r\n\r\n{"error": {"message": "Loading!!"}}', "HTTP status 503: Loading!!"),
        (b"HTTP/1.1 500 x\r\nContent-Length: 0\r\n\r\n", "HTTP status 500: no reason given"),
    ],
)
def test_what_goes_wrong_is_one_line(place: tuple[Server, Endpoint], answer: bytes, error: str) -> None:
    raw = failing(place, lambda client, request: client.sendall(answer))
    assert raw.finish == "broken"
    assert (raw.error or "").startswith(error)


def test_nobody_there(tmp_path: Path) -> None:
    raw = stream(Endpoint(socket=str(tmp_path / "none")), "/", {}, stall_s=1)
    assert (raw.finish, raw.error) == ("broken", "connection lost: No such file or directory")


def test_an_open_loop_counts_from_the_intended_time(place: tuple[Server, Endpoint]) -> None:
    server, endpoint = place
    server.serve(lambda client, request: client.sendall(HEAD + chunk(b"x") + b"0\r\n\r\n"), times=2)
    true = stream(endpoint, "/", {}, stall_s=10)
    due = stream(endpoint, "/", {}, stall_s=10, t0_ns=true.t0_ns)
    assert due.t0_ns == true.t0_ns
    assert due.chunks[0][0] > true.end_ms


def test_get(place: tuple[Server, Endpoint]) -> None:
    server, endpoint = place
    server.serve(lambda client, request: client.sendall(b"HTTP/1.1 404 x\r\nContent-Length: 2\r\n\r\nno"))
    assert get(endpoint, "/health", 5) == (404, b"no")
