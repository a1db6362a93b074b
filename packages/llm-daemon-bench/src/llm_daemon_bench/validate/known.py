"""V0: a scripted server of known times, in a process of its own.  What it really sent, and when, is the truth."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..testing.script import Script
from .agreement import Bound

STEP = "V0"
BOUND = Bound(absolute=1.0, part=0.01)
REPEATS = 5
ANSWER = (
    "It", " was", " a", " Tuesday", ".", " The", " ship", " came", " in", " on", " 14", " March", ";", " see", " [", "3", "].",
    " Nobody", " had", " seen", " it", " before", ".",
)  # fmt: skip
WIDE = ("A", " 한", "국", "어", " é", "té", " 🦉", ".", " done")
CODE = (
    "    total",
    " =",
    " 0",
    "\n",
    "    for",
    " x",
    " in",
    " xs",
    ":",
    "\n",
    "        total",
    " +=",
    " x",
    "\n",
    "    return",
    " total",
    "\n",
)
JSON = ("{", '"total"', ":", " 12", ".5", ",", ' "name"', ":", ' "Ada"', "}", "\n")

Holds = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Known:
    """One script and what is asked of it.  `checkpoints`: as a suite has them, with a plain test that says the same."""

    name: str
    script: Script
    kind: str = "chat"
    checkpoints: tuple[tuple[Mapping[str, Any], Holds], ...] = ()


@dataclass(frozen=True, slots=True)
class Seen:
    """What our client made of one request.  `events` and `checkpoints` are stamps in nanoseconds of the shared clock."""

    t0_ns: int
    events: Mapping[str, int]
    checkpoints: Mapping[str, int | None] = field(default_factory=dict)
    tokens: int | None = None
    cached: int | None = None
    ms_per_token: float | None = None
    text: str = ""
    finish: str | None = None
    error: str | None = None


def has(text: str) -> Holds:
    return lambda said: text in said


PLAIN = (
    ({"id": "contains", "contains": "14 March"}, has("14 March")),
    ({"id": "regex", "regex": r"\[\d+\]"}, lambda said: re.search(r"\[\d+\]", said) is not None),
    ({"id": "chars", "chars": 30}, lambda said: len(said) >= 30),
    ({"id": "sentence", "sentences": 1}, has("Tuesday. ")),
    ({"id": "never", "contains": "Wednesday"}, has("Wednesday")),
)  # fmt: skip

KNOWN = (
    Known("plain", Script(ANSWER), checkpoints=PLAIN),
    Known("role at once, slow prompt", Script(ANSWER, role_first=True, prefill_ms=250)),
    Known("progress events", Script(ANSWER, role_first=True, progress=6, prefill_ms=150)),
    Known("late headers", Script(ANSWER, headers_ms=60, prefill_ms=100)),
    Known("four tokens a chunk", Script(ANSWER, per_chunk=4, token_ms=8), checkpoints=PLAIN),
    Known("comments and CRLF", Script(ANSWER, comments=True, line_end="\r\n"), checkpoints=PLAIN),
    Known("characters cut in two", Script(WIDE, cut=True, token_ms=12),
          checkpoints=(({"id": "wide", "contains": "한국"}, has("한국")), ({"id": "owl", "contains": "🦉"}, has("🦉")))),
    Known("reasoning first", Script(ANSWER, thoughts=(" Let", " me", " see", ": Tuesday", ".")), checkpoints=PLAIN),
    Known("a tool call in pieces", Script((), call=("find_ship", '{"na', 'me": "', "Petrel", '"}'))),
    Known("no usage, no timings", Script(ANSWER, usage=False, timings=False)),
    Known("usage alone", Script(ANSWER, timings=False)),
    Known("part of the prompt cached", Script(ANSWER, cached=3)),
    Known("stall in the middle", Script(ANSWER, stall_after=12, stall_ms=300), checkpoints=PLAIN),
    Known("error in the middle", Script(ANSWER, fail_after=6)),
    Known("connection torn", Script(ANSWER[:8], end="torn")),
    Known("no [DONE]", Script(ANSWER, end="close")),
    Known("refused", Script(ANSWER, status=503)),
    Known("plain completion", Script(CODE), "completion",
          (({"id": "line", "lines": 1}, has("\n")), ({"id": "returns", "regex": r"return\s+\w+"}, has("return total")))),
    Known("JSON", Script(JSON),
          checkpoints=(({"id": "open", "contains": "{"}, has("{")), ({"id": "complete", "json_complete": True}, has("}")))),
    Known("a long one", Script(None, token_ms=2, prefill_ms=20)),
)  # fmt: skip
