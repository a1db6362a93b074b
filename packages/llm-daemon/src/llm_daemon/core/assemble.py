"""One answer out of a stream: what a client gets that did not ask for a stream, from an engine that was asked for one.

llama.cpp's server notices far too late that the client of a non-streaming request is gone (architecture.md, "Cancellation is
real"), so it is always asked to stream.  The answer equals, field for field, what the engine sends without a stream.

Source: llama.cpp's tools/server/server-task.cpp, `to_json_*` of `server_task_result_cmpl_final` and `.._partial`, which write
both forms; compared on the real engines by tests/engines/test_real_assemble.py.
"""

from __future__ import annotations

from typing import Any

import msgspec

from .answers import Messages, Native, Responses
from .assembler import NOT_IN_STREAM, Assembler
from .choices import Chat, Completions

__all__ = ["NOT_IN_STREAM", "Assembler", "ask_to_stream"]

_KINDS: dict[str, type[Assembler]] = {
    "/v1/chat/completions": Chat,
    "/v1/completions": Completions,
    "/v1/responses": Responses,
    "/v1/messages": Messages,
    "/completion": Native,
    "/infill": Native,
}
# Fields of requests that decide whether, and how, an answer is put together.
_LOOKED_AT = (
    "logprobs", "max_output_tokens", "n", "n_cmpl", "n_indent", "n_probs", "reasoning_format",
    "response_fields", "return_tokens", "stop", "stop_sequences", "verbose",
)  # fmt: skip


def ask_to_stream(path: str, body: bytes) -> tuple[bytes, Assembler] | None:
    """For a non-streaming request: the body that asks the engine for a stream instead, and what makes one answer of it.

    All other fields keep the client's own bytes, so no number loses a digit.  An answer of the engine that is no event stream
    (any error before the first token) is what the client gets, as it is.

    None if the engine must be asked as the client did: another path, no JSON object, or a request for what no stream carries:

    - `verbose`: `__verbose` holds the raw text, which the stream has only parsed;
    - `n_indent`: text that was already streamed is taken back;
    - chat, responses and messages with `logprobs` or `n_probs`: tokens without visible text, the last one for example, have no
      event;
    - the same with an answer to go on with (the last message is the assistant's): the whole answer has its beginning, too;
    - the same with `reasoning_format` of `deepseek-legacy`: in a stream the reasoning is put elsewhere;
    - completions with probabilities *and* `stop`: how many tokens the engine takes off for the stop string is not told;
    - /completion and /infill with `return_tokens`: tokens that are only a part of a character have no event;
    - responses and messages with `n` over 1: their events do not say whose they are.

    >>> body, _ = ask_to_stream("/completion", b'{"prompt": "Hi", "seed": 12345678901234567890, "min_p": 1e-3}')
    >>> body
    b'{"prompt":"Hi","seed":12345678901234567890,"min_p":1e-3,"stream":true}'
    >>> ask_to_stream("/v1/embeddings", b'{"input": "Hi"}') is None
    True
    """
    kind = _KINDS.get(path)
    fields = _fields(body)
    if kind is None or fields is None:
        return None
    asked = {name: _value(fields.get(name)) for name in _LOOKED_AT} | {"continued": _continued(fields)}
    if not kind.can(asked):
        return None
    for name in kind.dropped:
        fields.pop(name, None)
    fields |= {name: msgspec.Raw(value) for name, value in {"stream": b"true", **kind.added(asked)}.items()}
    return msgspec.json.encode(fields), kind(asked)


def _fields(body: bytes) -> dict[str, msgspec.Raw] | None:
    try:
        return msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _value(raw: msgspec.Raw | None) -> Any:
    try:
        return None if raw is None else msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return True  # something is asked for: what, the engine may say


class _Turn(msgspec.Struct):
    role: Any = None
    type: Any = None


def _continued(fields: dict[str, msgspec.Raw]) -> bool:
    """Whether the engine is to go on with an answer that the client began; only the last turn is looked into."""
    if _value(fields.get("continue_final_message")):
        return True
    try:
        turns = msgspec.json.decode(fields.get("messages") or fields.get("input") or b"[]", type=list[msgspec.Raw])
        last = msgspec.json.decode(turns[-1], type=_Turn) if turns else _Turn()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False  # a string, or something that the engine will refuse
    return last.role == "assistant" or last.type in ("function_call", "reasoning")
