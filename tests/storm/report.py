"""What the storm's events say: counts, broken promises, figures; as JSON and as a table."""

from __future__ import annotations

import json
import re
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

AROUND_KILL = 10.0  # seconds between the word of a kill and the deed, or between the deed and who finds its lease broken


@dataclass
class Tally:
    """Reads the events and the fault points' log of one scenario, while they grow."""

    events: Path
    log: Path
    may_tell: str = "(?!)"  # errors that the scenario allows, a regular expression on their text
    may_lose: bool = False
    by_point: bool = False  # daemons are killed at fault points: only a decision to leave speaks against them
    patience: float = 8.0  # seconds of one attach; longer ones count as failed

    attaches: int = 0
    with_model: int = 0
    failed: list[str] = field(default_factory=list)
    told: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    lost: int = 0
    http: int = 0
    http_failed: list[str] = field(default_factory=list)
    kills: dict[str, int] = field(default_factory=dict)
    stops: Counter[str] = field(default_factory=Counter)
    races: Counter[str] = field(default_factory=Counter)
    ms: dict[str, list[float]] = field(default_factory=dict)
    orphan_ms: dict[str, list[float]] = field(default_factory=dict)
    survivors: Counter[str] = field(default_factory=Counter)
    fds: int = 0
    zombies: int = 0
    both: set[int] = field(default_factory=set)
    generations: int = 0
    candidates: int = 0
    _killed: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=1000))
    _decided: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=1000))
    _at: dict[Path, int] = field(default_factory=dict)

    def read(self) -> None:
        """What is new in both files."""
        for line in self._new(self.log):
            self._passed(line.split())
        for line in self._new(self.events):
            event = json.loads(line)
            getattr(self, "_" + event["e"])(event)

    def _new(self, path: Path) -> list[str]:
        with open(path, "rb") as f:
            f.seek(self._at.get(path, 0))
            data = f.read()
        whole = data.rfind(b"\n") + 1
        self._at[path] = self._at.get(path, 0) + whole
        return data[:whole].decode().splitlines()

    def _passed(self, fields: list[str]) -> None:
        ns, pid, point = fields
        if point == "VIOLATION":
            self.broken.append(f"S1/S2: a second daemon ({pid}) serves the folder")
        elif point == "renamed":
            self.generations += 1
        elif point == "launcher_forked":
            self.candidates += 1
        elif point == "idle_decided":
            self._decided.append((int(ns) / 1e9, int(pid)))

    def _attach(self, e: dict[str, Any]) -> None:
        self.attaches += 1
        self.with_model += e["model"]
        self.races.update(e["races"])
        kind = "after kill" if e["after"] else "cold" if e["races"].keys() - {"EAGAIN", "GOING"} else "warm"
        self.ms.setdefault(("model " if e["model"] else "") + kind, []).append(e["ms"])
        if e["ms"] > self.patience * 1e3:
            self.failed.append(f"slow: {e}")

    def _failed(self, e: dict[str, Any]) -> None:
        self.races.update(e["races"])
        if e["told"] and re.search(self.may_tell, e["why"]):
            self.told[e["code"]] += 1
        else:
            self.failed.append(str(e))

    def _lost(self, e: dict[str, Any]) -> None:
        self.lost += 1
        if self.may_lose:
            return
        deaths = self._decided if self.by_point else self._killed
        found = any(pid == e["pid"] and e["since"] - AROUND_KILL <= t <= e["t"] + AROUND_KILL for t, pid in deaths)
        if found == self.by_point:
            self.broken.append(f"S3: a lease ended by itself: {e}")

    def _http(self, e: dict[str, Any]) -> None:
        self.http += 1
        if not e["ok"]:
            self.http_failed.append(e["why"])

    def _kill(self, e: dict[str, Any]) -> None:
        self.kills[e["kind"]] = self.kills.get(e["kind"], 0) + 1
        if e["kind"] in ("daemon", "both"):
            self._killed.append((e["t"], e["pid"]))
        if e["kind"] == "both":
            self.both |= {e["pid"], *e["left"]}

    def _stop(self, e: dict[str, Any]) -> None:
        self.stops[e["kind"]] += 1

    def _orphan(self, e: dict[str, Any]) -> None:
        self.orphan_ms.setdefault(e["kind"], []).append(e["ms"])

    def _survivor(self, e: dict[str, Any]) -> None:
        self.survivors[e["kind"]] += 1

    def _violation(self, e: dict[str, Any]) -> None:
        self.broken.append(e["why"])

    def _end(self, e: dict[str, Any]) -> None:
        self.fds += e["fds"]
        self.zombies += e["zombies"]


def spread(ms: list[float]) -> dict[str, float]:
    ms = sorted(ms)
    return {"n": len(ms), "p50": ms[len(ms) // 2], "p99": ms[len(ms) * 99 // 100], "max": ms[-1]}


def summary(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """All scenarios together."""
    total: dict[str, Any] = {"scenario": "total"}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, dict) and key in ("ms", "orphan_ms"):
                merged = total.setdefault(key, {})
                for name, numbers in value.items():
                    merged.setdefault(name, []).extend(numbers)
            elif isinstance(value, dict):
                total[key] = dict(Counter(total.get(key, {})) + Counter(value))
            elif isinstance(value, (int, float, list)):
                total[key] = value + total[key] if key in total else value
    return total


def figures(part: dict[str, Any]) -> dict[str, Any]:
    """For reading: spreads in place of all the numbers, and rates."""
    n = max(1, part["attaches"])
    return {
        **part,
        "ms": {name: spread(ms) for name, ms in sorted(part["ms"].items())},
        "orphan_ms": {name: spread(ms) for name, ms in sorted(part["orphan_ms"].items())},
        "failed": len(part["failed"]),
        "failed_first": part["failed"][:5],
        "http_failed": len(part["http_failed"]),
        "http_failed_first": part["http_failed"][:5],
        "failure_bound_95": 3 / n if not part["failed"] else None,
        "candidates_per_generation": round(part["candidates"] / max(1, part["generations"]), 3),
        "cpu_s_per_1000": round(part["cpu_s"] * 1000 / n, 1),
        "leaked_per_10000": {k: round(part[k] * 1e4 / n, 2) for k in ("fds", "zombies", "files")},
    }


def table(parts: list[dict[str, Any]]) -> str:
    """Plain text, for a terminal."""
    rows = [
        "scenario seconds attaches model gens cand/gen kills failed told lost broken surv  warm-p50 p99 max  cold-p50 p99 max"
        "  killed-p50 p99 max".split()
    ]
    for part in map(figures, parts):
        if "skipped" in part:
            rows.append([part["scenario"], f"skipped: {part['skipped']}"])
            continue
        row = [part["scenario"], f"{part['seconds']:.0f}", part["attaches"], part["with_model"], part["generations"]]
        row += [part["candidates_per_generation"], sum(part["kills"].values()) + sum(part["stops"].values()), part["failed"]]
        row += [sum(part["told"].values()), part["lost"], len(part["broken"]), len(part["left"])]
        for kind in ("warm", "cold", "after kill"):
            s = part["ms"].get(kind)
            row += [s["p50"], s["p99"], s["max"]] if s else ["-"] * 3
        rows.append([str(cell) for cell in row])
    widths = [max(len(row[i]) for row in rows if len(row) > 2) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(r, widths, strict=False))) for r in rows
    ]
    total = figures(parts[-1])
    lines.append(f"kills and stops: {total['kills']} {dict(total['stops'])}")
    lines.append(f"races met: {dict(total['races'])}")
    lines.append(f"model attaches, ms: { {k[6:]: v for k, v in total['ms'].items() if k.startswith('model')} }")
    lines.append(f"what a kill left behind lived, ms: {total['orphan_ms']}; still there in the end: {dict(total['survivors'])}")
    lines.append(f"requests {total['http']}, broken {total['http_failed']}; CPU s per 1,000 attaches {total['cpu_s_per_1000']}")
    lines.append(f"leaked per 10,000 attaches: {total['leaked_per_10000']}; failed: 95 % bound {total['failure_bound_95']}")
    return "\n".join(lines)
