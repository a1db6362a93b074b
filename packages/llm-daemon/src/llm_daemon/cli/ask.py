"""One question to the endpoint, streamed.  Standard library only: the command line must work where `openai` is not."""

from __future__ import annotations

import http.client
import io
import json
import socket
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

from .. import errors
from ..client import start

Say = Callable[[str], None]
SILENCE = 30.0  # seconds without a byte until we ask whether the daemon is still there: an answer may take longer to begin
ALIVE = 10.0  # seconds it has to say so


@dataclass(slots=True)
class Answer:
    """What came back.  Times are seconds: until the first token, and for the whole."""

    text: str = ""
    finish: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, Any] = field(default_factory=dict)
    first: float | None = None
    total: float = 0.0

    @property
    def tokens(self) -> int | None:
        """Tokens generated, if the engine counted them."""
        n = self.usage.get("completion_tokens", self.timings.get("predicted_n"))
        return n if isinstance(n, int) else None

    @property
    def speed(self) -> float | None:
        """Tokens a second while generating: the engine's own figure, else ours from the first token on."""
        given = self.timings.get("predicted_per_second")
        if isinstance(given, (int, float)):
            return float(given)
        if self.tokens is None or self.tokens < 2 or self.first is None or self.total <= self.first:
            return None
        return (self.tokens - 1) / (self.total - self.first)


def ask(lease: Any, body: dict[str, Any], say: Say, think: Say) -> Answer:
    """Sends one chat (`messages` in the body) or completion (`prompt`) and gives each piece of the answer to `say`.

    `think` gets the pieces of a model's reasoning.  An endpoint that has gone away before it answered is looked for
    once more.  Raises what the daemon or the engine reported; KeyboardInterrupt ends the generation at once.
    """
    body = {**body, "model": lease.model, "stream": True, "stream_options": {"include_usage": True}}
    path = "/chat/completions" if "messages" in body else "/completions"
    answer, began = Answer(), monotonic()
    try:
        with closing(_events(lease, path, body)) as events:
            for event in events:
                if event.get("error"):
                    raise _told(502, event["error"])
                _take(answer, event, began, say, think)
    finally:
        answer.total = monotonic() - began
    return answer


def _take(answer: Answer, event: dict[str, Any], began: float, say: Say, think: Say) -> None:
    answer.usage = event.get("usage") or answer.usage
    answer.timings = event.get("timings") or answer.timings
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        piece = delta.get("content") or choice.get("text") or ""
        thought = delta.get("reasoning_content") or ""
        if (piece or thought) and answer.first is None:
            answer.first = monotonic() - began
        if thought:
            think(thought)
        if piece:
            answer.text += piece
            say(piece)
        answer.finish = choice.get("finish_reason") or answer.finish


def _events(lease: Any, path: str, body: dict[str, Any]) -> Generator[dict[str, Any]]:
    """The JSON of each server-sent event."""
    connection, response = _open(lease, path, body)
    with closing(connection), closing(response):
        if response.status != 200:
            raise _refused(response)
        rest = b""
        while data := _read(response):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                word, _, value = line.strip().partition(b":")
                if word == b"data" and value.strip() == b"[DONE]":
                    return
                if word in (b"data", b"error"):  # llama.cpp has sent errors under a word of their own
                    yield _object(value, word == b"error")
        raise errors.EngineError(
            "the answer broke off: the engine or the daemon ended",
            code="broken_stream",
            hint="ask again; `llm-daemon logs` shows why",
        )


def _open(lease: Any, path: str, body: dict[str, Any]) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    for last in (False, True):
        place = urlsplit(lease.base_url)  # attaches again if the daemon is gone
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=SILENCE)
        connection.response_class = _patient(partial(_check, lease, place.hostname or "", place.port))
        try:
            headers = {"Authorization": f"Bearer {lease.api_key}", "Content-Type": "application/json"}
            connection.request("POST", place.path + path, json.dumps(body), headers)
            return connection, connection.getresponse()
        except BaseException as e:
            connection.close()
            if isinstance(e, errors.LlmDaemonError):
                raise
            if last and isinstance(e, (OSError, http.client.HTTPException)):
                raise errors.Unavailable(f"the endpoint {lease.base_url} does not answer: {e}", hint="try again") from e
            if not isinstance(e, (ConnectionError, http.client.RemoteDisconnected)):
                raise
            lease.refresh()
    raise AssertionError("unreachable")


class _Patient(io.RawIOBase):
    """Reads a socket that has a time-out; each time that is over, `check` raises if there is nothing to wait for."""

    def __init__(self, sock: socket.socket, check: Callable[[], None]) -> None:
        self._sock, self._check = sock.dup(), check  # one of its own: http.client closes the other when it thinks fit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            try:
                return self._sock.recv_into(buffer)
            except TimeoutError:
                self._check()

    def close(self) -> None:
        self._sock.close()
        super().close()


def _patient(check: Callable[[], None]) -> type[http.client.HTTPResponse]:
    """http.client's own reader cannot go on after a time-out."""

    class Response(http.client.HTTPResponse):
        def __init__(self, sock: socket.socket, *args: Any, **more: Any) -> None:
            super().__init__(sock, *args, **more)
            self.fp.close()
            self.fp = io.BufferedReader(_Patient(sock, check))

    return Response


def _check(lease: Any, host: str, port: int | None) -> None:
    """Raises DaemonUnresponsive unless the daemon answers: a long prompt is silent, and so is a daemon that hangs."""
    connection = http.client.HTTPConnection(host, port, timeout=ALIVE)
    with closing(connection):
        try:
            connection.request("GET", "/health")
            connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            raise start.unresponsive(lease.daemon_pid, wake_it=True) from None


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(65536)
    except errors.LlmDaemonError:
        raise
    except (OSError, http.client.HTTPException):
        return b""  # as good as an early end


def _object(value: bytes, is_error: bool) -> dict[str, Any]:
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise errors.EngineError(f"the engine sent something that is not JSON: {value[:80]!r}", code="bad_stream")
    return {"error": found.get("error", found)} if is_error else found


def _refused(response: http.client.HTTPResponse) -> errors.LlmDaemonError:
    try:
        detail = json.loads(response.read(100_000))["error"]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        detail = f"HTTP status {response.status} {response.reason}"
    return _told(response.status, detail)


def _told(status: int, detail: object) -> errors.LlmDaemonError:
    """The error in OpenAI's form as one of ours."""
    if not isinstance(detail, dict):
        detail = {"message": str(detail)}
    kind: type[errors.LlmDaemonError] = errors.EngineError
    if status in (429, 503) or detail.get("code") == "stopped":  # in the middle of an answer it has no status of its own
        kind = errors.Unavailable
    elif detail.get("code") == "bug":
        kind = errors.Bug
    elif status < 500:
        kind = errors.UsageError
    extra = {k: detail[k] for k in ("last_words", "log", "retry_after") if k in detail}
    code, message = detail.get("code"), str(detail.get("message") or detail)
    hint = str(detail.get("hint") or "")
    if not hint and "context size" in message:  # llama.cpp's words
        hint = "say less (in a chat: /clear), or load it with more room: --context TOKENS"
    return kind(message, hint=hint, code=code if isinstance(code, str) else None, status=status, **extra)
