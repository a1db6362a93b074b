"""`engines --measure`, against the fake engine as a real process; and what is kept of it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from llm_daemon import errors, paths
from llm_daemon.cli import measure, measured

from .conftest import Cli

Start = Callable[..., subprocess.Popen[str]]
FakeModel = Callable[..., str]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "TIMES", 1)
    monkeypatch.setattr(measure, "NATURAL", 3.0)  # half of it is what a busy machine may add to a hang-up
    with_fake(tmp_path)


def with_fake(tmp_path: Path, more: str = "") -> None:
    text = f'[engines.fake]\nadapter = "llm_daemon.testing.fake_engine:FakeEngine"\n{more}\n'
    (tmp_path / "config.toml").write_text(text)


def column(cli: Cli) -> str:
    """HANG-UP of the fake engine."""
    head, *rows = cli("engines").out.splitlines()
    [row] = [row for row in rows if row.startswith("fake ")]
    return row[head.index("HANG-UP") : head.index("FOUND")].strip()


def test_measure_keeps_what_it_shows(cli: Cli, fake_model: FakeModel) -> None:
    assert column(cli) == "not measured"
    model = fake_model(tokens=4000, token_ms=2, ignores_disconnect="nonstream")
    result = cli("engines", "--measure", "--model", model, "--json")
    assert result.status == 0, result.err
    [entry] = [e["hang_up"] for e in json.loads(result.out)["engines"] if e["name"] == "fake"]
    assert (entry["engine"], entry["version"], entry["model"]) == ("fake", "1", model)
    assert {kind: set(places) for kind, places in entry["ways"].items()} == {
        kind: {"alone", "beside"} for kind in ("streaming", "non-streaming", "plain")
    }
    for line in ("fake starts", "fake: hang-ups, plain, alone", "fake: hang-ups, streaming, beside a stream"):
        assert line in result.err.splitlines()
    assert column(cli).endswith(" ms (plain not noticed)")
    assert json.loads(Path(paths.hangups_file()).read_text()) == [entry]


def test_what_another_version_took_is_not_shown(cli: Cli) -> None:
    ways = {kind: {"alone": {"ms": 28.0, "noticed": True}} for kind in ("streaming", "non-streaming", "plain")}
    entry: dict[str, Any] = {"engine": "fake", "version": "0", "argv0": sys.executable, "ways": ways}
    measured.save(entry)
    assert column(cli) == "not measured"
    measured.save({**entry, "version": "1"})
    assert column(cli) == "28 ms"


def test_a_failure_is_one_line_and_keeps_nothing(cli: Cli, fake_model: FakeModel) -> None:
    model = fake_model(crash_while_loading="out of memory: 3 GB")
    result = cli("engines", "--measure", "--model", model, "--quiet")
    assert result.status == 69
    [line] = result.err.splitlines()
    assert line.startswith("llm-daemon: fake was not measured: ") and "out of memory: 3 GB" in line
    assert not Path(paths.hangups_file()).exists()


def test_flags_of_the_configuration_are_checked(cli: Cli, fake_model: FakeModel, tmp_path: Path) -> None:
    with_fake(tmp_path, 'args = ["--alias"]')
    result = cli("engines", "--measure", "--model", fake_model(), "--quiet")
    assert result.status == 2 and "fake was not measured: --alias is not passed on" in result.err


def test_wrong_use(cli: Cli, tmp_path: Path) -> None:
    assert cli("engines", "--model", "smollm2-135m").status == 2
    result = cli("engines", "--measure", "--model", "no-such-model")
    assert (result.status, result.out) == (2, "") and "no-such-model" in result.err
    (tmp_path / "text.txt").write_text("hello")
    result = cli("engines", "--measure", "--model", str(tmp_path / "text.txt"))
    assert (result.status, result.out) == (2, "") and "fake: not a scenario" in result.err


def test_ctrl_c_leaves_nothing(start: Start, fake_model: FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temp = tmp_path / "t"
    temp.mkdir()
    monkeypatch.setenv("TMPDIR", str(temp))
    model = fake_model(tokens=4000, token_ms=2)
    process = start("engines", "--measure", "--model", model)
    assert process.stderr is not None
    while not (line := process.stderr.readline()).startswith("fake: hang-ups, streaming"):
        assert line
    [folder] = temp.iterdir()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "") and "Traceback" not in err
    assert not folder.exists() and list(temp.iterdir()) == []
    assert [p.pid for p in psutil.process_iter(["cmdline"]) if model in (p.info["cmdline"] or ())] == []
    assert not Path(paths.hangups_file()).exists()


# What is kept ---------------------------------------------------------------------------------------------------
def entry(n: int, version: str = "1") -> dict[str, Any]:
    ways = {kind: {"alone": {"ms": float(n), "noticed": True}} for kind in ("streaming", "non-streaming", "plain")}
    return {"engine": f"e{n}", "version": version, "argv0": "/bin/e", "ways": ways}


def test_the_file_is_bounded_and_has_one_entry_for_each_program() -> None:
    for n in range(measured.KEPT + 3):
        measured.save(entry(n))
    measured.save(entry(5) | {"model": "again"})
    kept = measured.load()
    assert len(kept) == measured.KEPT
    assert [e["engine"] for e in kept[:2]] == ["e3", "e4"]
    assert kept[-1]["model"] == "again"
    assert [e["engine"] for e in kept].count("e5") == 1
    assert measured.find(kept, "e5", "1", "/bin/e") == kept[-1]
    assert measured.find(kept, "e5", "2", "/bin/e") is None
    assert [p.name for p in Path(paths.state_dir()).iterdir()] == ["hang-ups.json"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 10_000, "{}", "[1, null]", '[{"engine": "e", "version": "1", "argv0": "a", "ways": {"plain": 1}}]', "\udcff"],
)
def test_a_file_that_is_not_ours_is_as_none(cli: Cli, text: str) -> None:
    path = Path(paths.hangups_file())
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert measured.load() == []
    assert column(cli) == "not measured"
    measured.save(entry(1))
    assert measured.load() == [entry(1)]


def test_a_place_that_cannot_be_written_is_named() -> None:
    path = Path(paths.hangups_file())
    path.mkdir(parents=True)
    with pytest.raises(errors.UsageError, match="cannot keep what was measured") as caught:
        measured.save(entry(1))
    assert caught.value.code == "state_unwritable"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
