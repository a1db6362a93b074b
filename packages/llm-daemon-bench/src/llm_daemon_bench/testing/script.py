"""What the scripted server sends and when, and what that was in truth.  Pure: the server adds the clock.

A script becomes pieces (`plan`), each to be sent at its own time.  The server writes down when it really sent each of them,
and from that comes the truth of a request (`Truth`).  So a server that was late makes no error: it is believed, not its plan.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

WORDS = ("The", " quick", " brown", " fox", " jumps", " over", " the", " lazy", " dog", ".")
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nServer: scripted\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Script:
    """How one request is answered.  Times are milliseconds after the request was read whole.

    Token number i of thoughts, tool call and content, in this order, is made at `prefill_ms` + i x `token_ms`; a chunk leaves
    when its last token is made.  `tokens` of None means as many words as the request's `max_tokens` asks for.
    """

    tokens: tuple[str, ...] | None = WORDS
    thoughts: tuple[str, ...] = ()
    call: tuple[str, ...] = ()  # name of one tool, then the pieces of its arguments
    headers_ms: float = 0.0
    prefill_ms: float = 40.0
    token_ms: float = 5.0
    per_chunk: int = 1
    role_first: bool = False  # the role in a chunk of its own, as soon as the headers are out
    progress: int = 0  # llama.cpp's events of its progress through the prompt
    comments: bool = False  # one before each event, in the same piece
    line_end: str = "\n"
    cut: bool = False  # each event with text in two pieces, half a token's time apart, in the middle of a character if it can
    usage: bool = True
    cached: int = 0  # tokens of the prompt that were in the cache
    timings: bool = True  # llama.cpp's own report
    told_prompt_ms: float | None = None  # in it, instead of the truth
    stall_after: int | None = None  # tokens before a pause of `stall_ms`
    stall_ms: float = 0.0
    fail_after: int | None = None  # tokens before an error takes the place of the rest
    die_after: int | None = None  # tokens before the whole server dies
    end: str = "done"  # "done"; "close": whole, but without [DONE]; "torn": the connection ends in the middle
    status: int = 200  # another one: an error of that status, after `prefill_ms`

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Script:
        """Back from `to_json`."""
        lists = {name: tuple(value[name]) for name in ("tokens", "thoughts", "call") if value.get(name) is not None}
        return cls(**{**value, **lists})

    def to_json(self) -> dict[str, Any]:
        """Fit for `json.dumps`."""
        return asdict(self)


class Piece(NamedTuple):
    """Bytes that leave together.  What they show is told by the piece that makes an event whole, not by an earlier half."""

    at_ms: float
    data: bytes
    kind: str  # head, half, progress, role, token, finish, usage, error, done, end, die, refused
    text: str = ""  # content for the user
    thought: str = ""
    call: str = ""  # of a tool call: its name, or a piece of its arguments
    tokens: int = 0


class Token(NamedTuple):
    """One token: where it belongs, its text, and when it is made."""

    field: str  # text, thought or call
    says: str
    at_ms: float


def made(script: Script, asked: int) -> list[Token]:
    """All tokens of the answer to a request for at most `asked` of them."""
    content = script.tokens
    if content is None:
        content = tuple(WORDS[i % len(WORDS)] for i in range(asked))
    says = [("thought", t) for t in script.thoughts] + [("call", t) for t in script.call] + [("text", t) for t in content]
    pause = [script.stall_ms if script.stall_after is not None and i >= script.stall_after else 0.0 for i in range(len(says))]
    return [Token(field, t, script.prefill_ms + i * script.token_ms + pause[i]) for i, (field, t) in enumerate(says[:asked])]


def plan(script: Script, path: str, request: Mapping[str, Any]) -> list[Piece]:
    """The answer to a request in pieces, in the order of their times.

    >>> [(p.kind, p.at_ms) for p in plan(Script(tokens=("a", "b")), "/v1/chat/completions", {"stream": True})]
    [('head', 0.0), ('token', 40.0), ('token', 45.0), ('finish', 45.0), ('usage', 45.0), ('done', 45.0), ('end', 45.0)]
    """
    tokens = made(script, int(request.get("max_tokens") or request.get("n_predict") or 1024))
    words = Words(path, str(request.get("model", "scripted")))
    if script.status != 200:
        body = {"error": {"code": script.status, "message": "as the script wants", "type": "server_error"}}
        return [Piece(script.prefill_ms, whole(script.status, body), "refused")]
    total = Total(script, tokens, prompt_words(request))
    if not request.get("stream"):
        at = tokens[-1].at_ms if tokens else script.prefill_ms
        return [Piece(at, whole(200, words.complete(tokens, total)), "token", *shown(tokens))]
    each = script.timings and bool(request.get("timings_per_token"))
    return list(Stream(script, tokens, words, total, each).pieces())


def prompt_words(request: Mapping[str, Any]) -> int:
    """A prompt's size as this server counts it: words, wherever they stand."""
    said = [request.get("prompt", ""), request.get("input_prefix", ""), request.get("input_suffix", "")]
    said += [m.get("content") for m in request.get("messages", [])]
    return sum(len(json.dumps(s).split()) for s in said if s)


def shown(tokens: list[Token]) -> tuple[str, str, str, int]:
    """(text, thought, call, count): the last fields of a piece."""
    text, thought, call = ("".join(t.says for t in tokens if t.field == field) for field in ("text", "thought", "call"))
    return text, thought, call, len(tokens)


def whole(status: int, body: object) -> bytes:
    """A response that is no stream."""
    data = json.dumps(body).encode()
    return b"HTTP/1.1 %d Scripted\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (status, len(data), data)


@dataclass(frozen=True, slots=True)
class Total:
    """What the server says of its own work, at the end."""

    script: Script
    tokens: list[Token]
    prompt: int

    def usage(self) -> dict[str, Any]:
        """As OpenAI's API has it."""
        count = len(self.tokens)
        said = {"prompt_tokens": self.prompt, "completion_tokens": count, "total_tokens": self.prompt + count}
        return {**said, "prompt_tokens_details": {"cached_tokens": self.script.cached}}

    def timings(self) -> dict[str, float]:
        """As llama.cpp has it: the clock of decoding starts at the first token, which prefill gives for free."""
        first, last = self.script.prefill_ms, self.tokens[-1].at_ms if self.tokens else self.script.prefill_ms
        fresh = self.prompt - self.script.cached
        told = first if self.script.told_prompt_ms is None else self.script.told_prompt_ms
        said = {"cache_n": self.script.cached, "prompt_n": fresh, "prompt_ms": told}
        return {**said, "predicted_n": len(self.tokens), "predicted_ms": last - first}


class Words:
    """How the three families of routes spell things: chat, plain completion, and llama.cpp's own (`/completion`, `/infill`)."""

    def __init__(self, path: str, model: str) -> None:
        self.chat, self.native = path == "/v1/chat/completions", not path.startswith("/v1/")
        kind = "chat.completion" if self.chat else "text_completion"
        self.head = {"id": "scripted-1", "created": 1700000000, "model": model, "object": kind}

    def event(self, choice: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """One chunk with one choice."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": [{"index": 0, "finish_reason": None, **choice}], **more}

    def delta(self, field: str, says: str, first: bool) -> dict[str, Any]:
        """A chunk with tokens of one field; `first` of a tool call is its name."""
        if self.native:
            return {"index": 0, "content": says, "stop": False}
        if not self.chat:
            return self.event({"text": says})
        if field == "call":
            function = {"name": says, "arguments": ""} if first else {"arguments": says}
            start = {"id": "call_1", "type": "function"} if first else {}
            return self.event({"delta": {"tool_calls": [{"index": 0, **start, "function": function}]}})
        return self.event({"delta": {"reasoning_content" if field == "thought" else "content": says}})

    def finish(self, reason: str) -> dict[str, Any]:
        """The chunk that says why it ends."""
        return self.event({"finish_reason": reason, **({"delta": {}} if self.chat else {"text": ""})})

    def complete(self, tokens: list[Token], total: Total) -> dict[str, Any]:
        """The whole answer in one object."""
        text, thought, call, count = shown(tokens)
        if self.native:
            return {"content": text, "stop": True, "tokens_predicted": count, "timings": total.timings()}
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if thought:
            message["reasoning_content"] = thought
        if call:
            name, *pieces = (t.says for t in tokens if t.field == "call")
            function = {"name": name, "arguments": "".join(pieces)}
            message["tool_calls"] = [{"id": "call_1", "type": "function", "function": function}]
        choice = {"index": 0, "finish_reason": "stop", **({"message": message} if self.chat else {"text": text})}
        return {**self.head, "choices": [choice], "usage": total.usage(), "timings": total.timings()}


@dataclass(slots=True)
class Stream:
    """Makes the pieces of one streamed answer."""

    script: Script
    tokens: list[Token]
    words: Words
    total: Total
    each: bool = False  # llama.cpp's timings with each chunk

    def pieces(self) -> Iterator[Piece]:
        """All of them, in the order of their times."""
        script = self.script
        yield Piece(script.headers_ms, STREAM_HEAD, "head")
        if script.role_first:
            role = self.words.event({"delta": {"role": "assistant", "content": None}})
            yield from self.event(script.headers_ms, role, "role")
        for i in range(script.progress):
            yield from self.progress(i)
        at, gone = script.prefill_ms, 0
        for chunk in self.chunks():
            at = chunk[-1].at_ms
            if script.fail_after is not None and gone >= script.fail_after:
                error = {"code": 500, "message": "as the script wants", "type": "server_error"}
                yield from self.event(at, {"error": error}, "error")
                yield Piece(at, b"0\r\n\r\n", "end")
                return
            if script.die_after is not None and gone >= script.die_after:
                yield Piece(at, b"", "die")
            yield from self.chunk(chunk, gone)
            gone += len(chunk)
        yield from self.ending(at)

    def chunks(self) -> Iterator[list[Token]]:
        """Tokens that leave together: as many as the script says, but of one field, and the name of a call by itself."""
        now: list[Token] = []
        for token in self.tokens:
            if now and (len(now) == self.script.per_chunk or token.field != now[0].field or now[0].field == "call"):
                yield now
                now = []
            now.append(token)
        if now:
            yield now

    def progress(self, number: int) -> Iterator[Piece]:
        """One event of progress; they are spread evenly over the prefill."""
        script = self.script
        part = number / script.progress
        at = script.headers_ms + part * (script.prefill_ms - script.headers_ms)
        done = {
            "total": self.total.prompt,
            "cache": script.cached,
            "processed": int(part * self.total.prompt),
            "time_ms": int(at),
        }
        yield from self.event(at, self.words.event({"delta": {}}, prompt_progress=done), "progress")

    def chunk(self, tokens: list[Token], gone: int) -> Iterator[Piece]:
        """One chunk of tokens, after so many others: an event, or two halves of it."""
        field, at = tokens[0].field, tokens[-1].at_ms
        first = field == "call" and tokens[0] == next(t for t in self.tokens if t.field == "call")
        event = self.words.delta(field, "".join(t.says for t in tokens), first)
        if self.each:
            event["timings"] = {**self.total.timings(), "predicted_n": gone + len(tokens)}
        raw = self.raw(event)
        if self.script.cut:
            spot = next((i + 1 for i, byte in enumerate(raw) if byte >= 0xC0), len(raw) // 2)
            yield Piece(at - self.script.token_ms / 2, chunked(raw[:spot]), "half")
            raw = raw[spot:]
        yield Piece(at, chunked(raw), "token", *shown(tokens))

    def ending(self, at: float) -> Iterator[Piece]:
        """Whatever follows the last token."""
        script = self.script
        if script.end == "torn":
            yield Piece(at, b"", "end")
            return
        reason = "tool_calls" if script.call else "stop"
        if self.words.native:
            last = {"content": "", "stop": True, "tokens_predicted": len(self.tokens), "timings": self.total.timings()}
            yield from self.event(at, last, "finish")
        else:
            yield from self.event(at, self.words.finish(reason), "finish")
            if script.usage or script.timings:
                said = {**self.words.head, "object": self.words.finish(reason)["object"], "choices": []}
                said |= {"usage": self.total.usage()} if script.usage else {}
                said |= {"timings": self.total.timings()} if script.timings else {}
                yield from self.event(at, said, "usage")
            if script.end == "done":
                yield from self.event(at, "[DONE]", "done")
        yield Piece(at, b"0\r\n\r\n", "end")

    def event(self, at: float, value: object, kind: str) -> Iterator[Piece]:
        """An event by itself."""
        yield Piece(at, chunked(self.raw(value)), kind)

    def raw(self, value: object) -> bytes:
        """The bytes of an event, after a comment if the script wants some."""
        end = self.script.line_end
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        comment = f": still here{end}{end}" if self.script.comments else ""
        return f"{comment}data: {text}{end}{end}".encode()


def chunked(data: bytes) -> bytes:
    """One chunk of HTTP/1.1's chunked coding (RFC 9112, 7.1)."""
    return b"%x\r\n%s\r\n" % (len(data), data)


class Sent(NamedTuple):
    """A piece that was sent, and the stamp taken just before: nanoseconds of `time.perf_counter_ns`."""

    at_ns: int
    kind: str
    text: str
    thought: str
    call: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Truth:
    """What was really sent for one request.  Stamps are those of Linux's monotonic clock, the same in each process."""

    read_ns: int  # when the request had been read whole
    sent: tuple[Sent, ...]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Truth:
        """From what the server's process wrote."""
        return cls(value["read_ns"], tuple(Sent(*s) for s in value["sent"]))

    def first(self, wanted: Callable[[Sent], bool]) -> int | None:
        """Stamp of the first piece that `wanted` agrees to."""
        return next((s.at_ns for s in self.sent if wanted(s)), None)

    def events(self) -> dict[str, int]:
        """Stamps of the events of a request under the names that the benchmark uses; one that never came is missing."""
        found = {
            "headers": self.first(lambda s: s.kind in ("head", "refused")),
            "first_event": self.first(lambda s: s.kind not in ("head", "half", "end", "refused")),
            "first_token": self.first(lambda s: s.tokens > 0),
            "first_content": self.first(lambda s: bool(s.text)),
            "last_token": max((s.at_ns for s in self.sent if s.tokens), default=None),
            "done": self.first(lambda s: s.kind == "end") if self.whole else None,
        }
        return {name: at for name, at in found.items() if at is not None}

    def reached(self, holds: Callable[[str], bool]) -> int | None:
        """Stamp of the piece after which `holds` is true of the text so far."""
        text = ""
        for piece in self.sent:
            text += piece.text
            if piece.text and holds(text):
                return piece.at_ns
        return None

    @property
    def whole(self) -> bool:
        """Whether the stream came to its end and said why."""
        return any(s.kind == "finish" for s in self.sent) and self.sent[-1].kind == "end"

    @property
    def steps(self) -> int:
        """Tokens after those of the first chunk that has any."""
        return sum([s.tokens for s in self.sent if s.tokens][1:])

    @property
    def ms_per_token(self) -> float | None:
        """From the first chunk with tokens to the last; None if there is but one."""
        at = [s.at_ns for s in self.sent if s.tokens]
        return (at[-1] - at[0]) / 1e6 / self.steps if self.steps else None

    @property
    def tokens(self) -> int:
        """How many left, thoughts and calls included."""
        return sum(s.tokens for s in self.sent)

    @property
    def text(self) -> str:
        """All content."""
        return "".join(s.text for s in self.sent)
