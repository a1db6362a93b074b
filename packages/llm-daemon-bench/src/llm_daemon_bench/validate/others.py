"""V3 and V4: independent tools, on the same server and in turns with us.

The server is a scripted one, so the truth is known too; the role comes at once, which some take for the first token.  Each
tool lives in an environment of its own: none is a dependency of ours.
"""

from __future__ import annotations

import http.server
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .. import reply as replies
from ..testing.script import Script
from ..testing.scripted import ScriptedServer
from .agreement import Bound, Line, hold, missing
from .known import Known, ask, cases

TTFT = Bound(absolute=3.0, part=0.03)
DECODE = Bound(part=0.02)
STEADY = Known("steady", Script(None, role_first=True, prefill_ms=200, token_ms=10))
ROUNDS = 3
REQUESTS = 6  # of each tool in a round
TOKENS = 64
PATIENCE = 180.0  # seconds for one run of a tool
# Words for a tokenizer that llama-benchy is given: without one it would fetch some.  Sizes are nominal then, times are not.
MAKE_TOKENIZER = """
import sys
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
t = Tokenizer(models.BPE())
t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
t.train_from_iterator([sys.argv[1]], trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
t.save("tokenizer.json")
open("tokenizer_config.json", "w").write('{"tokenizer_class": "PreTrainedTokenizerFast"}')
"""
BOOK = "The harbour was quiet, and nobody had seen the ship. " * 400

Sample = tuple[float, float]  # first token in ms, ms a token


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool: `run(program, url, folder)` measures and returns a sample for each request."""

    name: str
    step: str
    run: Callable[[str, str, Path], list[Sample]]

    @property
    def how(self) -> str:
        """How to get it."""
        return (
            f"not found: python3 -m venv {self.name}-env && {self.name}-env/bin/pip install {self.name}, "
            f"then --tool-path {self.name}-env/bin"
        )


def execute(argv: Sequence[str], folder: Path) -> None:
    """Runs a tool in a folder of its own, offline.  Raises RuntimeError with its last line."""
    env = {**os.environ, "HOME": str(folder), "NO_COLOR": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        argv, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", timeout=PATIENCE, check=False,
    )  # fmt: skip
    if done.returncode:
        said = [line for line in done.stdout.splitlines() if line.strip()] or ["nothing"]
        raise RuntimeError(f"status {done.returncode}, it said: {said[-1].strip()[:200]}")


def servebench(program: str, url: str, folder: Path) -> list[Sample]:
    """Its file has each request's first token and chunk times, in seconds."""
    execute(
        [program, "run", "--url", f"{url}/v1", "--model", STEADY.name, "--concurrency", "1", "--num-requests", str(REQUESTS),
         "--input-len", "64", "--output-len", str(TOKENS), "--no-gpu", "--out", "r.json"], folder,
    )  # fmt: skip
    (level,) = json.loads((folder / "r.json").read_text())["levels"]
    return [
        (1e3 * r["ttft"], 1e3 * (r["chunk_times"][-1] - r["chunk_times"][0]) / (r["output_tokens"] - 1))
        for r in level["requests"]
    ]


def frugal(program: str, url: str, folder: Path) -> list[Sample]:
    """Its file has each request in milliseconds.  Its own `itl_ms` is between chunks, so the rate is taken from the ends."""
    execute(
        [program, "bench", "--url", f"{url}/v1", "--model", STEADY.name, "-n", str(REQUESTS), "--repeats", "1", "--warmup", "1",
         "--max-tokens", str(TOKENS), "--prompt-tokens", "64", "--out", "out", "--format", "json"], folder,
    )  # fmt: skip
    (path,) = (folder / "out").glob("*.json")
    (run,) = json.loads(path.read_text())["runs"]
    return [(r["ttft_ms"], (r["e2e_ms"] - r["ttft_ms"]) / (r["output_tokens"] - 1)) for r in run["requests"]]


def benchy(program: str, url: str, folder: Path) -> list[Sample]:
    """It wants a tokenizer and a book.  `e2e_ttft` is the first token; its `ttfr` is the role's chunk."""
    (folder / "book.txt").write_text(BOOK)
    execute([str(Path(program).with_name("python")), "-c", MAKE_TOKENIZER, BOOK], folder)
    with books(folder) as place:
        execute(
            [program, "--base-url", f"{url}/v1", "--model", STEADY.name, "--tokenizer", str(folder), "--book-url", place,
             "--pp", "64", "--tg", str(TOKENS), "--runs", str(REQUESTS), "--latency-mode", "none", "--exact-tg",
             "--skip-coherence", "--format", "json", "--save-result", "r.json"], folder,
        )  # fmt: skip
    (found,) = json.loads((folder / "r.json").read_text())["benchmarks"]
    return [(t, 1e3 / rate) for t, rate in zip(found["e2e_ttft"]["values"], found["tg_throughput"]["values"], strict=True)]


@contextmanager
def books(folder: Path) -> Iterator[str]:
    """Serves a folder's book on loopback; its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/book.txt"
        finally:
            server.shutdown()
            thread.join()


TOOLS = (
    Tool("llama-benchy", "V3", benchy),
    Tool("servebench", "V4", servebench),
    Tool("frugal-llm", "V4", frugal),
)


def ours(server: ScriptedServer) -> list[Sample]:
    """The same by our own client."""
    table, (case,) = cases([STEADY], TOKENS)
    out = []
    for _ in range(REQUESTS):
        seen = ask(server, table, case, STEADY.name)
        out.append((seen.reply.t_ms["first_token"], replies.decode_ms_per_token(seen.reply) or 0.0))
    return out


def check(tools: Sequence[Tool] = TOOLS, rounds: int = ROUNDS) -> Iterator[Line]:
    """Two lines for each tool that is on the PATH, one for each that is not."""
    for tool in tools:
        program = shutil.which(tool.name)
        if program is None:
            yield missing(tool.step, "first token, ms a token", tool.name, tool.how)
            continue
        try:
            pairs = compared(tool, program, rounds)
        except (RuntimeError, OSError, ValueError, KeyError, IndexError, subprocess.TimeoutExpired) as e:
            yield Line(tool.step, "first token, ms a token", tool.name, n=0, note=f"it did not work: {e}"[:300], agrees=False)
            continue
        yield hold(tool.step, "first token", tool.name, [(a[0], b[0]) for a, b in pairs], TTFT)
        yield hold(tool.step, "ms a token", tool.name, [(a[1], b[1]) for a, b in pairs], DECODE)


def compared(tool: Tool, program: str, rounds: int) -> list[tuple[Sample, Sample]]:
    """(ours, the tool's) medians of each round; who goes first alternates, for what comes later may find a warmer machine."""
    pairs = []
    with ScriptedServer({STEADY.name: STEADY.script}) as server:
        for number in range(rounds):
            with tempfile.TemporaryDirectory(prefix="llm-daemon-bench-") as folder:
                theirs = partial(tool.run, program, server.base_url, Path(folder))
                if number % 2:
                    second = middle(theirs())
                    first = middle(ours(server))
                else:
                    first = middle(ours(server))
                    second = middle(theirs())
                pairs.append((first, second))
    return pairs


def middle(samples: Sequence[Sample]) -> Sample:
    """The medians of both sides."""
    first, rate = zip(*samples, strict=True)
    return statistics.median(first), statistics.median(rate)
