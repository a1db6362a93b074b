"""The tables of a suite file as frozen values: what may be written in it, with types and ranges.  `suite` reads them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
Several = Annotated[int, Meta(ge=0, le=1_000_000)]
Seconds = Annotated[float, Meta(gt=0, le=1e7)]
Event = Literal["connect", "headers", "first_event", "first_token", "first_content", "last_token", "done"]
Kind = Literal["chat", "completion", "infill"]


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every table."""


class SuiteTable(Table, frozen=True, kw_only=True):
    """`[suite]`.  `up`: `one` server at a time, or `all` at once, which needs the memory for it.  `page_cache = "drop"` asks the
    kernel to forget the model file before each launch.  `python_tests` allows checks that run code from replies.
    `cool_down_s`: pause before each launch.
    """

    name: str
    trials: Count = 6
    launches: Count = 3
    interleave: Literal["round", "none"] = "round"
    up: Literal["one", "all"] = "one"
    warmup: Several = 1
    max_minutes: Seconds | None = None
    seed: int | None = None
    ready_s: Seconds = 300.0
    stall_s: Seconds = 120.0
    cool_down_s: Annotated[float, Meta(ge=0, le=3600)] = 0.0
    page_cache: Literal["keep", "drop"] = "keep"
    python_tests: bool = False


class ServerTable(Table, frozen=True, kw_only=True):
    """`[[server]]`: one server application.  Exactly one of `launch` (argv), `attach` (URL) and `engine` (of llm-daemon).

    `ready`: path that answers 200 once the model is loaded.  `timings = "llamacpp"`: ask for exact token counts in each
    chunk.  `model_name`: what goes into the request's `model`.  `models`: ids of `[[model]]` to run on it, all if left out.
    `slots`: requests it serves at once.  `key_env`: variable with the bearer token.  `gpu_layers`, `args`: for `engine`.
    """

    id: Name
    launch: Annotated[tuple[str, ...], Meta(min_length=1)] | None = None
    attach: Annotated[str, Meta(pattern=r"^https?://")] | None = None
    engine: str | None = None
    via: Literal["direct", "daemon"] = "direct"
    ready: Annotated[str, Meta(pattern="^/")] = "/health"
    timings: Literal["llamacpp", "none"] = "none"
    version: tuple[str, ...] | None = None
    env: dict[str, str] = {}
    slots: Count = 1
    threads: Count | None = None
    context: Count = 4096
    gpu_layers: Several | None = None
    args: tuple[str, ...] = ()
    model_name: str | None = None
    models: tuple[str, ...] | None = None
    quants: tuple[str, ...] | None = None
    key_env: str | None = None
    infill: Literal["native", "suffix"] = "native"
    stop_s: Seconds = 5.0

    @property
    def llamacpp(self) -> bool:
        """Whether it understands llama.cpp's own request fields."""
        return self.timings == "llamacpp" or self.engine in ("llama-server", "xllamacpp", "llamafile")


class ModelTable(Table, frozen=True, kw_only=True):
    """`[[model]]`.  `artifacts`: quantization -> file, or a name that llm-daemon knows (`smollm2-135m`)."""

    id: Name
    params: str = ""
    artifacts: dict[str, str] = {}


class Predicate(Table, frozen=True, kw_only=True):
    """What may be asked of a reply.  Exactly one of these keys; `equals` goes with `json_path`."""

    event: Event | None = None
    chars: Count | None = None
    tokens: Count | None = None
    lines: Count | None = None
    sentences: Count | None = None
    contains: str | None = None
    regex: str | None = None
    code_block_closed: bool | None = None
    python_parses: bool | None = None
    json_path: str | None = None
    equals: Any = None
    json_complete: bool | None = None
    schema_valid: bool | None = None
    tool_name: str | None = None
    tool_args_complete: bool | None = None
    stop: bool | str | None = None

    @property
    def kind(self) -> str:
        """The key that is given."""
        return next(k for k in KINDS if getattr(self, k, None) is not None)

    @property
    def value(self) -> Any:
        return getattr(self, self.kind)

    def __str__(self) -> str:
        text = self.kind if self.value is True else f"{self.kind} {self.value!r}"
        return text if self.equals is None else f"{text} = {self.equals!r}"


KINDS = (
    "event", "chars", "tokens", "lines", "sentences", "contains", "regex", "code_block_closed", "python_parses", "json_path",
    "json_complete", "schema_valid", "tool_name", "tool_args_complete", "stop", "python_test",
)  # fmt: skip


class Checkpoint(Predicate, frozen=True, kw_only=True):
    """One of `checkpoints`.  `when = "settled"`: true, and true to the end from then on."""

    id: Name
    when: Literal["first", "settled"] = "first"
    turn: Count = 1
    slo_ms: Seconds | None = None


class Check(Predicate, frozen=True, kw_only=True):
    """`check`: asked of the final text (of the last turn).  `python_test`: a file that is run with the reply as `solution.py`."""

    python_test: str | None = None


class ToolTurn(Table, frozen=True, kw_only=True):
    """A turn that gives the results of the tools called in the turn before: by name of the tool."""

    tools: dict[str, str]


class CaseTable(Table, frozen=True, kw_only=True):
    """`[[case]]`.

    `kind`: `chat` (`prompt` or `turns`, `system`), `completion` (`prompt` goes on), `infill` (`prompt` before, `suffix` after).
    `cache`: `cold` puts a fresh nonce before the prompt, `warm` asks the same thing right before, `asis` does nothing.
    `nonce`: how it is put there, with `{nonce}` in it.  `cold_start`: also once per launch as a server's very first request.
    Load: `concurrency` streams at once, or `rate` requests a second whatever comes back (open loop); `requests` in all.
    `early_stop`: hang up after the last checkpoint.  `body`: further fields of the request, as they are.
    """

    id: Name
    kind: Kind = "chat"
    system: str | None = None
    prompt: str | None = None
    prompt_file: str | None = None
    turns: tuple[str | ToolTurn, ...] = ()
    suffix: str | None = None
    suffix_file: str | None = None
    max_tokens: Count = 256
    temperature: Annotated[float, Meta(ge=0)] = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    cache: Literal["cold", "warm", "asis"] = "asis"
    nonce: str | None = None
    cold_start: bool = False
    response_schema: str | None = None
    tools: str | None = None
    tool_choice: str | None = None
    body: dict[str, Any] = {}
    concurrency: Count | None = None
    rate: Annotated[float, Meta(gt=0)] | None = None
    arrivals: Literal["poisson", "constant"] = "poisson"
    requests: Count | None = None
    trials: Count | None = None
    warmup: Several | None = None
    early_stop: bool = False
    stall_s: Seconds | None = None
    timeout_s: Seconds | None = None
    servers: tuple[str, ...] | None = None
    checkpoints: tuple[Checkpoint, ...] = ()
    check: Check | tuple[Check, ...] = ()


class File(Table, frozen=True, kw_only=True):
    """The whole of it."""

    suite: SuiteTable
    server: Annotated[tuple[ServerTable, ...], Meta(min_length=1)]
    model: tuple[ModelTable, ...] = ()
    case: Annotated[tuple[CaseTable, ...], Meta(min_length=1)]
