"""Fuzzes for a while and tells what came of it: `python -m tests.fuzz --seconds 600`.

A third of the time for the parsers (under atheris too, at the same time, where it is installed), the rest for the
whole front on both event loops.  Inputs that fail are written to a folder; `--replay FILE` runs one of them again.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from time import monotonic, perf_counter
from typing import Any

import msgspec
import psutil

from . import cover, front, parsers

ROOT = Path(__file__).parents[2]
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop] | None] = {"asyncio": asyncio.new_event_loop}
if importlib.util.find_spec("uvloop"):
    import uvloop

    LOOPS["uvloop"] = uvloop.new_event_loop


@dataclass
class Tally:
    """Of one part: `slowest` in seconds, growth between its warmed-up beginning and its end."""

    name: str
    folder: Path
    runs: int = 0
    slowest: float = 0.0
    slow_input: bytes = b""
    finds: dict[str, str] = field(default_factory=dict)  # what, and the file with the first input that did it
    rss_before: int = 0
    rss_after: int = 0
    fds_before: int = 0
    fds_after: int = 0

    def note(self, data: bytes, took: float, what: list[str]) -> None:
        self.runs += 1
        if took > self.slowest:
            self.slowest, self.slow_input = took, data
        for it in what:
            kind = re.sub(r"[0-9a-f]{6}-\d+|0x[0-9a-f]+|\d+", "#", it)[:160]
            if kind not in self.finds:
                self.folder.mkdir(parents=True, exist_ok=True)
                path = self.folder / f"{self.name}-{len(self.finds)}"
                path.write_bytes(data)
                self.finds[kind] = str(path)
                print(f"FOUND {it[:600]}\n  {path}", file=sys.stderr, flush=True)

    def measure(self, *, warm: bool = False) -> None:
        gc.collect()
        me = psutil.Process()
        if warm:
            self.rss_before, self.fds_before = me.memory_info().rss, me.num_fds()
        self.rss_after, self.fds_after = me.memory_info().rss, me.num_fds()

    def row(self) -> dict[str, Any]:
        return {
            "part": self.name, "executions": self.runs, "finds": self.finds, "slowest_ms": round(self.slowest * 1e3, 1),
            "rss_mb": round(self.rss_after / 2**20, 1), "rss_growth_mb": round((self.rss_after - self.rss_before) / 2**20, 1),
            "fd_growth": self.fds_after - self.fds_before,
        }  # fmt: skip


def fuzz_parsers(rng: Random, seconds: float, folder: Path) -> Tally:
    tally, began = Tally("parsers", folder), monotonic()
    while (gone := monotonic() - began) < seconds or tally.runs < 100:
        data, start = parsers.spoilt(rng), perf_counter()
        what = _try(data)
        tally.note(data, perf_counter() - start, what)
        if not tally.fds_before and gone > seconds / 4:
            tally.measure(warm=True)
    tally.measure()
    return tally


def _try(data: bytes) -> list[str]:
    try:
        parsers.one(data)
    except Exception as e:
        at = traceback.extract_tb(e.__traceback__)[-1]
        return [f"{parsers.TARGETS[data[0] % len(parsers.TARGETS)].__name__}: {type(e).__name__} in {at.name}: {e}"]
    return []


def fuzz_front(loop: str, rng: Random, seconds: float, folder: Path) -> Tally:
    tally = Tally(f"front-{loop}", folder)

    async def main() -> None:
        world, began = front.World(path), monotonic()
        await world.start()
        while (gone := monotonic() - began) < seconds or tally.runs < 20:
            plan, start = front.scenario(rng), perf_counter()
            what = await world.run(plan)
            tally.note(msgspec.json.encode(plan), perf_counter() - start, what)
            if not tally.fds_before and gone > seconds / 4:
                await asyncio.sleep(0.6)  # what was accepted in the last moment is gone by now
                tally.measure(warm=True)
        await asyncio.sleep(0.6)
        tally.measure()
        await world.stop()

    with tempfile.TemporaryDirectory(prefix="llmd-") as own, asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        path = f"{own}/e"
        runner.run(main())
    return tally


def fuzz_covered(seconds: float, folder: Path) -> subprocess.Popen[bytes] | None:
    """Starts the parsers under atheris; None where that is not installed."""
    if importlib.util.find_spec("atheris") is None:
        return None
    seeds = folder / "corpus"
    cover.seed(seeds)
    argv = [sys.executable, "-m", "tests.fuzz.cover", f"-max_total_time={int(seconds)}", "-print_final_stats=1", "-max_len=4096"]
    argv += ["-timeout=10", "-rss_limit_mb=1024", f"-artifact_prefix={folder}/cover-", str(seeds)]
    with (folder / "cover.log").open("wb") as log:
        return subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def covered(process: subprocess.Popen[bytes], folder: Path) -> dict[str, Any]:
    process.wait()
    log = (folder / "cover.log").read_text(errors="replace")
    stats = {name: int(value) for name, value in re.findall(r"stat::(\w+):\s+(\d+)", log)}
    first = re.search(r"^#\d+\s+INITED.*?rss: (\d+)Mb", log, re.MULTILINE)
    peak = stats.get("peak_rss_mb", 0)
    wrong = re.search(r"=== Uncaught Python exception: ===\n(.*)", log)
    finds = {} if process.returncode == 0 else {(wrong[1] if wrong else "it stopped early")[:160]: f"{folder}/cover.log"}
    return {
        "part": "atheris", "executions": stats.get("number_of_executed_units", 0), "finds": finds,
        "slowest_ms": stats.get("slowest_unit_time_sec", 0) * 1e3, "rss_mb": peak,
        "rss_growth_mb": peak - int(first[1]) if first else 0, "fd_growth": 0,
    }  # fmt: skip


def replay(path: Path) -> int:
    """Runs an input that failed once more; 1 if it still does."""
    data, what = path.read_bytes(), list[str]()

    async def main(socket: str) -> None:
        world = front.World(socket)
        await world.start()
        what.extend(await world.run(msgspec.json.decode(data, type=front.Scenario)))
        await world.stop()

    if path.name.startswith("front"):
        with tempfile.TemporaryDirectory(prefix="llmd-") as own:
            for loop in LOOPS.values():
                with asyncio.Runner(loop_factory=loop) as runner:
                    runner.run(main(f"{own}/e"))
    else:
        parsers.one(data)
    print("\n".join(what) or "fine")
    return int(bool(what))


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    options.add_argument("--seconds", type=float, default=60.0)
    options.add_argument("--seed", type=int, default=None, help="of the random numbers; a new one each time if not given")
    options.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "llm-daemon-fuzz", help="for inputs that fail")
    options.add_argument("--json", type=Path, help="where to write the figures")
    options.add_argument("--replay", type=Path, metavar="FILE")
    given = options.parse_args()
    if given.replay:
        return replay(given.replay)
    seed = given.seed if given.seed is not None else int.from_bytes(os.urandom(4), "big")
    given.out.mkdir(parents=True, exist_ok=True)
    print(f"seed {seed}", flush=True)
    beside = fuzz_covered(given.seconds, given.out) if given.seconds >= 20 else None
    rng, share = Random(seed), given.seconds / 3
    try:
        rows = [fuzz_parsers(rng, share, given.out).row()]
        rows += [fuzz_front(loop, rng, 2 * share / len(LOOPS), given.out).row() for loop in LOOPS]
        if beside is not None:
            rows.append(covered(beside, given.out))
    finally:
        if beside is not None:
            beside.kill()
            beside.wait()
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    if given.json:
        given.json.write_text(json.dumps({"seed": seed, "parts": rows}))
    return int(any(row["finds"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
