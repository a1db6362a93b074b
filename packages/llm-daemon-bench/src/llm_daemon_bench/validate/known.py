"""V0: a scripted server of known times, in a process of its own.  What it really sent, and when, is the truth."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import checkpoints, reply as replies, suite as suites
from ..client import Endpoint, Raw, stream
from ..records import Reached
from ..requests import Conversation
from ..suite_tables import ServerTable
from ..testing.script import Script, Truth
from ..testing.scripted import ScriptedServer
from .agreement import Bound, Line, equal, hold

STEP = "V0"
BOUND = Bound(absolute=1.0, part=0.01)
REPEATS = 7
ANSWER = (
    "It", " was", " a", " Tuesday", ".", " The", " ship", " came", " in", " on", " 14", " March", ";", " see", " [", "3", "].",
    " Nobody", " had", " seen", " it", " before", ".",
)  # fmt: skip
WIDE = ("A", " 한", "국", "어", " é", "té", " 🦉", ".", " done")
CODE = (
    "    total", " =", " 0", "\n", "    for", " x", " in", " xs", ":", "\n", "        total", " +=", " x", "\n",
    "    return", " total", "\n",
)  # fmt: skip
JSON = ("{", '"total"', ":", " 12", ".5", ",", ' "name"', ":", ' "Ada"', "}", "\n")

Holds = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Known:
    """One script and what is asked of it.  `points`: checkpoints as a suite has them, each with a plain test that says it too."""

    name: str
    script: Script
    kind: str = "chat"
    points: Mapping[str, Holds] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Seen:
    """What our client made of one request."""

    raw: Raw
    reply: replies.Reply
    reached: Mapping[str, Reached]
    text: str

    def at(self, ms: float) -> float:
        """Milliseconds of the shared clock, from milliseconds after t0."""
        return self.raw.t0_ns / 1e6 + ms


def has(text: str) -> Holds:
    """Whether a text is there."""
    return lambda said: text in said


PLAIN: dict[str, Holds] = {
    'contains = "14 March"': has("14 March"),
    r"regex = '\[\d+\]'": lambda said: re.search(r"\[\d+\]", said) is not None,
    "chars = 30": lambda said: len(said) >= 30,
    "sentences = 1": has("Tuesday. "),
    'contains = "Wednesday"': has("Wednesday"),  # never
}
WIDER: dict[str, Holds] = {'contains = "한국"': has("한국"), 'contains = "🦉"': has("🦉")}
CODED: dict[str, Holds] = {"lines = 1": has("\n"), r"regex = 'return\s+\w+'": has("return total")}
FORMED: dict[str, Holds] = {'contains = "{"': has("{"), "json_path = '$.total'": has("12.5,"), "json_complete = true": has("}")}

KNOWN = (
    Known("plain", Script(ANSWER), points=PLAIN),
    Known("role at once, slow prompt", Script(ANSWER, role_first=True, prefill_ms=250)),
    Known("progress events", Script(ANSWER, role_first=True, progress=6, prefill_ms=150)),
    Known("late headers", Script(ANSWER, headers_ms=60, prefill_ms=100)),
    Known("four tokens a chunk", Script(ANSWER, per_chunk=4, token_ms=8), points=PLAIN),
    Known("comments and CRLF", Script(ANSWER, comments=True, line_end="\r\n"), points=PLAIN),
    Known("characters cut in two", Script(WIDE, cut=True, token_ms=12), points=WIDER),
    Known("reasoning first", Script(ANSWER, thoughts=(" Let", " me", " see", ": Tuesday", ".")), points=PLAIN),
    Known("a tool call in pieces", Script((), call=("find_ship", '{"na', 'me": "', "Petrel", '"}'))),
    Known("no usage, no timings", Script(ANSWER, usage=False, timings=False)),
    Known("usage alone", Script(ANSWER, timings=False)),
    Known("part of the prompt cached", Script(ANSWER, cached=3)),
    Known("stall in the middle", Script(ANSWER, stall_after=12, stall_ms=300), points=PLAIN),
    Known("error in the middle", Script(ANSWER, fail_after=6)),
    Known("connection torn", Script(ANSWER[:8], end="torn")),
    Known("no [DONE]", Script(ANSWER, end="close")),
    Known("refused", Script(ANSWER, status=503)),
    Known("plain completion", Script(CODE), "completion", CODED),
    Known("JSON", Script(JSON), points=FORMED),
    Known("a hundred tokens", Script(None, token_ms=2, prefill_ms=20)),
)


def cases(known: Sequence[Known], max_tokens: int = 100) -> tuple[ServerTable, list[suites.Case]]:
    """The suite that asks for these scripts, read as any suite is."""
    parts = ['[suite]\nname = "known"\n[[server]]\nid = "s"\nattach = "http://127.0.0.1"\ntimings = "llamacpp"\n']
    for i, one in enumerate(known):
        points = ", ".join(f'{{ id = "c{n}", {point} }}' for n, point in enumerate(one.points))
        parts.append(
            f'[[case]]\nid = "c{i}"\nkind = "{one.kind}"\nprompt = "So, when was it?"\nmax_tokens = {max_tokens}\n'
            f"checkpoints = [{points}]\n"
        )
    suite = suites.parse("".join(parts), Path("known.toml"))
    return suite.targets[0].server, list(suite.cases)


def ask(server: ScriptedServer, table: ServerTable, case: suites.Case, model: str) -> Seen:
    """One request, by the same path as a trial's."""
    path, body = Conversation(case, table, model).next(1)
    raw = stream(Endpoint.of(server.base_url), path, body, stall_s=30)
    reply = replies.parse(raw)
    reached, view = checkpoints.evaluate(case, 1, reply.pieces, reply.t_ms, raw.end_ms, raw.finish == "done")
    return Seen(raw, reply, reached, view.text)


def check(known: Sequence[Known] = KNOWN, repeats: int = REPEATS) -> list[Line]:
    """Asks for each script some times, in turns, and holds what we saw against what was sent."""
    seen: dict[str, list[Seen]] = {k.name: [] for k in known}
    told: dict[str, list[Truth]] = {k.name: [] for k in known}
    table, asked = cases(known)
    with ScriptedServer({k.name: k.script for k in known}) as server:
        for _ in range(repeats):
            for one, case in zip(known, asked, strict=True):
                seen[one.name].append(ask(server, table, case, one.name))
                told[one.name].append(server.truths()[-1])
    return [line for one in known for line in compare(one, seen[one.name], told[one.name])]


def compare(known: Known, seen: Sequence[Seen], truths: Sequence[Truth]) -> Iterator[Line]:
    """The lines of one script: its events, its checkpoints, its counts."""
    both = list(zip(seen, truths, strict=True))
    ours = [{name: s.at(ms) for name, ms in s.reply.t_ms.items() if name != "connect"} for s in seen]
    true = [{name: ns / 1e6 for name, ns in t.events().items()} for t in truths]
    yield equal(STEP, f"{known.name}: events", "truth", map(sorted, ours), map(sorted, true))
    for name in true[0]:
        yield since_t0(f"{known.name}: {name}", seen, [o.get(name) for o in ours], [t.get(name) for t in true])
    for n, (point, holds) in enumerate(known.points.items()):
        mine = [None if (ms := s.reached[f"c{n}"].ms) is None else s.at(ms) for s in seen]
        there = [None if (ns := t.reached(holds)) is None else ns / 1e6 for t in truths]
        yield since_t0(f"{known.name}: {point}", seen, mine, there)
    rates = [(m, t.ms_per_token, t.steps) for s, t in both if (m := replies.decode_ms_per_token(s.reply)) is not None]
    if pairs := [(m * steps, t * steps) for m, t, steps in rates if t is not None]:
        yield hold(STEP, f"{known.name}: ms a token, times tokens", "truth", pairs, BOUND)
    yield equal(STEP, f"{known.name}: text", "truth", (s.text for s in seen), (t.text for t in truths))
    yield equal(
        STEP, f"{known.name}: tokens", "truth", (replies.tokens(s.reply).out or 0 for s in seen), (t.tokens for t in truths)
    )
    failed = [s.raw.error is not None or s.reply.error is not None for s in seen]
    yield equal(STEP, f"{known.name}: failure is told", "truth", failed, (not t.whole for t in truths))
    if known.script.usage and not any(failed):
        cached = (replies.tokens(s.reply).cached for s in seen)
        yield equal(STEP, f"{known.name}: cached tokens", "truth", cached, [known.script.cached] * len(seen))


def since_t0(what: str, seen: Sequence[Seen], ours: Sequence[float | None], true: Sequence[float | None]) -> Line:
    """Compares times after t0: both sides count from the same instant, which is on the clock they share."""
    if any((o is None) != (t is None) for o, t in zip(ours, true, strict=True)) or None in true:
        return equal(STEP, what, "truth", [o is not None for o in ours], [t is not None for t in true])
    starts = [s.at(0) for s in seen]
    pairs = [(o - s, t - s) for o, t, s in zip(ours, true, starts, strict=True) if o is not None and t is not None]
    return hold(STEP, what, "truth", pairs, BOUND, quantile=0.25)
