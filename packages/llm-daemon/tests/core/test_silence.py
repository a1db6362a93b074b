"""Slow, stuck, asleep: what counts as a sign of life, and for how long there may be none."""

from __future__ import annotations

import pytest

from llm_daemon.core.silence import MUTE, Silence

NOTHING, WORKS, SPEAKS = (False, False), (False, True), (True, False)


def looked(*signs: tuple[bool, bool], stall: float = 20.0) -> Silence:
    silence = Silence(stall, 0.0)
    for words, works in signs:
        silence.look(silence.looked + silence.step, words, works)
    return silence


@pytest.mark.parametrize(
    ("signs", "hung"),
    [
        ([NOTHING] * 3, False),
        ([NOTHING] * 4, True),
        ([NOTHING, NOTHING, WORKS, NOTHING, NOTHING, NOTHING], False),
        ([NOTHING, NOTHING, NOTHING, SPEAKS] * 100, False),
        ([WORKS] * (4 * MUTE - 1), False),
        ([WORKS] * (4 * MUTE), True),
        ([WORKS] * (4 * MUTE - 1) + [SPEAKS] + [WORKS] * (4 * MUTE - 1), False),
    ],
)
def test_hung(signs: list[tuple[bool, bool]], hung: bool) -> None:
    assert bool(looked(*signs).verdict) is hung


def test_the_reason_says_which_silence() -> None:
    assert looked(*[NOTHING] * 4).verdict == "no sign of life for 20 s"
    assert looked(*[WORKS] * 4 * MUTE).verdict == "it computes without a word for 600 s"


def test_time_that_we_were_stopped_is_not_held_against_it() -> None:
    silence = looked(NOTHING)
    silence.look(silence.looked + 7200, words=False, works=False)
    assert silence.verdict is None
    assert silence.still == 3 * silence.step


def test_time_in_which_nothing_was_asked_does_not_count_but_what_was_before_does() -> None:
    silence = looked(NOTHING, NOTHING)
    silence.begin(silence.looked + 600)
    silence.look(silence.looked + silence.step, words=False, works=False)
    assert (silence.verdict, silence.still) == (None, 15.0)
    silence.heard()
    assert silence.still == silence.mute == 0


@pytest.mark.parametrize(("stall", "step"), [(1, 0.25), (120, 5.0)])
def test_looks_are_rare(stall: float, step: float) -> None:
    assert Silence(stall, 0.0).step == step
