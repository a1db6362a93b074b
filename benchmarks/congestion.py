"""Five times more requests arrive than can be served: how soon does the newest speak, and does every request have an end?

An engine with two slots; arrivals by the clock (exponential gaps, the same on each way), at five times the rate that the
engine was just measured to serve.  When the last one has arrived - the keystroke that somebody now looks at - its time to
first token is taken, and all others hang up.  Three ways, in random order: through us in lane `interactive` (newest first),
through us in lane `regular` (oldest first), and straight to the engine, which queues by itself.  The longer the flood, the
worse oldest-first becomes: how long it was is in the table.
Then each way once more with nobody hanging up, and once with everything mixed - lanes, deadlines, supersede keys, hang-ups, a
short queue: each request must come to one end that it is told.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks import real
from benchmarks.lab import Effort, Load, engine_socket, fake_model, gateway_address, interleaved, load, request, world
from benchmarks.report import Grid, Row, Section, median

from llm_daemon import Lease, attach
from llm_daemon.engines.base import Missing

TIMES = 5.0  # more arrives than can be served, by this factor
SLOTS = 2
TOKENS = 4
SCENARIO: dict[str, object] = {"tokens": TOKENS, "token_ms": 5, "first_token_ms": 20, "silent": True}  # 40 ms a request
REAL_TOKENS = 12
PATIENCE = 90.0
SHORT_QUEUE = 20  # tickets that may wait, where everything is mixed
ROUTE = "/v1/chat/completions"
LANES = {"regular": "oldest first, ours", "direct": "engine alone", "interactive": "newest first, ours"}


@dataclass(slots=True)
class Place:
    """An engine behind our gateway, its socket past us, and who makes the load."""

    llm: Lease
    socket: str
    load: Load
    body: Mapping[str, object]

    def address(self, way: str) -> str | tuple[str, int]:
        return self.socket if way == "direct" else gateway_address(self.llm.base_url)

    def message(self, way: str, **headers: str) -> str:
        """One request; on our ways with its lane and other headers."""
        if way == "direct":
            return request(ROUTE, self.body).decode()
        return request(ROUTE, self.body, self.llm.api_key, {"X-LLM-Lane": way, **headers}).decode()

    def flood(self, way: str, times: list[float], stop: bool, messages: list[str] | None = None, **more: Any) -> dict[str, Any]:
        messages = messages or [self.message(way)] * len(times)
        order = {"messages": messages, "times": times, "leave": [None] * len(times), "patience": PATIENCE, "stop": stop, **more}
        return self.load.ask("flooded", address=self.address(way), **order)

    def settle(self, way: str) -> None:
        """Until one request for each slot was served: what others left behind in the engine's own queue is over then."""
        self.flood(way, [0.0] * SLOTS, stop=False)

    def service(self) -> float:
        """Seconds the engine alone takes for a request while its other slots are busy too."""
        took = []
        for _ in range(5):
            began = time.perf_counter()
            self.settle("direct")
            took.append(time.perf_counter() - began)
        return median(took[1:])


@contextmanager
def place(model: str, engine: str | None, body: Mapping[str, object], config: str = "") -> Iterator[Place]:
    """`model` "" is the scripted one."""
    with world() as here, ExitStack() as stack:
        here.config.write_text(config + here.config.read_text())
        llm = stack.enter_context(attach(model or fake_model(here, **SCENARIO), engine=engine, parallel=SLOTS))
        whole = {"model": llm.model, "stream": True, "messages": [{"role": "user", "content": "Tell me a story."}], **body}
        yield Place(llm, engine_socket(here), stack.enter_context(load()), whole)


def arrivals(service: float, seconds: float, seed: int) -> list[float]:
    """When each arrives, in seconds from the begin: TIMES the rate that SLOTS slots serve."""
    rng, gap = random.Random(seed), service / SLOTS / TIMES
    times = [0.0]
    while times[-1] < seconds or len(times) <= 2 * SLOTS:
        times.append(times[-1] + rng.expovariate(1 / gap))
    return times


def congestion(effort: Effort, out: Section, llama_server: str | None, model: str) -> None:
    """Fills the section; see the module."""
    with place("", None, {"max_tokens": TOKENS}) as it:
        newest("scripted engine", it, effort.flood, effort.floods, out)
    with place("", None, {"max_tokens": TOKENS}, f"queue_limit = {SHORT_QUEUE}\n") as it:
        mixed(it, effort.flood, out)
    where = real.engines(llama_server)["xllamacpp"]
    if isinstance(where, Missing) and not real.is_scripted(model):
        out.notes.append(f"real engine: not measured, {where.reason}")
        return
    engine = None if real.is_scripted(model) else "xllamacpp"
    with place(model, engine, {"max_tokens": REAL_TOKENS, "ignore_eos": True}) as it:
        newest("real engine", it, effort.flood * 1.25, max(1, effort.floods // 2), out)


def newest(title: str, it: Place, seconds: float, count: int, out: Section) -> None:
    """Rows on the newest's first token, and on the ends of all where nobody hangs up."""
    service = it.service()
    floods = [arrivals(service, seconds, seed) for seed in range(count)]
    late: list[float] = []
    turns = {way: iter(floods) for way in LANES}

    def first_token(way: str) -> float:
        found = it.flood(way, next(turns[way]), stop=True)
        last = found["requests"][-1]
        if last["first"] is None:
            raise RuntimeError(f"{title}, {way}: the newest has no token but {last['outcome']!r}")
        late.append(found["late"])
        it.settle(way)
        return float(last["first"] - last["sent"]) * 1e3

    found = interleaved({way: lambda way=way: first_token(way) for way in LANES}, count)  # type: ignore[misc]
    what = f"{title}: the newest's first token"
    new = found["interactive"]
    out.rows.append(Row.of(what, "ms", new, found["regular"], against="oldest first", target=0.1, judged="ratio"))
    out.rows.append(Row.of(what, "ms", new, found["direct"], against="engine alone"))
    grid = Grid(
        f"{title}: {len(floods[0])} requests in {floods[0][-1]:.2f} s, each takes {service * 1e3:.0f} ms", list(LANES.values())
    )
    grid.lines.append(("newest's first token, p50", "ms", {LANES[way]: median(times) for way, times in found.items()}))
    grid.lines.append(("newest's first token, worst", "ms", {LANES[way]: max(times) for way, times in found.items()}))
    ends = {way: it.flood(way, floods[0], stop=False)["requests"] for way in LANES}
    firsts = {LANES[way]: median(first_tokens(told)) for way, told in ends.items()}
    grid.lines.append(("everybody's first token, p50", "ms", firsts))
    out.grids.append(grid)
    counts = {way: Counter(one["outcome"] for one in told) for way, told in ends.items()}
    lost = sum(lost_of(counts[way]) for way in ("interactive", "regular"))
    total = 2 * len(floods[0])
    out.rows.append(
        Row(
            f"{title}: requests without an end",
            "",
            float(lost),
            total,
            None,
            float(lost_of(counts["direct"])),
            "engine alone",
            0.0,
        )
    )
    out.extra[title] = {"newest_ms": found, "service_ms": service * 1e3, "late_ms": max(late) * 1e3, "ends": counts}


def first_tokens(told: list[dict[str, Any]]) -> list[float]:
    """Milliseconds, of those that had one."""
    return [(one["first"] - one["sent"]) * 1e3 for one in told if one["first"] is not None] or [0.0]


def lost_of(ends: Mapping[str, int]) -> int:
    return sum(count for outcome, count in ends.items() if outcome.startswith("lost"))


def mixed(it: Place, seconds: float, out: Section) -> None:
    """Everything that may end a ticket, at once: served, shed, expired, superseded, hung up."""
    times, rng = arrivals(it.service(), seconds * 2, seed=7), random.Random(8)
    messages, leave = [], []
    for n in range(len(times)):
        headers = {"X-LLM-Deadline-Ms": "150"} if n % 3 == 0 else {"X-LLM-Supersede": f"editor-{n % 4}"} if n % 5 == 0 else {}
        messages.append(it.message(rng.choice(("interactive", "regular")), **headers))
        leave.append(rng.uniform(0, 0.2) if n % 7 == 0 else None)
    found = it.flood("interactive", times, stop=False, messages=messages, leave=leave)
    ends = Counter(one["outcome"] for one in found["requests"])
    out.rows.append(Row("all mixed, a short queue: requests without an end", "", float(lost_of(ends)), len(times), target=0.0))
    out.notes.append("All mixed: " + ", ".join(f"{count} {outcome}" for outcome, count in ends.most_common()))
    out.extra["mixed"] = ends
