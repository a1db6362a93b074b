"""Counters and histograms of what passed through, for `/metrics`.  Plain numbers: counting costs a request a microsecond."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .journal import TicketRecord

BOUNDS = (0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)  # seconds
MODELS = 100  # names of models that get numbers of their own: a client may invent any
OTHER = "other"


class Histogram:
    """How many durations lay at or below each of `BOUNDS`, and their sum, in seconds.

    >>> h = Histogram()
    >>> h.add(0.02), h.add(1000.0)
    (None, None)
    >>> h.cumulative()[2:4], h.cumulative()[-1], h.total
    ([('0.025', 1.0), ('0.1', 1.0)], ('+Inf', 2.0), 1000.02)
    """

    __slots__ = ("_counts", "total")

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, count up to it), in the form Prometheus wants."""
        seen, out = 0, []
        for bound, count in zip([*map(str, BOUNDS), "+Inf"], self._counts, strict=True):
            seen += count
            out.append((bound, float(seen)))
        return out


class Row:
    """Requests for one model in one lane."""

    __slots__ = ("completion_tokens", "ends", "engine", "first_byte", "prompt_tokens", "queue", "replays", "sent", "total")

    def __init__(self) -> None:
        self.ends: dict[str, int] = {}
        self.queue, self.engine, self.first_byte, self.total = Histogram(), Histogram(), Histogram(), Histogram()
        self.prompt_tokens = self.completion_tokens = self.replays = self.sent = 0

    def count(self, record: TicketRecord) -> None:
        self.ends[record.end] = self.ends.get(record.end, 0) + 1
        self.total.add(record.total_s)
        self.sent += record.bytes_out
        self.replays += record.replayed
        if not record.instance:
            return
        self.queue.add(record.queue_s)
        if record.end == "served":
            self.engine.add(record.engine_s)
        if record.first_token_s is not None:
            self.first_byte.add(record.first_token_s)
        if record.prompt_tokens:
            self.prompt_tokens += record.prompt_tokens
        if record.completion_tokens:
            self.completion_tokens += record.completion_tokens


class Tally:
    """Since the daemon's birth."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], Row] = {}  # model, lane
        self.loads: dict[tuple[str, str], int] = defaultdict(int)  # model, `ready`, `failed` or `abandoned`
        self.closes: dict[tuple[str, str], int] = defaultdict(int)  # model, why
        self.memory_wait: dict[tuple[str], Histogram] = defaultdict(Histogram)  # model
        self.load: dict[tuple[str], Histogram] = defaultdict(Histogram)  # model
        self._models: set[str] = set()

    def label(self, model: str) -> str:
        """The model's name, or `other` when there are too many."""
        if model in self._models:
            return model
        if len(self._models) >= MODELS:
            return OTHER
        self._models.add(model)
        return model

    def count(self, record: TicketRecord) -> None:
        # A name that reached no instance may be any text: those requests are counted together.
        row = self.rows.get((record.model if record.instance else "", record.lane))
        if row is None:
            key = (self.label(record.model) if record.instance else "", record.lane)
            row = self.rows.setdefault(key, Row())
        row.count(record)
