"""V1 and V2 on a real engine: its own timings, and `llama-bench` with the same weights, threads and sizes.

llama-bench works inside of one process, without HTTP, template, tokenizing and sampling; the server may only be slower.  The
difference is what serving costs.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from llm_daemon.config import Settings
from llm_daemon.engines.base import Location, usable_cores
from llm_daemon.engines.registry import Registry
from llm_daemon.errors import LlmDaemonError

from .. import records, results, sessions, suite as suites
from ..artifacts import Finder
from ..runner import Runner, prepare
from . import told
from .agreement import Bound, Line, hold, missing

STEP = "V2"
PROMPT, GENERATE = 384, 96  # tokens, about and exactly
TRIALS = 3  # of each round
ROUNDS = 2
DECODE, PREFILL = Bound(part=0.10), Bound(part=0.15)
ENGINES = ("llama-server", "xllamacpp")
HOW = "not found: `python tools/build_llama_server.py llama-bench` builds it; then --tool-path with its folder"
TEXT = "The keeper of the lighthouse wrote down wind, weather and every ship that came in. "
SUITE = """
[suite]
name = "validate"
launches = 1
trials = {trials}
{servers}
[[model]]
id = "model"
artifacts = {{ given = {model} }}
[[case]]
id = "speed"
kind = "completion"
prompt = "{prompt}"
max_tokens = {generate}
ignore_eos = true
cache = "cold"
"""
SERVER = """
[[server]]
id = "{engine}"
engine = "{engine}"
threads = {threads}
"""


class Silent:
    """Looks on and says nothing."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def planned(self, left: dict[str, int]) -> None: ...

    def doing(self, target: str, what: str) -> None: ...

    def did(self, target: str, what: str) -> None: ...

    def problem(self, target: str, what: str) -> None:
        self.problems.append(f"{target}: {what}")


def here() -> dict[str, str]:
    """The engines of llama.cpp's family that run here, with their programs."""
    registry = Registry(Settings.load().engines)
    found = {name: registry.locate(name) for name in ENGINES}
    return {name: where.argv[0] for name, where in found.items() if isinstance(where, Location)}


def measure(engines: Sequence[str], model: str, threads: int, trials: int = TRIALS) -> tuple[list[records.Trial], str]:
    """(trials of one launch of each engine, path of the weights).  Raises LlmDaemonError if none ran."""
    servers = "".join(SERVER.format(engine=e, threads=threads) for e in engines)
    text = SUITE.format(
        servers=servers, model=json.dumps(model), prompt=TEXT * (PROMPT // 17), generate=GENERATE, trials=trials
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="llm-daemon-bench-") as folder:
        suite, watcher = suites.parse(text, Path(folder) / "validate.toml"), Silent()
        ready = prepare(suite, Finder(Path(folder) / sessions.HASHES, lambda _: None), watcher.problem)
        if not ready:
            raise LlmDaemonError(watcher.problems[0])
        place, session = sessions.new(suite, ready, Path(folder), ["validate"], ())
        writer = results.Writer(place)
        try:
            writer.session(session)
            Runner(suite, session, ready, writer, watcher).run()
        finally:
            writer.close()
        return results.load(place).measured(), next(iter(ready.values())).weights.path


def llama_bench(program: str, weights: str, prompt: int, threads: int) -> tuple[float, float]:
    """(ms for the prompt, ms for each token after a prompt of that size) by llama-bench.  Raises RuntimeError."""
    argv = [program, "-m", weights, "-t", str(threads), "-r", str(TRIALS), "-o", "json"]
    prefill = _run([*argv, "-p", str(prompt), "-n", "0"])
    decode = _run([*argv, "-p", "0", "-n", str(GENERATE), "-d", str(prompt)])
    return statistics.median(prefill) / 1e6, statistics.median(decode) / 1e6 / GENERATE


def _run(argv: Sequence[str]) -> list[float]:
    """Nanoseconds of each repetition."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}: {(done.stderr.strip().splitlines() or ['nothing said'])[-1][:200]}")
    (test,) = json.loads(done.stdout)
    return [float(ns) for ns in test["samples_ns"]]


def check(model: str, bench: bool = True, rounds: int = ROUNDS) -> Iterator[Line]:
    """V1 on the engines that are here, and V2 (`bench`) if llama-bench is."""
    engines = here()
    if not engines:
        yield missing("V1", "decode and first token", "server timings", "no engine is here: see `llm-daemon engines`")
        return
    threads = max(1, usable_cores() - 1)
    try:
        trials, weights = measure(list(engines), model, threads)
        yield from told.check(trials)
        if not bench:
            return
        program = shutil.which("llama-bench") or _beside(engines)
        if program is None or "llama-server" not in engines:
            yield missing(STEP, "decode and prompt", "llama-bench", HOW)
            return
        yield from against_llama_bench(program, model, weights, threads, rounds)
    except (LlmDaemonError, RuntimeError, OSError, ValueError, subprocess.TimeoutExpired) as e:
        yield Line(STEP, "decode and prompt", "llama-bench", n=0, note=f"it did not work: {e}"[:300], agrees=False)


def _beside(engines: dict[str, str]) -> str | None:
    """llama-bench next to the llama-server that is used: one build."""
    server = engines.get("llama-server")
    return shutil.which("llama-bench", path=str(Path(server).resolve().parent)) if server else None


def against_llama_bench(program: str, model: str, weights: str, threads: int, rounds: int) -> Iterator[Line]:
    """Both in turns, so that a machine that grows slower meets both."""
    decode, prefill = [], []
    for _ in range(rounds):
        trials, _ = measure(["llama-server"], model, threads)
        good = [t for t in trials if not t.error and t.tokens.prompt and t.decode_ms_per_tok is not None]
        if not good:
            raise RuntimeError("no trial went well: " + str(trials[0].error if trials else "the server did not start"))
        pp, tg = llama_bench(program, weights, good[0].tokens.prompt or PROMPT, threads)
        decode.append((statistics.median(t.decode_ms_per_tok or 0.0 for t in good), tg))
        prefill.append((statistics.median(t.t_ms["first_token"] for t in good), pp))
    yield hold(STEP, f"ms a token, {GENERATE} tokens", "llama-bench", decode, DECODE)
    yield hold(STEP, "first token against the whole prompt", "llama-bench", prefill, PREFILL)
