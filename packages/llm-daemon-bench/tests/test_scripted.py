"""Scripted servers of known timings, really run: the same ones are not told apart, one slowed by a tenth is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_daemon.cli.main import run

from .suites import Write

CASE = """
[[case]]
id = "hello"
prompt = "say something"
max_tokens = 4
checkpoints = [ { id = "first", event = "first_token" }, { id = "last", event = "last_token" } ]
"""


@pytest.mark.slow
def test_a_slowed_server_is_called_slower_and_its_twin_is_not(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    same = {"first_token_ms": 600, "tokens": 4, "token_ms": 5}
    servers = {"one": same, "two": same, "slow": {**same, "first_token_ms": 660, "token_ms": 5.5}}
    path = write(servers, suite="trials = 6\nlaunches = 2\nwarmup = 0", cases=CASE)
    assert run(["bench", "run", str(path), "--plain"]) == 0
    capsys.readouterr()

    def told(*args: str) -> dict[str, str]:
        run(["bench", *args, "--json"])
        found = json.loads(capsys.readouterr().out)["comparisons"][0]
        return {row["checkpoint"]: row["verdict"] for row in found["rows"] if row["case"] == "hello"}

    assert told("compare", "one", "two") == {"first": "no difference shown", "last": "no difference shown"}
    assert told("compare", "one", "slow") == {"first": "slower", "last": "slower"}
    assert told("compare", "slow", "two") == {"first": "faster", "last": "faster"}
    session = next(Path("results").glob("*/session.json")).parent.name
    assert run(["bench", "gate", f"{session}:one", f"{session}:two", "--max", "5%"]) == 0
    assert run(["bench", "gate", f"{session}:one", f"{session}:slow", "--max", "5%"]) == 1
