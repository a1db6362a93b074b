"""Suites on the scripted fake engine: `bench(...)` writes one, `run` measures it in this process or another."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_daemon.testing.fake_engine import SERVER

FAKE = json.dumps([sys.executable, "-I", "-S", SERVER, "{artifact}", "--socket", "{socket}", "--alias", "{alias}"])
CASE = """
[[case]]
id = "{id}"
prompt = "say something"
cache = "{cache}"
max_tokens = 16
checkpoints = [
  {{ id = "first", event = "first_token" }},
  {{ id = "from", contains = "from" }},
  {{ id = "never", contains = "NEVER" }} ]
check = {{ contains = "engine" }}
"""
Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has folders and settings of its own; the models' folder is the session's."""
    for name in [n for n in os.environ if n.startswith("LLM_DAEMON_") and n != "LLM_DAEMON_CACHE_DIR"]:
        monkeypatch.delenv(name)
    for name in ("RUNTIME", "STATE"):
        monkeypatch.setenv(f"LLM_DAEMON_{name}_DIR", str(tmp_path / name.lower()))
    config = tmp_path / "config.toml"
    config.write_text('[engines.fake]\nadapter = "llm_daemon.testing.fake_engine:FakeEngine"\n')
    monkeypatch.setenv("LLM_DAEMON_CONFIG", str(config))
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("psutil.getloadavg", lambda: (0.5, 0.5, 0.5))  # whatever else goes on here
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(servers={"a": {scenario}}, cases=..., suite="trials = 2")` writes a suite and returns its path.

    Each server has a model of its own, which is its scenario.
    """

    def make(
        servers: dict[str, dict[str, Any]] | None = None,
        *,
        suite: str = "",
        cases: str | None = None,
        server: str = "",
        name: str = "s",
    ) -> Path:
        parts = [f'[suite]\nname = "{name}"\nseed = 1\n{suite}\n']
        for i, (sid, scenario) in enumerate((servers or {"a": {}}).items()):
            model = tmp_path / f"{name}-{sid}.fake.json"
            model.write_text(json.dumps(scenario))
            parts.append(
                f'[[server]]\nid = "{sid}"\nlaunch = {FAKE}\nmodels = ["m{i}"]\nversion = ["true"]\nstop_s = 1\n{server}\n'
            )
            parts.append(f'[[model]]\nid = "m{i}"\nartifacts = {{ q = {json.dumps(str(model))} }}\n')
        path = tmp_path / f"{name}.toml"
        path.write_text("\n".join(parts) + (CASE.format(id="hello", cache="asis") if cases is None else cases))
        return path

    return make
