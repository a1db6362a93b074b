"""The benchmark runs, says what it should, and leaves nothing.  No times: those are for a quiet machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_daemon.testing.world import World

pytestmark = pytest.mark.timeout(300)  # a net: the longest takes half a minute on a quiet machine
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
        env={**os.environ, "TMPDIR": str(folder)}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=280,
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
    found = run(short_tmp, "--only", "attach,process", "ready", "idle")
    assert names(found) == ["attach", "process", "ready", "idle"]
    assert {"cpu", "cores", "python", "load_before", "busy_percent", "versions"} <= found["machine"].keys()
    what = {row["what"] for section in found["sections"] for row in section["rows"]}
    assert {"attach, p50", "attach, p99", "import llm_daemon", "attach, whole process", "daemon after start, RSS"} <= what


def test_the_relay_beside_its_peers(short_tmp: Path) -> None:
    (relay,) = run(short_tmp, "--only", "relay")["sections"]
    (grid,) = relay["grids"]
    assert {"direct", "floor", "aiohttp", "ours"} <= set(grid["ways"]) <= {"direct", "nginx", "floor", "aiohttp", "ours"}
    for line in grid["lines"]:
        assert {"floor", "aiohttp", "ours"} <= line["values"].keys() <= set(grid["ways"])
    assert {row["what"] for row in relay["rows"]} >= {f"{n} streams, gap between chunks, p99" for n in (8, 64, 128)}
    assert {f"streams, {way}" for way in grid["ways"]} <= relay["extra"]["generator_cpu_percent"].keys()


def test_a_crowd_keeps_its_connections_and_leaves_the_queue_empty(short_tmp: Path) -> None:
    (growth,) = run(short_tmp, "--only", "growth")["sections"]
    rows = {row["what"]: row for row in growth["rows"]}
    assert rows["connections that were closed or answered"]["value"] == 0
    assert rows["all hang up until none waits or runs"]["value"] > 0
    assert all(one["crowded_mb"] > 0 for one in growth["extra"]["rounds"])


def test_no_request_is_lost_and_slots_become_free(short_tmp: Path, tmp_path: Path) -> None:
    model = tmp_path / "m.fake.json"
    model.write_text(json.dumps({"tokens": 10_000, "token_ms": 5, "ignores_disconnect": "nonstream"}))
    congestion, hangup = run(short_tmp, "--only", "congestion,hangup", "--model", str(model))["sections"]
    rows = {row["what"]: row["value"] for row in congestion["rows"]}
    assert [value for what, value in rows.items() if "without an end" in what] == [0, 0, 0]
    assert [len(row["values"]) for row in congestion["grids"][0]["lines"]] == [3, 3, 3]
    lost = {row["what"]: row for row in hangup["rows"]}
    # The scripted engine goes on for a non-streaming client that is gone: straight to it, that is seen.
    unseen = lost["scripted engine: non-streaming, beside a stream, p50"]["baseline"]
    assert unseen > 300 and lost["scripted engine: streaming, quiet, p50"]["baseline"] < unseen / 2


def test_six_models_in_memory_for_two(short_tmp: Path, tmp_path: Path) -> None:
    model = tmp_path / "m.fake.json"
    model.write_text("{}")
    (many,) = run(short_tmp, "--only", "many", "--model", str(model))["sections"]
    assert [row["value"] for row in many["rows"][:3]] == [0, 0, 0] and many["rows"][0]["samples"] == 16
    head, _, *lines = many["extra"]["scripted engine"]["markdown"].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines)]
    assert sum(int(line[2]) for line in cells[1:]) == 16
    assert sum(int(line[3]) for line in cells[1:]) >= 4 and sum(int(line[5]) for line in cells[1:]) >= 2  # loads, evictions


@pytest.mark.real
def test_what_the_daemon_costs_on_a_real_engine(short_tmp: Path, smollm2: str) -> None:
    found = run(short_tmp, "--only", "named,cold,requests", "--model", smollm2)
    assert names(found) == ["named", "cold", "requests"]
    _, cold, requests = found["sections"]
    assert cold["rows"][0]["against"] == "engine alone"
    assert any("through us" in row["what"] for row in requests["rows"])


@pytest.mark.real
def test_congestion_and_hang_ups_on_a_real_engine(short_tmp: Path, smollm2: str) -> None:
    found = run(short_tmp, "--only", "congestion,hangup", "--model", smollm2)
    congestion, hangup = found["sections"]
    assert [grid["title"].partition(":")[0] for grid in congestion["grids"]] == ["scripted engine", "real engine"]
    assert ["xllamacpp"] * 2 == [row["what"].partition(":")[0] for row in hangup["rows"]][:2]


@pytest.mark.real
def test_a_conversation_after_an_unload(short_tmp: Path, smollm2: str) -> None:
    (section,) = run(short_tmp, "--only", "prompt-cache", "--model", smollm2)["sections"]
    for found in section["extra"].values():
        assert found["without"][0]["known"] == 0
        assert found["with"][0]["known"] > found["with"][0]["read"]


@pytest.mark.real
def test_a_shortened_model_runs(world: World, smollm2: str, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    subprocess.run([sys.executable, str(SCRIPT.parent / "shorten.py"), smollm2, str(short), "2"], check=True, timeout=60)
    assert short.stat().st_size < Path(smollm2).stat().st_size
    done = world.llm_daemon("run", "--quiet", "--max-tokens", "3", str(short), "hi")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.strip()


def test_an_unknown_section_is_named() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--only", "nope"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert "nope" in done.stderr


def test_who_is_told_to_stop_shows_what_was_measured(short_tmp: Path) -> None:
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), "--tiny", "--only", "attach,relay,idle"], env={**os.environ, "TMPDIR": str(short_tmp)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as running:  # fmt: skip
        assert running.stdout is not None
        seen = ""
        while "1a. " not in seen:  # shown: the next one runs
            seen += (line := running.stdout.readline())
            assert line, seen
        running.send_signal(signal.SIGTERM)
        seen += running.stdout.read()
    assert running.returncode == 75, seen
    assert "5a. Relay" in seen and "not measured in full: stopped by SIGTERM" in seen
    assert "6. Memory" not in seen and "Traceback" not in seen
