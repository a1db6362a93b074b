"""The commands against the real daemon, a real engine and the starter model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from llm_daemon.testing.world import wait_gone

from .conftest import Cli


@pytest.fixture(scope="module")
def cache() -> str:
    """Where the workspace keeps its models: told apart before `own_place` moves it for each test."""
    return os.environ["LLM_DAEMON_CACHE_DIR"]


@pytest.fixture
def real(cache: str, own_place: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLM_DAEMON_PYTHON")
    monkeypatch.setenv("LLM_DAEMON_CACHE_DIR", cache)
    monkeypatch.setenv("LLM_DAEMON_LINGER", "0.2")


@pytest.mark.real
@pytest.mark.usefixtures("real")
def test_a_day_with_the_command_line(cli: Cli, tmp_path: Path) -> None:
    result = cli("run", "smollm2-135m", "Say hello.", "--max-tokens", "8", "--temperature", "0")
    assert result.status == 0 and result.out.strip(), result.err
    assert " tok/s; nobody else uses it: it closes by itself in 2 min\n" in result.err
    state = json.loads(cli("ps", "--json").out)
    [instance] = state["instances"]
    assert (instance["model"], instance["state"], instance["leases"]) == ("smollm2-135m", "ready", [])
    assert cli("models", "rm", "smollm2-135m").status == 75
    assert cli("logs", "smollm2-135m", "-n", "5").out and "is ready" in cli("logs", "--daemon").out
    doctor = cli("doctor")
    assert doctor.status == 0, doctor.out + doctor.err
    pids = [state["daemon"]["pid"], instance["pid"], instance["keeper_pid"]]
    assert cli("stop").out == "stopped smollm2-135m\nthe daemon has ended\n"
    assert all(wait_gone(pid, 30) for pid in pids)  # the keeper ends because the daemon has
