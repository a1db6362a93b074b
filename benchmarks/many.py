"""Six models in memory for two: does everybody get an answer, and who has to leave for whom?

Two architectures, three quantizations of each (made by llama-quantize where it is built; without it, copies of the two files);
the budget holds the two largest.  Eight clients ask one after the other, each time a model at random, half of them streaming.
Counted are answers that were lost or cut, and evictions of a model in use: each must be none.  What a model's loads, evictions
and waits were is told by the daemon's own history.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import real
from benchmarks.lab import Effort, fake_model, gateway_address, world
from benchmarks.report import Row, Section, median, percentile
from tools.quantize import quantize

from llm_daemon import Lease, attach
from llm_daemon.client import sync
from llm_daemon.config import Settings
from llm_daemon.daemon.memory import Memory
from llm_daemon.engines.base import Missing
from llm_daemon.engines.registry import Registry
from llm_daemon.models.catalog import Catalog
from llm_daemon.spec import Wish
from llm_daemon.testing.world import World

CLIENTS = 8
TOKENS = 12
BASES = {"smollm2-135m": ("Q2_K", "Q8_0"), "gemma3-270m": ("Q3_K_M", "Q8_0")}
SCRIPTED = 45_000_000  # bytes that a scripted model says it needs; it takes less, but three do not fit
CONTEXT, PARALLEL = 2048, 2
PATIENCE = 300.0
SETTINGS = f"context = {CONTEXT}\nparallel = {PARALLEL}\nmax_overtake = 5\n"


@dataclass(slots=True)
class Told:
    """What became of the requests: `lost` and `cut` as (model, how)."""

    answered: int = 0
    lost: list[tuple[str, str]] = field(default_factory=list)
    cut: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0


def many(effort: Effort, out: Section, llama_server: str | None, model: str) -> None:
    """Fills the section; see the module."""
    if not real.is_scripted(model) and isinstance(where := real.engines(llama_server)["xllamacpp"], Missing):
        out.notes.append(f"real engine: not measured, {where.reason}")
        model = ""
    with world(real.config(llama_server)) as here:
        models = scripted(here) if not model or real.is_scripted(model) else quantized(here, out)
        needs = weighed(models)
        budget = sum(sorted(needs.values())[-2:])
        here.config.write_text(f"memory_budget = {budget}\n{SETTINGS}" + here.config.read_text())
        with attach(next(iter(models.values()))) as llm:
            told = ask_all(llm, list(models.values()), effort.many)
            found = history()
    report(out, models, needs, budget, told, found)


def scripted(here: World) -> dict[str, str]:
    """Name for the table -> what is asked for."""
    scenario: dict[str, Any] = {"memory_bytes": SCRIPTED, "allocates": SCRIPTED // 3 * 2, "tokens": TOKENS, "token_ms": 5}
    return {f"scripted {n}": fake_model(here, load_seconds=0.1, **scenario) for n in range(1, 7)}


def quantized(here: World, out: Section) -> dict[str, str]:
    models = {}
    for base, quants in BASES.items():
        path = Path(real.model_path(base, "xllamacpp"))
        models[f"{base}, as it is"] = str(path)
        for quant in quants:
            try:
                models[f"{base}, {quant}"] = str(quantize(path, quant))
            except FileNotFoundError:
                copy = here.base / f"{base}-{quant}.gguf"
                os.link(path, copy) if path.stat().st_dev == here.base.stat().st_dev else copy.write_bytes(path.read_bytes())
                models[f"{base}, copy for {quant}"] = str(copy)
                out.notes.append(f"llama-quantize is not built (make llama-server): {base} {quant} is a copy of the file")
    return models


def weighed(models: dict[str, str]) -> dict[str, int]:
    """Bytes that the daemon will think each one needs, before any load."""
    settings = Settings(
        context=CONTEXT, parallel=PARALLEL, engines={"fake": {"adapter": "llm_daemon.testing.fake_engine:FakeEngine"}}
    )
    memory = Memory(settings, Registry(settings.engines))
    return {name: memory.weigh(Catalog.load({}).resolve(Wish.parse(model))).need for name, model in models.items()}


def ask_all(llm: Lease, models: Sequence[str], count: int) -> Told:
    told, began = Told(), time.perf_counter()

    def client(number: int) -> None:
        rng = random.Random(number)
        for n in range(number, count, CLIENTS):
            model, stream = rng.choice(models), n % 2 == 0
            try:
                ending = ask(llm, model, stream, f"Client {number}, question {n}: what is new?")
            except (OSError, http.client.HTTPException, ValueError) as e:
                told.lost.append((model, f"{type(e).__name__}: {e}"))
                continue
            told.answered += 1
            if ending:
                told.cut.append((model, ending))

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(client, range(CLIENTS)))
    told.seconds = time.perf_counter() - began
    return told


def ask(llm: Lease, model: str, stream: bool, words: str) -> str:
    """Empty for a whole answer, else what is wrong with its end.  Raises OSError or ValueError for none at all."""
    connection = http.client.HTTPConnection(*gateway_address(llm.base_url), timeout=PATIENCE)
    try:
        body = {"model": model, "stream": stream, "max_tokens": TOKENS, "messages": [{"role": "user", "content": words}]}
        headers = {"Authorization": f"Bearer {llm.api_key}", "Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        data = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise ValueError(f"{answer.status} {data[:300]!r}")
    if stream:
        return "" if data.rstrip().endswith(b"data: [DONE]") and b'"error"' not in data else f"ends with {data[-200:]!r}"
    return "" if json.loads(data)["choices"][0].get("finish_reason") else f"no reason to finish: {data[-200:]!r}"


def history() -> dict[str, Any]:
    """What `llm-daemon explain` knows of all of it."""
    talk = sync.connect(start_daemon=False, lease=False)
    if talk is None:
        raise RuntimeError("the daemon has gone")
    try:
        found: dict[str, Any] = talk.ask("CALL", 30, method="explain", params={"limit": 10_000})["result"]
        return found
    finally:
        talk.close()


def spans(events: Sequence[dict[str, Any]], first: str, last: str) -> list[float]:
    """Seconds from each `first` to the `last` of the same instance that follows it."""
    began: dict[str, float] = {}
    found = []
    for event in events:
        if event["kind"] == first:
            began[event["instance"]] = event["time"]
        elif event["kind"] == last and event["instance"] in began:
            found.append(event["time"] - began.pop(event["instance"]))
    return found


def evicted_in_use(events: Sequence[dict[str, Any]], tickets: Sequence[dict[str, Any]]) -> int:
    """Evictions that ended while a request ran on the instance."""
    count = 0
    for event in events:
        if event["kind"] == "closed" and event["why"] == "evicted":
            mine = (t for t in tickets if t["instance"] == event["instance"])
            count += any(t["time"] + t["queue_s"] + t["load_s"] < event["time"] < t["time"] + t["total_s"] for t in mine)
    return count


def report(out: Section, models: dict[str, str], needs: dict[str, int], budget: int, told: Told, found: dict[str, Any]) -> None:
    events, tickets = list(reversed(found["events"])), found["recent"]
    evictions = [e for e in events if e["kind"] == "closed" and e.get("why") == "evicted"]
    waits = spans(events, "queued", "loading")
    asked = told.answered + len(told.lost)
    title = "real engine" if not any(name.startswith("scripted") for name in models) else "scripted engine"
    out.rows += [
        Row(f"{title}: requests lost", "", float(len(told.lost)), asked, target=0.0),
        Row(f"{title}: answers cut", "", float(len(told.cut)), asked, target=0.0),
        Row(f"{title}: evictions of a model in use", "", float(evicted_in_use(events, tickets)), len(evictions), target=0.0),
        Row(f"{title}: requests for each load", "", asked / max(1, sum(e["kind"] == "loading" for e in events)), asked),
        Row.of(f"{title}: wait for memory, p50", "s", waits or [0.0]),
        Row(f"{title}: wait for memory, longest", "s", max(waits, default=0.0), len(waits)),
        Row(f"{title}: all {asked} requests of {CLIENTS} clients", "s", told.seconds),
    ]
    table = markdown(models, needs, events, tickets)
    out.notes += [f"{title}: budget {budget / 1e6:.0f} MB, for the two largest of {len(models)} models", *table]
    out.notes += [f"lost or cut: {model}: {how}" for model, how in (told.lost + told.cut)[:5]]
    out.extra[title] = {"markdown": "\n".join(table), "budget_bytes": budget, "need_bytes": needs, "waits_s": waits}


def markdown(
    models: dict[str, str], needs: dict[str, int], events: Sequence[dict[str, Any]], tickets: Sequence[dict[str, Any]]
) -> list[str]:
    """The table of loads, evictions and waits, as it stands in docs/how-to/many-models.md."""
    lines = [
        "| model | need | requests | loads | load, p50 | evicted | waits for memory | wait, p50 | longest | request, p50 | p95 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, model in models.items():
        mine = [e for e in events if e["model"] == model]
        loads, waits = spans(mine, "loading", "ready"), spans(mine, "queued", "loading")
        totals = [t["total_s"] for t in tickets if t["model"] == model]
        evicted = sum(e["kind"] == "closed" and e.get("why") == "evicted" for e in mine)
        cells = [name, f"{needs[name] / 1e6:.0f} MB", len(totals), sum(e["kind"] == "loading" for e in mine), seconds(loads)]
        cells += [evicted, len(waits), seconds(waits), f"{max(waits):.2f} s" if waits else "-", seconds(totals)]
        cells += [f"{percentile(totals, 95):.2f} s" if totals else "-"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def seconds(values: Sequence[float]) -> str:
    return f"{median(values):.2f} s" if values else "-"
