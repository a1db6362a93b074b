"""The fake engine's program; `fake_engine.py` says what its scenario may hold.

Standard library only, and little of it: it starts in about 30 ms.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nServer: fake\r\n\r\n"
REASONS = {
    200: "OK", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests", 500: "Internal Server Error",
    503: "Service Unavailable",
}  # fmt: skip
GRANDCHILD = """
import os, signal
os.write(2, b"grandchild %d\\n" % os.getpid())
while True:
    signal.pause()
"""
BY_DEFAULT = ["Hello", " from", " the", " fake", " engine", "."]


def wait_for(path: str | None) -> None:
    while path and not os.path.exists(path):
        time.sleep(0.005)


class Server:
    def __init__(self, scenario: dict[str, Any], options: dict[str, str]) -> None:
        self.scenario, self.alias, self.path = scenario, options["--alias"], options.get("--socket", "")
        self.place = options.get("--host", ""), int(options.get("--port", "0"))
        self.key = os.environ.get("FAKE_ENGINE_KEY", "")
        self.slots = threading.Semaphore(int(options.get("--slots", "1")))
        self.ready = False
        self.stuck = False
        self.count = 0
        self.lock = threading.Lock()
        self.held: list[bytes] = []

    def log(self, text: str) -> None:
        if not self.scenario.get("silent"):
            os.write(2, text.encode() + b"\n")  # one write: lines of threads do not mix

    def run(self) -> None:
        signal.signal(signal.SIGTERM, self.on_sigterm)
        if self.scenario.get("grandchild"):
            self.leave_grandchild()
        way = self.scenario.get("while_loading", "503")
        if way == "ready":  # it says so, and loads at its first request
            self.listen()
            self.ready = True
        elif way == "refuse":
            self.load()
            self.ready = True  # first: who can connect is served
            self.listen()
        else:
            self.listen()
            self.load()
            self.ready = True
        self.log("ready")
        while True:
            signal.pause()

    def take(self, key: str) -> None:
        self.held.append(b"x" * self.scenario.pop(key, 0))

    def load(self) -> None:
        self.take("allocates")
        end = time.monotonic() + self.scenario.get("load_seconds", 0)
        pause = self.scenario.get("load_noise_ms", 0) / 1000
        while self.scenario.get("never_ready") or (left := end - time.monotonic()) > 0:
            if pause:
                self.log("loading")
                time.sleep(pause)
            elif self.scenario.get("load_burns_cpu"):
                sum(range(10000))
            elif self.scenario.get("never_ready"):
                signal.pause()
            else:
                time.sleep(left)
        wait_for(self.scenario.get("load_until"))
        if message := self.scenario.get("crash_while_loading"):
            os.write(2, f"error: {message}\n".encode())
            while self.scenario.get("gives_up"):
                signal.pause() if threading.current_thread() is threading.main_thread() else time.sleep(3600)
            os._exit(self.scenario.get("exit_code", 1))
        if number := self.scenario.get("kill_self_while_loading"):
            os.kill(os.getpid(), number)

    def listen(self) -> None:
        if path := self.scenario.get("port_taken_once"):
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            except FileExistsError:
                pass
            else:
                os.write(2, b"error: address in use, says the scenario\n")
                os._exit(1)
        sock = socket.socket(socket.AF_UNIX if self.path else socket.AF_INET)
        try:
            if self.path:
                sock.bind(self.path)
            else:
                if self.scenario.get("tcp") != "no reuse":
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(self.place)
        except OSError as e:
            os.write(2, f"error: address in use: {self.path or self.place}: {e.strerror}\n".encode())
            while self.scenario.get("port_taken") == "hang":
                signal.pause()
            os._exit(1)
        sock.listen(64)
        self.log("listening" if self.path else "listening on http://{}:{}".format(*sock.getsockname()))
        threading.Thread(target=self.accept, args=(sock,), daemon=True).start()

    def accept(self, sock: socket.socket) -> None:
        kept = []
        while True:
            client, _ = sock.accept()
            if self.scenario.get("hang"):
                kept.append(client)
            else:
                threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def leave_grandchild(self) -> None:
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
                if self.scenario["grandchild"] == "scrubbed":
                    os.execve(sys.executable, [sys.executable, "-I", "-S", "-c", GRANDCHILD], {})
                exec(GRANDCHILD)
            os._exit(0)

    def on_sigterm(self, *_: object) -> None:
        self.log("sigterm")
        if self.scenario.get("ignore_sigterm"):
            return
        if seconds := self.scenario.get("stop_seconds"):
            signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
            time.sleep(seconds)
        os._exit(0)

    # -- HTTP --

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
                    path = path.partition("?")[0]
                    if not self.turned_away(client, path, headers):
                        self.answer(client, method, path, body)
                    if headers.get("connection", "").lower() == "close":
                        return
            except (ConnectionError, ValueError):
                return

    def turned_away(self, client: socket.socket, path: str, headers: dict[str, str]) -> bool:
        if not self.key or headers.get("authorization") == f"Bearer {self.key}":
            return False
        self.send(client, 401, {"error": {"code": 401, "message": "no key", "type": "authentication_error"}})
        return True

    def answer(self, client: socket.socket, method: str, path: str, body: bytes) -> None:
        if not self.ready:
            self.send(client, 503, {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}})
        elif method == "GET":
            self.get(client, path)
        else:
            with self.lock:
                self.count += 1
                number = self.count
                self.take("allocates_later")
            self.log(f"request {number} begin {path}")
            if self.scenario.get("while_loading") == "ready" and number == 1:
                self.load()
            try:
                self.post(client, path, json.loads(body or b"{}"), number)
            except (BrokenPipeError, ConnectionResetError):
                self.log(f"request {number} disconnected")
                raise
            self.log(f"request {number} end")

    def get(self, client: socket.socket, path: str) -> None:
        if path != "/health":  # its last word is `ready`
            self.log(f"get {path}")
        if path == "/health":
            self.send(client, 200, {"status": "ok"})
        elif path == "/v1/models":
            self.send(client, 200, {"object": "list", "data": [{"id": self.alias, "object": "model", "owned_by": "fake"}]})
        elif path == "/props":
            self.send(client, 200, {"scenario": self.scenario})
        elif path == "/":
            self.raw(client, 200, "text/html", b"<h1>fake engine</h1>")
        else:
            self.send(client, 404, {"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}})

    def post(self, client: socket.socket, path: str, request: dict[str, Any], number: int) -> None:
        only = self.scenario.get("routes")
        strange = self.scenario.get("strict_model") and request.get("model") != self.alias
        if strange or (only is not None and path not in only):
            self.send(client, 404, {"error": {"code": 404, "message": "no such route or model", "type": "not_found_error"}})
        elif status := self.scenario.get("error_status"):
            self.send(client, status, {"error": {"code": status, "message": "as the scenario wants", "type": "server_error"}})
        elif path == "/v1/embeddings":
            texts, _usage = request.get("input", ""), {"prompt_tokens": 1, "total_tokens": 1}
            data = [
                {"object": "embedding", "index": i, "embedding": [float(len(text)), 1.0]}
                for i, text in enumerate([texts] if isinstance(texts, str) else texts)
            ]
            self.send(
                client,
                200,
                {"object": "list", "model": self.alias, "data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}},
            )
        elif path == "/tokenize":
            self.send(client, 200, {"tokens": [len(word) for word in str(request.get("content", "")).split()]})
        elif path in ("/v1/chat/completions", "/v1/completions", "/completion", "/infill"):
            with self.slots:
                self.log(f"request {number} slot")
                self.complete(client, path, request, number)
        else:
            self.send(client, 404, {"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}})

    def complete(self, client: socket.socket, path: str, request: dict[str, Any], number: int) -> None:
        answer = Answer(path, self.alias, request, number)
        said: list[str] = []
        words = self.words(client, request)
        if not request.get("stream"):
            said = list(words)
            self.send(client, 200, answer.whole(said))
            return
        self.tell(client, STREAM_HEAD)
        for word in words:
            said.append(word)
            self.event(client, json.dumps(answer.piece(word, len(said) == 1)))
        for last in answer.last(len(said)):
            self.event(client, json.dumps(last))
        if path.startswith("/v1/"):
            self.event(client, "[DONE]")
        self.tell(client, b"0\r\n\r\n")

    def words(self, client: socket.socket, request: dict[str, Any]) -> Iterator[str]:
        """The tokens, each after its time; ends with ConnectionResetError when the client is gone and that matters."""
        tokens = self.scenario.get("tokens", BY_DEFAULT)
        if isinstance(tokens, int):
            tokens = [f" t{i}" for i in range(tokens)]
        if self.scenario.get("echo"):
            messages = request.get("messages")
            tokens = str(messages[-1]["content"] if messages else request.get("prompt", "")).split(" ")
            tokens = [word if not i else " " + word for i, word in enumerate(tokens)]
        limit = request.get("max_tokens", request.get("max_completion_tokens", request.get("n_predict")))
        pause = self.scenario.get("token_ms", 0) / 1000
        for i, token in enumerate(tokens[: limit if limit is not None and limit >= 0 else None]):
            wait_for(self.scenario.get("tokens_until") if i == 1 else None)
            if self.scenario.get("crash_after_tokens") == i:
                os.write(2, b"error: crashed in the middle\n")
                os.abort()
            if self.scenario.get("stuck_after_tokens") == i and self.gets_stuck():
                self.log("stuck")
                while True:
                    time.sleep(3600)
            wait = pause + (0 if i else self.scenario.get("first_token_ms", 0) / 1000)
            if self.scenario.get("token_burns_cpu"):
                end, wait = time.monotonic() + wait, 0
                while time.monotonic() < end:
                    sum(range(10000))
            if self.hung_up(client, wait, bool(request.get("stream"))):
                raise ConnectionResetError
            yield token

    def gets_stuck(self) -> bool:
        path = self.scenario.get("stuck_once")
        with self.lock:
            if path and not self.stuck:
                try:
                    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
                except FileExistsError:
                    return False
            self.stuck = True
        return True

    def hung_up(self, client: socket.socket, wait: float, stream: bool) -> bool:
        """Waits that long; at once True if the client is gone and the scenario lets us notice."""
        ignores = self.scenario.get("ignores_disconnect")
        if ignores is True or (ignores and not stream):
            time.sleep(wait)
            return False
        poll = select.poll()
        poll.register(client, select.POLLIN)
        end = time.monotonic() + wait
        if not poll.poll(wait * 1000):
            return False
        if not client.recv(1, socket.MSG_PEEK):
            return True
        time.sleep(max(0.0, end - time.monotonic()))  # it has sent its next request already
        return False

    def event(self, client: socket.socket, text: str) -> None:
        data = f"data: {text}\n\n".encode()
        self.tell(client, b"%x\r\n%s\r\n" % (len(data), data))

    def send(self, client: socket.socket, status: int, value: object) -> None:
        self.raw(client, status, "application/json; charset=utf-8", json.dumps(value).encode())

    def raw(self, client: socket.socket, status: int, kind: str, data: bytes) -> None:
        reason = REASONS.get(status, "Status")
        head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n"
        self.tell(client, head.encode() + data, whole=True)

    def tell(self, client: socket.socket, data: bytes, whole: bool = False) -> None:
        try:
            client.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            ignores = self.scenario.get("ignores_disconnect")
            if ignores is not True and not (ignores and whole):
                raise


class Answer:
    """What a completion looks like on each route, whole and in pieces."""

    def __init__(self, path: str, alias: str, request: dict[str, Any], number: int) -> None:
        self.chat, self.native = path == "/v1/chat/completions", not path.startswith("/v1/")
        self.usage_wanted = bool((request.get("stream_options") or {}).get("include_usage"))
        self.head = {"id": f"fake-{number}", "created": 1700000000, "model": alias, "system_fingerprint": "fake"}

    def usage(self, count: int) -> dict[str, int]:
        return {"prompt_tokens": 3, "completion_tokens": count, "total_tokens": 3 + count}

    def whole(self, said: list[str]) -> dict[str, Any]:
        text = "".join(said)
        if self.native:
            return {"content": text, "stop": True, "model": self.head["model"], "tokens_predicted": len(said)}
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        choice |= {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text, "logprobs": None}
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": [choice], "usage": self.usage(len(said))}

    def piece(self, word: str, first: bool) -> dict[str, Any]:
        if self.native:
            return {"content": word, "stop": False}
        choice: dict[str, Any] = {"index": 0, "finish_reason": None}
        if self.chat:
            choice["delta"] = {"role": "assistant", "content": word} if first else {"content": word}
        else:
            choice["text"] = word
        return {**self.head, "object": "chat.completion.chunk" if self.chat else "text_completion", "choices": [choice]}

    def last(self, count: int) -> Iterator[dict[str, Any]]:
        if self.native:
            yield {"content": "", "stop": True, "tokens_predicted": count}
            return
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", **({"delta": {}} if self.chat else {"text": ""})}
        yield {**self.head, "object": kind, "choices": [choice]}
        if self.usage_wanted:
            yield {**self.head, "object": kind, "choices": [], "usage": self.usage(count)}


def main(argv: list[str]) -> None:
    options = dict(zip(argv[1::2], argv[2::2], strict=False))
    with open(argv[0]) as f:
        scenario = json.load(f)
    Server(scenario, options).run()


if __name__ == "__main__":
    main(sys.argv[1:])
