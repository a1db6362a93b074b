"""`GET /metrics`: what the journal counted and what the status shows, in Prometheus' text form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ..tally import Histogram
from .facts import Facts

PREFIX = "llm_daemon_"
COUNTERS = (  # name, words, attribute of tally.Row
    ("response_bytes", "Bytes of answers", "sent"),
    ("replays", "Requests put to a second engine after the first one died", "replays"),
)
HISTOGRAMS = (
    ("queue_seconds", "Wait for a slot", "queue"),
    ("engine_seconds", "From the slot to the head of the engine's answer", "engine"),
    ("first_byte_seconds", "From arrival to the first piece of the answer", "first_byte"),
    ("request_seconds", "From arrival to the end", "total"),
)


class DaemonCollector(Collector):
    """Made anew for each reading: everything is counted elsewhere."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts

    def collect(self) -> Iterator[Metric]:
        status = self._facts.status()
        yield from self._requests()
        yield from self._loads()
        yield from _instances(status["instances"])
        yield from _daemon(status["daemon"])
        history = self._facts.journal.history
        yield _counter("history_lost", "Rows that the request history could not keep", [], {(): history.lost if history else 0})

    def _requests(self) -> Iterator[Metric]:
        rows, by_lane = self._facts.journal.tally.rows, ["model", "lane"]
        ends = {(*key, end): n for key, row in rows.items() for end, n in row.ends.items()}
        yield _counter("requests", "Requests that had their end", [*by_lane, "end"], ends)
        tokens = {
            (*key, kind): n
            for key, row in rows.items()
            for kind, n in (("prompt", row.prompt_tokens), ("completion", row.completion_tokens))
        }
        yield _counter("tokens", "Tokens that answers told of", [*by_lane, "kind"], tokens)
        for name, text, attribute in COUNTERS:
            yield _counter(name, text, by_lane, {key: getattr(row, attribute) for key, row in rows.items()})
        for name, text, attribute in HISTOGRAMS:
            yield _histogram(name, text, by_lane, {key: getattr(row, attribute) for key, row in rows.items()})

    def _loads(self) -> Iterator[Metric]:
        tally = self._facts.journal.tally
        yield _counter("loads", "Starts of engines", ["model", "outcome"], tally.loads)
        yield _histogram("load_seconds", "From the start of an engine to its readiness", ["model"], tally.load)
        yield _histogram("memory_wait_seconds", "Wait for a place in memory, before a start", ["model"], tally.memory_wait)
        yield _counter("closes", "Loaded models that were closed, and why", ["model", "why"], tally.closes)


def exposition(facts: Facts) -> bytes:
    """The whole text."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(DaemonCollector(facts))
    return generate_latest(registry)


def _instances(instances: list[dict[str, Any]]) -> Iterator[Metric]:
    loaded = GaugeMetricFamily(PREFIX + "models_loaded", "Models that answer")
    loaded.add_metric([], sum(it["state"] in ("ready", "draining") for it in instances))
    yield loaded
    queued = GaugeMetricFamily(PREFIX + "models_queued", "Models that wait for a place in memory")
    queued.add_metric([], sum(it["state"] == "queued" for it in instances))
    yield queued
    waiting = GaugeMetricFamily(PREFIX + "waiting", "Requests that wait", labels=["model", "lane"])
    lanes: dict[tuple[str, str], int] = {}
    for it in instances:
        interactive = it["waiting_interactive"]
        for lane, n in (("interactive", interactive), ("regular", it["waiting"] - interactive)):
            lanes[it["model"], lane] = lanes.get((it["model"], lane), 0) + n
    for labels, n in lanes.items():
        waiting.add_metric(list(labels), n)
    yield waiting
    gauges = {
        "running": ("Requests that an engine works on", "running"),
        "aborting": ("Requests among them that were told to end", "aborting"),
        "slots": ("Requests an engine serves at once", "slots"),
        "engine_need_bytes": ("Memory that is kept for an engine", "need_bytes"),
        "engine_memory_bytes": ("Memory of an engine, shared pages by share", "memory_bytes"),
    }
    for name, (text, key) in gauges.items():
        sums: dict[str, float] = {}
        for it in instances:
            if it.get(key) is not None:
                sums[it["model"]] = sums.get(it["model"], 0) + it[key]
        gauge = GaugeMetricFamily(PREFIX + name, text, labels=["model"])
        for model, value in sums.items():
            gauge.add_metric([model], value)
        yield gauge


def _daemon(daemon: dict[str, Any]) -> Iterator[Metric]:
    for name, text, value in (
        ("leases", "Processes that hold the daemon", daemon["leases"]),
        ("uptime_seconds", "Age of the daemon", daemon["uptime"]),
        ("memory_budget_bytes", "Memory that all engines together may take", daemon.get("memory_budget_bytes")),
        ("memory_promised_bytes", "Memory that is kept for engines", daemon.get("memory_promised_bytes")),
        ("memory_bytes", "Memory of the daemon itself, shared pages by share", daemon["memory_bytes"]),
    ):
        gauge = GaugeMetricFamily(PREFIX + name, text)
        if value is not None:
            gauge.add_metric([], value)
        yield gauge
    info = GaugeMetricFamily(PREFIX + "info", "Which daemon this is", labels=["version"])
    info.add_metric([str(daemon["version"])], 1)
    yield info


def _counter(name: str, text: str, labels: list[str], values: Any) -> CounterMetricFamily:
    family = CounterMetricFamily(PREFIX + name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(list(key), value)
    return family


def _histogram(name: str, text: str, labels: list[str], values: dict[Any, Histogram]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(PREFIX + name, text, labels=labels)
    for key, histogram in values.items():
        family.add_metric(list(key), histogram.cumulative(), histogram.total)
    return family
