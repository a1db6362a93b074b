"""What is called a difference and what is not: on simulated sessions, where the truth is known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm_daemon_bench import cells, passes, stats
from llm_daemon_bench.compare import FEW, SAME, Comparison, Side, compare, gate, self_test

from .simulate import CHAT, EXTRACT, Case, Speed, simulate

ONE = Case("one", points=(("first_token", 1, 1, None), ("done", 40, 1, None)))
A, B = "x/m/q", "y/m/q"


def pair(folder: Path, a: Speed, b: Speed, *cases: Case, **how: Any) -> Comparison:
    """Two targets of one session."""
    made = simulate(folder, {A: a, B: b}, cases or (ONE,), **how)
    return compare(Side(made, A), Side(made, B))


def verdicts(found: Comparison) -> dict[str, str]:
    return {str(row.key): row.verdict for row in found.rows}


@pytest.mark.parametrize(
    "speed",
    [Speed(between=0.01, within=0.03), Speed(between=0.05, within=0.01), Speed(stall=0.1)],
    ids=["calm", "launches", "stalls"],
)
def test_equal_targets_are_rarely_called_different(tmp_path: Path, speed: Speed) -> None:
    calls = [seed for seed in range(24) if pair(tmp_path / str(seed), speed, speed, seed=seed).calls()]
    assert len(calls) <= 3, calls  # 5 % of 24 is 1.2


def test_equal_sessions_are_rarely_called_different(tmp_path: Path) -> None:
    speed, calls = Speed(between=0.02, within=0.02), 0
    for seed in range(16):
        first, second = (simulate(tmp_path / f"{seed}-{i}", {A: speed}, (ONE,), seed=100 * seed + i) for i in (0, 1))
        calls += bool(compare(Side(first, A), Side(second, A)).calls())
    assert calls <= 2


def test_a_tenth_slower_is_called_slower(tmp_path: Path) -> None:
    speed, called = Speed(), 0
    for seed in range(10):
        found = pair(tmp_path / str(seed), speed, speed.slowed(0.1), seed=seed)
        assert found.paired and not [row for row in found.calls() if row.verdict == "faster"]
        called += [row.verdict for row in found.rows[:2]] == ["slower", "slower"]
    assert called >= 9


def test_a_tenth_slower_session_does_not_pass_the_gate(tmp_path: Path) -> None:
    old = simulate(tmp_path / "old", {A: Speed()}, (ONE,), seed=1)
    new = simulate(tmp_path / "new", {A: Speed().slowed(0.1)}, (ONE,), seed=2)
    reasons = gate(compare(Side(old, A), Side(new, A)))
    assert [reason.split(":")[0] for reason in reasons] == ["one [warm] first_token", "one [warm] done"]
    assert gate(compare(Side(new, A), Side(old, A))) == []
    assert gate(compare(Side(old, A), Side(new, A), threshold=0.2)) == []


def test_twice_the_noise_floor_is_the_least_change(tmp_path: Path) -> None:
    made = simulate(tmp_path / "s", {A: Speed(), B: Speed().slowed(0.1)}, (ONE,))
    found = compare(Side(made, A), Side(made, B), floor=0.08)
    assert found.threshold == 0.16 and found.calls() == []


def test_fewer_than_five_trials_are_refused(tmp_path: Path) -> None:
    found = pair(tmp_path / "s", Speed(), Speed().slowed(2), launches=2, trials=2)
    assert {row.verdict for row in found.rows} == {FEW} and {row.p for row in found.rows} == {None}
    assert [r for r in gate(found) if "too few" in r] == [
        f"one [warm] {name}: too few trials to tell (4 and 4, 5 a side are needed)" for name in ("first_token", "done")
    ]
    enough = pair(tmp_path / "t", Speed(), Speed().slowed(2), launches=1, trials=5)
    assert verdicts(enough)["one [warm] done"] == "slower" and enough.one_launch


def test_right_and_wrong(tmp_path: Path) -> None:
    case = replace(EXTRACT, cold_start=False)
    found = pair(tmp_path / "s", Speed(right=1.0), Speed(right=0.1), case)  # every reply another one
    row = found.rows[-1]
    assert (row.key.checkpoint, row.verdict, row.base) == ("pass", "worse", 1.0)
    assert any("passes 100 %" in reason for reason in gate(found))
    same = pair(tmp_path / "t", Speed(right=0.8), Speed(right=0.7), case).rows[-1]
    assert same.verdict == SAME and same.p is not None
    old = simulate(tmp_path / "u", {A: Speed(right=1.0)}, (case,))
    new = simulate(tmp_path / "v", {A: Speed(right=0.1)}, (case,))
    assert compare(Side(old, A), Side(new, A)).rows[-1].verdict == "worse"  # not paired


def test_a_checkpoint_that_is_no_longer_reached_is_slower(tmp_path: Path) -> None:
    found = pair(tmp_path / "s", Speed(), Speed(never={"done": 0.9}))
    row = next(row for row in found.rows if row.key.checkpoint == "done")
    assert (row.verdict, row.new, row.cause) == ("slower", math.inf, "")
    both = pair(tmp_path / "t", Speed(never={"done": 1}), Speed(never={"done": 1}))
    assert verdicts(both)["one [warm] done"] == SAME


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"prefill": 400.0}, "slower prefill"),
        ({"per_token": 20.0}, "slower tokens"),
        ({"longer": 1.8}, "more tokens"),
        ({"queue": 200.0}, "longer queue"),
    ],
)
def test_the_cause_of_a_change_is_named(tmp_path: Path, change: dict[str, float], cause: str) -> None:
    slower = pair(tmp_path / "s", Speed(), replace(Speed(), **change))  # type: ignore[arg-type]
    assert next(row for row in slower.rows if row.key.checkpoint == "done").cause == cause


def test_launches_that_differ_hide_a_change_and_say_so(tmp_path: Path) -> None:
    hidden = []
    for seed in range(10):
        found = pair(
            tmp_path / str(seed), Speed(between=0.08, within=0.005), Speed(between=0.08, within=0.005).slowed(0.1), seed=seed
        )
        hidden += [row.cause for row in found.rows if row.cause.startswith("launches differ by")]
    assert hidden


def test_cells_and_targets_that_are_gone(tmp_path: Path) -> None:
    old = simulate(tmp_path / "old", {A: Speed()}, (ONE, CHAT))
    new = simulate(tmp_path / "new", {A: Speed()}, (ONE,))
    found = compare(Side(old, A), Side(new, A))
    assert [str(key) for key in found.missing] == ["chat [warm] first_token", "chat [warm] sentence1", "chat [warm] t2_first"]
    assert sum("not there any more" in reason for reason in gate(found)) == 3
    assert [str(key) for key in compare(Side(new, A), Side(old, A)).added] == [str(key) for key in found.missing]


def test_self_test_calls_nothing_and_tells_the_floor(tmp_path: Path) -> None:
    made = simulate(tmp_path / "s", {A: Speed(), B: Speed()}, (ONE,))
    alone, twins = self_test(Side(made, A)), self_test(Side(made, A), Side(made, B))
    for found in (alone, twins):
        assert 0.002 < found.floor < 0.1 and found.comparison.calls() == [] and found.comparison.paired
    assert [row.n for row in alone.comparison.rows] == [(9, 9), (9, 9)]
    noisy = simulate(tmp_path / "t", {A: Speed(within=0.2)}, (ONE,))
    assert self_test(Side(noisy, A)).floor > 2 * alone.floor
    assert self_test(Side(simulate(tmp_path / "u", {A: Speed()}, (ONE,), launches=1, trials=3), A)).floor == math.inf


# -- Cells ---------------------------------------------------------------------------------------------------------------


def test_cache_modes_and_turns_are_cells_of_their_own(tmp_path: Path) -> None:
    made = simulate(tmp_path / "s", {A: Speed()}, (CHAT, EXTRACT))
    found = cells.group(made)
    names = [str(key) for key in cells.keys(found)]
    assert names[:3] == ["chat [warm] first_token", "chat [warm] sentence1", "chat [warm] t2_first"]
    assert names[3:9] == [
        f"extract-json [{mode}] {p}" for mode in ("cold", "start") for p in ("first_token", "total", "complete")
    ]
    assert names[9:] == [f"start-up {name}" for name in ("spawned", "port_open", "ready", "first_token", "slot_free")]
    assert {cell.n for (_, key), cell in found.items() if key.cache == "start"} == {3}
    assert {cell.n for (_, key), cell in found.items() if key.cache in ("warm", "cold")} == {18}  # no warm-up among them


def test_failed_trials_stay_as_never_reached(tmp_path: Path) -> None:
    made = simulate(tmp_path / "s", {A: Speed(dies_in=2)}, (EXTRACT,))
    found = {str(key): cell for (_, key), cell in cells.group(made).items()}
    cell = found["extract-json [cold] total"]
    assert (cell.n, cell.reached, cell.misses >= 6) == (18, 12, True)
    assert (cell.reach.low, cell.reach.high) == pytest.approx((0.4375, 0.8372), abs=1e-3)
    outcomes = passes.passes(made)[A, "extract-json", "cold"]
    assert (outcomes.hits, outcomes.n) == (12, 18)
    assert any("7 of 21 ended in an error" in line for line in cells.warnings(made, cells.group(made)))


def test_parts_add_up(tmp_path: Path) -> None:
    made = simulate(tmp_path / "s", {A: Speed(within=0, between=0)}, (EXTRACT,))
    for (_, key), cell in cells.group(made).items():
        if key.case == cells.START:
            assert cells.parts(cell) is None
            continue
        parts = cells.parts(cell)
        assert parts is not None and parts.prefill == pytest.approx(300) and parts.queue == pytest.approx(5)
        assert parts.load == (pytest.approx(600) if key.cache == "start" else 0)
        assert parts.total == pytest.approx(parts.load + cell.median)
        if key.checkpoint == "complete":
            assert (parts.tokens, parts.per_token, parts.decode) == pytest.approx((40, 10, 390))


def test_drift_and_outliers_are_told_and_kept(tmp_path: Path) -> None:
    hot = simulate(tmp_path / "hot", {A: Speed(heat=0.3)}, (ONE,))
    [line] = cells.warnings(hot, cells.group(hot))
    assert "drifts within a launch: first_token, done up to" in line and line.endswith("slower, heating?")
    calm = simulate(tmp_path / "calm", {A: Speed()}, (ONE,))
    assert cells.warnings(calm, cells.group(calm)) == []
    stalls = simulate(tmp_path / "stalls", {A: Speed(stall=0.1)}, (ONE,), ended=False)
    found = cells.group(stalls)
    marked = [o for cell in found.values() for o in cells.outliers(cell) if cell.key.checkpoint == "done"]
    assert marked and {o.cls for o in marked if o.dot.ms > 1000} == {"severe"}
    assert all(o.dot in o.cell.dots for o in marked)
    assert any("has not ended" in line for line in cells.warnings(stalls, found))


def test_outliers_have_causes(tmp_path: Path) -> None:
    import msgspec

    made = simulate(tmp_path / "s", {A: Speed()}, (ONE,))
    slow = made.trials[-1]
    busy = msgspec.structs.replace(
        slow,
        cp={k: msgspec.structs.replace(v, ms=9999.0) for k, v in slow.cp.items()},
        env=msgspec.structs.replace(slow.env, load1=3.2, mhz=2000, temp_c=90, swap_in=12),
        client=msgspec.structs.replace(slow.client, lag_p99_ms=8.0),
    )
    found = cells.group(replace(made, trials=[*made.trials[:-1], busy]))
    [outlier] = [o for o in cells.outliers(found[A, cells.Key("one", "warm", 1, "done")]) if o.cls == "severe"]
    assert outlier.causes == (
        "load 3.2 (usually 0.3)", "clock 2000 MHz (usually 3000)", "90 degrees (usually 50)", "12 pages swapped in",
        "client lag 8.0 ms (usually 0.2)",
    )  # fmt: skip


def test_launch_spread() -> None:
    base = new = [[100.0, 100.0, 100.0], [110.0, 110.0, 110.0]]
    assert stats.launch_spread(base, new, paired=False) == pytest.approx(math.log(1.1))
    assert stats.launch_spread(base, new, paired=True) == 0  # both moved together
    assert stats.launch_spread([[1.0]], [[2.0]], paired=False) == 0
