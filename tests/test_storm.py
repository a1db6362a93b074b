"""Storms: real clients against real daemons that leave, die, are stopped and robbed all the time (tests/storm/).

The short form belongs to `make test`; `SECONDS=600 make soak` runs the long one and prints its figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def storm(folder: Path, seconds: float, *args: str) -> tuple[dict[str, Any], str]:
    """Runs the harness in a process of its own: what it found, and its table."""
    out = folder / "storm.json"
    argv = [sys.executable, "-m", "tests.storm.harness", "--seconds", str(seconds), "--json", str(out), *args]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


@pytest.mark.timeout(300)
def test_a_short_storm_breaks_no_promise(tmp_path: Path) -> None:
    found, _ = storm(tmp_path, 35)
    assert found["bad"] == []
    total = found["parts"][-1]
    assert total["generations"] > 20, "the storm met no leaving daemon: it proves nothing"
    assert sum(total["kills"].values()) > 20


@pytest.mark.timeout(120)
def test_the_storm_sees_the_mistake_of_the_original(tmp_path: Path) -> None:
    found, _ = storm(tmp_path, 6, "--mutant", "original")
    (it,) = found["mutants"]
    assert it["mutant failed"] > 0, "the storm did not notice a client that trusts the verdict"
    assert it["product failed"] == it["product broken"] == 0, it


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_long_storm_breaks_no_promise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, text = storm(tmp_path, float(os.environ.get("SECONDS", "120")))
    with capsys.disabled():
        print("\n" + text)
    assert found["bad"] == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_storm_sees_each_known_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, text = storm(tmp_path, 60, "--mutant", "all")
    with capsys.disabled():
        print("\n" + text)
    assert [one["mutant"] for one in found["mutants"] if not one["evidence"]] == []
    assert [one for one in found["mutants"] if one["product failed"] or one["product broken"]] == []
