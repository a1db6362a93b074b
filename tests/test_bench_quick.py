"""The benchmark runs, says what it should, and leaves nothing.  No times: those are for a quiet machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "run.py"


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A temporary folder with a short name (unix sockets), empty again at the end."""
    folder = Path(tempfile.mkdtemp(prefix="b-"))
    yield folder
    left = sorted(path.name for path in folder.iterdir())
    shutil.rmtree(folder)
    assert not left


def run(folder: Path, *args: str) -> dict[str, Any]:
    """The JSON of a run with one sample of each."""
    result = folder / "result.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--tiny", "--json", str(result), *args],
        env={**os.environ, "TMPDIR": str(folder)}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    found: dict[str, Any] = json.loads(result.read_text())
    result.unlink()
    for section in found["sections"]:
        assert section["title"] in done.stdout
        assert section["rows"]
        for row in section["rows"]:
            assert isinstance(row["value"], float)
            if row["baseline"]:
                assert row["ratio"] == pytest.approx(row["value"] / row["baseline"])
                assert row["difference"] == pytest.approx(row["value"] - row["baseline"])
            if row["target"] is not None:
                assert row["met"] is (row[row["judged"]] <= row["target"])
    return found


def names(found: dict[str, Any]) -> list[str]:
    return [section["name"] for section in found["sections"]]


def test_what_the_daemon_costs_without_a_model(short_tmp: Path) -> None:
    found = run(short_tmp, "--only", "attach", "process", "ready", "idle")
    assert names(found) == ["attach", "process", "ready", "idle"]
    assert {"cpu", "cores", "python", "load_before", "busy_percent", "versions"} <= found["machine"].keys()
    what = {row["what"] for section in found["sections"] for row in section["rows"]}
    assert {"attach, p50", "attach, p99", "import llm_daemon", "attach, whole process", "daemon after start, RSS"} <= what


@pytest.mark.real
def test_what_the_daemon_costs_on_a_real_engine(short_tmp: Path, smollm2: str) -> None:
    found = run(short_tmp, "--only", "named", "cold", "gateway", "requests", "--model", smollm2)
    assert names(found) == ["named", "cold", "gateway", "requests"]
    _, cold, gateway, requests = found["sections"]
    assert cold["rows"][0]["against"] == "engine alone"
    assert {"direct", "relay"} <= gateway["extra"]["latency_us"].keys()
    assert any("through us" in row["what"] for row in requests["rows"])


def test_an_unknown_section_is_named() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--only", "nope"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert "nope" in done.stderr
