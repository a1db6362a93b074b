"""One line of agreement: ours, the reference, and how far apart the two may be."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bound:
    """How far ours may be from the reference: the larger of `absolute` (the line's unit) and `part` of the reference."""

    absolute: float = 0.0
    part: float = 0.0

    def allows(self, reference: float) -> float:
        """The distance allowed, in the line's unit.

        >>> Bound(1.0, 0.01).allows(40.0), Bound(1.0, 0.01).allows(800.0)
        (1.0, 8.0)
        """
        return max(self.absolute, self.part * abs(reference))

    def __str__(self) -> str:
        words = [f"{self.absolute:g} ms"] if self.absolute else []
        words += [f"{self.part:.0%}"] if self.part else []
        return " or ".join(words) or "exact"


@dataclass(frozen=True, slots=True)
class Line:
    """`step` V0 to V4, `what` was compared, with whom (`against`).  `ours` and `reference` in `unit`; None: could not be told.

    `agrees` is None where nothing was compared; then `note` says why, and what to do about it.
    """

    step: str
    what: str
    against: str
    ours: float | None = None
    reference: float | None = None
    bound: Bound = Bound()
    unit: str = "ms"
    n: int = 1
    note: str = ""
    agrees: bool | None = None

    @property
    def apart(self) -> float | None:
        """Ours minus the reference."""
        return None if self.ours is None or self.reference is None else self.ours - self.reference


def hold(
    step: str, what: str, against: str, pairs: Sequence[tuple[float, float]], bound: Bound, *, quantile: float = 0.5
) -> Line:
    """Compares repeats of one value: pairs of (ours, reference).

    The median of the distances is judged: one repeat that a busy machine made late says nothing, an error of ours is in each.
    Where the reference is the very instant of sending, a busy machine can only make us later, never earlier: then a lower
    `quantile` tells our own share better.

    >>> hold("V0", "first token", "truth", [(41.0, 40.5), (40.6, 40.5), (49.0, 40.5)], Bound(1.0, 0.01)).agrees
    True
    >>> hold("V0", "first token", "truth", [(41.7, 40.5), (41.6, 40.5), (40.6, 40.5)], Bound(1.0, 0.01)).agrees
    False
    """
    if not pairs:
        return Line(step, what, against, bound=bound, note="nothing was measured", n=0, agrees=False)
    reference = statistics.median(r for _, r in pairs)
    distances = sorted(o - r for o, r in pairs)
    apart = statistics.median(distances) if quantile == 0.5 else distances[int(quantile * (len(distances) - 1))]
    agrees = abs(apart) <= bound.allows(reference)
    return Line(step, what, against, reference + apart, reference, bound, n=len(pairs), agrees=agrees)


def equal(step: str, what: str, against: str, ours: Iterable[object], reference: Iterable[object]) -> Line:
    """Compares what must be the same each time: counts, texts, reasons.

    >>> equal("V0", "tokens", "truth", [12, 12], [12, 13]).note
    'ours 12, truth 13'
    """
    pairs = list(zip(ours, reference, strict=True))
    wrong = [f"ours {o!r}, {against} {r!r}" for o, r in pairs if o != r]
    note = wrong[0] if wrong else ""
    return Line(step, what, against, unit="", n=len(pairs), note=note, agrees=bool(pairs) and not wrong)


def missing(step: str, what: str, against: str, how: str) -> Line:
    """A reference that is not here; `how` it could be had."""
    return Line(step, what, against, n=0, note=how)
