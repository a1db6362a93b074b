"""The judgement of agreement: it can fail, and it says by how much."""

from __future__ import annotations

import pytest

from llm_daemon_bench.records import ServerRef, ServerTimes, Tokens, Trial
from llm_daemon_bench.validate import told
from llm_daemon_bench.validate.agreement import Bound, equal, hold


@pytest.mark.parametrize(
    ("distances", "agrees"),
    [([0.2, 0.3, 0.9], True), ([0.2, 0.3, 30.0], True), ([1.1, 1.2, 0.1], False), ([-1.1, -1.2, 0.0], False), ([], False)],
)
def test_the_median_distance_is_judged(distances: list[float], agrees: bool) -> None:
    line = hold("V0", "x", "truth", [(50 + d, 50) for d in distances], Bound(1.0, 0.01))
    assert line.agrees is agrees


def test_what_must_be_equal_is_equal_each_time() -> None:
    assert equal("V0", "n", "truth", [3, 3], [3, 3]).agrees is True
    assert equal("V0", "n", "truth", [3, 4], [3, 3]).agrees is False
    assert equal("V0", "n", "truth", [], []).agrees is False


def trial(first: float, prompt: float, ms: float, server_ms: float, out: int = 65) -> Trial:
    return Trial(
        key="k", session="s", target="a/b/c", server=ServerRef(id="a"), model="b", quant="c", case="x", launch=1, round=1,
        repeat=1, cache="cold", t_ms={"first_token": first}, tokens=Tokens(out=out), decode_ms_per_tok=ms,
        server_ms=ServerTimes(prompt=prompt, decode=server_ms * (out - 1)),
    )  # fmt: skip


def test_server_timings_that_agree_and_that_do_not() -> None:
    good = told.check([trial(105, 100, 10.1, 10.0)] * 3)
    assert [line.agrees for line in good] == [True, True]
    slow = told.check([trial(105, 100, 10.3, 10.0)] * 3)
    assert [line.agrees for line in slow] == [False, True]
    early = told.check([trial(95, 100, 10.0, 10.0)] * 3)
    assert [line.agrees for line in early] == [True, False]


def test_short_replies_tell_nothing_of_decoding() -> None:
    assert told.decode_pairs([trial(1, 1, 1, 1, out=63)]) == []
    assert len(told.decode_pairs([trial(1, 1, 1, 1, out=64)])) == 1


@pytest.mark.parametrize(
    ("first", "prompt", "warned"), [(104, 100, 0), (151, 100, 1), (1055, 1000, 1), (106, 100, 1), (99, 100, 1)]
)
def test_overhead_is_warned_of(first: float, prompt: float, warned: int) -> None:
    lines = told.warnings([trial(first, prompt, 10, 10)])
    assert len(lines) == warned
    for line in lines:  # with its causes and a move
        assert first < prompt or ("chat template" in line and "`llm-daemon bench doctor`" in line)
