"""Models that are a folder, with a real daemon: fetched, shown, served by an engine that takes them, removed."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_daemon import attach
from llm_daemon.testing.fake_engine import SERVER
from llm_daemon.testing.world import World

from .web import COMMIT, Bench

CONFIG = f"""
[engines.folders]
command = [{json.dumps(sys.executable)}, "-I", "-S", {json.dumps(SERVER)}, "{{model}}/config.json", "--host", "{{host}}",
    "--port", "{{port}}", "--alias", "{{alias}}", "--slots", "{{parallel}}", "--context", "{{context}}"]
env = {{ FAKE_ENGINE_KEY = "{{key}}" }}
accepts = ["config.json"]
"""
MODEL, BUILD = "hf:org/Tiny", "mlc:org/Tiny-q4f16_1-MLC"


@pytest.fixture
def world(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Folders of their own under a short path, for a real daemon that knows the hub of `bench`."""
    for name in [n for n in os.environ if n.startswith("HF_") or n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name in ("HF_ENDPOINT", "HF_HOME"):
        monkeypatch.setenv(name, bench.env[name])
    with tempfile.TemporaryDirectory(prefix="llmd-") as folder:
        world = World(Path(folder))
        world.config.write_text(world.config.read_text() + CONFIG)
        for name, path in (("RUNTIME_DIR", world.runtime), ("STATE_DIR", world.state), ("CONFIG", world.config)):
            monkeypatch.setenv(f"LLM_DAEMON_{name}", str(path))
        monkeypatch.setenv("LLM_DAEMON_CACHE_DIR", str(world.base / "cache"))
        yield world
        world.close()


def test_served_by_an_engine_that_takes_folders(world: World, bench: Bench) -> None:
    bench.put("config.json", b'{"tokens": ["Hello"], "strict_model": true}', "org/Tiny")
    bench.put("model.safetensors", bytes(100_000), "org/Tiny")
    for _ in range(2):  # the second time it is known to be a folder
        with attach(MODEL) as llm:
            assert llm.engine == "folders"
        assert world.llm_daemon("stop").returncode == 0
    shown = json.loads(world.llm_daemon("models", "show", MODEL, "--json").stdout)
    assert (shown["commit"], shown["engines"]["folders"]) == (COMMIT, None) and shown["size"] > 100_000 <= shown["disk"]
    assert shown["engines"]["xllamacpp"] and shown["engines"]["mlc-llm"]
    (listed,) = json.loads(world.llm_daemon("models", "list", "--json").stdout)["others"]
    assert (listed["locator"], listed["on_disk"], listed["disk"]) == ("org/Tiny", True, shown["disk"])
    assert world.llm_daemon("models", "rm", MODEL).returncode == 0 and bench.blobs() == []


def test_a_build_for_one_engine_is_refused_by_others(world: World, bench: Bench) -> None:
    refused = world.llm_daemon("plan", f"{BUILD}?engine=xllamacpp")
    assert refused.returncode == 2 and f"{BUILD} is for the engine mlc-llm alone: xllamacpp cannot load it" in refused.stderr
    for model in (BUILD, "llama3-8b?engine=mlc-llm"):
        missing = world.llm_daemon("plan", model)
        assert missing.returncode != 0 and missing.stderr.count("mlc-llm: ") == 1 and "xllamacpp" not in missing.stderr
    assert bench.hub.seen == []


def test_it_can_be_pulled_where_its_engine_is_not(world: World, bench: Bench) -> None:
    name = BUILD.removeprefix("mlc:")
    for file in ("mlc-chat-config.json", "params_shard_0.bin", "evil.py"):
        bench.put(file, b"{}", name)
    bench.put("tensor-cache.json", b'{"records": [{"dataPath": "params_shard_0.bin"}]}', name)
    pulled = world.llm_daemon("models", "pull", BUILD, "--json", "--quiet")
    found = json.loads(pulled.stdout)
    assert sorted(os.listdir(found["path"])) == ["mlc-chat-config.json", "params_shard_0.bin", "tensor-cache.json"]
    assert found["size"] == sum(os.stat(path).st_size for path in Path(found["path"]).iterdir())
    assert "on disk" in world.llm_daemon("models", "show", BUILD).stdout
