"""The answers of /v1/responses, /v1/messages and of llama.cpp's own /completion and /infill; see `assembler.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from .assembler import (
    BARE,
    CUT_OFF,
    MUTE,
    Assembler,
    Json,
    Part,
    chat_can,
    counting,
    is_mute,
    token_count,
    wants_one,
    wants_probabilities,
)
from .sse import LIMIT


class Native(Assembler):
    """/completion and /infill: an object, or a list of them for several prompts or choices."""

    dropped = ("response_fields",)  # chosen from the whole answer, here as there; the last event would lack what we need

    def __init__(self, asked: Mapping[str, Any], limit: int = LIMIT) -> None:
        super().__init__(asked, limit)
        self._parts: dict[int, Part] = {}

    @classmethod
    def can(cls, asked: Mapping[str, Any]) -> bool:
        paths = asked["response_fields"] or []
        if asked["return_tokens"] or not (isinstance(paths, list) and all(isinstance(path, str) for path in paths)):
            return False
        return super().can(asked) and not (wants_probabilities(asked) and asked["stop"])

    def _take(self, data: Json, size: int) -> int:
        index = data.get("index", 0)
        kept = 0 if index in self._parts else size
        part = self._parts.setdefault(index, Part())
        text, probabilities = data.pop("content", ""), data.pop("completion_probabilities", None)
        kept += part.say("content", text)
        if data.get("stop"):
            part.fields |= data
            return size
        if text:
            part.spoken = data.get("tokens_predicted", 0)
        if probabilities:
            part.fields.setdefault("completion_probabilities", []).extend(probabilities)
            return size
        part.bare |= bool(data.get("tokens_predicted"))
        return kept

    def _whole(self) -> bool:
        return bool(self._parts) and all(part.fields.get("stop") for part in self._parts.values())

    def _lost(self) -> str:
        for part in self._parts.values():
            if part.fields.get("stop_type") == "limit" and part.spoken < part.fields.get("tokens_predicted", 0):
                return CUT_OFF
            if part.bare and wants_probabilities(self._asked):
                return BARE
        return ""

    def _answer(self) -> Json | list[Json]:
        answers = []
        for _, part in sorted(self._parts.items()):
            answer = part.joined()
            if "stream" in (settings := answer.get("generation_settings", {})):
                settings["stream"] = False
            answers.append(_chosen(answer, self._asked["response_fields"] or ()))
        return answers[0] if len(answers) == 1 else answers


def _chosen(answer: Json, paths: list[str] | tuple[()]) -> Json:
    """The values at `paths` (`a/b` is b within a), those that exist; everything if there are no paths."""
    chosen = {}
    for path in paths:
        value: Any = answer
        for name in path.split("/"):
            value = value.get(name, msgspec.UNSET) if isinstance(value, dict) else msgspec.UNSET
        if value is not msgspec.UNSET:
            chosen[path] = value
    return chosen if paths else answer


class Responses(Assembler):
    """/v1/responses: the last event has all but two fields of the answer."""

    def __init__(self, asked: Mapping[str, Any], limit: int = LIMIT) -> None:
        super().__init__(asked, limit)
        self._response: Json | None = None
        self._spoken = self._total = 0

    @classmethod
    def can(cls, asked: Mapping[str, Any]) -> bool:
        return super().can(asked) and chat_can(asked) and wants_one(asked)

    @classmethod
    def added(cls, asked: Mapping[str, Any]) -> dict[str, bytes]:
        return counting(asked)

    def _take(self, data: Json, size: int) -> int:
        kind = data["type"]
        count = token_count(data)
        if kind in ("response.completed", "response.incomplete"):
            self._response, self._total = data["response"], count
            return size
        if kind == "response.failed":
            self._error = data["response"]["error"]
        elif kind.endswith((".delta", ".added")):
            self._spoken = count or self._spoken  # only the last of a token's events has the count
        return 0

    def _whole(self) -> bool:
        return self._response is not None

    def _lost(self) -> str:
        limited = self._total == self._asked["max_output_tokens"]  # nothing says what ended it
        if is_mute(bool((self._response or {}).get("output")), self._total, limited):
            return MUTE
        return CUT_OFF if limited and self._asked["stop"] and self._spoken < self._total else ""

    def _answer(self) -> Json:
        response = self._response or {}
        for item in response.get("output", ()):
            item.setdefault("status", "completed")  # missing from an item of reasoning only
        return {"completed_at": response.get("created_at"), **response}


class Messages(Assembler):
    """/v1/messages: blocks of content, then how it ended."""

    def __init__(self, asked: Mapping[str, Any], limit: int = LIMIT) -> None:
        super().__init__(asked, limit)
        self._message: Json = {}
        self._blocks: list[Part] = []
        self._at: dict[int, Part] = {}
        self._deltas = 0

    @classmethod
    def can(cls, asked: Mapping[str, Any]) -> bool:
        return super().can(asked) and chat_can(asked) and wants_one(asked)

    def _take(self, data: Json, size: int) -> int:
        match data["type"]:
            case "message_start":
                self._message = data["message"]
                return size
            case "content_block_start":
                self._start(data["index"], data["content_block"])
                return size
            case "content_block_delta":
                self._deltas += 1
                delta = data["delta"]
                del delta["type"]
                return self._at[data["index"]].merge(delta)
            case "message_delta":
                usage = {**self._message.get("usage", {}), **data.get("usage", {})}
                self._message |= {**data["delta"], "usage": usage}
                return size
            case "message_stop":
                self._done = True
        return 0

    def _start(self, index: int, begun: Json) -> None:
        """Begins a block, unless llama.cpp, whose last events say it again, has begun it before.

        Its indexes cannot be relied on: text that begins after a tool call gets the index of that call.
        """
        part = self._at.get(index)
        if part is None or any(part.fields.get(name) != begun.get(name) for name in ("type", "id")):
            part = self._at[index] = Part()
            self._blocks.append(part)
        part.fields |= begun

    def _whole(self) -> bool:
        return self._done

    def _lost(self) -> str:
        if "id" not in self._message:
            return "the beginning of the message"
        total, limited = self._message["usage"]["output_tokens"], self._message["stop_reason"] == "max_tokens"
        if is_mute(bool(self._blocks), total, limited):
            return MUTE
        # No event tells its token's number, so there must be one for each.
        return CUT_OFF if limited and self._asked["stop_sequences"] and self._deltas < total else ""

    def _answer(self) -> Json:
        blocks = [_block(part) for part in self._blocks]
        # The engine's own order: it has one text at most, wherever that was spoken.
        blocks.sort(key=lambda block: {"thinking": 0, "text": 1}.get(block["type"], 2))
        return {**self._message, "content": blocks}


def _block(part: Part) -> Json:
    block = part.joined()
    if block["type"] == "tool_use":
        arguments = block.pop("partial_json", "")
        try:
            msgspec.json.decode(arguments)
            block["input"] = msgspec.Raw(arguments)
        except (msgspec.MsgspecError, RecursionError):
            block["input"] = {}  # what the engine says of arguments that are not JSON, cut off ones for example
    return block
