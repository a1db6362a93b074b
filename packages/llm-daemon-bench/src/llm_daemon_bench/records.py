"""The lines and values of which results are made: trials, launches, sessions.  `results` reads and writes them.

All durations are milliseconds unless a name says otherwise; `*_mib` is 2**20 bytes.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

SCHEMA = 1

# `start`: the very first request of a fresh server process (`cold_start` in the suite).  Cells of their own, never pooled.
Cache = Literal["cold", "warm", "asis", "start"]
Via = Literal["direct", "daemon"]
# Names in `Trial.t_ms`, in the order in which they come.
EVENTS = ("connect", "headers", "first_event", "first_token", "first_content", "last_token", "done")
# Names in `Launch.cp`: milliseconds since the spawn, but `slot_free` since a client's hang-up.
LIFECYCLE = ("spawned", "port_open", "ready", "first_token", "slot_free")


class Record(msgspec.Struct, frozen=True):
    """Base of all.  `kw_only` is not inherited.  Unknown fields are ignored when read: a later version may know more."""


class ServerRef(Record, frozen=True, kw_only=True):
    """Which server application, and what it said its version is ("" if it does not tell)."""

    id: str
    version: str = ""


class Reached(Record, frozen=True, kw_only=True, omit_defaults=True):
    """One checkpoint.  `ms`: time from t0 until it was reached, None if never; then it was looked for until `censored_ms`.

    `tok`: tokens of the reply (reasoning included) that had come by then, None where they cannot be counted.
    """

    ms: float | None
    tok: int | None = None
    censored_ms: float | None = None


class Check(Record, frozen=True, kw_only=True, omit_defaults=True):
    """Whether the final text was right; `why` is one line about a failure."""

    passed: bool = msgspec.field(name="pass")
    why: str = ""


class Tokens(Record, frozen=True, kw_only=True):
    """Counts.  `cached`: prompt tokens the server did not process again.  None: nobody told.

    `source` of `out`: `usage` (the server's usage block), `timings` (llama.cpp's timings), `chunks` (events with text: an
    upper bound on time per token, not exact) or `none`.  `first`: tokens that came with the first chunk, if known.
    """

    prompt: int | None = None
    cached: int | None = None
    out: int | None = None
    first: int | None = None
    source: Literal["usage", "timings", "chunks", "none"] = "none"


class ServerTimes(Record, frozen=True, kw_only=True):
    """What the server says of itself: milliseconds for the prompt and for all generated tokens."""

    prompt: float | None = None
    decode: float | None = None


class Gaps(Record, frozen=True, kw_only=True):
    """Milliseconds between events with text (chunks, not tokens): median, 99th percentile (nearest rank), largest."""

    n: int
    p50: float | None = None
    p99: float | None = None
    max: float | None = None


class Resources(Record, frozen=True, kw_only=True):
    """Of the server's process tree.  `cpu_s`: seconds of CPU time during this trial; `energy_j`: of the whole CPU package."""

    rss_mib: float | None = None
    pss_mib: float | None = None
    cpu_s: float | None = None
    vram_mib: float | None = None
    energy_j: float | None = None


class Conditions(Record, frozen=True, kw_only=True):
    """Of the machine just before the trial; `swap_in`: pages swapped in during it, `temp_c`: hottest CPU sensor."""

    load1: float | None = None
    mhz: float | None = None
    temp_c: float | None = None
    swap_in: int | None = None


class Client(Record, frozen=True, kw_only=True):
    """What measuring cost: CPU time of this process during the trial, and the 99th percentile of its own wake-up lag."""

    cpu_ms: float | None = None
    lag_p99_ms: float | None = None


class Trial(Record, frozen=True, kw_only=True, tag_field="type", tag="trial"):
    """One part of one trial: one case on one target in one launch, repeat `repeat` (from 1), part `part` of `parts`.

    `key` names the trial (all parts share it) across resumed runs.  `target` is `server/model/quant` (and what tells
    targets of one suite apart further).  `turn`: of the conversation, from 1.  `stream`: of a load, from 1.
    `launch`, `round`: from 1; `process`: names the server process, for a resumed launch has a second one.
    `at`: Unix time of t0, for the order of things only.  `late_ms`: how much later than intended an open-loop request was
    sent; its `t_ms` count from the intended time.  `since_spawn_ms`: t0 since the server's spawn, for `cache == "start"`.
    `t_ms`: see EVENTS; what did not happen is missing.  `cp`: by checkpoint id, those of this turn.  `cache_ok`: whether
    the server's own count of cached tokens agrees with `cache`, None if it does not tell.  `decode_ms_per_tok`:
    (last_token - first_token) / (out - tokens of the first chunk).  `finish`: the server's reason, `early` if we stopped at
    the last checkpoint, `stall` after a time-out.  `said`: names the reply (see reply.name_of), equal for equal replies; ""
    in sessions from before it was kept.  `error`: one line, None if all went well; such a trial is kept too.
    """

    schema: int = SCHEMA
    key: str
    session: str
    target: str
    server: ServerRef
    via: Via = "direct"
    model: str
    params: str = ""
    quant: str
    case: str
    turn: int = 1
    stream: int = 1
    part: int = 1
    parts: int = 1
    launch: int
    round: int
    repeat: int
    process: str = ""
    at: float = 0.0
    cache: Cache
    cache_ok: bool | None = None
    warmup: bool = False
    late_ms: float | None = None
    since_spawn_ms: float | None = None
    t_ms: dict[str, float] = msgspec.field(default_factory=dict)
    cp: dict[str, Reached] = msgspec.field(default_factory=dict)
    check: Check | None = None
    tokens: Tokens = msgspec.field(default_factory=Tokens)
    server_ms: ServerTimes = msgspec.field(default_factory=ServerTimes)
    decode_ms_per_tok: float | None = None
    gaps: Gaps | None = None
    res: Resources = msgspec.field(default_factory=Resources)
    env: Conditions = msgspec.field(default_factory=Conditions)
    client: Client = msgspec.field(default_factory=Client)
    finish: str | None = None
    said: str = ""
    error: str | None = None


class Launch(Record, frozen=True, kw_only=True, tag_field="type", tag="launch"):
    """One start of a target's server.  `cp`: see LIFECYCLE.  `argv` as it was run.  `start`: from 1; a launch has several
    where several cases want to be a server's first request.  `first`: the case that was its first request, None for a short
    one of the bench's own.  `error`: why it never got ready (then `last_words` are its last lines), or how it died.
    """

    schema: int = SCHEMA
    key: str
    session: str
    target: str
    server: ServerRef
    via: Via = "direct"
    model: str
    params: str = ""
    quant: str
    launch: int
    round: int
    start: int = 1
    process: str = ""
    first: str | None = None
    at: float = 0.0
    argv: tuple[str, ...] = ()
    cp: dict[str, Reached] = msgspec.field(default_factory=dict)
    res: Resources = msgspec.field(default_factory=Resources)
    env: Conditions = msgspec.field(default_factory=Conditions)
    error: str | None = None
    last_words: str = ""


class Artifact(Record, frozen=True, kw_only=True):
    """The weights.  `quant_name`: what a GGUF header says; `sha256` hex, of the whole file; of a folder one over its files'."""

    path: str
    bytes: int | None = None
    sha256: str | None = None
    quant_name: str | None = None


class TargetInfo(Record, frozen=True, kw_only=True):
    """One target as it was run.  `argv`: with `{port}` and the like left open; `command`: what a person would type.

    `weights`: what llm-daemon calls them (a name of its catalog, `hf:org/repo:Q4_K_M`, a file's path), "" if it was not asked.
    """

    id: str
    server: ServerRef
    via: Via = "direct"
    engine: str | None = None
    model: str
    params: str = ""
    quant: str
    weights: str = ""
    artifact: Artifact | None = None
    argv: tuple[str, ...] = ()
    command: str = ""


class CheckpointInfo(Record, frozen=True, kw_only=True):
    """One checkpoint as the suite has it; `text` says what it is in words (`regex 'return'`)."""

    id: str
    kind: str
    text: str = ""
    turn: int = 1
    when: Literal["first", "settled"] = "first"
    slo_ms: float | None = None


class CaseInfo(Record, frozen=True, kw_only=True):
    """One case as the suite has it."""

    id: str
    kind: str
    cache: Cache
    turns: int = 1
    cold_start: bool = False
    streams: int = 1
    rate: float | None = None
    checked: bool = False
    checkpoints: tuple[CheckpointInfo, ...] = ()


class Machine(Record, frozen=True, kw_only=True):
    """Where it ran; None or "" where the system does not tell."""

    os: str = ""
    kernel: str = ""
    python: str = ""
    cpu: str = ""
    cpu_flags: tuple[str, ...] = ()
    cores: int | None = None
    usable_cores: int | None = None
    governor: str = ""
    ram_mib: int | None = None
    swap_mib: int | None = None
    gpu: tuple[str, ...] = ()
    boot_id: str = ""
    power: str = ""


class Session(Record, frozen=True, kw_only=True):
    """One invocation, resumed ones included.  `began`, `ended`, `resumed`: Unix times; `ended` None while unfinished.

    `git`: commit of the suite's folder, with `+` if files there were changed; "" outside of git.  `trials_given`: whether
    `trials` were the command line's, and so those of every case; None in sessions from before that was kept.  `held`: measured
    trials that were on the disk when the last run ended; None if none came to its end, or it was not kept yet.
    """

    schema: int = SCHEMA
    id: str
    bench_version: str
    suite: str
    suite_text: str
    suite_sha256: str
    command: tuple[str, ...] = ()
    git: str = ""
    began: float
    resumed: tuple[float, ...] = ()
    ended: float | None = None
    held: int | None = None
    trials: int
    trials_given: bool | None = None
    launches: int
    interleave: str = "round"
    warmup: int = 1
    seed: int | None = None
    machine: Machine
    targets: tuple[TargetInfo, ...]
    cases: tuple[CaseInfo, ...]
    notes: tuple[str, ...] = ()


class Stream(Record, frozen=True, kw_only=True, omit_defaults=True):
    """The raw reply of one part of a trial: `body` as it came, `at_us[i]` after t0 its first `ends[i]` bytes were read."""

    key: str
    part: int = 1
    at_us: tuple[int, ...]
    ends: tuple[int, ...]
    body_b64: str

    @classmethod
    def of(cls, key: str, part: int, chunks: Sequence[tuple[float, bytes]]) -> Stream:
        """From (milliseconds after t0, bytes) of each read."""
        at, ends, size = [], [], 0
        for ms, data in chunks:
            size += len(data)
            at.append(round(ms * 1000))
            ends.append(size)
        body = base64.b64encode(b"".join(data for _, data in chunks)).decode()
        return cls(key=key, part=part, at_us=tuple(at), ends=tuple(ends), body_b64=body)

    def chunks(self) -> list[tuple[float, bytes]]:
        """(milliseconds after t0, bytes) of each read.

        >>> Stream.of("k", 1, [(1.5, b"da"), (2.25, b"ta")]).chunks()
        [(1.5, b'da'), (2.25, b'ta')]
        """
        body, begins = base64.b64decode(self.body_b64), (0, *self.ends)
        return [(us / 1000, body[start:end]) for us, start, end in zip(self.at_us, begins, self.ends, strict=False)]


def to_json(record: Record) -> Any:
    """A record as plain dicts and lists, for `--json`."""
    return msgspec.to_builtins(record)
