"""A web server on loopback for the sources `https` and `hf`: files with versions and ranges, a model hub, and what goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import ssl
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from llm_daemon.errors import LlmDaemonError
from llm_daemon.models.catalog import Catalog
from llm_daemon.models.fetch import fetch_sync
from llm_daemon.models.store import Store
from llm_daemon.spec import Artifact, Wish

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "org/Tiny-GGUF"


class Web(ThreadingHTTPServer):
    """Serves `files` (bytes by path), `moved` (another address by path) and `repos` (files by name, by repository).
    `revisions`: commits by branch or tag; what a repository has at one is in `repos` as `REPO@COMMIT`.

    `etags`: by path (of a hub: by name), where it is not made from the bytes.  `sizes`: what the hub says of a file by its
    name, where it lies.  `piece`: the most bytes that a range brings.  `cuts`: how many bytes of the next files are sent
    before the connection breaks.  `dies`: with the first cut the whole server goes.  `gate`: with it, a file stops after its
    first 20,000 bytes until it is set.  `gated`: repositories that want the header `Bearer <token>`.  `cdn`: where a
    repository's large files are sent from.  `seen`: (method, path, headers in lower case) of each request.
    """

    daemon_threads = True

    def __init__(self, port: int = 0, cert: Path | None = None) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.files: dict[str, bytes] = {}
        self.moved: dict[str, str] = {}
        self.repos: dict[str, dict[str, bytes]] = {}
        self.revisions: dict[str, str] = {}
        self.etags: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self.cuts: list[int] = []
        self.piece = 2**40
        self.gate: threading.Event | None = None
        self.gated: set[str] = set()
        self.token = "hf_s3cret"
        self.ranges, self.dies, self.lengths = True, False, True
        self.status = 0
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        if cert:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(cert)
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.port = self.server_address[1]
        self.url = f"http{'s' if cert else ''}://127.0.0.1:{self.port}"
        self.cdn = self.url.replace("127.0.0.1", "localhost")  # another host, as far as names go
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def asked(self, path: str, header: str = "range", method: str = "GET") -> list[str | None]:
        """What each request for a path said in one header."""
        return [headers.get(header) for m, p, headers in self.seen if (m, p) == (method, path)]

    def stop(self) -> None:
        if self.gate:
            self.gate.set()
        self.shutdown()
        self.server_close()
        self._thread.join()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what we test."""


class _Handler(BaseHTTPRequestHandler):
    server: Web
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server = self.server
        path = self.path.partition("?")[0]
        server.seen.append((self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        if server.status:
            return self._answer(server.status, b"no")
        if path in server.moved:
            return self._answer(302, b"", {"Location": server.moved[path]})
        if path in server.files:
            return self._file(path, server.files[path])
        if path.startswith("/api/models/"):
            return self._repo(path.removeprefix("/api/models/"))
        repo, _, rest = path.strip("/").partition("/resolve/")
        if rest and repo in server.repos:
            return self._resolve(repo, *rest.split("/", 1))
        self._answer(404, b"nothing here", {"X-Error-Code": "EntryNotFound"})

    def _repo(self, repo: str) -> None:
        repo, at, revision = repo.partition("/revision/")
        commit = self.server.revisions.get(unquote(revision), revision) if at else COMMIT
        if repo not in self.server.repos:
            return self._answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        if commit != COMMIT and f"{repo}@{commit}" not in self.server.repos:
            return self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = [
            {"rfilename": n, "size": len(d), "lfs": {"sha256": _sha(d), "size": len(d), "pointerSize": 130}}
            for n, d in self._files(repo, commit).items()
        ]
        body = {"id": repo, "sha": commit, "siblings": files, "private": False, "gated": "auto", "tags": [], "downloads": 0}
        self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _files(self, repo: str, commit: str) -> dict[str, bytes]:
        return self.server.repos[repo if commit == COMMIT else f"{repo}@{commit}"]

    def _resolve(self, repo: str, commit: str, name: str) -> None:
        server = self.server
        if repo in server.gated and self.headers["Authorization"] != f"Bearer {server.token}":
            status = 403 if self.headers["Authorization"] else 401
            return self._answer(status, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "accept first"})
        if (data := self._files(repo, commit).get(name)) is None:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        told = {
            "X-Repo-Commit": commit,
            "X-Linked-Etag": server.etags.get(name, f'"{_sha(data)}"'),
            "X-Linked-Size": str(server.sizes.get(name, len(data))),
        }
        self._answer(302, b"", told | {"Location": f"{server.cdn}/blob/{name}?signature=1"})

    def _file(self, path: str, data: bytes) -> None:
        etag = self.server.etags.get(path, f'"{_sha(data)[:16]}"')
        told = {"ETag": etag} if etag else {}
        asked, since = self.headers["Range"], self.headers["If-Range"]
        if not (asked and self.server.ranges) or (since and since != etag):
            return self._answer(200, data, told)
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(data):
            return self._answer(416, b"", told | {"Content-Range": f"bytes */{len(data)}"})
        part = data[start : start + self.server.piece]
        self._answer(206, part, told | {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(data)}"})

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        server = self.server
        self.send_response(status)
        length = {"Content-Length": str(len(body))} if server.lengths else {"Connection": "close"}
        for key, value in {**length, **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        is_file = self.path.partition("?")[0] in server.files and status in (200, 206)
        if is_file and server.cuts:
            self.wfile.write(body[: server.cuts.pop(0)])
            self.close_connection = True
            if server.dies:
                server.shutdown()
                server.server_close()
            return
        if is_file and server.gate:
            self.wfile.write(body[:20_000])
            server.gate.wait(60)
            body = body[20_000:]
        self.wfile.write(body)
        self.close_connection = self.close_connection or not server.lengths


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Bench:
    """Fetches with the environment that a user of `hub` has."""

    def __init__(self, hub: Web, tmp_path: Path) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
        self.hub, self.root, self.cache = hub, tmp_path / "store", tmp_path / "hf" / "hub"
        self.env = kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path)}
        self.progress: list[dict[str, Any]] = []

    def put(self, name: str, data: bytes, repo: str = REPO) -> None:
        self.hub.repos.setdefault(repo, {})[name] = data
        self.hub.files[f"/blob/{name}"] = data

    def artifact(self, locator: str) -> Artifact:
        """What a locator of `hf`, or a whole name, means."""
        name = locator if locator.startswith("mlc:") else f"hf:{locator}"
        return Catalog.load({}).resolve(Wish.parse(name)).artifact

    def fetch(self, locator: str = f"{REPO}:Q4_0") -> Path:
        return fetch_sync(self.artifact(locator), self.root, self.progress.append, env=self.env)

    def refused(self, code: str, locator: str = f"{REPO}:Q4_0") -> LlmDaemonError:
        with pytest.raises(LlmDaemonError) as caught:
            self.fetch(locator)
        assert caught.value.code == code, caught.value.full()
        assert Store(self.root).path(self.artifact(locator)) is None and "s3cret" not in caught.value.full()
        return caught.value

    def blobs(self) -> list[str]:
        return sorted(p.name for p in self.cache.glob("models--*/blobs/*"))
