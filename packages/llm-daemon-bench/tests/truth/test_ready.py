"""The ready suites: each can be begun with one command, and asks what a suite should ask."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llm_daemon.cli.main import run
from llm_daemon_bench import ready, suite as suites

GENERATOR = Path(__file__).parents[4] / "tools" / "make_logbook.py"
KINDS = {"agent", "chat", "citation", "editor", "extract"}


@pytest.mark.parametrize("name", sorted(KINDS))
def test_begun_with_one_command(name: str, tmp_path: Path) -> None:
    assert run(["bench", "init", "mine/desk.toml", "--suite", name]) == 0
    suite = suites.load(tmp_path / "mine" / "desk.toml")
    own = (ready.PLACE / name / ready.FILE).read_text()
    assert len(suite.cases) == own.count("[[case]]") >= 2
    for case in suite.cases:
        assert len(case.table.checkpoints) >= 3, case.id
        assert case.checks, case.id
        assert any(point.slo_ms for point in case.table.checkpoints), case.id
    assert suite.targets  # xllamacpp is a dependency of the tests


def test_listed_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "list", "--suites", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["suites"]) == KINDS
    assert all(len(about) > 30 for about in ready.names().values())


def test_the_editor_has_several_prefixes_and_a_gap(tmp_path: Path) -> None:
    run(["bench", "init", "e.toml", "--suite", "editor"])
    kinds = [case.table.kind for case in suites.load(tmp_path / "e.toml").cases]
    assert kinds.count("completion") >= 3 and "infill" in kinds


def test_the_long_text_is_the_generators_and_has_one_answer() -> None:
    text = ready.texts("citation")["logbook.txt"]
    made = subprocess.run([sys.executable, GENERATOR], capture_output=True, text=True, check=True)
    assert text == made.stdout
    (line,) = [line for line in text.splitlines() if "Halvorsen" in line]
    assert line.startswith("[46]") and len(text) > 12_000
