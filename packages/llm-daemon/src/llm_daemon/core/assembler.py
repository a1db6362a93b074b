"""What all routes share in making one answer of a stream; `assemble.py` says when and why.

Unknown fields of deltas are kept: texts and lists grow, null is nothing, of anything else the last value holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ..errors import RemoteProtocolError
from .sse import LIMIT, Event, Splitter

PIECE = 64  # bytes that a piece of text takes besides its characters, about
NOT_IN_STREAM = "not_in_stream"  # code of the error of an answer that is whole, but that no stream carries in full
# What may not be in a stream.
CUT_OFF = "the last tokens before the limit"
MUTE = "the raw text of an answer that says nothing"
BARE = "the probabilities of each token"

Json = dict[str, Any]


class Assembler:
    """Takes the bytes of one event stream, gives one answer.  Not for several threads.

    Bounded: raises RemoteProtocolError when an event, or all that the answer keeps, has more than `limit` bytes.
    """

    dropped: tuple[str, ...] = ()  # fields of the request that the engine does not get

    def __init__(self, asked: Mapping[str, Any], limit: int = LIMIT) -> None:
        self._asked, self._room = asked, limit
        self._splitter = Splitter(limit)
        self._error: Json | None = None
        self._done = False

    @classmethod
    def can(cls, asked: Mapping[str, Any]) -> bool:
        """Whether the answer can be had from a stream; `asked` holds the fields that `assemble.ask_to_stream` looks at."""
        return not asked["verbose"] and not asked["n_indent"]

    @classmethod
    def added(cls, asked: Mapping[str, Any]) -> dict[str, bytes]:
        """Fields that the engine gets besides `stream`, as JSON."""
        return {}

    def feed(self, piece: bytes) -> None:
        """Takes decoded bytes of the response body, split anywhere.

        Raises RemoteProtocolError for what is not JSON, or too much; the assembler is then of no more use.
        """
        for event in self._splitter.feed(piece):
            if self._error is None:
                self._event(event)

    def finish(self) -> tuple[int, bytes]:
        """HTTP status and JSON body, once the engine's stream has ended; an error event gives the engine's error and its status.

        Raises RemoteProtocolError if the stream lacks its proper end, and with the code `NOT_IN_STREAM` if it ended well but
        may not carry the whole answer: then the same request must be asked again, without a stream.  That is so when

        - the token limit comes while the last tokens are held back, for they may become a stop string;
        - it comes in the middle of a character, which completions show as U+FFFD;
        - a chat has nothing to say: without a stream the engine then shows the raw text, an unfinished `<think>` for example;
        - a message begins with a part of a character: then no `message_start` comes;
        - a token comes without the probabilities that were asked for, as speculative decoding does.

        It is judged by counting tokens, rather too often than too seldom.
        """
        if self._error is not None:
            status = self._error.get("code")
            return status if type(status) is int and 400 <= status <= 599 else 500, msgspec.json.encode({"error": self._error})
        try:
            if not self._whole():
                raise RemoteProtocolError("the engine's stream ended before its answer was whole")
            if lost := self._lost():
                raise RemoteProtocolError(f"the engine's stream may not carry {lost}", code=NOT_IN_STREAM)
            return 200, msgspec.json.encode(self._answer())
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise RemoteProtocolError(f"the engine's answer has an unknown form: {type(e).__name__}: {e}") from None

    def _event(self, event: Event) -> None:
        if event.data == b"[DONE]":
            self._done = True
            return
        try:
            data = msgspec.json.decode(event.data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
            raise RemoteProtocolError(f"the engine sent an event that is not JSON: {e}") from None
        if not isinstance(data, dict):
            return  # llama.cpp says null when the second of several prompts begins
        if event.name == "error" or data.get("error"):
            inner = data.get("error", data)  # llama.cpp's messages have the bare error, all others wrap it
            self._error = inner if isinstance(inner, dict) else {"message": str(inner)}
            return
        try:
            self._room -= self._take(data, len(event.data))
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise RemoteProtocolError(f"the engine sent an event of an unknown form: {type(e).__name__}: {e}") from None
        if self._room < 0:
            raise RemoteProtocolError("the engine's answer is too large to be put together")

    def _take(self, data: Json, size: int) -> int:
        """Takes one event of `size` bytes; returns how many of them are kept, about."""
        raise NotImplementedError

    def _whole(self) -> bool:
        """Whether the stream had its end and each part that began has ended."""
        raise NotImplementedError

    def _lost(self) -> str:
        """What is not in the stream, empty if nothing."""
        raise NotImplementedError

    def _answer(self) -> Json | list[Json]:
        raise NotImplementedError


class Part:
    """A growing JSON object.  Texts are joined once: adding to a long one piece by piece costs squares."""

    def __init__(self) -> None:
        self.fields: Json = {}
        self.texts: dict[str, list[str]] = {}
        self.spoken = 0  # tokens generated when the last visible piece came, as the engine counts them
        self.bare = False  # a token came without the probabilities that were asked for

    def say(self, name: str, text: str) -> int:
        """Adds to a text; returns about how many bytes that takes."""
        pieces = self.texts.setdefault(name, [])
        if not text:
            return 0
        pieces.append(text)
        return len(text) + PIECE

    def merge(self, delta: Json) -> int:
        """Adds a delta, whatever its fields; returns about how many bytes are new."""
        size = 0
        for name, value in delta.items():
            if isinstance(value, str):
                size += self.say(name, value)
            elif isinstance(value, list):
                self.fields.setdefault(name, []).extend(value)
                size += len(msgspec.json.encode(value)) + PIECE
            elif value is not None:
                size += self.frame({name: value}, PIECE)
        return size

    def frame(self, fields: Json, size: int) -> int:
        """Takes fields of which the last value holds; returns `size`, that of their event, if it brought one that is new."""
        before = len(self.fields)
        self.fields |= fields
        return size if len(self.fields) > before else 0

    def joined(self) -> Json:
        return {**self.fields, **{name: "".join(pieces) for name, pieces in self.texts.items()}}


def wants_probabilities(asked: Mapping[str, Any]) -> bool:
    """Whether probabilities are wanted: `logprobs` counts where `n_probs` is not given."""
    return bool(asked["logprobs"] or asked["n_probs"])


def wants_one(asked: Mapping[str, Any]) -> bool:
    return (asked["n"] or 1) == 1 and (asked["n_cmpl"] or 1) == 1


def chat_can(asked: Mapping[str, Any]) -> bool:
    return not wants_probabilities(asked) and not asked["continued"] and asked["reasoning_format"] != "deepseek-legacy"


def counting(asked: Mapping[str, Any]) -> dict[str, bytes]:
    """Asks for the number of each token where it is needed: it makes a stream twice as large."""
    return {"timings_per_token": b"true"} if asked["stop"] else {}


def is_mute(says_something: bool, total: int, limited: bool) -> bool:
    """Whether nothing came of tokens other than the one that ends an answer."""
    return not says_something and total > (0 if limited else 1)


def token_count(event: Json) -> int:
    """The number of tokens generated so far; 0 where the event does not say."""
    return int((event.get("timings") or {}).get("predicted_n", 0))
