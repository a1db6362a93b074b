"""What a model is loaded for and with: how it is asked for, what shares an instance, and who can do it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_daemon.client.sync import wish as client_wish
from llm_daemon.engines.base import Grant, Location, Missing, Plan, options_of
from llm_daemon.engines.registry import Registry
from llm_daemon.errors import UsageError
from llm_daemon.models.catalog import Catalog
from llm_daemon.models.gguf import purpose
from llm_daemon.spec import Spec, Wish
from llm_daemon.testing.fake_engine import FakeEngine

ADAPTER = {"source": "https", "locator": "https://example.org/a.gguf"}
USER: dict[str, Any] = {
    "style": ADAPTER,
    "style-two": {**ADAPTER, "locator": "https://example.org/b.gguf"},
    "eyes": {**ADAPTER, "locator": "https://example.org/eyes.gguf"},
    "minilm": {**ADAPTER, "locator": "https://example.org/minilm.gguf", "mode": "embedding"},
    "fast": "smollm2-135m@Q4_1",
    "big": {"model": "smollm2-135m", "context": 8192, "parallel": 4, "args": ["--swa-full"]},
    "gemma3-270m": "gemma3-270m?context=777",
}


def spec(model: str = "smollm2-135m", **options: object) -> Spec:
    return Catalog.load(USER).resolve(Wish.of(model, **options))


def refusal(act: Callable[[], object]) -> UsageError:
    with pytest.raises(UsageError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return caught.value


# -- how it is asked for --


def test_the_text_of_a_wish_and_its_wire_form_say_it_all() -> None:
    wish = Wish.of("m", mode="rerank", draft="d@Q2_K", mmproj="/e e.gguf", lora=["/a&b.gguf:0.5", "c"], gpu_layers=0)
    assert Wish.parse(str(wish)) == wish == Wish.of(**wish.to_wire())  # type: ignore[arg-type]
    assert str(Wish.of("m", lora="c")) == "m?lora=c"


@pytest.mark.parametrize("text", ["m?mode=chat", "m?mode=", "m?draft=", "m?draft=%20", "m?mmproj=", "m?lora=%00"])
def test_bad_options_are_refused(text: str) -> None:
    assert refusal(lambda: Wish.parse(text)).code == "bad_spec"


def test_paths_are_made_whole_where_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = client_wish("m.gguf", draft="./d.gguf", lora=["a.gguf:0.5", "style"], mmproj="eyes")
    whole = {"model": "m.gguf", "draft": "d.gguf", "lora": ["a.gguf:0.5", "style"], "mmproj": "eyes"}
    here = os.getcwd()
    assert asked == {
        "model": f"{here}/m.gguf", "draft": f"{here}/d.gguf", "lora": [f"{here}/a.gguf:0.5", "style"], "mmproj": whole["mmproj"],
    }  # fmt: skip
    assert client_wish("m", lora="a.gguf")["lora"] == [f"{here}/a.gguf"]


def test_the_models_of_options_are_named_like_any_other() -> None:
    found = spec("FAST", draft="Gemma3-270m", lora=["STYLE:0.50", "style-two"], mmproj="eyes")
    assert found.model == "smollm2-135m?draft=gemma3-270m&mmproj=eyes&lora=style%3A0.5&lora=style-two"
    assert [(e.option, e.scale) for e in found.extras] == [("draft", 1), ("mmproj", 1), ("lora", 0.5), ("lora", 1)]
    assert found.extras[0].artifact.source == "pypi" and found.extras[2].artifact.locator.endswith("a.gguf")
    assert Catalog.load(USER).resolve(Wish.parse(found.model)) == found
    assert found.special == {"draft", "mmproj", "lora"}


def test_what_is_wrong_with_an_option_names_the_option(tmp_path: Path) -> None:
    assert refusal(lambda: spec(draft="nonsense")).message == "draft: unknown model 'nonsense'"
    assert refusal(lambda: spec(lora=[str(tmp_path / "none.gguf")])).message.startswith("lora: no model file ")
    assert "no options" in refusal(lambda: spec(draft="smollm2-135m?context=5")).message


# -- defaults for a model, in the config --


def test_a_name_may_carry_options() -> None:
    wish = spec("Big", parallel=2).wish
    assert (wish.model, wish.context, wish.parallel, wish.args) == ("smollm2-135m", 8192, 2, ("--swa-full",))
    assert spec("gemma3-270m").wish.context == 777  # the model of that name itself
    assert spec("gemma3-270m?context=5").wish.context == 5


@pytest.mark.parametrize("table", [{"model": "smollm2-135m", "context": 0}, {"model": "m", "colour": 1}, {"model": "nonsense"}])
def test_a_bad_name_is_refused_by_name(table: dict[str, Any]) -> None:
    error = refusal(lambda: Catalog.load({"mine": table}))
    assert error.code == "bad_config" and error.message.startswith("catalog.mine: ")


# -- what it is made for --


def test_a_model_knows_what_it_is_made_for() -> None:
    assert spec("minilm").mode == "embedding" and spec("minilm").special == {"mode"}
    assert spec("minilm", mode="embedding").model == "minilm"
    assert spec("minilm", mode="generate").model == "minilm?mode=generate"
    assert spec().mode == "generate" and spec(mode="generate").model == "smollm2-135m" and not spec().special
    assert refusal(lambda: Catalog.load({"m": {**ADAPTER, "mode": "poetry"}})).code == "bad_config"


@pytest.mark.parametrize(
    ("meta", "made_for"),
    [
        ({}, "generate"),
        ({"general.architecture": "bert"}, "embedding"),
        ({"llama.pooling_type": 3}, "embedding"),
        ({"llama.pooling_type": 0}, "generate"),
        ({"llama.pooling_type": 4}, "rerank"),
        ({"general.architecture": None}, "generate"),
    ],
)
def test_a_file_says_what_it_is_made_for(tmp_path: Path, meta: dict[str, Any], made_for: str) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    arch = meta.get("general.architecture", "llama")
    writer = gguf.GGUFWriter(path, arch or "llama")
    for key, value in meta.items():
        if key.endswith("pooling_type"):
            writer.add_uint32(key, value)
    writer.add_array("tokenizer.ggml.tokens", ["word"] * 50_000)  # the first look ends in here
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert purpose(str(path), os.urandom(4).hex()) == made_for
    assert Catalog.load({}).resolve(Wish(str(path))).mode == made_for


@pytest.mark.parametrize("data", [None, b"", b"GGUF", b"PK\3\4", b"GGUF\3\0\0\0" + b"\xff" * 100])
def test_a_file_that_is_none_is_no_trouble(tmp_path: Path, data: bytes | None) -> None:
    if data is not None:
        (tmp_path / "m.gguf").write_bytes(data)
    assert purpose(str(tmp_path / "m.gguf")) == "generate"


# -- what shares an instance --


@pytest.mark.parametrize(
    ("mine", "theirs", "serves"),
    [
        ({"mode": "embedding"}, {"mode": "embedding"}, True),
        ({"mode": "embedding"}, {}, False),
        ({}, {"mode": "embedding"}, False),
        ({}, {"mode": "generate"}, True),
        ({"draft": "fast"}, {"draft": "smollm2-135m"}, True),
        ({"draft": "fast"}, {}, False),
        ({"draft": "fast"}, {"draft": "gemma3-270m"}, False),
        ({"lora": ["style"]}, {"lora": ["style"]}, True),
        ({"lora": ["style"]}, {"lora": ["style:0.5"]}, False),
        ({"lora": ["style"]}, {"lora": ["style", "style-two"]}, False),
        ({"lora": ["style"]}, {}, False),
        ({}, {"lora": ["style"]}, False),
        ({"mmproj": "eyes"}, {"mmproj": "eyes"}, True),
        ({"mmproj": "eyes"}, {}, True),  # one who can see can also read
        ({}, {"mmproj": "eyes"}, False),
        ({"mmproj": "eyes", "lora": ["style"]}, {"lora": ["style"]}, True),
        ({"mmproj": "eyes", "lora": ["style"], "context": 2048}, {"lora": ["style"], "context": 1024}, True),
        ({"mmproj": "eyes", "lora": ["style"], "context": 1024}, {"lora": ["style"], "context": 2048}, False),
    ],
)
def test_who_is_served_by_what_is_there(mine: dict[str, Any], theirs: dict[str, Any], serves: bool) -> None:
    assert spec(**mine).covers(spec(**theirs)) is serves


# -- who can do it --


class Able(FakeEngine):
    """An engine with two of the options."""

    name = "able"
    options = frozenset({"mode", "lora"})

    def locate(self, config: Any) -> Location | Missing:
        return Location(("able",), "1", "here")

    def plan(self, spec: Spec, where: Location, grant: Grant) -> Plan:
        raise NotImplementedError


def test_an_engine_that_can_is_chosen_and_one_that_cannot_says_so() -> None:
    table = {name: {"adapter": f"{kind.__module__}:{kind.__qualname__}"} for name, kind in (("fake", FakeEngine),)}
    registry = Registry(table, preference=("fake",))
    registry._adapters = {"fake": FakeEngine(), "able": Able()}
    registry.names = ("fake", "able")
    assert options_of(registry.get("fake")) == frozenset()
    assert registry.choose(None)[0].name == "fake"
    assert registry.choose(None, options=frozenset({"lora"}))[0].name == "able"
    error = refusal(lambda: registry.choose(None, "fake", frozenset({"lora", "mode"})))
    assert (error.code, error.message) == ("unsupported_option", "fake cannot load a model with lora, mode")
    assert error.hint == "leave it out, or use the engine able"
    assert refusal(lambda: registry.choose(None, options=frozenset({"draft"}))).hint == "leave it out"


def test_what_is_loaded_beside_a_model_takes_memory_too(tmp_path: Path) -> None:
    from llm_daemon.config import Settings
    from llm_daemon.daemon.memory import Memory, key

    gguf, np = pytest.importorskip("gguf"), pytest.importorskip("numpy")
    for name in ("m", "a"):
        out = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "llama")
        out.add_tensor("t.weight", np.zeros((100, 1000), dtype=np.float32))
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
    model = str(tmp_path / "m.gguf")
    plain, more = (Catalog.load({}).resolve(Wish.of(model, lora=lora)) for lora in ([], [str(tmp_path / "a.gguf")]))
    memory = Memory(Settings(), Registry({}), str(tmp_path / "memory.json"))
    first, second = memory.estimate(plain, model), memory.estimate(more, model)
    assert first and second and second.total - first.total == 400_000
    assert key(plain) != key(more)
