"""One real run: the embedded engine and the starter model, bare and through the daemon."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_daemon.cli.main import run
from llm_daemon_bench import results

SUITE = """
[suite]
name = "real"
trials = 2
launches = 1
seed = 3
[[server]]
id = "bare"
engine = "xllamacpp"
context = 1024
[[server]]
id = "daemon"
engine = "xllamacpp"
via = "daemon"
context = 1024
[[model]]
id = "smollm2"
artifacts = {{ Q4_1 = {model} }}
[[case]]
id = "cold"
prompt = "{text} What is this about? Answer at length."
cache = "cold"
max_tokens = 72
ignore_eos = true
checkpoints = [ {{ id = "first", event = "first_token" }}, {{ id = "ten", tokens = 10 }}, {{ id = "chars", chars = 40 }} ]
[[case]]
id = "warm"
prompt = "{text} What is this about?"
cache = "warm"
max_tokens = 8
checkpoints = [ {{ id = "first", event = "first_token" }} ]
[[case]]
id = "json"
prompt = "Lamps: 2. Give the count as JSON."
response_schema = "schema.json"
cold_start = true
max_tokens = 24
checkpoints = [
  {{ id = "open", contains = "{{" }}, {{ id = "count", json_path = "$.count" }}, {{ id = "valid", schema_valid = true }} ]
[[case]]
id = "code"
kind = "completion"
prompt = "def add(a, b):\\n    return"
max_tokens = 8
checkpoints = [ {{ id = "line", lines = 1 }} ]
"""
TEXT = "The lamp stands on the table near the window, and the cat sleeps under it while rain falls. " * 12
SCHEMA = {"type": "object", "properties": {"count": {"type": "integer"}}, "required": ["count"], "additionalProperties": False}


@pytest.mark.real
@pytest.mark.timeout(600)
def test_a_real_engine_bare_and_through_the_daemon(smollm2: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("schema.json").write_text(json.dumps(SCHEMA))
    Path("real.toml").write_text(SUITE.format(model=json.dumps(smollm2), text=TEXT))
    assert run(["bench", "run", "real.toml", "--json"]) == 0, capsys.readouterr()
    found = results.load(json.loads(capsys.readouterr().out)["folder"])
    trials = found.measured()
    assert [t.error for t in trials] == [None] * len(trials)
    assert len(trials) == 2 * (4 * 2 + 1)
    assert len({x.argv for x in found.launches}) == 1  # bare and through the daemon: the same command
    for trial in trials:
        assert trial.cache_ok is not False
        if trial.case == "cold":
            assert trial.tokens.out == 72
            assert (trial.tokens.cached or 0) < 64 < (trial.tokens.prompt or 0)
            assert trial.server_ms.prompt is not None
            assert trial.t_ms["first_token"] >= trial.server_ms.prompt
            assert trial.cp["ten"].tok == 10
        if trial.case == "warm":
            assert (trial.tokens.cached or 0) > 200
        if trial.case == "json":
            assert trial.cp["valid"].ms is not None
            assert (trial.cp["open"].ms or 0) <= (trial.cp["count"].ms or 0) <= trial.cp["valid"].ms
    cold = [t for t in trials if t.case == "cold"]
    # Ours against the server's own: its count has the first token free, as ours has; both clocks tick on one machine.
    # An error of ours would be in each; a busy machine may make some late, at their first token or their last.
    ratios = [(t.decode_ms_per_tok or 0) / ((t.server_ms.decode or 0) / ((t.tokens.out or 0) - 1)) for t in cold]
    assert min(ratios, key=lambda ratio: abs(ratio - 1)) == pytest.approx(1.0, abs=0.02)
    warm = [t.t_ms["first_token"] for t in trials if t.case == "warm"]
    assert min(warm) < min(t.t_ms["first_token"] for t in cold)
