"""Fetching from a hub into its own cache; against a small hub on loopback."""

from __future__ import annotations

import asyncio
import hashlib
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_daemon.errors import Unavailable, UsageError
from llm_daemon.models import hf
from llm_daemon.models.fetch import fetch, fetch_sync
from llm_daemon.models.gguf import header
from llm_daemon.models.store import Store
from llm_daemon.spec import Artifact

from .web import COMMIT, REPO, Bench, Web

OLD = "89abcdef" * 5


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def model(gguf: Callable[..., bytes]) -> bytes:
    """A model of some 300 kB."""
    return gguf(weights=random.Random(8).randbytes(300_000))


def test_fetches_into_the_hubs_own_cache(bench: Bench, model: bytes, gguf: Callable[..., bytes]) -> None:
    bench.put("sub/tiny.Q4_0.gguf", model)
    bench.put("tiny.Q8_0.gguf", gguf())
    path = bench.fetch()
    assert path.read_bytes() == model
    entry = bench.cache / "models--org--Tiny-GGUF" / "snapshots" / COMMIT / "sub" / "tiny.Q4_0.gguf"
    assert path.readlink() == entry and bench.blobs() == [sha(model)]
    (stored,) = Store(bench.root).list()
    assert (stored.locator, stored.sha256, stored.quant) == (f"{REPO}:Q4_0", sha(model), "Q4_0") and stored.disk > len(model)
    last = [m for m in bench.progress if m["phase"] == "download"][-1]
    assert (last["done"], last["total"], last["message"]) == (len(model), len(model), "sub/tiny.Q4_0.gguf")
    assert not any("another process" in m["message"] for m in bench.progress)
    asked = len(bench.hub.seen)
    assert bench.fetch() == path and len(bench.hub.seen) == asked, "nobody is asked for what is here"


def test_what_is_in_the_cache_is_not_fetched_again(bench: Bench, model: bytes) -> None:
    bench.put("tiny.Q4_0.gguf", model)
    bench.fetch()
    assert bench.fetch(f"{REPO}:tiny.Q4_0.gguf").read_bytes() == model
    assert bench.hub.asked("/blob/tiny.Q4_0.gguf") == [None]


def test_a_damaged_cache_is_mended(bench: Bench, model: bytes) -> None:
    bench.put("tiny.Q4_0.gguf", model)
    path = bench.fetch()
    path.resolve().write_bytes(bytes(len(model)))
    assert bench.fetch(f"{REPO}:tiny.Q4_0.gguf").read_bytes() == model
    assert len(bench.hub.asked("/blob/tiny.Q4_0.gguf")) == 2


def test_removing_frees_the_cache_too(bench: Bench, model: bytes) -> None:
    bench.put("tiny.Q4_0.gguf", model)
    path, store = bench.fetch(), Store(bench.root)
    assert store.remove(hf.resolve(f"{REPO}:Q4_0")) > len(model)
    assert bench.blobs() == [] and not path.parent.exists() and not list(bench.cache.rglob("*.gguf"))
    assert bench.fetch().read_bytes() == model


def test_a_cache_emptied_by_others_means_fetch_again(bench: Bench, model: bytes) -> None:
    bench.put("tiny.Q4_0.gguf", model)
    bench.fetch().resolve().unlink()
    assert Store(bench.root).list() == [] and bench.fetch().read_bytes() == model


def test_all_parts_of_a_split_model(bench: Bench, gguf: Callable[..., bytes]) -> None:
    parts = [gguf({"split.count": 3, "split.no": n}, weights=bytes([n]) * 10_000) for n in range(3)]
    for n, data in enumerate(parts, 1):
        bench.put(f"Q4_0/tiny-Q4_0-0000{n}-of-00003.gguf", data)
    path = bench.fetch()
    names = [f"org-Tiny-GGUF-Q4_0-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    assert path.name == names[0] and [(path.parent / n).read_bytes() for n in names] == parts
    assert Store(bench.root).size(hf.resolve(f"{REPO}:Q4_0")) == sum(map(len, parts))
    info = header(path)
    assert (info.split_count, info.n_params, info.tensor_count) == (3, 30_000, 3)
    totals = {m["total"] for m in bench.progress if m["phase"] == "download"}
    assert totals == {sum(map(len, parts))}
    (path.parent / names[2]).resolve().unlink()
    assert Store(bench.root).list() == [], "a model without one of its parts is not there"
    assert bench.fetch() == path and bench.hub.asked("/blob/Q4_0/tiny-Q4_0-00001-of-00003.gguf") == [None]


def test_a_cut_connection_is_taken_up_where_it_broke(bench: Bench, model: bytes) -> None:
    bench.put("tiny.Q4_0.gguf", model)
    bench.hub.cuts = [100_000]
    assert bench.fetch().read_bytes() == model
    assert bench.hub.asked("/blob/tiny.Q4_0.gguf") == [None, "bytes=100000-"]


def test_a_hub_that_dies_midway_and_comes_back(bench: Bench, model: bytes) -> None:
    bench.put("tiny.Q4_0.gguf", model)
    bench.hub.cuts, bench.hub.dies = [70_000], True
    assert "resumes" in bench.refused("download_failed").hint
    assert bench.blobs() == [f"{sha(model)}.incomplete"]
    again = Web(bench.hub.port)
    try:
        again.repos, again.files = bench.hub.repos, bench.hub.files
        assert bench.fetch().read_bytes() == model
        assert again.asked("/blob/tiny.Q4_0.gguf") == ["bytes=70000-"] and bench.blobs() == [sha(model)]
    finally:
        again.stop()


def test_removing_an_unfinished_download(bench: Bench, model: bytes) -> None:
    bench.put("tiny.Q4_0.gguf", model)
    bench.hub.cuts = [70_000, 0]
    bench.refused("download_failed")
    assert Store(bench.root).disk_bytes() >= 70_000
    assert Store(bench.root).remove(hf.resolve(f"{REPO}:Q4_0")) >= 70_000 and bench.blobs() == []


def test_a_file_that_is_not_what_the_hub_says(bench: Bench, model: bytes) -> None:
    bench.put("tiny.Q4_0.gguf", model)
    bench.hub.files["/blob/tiny.Q4_0.gguf"] = model[:-1] + bytes([model[-1] ^ 1])
    bench.refused("hash_mismatch")
    assert bench.blobs() == []


def test_a_small_file_that_git_keeps_itself(bench: Bench, model: bytes) -> None:
    bench.put("tiny.Q4_0.gguf", model)
    bench.hub.etags["tiny.Q4_0.gguf"] = '"' + "0" * 40 + '"'
    assert "is not what the hub says" in bench.refused("bad_model").message and bench.blobs() == []
    name = hashlib.sha1(b"blob %d\0" % len(model) + model).hexdigest()
    bench.hub.etags["tiny.Q4_0.gguf"] = f'"{name}"'
    assert bench.fetch().read_bytes() == model and bench.blobs() == [name]
    assert Store(bench.root).list()[0].sha256 == sha(model)


@pytest.mark.parametrize("etag", ["", '"../../evil"', '"a/b"'])
def test_an_etag_that_is_no_name(bench: Bench, model: bytes, etag: str) -> None:
    bench.put("tiny.Q4_0.gguf", model)
    bench.hub.etags["tiny.Q4_0.gguf"] = etag
    assert "does not say what" in bench.refused("bad_model").message and bench.blobs() == []


def test_a_file_that_changed_on_the_hub_meanwhile(bench: Bench, model: bytes) -> None:
    bench.put("tiny.Q4_0.gguf", bytes(reversed(model)))
    bench.hub.files["/blob/tiny.Q4_0.gguf"] = b"GGUF" + bytes(len(model) - 4)
    bench.hub.cuts = [70_000, 0]
    bench.refused("download_failed")
    bench.put("tiny.Q4_0.gguf", model)
    assert bench.fetch().read_bytes() == model and bench.hub.asked("/blob/tiny.Q4_0.gguf")[-1] is None


def test_what_is_not_a_model_is_not_linked(bench: Bench) -> None:
    bench.put("tiny.Q4_0.gguf", b"<html>")
    bench.refused("bad_model")
    assert bench.blobs() == []


def test_errors_that_list_the_choice(bench: Bench, model: bytes) -> None:
    bench.put("tiny.Q4_0.gguf", model)
    bench.put("tiny.Q8_0.gguf", model)
    assert "Q4_0 (0.0 GB), Q8_0 (0.0 GB)" in bench.refused("ambiguous_model", REPO).hint
    assert "Q4_0" in bench.refused("unknown_quant", f"{REPO}:Q5_0").hint
    assert "private" in bench.refused("no_such_repo", "org/none").hint


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_a_gated_repository(bench: Bench, model: bytes, token: str | None) -> None:
    bench.put("tiny.Q4_0.gguf", model)
    bench.hub.gated.add(REPO)
    if token:
        bench.env["HF_TOKEN"] = token
    error = bench.refused("gated_repo")
    assert isinstance(error, UsageError) and error.status == 403
    assert f"{bench.hub.url}/{REPO}" in error.hint and "hf auth login" in error.hint


@pytest.mark.parametrize("by", ["variable", "file"])
def test_the_token_goes_to_the_hub_and_to_nobody_else(bench: Bench, model: bytes, by: str) -> None:
    bench.put("tiny.Q4_0.gguf", model)
    bench.hub.gated.add(REPO)
    if by == "variable":
        bench.env["HF_TOKEN"] = bench.hub.token
    else:
        bench.cache.parent.mkdir()
        (bench.cache.parent / "token").write_text(bench.hub.token)
    elsewhere = Web()
    try:
        elsewhere.files, bench.hub.cdn = bench.hub.files, elsewhere.url
        assert bench.fetch().read_bytes() == model
        assert elsewhere.seen and not any("authorization" in headers for _, _, headers in elsewhere.seen)
        assert any(headers.get("authorization") == "Bearer hf_s3cret" for _, _, headers in bench.hub.seen)
    finally:
        elsewhere.stop()


def test_a_hub_that_has_moved_does_not_take_the_token_along(bench: Bench, model: bytes) -> None:
    bench.put("tiny.Q4_0.gguf", model)
    bench.env["HF_TOKEN"] = bench.hub.token
    elsewhere = Web()
    try:
        elsewhere.repos, elsewhere.files = bench.hub.repos, bench.hub.files
        bench.hub.moved = {f"/api/models/{REPO}": f"{elsewhere.url}/api/models/{REPO}"}
        bench.fetch()
        assert elsewhere.seen and not any("authorization" in headers for _, _, headers in elsewhere.seen)
    finally:
        elsewhere.stop()


@pytest.mark.parametrize("how", ["variable", "network"])
def test_offline_the_cache_is_used(bench: Bench, model: bytes, gguf: Callable[..., bytes], how: str) -> None:
    bench.put("tiny.Q4_0.gguf", model)
    bench.put("tiny.Q8_0.gguf", gguf())
    bench.fetch()
    if how == "variable":
        bench.env["HF_HUB_OFFLINE"] = "1"
        asked = len(bench.hub.seen)
    else:
        bench.hub.stop()
        asked = len(bench.hub.seen)
    assert bench.fetch(f"{REPO}:tiny.Q4_0.gguf").read_bytes() == model
    assert "in the cache" in bench.refused("unknown_quant", f"{REPO}:Q8_0").message
    error = bench.refused("download_failed", "org/other")
    assert isinstance(error, Unavailable) and "is not in the cache" in error.message
    assert len(bench.hub.seen) == asked


@pytest.mark.parametrize("revision", ["v1", "refs/pr/3", OLD])
def test_at_a_revision(bench: Bench, model: bytes, gguf: Callable[..., bytes], revision: str) -> None:
    old, name = gguf(), f"{REPO}@{revision}"
    bench.put("tiny.Q4_0.gguf", model)
    bench.put("old.Q4_0.gguf", old, f"{REPO}@{OLD}")
    bench.hub.revisions = {"v1": OLD, "refs/pr/3": OLD}
    assert bench.fetch(f"{name}:Q4_0").read_bytes() == bench.fetch(name).read_bytes() == old
    assert bench.fetch().read_bytes() == model, "beside it"
    bench.hub.stop()
    assert bench.fetch(f"{name}:old.Q4_0.gguf").read_bytes() == old, "from the hub's cache"
    assert bench.refused("unknown_quant", f"{name}:Q8_0").hint.startswith(f"write hf:{name}:NAME")


def test_a_revision_that_is_not_there(bench: Bench, model: bytes) -> None:
    bench.put("tiny.Q4_0.gguf", model)
    error = bench.refused("no_such_repo", f"{REPO}@v2:Q4_0")
    assert error.message == f"{REPO} has no branch, tag or commit v2"
    bench.hub.stop()
    assert f"hf:{REPO}@v2 is not in the cache" in bench.refused("download_failed", f"{REPO}@v2:Q4_0").message


def test_a_hub_in_trouble(bench: Bench, model: bytes) -> None:
    bench.put("tiny.Q4_0.gguf", model)
    bench.hub.status = 500
    assert "HTTP 500" in bench.refused("download_failed").message


def test_a_disk_that_is_too_small(bench: Bench, model: bytes) -> None:
    bench.put("tiny.Q4_0.gguf", model)
    bench.hub.sizes["tiny.Q4_0.gguf"] = 2**60
    error = bench.refused("disk_full")
    assert f"{2**60:,}" in error.message and "HF_HOME" in error.hint and not bench.hub.asked("/blob/tiny.Q4_0.gguf")


def test_a_disk_that_fills_up_midway(bench: Bench, model: bytes, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nulimit -f 200\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    bench.put("tiny.Q4_0.gguf", model)
    with pytest.raises(Unavailable) as caught:
        fetch_sync(hf.resolve(f"{REPO}:Q4_0"), bench.root, env=bench.env, python=str(python))
    assert (
        caught.value.code == "disk_full"
        and "HF_HOME" in caught.value.hint
        and f"{bench.cache} needs {len(model):,}" in caught.value.message
    )
    assert bench.fetch().read_bytes() == model and bench.hub.asked("/blob/tiny.Q4_0.gguf")[1] is not None


def test_two_names_of_one_file_download_once(bench: Bench, model: bytes) -> None:
    bench.put("tiny.Q4_0.gguf", model)
    bench.hub.gate = gate = threading.Event()
    names = [hf.resolve(f"{REPO}:Q4_0"), hf.resolve(f"{REPO}:Q4_0"), hf.resolve(f"{REPO}:tiny.Q4_0.gguf")]

    def on_progress(message: dict[str, Any]) -> None:
        if message["message"] == "another process is downloading it":
            waiting.append(message)
            if len(waiting) == 2:
                gate.set()

    waiting: list[dict[str, Any]] = []

    async def all_at_once() -> list[Path]:
        return list(await asyncio.gather(*(fetch(n, bench.root, on_progress, env=bench.env) for n in names)))

    assert [p.read_bytes() for p in asyncio.run(all_at_once())] == [model] * 3
    assert bench.hub.asked("/blob/tiny.Q4_0.gguf") == [None]


def test_cancelling_keeps_the_beginning(bench: Bench, model: bytes) -> None:
    bench.put("tiny.Q4_0.gguf", model)
    bench.hub.gate = gate = threading.Event()

    async def cancel_midway() -> None:
        def on_progress(message: dict[str, Any]) -> None:
            if message["phase"] == "download" and message["done"] >= 10_000:
                task.cancel()

        task = asyncio.create_task(fetch(hf.resolve(f"{REPO}:Q4_0"), bench.root, on_progress, env=bench.env))
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 60)

    asyncio.run(cancel_midway())
    assert bench.blobs() == [f"{sha(model)}.incomplete"]
    gate.set()
    assert bench.fetch().read_bytes() == model
    assert (bench.hub.asked("/blob/tiny.Q4_0.gguf")[-1] or "").startswith("bytes=")


def test_a_pin_holds_for_a_hub_too(bench: Bench, model: bytes) -> None:
    bench.put("tiny.Q4_0.gguf", model)
    pinned = Artifact("hf", f"{REPO}:Q4_0", "sha256:" + "0" * 64, sha256="0" * 64)
    with pytest.raises(UsageError, match="is pinned"):
        fetch_sync(pinned, bench.root, env=bench.env)
    assert Store(bench.root).path(pinned) is None
