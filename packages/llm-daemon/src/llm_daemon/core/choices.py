"""The answers of /v1/chat/completions and /v1/completions; see `assembler.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from .assembler import (
    BARE,
    CUT_OFF,
    MUTE,
    PIECE,
    Assembler,
    Json,
    Part,
    chat_can,
    counting,
    is_mute,
    token_count,
    wants_probabilities,
)
from .sse import LIMIT


class _Choices(Assembler):
    """What chat and completions share: chunks with `choices`, and fields around them that belong to the choice of that chunk."""

    def __init__(self, asked: Mapping[str, Any], limit: int = LIMIT) -> None:
        super().__init__(asked, limit)
        self._choices: dict[int, _Choice] = {}
        self._around: dict[int, Json] = {}
        self._latest = 0

    def _take(self, data: Json, size: int) -> int:
        data.pop("prompt_progress", None)
        count = token_count(data)
        kept = 0
        for choice in data.pop("choices", None) or ():
            self._latest = choice.get("index", 0)
            kept += 0 if self._latest in self._choices else size
            kept += self._choices.setdefault(self._latest, self._choice()).add(choice, size, count)
        # The chunk with the usage names no choice: it follows the last one of the choice that it counts.
        around = self._around.setdefault(self._latest, {})
        before = len(around)
        around.update(data)
        return kept if len(around) == before else kept + size

    def _choice(self) -> _Choice:
        raise NotImplementedError

    def _whole(self) -> bool:
        return self._done and bool(self._choices) and all(c.fields.get("finish_reason") for c in self._choices.values())

    def _lost(self) -> str:
        lost = (choice.lost(token_count(self._around[index]), self._asked) for index, choice in self._choices.items())
        return next(filter(None, lost), "")

    def _answer(self) -> Json:
        around: Json = {}
        for index in sorted(self._around, reverse=True):
            around |= self._around[index]  # the engine gives the numbers of the first choice only
        around["object"] = str(around.get("object", "")).removesuffix(".chunk")
        return {"choices": [choice.answer() for _, choice in sorted(self._choices.items())], **around}


class _Choice(Part):
    """One of the answers to a request for `n` of them."""

    def add(self, choice: Json, size: int, count: int) -> int:
        """Takes its part of a chunk of `size` bytes, the `count`-th token's; returns what of it is kept."""
        raise NotImplementedError

    def lost(self, total: int, asked: Mapping[str, Any]) -> str:
        """See Assembler._lost; `total` is the number of its tokens."""
        raise NotImplementedError

    def _frame(self, choice: Json, size: int) -> int:
        """Takes the fields beside the text; the last value that is not null holds.  Returns how much of the event is kept."""
        return self.frame({name: it for name, it in choice.items() if it is not None or name not in self.fields}, size)

    def answer(self) -> Json:
        raise NotImplementedError


class _ChatChoice(_Choice):
    def __init__(self) -> None:
        super().__init__()
        self.message = Part()
        self.calls: dict[int, Part] = {}

    def add(self, choice: Json, size: int, count: int) -> int:
        delta = choice.pop("delta", None) or {}
        framed = self._frame(choice, size)
        if role := delta.pop("role", None):
            self.message.fields["role"] = role
        calls = delta.pop("tool_calls", None) or ()
        kept = self.message.merge(delta) + sum(map(self._call, calls))
        if kept or calls:
            self.spoken = count
        return kept + framed

    def _call(self, delta: Json) -> int:
        call = self.calls.setdefault(delta.pop("index", 0), Part())
        function = delta.pop("function", None) or {}
        # The id and the name come whole, and again when the name grew.
        kept = call.frame(delta, sum(len(msgspec.json.encode(it)) for it in delta.values()))
        call.fields["type"] = "function"
        if name := function.pop("name", None):
            call.fields["name"] = name
        return call.merge(function) + 2 * PIECE + kept

    def lost(self, total: int, asked: Mapping[str, Any]) -> str:
        limited = self.fields["finish_reason"] == "length"
        if is_mute(bool(self.calls or any(self.message.texts.values())), total, limited):
            return MUTE
        return CUT_OFF if limited and asked["stop"] and self.spoken < total else ""

    def answer(self) -> Json:
        message = {"role": "assistant", "content": "", **self.message.joined()}
        if self.calls:
            message["tool_calls"] = [_tool_call(call) for _, call in sorted(self.calls.items())]
        return {**self.fields, "message": message}


def _tool_call(call: Part) -> Json:
    fields = call.joined()
    function = {"name": fields.pop("name", ""), "arguments": fields.pop("arguments", "")}
    return {"type": fields.pop("type"), "function": function, **fields}


class Chat(_Choices):
    """/v1/chat/completions"""

    @classmethod
    def can(cls, asked: Mapping[str, Any]) -> bool:
        return super().can(asked) and chat_can(asked)

    @classmethod
    def added(cls, asked: Mapping[str, Any]) -> dict[str, bytes]:
        return {"stream_options": b'{"include_usage":true}', **counting(asked)}

    def _choice(self) -> _Choice:
        return _ChatChoice()


class _TextChoice(_Choice):
    def add(self, choice: Json, size: int, count: int) -> int:
        text, logprobs = choice.pop("text", None) or "", choice.pop("logprobs", None)
        kept = self._frame(choice, size) + self.say("text", text)
        if text:
            self.spoken = count
        if logprobs:
            lists = self.fields.setdefault("logprobs", {})
            for name, values in logprobs.items():
                lists.setdefault(name, []).extend(values)
            return size
        self.bare |= bool(count) and choice.get("finish_reason") is None
        return kept

    def lost(self, total: int, asked: Mapping[str, Any]) -> str:
        if self.bare and wants_probabilities(asked):
            return BARE
        return CUT_OFF if self.fields["finish_reason"] == "length" and self.spoken < total else ""

    def answer(self) -> Json:
        return {"logprobs": None, **self.joined()}


class Completions(_Choices):
    """/v1/completions"""

    @classmethod
    def can(cls, asked: Mapping[str, Any]) -> bool:
        return super().can(asked) and not (wants_probabilities(asked) and asked["stop"])

    @classmethod
    def added(cls, asked: Mapping[str, Any]) -> dict[str, bytes]:
        return {"stream_options": b'{"include_usage":true}', "timings_per_token": b"true"}

    def _choice(self) -> _Choice:
        return _TextChoice()
