"""What is sent: a case's turns as request bodies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .checkpoints import View
from .suite import Case
from .suite_tables import ServerTable, ToolTurn

NONCE = {"chat": "[{nonce}] ", "completion": "# {nonce}\n", "infill": "# {nonce}\n"}
PATHS = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}


class NoToolCall(Exception):
    """The next turn answers a tool call, and the reply made none."""


def fresh_nonce() -> str:
    """Twelve random digits: as many tokens each time with the tokenizers that take digits one by one."""
    return "".join(str(b % 10) for b in os.urandom(12))


@dataclass(slots=True)
class Conversation:
    """One trial's requests to one server, turn by turn.  `nonce`: put before everything, "" for none."""

    case: Case
    server: ServerTable
    model: str
    nonce: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.case.table.system is not None:
            self.messages.append({"role": "system", "content": self._marked(self.case.table.system)})

    def _marked(self, text: str) -> str:
        """With the nonce before it, if nothing was said before."""
        if not self.nonce or self.messages:
            return text
        return (self.case.table.nonce or NONCE[self.case.table.kind]).replace("{nonce}", self.nonce) + text

    def next(self, turn: int) -> tuple[str, dict[str, Any]]:
        """(path, body) of turn `turn` (from 1).  Raises NoToolCall."""
        said, table = self.case.turns[turn - 1], self.case.table
        if table.kind != "chat":
            return self._completion(self._marked(str(said)))
        if isinstance(said, ToolTurn):
            self._answer_tools(said)
        else:
            self.messages.append({"role": "user", "content": self._marked(said)})
        body = {**self._common(), "messages": list(self.messages), "max_tokens": table.max_tokens}
        if self.case.schema is not None:
            named = {"name": "reply", "schema": self.case.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        if self.case.tools:
            body["tools"] = list(self.case.tools)
        if table.tool_choice is not None:
            body["tool_choice"] = table.tool_choice
        return PATHS["chat"], body | table.body

    def _completion(self, prompt: str) -> tuple[str, dict[str, Any]]:
        table, body = self.case.table, self._common()
        if table.kind == "infill" and self.server.infill == "native":
            text = {"input_prefix": prompt, "input_suffix": self.case.suffix, "n_predict": table.max_tokens}
            return "/infill", body | text | table.body
        if table.kind == "infill":
            body["suffix"] = self.case.suffix
        return PATHS["completion"], body | {"prompt": prompt, "max_tokens": table.max_tokens} | table.body

    def _common(self) -> dict[str, Any]:
        table = self.case.table
        body: dict[str, Any] = {
            "model": self.model, "stream": True, "stream_options": {"include_usage": True}, "temperature": table.temperature,
        }  # fmt: skip
        if table.seed is not None:
            body["seed"] = table.seed
        if table.stop:
            body["stop"] = list(table.stop)
        if table.ignore_eos:
            body["ignore_eos"] = True
        if self.server.llamacpp:
            body["timings_per_token"] = True  # exact counts with each chunk
        return body

    def heard(self, view: View) -> None:
        """The reply to the last turn, which the next one goes on from."""
        message: dict[str, Any] = {"role": "assistant", "content": view.text or None}
        if view.calls:
            message["tool_calls"] = [
                {"id": call.id or f"call_{i}", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for i, call in sorted(view.calls.items())
            ]
        elif message["content"] is None:
            message["content"] = ""
        self.messages.append(message)

    def _answer_tools(self, turn: ToolTurn) -> None:
        calls: Sequence[dict[str, Any]] = self.messages[-1].get("tool_calls") or ()
        if not calls:
            raise NoToolCall("this turn gives a tool's result, and the reply before called no tool")
        for call in calls:
            name = call["function"]["name"]
            result = turn.tools.get(name, f"error: there is no tool {name}")
            self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})


def greeting(server: ServerTable, model: str, max_tokens: int = 1, **more: Any) -> tuple[str, dict[str, Any]]:
    """A short request of the bench's own, the same for every server: for the first token of a fresh one, and for hang-ups."""
    body: dict[str, Any] = {
        "model": model, "stream": True, "stream_options": {"include_usage": True}, "temperature": 0.0, "max_tokens": max_tokens,
        "messages": [{"role": "user", "content": "Count from one to one thousand in words, without a pause."}], **more,
    }  # fmt: skip
    return PATHS["chat"], body
