"""The process that stands for a model of a running Ollama: loads, relays, gives back."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from llm_daemon.engines import _ollama_host, ollama
from llm_daemon.testing import replay
from llm_daemon.testing.running import EngineConnection, call

RECORDING = "ollama-00188139"


@contextmanager
def host(url: str, folder: Path, model: str = "smollm2:135m", context: str = "0") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The host process and its socket."""
    path = str(folder / "e.sock")
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", ollama.HOST, url, model, path, context], stderr=subprocess.PIPE, text=True
    )
    try:
        yield process, path
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def wait_for(process: subprocess.Popen[str], words: str) -> str:
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if words in line:
            return said
    raise AssertionError(f"it ended with {process.wait()}: {said}")


def ps(url: str) -> list[str]:
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as sock:
        sock.sendall(b"GET /api/ps HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        text = b"".join(iter(lambda: sock.recv(65536), b""))
    return [model["name"] for model in json.loads(text.partition(b"\r\n\r\n")[2])["models"]]


def test_a_model_is_loaded_at_the_start_and_unloaded_at_the_end(tmp_path: Path) -> None:
    with replay.serve(RECORDING) as url, host(url, tmp_path) as (process, path):
        said = wait_for(process, "ready")
        assert "Ollama 0.0.0" in said and "4096 tokens of context" in said
        assert ps(url) == ["smollm2:135m"]
        assert call(path, "/health") == (200, {"status": "ok"})
        status, answer = call(path, "/v1/chat/completions", {"model": "smollm2:135m", "messages": [{}], "max_tokens": 2})
        assert (status, answer["usage"]["completion_tokens"]) == (200, 2)
        process.terminate()
        assert process.wait(timeout=20) == 0
        assert ps(url) == []


def test_only_inference_is_relayed(tmp_path: Path) -> None:
    with replay.serve(RECORDING) as url, host(url, tmp_path) as (process, path):
        wait_for(process, "ready")
        for route in ("/api/delete", "/api/create", "/api/pull", "/api/generate", "/v1/../api/ps", "/v1/%2e%2e/api/ps", "/"):
            status, answer = call(path, route, {"model": "x"})
            assert (status, answer["error"]["type"]) == (404, "not_found_error"), route


def test_a_hang_up_reaches_ollama(tmp_path: Path) -> None:
    """Its only slot would serve the next one in six seconds otherwise."""
    with replay.serve(RECORDING) as url, host(url, tmp_path) as (process, path):
        wait_for(process, "ready")
        connection = EngineConnection(path)
        connection.request("POST", "/v1/chat/completions", json.dumps({"model": "m", "messages": [{}], "stream": True}))
        connection.getresponse().readline()
        connection.close()
        began = time.monotonic()
        assert call(path, "/v1/chat/completions", {"model": "m", "messages": [{}], "max_tokens": 1})[0] == 200
        assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("model", "context", "status", "words"),
    [
        ("no-such-model", "0", 5, "error: model 'no-such-model' not found"),
        ("smollm2:135m", "8192", 5, "with 4096 tokens of context, 8192 are asked for: OLLAMA_CONTEXT_LENGTH"),
    ],
)
def test_what_cannot_be_loaded_is_told(tmp_path: Path, model: str, context: str, status: int, words: str) -> None:
    with replay.serve(RECORDING) as url, host(url, tmp_path, model, context) as (process, _):
        assert words in wait_for(process, "error:")
        assert process.wait(timeout=20) == status
        assert ps(url) == []


def test_a_model_that_only_embeds(tmp_path: Path) -> None:
    with replay.serve(RECORDING) as url, host(url, tmp_path, "only-embeds") as (process, path):
        wait_for(process, "ready")
        assert ps(url) == ["only-embeds"]
        status, answer = call(path, "/v1/embeddings", {"model": "only-embeds", "input": "a"})
        assert (status, len(answer["data"])) == (200, 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        assert ps(url) == []


def test_no_ollama_and_one_that_goes(tmp_path: Path) -> None:
    with ExitStack() as stack:
        url = stack.enter_context(replay.serve(RECORDING))
        with host(url, tmp_path) as (process, path):
            wait_for(process, "ready")
            stack.close()
            with pytest.raises(OSError):
                call(path, "/v1/chat/completions", {"messages": [{}], "max_tokens": 1})
            assert process.wait(timeout=20) == 6
        with host(url, tmp_path / "..") as (process, _):
            assert "no Ollama answers at" in wait_for(process, "error:")
            assert process.wait(timeout=20) == 4


class Scripted:
    """Answers of an Ollama, and what it was asked."""

    url = "http://scripted"

    def __init__(self, loaded: dict[str, Any] | None) -> None:
        self.loaded, self.asked = loaded, list[tuple[str, Any]]()

    async def call(self, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
        self.asked.append((path, body))
        if path == "/api/ps":
            return 200, {"models": [self.loaded] if self.loaded else []}
        if body and body.get("keep_alive") == 0:
            self.loaded = None
        elif body:
            self.loaded = self.loaded or {"name": "m:latest", "context_length": 4096}
        return 200, {"version": "1", "created_at": "2026-08-20T10:00:00.987654321Z"}


def run(loaded: dict[str, Any] | None) -> list[Any]:
    """Values of keep_alive that are asked for in the life of a host."""
    server = Scripted(loaded)

    async def life() -> None:
        it = _ollama_host.Host(server, "m", 0)  # type: ignore[arg-type]
        await it.load()
        await it.let_go()

    asyncio.run(life())
    return [body["keep_alive"] for path, body in server.asked if path == "/api/generate"]


def test_a_model_that_was_there_before_us_is_given_back_its_time() -> None:
    assert run(None) == ["300s", 0]
    assert run({"name": "m:latest", "expires_at": "2026-08-20T10:02:00.123456789Z"}) == ["300s", "120s"]
    assert run({"name": "m:latest", "expires_at": "2026-08-20T12:02:00.5+02:00"}) == ["300s", "120s"]
    assert run({"name": "m:latest", "expires_at": "2318-12-01T00:00:00Z"}) == ["300s", "-1s"]  # for ever
    assert run({"name": "m:latest", "expires_at": "2026-08-20T09:00:00Z"}) == ["300s", "1s"]
    assert run({"name": "m:latest", "expires_at": "2026-08-20T12:00:00"}) == ["300s", "1s"]
    assert run({"name": "m:latest", "expires_at": "nonsense"}) == ["300s", "1s"]


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        (b'HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n{"a":1}', (200, {"a": 1})),
        (b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{"a\r\n4\r\n":1}\r\n0\r\n\r\n', (200, {"a": 1})),
        (b"HTTP/1.1 404 Not Found\r\n\r\n404 page not found", (404, {})),
        (b"HTTP/1.1 200 OK\r\n\r\n[1]", (200, {})),
    ],
)
def test_answers_are_read(answer: bytes, wanted: tuple[int, dict[str, Any]]) -> None:
    assert _ollama_host.parse(answer) == wanted


def test_what_is_no_http_is_no_ollama() -> None:
    with pytest.raises(_ollama_host.Gone):
        _ollama_host.parse(b"SSH-2.0\r\n")
