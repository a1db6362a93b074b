"""Statistics of times that are skewed, few and sometimes censored: medians, exact intervals, exact tests, one bootstrap.

Standard library only; the tests hold every function against SciPy or NumPy and its coverage against simulation.
Times are in milliseconds; a checkpoint that was never reached is `math.inf`, so that a median with half of its trials
missed is itself infinite ("not reached") instead of a median of the lucky ones.  Means are not offered: on latencies with 5 %
stalls the t-interval of the mean covers 86-91 % where it says 95 %.
Sources: Conover, Practical Nonparametric Statistics (order-statistic intervals, exact tests); Wilson 1927; Holm 1979;
Kish, Survey Sampling, 1965 (design effect); Kalibera and Jones, Rigorous benchmarking in reasonable time (launches, then
trials); Tukey 1977 (fences).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import NormalDist

LEVEL = 0.95
EXACT_RANKS = (
    100  # values on both sides together up to which ranks are counted out: 0.2 s there, and it grows with the fourth power
)

Launches = Sequence[Sequence[float]]  # one sequence of trials a launch, in the order of their rounds


@dataclass(frozen=True, slots=True)
class Interval:
    """`low` to `high` with its true coverage, 0 to 1; few values cannot give the coverage that was wished for."""

    low: float
    high: float
    coverage: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median of the new over median of the base: 1.10 is 10 % slower.  `p` is two-sided, before any correction."""

    ratio: float
    low: float
    high: float
    p: float


def quantile(values: Sequence[float], q: float) -> float:
    """The `q` quantile, 0 to 1, linear between neighbours (type 7, NumPy's default); infinities allowed.

    >>> quantile([3, 1, 2, math.inf], 0.5)
    2.5
    """
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    share = at - low
    if share == 0 or ordered[low] == ordered[low + 1]:  # also: no inf * 0, no inf - inf
        return ordered[low]
    return ordered[low] + (ordered[low + 1] - ordered[low]) * share


def median(values: Sequence[float]) -> float:
    """
    >>> median([1, 2, math.inf, math.inf])
    inf
    """
    return quantile(values, 0.5)


def iqr(values: Sequence[float]) -> float:
    """Distance of the quartiles; infinite where more than a quarter is censored."""
    low, high = quantile(values, 0.25), quantile(values, 0.75)
    return 0.0 if low == high else high - low


def binomial_cdf(n: int, p: float) -> list[float]:
    """P(X <= k) for k = 0 .. n of n tries with chance `p`, 0 < p < 1; through logarithms, so n may be large."""
    logs = (
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(p) + (n - i) * math.log1p(-p)
        for i in range(n + 1)
    )
    return [min(1.0, x) for x in accumulate(map(math.exp, logs))]


def quantile_interval(values: Sequence[float], q: float = 0.5, level: float = LEVEL) -> Interval:
    """Order statistics that hold the `q` quantile of the population between them, whatever its distribution.

    The narrowest with at most (1 - level) / 2 on each side; where a side has no such value its extreme stands, and the
    coverage says so.

    >>> quantile_interval([5, 1, 4, 2, 3])
    Interval(low=1, high=5, coverage=0.9375)
    """
    if not values:
        raise ValueError("no values")
    ordered, n, side = sorted(values), len(values), (1 - level) / 2 + 1e-12
    below = binomial_cdf(n, q)  # chance that at most i values lie below the quantile, hence that the i-th, from 0, is above it
    low = max((i for i in range(n) if below[i] <= side), default=0)
    high = next((i for i in range(n) if 1 - below[i] <= side), n - 1)
    return Interval(ordered[low], ordered[high], round(below[high] - below[low], 12))


def trials_for_interval(q: float, level: float = LEVEL) -> int:
    """How many values a two-sided interval for the `q` quantile needs at least.

    >>> [trials_for_interval(q) for q in (0.5, 0.9, 0.95)]
    [6, 36, 72]
    """
    side = (1 - level) / 2
    return math.ceil(math.log(side) / math.log(max(q, 1 - q)) - 1e-9)


def tail(values: Sequence[float]) -> tuple[str, float]:
    """The highest percentile that so many values can support, with its name.

    >>> tail([1, 2, 9]), tail(range(20))[0], tail(range(100))[0]
    (('max of 3', 9), 'p95', 'p99')
    """
    n = len(values)
    if n < 20:
        return f"max of {n}", max(values)
    return ("p99", quantile(values, 0.99)) if n >= 100 else ("p95", quantile(values, 0.95))


def wilson(hits: float, n: float, level: float = LEVEL) -> Interval:
    """Wilson's score interval of a rate; `coverage` is nominal.  Both may be fractions, see `effective`.

    >>> interval = wilson(9, 10)
    >>> round(interval.low, 3), round(interval.high, 3)
    (0.596, 0.982)
    """
    if n == 0:
        return Interval(0.0, 1.0, 1.0)
    z = NormalDist().inv_cdf((1 + level) / 2)
    rate, shrink = hits / n, 1 + z * z / n
    middle = (rate + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return Interval(0.0 if hits == 0 else middle - half, 1.0 if hits == n else middle + half, level)


def effective(sizes: Iterable[int]) -> float:
    """How many independent observations groups of equal ones of these sizes are worth: Kish's n, (sum)^2 / sum of squares.

    As many as there are groups if all are of one size, less if one of them holds most.

    >>> effective([1, 1, 1]), effective([18]), effective([9, 9]), round(effective([17, 1]), 2), effective([])
    (3.0, 1.0, 2.0, 1.12, 0.0)
    """
    sizes = list(sizes)
    return sum(sizes) ** 2 / sum(m * m for m in sizes) if sizes else 0.0


def mcnemar(only_base: int, only_new: int) -> float:
    """Exact two-sided p of paired pass/fail: `only_base` pairs passed with the base alone, `only_new` with the new alone.

    >>> mcnemar(0, 6)
    0.03125
    """
    n = only_base + only_new
    return 1.0 if n == 0 else min(1.0, 2 * sum(math.comb(n, i) for i in range(min(only_base, only_new) + 1)) / 2**n)


def mann_whitney(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p that one side tends to be larger; exact, with ties, up to EXACT_RANKS values, else normal with ties.

    >>> round(mann_whitney([1, 2, 3], [4, 5, 6]), 3), round(mann_whitney(range(5), range(10, 15)), 4)
    (0.1, 0.0079)
    """
    if not a or not b:
        raise ValueError("no values")
    small, large = (a, b) if len(a) <= len(b) else (b, a)
    ranks, doubled = _doubled_midranks([*small, *large])
    m, n, got = len(small), len(ranks), sum(ranks[: len(small)])
    if n > EXACT_RANKS:
        return _mann_whitney_normal(got, m, n, doubled)
    # Polynomials whose coefficient of x^s counts the ways to choose k ranks with sum s, packed into whole numbers.
    width = n + 1
    ways = [1] + [0] * m
    for rank in ranks:
        for k in range(m, 0, -1):
            ways[k] += ways[k - 1] << (width * rank)
    mask, below, above, left, s = (1 << width) - 1, 0, 0, ways[m], 0
    while left:
        zeros = ((left & -left).bit_length() - 1) // width  # sums that cannot be
        left >>= zeros * width
        s += zeros
        count = left & mask
        below += count if s <= got else 0
        above += count if s >= got else 0
        left >>= width
        s += 1
    return min(1.0, 2 * min(below, above) / math.comb(n, m))


def _doubled_midranks(values: Sequence[float]) -> tuple[list[int], list[int]]:
    """Twice each value's rank (ties share the middle one, hence twice), and the sizes of the groups of ties."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks, sizes, start = [0] * len(values), [], 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for i in order[start:end]:
            ranks[i] = start + 1 + end
        sizes.append(end - start)
        start = end
    return ranks, sizes


def _mann_whitney_normal(doubled_sum: int, m: int, n: int, ties: Sequence[int]) -> float:
    mean = m * (n + 1) / 2
    spread = m * (n - m) / 12 * ((n + 1) - sum(t**3 - t for t in ties) / (n * (n - 1)))
    if spread == 0:
        return 1.0
    z = (abs(doubled_sum / 2 - mean) - 0.5) / math.sqrt(spread)
    return min(1.0, 2 * NormalDist().cdf(-z))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p for each of the given ones, in their order; below 0.05 all of them are right with 95 %.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    out, worst = [0.0] * len(ps), 0.0
    for i, at in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        worst = max(worst, min(1.0, (len(ps) - i) * ps[at]))
        out[at] = worst
    return out


def ratio_of_medians(base: Launches, new: Launches, *, paired: bool, seed: int = 7, draws: int = 2000) -> Ratio:
    """Ratio of medians with a bootstrap interval that draws launches first, then trials within them.

    `paired`: base[i][j] and new[i][j] ran in the same launch and round, and are drawn together, so that what slowed both
    down cancels.  Draws are spread by sqrt(k / (k - 1)) of k launches, because so few launches understate how much
    launches differ; with one launch nothing is known of that, and the caller has to say so.
    Where ten or more trials stand behind each side, trials' share is if anything overstated (it is drawn on both levels).
    Raises ValueError for no trials, or pairs of unequal shape.
    """
    if paired and [len(x) for x in base] != [len(x) for x in new]:
        raise ValueError("pairs of unequal shape")
    rng = random.Random(seed)
    middle = _log_ratio(_pool(base), _pool(new))
    k = min(len(base), len(new))
    spread = math.sqrt(k / (k - 1)) if k > 1 else 1.0
    sample = _paired_draw if paired else _free_draw
    logs = sorted(_spread(middle, sample(rng, base, new), spread) for _ in range(draws))
    low, high = logs[round((1 - LEVEL) / 2 * draws)], logs[-1 - round((1 - LEVEL) / 2 * draws)]
    return Ratio(_exp(middle), _exp(low), _exp(high), _bootstrap_p(middle, logs))


def _pool(launches: Launches) -> list[float]:
    return [x for launch in launches for x in launch]


def _log_ratio(base: Sequence[float], new: Sequence[float]) -> float:
    a, b = median(base), median(new)
    if a == b:  # both infinite: neither was reached
        return 0.0
    if math.inf in (a, b):
        return math.inf if b == math.inf else -math.inf
    return math.log(max(b, 1e-9)) - math.log(max(a, 1e-9))


def _paired_draw(rng: random.Random, base: Launches, new: Launches) -> float:
    a: list[float] = []
    b: list[float] = []
    for launch in rng.choices(range(len(base)), k=len(base)):
        size = len(base[launch])
        for trial in rng.choices(range(size), k=size) if size else ():
            a.append(base[launch][trial])
            b.append(new[launch][trial])
    return _log_ratio(a, b) if a else 0.0


def _free_draw(rng: random.Random, base: Launches, new: Launches) -> float:
    drawn = []
    for side in (base, new):
        launches = rng.choices([x for x in side if x], k=len(side))
        drawn.append([x for launch in launches for x in rng.choices(launch, k=len(launch))])
    return _log_ratio(*drawn)


def _spread(middle: float, drawn: float, factor: float) -> float:
    return drawn if math.isinf(drawn) or math.isinf(middle) else middle + (drawn - middle) * factor


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _bootstrap_p(middle: float, logs: Sequence[float]) -> float:
    """Two-sided: how many draws lie beyond 1; where none does, the normal tail goes on (Holm needs small p)."""
    if middle == 0:
        return 1.0
    beyond = sum(x <= 0 if middle > 0 else x >= 0 for x in logs)
    counted = min(1.0, 2 * (beyond + 1) / (len(logs) + 1))
    if beyond or math.isinf(middle) or any(math.isinf(x) for x in logs):
        return counted
    deviation = math.sqrt(math.fsum((x - middle) ** 2 for x in logs) / len(logs))
    return min(counted, 2 * NormalDist().cdf(-abs(middle) / deviation)) if deviation else 0.0


def launch_spread(base: Launches, new: Launches, *, paired: bool) -> float:
    """How far launches of the same thing lie apart: range of their log medians (paired: of the log ratios); 0 for one launch.

    Three launches are too few for a bootstrap to know how much launches differ: with 5 % between and 1 % within them it
    called 12-18 % of equal pairs different.  A change beyond this range is seen in spite of the launches.
    """
    if paired:
        sides = [[_log_ratio(a, b) for a, b in zip(base, new, strict=True) if a]]
    else:
        sides = [[_log_ratio([1.0], x) for x in side if x] for side in (base, new)]
    finite = [[x for x in side if math.isfinite(x)] for side in sides]
    return max((max(side) - min(side) for side in finite if side), default=0.0)


def noise_floor(launches: Launches, *, seed: int = 7, splits: int = 400) -> float:
    """Change between two halves of the *same* thing that 95 % of random splits stay below, as a share (0.03 is 3 %).

    Trials of each launch are dealt out, and then whole launches; the larger of the two counts.
    Infinite where one half reaches the checkpoint and the other does not.
    """
    rng = random.Random(seed)
    trials, whole = [], []
    for _ in range(splits):
        halves: list[list[float]] = [[], []]
        for launch in launches:
            for i, x in enumerate(rng.sample(list(launch), len(launch))):
                halves[i % 2].append(x)
        trials.append(halves)
        order = rng.sample(list(launches), len(launches))
        whole.append([_pool(order[::2]), _pool(order[1::2])])
    floors = [
        quantile(changes, 0.95)
        for kind in (trials, whole)
        if (changes := [abs(_exp(_log_ratio(*halves)) - 1) for halves in kind if all(halves)])
    ]
    return max(floors, default=math.inf)


def drift(values: Sequence[float]) -> float | None:
    """Change of the median from the first to the second half, in the order of running (0.07: 7 % slower); None below six.

    >>> drift([10, 10, 10, 11, 11, 11])
    0.1
    """
    half = len(values) // 2
    if half < 3:
        return None
    first, second = median(values[:half]), median(values[-half:])
    if first == second:
        return 0.0
    return math.inf if second == math.inf else -1.0 if first == math.inf else round(second / max(first, 1e-9) - 1, 12)


def outliers(values: Sequence[float]) -> list[str]:
    """Tukey's class of each value: "" inside the fences, "mild" beyond 1.5 quartile distances, "severe" beyond 3.

    They are marked, never removed; censored values have a mark of their own elsewhere and are left out here.

    >>> outliers([10, 11, 10, 11, 10, 11, 10, 11, 13, 30])[-3:]
    ['', 'mild', 'severe']
    """
    finite = [x for x in values if math.isfinite(x)]
    if len(finite) < 4:
        return [""] * len(values)
    low, high = quantile(finite, 0.25), quantile(finite, 0.75)

    def cls(x: float) -> str:
        beyond = max(low - x, x - high)
        if not math.isfinite(x) or beyond <= 1.5 * (high - low):
            return ""
        return "severe" if beyond > 3 * (high - low) else "mild"

    return [cls(x) for x in values]
