"""`models show`: what a file says, who can load it, and a chat template that has changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_daemon.models.catalog import Catalog
from llm_daemon.models.templates import described
from llm_daemon.spec import Wish

from .conftest import Cli

gguf = pytest.importorskip("gguf")
FIRST = "{% for m in messages %}\n{{ m }}\n{% endfor %}"
SECOND = "{% for m in messages %}\n{{ m.content }}\n{% endfor %}\x1b[31m"


def write(path: Path, template: str | None = FIRST, arch: str = "llama") -> str:
    out = gguf.GGUFWriter(path, arch)
    out.add_license("mit")
    out.add_context_length(512)
    if template is not None:
        out.add_chat_template(template)
    return finish(out, path)


def finish(out: Any, path: Path) -> str:
    """A header alone, up to where its weights would begin."""
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.close()
    path.write_bytes((data := path.read_bytes()) + bytes(-len(data) % 32))
    return str(path)


def test_it_tells_licence_engines_and_purpose(cli: Cli, tmp_path: Path) -> None:
    result = cli("models", "show", write(tmp_path / "m.gguf", arch="bert"))
    assert result.status == 0, result.err
    lines = {tuple(line.split(None, 1)) for line in result.out.splitlines()}
    assert {("license:", "mit"), ("made", "for:  embedding"), ("context:", "512 tokens at most")} <= lines
    assert any(line.startswith("engine:") and "xllamacpp" in line for line in result.out.splitlines())
    (tmp_path / "other.llamafile").write_text("no model")
    shown = json.loads(cli("models", "show", str(tmp_path / "other.llamafile"), "--json").out)
    assert shown["engines"]["xllamacpp"] == "not a GGUF file" and shown["header"] is None


def test_a_template_is_text_and_its_change_is_noticed(cli: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    for _ in range(2):
        shown = cli("models", "show", path)
        assert "template:  sha256 " in shown.out and "not the one it was" not in shown.out
    assert cli("models", "show", path, "--template").out == FIRST + "\n"
    write(tmp_path / "m.gguf", SECOND)
    told = cli("models", "show", path, "--template").out
    assert told.startswith(SECOND.replace("\x1b", "?") + "\n\nIt has changed since you last looked.\n")
    assert "\n-{{ m }}\n" in told and "\n+{{ m.content }}\n" in told and "\x1b" not in told
    assert "has changed" not in cli("models", "show", path, "--template").out  # seen now


def test_it_is_said_once_and_by_all_who_look(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    artifact = Catalog.load({}).resolve(Wish(write(path))).artifact
    assert described(artifact, path) == {"license": "mit", "template_changed": False}
    write(path, SECOND)
    for _ in range(2):  # until a person has looked
        assert described(artifact, path)["template_changed"] is True
    shown = json.loads(cli("models", "show", str(path), "--json", "--template").out)
    assert shown["template_changed"] is True and shown["template"] == SECOND
    assert described(artifact, path)["template_changed"] is False


def test_a_model_without_a_template(cli: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", None)
    assert cli("models", "show", path, "--template").out == "it has no chat template\n"
    assert described(Catalog.load({}).resolve(Wish(path)).artifact, Path(path))["template_changed"] is False


def test_all_parts_of_a_model_of_ones_own_count(cli: Cli, tmp_path: Path) -> None:
    parts = [tmp_path / f"m-0000{n}-of-00002.gguf" for n in (1, 2)]
    for n, part in enumerate(parts):
        out = gguf.GGUFWriter(part, "llama")
        out.add_uint16("split.no", n)
        out.add_uint16("split.count", 2)
        finish(out, part)
    shown = json.loads(cli("models", "show", str(parts[0]), "--json").out)
    assert shown["size"] == sum(part.stat().st_size for part in parts) and shown["header"]["split_count"] == 2
