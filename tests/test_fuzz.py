"""Fuzzing of the HTTP front and of every parser of strangers' bytes (tests/fuzz/).

A moment of it belongs to the quick tests; `SECONDS=600 make soak` fuzzes for so long and prints its figures.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings, strategies as st

from llm_daemon.daemon.connection import Connection
from llm_daemon.daemon.exchange import Exchange
from llm_daemon.daemon.upstream import Call

from .fuzz import corpus, front, parsers

ROOT = Path(__file__).parent.parent
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
Play = Callable[[front.Scenario], list[str]]


def fuzz(folder: Path, seconds: float) -> tuple[dict[str, Any], str]:
    """Runs the fuzzer in a process of its own: its figures, and its table."""
    argv = [
        sys.executable,
        "-m",
        "tests.fuzz",
        "--seconds",
        str(seconds),
        "--out",
        str(folder),
        "--json",
        str(folder / "figures"),
    ]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads((folder / "figures").read_text()), done.stdout


@pytest.fixture(params=sorted(LOOPS))
def play(request: pytest.FixtureRequest) -> Iterator[Play]:
    """Plays a scenario on a real gateway; what went wrong."""
    with tempfile.TemporaryDirectory(prefix="llmd-") as folder, asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
        world = front.World(f"{folder}/e")
        runner.run(world.start())
        yield lambda plan: runner.run(world.run(plan))
        runner.run(world.stop())


@st.composite
def spoilt(draw: st.DrawFn, good: list[bytes]) -> bytes:
    """Mostly good bytes, changed in a few places."""
    data = draw(st.sampled_from(good))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        new = draw(st.sampled_from(corpus.TOKENS) | st.binary(max_size=4))
        data = data[:at] + new + data[at + draw(st.integers(0, 8)) :]
    return data


@st.composite
def in_pieces(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> list[bytes]:
    data = draw(whole)
    at = sorted(draw(st.lists(st.integers(0, len(data)), max_size=4)))
    return [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True) if a < b]


@st.composite
def plans(draw: st.DrawFn) -> front.Scenario:
    sent = st.binary(max_size=200) | st.lists(spoilt(corpus.REQUESTS), min_size=1, max_size=3).map(b"".join)
    clients = draw(st.lists(in_pieces(sent), min_size=1, max_size=3))
    answers = draw(st.lists(in_pieces(st.binary(max_size=200) | spoilt(corpus.ANSWERS)), min_size=1, max_size=3))
    return front.Scenario(
        clients,
        [draw(st.integers(0, front.HANG_UPS - 1)) for _ in clients],
        draw(st.lists(st.integers(0, len(clients) - 1), max_size=6)),
        answers,
        draw(st.lists(st.integers(0, front.ENDS - 1), min_size=1, max_size=3)),
        draw(st.lists(st.integers(0, front.VERDICTS - 1), min_size=1, max_size=4)),
        *draw(st.tuples(st.booleans(), st.booleans(), st.sampled_from((1, 64)), st.sampled_from((60, 1 << 20)))),
    )


@pytest.mark.parametrize("n", range(len(parsers.TARGETS)), ids=[target.__name__ for target in parsers.TARGETS])
def test_any_bytes_for_a_parser(n: int) -> None:
    @settings(max_examples=150, deadline=None)
    @given(st.binary(max_size=300) | spoilt(parsers.SEEDS[n]))
    def check(data: bytes) -> None:
        parsers.TARGETS[n](data)

    check()


@pytest.mark.parametrize("n", range(len(parsers.TARGETS)))
def test_the_seeds_are_good(n: int) -> None:
    for data in parsers.SEEDS[n]:
        parsers.TARGETS[n](data)


def test_any_clients_and_any_engine(play: Play) -> None:
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(plans())
    def check(plan: front.Scenario) -> None:
        assert play(plan) == []

    check()


def _forgets_bodies(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Connection, "_release", lambda self, request: None)


def _passes_bytes_on(patch: pytest.MonkeyPatch) -> None:
    def client_sent(self: Exchange, data: bytes) -> None:
        if self._call is not None:
            self._call.write(data)

    patch.setattr(Exchange, "client_sent", client_sent)


def _forgets_tickets(patch: pytest.MonkeyPatch) -> None:
    abort = Call.abort
    patch.setattr(Call, "abort", lambda self, let_go=None: abort(self))


@pytest.mark.parametrize(
    "plant, seen",
    [(_forgets_bodies, "left: held"), (_passes_bytes_on, "the engine got"), (_forgets_tickets, "requests are not")],
)
def test_the_front_sees_a_planted_mistake(play: Play, monkeypatch: pytest.MonkeyPatch, plant: Any, seen: str) -> None:
    plant(monkeypatch)
    monkeypatch.setattr(front, "HANG", 0.1)
    rng = Random(1)
    assert any(seen in what for _ in range(800) for what in play(front.scenario(rng)))


def test_a_moment_of_fuzzing_finds_nothing(tmp_path: Path) -> None:
    figures, _ = fuzz(tmp_path, 3)
    assert min(part["executions"] for part in figures["parts"]) >= 20


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_long_fuzzing_finds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, text = fuzz(tmp_path, float(os.environ.get("SECONDS", "120")))
    with capsys.disabled():
        print("\n" + text)
    for part in figures["parts"]:
        assert part["fd_growth"] <= 0, part
        assert part["rss_growth_mb"] < (256 if part["part"] == "atheris" else 16), part
        assert part["slowest_ms"] < 5000, part
