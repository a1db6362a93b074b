"""Server-sent events: bytes in, whole events out.

Source: HTML Living Standard, section 9.2.6 "Interpreting an event stream".  Kept are the data and the event's name; `id` and
`retry` are for browsers that connect again, which nobody does here.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ..errors import RemoteProtocolError

LIMIT = 64 * 1024 * 1024  # bytes of one event; llama.cpp's last event holds the whole prompt, and a request may be as large
_LINE_END = re.compile(rb"\r\n|\r|\n")


class Event(NamedTuple):
    """One whole event: its data lines, joined by newlines, undecoded; `name` is empty where the stream names none."""

    data: bytes
    name: str = ""


class Splitter:
    """Cuts a stream into events, however the bytes arrive.  Not for several threads.

    Comments (`: ping`) and events without data vanish, and so does an event that its empty line never ended.
    Bytes are decoded nowhere, so a character may be split between pieces.

    >>> splitter = Splitter()
    >>> splitter.feed(b'data: {"a":'), splitter.feed(b'1}\\n'), splitter.feed(b'\\n: ping\\n\\ndata: [DONE]\\n\\n')
    ([], [], [Event(data=b'{"a":1}', name=''), Event(data=b'[DONE]', name='')])
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._size = 0  # of the unfinished line and the unfinished event
        self._line: list[bytes] = []  # pieces of the unfinished line: joined once, or many small ones would cost squares
        self._data: list[bytes] = []
        self._name = ""
        self._after_cr = False
        self._begun = False

    def feed(self, piece: bytes) -> list[Event]:
        """The events that `piece` completed, maybe none.  Raises RemoteProtocolError if one is larger than the limit."""
        if self._after_cr and piece:  # the piece before ended in CR, which ended the line; its LF belongs to it
            piece = piece.removeprefix(b"\n")
            self._after_cr = False
        if piece.endswith(b"\r"):
            self._after_cr = True
        *lines, rest = _LINE_END.split(piece)
        events: list[Event] = []
        for line in lines:
            whole = b"".join((*self._line, line))
            self._line.clear()
            self._take(whole, events)
            self._bound(len(line))
        if rest:
            self._line.append(rest)
            self._bound(len(rest))
        return events

    def _bound(self, more: int) -> None:
        self._size = self._size + more if self._line or self._data else 0
        if self._size > self._limit:
            raise RemoteProtocolError(f"the engine sent an event of more than {self._limit} bytes")

    def _take(self, line: bytes, events: list[Event]) -> None:
        if not self._begun:
            self._begun = True
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line:
            if self._data:
                events.append(Event(b"\n".join(self._data), self._name))
            self._data, self._name = [], ""
            return
        field, _, value = line.partition(b":")  # a comment has no field name
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
        elif field == b"event":
            self._name = value.decode(errors="replace")
