"""The verb `validate`: what is not here is told with how to get it, what disagrees ends with status 1."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_daemon.cli.main import run
from llm_daemon_bench.validate import engine, known, others
from llm_daemon_bench.validate.known import KNOWN

# Measures nothing: asks the server as the real one does, and tells what it is told to tell.
SERVEBENCH = """#!{python}
import json, sys, urllib.request
given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
body = json.dumps({{"model": given["--model"], "stream": True, "max_tokens": 8}}).encode()
urllib.request.urlopen(given["--url"] + "/chat/completions", body).read()
if {status}:
    sys.exit("a library is missing")
one = {{"ttft": {ttft}, "chunk_times": [{ttft} + 0.01 * i for i in range(64)], "output_tokens": 64}}
json.dump({{"levels": [{{"requests": [one] * 6}}]}}, open("r.json", "w"))
"""
LLAMA_BENCH = """#!{python}
import json, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
ns = int(given["-p"]) * 2e6 if given["-n"] == "0" else int(given["-n"]) * 5e6
print(json.dumps([{{"n_prompt": int(given["-p"]), "samples_ns": [ns, ns * 1.01, ns * 0.99]}}]))
"""


def program(folder: Path, name: str, text: str, **values: Any) -> Path:
    path = folder / name
    path.write_text(text.format(python=sys.executable, **values))
    path.chmod(0o755)
    return path


def validate(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, dict[str, Any]]:
    status = run(["bench", "validate", *args, "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def bare_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tool is found but those of the test."""
    monkeypatch.setenv("PATH", os.defpath)


def test_tools_that_are_not_here_are_told_with_how_to_get_them(capsys: pytest.CaptureFixture[str]) -> None:
    status, told = validate(capsys, "--step", "V3", "--step", "V4")
    assert status == 0
    assert [(line["against"], line["agrees"]) for line in told["lines"]] == [(tool.name, None) for tool in others.TOOLS]
    assert all(f"pip install {line['against']}" in line["note"] for line in told["lines"])


@pytest.mark.parametrize(("ttft", "apart"), [(0.2, False), (0.26, True)])
def test_a_tool_is_run_in_turns_with_us(capsys: pytest.CaptureFixture[str], tmp_path: Path, ttft: float, apart: bool) -> None:
    program(tmp_path, "servebench", SERVEBENCH, ttft=ttft, status=0)
    status, told = validate(capsys, "--step", "V4", "--tool-path", str(tmp_path))
    first, rate = (line for line in told["lines"] if line["against"] == "servebench")
    assert first["n"] == rate["n"] == others.ROUNDS
    assert first["reference"] == pytest.approx(1e3 * ttft)
    assert rate["ours"] == pytest.approx(10, rel=0.1)
    if apart:
        assert (status, first["agrees"]) == (1, False)
    else:
        assert first["ours"] == pytest.approx(200, abs=30)  # a busy machine may make it later, and may make it disagree


def test_a_tool_that_fails_says_why(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    program(tmp_path, "servebench", SERVEBENCH, ttft=0.1, status=1)
    status, told = validate(capsys, "--step", "V4", "--tool-path", str(tmp_path))
    (line,) = [line for line in told["lines"] if line["against"] == "servebench"]
    assert (status, line["agrees"]) == (1, False)
    assert "a library is missing" in line["note"]


def test_known_times_are_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    check = known.check
    monkeypatch.setattr(known, "check", lambda: check(KNOWN[:1], 4))
    run(["bench", "validate", "--step", "V0"])
    *rows, last = capsys.readouterr().out.splitlines()
    assert all(row.startswith("V0  ") for row in rows) and len(rows) >= 10
    assert any("plain: first_token" in row and "bound 1 ms or 1%" in row for row in rows)
    assert "agree," in last


def test_llama_bench_is_read(tmp_path: Path) -> None:
    path = program(tmp_path, "llama-bench", LLAMA_BENCH)
    prompt_ms, token_ms = engine.llama_bench(str(path), "m.gguf", 300, 1)
    assert prompt_ms == pytest.approx(600)
    assert token_ms == pytest.approx(5)
    path.write_text(f"#!{sys.executable}\nimport sys; sys.exit('no such model')")
    with pytest.raises(RuntimeError, match="status 1: no such model"):
        engine.llama_bench(str(path), "m.gguf", 300, 1)
