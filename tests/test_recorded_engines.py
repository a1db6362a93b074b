"""Recorded engines behind the real daemon, and docs/reference/engines.md, which says which those are."""

from __future__ import annotations

import json
import re
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import pytest

from llm_daemon import attach
from llm_daemon.engines import ollama
from llm_daemon.engines.registry import Registry
from llm_daemon.testing import replay
from llm_daemon.testing.world import World

PAGE = (Path(__file__).parent.parent / "docs" / "reference" / "engines.md").read_text()


def ask(llm: Any) -> dict[str, Any]:
    body = {"model": llm.model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "user": "me"}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {llm.api_key}"}
    request = urllib.request.Request(llm.base_url + "/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def loaded(url: str) -> list[str]:
    with urllib.request.urlopen(url + "/api/ps", timeout=30) as response:
        return [model["name"] for model in json.load(response)["models"]]


def test_a_model_of_a_running_ollama_is_leased_and_unloaded(world: World) -> None:
    with replay.serve("ollama-00188139") as url:
        with world.config.open("a") as f:
            f.write(f'[engines.ollama]\nurl = "{url}"\n')
        with attach("ollama:smollm2:135m") as llm:
            assert loaded(url) == ["smollm2:135m"]
            assert ask(llm)["usage"]["completion_tokens"] == 3
            assert ollama.HOST.encode() in Path(f"/proc/{llm.pid}/cmdline").read_bytes()
        stopped = world.llm_daemon("stop")
        assert stopped.returncode == 0, stopped.stderr
        world.wait_empty(20)
        assert loaded(url) == []  # killed by force, Ollama lets go of it after the five minutes that it was told


def test_a_llamafile_is_engine_and_model(world: World, tmp_path: Path) -> None:
    path = Path(replay.install("llamafile-0.10.3", tmp_path)["path"]).rename(tmp_path / "some.llamafile")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("weights.gguf", b"GGUF whole\n")
    with attach(str(path)) as llm:
        assert ask(llm)["model"] == str(path)
        assert b"/zip/weights.gguf" in Path(f"/proc/{llm.pid}/cmdline").read_bytes()


def test_an_mlc_folder_in_an_environment_of_its_own(world: World, tmp_path: Path) -> None:
    (tmp_path / "venv").mkdir()
    python = replay.install("mlc-llm-78b6cdb", tmp_path / "venv")["path"]
    with world.config.open("a") as f:
        f.write(f'[engines.mlc-llm]\npath = "{python}"\n')
    model = tmp_path / "Model-MLC"
    model.mkdir()
    for name, text in (
        ("mlc-chat-config.json", "{}"),
        ("tensor-cache.json", "{}"),
        ("params_shard_0.bin", "0" * 999 + "whole\n"),
    ):
        (model / name).write_text(text)
    with attach(str(model)) as llm:
        assert ask(llm)["usage"]["total_tokens"] == 6


@pytest.mark.parametrize("name", replay.names())
def test_the_page_lists_each_recording_with_its_version(name: str) -> None:
    engine = next(engine for engine in Registry({}).names if name.startswith(engine + "-"))
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{engine}`"))
    assert "| recorded |" in row
    assert name.removeprefix(engine + "-") in row


def test_every_engine_has_a_row() -> None:
    rows = set(re.findall(r"^\| `([\w-]+)`(?: \(\w+\))? \| (?:run|recorded|described)(?:, [^|]+)? \|", PAGE, re.MULTILINE))
    assert set(Registry({}).names) <= rows


def test_every_weakness_that_an_adapter_knows_is_told() -> None:
    registry = Registry({})
    for name in registry.names:
        for version in ("0.0.1", "b8000", "0.9.3"):
            for weak in getattr(registry.get(name), "weaknesses", lambda version: [])(version):
                assert all(cve.removeprefix("CVE-2026-") in PAGE for cve in weak.id.split(", ")), (name, weak.id)
