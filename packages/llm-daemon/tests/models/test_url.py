"""Files from an address: what is taken, resumed, refused; against servers on loopback."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shlex
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from llm_daemon.errors import LlmDaemonError, Unavailable, UsageError
from llm_daemon.models import delivery, download, url
from llm_daemon.models.delivery import Reporter
from llm_daemon.models.fetch import fetch, fetch_sync
from llm_daemon.models.store import Store
from llm_daemon.models.worker import obtain
from llm_daemon.spec import Artifact

from .web import Web


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.fixture
def web() -> Iterator[Web]:
    running = Web()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def cert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate of files.test in one file."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=files.test", "-keyout", path,
         "-out", f"{path}.crt", "-addext", "subjectAltName=DNS:files.test,DNS:other.test,IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


@pytest.fixture
def secure(cert: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """An https server whose certificate is trusted, and which files.test and other.test lead to."""
    real = socket.getaddrinfo

    def lookup(host: str, *args: Any, **options: Any) -> Any:
        return real("127.0.0.1" if host in ("files.test", "other.test") else host, *args, **options)

    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    running = Web(cert=cert)
    yield running
    running.stop()


@pytest.fixture
def model(gguf: Callable[..., bytes]) -> bytes:
    """A model of some 300 kB."""
    return gguf(weights=random.Random(7).randbytes(300_000))


class Bench:
    """Fetches in this process."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root)
        self.progress: list[dict[str, Any]] = []

    def fetch(self, artifact: Artifact) -> Path:
        clock = iter(range(10**9))  # time flies: every report goes out
        return obtain(artifact, self.store, Reporter(self.progress.append, lambda: float(next(clock))))

    def refused(self, artifact: Artifact, code: str) -> LlmDaemonError:
        with pytest.raises(LlmDaemonError) as caught:
            self.fetch(artifact)
        assert caught.value.code == code and "\n" not in caught.value.message
        assert self.store.path(artifact) is None and not self.left("*.gguf") and not self.left("*.tmp")
        return caught.value

    def left(self, pattern: str) -> list[Path]:
        return list(self.store.root.glob(f"models/*/{pattern}"))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "store")


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("https://me:s3cret@host/m.gguf", "credentials"),
        ("https://host/m.gguf?token=s3cret", "a query"),
        ("https://host/m.bin", "not the address of a .gguf"),
        ("https:///m.gguf", "not the address of a .gguf"),
        ("https://host:port/m.gguf", "not an address"),
        ("https://[::1/m.gguf", "not an address"),
        ("http://host/m.gguf", "for this machine only"),
        ("http://127.0.0.1.host/m.gguf", "for this machine only"),
        ("https://host/m.gguf#sha256=12", "is not a hash"),
        ("https://host/m-00001-of-00002.gguf", "one of several parts"),
    ],
)
def test_addresses_that_are_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        url.resolve(text)
    assert caught.value.code == "bad_spec" and "s3cret" not in caught.value.full()


def test_an_address_and_its_pin() -> None:
    plain, pinned = url.resolve("https://Host/m.gguf"), url.resolve("https://host/m.gguf#sha256=" + "AB" * 32)
    assert (plain.source, plain.locator, plain.key) == ("https", "https://host/m.gguf", "https://host/m.gguf")
    assert (pinned.locator, pinned.key, pinned.sha256) == (plain.locator, "sha256:" + "ab" * 32, "ab" * 32)


@pytest.mark.parametrize("pin", [False, True])
def test_fetches_and_cleans_up(bench: Bench, secure: Web, model: bytes, pin: bool) -> None:
    secure.files["/a/m.gguf"] = model
    artifact = url.resolve(f"{secure.url}/a/m.gguf" + (f"#sha256={sha(model)}" if pin else ""))
    path = bench.fetch(artifact)
    assert path.read_bytes() == model and {p.name for p in path.parent.iterdir()} == {path.name, "model.json"}
    (stored,) = bench.store.list()
    assert (stored.source, stored.locator, stored.sha256) == ("https", f"{secure.url}/a/m.gguf", sha(model))
    last = [m for m in bench.progress if m["phase"] == "download"][-1]
    assert (last["done"], last["total"], last["message"]) == (len(model), len(model), "m.gguf")
    assert bench.fetch(artifact) == path and len(secure.seen) == 1
    assert bench.store.remove(artifact) > 0 and bench.store.list() == []


def test_an_unknown_certificate_is_refused(bench: Bench, secure: Web, model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    secure.files["/m.gguf"] = model
    assert "certificate" in bench.refused(url.resolve(f"{secure.url}/m.gguf"), "download_failed").message.lower()


def test_a_cut_connection_is_taken_up_where_it_broke(bench: Bench, web: Web, model: bytes) -> None:
    web.files["/m.gguf"], web.cuts = model, [100_000, 50_000]
    assert bench.fetch(url.resolve(f"{web.url}/m.gguf")).read_bytes() == model
    assert web.asked("/m.gguf") == [None, "bytes=100000-", "bytes=150000-"]
    assert web.asked("/m.gguf", "if-range")[1:] == [f'"{sha(model)[:16]}"'] * 2


def test_a_server_that_sends_less_than_was_asked_for(bench: Bench, web: Web, model: bytes) -> None:
    web.files["/m.gguf"], web.cuts, web.piece = model, [100_000], 150_000
    assert bench.fetch(url.resolve(f"{web.url}/m.gguf")).read_bytes() == model
    assert web.asked("/m.gguf") == [None, "bytes=100000-", "bytes=250000-"]


def test_a_server_that_dies_midway_and_comes_back(bench: Bench, model: bytes) -> None:
    first = Web()
    artifact = url.resolve(f"{first.url}/m.gguf")
    first.files["/m.gguf"], first.cuts, first.dies = model, [70_000], True
    error = bench.refused(artifact, "download_failed")
    first.stop()
    assert isinstance(error, Unavailable) and "resumes" in error.hint
    again = Web(first.port)
    try:
        again.files["/m.gguf"] = model
        assert bench.fetch(artifact).read_bytes() == model
        assert again.asked("/m.gguf") == ["bytes=70000-"]
    finally:
        again.stop()


@pytest.mark.parametrize("etag", [None, "", 'W/"weak"'])
def test_a_file_that_changed_meanwhile_comes_whole(bench: Bench, web: Web, model: bytes, etag: str | None) -> None:
    """Also where the server gives its files no version, or none that says anything about bytes."""
    if etag is not None:
        web.etags["/m.gguf"] = etag
    web.files["/m.gguf"], web.cuts = b"GGUF" + bytes(len(model) - 4), [100_000, 0]
    artifact = url.resolve(f"{web.url}/m.gguf")
    bench.refused(artifact, "download_failed")
    web.files["/m.gguf"], web.cuts = model, []
    assert bench.fetch(artifact).read_bytes() == model


def test_a_pinned_file_whose_beginning_was_wrong_comes_whole(bench: Bench, web: Web, model: bytes) -> None:
    artifact = url.resolve(f"{web.url}/m.gguf#sha256={sha(model)}")
    web.etags["/m.gguf"] = '"always the same"'
    web.files["/m.gguf"], web.cuts = b"GGUF" + bytes(len(model) - 4), [100_000, 0]
    bench.refused(artifact, "download_failed")
    web.files["/m.gguf"] = model
    assert bench.fetch(artifact).read_bytes() == model
    assert web.asked("/m.gguf")[-2:] == ["bytes=100000-", None]


def test_another_file_than_is_pinned(bench: Bench, web: Web, model: bytes) -> None:
    web.files["/m.gguf"] = model
    bench.refused(url.resolve(f"{web.url}/m.gguf#sha256={'0' * 64}"), "hash_mismatch")
    assert not bench.left("*.part")


def test_a_server_without_ranges(bench: Bench, web: Web, model: bytes) -> None:
    web.files["/m.gguf"], web.cuts, web.ranges = model, [100_000], False
    assert bench.fetch(url.resolve(f"{web.url}/m.gguf")).read_bytes() == model


def test_what_is_whole_already_is_not_sent_again(bench: Bench, web: Web, model: bytes) -> None:
    """We were killed between the last byte and the move into place."""
    web.files["/m.gguf"], web.cuts = model, [len(model) - 1, 0]
    artifact = url.resolve(f"{web.url}/m.gguf")
    bench.refused(artifact, "download_failed")
    (part,) = bench.left("weights.part")
    part.write_bytes(model)
    assert bench.fetch(artifact).read_bytes() == model


@pytest.mark.parametrize("body", [b"<html>please log in</html>", b"GG", b"", b"GGUF and then nonsense"])
def test_what_is_not_gguf_is_not_kept(bench: Bench, web: Web, body: bytes) -> None:
    web.files["/m.gguf"] = body
    bench.refused(url.resolve(f"{web.url}/m.gguf"), "bad_model")
    assert not bench.left("*")


def test_a_truncated_model_is_never_there(bench: Bench, web: Web, model: bytes) -> None:
    web.files["/m.gguf"] = model[:-9]
    assert "truncated" in bench.refused(url.resolve(f"{web.url}/m.gguf"), "bad_model").message


def test_a_file_of_unknown_or_absurd_size(bench: Bench, web: Web, model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    web.files["/m.gguf"], web.lengths = model, False
    assert "how large" in bench.refused(url.resolve(f"{web.url}/m.gguf"), "bad_model").message
    web.lengths = True
    monkeypatch.setattr(download, "MAX_BYTES", 1000)
    assert "refused" in bench.refused(url.resolve(f"{web.url}/m.gguf"), "bad_model").message


def test_a_disk_that_is_too_small(bench: Bench, web: Web, model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    class Small:
        free = 1000

    monkeypatch.setattr(delivery.shutil, "disk_usage", lambda _: Small)  # type: ignore[attr-defined]
    web.files["/m.gguf"] = model
    error = bench.refused(url.resolve(f"{web.url}/m.gguf"), "disk_full")
    assert f"{len(model):,}" in error.message and not bench.left("*.part")


def test_a_disk_that_fills_up_midway(web: Web, model: bytes, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nulimit -f 200\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    web.files["/m.gguf"] = model
    artifact, root = url.resolve(f"{web.url}/m.gguf"), tmp_path / "store"
    with pytest.raises(Unavailable) as caught:
        fetch_sync(artifact, root, python=str(python))
    assert (
        caught.value.code == "disk_full"
        and f"needs {len(model):,}" in caught.value.message
        and Store(root).path(artifact) is None
    )
    assert fetch_sync(artifact, root).read_bytes() == model
    assert web.asked("/m.gguf")[1] not in (None, "bytes=0-"), "what fitted was kept"


def test_two_fetches_download_once(web: Web, model: bytes, tmp_path: Path) -> None:
    web.files["/m.gguf"], web.gate = model, threading.Event()
    artifact, gate = url.resolve(f"{web.url}/m.gguf"), web.gate

    def on_progress(message: dict[str, Any]) -> None:
        if message["message"] == "another process is downloading it":
            gate.set()

    async def both() -> list[Path]:
        return list(await asyncio.gather(*(fetch(artifact, tmp_path, on_progress) for _ in range(2))))

    first, second = asyncio.run(both())
    assert first == second and first.read_bytes() == model and len(web.seen) == 1


@pytest.mark.parametrize(
    ("status", "code"), [(404, "no_such_file"), (401, "access_denied"), (403, "access_denied"), (500, "download_failed")]
)
def test_servers_that_refuse(bench: Bench, web: Web, status: int, code: str) -> None:
    web.status = status
    bench.refused(url.resolve(f"{web.url}/m.gguf"), code)


def test_nobody_listens(bench: Bench) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        bench.refused(url.resolve(f"http://127.0.0.1:{s.getsockname()[1]}/m.gguf"), "download_failed")


def test_five_redirects_and_not_six(bench: Bench, web: Web, model: bytes) -> None:
    web.files["/m.gguf"] = model
    web.moved = {f"/{n}.gguf": f"/{n - 1}.gguf" if n > 1 else f"{web.url}/m.gguf" for n in range(1, 7)}
    assert "more than 5" in bench.refused(url.resolve(f"{web.url}/6.gguf"), "download_failed").message
    assert bench.fetch(url.resolve(f"{web.url}/5.gguf")).read_bytes() == model


@pytest.mark.parametrize("host", ["127.0.0.1", "other.test", "localhost", "files.test"])
def test_no_redirect_to_this_machine(bench: Bench, secure: Web, model: bytes, host: str) -> None:
    """By address, by a name that leads to it, and by the first name once more: names may change what they mean."""
    secure.files["/m.gguf"] = model
    secure.moved["/a.gguf"] = f"https://{host}:{secure.port}/m.gguf"
    error = bench.refused(url.resolve(f"https://files.test:{secure.port}/a.gguf"), "bad_spec")
    assert "private network" in error.message and [p for _, p, _ in secure.seen] == ["/a.gguf"]


class Proxy(socketserver.ThreadingTCPServer):
    """Takes CONNECT requests, notes whom they ask for, and connects to one server whatever they ask."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Connect)
        self.port, self.asked = port, list[str]()


class _Connect(socketserver.StreamRequestHandler):
    server: Proxy

    def handle(self) -> None:
        self.server.asked.append(self.rfile.readline().split()[1].decode())
        while self.rfile.readline().strip():
            pass
        with socket.create_connection(("127.0.0.1", self.server.port)) as there:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            back = threading.Thread(target=self._pump, args=(there, self.connection))
            back.start()
            self._pump(self.connection, there)
            back.join()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy(secure: Web, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with Proxy(secure.port) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{running.server_address[1]}")
        yield running
        running.shutdown()
        thread.join()


def test_a_proxy_is_used(bench: Bench, secure: Web, proxy: Proxy, model: bytes) -> None:
    secure.files["/m.gguf"] = model
    secure.moved["/a.gguf"] = "https://other.test/m.gguf"
    assert bench.fetch(url.resolve("https://files.test/a.gguf")).read_bytes() == model
    assert proxy.asked == ["files.test:443", "other.test:443"]


@pytest.mark.parametrize("host", ["10.0.0.1", "[::1]", "127.1", "2130706433", "0x7f.1", "localhost"])
def test_no_redirect_to_a_private_address_by_way_of_a_proxy_either(bench: Bench, secure: Web, proxy: Proxy, host: str) -> None:
    secure.moved["/a.gguf"] = f"https://{host}/m.gguf"
    assert "private network" in bench.refused(url.resolve("https://files.test/a.gguf"), "bad_spec").message
    assert proxy.asked == ["files.test:443"]


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("http://files.test/m.gguf", "plain http"),
        ("http://1.1.1.1/m.gguf", "plain http"),
        ("file:///etc/passwd", "neither https nor http"),
        ("ftp://host/m.gguf", "neither https nor http"),
        ("https://me:s3cret@files.test/m.gguf", "credentials"),
    ],
)
def test_redirects_that_are_not_followed(bench: Bench, secure: Web, where: str, says: str) -> None:
    secure.moved["/a.gguf"] = where
    error = bench.refused(url.resolve(f"{secure.url}/a.gguf"), "bad_spec")
    assert says in error.message and "s3cret" not in error.full() and len(secure.seen) == 1
