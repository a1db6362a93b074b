"""Each statistic against SciPy or NumPy, and its coverage against simulations with fixed seeds."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import stats as scipy_stats

from llm_daemon_bench import stats

FLOATS = st.floats(0.01, 1e6)


@given(st.lists(FLOATS, min_size=1, max_size=40), st.floats(0, 1))
def test_quantile_is_numpys(values: list[float], q: float) -> None:
    assert stats.quantile(values, q) == pytest.approx(float(np.quantile(values, q)), rel=1e-9)


@given(st.lists(FLOATS, min_size=2, max_size=40))
def test_iqr_is_scipys(values: list[float]) -> None:
    assert stats.iqr(values) == pytest.approx(float(scipy_stats.iqr(values)), rel=1e-9, abs=1e-9)


def test_censored_values_are_larger_than_all_others() -> None:
    inf = math.inf
    assert stats.median([1, inf, 2]) == 2
    assert stats.median([1, inf, inf]) == inf
    assert stats.iqr([1, 2, 3, inf, inf]) == inf
    assert stats.iqr([inf] * 5) == 0
    assert stats.quantile_interval([1, 2, 3, 4, 5, inf]).high == inf
    assert stats.drift([1, 1, 1, inf, inf, inf]) == inf
    assert stats.drift([inf] * 3 + [1.0] * 3) == -1
    assert stats.drift([inf] * 6) == 0
    assert stats.outliers([10, 10, 11, 11, inf]) == [""] * 5


@pytest.mark.parametrize("n", [1, 2, 5, 6, 10, 17, 18, 25, 60, 300, 2000])
@pytest.mark.parametrize("q", [0.5, 0.9, 0.95])
def test_order_statistic_interval_is_scipys(n: int, q: float) -> None:
    values = list(range(n))
    found = stats.quantile_interval(values, q)
    cdf = scipy_stats.binom(n, q).cdf
    assert found.coverage == pytest.approx(float(cdf(found.high) - cdf(found.low)), abs=1e-9)
    if n >= stats.trials_for_interval(q):
        reference = scipy_stats.quantile_test(values, q=0, p=q).confidence_interval(0.95)
        assert (found.low, found.high) == (reference.low, reference.high)
        assert found.coverage >= 0.95
    else:
        assert found.coverage < 0.95


@given(st.integers(0, 60), st.integers(0, 60))
def test_wilson_is_scipys(hits: int, misses: int) -> None:
    n = hits + misses
    if n == 0:
        assert stats.wilson(0, 0) == stats.Interval(0, 1, 1)
        return
    reference = scipy_stats.binomtest(hits, n).proportion_ci(0.95, "wilson")
    found = stats.wilson(hits, n)
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=1e-9)


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_a_binomial_test(b: int, c: int) -> None:
    expected = float(scipy_stats.binomtest(b, b + c).pvalue) if b + c else 1.0
    assert stats.mcnemar(b, c) == pytest.approx(expected, rel=1e-9)


@given(st.lists(FLOATS, min_size=1, max_size=14, unique=True), st.integers(1, 13))
def test_mann_whitney_without_ties_is_scipys(values: list[float], cut: int) -> None:
    a, b = values[:cut], values[cut:]
    if not b:
        return
    expected = scipy_stats.mannwhitneyu(a, b, method="exact").pvalue
    assert stats.mann_whitney(a, b) == pytest.approx(float(expected), rel=1e-9)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_mann_whitney_with_ties_is_the_exact_permutation_test(a: list[int], b: list[int]) -> None:
    def rank_sum(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        ranks = scipy_stats.rankdata(np.concatenate([x, y], axis=axis), axis=axis)
        taken: np.ndarray = np.take(ranks, range(x.shape[axis]), axis=axis).sum(axis=axis)
        return taken

    if min(len(a), len(b)) < 2:  # SciPy wants two on each side
        assert 0 < stats.mann_whitney(a, b) <= 1
        return
    expected = scipy_stats.permutation_test((a, b), rank_sum, vectorized=True, n_resamples=np.inf).pvalue
    assert stats.mann_whitney(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_mann_whitney_of_many_values_is_scipys_normal_one() -> None:
    rng = random.Random(3)
    a, b = [float(rng.randrange(50)) for _ in range(70)], [float(rng.randrange(5, 55)) for _ in range(80)]
    expected = scipy_stats.mannwhitneyu(a, b, method="asymptotic").pvalue
    assert stats.mann_whitney(a, b) == pytest.approx(float(expected), rel=1e-9)
    assert stats.mann_whitney([1.0] * 60, [1.0] * 60) == 1


def test_mann_whitney_is_exact_and_quick_up_to_its_limit() -> None:
    a, b = [float(i) for i in range(50)], [i + 12.5 for i in range(50)]
    expected = scipy_stats.mannwhitneyu(a, b, method="exact").pvalue
    assert stats.mann_whitney(a, b) == pytest.approx(float(expected), rel=1e-9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_the_textbooks(ps: list[float]) -> None:
    found, order = stats.holm(ps), sorted(range(len(ps)), key=ps.__getitem__)
    expected = [min(1.0, max((len(ps) - j) * ps[order[j]] for j in range(i + 1))) for i in range(len(ps))]
    assert [found[i] for i in order] == pytest.approx(expected)


def test_percentiles_need_values() -> None:
    assert stats.tail([float(i) for i in range(19)]) == ("max of 19", 18)
    assert stats.tail([float(i) for i in range(99)])[0] == "p95"
    label, value = stats.tail([float(i) for i in range(200)])
    assert label == "p99" and value == pytest.approx(float(np.quantile(range(200), 0.99)))


@given(st.lists(FLOATS, min_size=4, max_size=40))
def test_outliers_are_tukeys(values: list[float]) -> None:
    q1, q3 = np.quantile(values, [0.25, 0.75])
    for x, cls in zip(values, stats.outliers(values), strict=True):
        beyond = max(q1 - x, x - q3)
        if abs(beyond - 1.5 * (q3 - q1)) < 1e-6 or abs(beyond - 3 * (q3 - q1)) < 1e-6:
            continue  # on the fence: rounding decides
        assert cls == ("severe" if beyond > 3 * (q3 - q1) else "mild" if beyond > 1.5 * (q3 - q1) else "")


def test_no_values_are_refused() -> None:
    for call in (stats.median, stats.quantile_interval, lambda x: stats.mann_whitney(x, [1.0])):
        with pytest.raises(ValueError, match="no values"):
            call([])
    with pytest.raises(ValueError, match="unequal"):
        stats.ratio_of_medians([[1.0]], [[1.0, 2.0]], paired=True)


# -- Coverage by simulation ----------------------------------------------------------------------------------------------


def skewed(rng: random.Random) -> float:
    """A latency: 100 ms with a long right tail, and a stall in 5 % of all cases."""
    return (400.0 if rng.random() < 0.05 else 100.0) + rng.expovariate(1 / 10)


MEDIAN = 100 + 10 * math.log(0.95 / 0.45)  # 95 % of all values are 100 + Exp(10), and half of all lie below the median


@pytest.mark.parametrize(("n", "least"), [(5, 0.92), (6, 0.94), (10, 0.94), (18, 0.94)])
def test_order_statistic_interval_covers_what_it_says(n: int, least: float) -> None:
    rng, hits = random.Random(n), 0
    for _ in range(2000):
        found = stats.quantile_interval([skewed(rng) for _ in range(n)])
        hits += found.low <= MEDIAN <= found.high
    assert least <= hits / 2000 <= stats.quantile_interval(list(range(n))).coverage + 0.02


def test_wilson_covers_what_it_says() -> None:
    rng, inside = random.Random(5), 0
    for _ in range(2000):
        hits = sum(rng.random() < 0.8 for _ in range(18))
        found = stats.wilson(hits, 18)
        inside += found.low <= 0.8 <= found.high
    assert 0.92 <= inside / 2000 <= 0.99


def launches(rng: random.Random, middle: float, *, k: int = 3, n: int = 6, between: float, within: float) -> list[list[float]]:
    """k launches x n trials around `middle`, log-normal on both levels (standard deviations as shares)."""
    return [
        [middle * math.exp(shift + rng.gauss(0, within)) for _ in range(n)] for shift in (rng.gauss(0, between) for _ in range(k))
    ]


@pytest.mark.parametrize(
    ("between", "within", "least"),
    [(0.0, 0.05, 0.95), (0.02, 0.02, 0.88), (0.05, 0.01, 0.85)],
    ids=["trials differ", "both differ", "launches differ"],
)
def test_ratio_interval_covers_the_true_ratio(between: float, within: float, least: float) -> None:
    rng, inside = random.Random(11), 0
    for seed in range(200):
        base = launches(rng, 100, between=between, within=within)
        new = launches(rng, 110, between=between, within=within)
        found = stats.ratio_of_medians(base, new, paired=False, seed=seed, draws=400)
        inside += found.low <= 1.1 <= found.high
    assert inside / 200 >= least


def test_what_slows_both_sides_of_a_pair_cancels() -> None:
    rng = random.Random(2)
    weather = [[math.exp(rng.gauss(0, 0.3)) for _ in range(6)] for _ in range(3)]
    base = [[100 * w * math.exp(rng.gauss(0, 0.01)) for w in launch] for launch in weather]
    new = [[110 * w * math.exp(rng.gauss(0, 0.01)) for w in launch] for launch in weather]
    paired = stats.ratio_of_medians(base, new, paired=True)
    free = stats.ratio_of_medians(base, new, paired=False)
    assert paired.low > 1.05 and paired.p < 0.01
    assert free.low < 1 < free.high and free.p > 0.05


def test_ratio_with_checkpoints_that_were_not_reached() -> None:
    inf = math.inf
    good: list[list[float]]
    bad: list[list[float]]
    good, bad = [[10.0, 11, 12], [10, 11, 12]], [[inf, inf, 12], [inf, inf, inf]]
    slower = stats.ratio_of_medians(good, bad, paired=False)
    assert slower.ratio == slower.high == inf and slower.p < 0.2
    assert stats.ratio_of_medians(bad, good, paired=False).ratio == 0
    same = stats.ratio_of_medians(bad, bad, paired=False)
    assert (same.ratio, same.p) == (1, 1)


def test_same_seed_same_interval() -> None:
    base, new = [[1.0, 2, 3]], [[2.0, 3, 4]]
    first = stats.ratio_of_medians(base, new, paired=False, seed=1)
    assert first == stats.ratio_of_medians(base, new, paired=False, seed=1)
    assert first != stats.ratio_of_medians(base, new, paired=False, seed=2)


@pytest.mark.parametrize(
    "make",
    [lambda rng: launches(rng, 100, k=3, between=0, within=0.05), lambda rng: launches(rng, 100, k=6, between=0.03, within=0.01)],
)
def test_noise_floor_grows_with_the_noise(make: Callable[[random.Random], list[list[float]]]) -> None:
    data = make(random.Random(1))
    calm = [[100 + (x - 100) / 10 for x in launch] for launch in data]
    assert 0 < stats.noise_floor(calm) < stats.noise_floor(data) < 0.2
    assert stats.noise_floor([[1.0]]) == math.inf  # nothing to split
