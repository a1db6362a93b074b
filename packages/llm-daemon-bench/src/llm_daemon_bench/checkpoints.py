"""When each checkpoint of a case was reached, told after the stream from stamped pieces; nothing is judged while tokens arrive.

A reply grows piece by piece; a predicate is asked of each prefix.  `first`: the first prefix for which it holds; `settled`: the
first from which on it holds to the end.  One that was never reached is censored: kept, with the time until which we looked.
"""

from __future__ import annotations

import ast
import re
import warnings
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import partial_json
from .records import Check, Reached
from .suite import Case
from .suite_tables import Checkpoint, Predicate

_FENCE = re.compile(r"^[ \t]*```[^\n]*$", re.MULTILINE)
_CODE = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
# The end of a sentence and what may close it; then a space, or nothing at all once the reply is over.
_SENTENCE = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s)|[。！？]")
_LAST_SENTENCE = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|\Z)|[。！？]")


@dataclass(slots=True)
class Call:
    """A tool call as far as it came."""

    name: str = ""
    arguments: str = ""
    id: str = ""


@dataclass(slots=True)
class Piece:
    """What one event of the stream brought, `ms` after t0.  `tok`: tokens of the reply so far, None if unknown."""

    ms: float
    text: str = ""
    reasoning: str = ""
    calls: tuple[tuple[int, Call], ...] = ()  # (index of the call, what was added to it)
    tok: int | None = None
    finish: str | None = None


@dataclass(slots=True)
class View:
    """A reply so far.  `final`: nothing more comes.  `before`, `after`: the code around a completion."""

    text: str = ""
    calls: dict[int, Call] = field(default_factory=dict)
    tok: int | None = None
    finish: str | None = None
    final: bool = False
    before: str = ""
    after: str = ""
    schema: Mapping[str, Any] | None = None
    completion: bool = False

    def take(self, piece: Piece) -> None:
        self.text += piece.text
        for index, more in piece.calls:
            call = self.calls.setdefault(index, Call())
            call.name += more.name
            call.arguments += more.arguments
            call.id = more.id or call.id
        self.tok = piece.tok if piece.tok is not None else self.tok
        self.finish = piece.finish or self.finish

    def code(self) -> str:
        """The code in the reply: its first fenced block, else all of it; for a completion, with what stands around it."""
        if self.completion:
            return self.before + self.text + (self.after if self.final else "")
        fenced = _CODE.search(self.text)
        return fenced[1] if fenced else "" if _FENCE.search(self.text) else self.text


def lines(view: View) -> int:
    """Whole lines that are not blank; the last one is whole once the reply is over.

    >>> lines(View("a\\n\\nb")), lines(View("a\\n\\nb", final=True))
    (1, 2)
    """
    whole = view.text if view.final else view.text.rpartition("\n")[0]
    return sum(1 for line in whole.split("\n") if line.strip())


def sentences(view: View) -> int:
    """
    >>> sentences(View("It is 3.5 m. Not 4! Is")), sentences(View("Yes.")), sentences(View("Yes.", final=True))
    (2, 0, 1)
    """
    return len((_LAST_SENTENCE if view.final else _SENTENCE).findall(view.text))


def python_parses(view: View) -> bool:
    """Whether the code so far is whole lines of valid Python, and more than blanks.

    >>> python_parses(View("```python\\nx = 1\\n")), python_parses(View("x = ("))
    (True, False)
    >>> python_parses(View(" 1\\n", before="x =", completion=True))
    True
    """
    code = view.code()
    said = view.text if view.completion else code
    if not said.strip() or not (view.final or code.endswith("\n")):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a reply's code, say an odd escape
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def fence_closed(view: View) -> bool:
    """Whether a code block began and ended.

    >>> fence_closed(View("```\\nx\\n```")), fence_closed(View("```\\nx\\n``"))
    (True, False)
    """
    return len(_FENCE.findall(view.text)) >= 2


def json_path(view: View, path: str, equals: Any) -> bool:
    node = partial_json.find(partial_json.parse(view.text), path)
    return node is not None and node.complete and (equals is None or partial_json.plain(node) == equals)


def json_complete(text: str) -> bool:
    node = partial_json.parse(text)
    return node is not None and node.complete


def schema_valid(view: View) -> bool:
    node = partial_json.parse(view.text)
    if node is None or not node.complete or view.schema is None:
        return False
    import jsonschema

    return bool(jsonschema.validators.validator_for(view.schema)(view.schema).is_valid(partial_json.plain(node)))


def stopped(view: View, wanted: bool | str) -> bool:
    return view.finish is not None and (view.finish in ("stop", "tool_calls") if wanted is True else view.finish == wanted)


def predicate(p: Predicate) -> Callable[[View], bool]:
    """The question that a predicate asks of a reply so far (`event` is answered elsewhere)."""
    kind, value = p.kind, p.value
    table: dict[str, Callable[[View], bool]] = {
        "chars": lambda v: len(v.text) >= value,
        "tokens": lambda v: v.tok is not None and v.tok >= value,
        "lines": lambda v: lines(v) >= value,
        "sentences": lambda v: sentences(v) >= value,
        "contains": lambda v: value in v.text,
        "regex": lambda v: re.search(value, v.text) is not None,
        "code_block_closed": fence_closed,
        "python_parses": python_parses,
        "json_path": lambda v: json_path(v, value, p.equals),
        "json_complete": lambda v: json_complete(v.text),
        "schema_valid": schema_valid,
        "tool_name": lambda v: any(call.name == value for call in v.calls.values()),
        "tool_args_complete": lambda v: any(call.name and json_complete(call.arguments) for call in v.calls.values()),
        "stop": lambda v: stopped(v, value),
    }
    return table[kind]


def blank(case: Case) -> View:
    """A reply to this case before its first byte."""
    completion = case.table.kind != "chat"
    return View(before=str(case.turns[0]) if completion else "", after=case.suffix, schema=case.schema, completion=completion)


class Watch:
    """Whether every checkpoint of a turn has been reached: for `early_stop`, while the stream runs."""

    def __init__(self, case: Case, turn: int) -> None:
        points = [c for c in case.table.checkpoints if c.turn == turn]
        self._events = {str(c.value) for c in points if c.kind == "event"}
        self._left = [predicate(c) for c in points if c.kind != "event"]
        self._final = any(c.when == "settled" for c in points) or not points or bool(self._events & {"last_token", "done"})
        self._view = blank(case)

    def take(self, piece: Piece) -> bool:
        """True once nothing is left to wait for.  Never with a settled checkpoint: that needs the end."""
        self._view.take(piece)
        if self._final:
            return False
        if piece.text:
            self._events.clear()
        self._left = [asks for asks in self._left if not asks(self._view)]
        return not self._left and not self._events


def evaluate(
    case: Case, turn: int, pieces: Sequence[Piece], t_ms: Mapping[str, float], end_ms: float, whole: bool
) -> tuple[dict[str, Reached], View]:
    """Each checkpoint of this turn, and the reply at its end.

    `pieces` in order; `end_ms`: until when we looked; `whole`: the stream came to its own end, so its last line is a line.
    """
    points = [c for c in case.table.checkpoints if c.turn == turn]
    asked = [c for c in points if c.kind != "event"]
    held: dict[str, list[bool]] = {c.id: [] for c in asked}
    asks = {c.id: predicate(c) for c in asked}
    view = blank(case)
    last = len(pieces) - 1
    for i, piece in enumerate(pieces):
        view.take(piece)
        view.final = whole and i == last
        for point in asked:
            seen = held[point.id]
            # What is asked for the first time it holds need not be asked again.
            seen.append(True if point.when == "first" and seen and seen[-1] else asks[point.id](view))
    out: dict[str, Reached] = {}
    for point in points:
        if point.kind == "event":
            ms = t_ms.get(str(point.value))
            out[point.id] = Reached(ms=None, censored_ms=end_ms) if ms is None else Reached(ms=ms, tok=_tokens_at(pieces, ms))
        else:
            # Where the reply broke off nobody knows whether it would have held.
            known = held[point.id] if whole or point.when == "first" else []
            out[point.id] = _reached(point, known, pieces, end_ms)
    return out, view


def _reached(point: Checkpoint, held: list[bool], pieces: Sequence[Piece], end_ms: float) -> Reached:
    at: int | None = None
    if point.when == "first":
        at = held.index(True) if True in held else None
    elif held and held[-1]:
        at = len(held) - 1
        while at and held[at - 1]:
            at -= 1
    if at is None:
        return Reached(ms=None, censored_ms=end_ms)
    return Reached(ms=pieces[at].ms, tok=pieces[at].tok)


def _tokens_at(pieces: Sequence[Piece], ms: float) -> int | None:
    at = bisect_left([p.ms for p in pieces], ms)
    return pieces[at].tok if at < len(pieces) and pieces[at].ms == ms else 0 if at == 0 else pieces[at - 1].tok


def judge(case: Case, view: View) -> Check | None:
    """Whether the final text passes every `check` of the case; None if it has none."""
    if not case.checks:
        return None
    for check in case.checks:
        if check.python_test:
            from .sandbox import run_test

            why = run_test(view.code(), case.python_tests[check.python_test])
        else:
            why = "" if predicate(check)(view) else f"not so: {check}"
        if why:
            return Check(passed=False, why=why)
    return Check(passed=True)
