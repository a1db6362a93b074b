"""A server that keeps to a script and writes down when it really sent what.  Standard library only, a process of its own.

    with ScriptedServer({"slow": Script(prefill_ms=300)}) as server:
        ...                             # a request to server.base_url for the model "slow"
        truth = server.truths()[-1]     # what was sent for it, with stamps of the clock that every process here shares

Each piece has its time from the request on, not from the piece before, so lateness does not add up.  The script is chosen by
the request's `model`; any other name gets the first one.  It listens on loopback and ends when its stdin does.
"""

from __future__ import annotations

import http.client
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from llm_daemon_bench.testing.script import Piece, Script, Sent, Truth, plan, whole

ROUTES = ("/v1/chat/completions", "/v1/completions", "/completion", "/infill")


class ScriptedServer:
    """The server's process, as its parent sees it.  A context manager; not for several threads.

    Raises RuntimeError if the process does not start.
    """

    def __init__(self, scripts: Mapping[str, Script], port: int = 0) -> None:
        self.scripts, self.port = dict(scripts), port
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        argv = [sys.executable, "-m", __name__, str(self.port)]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({name: s.to_json() for name, s in self.scripts.items()}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            self.__exit__()
            raise RuntimeError("the scripted server did not start")
        self.port = int(line)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()

    @property
    def base_url(self) -> str:
        """Without a path: `/v1/...` and `/health` come after it."""
        return f"http://127.0.0.1:{self.port}"

    def truths(self) -> list[Truth]:
        """What was sent for each request so far, in the order in which they came; waits for those that are being answered."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", "/truths")
            return [Truth.from_json(value) for value in json.loads(connection.getresponse().read())]
        finally:
            connection.close()


class Server:
    """The process itself: a thread for each connection."""

    def __init__(self, scripts: Mapping[str, Script], health: int) -> None:
        self.scripts, self.health = dict(scripts), health
        self.records: list[dict[str, Any]] = []
        self.running = 0
        self.quiet = threading.Condition()

    def run(self, sock: socket.socket) -> None:
        """Accepts connections for ever."""
        while True:
            client, _ = sock.accept()
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        """Requests of one connection, one after the other."""
        with client, client.makefile("rb") as file:
            try:
                while line := file.readline():
                    method, path, _ = line.decode().split(None, 2)
                    headers: dict[str, str] = {}
                    while (line := file.readline()).strip():
                        key, _, value = line.decode().partition(":")
                        headers[key.lower()] = value.strip()
                    body = file.read(int(headers.get("content-length", "0")))
                    read_ns = time.perf_counter_ns()
                    going_on = self.answer(client, method, path.partition("?")[0], body, read_ns)
                    if not going_on or headers.get("connection", "").lower() == "close":
                        return
            except (ConnectionError, ValueError):
                return

    def answer(self, client: socket.socket, method: str, path: str, body: bytes, read_ns: int) -> bool:
        """False if the connection is to end."""
        if method == "POST" and path in ROUTES:
            return self.perform(client, path, json.loads(body), read_ns)
        if method != "GET":
            client.sendall(whole(404, {"error": {"code": 404, "message": f"{method} {path} is not in the script"}}))
        elif path == "/truths":
            with self.quiet:
                self.quiet.wait_for(lambda: self.running == 0)
                said = list(self.records)
            client.sendall(whole(200, said))
        elif path == "/v1/models":
            client.sendall(whole(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.scripts]}))
        else:  # whatever probes for readiness
            client.sendall(whole(self.health, {"status": "ok" if self.health == 200 else "as the script wants"}))
        return True

    def perform(self, client: socket.socket, path: str, request: Mapping[str, Any], read_ns: int) -> bool:
        """Plays the request's script and writes down what became of it."""
        script = self.scripts.get(str(request.get("model")), next(iter(self.scripts.values())))
        sent: list[Sent] = []
        with self.quiet:
            self.running += 1
            self.records.append({"read_ns": read_ns, "sent": sent})
        try:
            for piece in plan(script, path, request):
                if not wait_until(read_ns + int(piece.at_ms * 1e6), client):
                    return False
                if piece.kind == "die":
                    os.write(2, b"error: dying, as the script wants\n")
                    os._exit(134)
                sent.append(send(client, piece))
            return script.end != "torn"
        finally:
            with self.quiet:
                self.running -= 1
                self.quiet.notify_all()


def wait_until(at_ns: int, client: socket.socket) -> bool:
    """Waits for the time of a piece; False at once if the client hangs up meanwhile."""
    while (left := at_ns - time.perf_counter_ns()) > 0:
        readable, _, _ = select.select([client], [], [], left / 1e9)
        if readable:
            if not client.recv(1, socket.MSG_PEEK):
                return False
            time.sleep(max(0.0, (at_ns - time.perf_counter_ns()) / 1e9))  # the next request is there already
    return True


def send(client: socket.socket, piece: Piece) -> Sent:
    """Sends it.  The stamp is from just before: from then on the client may have it."""
    now = time.perf_counter_ns()
    client.sendall(piece.data)
    return Sent(now, piece.kind, piece.text, piece.thought, piece.call, piece.tokens)


def main(argv: list[str]) -> None:
    """`scripted PORT`: takes the scripts from the first line of stdin, says the port on stdout, lives as long as stdin is open.

    `scripted PORT FILE [HEALTH]`: the scripts are in a file, and it lives until a signal ends it, as a server application
    does; HEALTH is the status of its answer to `GET /health`.
    """
    text = Path(argv[1]).read_text() if argv[1:] else sys.stdin.readline()
    scripts = {name: Script.from_json(value) for name, value in json.loads(text).items()}
    sock = socket.create_server(("127.0.0.1", int(argv[0])))
    server = Server(scripts, health=int(argv[2]) if argv[2:] else 200)
    threading.Thread(target=server.run, args=(sock,), daemon=True).start()
    print(sock.getsockname()[1], flush=True)
    if argv[1:]:
        threading.Event().wait()
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1:])
