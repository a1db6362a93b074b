"""Which engines there are, and which one is taken."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from llm_daemon.engines.base import Missing
from llm_daemon.engines.registry import Registry
from llm_daemon.errors import EngineError, UsageError
from llm_daemon.testing.fake_engine import FakeEngine

FAKE = "llm_daemon.testing.fake_engine:FakeEngine"


class Absent(FakeEngine):
    name = "absent"

    def locate(self, config: Mapping[str, Any]) -> Missing:
        return Missing("it is not here", "look elsewhere")


class Broken:
    def __init__(self) -> None:
        raise RuntimeError("no luck")


@pytest.fixture(autouse=True)
def points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three packages with engines: one works, one has nothing to run, one cannot be loaded."""
    found = [
        importlib.metadata.EntryPoint("fake", FAKE, "llm_daemon.engines"),
        importlib.metadata.EntryPoint("gone", "no_such_module:X", "llm_daemon.engines"),
    ]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: found if group == "llm_daemon.engines" else [])


def here(name: str) -> str:
    return f"{__name__}:{name}"


def test_entry_points_and_a_broken_one() -> None:
    registry = Registry({})
    assert registry.names == ("fake",)
    assert "no_such_module" in registry.broken["gone"]
    with pytest.raises(EngineError, match="no_such_module"):
        registry.get("gone")


def test_the_configuration_adds_and_replaces() -> None:
    registry = Registry({"other": {"adapter": FAKE}, "gone": {"adapter": FAKE}, "fake": {"args": []}})
    assert registry.names == ("fake", "gone", "other")
    assert not registry.broken


@pytest.mark.parametrize("target", ["no_such_module:X", FAKE + "X", "no colon", "builtins:object"])
def test_a_bad_adapter_in_the_configuration_is_named(target: str) -> None:
    with pytest.raises(UsageError, match=r"engines\.mine\.adapter") as caught:
        Registry({"mine": {"adapter": target}})
    assert caught.value.code == "bad_config"


def test_an_unknown_engine_has_a_suggestion() -> None:
    with pytest.raises(UsageError) as caught:
        Registry({}).get("faek")
    assert (caught.value.code, caught.value.hint) == ("unknown_engine", "did you mean fake?")


def test_choose(fake_model: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "absent_engine", sys.modules[Absent.__module__])
    registry = Registry({"absent": {"adapter": "absent_engine:Absent"}}, preference=("absent", "fake"))
    path = fake_model()
    assert registry.names[0] == "absent"
    adapter, where = registry.choose(path)
    assert (adapter.name, where.version) == ("fake", "1")
    with pytest.raises(EngineError, match="it is not here") as missing:
        registry.choose(path, "absent")
    assert (missing.value.code, missing.value.hint) == ("engine_missing", "look elsewhere")
    with pytest.raises(UsageError, match="not a scenario") as refused:
        registry.choose("x.gguf")
    assert refused.value.code == "bad_model" and "Git LFS pointer" in refused.value.hint


def test_no_engine_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [])
    with pytest.raises(EngineError, match="no engine is installed"):
        Registry({}).choose("x.gguf")
