from __future__ import annotations

from pathlib import Path

import pytest

from llm_daemon.errors import Unavailable
from llm_daemon.models.sources import slug
from llm_daemon.models.store import Store
from llm_daemon.spec import Artifact

PINNED = Artifact("pypi", "a==1", "sha256:" + "cd" * 32, size=3, sha256="cd" * 32, quant="Q4_0", license="MIT")
UNPINNED = Artifact("pypi", "b==2", "pypi:b==2")


def put(store: Store, artifact: Artifact, data: bytes = b"abc") -> Path:
    temp = store.folder(artifact) / "weights.tmp"
    temp.parent.mkdir(parents=True)
    temp.write_bytes(data)
    return store.commit(artifact, temp, len(data), "cd" * 32)


def test_what_was_put_in_is_found_and_listed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.path(PINNED) is None and store.list() == [] and store.disk_bytes() == 0
    path, other = put(store, PINNED), put(store, UNPINNED)
    assert path.read_bytes() == b"abc" and path.name == "a-1.gguf" and other != path
    assert (store.path(PINNED), store.path(UNPINNED)) == (path, other)
    first, second = store.list()
    assert (first.locator, first.quant, first.license, first.size, first.key) == ("a==1", "Q4_0", "MIT", 3, PINNED.key)
    assert second.sha256 == "cd" * 32
    assert store.disk_bytes() == first.disk + second.disk > 0


def test_the_same_bytes_from_elsewhere_are_the_same_model(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = put(store, PINNED)
    assert store.path(Artifact("pypi", "other==9", PINNED.key, sha256=PINNED.sha256)) == path


def test_only_whole_models_are_there(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = put(store, PINNED)
    path.write_bytes(b"ab")
    assert store.path(PINNED) is None and store.list() == []
    path.write_bytes(b"abc")
    assert store.path(PINNED) == path
    for broken in ("", "[]", '{"file": "x"}', "{"):
        (path.parent / "model.json").write_text(broken)
        assert store.path(PINNED) is None and store.list() == []


def test_a_note_cannot_point_elsewhere(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = put(store, PINNED)
    (tmp_path / "secret").write_bytes(b"abc")
    note = path.parent / "model.json"
    note.write_text(note.read_text().replace(path.name, "../../secret"))
    assert store.path(PINNED) is None


def test_a_file_in_place_is_not_in_the_store(tmp_path: Path) -> None:
    store, mine = Store(tmp_path / "store"), tmp_path / "m.gguf"
    artifact = Artifact("file", str(mine), "file:m")
    assert store.path(artifact) is None
    mine.write_bytes(b"GGUF")
    assert store.path(artifact) == mine
    assert store.remove(artifact) == 0 and mine.exists()


@pytest.mark.parametrize("which", [PINNED, "a==1", "cd" * 32, PINNED.key, "sha256-" + "cd" * 32])
def test_remove(tmp_path: Path, which: Artifact | str) -> None:
    store = Store(tmp_path)
    put(store, PINNED)
    put(store, UNPINNED, b"x" * 5000)
    left = [s for s in store.list() if s.locator == "b==2"]
    if which == "cd" * 32:  # both have this hash
        left = []
    assert store.remove(which) > 0
    assert store.list() == left
    assert store.remove(which) == 0


def test_bytes_that_another_model_has_too_stay(tmp_path: Path) -> None:
    """One file at two revisions of a repository."""
    store, hub = Store(tmp_path / "store"), tmp_path / "hub"
    (hub / "blobs").mkdir(parents=True)
    (hub / "blobs" / "b").write_bytes(b"GGUF")
    links = []
    for artifact, commit in ((PINNED, "one"), (UNPINNED, "two")):
        entry, folder = hub / commit / "m.gguf", store.folder(artifact)
        entry.parent.mkdir()
        entry.symlink_to("../blobs/b")
        put(store, artifact)
        (folder / "m.gguf").symlink_to(entry)
        links.append(folder / "m.gguf")
    store.remove(PINNED)
    assert not links[0].exists() and links[1].read_bytes() == b"GGUF"
    store.remove(UNPINNED)
    assert not (hub / "blobs" / "b").exists()


def test_remove_takes_an_unfinished_download_too(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.folder(PINNED).mkdir(parents=True)
    (store.folder(PINNED) / "wheel-x.part").write_bytes(bytes(10_000))
    assert store.disk_bytes() >= 10_000
    assert store.remove(PINNED) >= 10_000
    assert store.disk_bytes() == 0


def test_nothing_is_removed_while_it_is_fetched(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = put(store, PINNED)
    with Store(tmp_path).lock(PINNED, lambda: pytest.fail("nobody else holds it")):
        with pytest.raises(Unavailable, match="being fetched"):
            store.remove(PINNED)
        assert path.exists()
    assert store.remove(PINNED) > 0


def test_slug_is_always_a_harmless_name() -> None:
    for text in ("", "..", "/", "a/../b", "\0", "-rf", ".hidden", "x" * 500, "ä ö"):
        name = slug(text)
        assert 0 < len(name) <= 100 and "/" not in name and not name.startswith((".", "-"))
