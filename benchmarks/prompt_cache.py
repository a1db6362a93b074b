"""The second turn of a long conversation after its model was unloaded: with what the engine left on disk, and without.

Both ways the model has just been loaded again.  `with` is our default, `without` is `prompt_cache_limit = 0`.
"""

from __future__ import annotations

import json
import random
import time
import urllib.request
from contextlib import ExitStack, closing
from typing import Any

from benchmarks import real
from benchmarks.lab import Effort, interleaved, world
from benchmarks.report import Row, Section, median

from llm_daemon.client import sync
from llm_daemon.engines.base import Missing

WORDS = "river stone light house green apple window cloud paper train garden winter music bread mountain".split()
CONTEXT = 4096
PATIENCE = 300.0
SWITCH = {"with": "", "without": "prompt_cache_limit = 0\n"}


class Talk:
    """Requests to a daemon that stays while nobody holds its model."""

    def __init__(self, model: str) -> None:
        connection = sync.connect()
        assert connection is not None  # it starts one
        self.connection, self.model = connection, f"{model}?context={CONTEXT}&parallel=1"

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        welcome = self.connection.welcome
        asked = urllib.request.Request(
            welcome["base_url"].removesuffix("/v1") + path, json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {welcome['api_key']}"},
        )  # fmt: skip
        with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def chat(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        body = {"model": self.model, "messages": messages, "max_tokens": 1, "temperature": 0}
        return self.post("/v1/chat/completions", body)

    def unload(self) -> float:
        """Seconds until nothing of the model runs."""
        began = time.perf_counter()
        self.post("/api/unload", {"model": self.model})
        while any(it["state"] in ("ready", "draining", "stopping") for it in self.status()):
            time.sleep(0.005)
        return time.perf_counter() - began

    def status(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.connection.ask("CALL", PATIENCE, method="status", params={})["result"]["instances"]
        return found

    def load(self) -> float:
        """Seconds of a load."""
        began = time.perf_counter()
        self.post("/api/load", {"model": self.model})
        while not any(it["state"] == "ready" for it in self.status()):
            time.sleep(0.005)
        return time.perf_counter() - began

    def close(self) -> None:
        self.connection.close()


def second_turn(top: str, tables: str, model: str, words: int, seed: int) -> dict[str, float]:
    """Milliseconds of the load and of the second turn, and of the unload before; tokens read and known.

    `top` and `tables` are the beginning and the end of the daemon's configuration.
    """
    chance = random.Random(seed)
    with world(tables) as here, ExitStack() as stack:
        here.config.write_text(top + here.config.read_text())
        talk = stack.enter_context(closing(Talk(model)))
        messages = [{"role": "user", "content": " ".join(chance.choices(WORDS, k=words))}]
        text = talk.chat(messages)["choices"][0]["message"]["content"]
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "And then?"}]
        unload, load, began = talk.unload(), talk.load(), time.perf_counter()
        timings = talk.chat(messages)["timings"]
        turn = time.perf_counter() - began
        times = {"unload": unload, "load": load, "turn": turn, "whole": load + turn}
        return {name: s * 1e3 for name, s in times.items()} | {"read": timings["prompt_n"], "known": timings["cache_n"]}


def prompt_cache(effort: Effort, out: Section, llama_server: str | None, model: str) -> None:
    """Fills the section, for each engine that is here; see the module."""
    words = 80 * effort.loads  # of a full run 1,200: some pages of text
    for name, where in real.engines(llama_server).items():
        if isinstance(where, Missing):
            out.notes.append(f"{name}: not measured, {where.reason}")
            continue
        found: dict[str, list[dict[str, float]]] = {way: [] for way in SWITCH}

        def measure(way: str, name: str = name, found: dict[str, list[dict[str, float]]] = found) -> float:
            top = f'default_engine = "{name}"\n{SWITCH[way]}'
            found[way].append(second_turn(top, real.config(llama_server), model, words, len(found[way])))
            return found[way][-1]["whole"]

        interleaved({way: lambda way=way: measure(way) for way in SWITCH}, effort.starts)  # type: ignore[misc]
        add_rows(out, name, found)
        out.extra[name] = found


def add_rows(out: Section, name: str, found: dict[str, list[dict[str, float]]]) -> None:
    def column(way: str, what: str) -> list[float]:
        return [row[what] for row in found[way]]

    tokens = f"{median(column('without', 'read')):.0f} tokens"
    rows = (
        ("turn", f"second turn after an unload, {tokens}"),
        ("whole", "load and second turn"),
        ("unload", "the unload before"),
    )
    for what, label in rows:
        out.rows.append(
            Row.of(f"{name}: {label}", "ms", column("with", what), column("without", what), against="without", judged="ratio")
        )
