"""What models need of the memory: estimated before the first load, then learned from the engines that ran.

Only the host's memory is counted.  Where a GPU with memory of its own is seen, nobody knows before the load how much of a
model goes there: then a model that would not fit into the budget is given all of it instead of being refused, and what its
engine really takes of the host is known for the next time.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from .. import errors, paths
from ..budget import budget_bytes, has_gpu, host_bytes
from ..config import Settings
from ..engines.base import Grant, Weighs
from ..engines.registry import Registry
from ..models.gguf import GgufInfo, header
from ..models.store import Store
from ..models.weight import PROCESS, Need, estimate
from ..spec import GENERATE, Extra, Spec
from .address import tree

log = logging.getLogger("llm_daemon")
KEPT = 256  # specs whose need is remembered
NEW_WEIGHT = 0.2  # of a life that took less than was known; more is believed at once
WORTH_WRITING = 0.02  # part by which a need must have changed
BEYOND = 4  # times the machine's memory: what no GPU beside it would make up for


@dataclass(frozen=True, slots=True)
class Weight:
    """Bytes that a spec `need`s of the budget, and how we know: `learned` from engines that ran, `estimated` from the file's
    header or by the adapter, from the `size` of what is still to be fetched, or `unknown` (0).

    `parts` of the estimate, `learned` from earlier loads, a `note` for people.
    """

    need: int
    basis: Literal["learned", "estimated", "size", "unknown"]
    parts: Need | None = None
    learned: int | None = None
    note: str = ""


class Memory:
    """`budget`: bytes for all engines, None for no bound.  `weigh` and `learn` block for some milliseconds; from any thread."""

    def __init__(self, settings: Settings, registry: Registry, file: str | None = None) -> None:
        self.host = host_bytes()
        self.budget = budget_bytes(settings.memory_budget, self.host)
        self._settings, self._registry = settings, registry
        self._learned = Learned(file or paths.memory_file())

    def weigh(self, spec: Spec) -> Weight:
        """What an engine for `spec` needs.  Raises what stands in the way of its start: a bad file, no engine."""
        path = Store(Path(paths.cache_dir())).path(spec.artifact)
        learned = self._learned.get(key(spec))
        if path is None:
            size = spec.artifact.size
            if size is None and learned is not None:
                return Weight(self._bounded(learned), "learned", None, learned)
            if size is None:
                return Weight(0, "unknown", note="its size is known once it is fetched")
            return Weight(size + PROCESS, "size", Need(size, process=PROCESS), note="known better once it is fetched")
        parts = self.estimate(spec, str(path))
        if learned is None and parts is None:
            size = (Store(Path(paths.cache_dir())).size(spec.artifact) or 0) + PROCESS
            return Weight(self._bounded(size), "size", note="its engine does not tell; known better once it ran")
        known = parts.total if parts else 0
        need, basis, note = (known, "estimated", "") if learned is None else (learned, "learned", "")
        if self.budget is not None and need > self.budget:
            if learned is not None and known <= self.budget:
                need, note = self.budget, "it took more than the budget: it runs alone"
            elif has_gpu() and (spec.full or spec.wish).gpu_layers != 0 and known <= BEYOND * self.host:
                need, note = self.budget, "how much of it a GPU takes is known after the first load: it runs alone"
        return Weight(need, basis, parts, learned, note)  # type: ignore[arg-type]

    def _bounded(self, need: int) -> int:
        """What is not known well enough to refuse a model for it."""
        return need if self.budget is None else min(need, self.budget)

    def estimate(self, spec: Spec, path: str) -> Need | None:
        """By the adapter if it can tell, else from a GGUF file's header, else None."""
        full = spec.full or spec.wish
        adapter, _ = self._registry.choose(path, full.engine)
        context, parallel, info = room(self._settings, spec, path)
        if isinstance(adapter, Weighs):
            grant = Grant(path, spec.model, "", context, parallel, 1, full.gpu_layers, full.args)
            told = adapter.memory(spec, grant)
            return None if told is None else Need(told)
        if info is None:
            return None
        need = estimate(info, context, parallel)
        return replace(need, weights=need.weights + sum(map(_beside, spec.extras)))

    def learn(self, spec: Spec, used: int, is_over: bool) -> None:
        """An engine for `spec` took `used` bytes at its peak; `is_over`: it took no more than that in its life."""
        self._learned.note(key(spec), used, is_over)

    def check(self, spec: Spec, path: str) -> None:
        """Raises UsageError (`too_large`) for what nothing would make fit, even where there is no budget."""
        parts = self.estimate(spec, path)
        if parts is not None and parts.total > BEYOND * self.host:
            raise errors.UsageError(
                f"{spec.model} would need some {parts.total / 1e9:,.0f} GB; this machine has {self.host / 1e9:.0f} GB",
                code="too_large", hint="ask for a smaller context",
            )  # fmt: skip


def _beside(extra: Extra) -> int:
    """Bytes of a model that is loaded beside another; 0 while it is not here."""
    path = Store(Path(paths.cache_dir())).path(extra.artifact)
    if path is None or path.suffix != ".gguf":
        return extra.artifact.size or 0
    return header(path, stored=extra.artifact.source != "file").tensor_bytes


def room(settings: Settings, spec: Spec, path: str) -> tuple[int, int, GgufInfo | None]:
    """(tokens of context for each conversation, conversations, the file's header if it is GGUF): what will be loaded."""
    full = spec.full or spec.wish
    context, parallel = full.context or settings.context, full.parallel or settings.parallel
    if not path.endswith(".gguf"):
        return context, parallel, None
    info = header(path, stored=spec.artifact.source != "file")
    if spec.wish.context is None and info.context_length:
        context = min(context, info.context_length)
    return context, parallel, info


def key(spec: Spec) -> str:
    """What needs the same memory: the weights with all options."""
    full = spec.full or spec.wish
    return " ".join(
        [
            spec.artifact.key,
            *([spec.mode] if spec.mode != GENERATE else []),
            *(f"{extra.option}={extra.artifact.key}" for extra in spec.extras),
            *(f"{n}={v}" for n in ("engine", "context", "parallel", "gpu_layers") if (v := getattr(full, n))),
            *full.args,
        ]
    )


class Learned:
    """The bytes that each spec's engine took, in a small JSON file of the state folder: the last used last, `KEPT` of them.

    Best effort: a file that cannot be read or written costs what was learned, and nothing else.  Any thread.
    """

    def __init__(self, path: str) -> None:
        self._path, self._lock = path, threading.Lock()
        self._known: dict[str, int] | None = None

    def get(self, name: str) -> int | None:
        with self._lock:
            return self._load().get(name)

    def note(self, name: str, used: int, is_over: bool) -> None:
        with self._lock:
            before = self._load().get(name)
            now = used
            if before is not None and used < before:
                now = round(before + NEW_WEIGHT * (used - before)) if is_over else before
            if before is not None and abs(now - before) <= WORTH_WRITING * before:
                return
            self._known = None  # another daemon may have written meanwhile
            known = self._load()
            known.pop(name, None)
            known[name] = now
            for old in list(known)[: max(0, len(known) - KEPT)]:
                del known[old]
            self._save(known)

    def _load(self) -> dict[str, int]:
        if self._known is None:
            self._known = {}
            with suppress(OSError, ValueError), open(self._path, encoding="utf-8") as f:
                found = json.load(f)
                if isinstance(found, dict):
                    self._known = {k: v for k, v in found.items() if isinstance(v, int) and v > 0}
        return self._known

    def _save(self, known: dict[str, int]) -> None:
        half = f"{self._path}.{os.getpid()}"
        try:
            os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
            with open(half, "w", encoding="utf-8") as f:
                json.dump(known, f, indent=1)
            os.replace(half, self._path)
        except OSError as e:
            log.warning("what models need of the memory is not remembered: %s", e)
            with suppress(OSError):
                os.unlink(half)


def peak_bytes(pid: int) -> int | None:
    """The most memory that the process and its descendants took so far, what they share with others by share; None if unknown.

    For each the proportional share (PSS) now, and what its resident memory once was above what it is: proc(5), VmHWM.
    """
    total, seen = 0, False
    for each in tree(pid):
        try:
            with open(f"/proc/{each}/status") as f:
                status = {k: int(v.split()[0]) for line in f for k, _, v in [line.partition(":")] if k in ("VmHWM", "VmRSS")}
            with open(f"/proc/{each}/smaps_rollup") as f:
                share = next(int(line.split()[1]) for line in f if line.startswith("Pss:"))
            total += 1024 * (share + max(0, status["VmHWM"] - status["VmRSS"]))
            seen = True
        except (OSError, StopIteration, KeyError):  # gone, or a system that does not tell
            continue
    return total if seen else None
