"""Fetching a whole repository: what an engine needs of it, and nothing else; against a small hub on loopback."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from llm_daemon.engines.mlc_llm import MlcLlm
from llm_daemon.engines.mlx_lm import MlxLm
from llm_daemon.errors import Unavailable, UsageError
from llm_daemon.models import mlc, snapshot
from llm_daemon.models.fetch import fetch
from llm_daemon.models.store import Store

from .web import COMMIT, Bench, Web

REPO, BUILD = "org/Tiny", "org/Tiny-q4f16_1-MLC"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_RANDOM = random.Random(3)
TINY: dict[str, bytes] = {
    "config.json": b'{"architectures": ["Tiny"]}',
    "tokenizer.json": b"{}",
    "merges.txt": b"a b",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors.index.json": json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}).encode(),
    SHARDS[0]: _RANDOM.randbytes(150_000),
    SHARDS[1]: _RANDOM.randbytes(90_000),
}
MLC: dict[str, bytes] = {
    "mlc-chat-config.json": b'{"quantization": "q4f16_1"}',
    "tensor-cache.json": json.dumps({"records": [{"dataPath": "params_shard_0.bin"}]}).encode(),
    "tokenizer.json": b"{}",
    "params_shard_0.bin": _RANDOM.randbytes(120_000),
}
UNWANTED = {
    "modeling_tiny.py": b"print('run me')",
    "pytorch_model.bin": b"pickle",
    "model.pt": b"pickle",
    "README.md": b"# Tiny",
    "requirements.txt": b"evil",
    "onnx/config.json": b"{}",
    "consolidated.safetensors": b"the same again",
}


@pytest.fixture(autouse=True)
def repositories(bench: Bench) -> None:
    for repo, files in ((REPO, TINY), (BUILD, MLC)):
        for name, data in {**files, **UNWANTED}.items():
            bench.put(name, data, repo)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fetched(hub: Web) -> list[str]:
    return sorted(p.removeprefix("/blob/") for m, p, _ in hub.seen if m == "GET" and p.startswith("/blob/"))


@pytest.mark.parametrize(("locator", "wanted"), [(REPO, TINY), (f"mlc:{BUILD}", MLC)])
def test_all_that_an_engine_needs_and_nothing_else(bench: Bench, locator: str, wanted: dict[str, bytes]) -> None:
    path = bench.fetch(locator)
    assert files(path) == wanted and all(p.is_symlink() for p in path.iterdir())
    assert set(fetched(bench.hub)) == wanted.keys()
    assert {bool(engine.accepts(str(path))) for engine in (MlcLlm(), MlxLm())} == {True, False}
    (stored,) = Store(bench.root).list()
    size = sum(map(len, wanted.values()))
    assert (stored.commit, stored.size, stored.key) == (COMMIT, size, bench.artifact(locator).key) and stored.disk >= size
    assert {m["total"] for m in bench.progress if m["phase"] == "download"} == {size}
    asked = len(bench.hub.seen)
    assert bench.fetch(locator) == path and len(bench.hub.seen) == asked, "nobody is asked for what is here"


def test_gguf_comes_first_where_a_repository_has_both(bench: Bench, gguf: Any) -> None:
    bench.put("tiny.Q4_0.gguf", gguf(), REPO)
    assert bench.fetch(REPO).is_file()
    assert files(bench.fetch(f"{REPO}:safetensors")) == TINY


def test_at_a_commit(bench: Bench) -> None:
    artifact = bench.artifact(f"mlc:{BUILD}@{COMMIT}")
    assert (artifact.key, artifact.quant) == (f"mlc:{BUILD}@{COMMIT}", "q4f16_1")
    assert files(bench.fetch(f"mlc:{BUILD}@{COMMIT}")) == MLC
    assert "commit" in bench.refused("no_such_repo", f"mlc:{BUILD}@{'0' * 40}").message


def test_broken_off_midway_and_taken_up_again(bench: Bench) -> None:
    bench.hub.cuts = [len(TINY[name]) for name in ("chat_template.jinja", "config.json", "merges.txt")] + [70_000, 0]
    assert "resumes" in bench.refused("download_failed", REPO).hint
    assert Store(bench.root).disk_bytes() >= 70_000, "`models list` counts what is unfinished"
    assert files(bench.fetch(REPO)) == TINY
    assert bench.hub.asked(f"/blob/{SHARDS[0]}") == [None, "bytes=70000-", "bytes=70000-"]
    assert bench.hub.asked("/blob/config.json") == [None], "what was whole stays"


def test_cancelled_and_taken_up_again(bench: Bench) -> None:
    bench.hub.gate = gate = threading.Event()

    async def cancel_midway() -> None:
        def on_progress(message: dict[str, Any]) -> None:
            if message["phase"] == "download" and message["message"] == SHARDS[0] and message["done"] >= 10_000:
                task.cancel()

        task = asyncio.create_task(fetch(bench.artifact(REPO), bench.root, on_progress, env=bench.env))
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 60)

    asyncio.run(cancel_midway())
    store = Store(bench.root)
    assert store.list() == [] and store.path(bench.artifact(REPO)) is None, "half a model is none"
    gate.set()
    assert files(bench.fetch(REPO)) == TINY
    assert (bench.hub.asked(f"/blob/{SHARDS[0]}")[-1] or "").startswith("bytes=")
    assert bench.hub.asked("/blob/config.json") == [None], "what was whole stays"


def test_two_at_once_download_once(bench: Bench) -> None:
    async def both() -> list[Path]:
        return list(await asyncio.gather(*(fetch(bench.artifact(REPO), bench.root, env=bench.env) for _ in range(2))))

    first, second = asyncio.run(both())
    assert first == second and files(first) == TINY and len(fetched(bench.hub)) == len(TINY)


def test_offline_the_cache_is_used_if_it_is_whole(bench: Bench) -> None:
    bench.fetch(REPO)
    folder = Store(bench.root).folder(bench.artifact(REPO))
    (folder / "model.json").unlink()
    bench.env["HF_HUB_OFFLINE"] = "1"
    asked = len(bench.hub.seen)
    assert files(bench.fetch(REPO)) == TINY
    assert isinstance(bench.refused("download_failed", f"mlc:{BUILD}"), Unavailable)
    (folder / "model.json").unlink()
    (bench.cache / "models--org--Tiny" / "snapshots" / COMMIT / SHARDS[1]).unlink()
    assert f"{SHARDS[1]} of hf:{REPO} is not in the cache" in bench.refused("download_failed", REPO).message
    assert len(bench.hub.seen) == asked


def test_a_gated_repository(bench: Bench) -> None:
    bench.hub.gated.add(BUILD)
    error = bench.refused("gated_repo", f"mlc:{BUILD}")
    assert error.message.startswith(f"mlc:{BUILD} ") and f"{bench.hub.url}/{BUILD}" in error.hint
    bench.env["HF_TOKEN"] = bench.hub.token
    assert files(bench.fetch(f"mlc:{BUILD}")) == MLC


def test_repositories_that_are_no_such_model(bench: Bench) -> None:
    assert "has no mlc-chat-config.json" in bench.refused("no_mlc", f"mlc:{REPO}").message
    assert "no config.json with safetensors" in bench.refused("no_gguf", BUILD).message
    del bench.hub.repos[REPO][SHARDS[1]]
    assert f"has no {SHARDS[1]}" in bench.refused("bad_model", REPO).message
    del bench.hub.repos[BUILD]["tensor-cache.json"]
    assert "has no tensor-cache.json" in bench.refused("no_mlc", f"mlc:{BUILD}").message
    bench.put("ndarray-cache.json", b"[]", BUILD)
    assert "is not a list of weights" in bench.refused("bad_model", f"mlc:{BUILD}").message
    assert not list(bench.root.rglob("weights.tmp"))


def test_a_file_that_is_not_what_the_hub_says(bench: Bench) -> None:
    bench.hub.files[f"/blob/{SHARDS[0]}"] = bytes(len(TINY[SHARDS[0]]))
    bench.refused("hash_mismatch", REPO)


def test_removing_frees_the_cache_too_and_a_lost_file_is_fetched_again(bench: Bench) -> None:
    path, store = bench.fetch(f"mlc:{BUILD}"), Store(bench.root)
    (path / "params_shard_0.bin").resolve().unlink()
    assert store.list() == [] and files(bench.fetch(f"mlc:{BUILD}")) == MLC
    assert bench.hub.asked("/blob/tokenizer.json") == [None]
    assert store.remove(f"mlc:{BUILD}") >= sum(map(len, MLC.values()))
    assert bench.blobs() == [] and not path.parent.exists() and not list(bench.cache.rglob("*.json"))


@pytest.mark.parametrize("locator", ["", "repo", "a/b:c", "a/../b", "a/b@main", "a/b@" + "0" * 39, "a/b/c"])
def test_names_that_are_refused(locator: str) -> None:
    with pytest.raises(UsageError, match="does not name a repository") as caught:
        mlc.resolve(locator)
    assert caught.value.code == "bad_spec" and "mlc:ORG/REPO" in caught.value.hint


def test_no_name_leaves_the_folder() -> None:
    names = ["config.json", "model.safetensors", "../x.json", "/etc/x.json", ".hidden.json", "a/b.safetensors"]
    assert snapshot.safetensors(names) == ["config.json", "model.safetensors"]
