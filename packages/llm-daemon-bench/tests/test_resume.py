"""Killed at any moment and resumed: the same cells, nothing twice, nothing lost, and no server left behind."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

from llm_daemon_bench import results
from llm_daemon_bench.results import Results

from .suites import CASE, Write

CASES = (
    CASE.format(id="hello", cache="asis") + "cold_start = true\n" + '[[case]]\nid = "talk"\nturns = ["a", "b"]\nmax_tokens = 4\n'
    'checkpoints = [ { id = "x", chars = 1 }, { id = "y", turn = 2, chars = 1 } ]\n'
)  # fmt: skip
SUITE = "trials = 2\nlaunches = 2"
KILLS = 10
HASHES, TRIALS = "results/.sha256.json", f"results/*/{results.TRIALS}"


def start(path: Path, *args: str) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "llm_daemon.cli.main", "bench", "run", str(path), "--plain", *args]
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(child: subprocess.Popen[bytes]) -> str:
    out, _ = child.communicate(timeout=100)
    assert child.returncode == 0, out.decode()
    return out.decode()


def session() -> Results:
    (found,) = Path("results").glob("*/session.json")
    return results.load(found.parent)


def cells(found: Results) -> Counter[tuple[object, ...]]:
    trials = Counter[tuple[object, ...]](
        (t.key, t.part, t.target, t.case, t.launch, t.repeat, t.cache, t.warmup) for t in found.trials
    )
    trials.update((x.key, x.target, x.launch, x.start) for x in found.launches)
    return trials


def servers_of(folder: Path) -> list[psutil.Process]:
    """Processes that serve a scenario of this test."""
    return [
        p
        for p in psutil.process_iter(["cmdline"])
        if any(part.startswith(str(folder)) and ".fake.json" in part for part in p.info["cmdline"] or [])
    ]


def wait_none(folder: Path, within: float = 20.0) -> None:
    end = time.monotonic() + within
    while left := servers_of(folder):  # again: one that had only been forked shows what it runs a moment later
        _, alive = psutil.wait_procs(left, timeout=max(0.0, end - time.monotonic()))
        assert not alive, f"left behind: {alive}"


def grown(path: Path, pattern: str, size: int, child: subprocess.Popen[bytes]) -> None:
    """Returns once a file of that name below `path` is larger than `size`, or the child has ended."""
    end = time.monotonic() + 60
    while child.poll() is None and not any(file.stat().st_size > size for file in path.glob(pattern)):
        assert time.monotonic() < end
        select.select([], [], [], 0.005)  # a file tells nobody that it grew


def test_killed_at_ten_random_moments_and_resumed(write: Write, tmp_path: Path) -> None:
    chance = random.Random(20261125)
    whole = write({"a": {"token_ms": 3}, "b": {"token_ms": 5}}, suite=SUITE, cases=CASES)
    finish(start(whole))
    wanted = cells(session())
    assert set(wanted.values()) == {1}
    size = session().folder / results.TRIALS
    full = size.stat().st_size
    for folder in Path("results").iterdir():
        if folder.is_dir():
            folder.rename(tmp_path / "first")

    marks = sorted(chance.randrange(full) for _ in range(KILLS))  # bytes of results after which the next kill comes
    args: list[str] = []
    for mark in marks:
        child = start(whole, *args)
        if not args:
            grown(tmp_path, HASHES, 0, child)
        grown(tmp_path, TRIALS, mark, child)
        select.select([], [], [], chance.random() * 0.3)  # anywhere in what comes next
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=60)
        wait_none(tmp_path)
        args = ["--resume"] if list((tmp_path / "results").glob("*/session.json")) else []
        if args:
            seen = cells(session())
            assert set(seen) <= set(wanted)
            assert not seen or set(seen.values()) == {1}
    if session().session.ended is None:
        finish(start(whole, "--resume"))
    found = session()
    assert cells(found) == wanted
    assert found.session.ended is not None
    assert len(found.session.resumed) >= 2
    streams = {(s.key, s.part) for s in results.read_streams(found.folder)}
    assert {(t.key, t.part) for t in found.trials} <= streams
    wait_none(tmp_path)


def test_ctrl_c_stops_the_server_and_says_how_to_go_on(write: Write, tmp_path: Path) -> None:
    path = write({"a": {"token_ms": 20}}, suite="trials = 50\nlaunches = 1")
    child = start(path)
    grown(tmp_path, HASHES, 0, child)
    grown(tmp_path, TRIALS, 0, child)
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 130
    assert b"--resume` goes on" in out
    wait_none(tmp_path)


def test_a_killed_run_takes_its_daemon_along(tmp_path: Path) -> None:
    model, path = tmp_path / "m.fake.json", tmp_path / "d.toml"
    model.write_text('{"token_ms": 20}')
    path.write_text(
        '[suite]\nname = "x"\ntrials = 50\nlaunches = 1\n[[server]]\nid = "daemon"\nengine = "fake"\nvia = "daemon"\n'
        f'[[model]]\nid = "m"\nartifacts = {{ q = "{model}" }}\n' + CASE.format(id="hello", cache="asis")
    )
    child = start(path)
    grown(tmp_path, HASHES, 0, child)
    grown(tmp_path, TRIALS, 0, child)
    ours = psutil.Process(child.pid)
    assert servers_of(tmp_path)
    daemon = [p for p in psutil.process_iter() if str(tmp_path) in _environment(p) and p.pid not in (ours.pid, os.getpid())]
    assert len(daemon) >= 1
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    wait_none(tmp_path)
    _, alive = psutil.wait_procs(daemon, timeout=30)
    assert not alive


def _environment(process: psutil.Process) -> str:
    try:
        return process.environ().get("LLM_DAEMON_CONFIG", "")
    except psutil.Error:
        return ""


def test_a_changed_suite_is_not_resumed(write: Write) -> None:
    path = write({"a": {}}, suite="trials = 2\nlaunches = 1\nmax_minutes = 0.000001")
    finish(start(path))
    path.write_text(path.read_text().replace("trials = 2", "trials = 3"))
    child = start(path, "--resume")
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 2
    assert b"no unfinished session of this suite" in out
