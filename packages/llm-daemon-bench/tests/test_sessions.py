"""A session that is resumed is still the same thing: program, weights and numbers of trials."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_daemon.cli.main import run
from llm_daemon_bench import results
from llm_daemon_bench.results import Results

from .suites import CASE, Write

SHORT = "trials = 2\nlaunches = 1\nwarmup = 0"


def bench(path: Path, *args: str) -> int:
    return run(["bench", "run", str(path), "--plain", *args])


def session() -> Results:
    (found,) = Path("results").glob("*/session.json")
    return results.load(found.parent)


def cut_short(**changes: Any) -> int:
    """As if the last trial had not been held; returns how many lines are left.  `changes`: of session.json, None takes out."""
    folder = session().folder
    about = json.loads((folder / results.SESSION).read_bytes()) | {"ended": None} | changes
    (folder / results.SESSION).write_text(json.dumps({k: v for k, v in about.items() if k not in changes or v is not None}))
    lines = (folder / results.TRIALS).read_bytes().splitlines(keepends=True)
    (folder / results.TRIALS).write_bytes(b"".join(lines[:-1]))
    return len(lines) - 1


def versioned(path: Path, tmp_path: Path) -> Path:
    """The suite's servers tell what this file holds as their version."""
    told = tmp_path / "version.txt"
    told.write_text("version: b1 (abc)\n")
    path.write_text(path.read_text().replace('version = ["true"]', f'version = ["cat", {json.dumps(str(told))}]'))
    return told


def refused(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The line that says why it is not resumed; nothing is written meanwhile."""
    capsys.readouterr()
    before = (session().folder / results.TRIALS).read_bytes()
    assert bench(path, "--resume") == 2
    assert (session().folder / results.TRIALS).read_bytes() == before
    err = capsys.readouterr().err
    line, hint = [line for line in err.splitlines() if "cannot go on" in line or "hint" in line]
    assert "without --resume" in hint
    return line


def test_an_upgraded_server_is_not_mixed_in(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write({"a": {}, "b": {}}, suite=SHORT)
    told = versioned(path, tmp_path)
    assert bench(path) == 0
    left = cut_short()
    told.write_text("version: b2\n")
    line = refused(path, capsys)
    assert "a/m0/q was measured with version b1 (abc) of a, now it is b2 (and 1 more)" in line
    told.write_text("")
    assert "now it is (not told)" in refused(path, capsys)
    told.write_text("version: b1 (abc)\n")
    assert bench(path, "--resume") == 0
    found = session()
    assert len(found.trials) + len(found.launches) > left and found.session.ended is not None
    assert {t.server.version for t in found.trials} == {"b1 (abc)"}


def test_replaced_weights_are_not_mixed_in(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, model = write({"a": {}}, suite=SHORT), tmp_path / "s-a.fake.json"
    assert bench(path) == 0
    cut_short()
    as_it_was = model.read_text()
    model.write_text('{"token_ms": 1}')
    line = refused(path, capsys)
    assert f"a/m0/q was measured with other weights than {model} holds now (2 bytes, SHA-256 " in line
    model.write_text(as_it_was)  # younger, but the same
    assert bench(path, "--resume") == 0 and session().session.ended is not None


def test_a_model_may_be_a_folder(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, folder = write({"a": {}}, suite=SHORT + '\npage_cache = "drop"'), tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (tmp_path / "s-a.fake.json").rename(folder / "s.fake.json")
    text = path.read_text().replace('"{artifact}"', '"{artifact}/s.fake.json"')
    path.write_text(text.replace(str(tmp_path / "s-a.fake.json"), str(folder)))
    assert bench(path) == 0
    target = session().session.targets[0]
    artifact = target.artifact
    assert target.weights == str(folder)
    assert artifact is not None and (artifact.path, artifact.bytes) == (str(folder), 4) and len(artifact.sha256 or "") == 64
    cut_short()
    (folder / "config.json").write_text("[]")
    assert f"other weights than {folder} holds now (4 bytes" in refused(path, capsys)
    (folder / "config.json").unlink()
    assert bench(path, "--resume") == 3
    assert "is a folder without a model" in capsys.readouterr().err


def test_a_target_that_was_missing_may_come_later(write: Write, tmp_path: Path) -> None:
    path, model = write({"a": {}, "b": {}}, suite=SHORT), tmp_path / "s-b.fake.json"
    told = versioned(path, tmp_path)
    away = model.rename(tmp_path / "away")
    assert bench(path) == 3
    assert [t.artifact is None for t in session().session.targets] == [False, True]
    away.rename(model)
    assert told.exists() and bench(path, "--resume") == 0
    about = session().session
    assert [t.server.version for t in about.targets] == ["b1 (abc)"] * 2 and about.targets[1].artifact is not None


def test_a_server_that_never_got_ready_may_be_repaired(write: Write, tmp_path: Path) -> None:
    path, told = write({"a": {}, "b": {}}, suite=SHORT), tmp_path / "version.txt"
    first, place, last = path.read_text().rpartition('version = ["true"]')
    assert place
    path.write_text(f'{first}version = ["cat", {json.dumps(str(told))}]{last}')
    told.write_text("version: b1\n")
    assert bench(path) == 0
    trials = session().folder / results.TRIALS
    lines = [json.loads(line) for line in trials.read_bytes().splitlines()]
    cut_short()
    kept = [it for it in lines if it["target"] == "a/m0/q"]
    failed = next(it for it in lines if it["target"] == "b/m1/q" and it["type"] == "launch") | {"key": "failed", "error": "no"}
    trials.write_text("".join(json.dumps(it) + "\n" for it in [*kept, failed]))
    told.write_text("version: b2\n")
    assert bench(path, "--resume") == 0
    assert {t.server.version for t in session().trials if t.target == "b/m1/q"} == {"b2"}


@pytest.mark.parametrize(
    ("args", "changes", "each"),
    [
        (["--trials", "2"], {}, 2),  # as many as the suite has: still instead of the case's own
        ([], {}, 3),
        (["--trials", "1"], {"trials_given": None}, 1),  # from before it was kept: told from the number
        ([], {"trials_given": None}, 3),
    ],
)
def test_the_number_of_trials_stays(write: Write, args: list[str], changes: dict[str, Any], each: int) -> None:
    path = write(suite=SHORT, cases=CASE.format(id="hello", cache="asis") + "trials = 3\n")
    assert bench(path, *args) == 0
    assert len(session().trials) == each
    cut_short(**changes)
    assert bench(path, "--resume") == 0
    assert len(session().trials) == each
