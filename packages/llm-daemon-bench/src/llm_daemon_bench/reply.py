"""What a stream said: its events taken apart after it ended, each with the time at which it was read.

Formats: OpenAI's chat and completion chunks; llama.cpp's own `/completion` and `/infill` (tools/server/README.md).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from llm_daemon.core.sse import Splitter
from llm_daemon.errors import RemoteProtocolError

from .checkpoints import Call, Piece, View
from .client import Raw
from .records import Gaps, ServerTimes, Tokens

# llama.cpp has sent errors under a field name of their own, which is no field of an event stream.
_ERROR_LINE = re.compile(rb"(?:^|\n)error: *(\{.*)")


@dataclass(slots=True)
class Reply:
    """A stream taken apart.  `t_ms`: see records.EVENTS.  `progress`: (ms, what the server said of its prompt processing)."""

    pieces: list[Piece] = field(default_factory=list)
    t_ms: dict[str, float] = field(default_factory=dict)
    progress: list[tuple[float, Any]] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, Any] = field(default_factory=dict)
    finish: str | None = None
    done: bool = False
    error: str | None = None

    @property
    def said(self) -> list[Piece]:
        """The pieces with something in them: text, reasoning or part of a tool call."""
        return [p for p in self.pieces if _says(p)]


def _says(piece: Piece) -> bool:
    return bool(piece.text or piece.reasoning or piece.calls)


class Parser:
    """Bytes in, pieces out; `finish` has the whole."""

    def __init__(self) -> None:
        self.reply = Reply()
        self._splitter = Splitter()

    def feed(self, ms: float, data: bytes) -> list[Piece]:
        """The pieces that `data`, read at `ms`, completed."""
        reply, before = self.reply, len(self.reply.pieces)
        try:
            events = self._splitter.feed(data)
        except RemoteProtocolError as e:
            reply.error = reply.error or e.message
            return []
        for event in events:
            reply.t_ms.setdefault("first_event", ms)
            if event.data.strip() == b"[DONE]":
                reply.done = True
                continue
            try:
                found = json.loads(event.data)
            except ValueError:
                found = None
            if isinstance(found, dict):
                self._take(ms, found)
            else:
                reply.error = reply.error or f"not JSON: {event.data[:80]!r}"
        return reply.pieces[before:]

    def _take(self, ms: float, event: dict[str, Any]) -> None:
        reply = self.reply
        if told := event.get("error"):
            reply.error = reply.error or _told(told)
            return
        if isinstance(usage := event.get("usage"), dict):
            reply.usage = usage
        if isinstance(timings := event.get("timings"), dict):
            reply.timings = timings
        if isinstance(n := event.get("tokens_predicted"), int) and event.get("stop"):  # llama.cpp's own form of a last event
            reply.timings = {"predicted_n": n, **reply.timings}
        if progress := event.get("prompt_progress"):
            reply.progress.append((ms, progress))
        piece = _piece(ms, event)
        if piece is None:
            return
        if (n := reply.timings.get("predicted_n")) is not None and "timings" in event and _says(piece):
            piece.tok = int(n)
        if _says(piece):
            reply.t_ms.setdefault("first_token", ms)
            if piece.text:
                reply.t_ms.setdefault("first_content", ms)
            reply.t_ms["last_token"] = ms
        reply.finish = piece.finish or reply.finish
        reply.pieces.append(piece)


def _piece(ms: float, event: dict[str, Any]) -> Piece | None:
    choices = event.get("choices")
    if isinstance(choices, list):
        if not choices or not isinstance(choices[0], dict):
            return None
        choice = choices[0]
        delta = choice.get("delta")
        delta = delta if isinstance(delta, dict) else {}
        piece = Piece(
            ms,
            text=delta.get("content") or choice.get("text") or "",
            reasoning=delta.get("reasoning_content") or delta.get("reasoning") or "",
            calls=tuple(_calls(delta.get("tool_calls"))),
            finish=choice.get("finish_reason"),
        )
    elif "content" in event:
        stop = event.get("stop_type") or event.get("stop")
        native = {"eos": "stop", "word": "stop", "limit": "length", True: "stop"}
        piece = Piece(ms, text=event["content"] or "", finish=native.get(stop))
    else:
        return None
    return piece if _says(piece) or piece.finish else None


def _calls(found: Any) -> list[tuple[int, Call]]:
    out = []
    for n, call in enumerate(found if isinstance(found, list) else ()):
        function = call.get("function") or {}
        out.append(
            (call.get("index", n), Call(function.get("name") or "", function.get("arguments") or "", call.get("id") or ""))
        )
    return out


def _told(error: Any) -> str:
    text = str(error.get("message") or error) if isinstance(error, dict) else str(error)
    return text.splitlines()[0][:300] if text else "an error without words"


def parse(raw: Raw) -> Reply:
    """The reply in a stream.  `error` is the server's own, or says what was wrong with the stream."""
    parser = Parser()
    for ms, data in raw.chunks:
        parser.feed(ms, data)
    reply = parser.reply
    if raw.headers_ms is not None:
        reply.t_ms["headers"] = raw.headers_ms
    if raw.chunks or raw.status:
        reply.t_ms["connect"] = raw.connect_ms
    if reply.error is None and not reply.done:
        for _, data in raw.chunks:
            if b"error: " in data and (line := _ERROR_LINE.search(data)):
                reply.error = _told(_loads(line[1]))
    ended = reply.finish is not None or reply.done
    if raw.finish == "done" and reply.error is None and not ended:
        reply.error = "the stream ended without a finish reason" if reply.pieces else "the answer was no event stream, or empty"
    if raw.finish == "done" and ended:
        reply.t_ms["done"] = raw.end_ms
    _count(reply)
    return reply


def _loads(data: bytes) -> Any:
    try:
        found = json.loads(data)
    except ValueError:
        return data.decode(errors="replace")
    return found.get("error", found) if isinstance(found, dict) else found


def _count(reply: Reply) -> None:
    """Tokens at each piece: exact where the server tells them with each, else shared out evenly over the pieces with text."""
    said = reply.said
    if all(p.tok is not None for p in said):
        if reply.pieces and said:
            for piece in reply.pieces:
                piece.tok = piece.tok if piece.tok is not None else said[-1].tok
        return
    out = _out(reply)
    if out is None:
        n = 0
        for piece in reply.pieces:
            n += _says(piece)
            piece.tok = n
        return
    whole = _with_text(out, len(said))
    n = 0
    for piece in reply.pieces:
        n += _says(piece)
        piece.tok = round(whole * n / len(said)) if said else 0


def _out(reply: Reply) -> int | None:
    n = reply.usage.get("completion_tokens", reply.timings.get("predicted_n"))
    return n if isinstance(n, int) else None


def _with_text(out: int, chunks: int) -> int:
    """Tokens that brought text: a token that ends the reply is counted by servers and seen by nobody."""
    return chunks if out == chunks + 1 else out


def name_of(reply: Reply) -> str:
    """Sixteen hex digits, the same for two replies that say the same: reasoning, text, and tool calls without their ids.

    How the text was cut into chunks makes no difference.

    >>> a, b = Reply([Piece(0, "yes")]), Reply([Piece(1, "y"), Piece(2, "es")])
    >>> name_of(a) == name_of(b), name_of(a) == name_of(Reply([Piece(0, "no")])), len(name_of(Reply()))
    (True, False, 16)
    """
    view = View()
    for piece in reply.pieces:
        view.take(piece)
    calls = [(call.name, call.arguments) for _, call in sorted(view.calls.items())]
    said = ["".join(p.reasoning for p in reply.pieces), view.text, calls]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def tokens(reply: Reply) -> Tokens:
    """Counts, from the best source there is."""
    usage, timings = reply.usage, reply.timings
    said = reply.said
    details = usage.get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens", timings.get("cache_n"))
    prompt = usage.get("prompt_tokens")
    if prompt is None and timings.get("prompt_n") is not None:
        prompt = timings["prompt_n"] + (timings.get("cache_n") or 0)
    out = _out(reply)
    source: Any = "usage" if "completion_tokens" in usage else "timings" if out is not None else "chunks" if said else "none"
    return Tokens(
        prompt=prompt, cached=cached, out=out if out is not None else len(said) or None, first=said[0].tok if said else None,
        source=source,
    )  # fmt: skip


def server_times(reply: Reply) -> ServerTimes:
    return ServerTimes(prompt=_number(reply.timings.get("prompt_ms")), decode=_number(reply.timings.get("predicted_ms")))


def _number(value: Any) -> float | None:
    return round(float(value), 3) if isinstance(value, (int, float)) else None


def decode_ms_per_token(reply: Reply) -> float | None:
    """(last_token - first_token) / tokens between them, by the counts at those two pieces; None for fewer than two."""
    said = reply.said
    if len(said) < 2 or said[0].tok is None or said[-1].tok is None or said[-1].tok <= said[0].tok:
        return None
    return (said[-1].ms - said[0].ms) / (said[-1].tok - said[0].tok)


def gaps(pieces: Sequence[Piece]) -> Gaps | None:
    """Of the times between pieces with text.

    >>> gaps([Piece(0.0), Piece(1.0), Piece(4.0)])
    Gaps(n=2, p50=2.0, p99=3.0, max=3.0)
    """
    between = sorted(b.ms - a.ms for a, b in pairwise(pieces))
    if not between:
        return None
    rank = -(-99 * len(between) // 100) - 1  # nearest rank
    return Gaps(n=len(between), p50=round(median(between), 3), p99=round(between[rank], 3), max=round(between[-1], 3))
