"""A small stand-in for the daemon: the control socket and the HTTP endpoint, with answers a test may change."""

from __future__ import annotations

import json
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from llm_daemon.core import control
from llm_daemon.errors import LlmDaemonError

KEY = "s3cret-key"


def piece(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "text": text}]}


LAST = {
    "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 52},
    "timings": {"predicted_per_second": 48.2},
}


class FakeDaemon:
    """Listens in `folder`.  `said` are the messages received, `asked` the HTTP requests as (path, headers, body)."""

    def __init__(self, folder: Path) -> None:
        self.said: list[dict[str, Any]] = []
        self.asked: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.events: list[dict[str, Any]] = [piece("Because "), piece("of light."), LAST]
        self.refusal: tuple[int, dict[str, Any]] | None = None  # HTTP status and error body
        self.answers: dict[str, Any] = {"hold": {}, "status": self.status()}  # method -> result or error
        self.ready: dict[str, Any] | LlmDaemonError = {
            "model": "smollm2-135m", "instance": "i1", "pid": 4242, "engine": "xllamacpp",
        }  # fmt: skip
        self.progress: list[dict[str, Any]] = []
        self.closed = threading.Semaphore(0)  # counts leases that have ended
        self.connections: list[socket.socket] = []
        self.looks = threading.Semaphore(0)  # counts looks at /health, which hang while it is stuck
        self.is_stuck, self.go_on = threading.Event(), threading.Event()  # `go_on` also ends a pause among the events
        folder.mkdir(parents=True, mode=0o700)
        self._serve_http()
        self.welcome = {
            "pid": 77, "version": "1.2.3", "base_url": f"http://127.0.0.1:{self.http.server_port}/v1", "api_key": KEY,
            "http_socket": str(folder / "http.sock"), "log": str(folder / "daemon.log"), "port_note": "",
        }  # fmt: skip
        self.listener = socket.socket(socket.AF_UNIX)
        before = os.getcwd()
        os.chdir(folder)  # the path may be longer than the address of a socket
        try:
            self.listener.bind("sock")
        finally:
            os.chdir(before)
        self.listener.listen()
        self.thread = threading.Thread(target=self._accept, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.go_on.set()
        self.die()
        self.http.shutdown()
        self.http.server_close()

    def die(self) -> None:
        """As by SIGKILL: nobody listens, every connection breaks."""
        try:
            self.listener.shutdown(socket.SHUT_RDWR)  # wakes whoever waits in accept
        except OSError:
            pass  # dead already
        self.listener.close()
        for connection in self.connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def calls(self, method: str) -> list[dict[str, Any]]:
        return [m["params"] for m in self.said if m["op"] == "CALL" and m["method"] == method]

    @staticmethod
    def status(**instance: Any) -> dict[str, Any]:
        one = {
            "id": "i1", "model": "smollm2-135m", "engine": "xllamacpp", "engine_version": "1", "state": "ready", "pid": 4242,
            "keeper_pid": 4241, "memory_bytes": 350_000_000, "leases": ["c2"], "running": 1, "waiting": 3, "slots": 2,
            "context": 4096, "idle": None, "closes_in": 1800.0, "argv": ["engine", "--flag", "two words"], "log": "/l/e.log",
            "error": None, "progress": None, "starts": 1,
        }  # fmt: skip
        lease = {
            "id": "c2", "pid": 4300, "program": "python train.py\x1b[31m", "since": 120.0, "models": ["smollm2-135m"],
            "instances": ["i1"], "engine_pids": [4242], "kind": "client",
        }  # fmt: skip
        daemon = {
            "pid": 77, "version": "1.2.3", "uptime": 60.0, "base_url": "http://127.0.0.1:28282/v1", "port": 28282,
            "port_note": "", "runtime_dir": "/r", "log": "/l/daemon.log", "socket": "/r/http.sock", "memory_bytes": 22_000_000,
            "settings": {"ttl": 120.0}, "exit_in": None, "leases": 1,
        }  # fmt: skip
        return {"daemon": daemon, "instances": [one | instance], "leases": [lease]}

    # The control socket ---------------------------------------------------------------------------------------
    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.connections.append(connection)
            threading.Thread(target=self._converse, args=(connection,), daemon=True).start()

    def _converse(self, connection: socket.socket) -> None:
        decoder, holds = control.Decoder(), False
        with connection:
            while data := self._receive(connection):
                for message in decoder.feed(data):
                    self.said.append(message)
                    if message["op"] == "HELLO":
                        holds = message.get("lease") is not False
                        self._send(connection, op="WELCOME", proto=control.PROTO, **self.welcome)
                    else:
                        self._answer(connection, message)
        if holds:
            self.closed.release()

    @staticmethod
    def _receive(connection: socket.socket) -> bytes:
        try:
            return connection.recv(65536)
        except OSError:
            return b""

    @staticmethod
    def _send(connection: socket.socket, **message: object) -> None:
        try:
            connection.sendall(control.encode(message))
        except OSError:
            pass  # gone: its end shows in the next read

    def _answer(self, connection: socket.socket, message: dict[str, Any]) -> None:
        ask = message["id"]
        for info in self.progress:
            self._send(connection, op="PROGRESS", id=ask, info=info)
        answer = self.ready if message["op"] == "ENSURE" else self.answers[message["method"]]
        if answer == "die":
            self.die()
        elif isinstance(answer, LlmDaemonError):
            self._send(connection, op="ERROR", id=ask, error=answer.to_wire())
        elif message["op"] == "ENSURE":
            self._send(connection, op="READY", id=ask, **answer)
        else:
            self._send(connection, op="RESULT", id=ask, result=answer)
        if message.get("method") == "stop" and isinstance(answer, dict) and answer["daemon"]:
            self.die()

    # The endpoint ---------------------------------------------------------------------------------------------
    def _serve_http(self) -> None:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake.looks.release()
                if fake.is_stuck.is_set():
                    fake.go_on.wait()
                self.send_response(200)
                self.end_headers()

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                fake.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                status, wrong = fake.refusal or (200, None)
                self.send_response(status)
                self.end_headers()  # HTTP/1.0: the end of the connection is the end of the answer
                if wrong is not None:
                    self.wfile.write(json.dumps(wrong).encode())
                    return
                for event in fake.events:
                    if event.get("break"):
                        return
                    if event.get("stuck"):  # from now on, nothing is answered
                        fake.is_stuck.set()
                    if event.get("pause"):
                        fake.go_on.wait()
                        if fake.is_stuck.is_set():  # nobody listens any more
                            return
                        continue
                    self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                self.wfile.write(b"data: [DONE]\n\n")

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
