"""Equal replies are one observation: what right and wrong answers show, on outcomes whose truth is known."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from llm_daemon_bench.compare import FEW, SAME, Comparison, Side, _pass, compare, gate
from llm_daemon_bench.faces import comparison_text, view_json
from llm_daemon_bench.passes import Passes, passes
from llm_daemon_bench.recommend import Slo, _judge_pass, recommend
from llm_daemon_bench.report.tables import View, right
from llm_daemon_bench.results import Results

from .simulate import Case, Speed, simulate

A, B = "x/m/q", "y/m/q"
QUESTIONS = tuple(Case(f"q{i}", points=(), checked=True) for i in range(12))
GREEDY = Speed(replies=1)


def both(folder: Path, a: Speed, b: Speed, *cases: Case, seed: int = 1) -> tuple[Results, Comparison]:
    made = simulate(folder, {A: a, B: b}, cases, seed=seed, launches=2)
    return made, compare(Side(made, A), Side(made, B))


def calls(found: Comparison) -> list[str]:
    return [str(row.key) for row in found.calls() if row.key.checkpoint == "pass"]


def drawn(rng: random.Random, chance: float, replies: Callable[[], str], n: int = 18) -> Passes:
    """`n` trials whose replies are right with `chance` each, once for all."""
    known: dict[str, bool] = {}
    said = tuple(replies() for _ in range(n))
    return Passes("t", "c", "asis", tuple(known.setdefault(x, rng.random() < chance) for x in said), said)


KINDS: dict[str, Callable[[random.Random], Callable[[], str]]] = {
    "always the same": lambda rng: lambda: "same",
    "nearly always the same": lambda rng: lambda: "same" if rng.random() < 0.7 else str(rng.random()),
    "a few, unevenly": lambda rng: lambda: str(int(rng.expovariate(0.4))),
    "a few, evenly": lambda rng: lambda: str(rng.randrange(8)),
    "all different": lambda rng: lambda: str(rng.random()),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chance", [0.5, 0.8])
def test_equally_good_targets_are_rarely_called_different(kind: str, chance: float) -> None:
    from llm_daemon_bench.compare import _pass

    rng, alarms, tries = random.Random(f"{kind}{chance}"), 0, 400
    for _ in range(tries):
        row = _pass(*(drawn(rng, chance, KINDS[kind](rng)) for _ in "ab"))
        alarms += row.p is not None and row.p < 0.05
    assert alarms <= 0.05 * tries


@pytest.mark.parametrize("kind", KINDS)
def test_the_interval_holds_the_true_share(kind: str) -> None:
    rng, held, tries = random.Random(kind), 0, 400
    for _ in range(tries):
        span = drawn(rng, 0.6, KINDS[kind](rng)).span
        held += span.low <= 0.6 <= span.high
    assert held >= 0.93 * tries  # Wilson's own coverage is about 95 %, not at least


def test_greedy_sessions_are_rarely_called_different(tmp_path: Path) -> None:
    """Twelve questions, each target right in half of them, the same each time: trials counted one by one call nearly all."""
    alarms = 0
    for seed in range(20):
        _, found = both(tmp_path / str(seed), replace(GREEDY, right=0.5), replace(GREEDY, right=0.5), *QUESTIONS, seed=seed)
        alarms += bool(calls(found))
        rows = {str(row.key): row for row in found.rows if row.key.checkpoint == "pass"}
        assert {row.verdict for name, row in rows.items() if name != "all cases pass"} == {FEW}
        assert rows["all cases pass"].n == (12, 12)
    assert alarms <= 1


def test_many_questions_show_who_is_better(tmp_path: Path) -> None:
    _, found = both(tmp_path / "s", replace(GREEDY, right=0.1), GREEDY, *QUESTIONS)
    assert calls(found) == ["all cases pass"] and found.calls()[-1].verdict == "better"
    _, back = both(tmp_path / "t", GREEDY, replace(GREEDY, right=0.1), *QUESTIONS)
    assert any(line.startswith("all cases pass: passes 100 % -> ") for line in gate(back))
    _, five = both(tmp_path / "u", replace(GREEDY, right=0.0), GREEDY, *QUESTIONS[:5])
    assert not calls(five) and "all cases" not in {row.key.case for row in five.rows}  # five pairs cannot show it


def test_one_large_loss_against_many_small_gains_is_no_verdict(tmp_path: Path) -> None:
    from llm_daemon_bench.compare import _all_cases

    def side(*hits: int) -> list[Passes]:
        return [Passes("t", f"c{i}", "asis", (True,) * h + (False,) * (20 - h), None) for i, h in enumerate(hits)]

    [row] = _all_cases(side(10, 10, 10, 10, 10, 10, 10, 20), side(11, 11, 11, 11, 11, 11, 11, 0))
    assert row.new < row.base and row.p == 1.0
    [up] = _all_cases(side(*[10] * 8), side(*[11] * 8))
    assert up.p == pytest.approx(2 / 2**8)


def test_a_sampled_case_is_compared_by_its_trials(tmp_path: Path) -> None:
    case = QUESTIONS[0]
    _, found = both(tmp_path / "s", Speed(right=1.0), Speed(right=0.1), case)
    row = next(row for row in found.rows if row.key.checkpoint == "pass")
    assert (row.verdict, row.n) == ("worse", (12, 12))


def test_the_gate_names_a_question_that_is_answered_wrong_now(tmp_path: Path) -> None:
    case = QUESTIONS[0]
    _, worse = both(tmp_path / "s", GREEDY, replace(GREEDY, right=0.0), case)
    lines = [line for line in gate(worse) if "pass" in line]
    assert lines == ["q0 [warm] pass: passes 100 % -> 0 %, by too few different replies to tell (1 and 1, 5 a side are needed)"]
    for a, b in ((GREEDY, GREEDY), (replace(GREEDY, right=0.0), GREEDY)):
        _, good = both(tmp_path / f"t{a.right}", a, b, case)
        assert not [line for line in gate(good) if "pass" in line]
    assert "q0 [warm]: too few different replies to tell (1 and 1, 5 a side" in comparison_text(worse, colour=False)


@pytest.mark.parametrize("told", [True, False], ids=["nearly always one reply", "replies without a name"])
def test_the_gate_lets_one_trial_more_or_less_pass(told: bool) -> None:
    def passes(hits: int) -> Passes:
        return Passes("t", "c", "asis", (True,) * hits + (False,) * (18 - hits), ("a",) * 17 + ("b",) if told else None)

    for now, passed in ((17, True), (15, True), (2, False)):
        row = _pass(passes(18 if not told else 17), passes(now))
        assert row.verdict == FEW
        found = Comparison("a", "b", 0.05, True, (row,))
        assert (gate(found) == []) is passed


@pytest.mark.parametrize(
    ("n", "named", "state", "more"),
    [(3, True, "undecided", 2), (5, True, "met", 0), (1, True, "undecided", 4), (18, False, "undecided", None)],
)
def test_more_trials_are_asked_for_only_where_they_tell(n: int, named: bool, state: str, more: int | None) -> None:
    judged = _judge_pass(Slo.parse("c:pass>=0.9"), Passes("t", "c", "asis", (True,) * n, ("a",) * n if named else None), False)
    assert (judged.state, judged.more) == (state, more)


def test_reports_say_how_many_replies_there_were(tmp_path: Path) -> None:
    made, _ = both(tmp_path / "s", GREEDY, Speed(), QUESTIONS[0])
    found = passes(made)
    one, many = found[A, "q0", "warm"], found[B, "q0", "warm"]
    assert (right(one).whole, right(many).whole) == ("12/12 (1 reply)", "12/12")
    assert one.span.low == pytest.approx(0.207, abs=1e-3) and many.span.low == pytest.approx(0.757, abs=1e-3)
    told = {row["target"]: row for row in view_json(View.of(made))["passes"]}
    assert (told[A]["replies"], told[B]["replies"], told[A]["worth"], told[B]["worth"]) == (1, 12, 1.0, 12.0)


def test_a_wish_is_judged_by_what_more_trials_could_change(tmp_path: Path) -> None:
    made, _ = both(tmp_path / "s", GREEDY, replace(GREEDY, right=0.0), QUESTIONS[0])
    advice = recommend(made, [Slo.parse("q0:pass>=0.9")])
    assert advice.winner and advice.winner.info.id == A and advice.rejected[0].info.id == B
    assert advice.winner.judged[0].reason == "q0 right 12 of 12, always the same reply, at least 90%"
    few, _ = both(tmp_path / "t", Speed(replies=3), Speed(replies=0), QUESTIONS[0])
    unsure = recommend(few, [Slo.parse("q0:pass>=0.6")])
    assert [c.info.id for c in unsure.ranked] == [B] and [c.info.id for c in unsure.undecided] == [A]
    assert "3 different replies, somewhere from" in unsure.undecided[0].reason and (unsure.undecided[0].more or 0) >= 1


def test_sessions_from_before_replies_were_named(tmp_path: Path) -> None:
    made, _ = both(tmp_path / "s", Speed(right=0.5), Speed(right=0.5), QUESTIONS[0])
    old = replace(made, trials=[msgspec.structs.replace(t, said="") for t in made.trials])
    found = passes(old)[A, "q0", "warm"]
    assert found.n == 12 and found.distinct is None and found.worth <= 2 and right(found).detail == ""
    assert not calls(compare(Side(old, A), Side(old, B)))
    line = msgspec.json.encode(made.trials[0]).replace(b'"said":', b'"unheard_of":')
    from llm_daemon_bench.records import Trial

    assert msgspec.json.decode(line, type=Trial).said == ""
    assert SAME not in {row.verdict for row in compare(Side(old, A), Side(old, B)).rows if row.key.checkpoint == "pass"}
