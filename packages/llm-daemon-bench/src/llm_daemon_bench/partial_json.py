"""JSON that is still being written: which of its values are complete already.

Grammar: RFC 8259.  The value begins at the first bracket of the text, so prose or a code fence before it does not disturb.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_START = re.compile(r"[{\[]")
_SPACE = re.compile(r"[ \t\r\n]*")
_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"')
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?(?![\d.eE+-])")
_WORDS = {"true": True, "false": False, "null": None}
_STEP = re.compile(r"""\.([A-Za-z_$][\w$-]*)|\[(\d+)\]|\[(?:"([^"]*)"|'([^']*)')\]""")
_DEPTH = 200  # of brackets: deeper replies count as never complete


@dataclass(slots=True)
class Node:
    """A value as far as it goes: `value` is a dict or list of nodes, or a JSON scalar; `complete` once nothing can follow."""

    value: Any
    complete: bool


class _Open(Exception):
    """The text ends here, or goes on in a way that is not JSON."""


def parse(text: str) -> Node | None:
    """The first JSON object or array in `text`, None if none has begun.

    >>> node = parse('Here: {"total": 12.5, "items": [1, 2')
    >>> node.complete, plain(find(node, "$.total")), find(node, "$.items").complete
    (False, 12.5, False)
    """
    begin = _START.search(text)
    if begin is None:
        return None
    reader = _Reader(text, begin.start())
    try:
        reader.value(0)
    except _Open:
        pass
    return reader.root


def find(node: Node | None, path: str) -> Node | None:
    """What stands at a path like `$.items[0].price`; None if it has not begun."""
    for step in steps(path):
        if node is None:
            return None
        inside = node.value
        if isinstance(step, str):
            node = inside.get(step) if isinstance(inside, dict) else None
        else:
            node = inside[step] if isinstance(inside, list) and step < len(inside) else None
    return node


def steps(path: str) -> list[str | int]:
    """The steps of a path: names and indexes.  Raises ValueError for anything that RFC 9535 allows beyond these.

    >>> steps("$.items[0]['unit price']")
    ['items', 0, 'unit price']
    """
    if not path.startswith("$"):
        raise ValueError(f"the path {path!r} must begin with $")
    rest, out, at = path[1:], list[str | int](), 0
    while at < len(rest):
        step = _STEP.match(rest, at)
        if step is None:
            raise ValueError(f"cannot read the path {path!r}: use steps like $.name[0]['other name']")
        out.append(int(step[2]) if step[2] else next(s for s in (step[1], step[3], step[4]) if s is not None))
        at = step.end()
    return out


def plain(node: Node | None) -> Any:
    """The value without its nodes; what is incomplete is in it as far as it goes."""
    if node is None:
        return None
    if isinstance(node.value, dict):
        return {key: plain(inner) for key, inner in node.value.items()}
    if isinstance(node.value, list):
        return [plain(inner) for inner in node.value]
    return node.value


class _Reader:
    def __init__(self, text: str, at: int) -> None:
        self.text, self.at = text, at
        self.root: Node | None = None

    def value(self, depth: int) -> Node:
        """Reads one value; containers are linked into the tree before they are read, so a cut leaves what there is."""
        mark = self.next()
        if mark in "{[" and depth < _DEPTH:
            node = Node({} if mark == "{" else [], False)
            if self.root is None:
                self.root = node
            self.link(node)
            self.at += 1
            (self.members if mark == "{" else self.items)(node, depth)
            node.complete = True
            return node
        node = Node(self.scalar(), True)
        self.link(node)
        return node

    def link(self, node: Node) -> None:
        """Set by whoever reads a container, to where the next value belongs."""

    def members(self, node: Node, depth: int) -> None:
        if self.next() == "}":
            self.at += 1
            return
        while True:
            key = self.string()
            self.expect(":")
            self.put(lambda inner, key=key: node.value.__setitem__(key, inner), depth)
            if self.expect(",}") == "}":
                return

    def items(self, node: Node, depth: int) -> None:
        if self.next() == "]":
            self.at += 1
            return
        while True:
            self.put(node.value.append, depth)
            if self.expect(",]") == "]":
                return

    def put(self, link: Any, depth: int) -> None:
        before, self.link = self.link, link  # type: ignore[method-assign]
        self.value(depth + 1)
        self.link = before  # type: ignore[method-assign]

    def next(self) -> str:
        """The next mark that is no space."""
        space = _SPACE.match(self.text, self.at)
        assert space is not None
        self.at = space.end()
        if self.at == len(self.text):
            raise _Open
        return self.text[self.at]

    def expect(self, marks: str) -> str:
        if (mark := self.next()) not in marks:
            raise _Open
        self.at += 1
        return mark

    def string(self) -> str:
        self.next()
        found = _STRING.match(self.text, self.at)
        if found is None:
            raise _Open
        self.at = found.end()
        text: str = json.loads(found[0])
        return text

    def scalar(self) -> Any:
        if self.text[self.at] == '"':
            return self.string()
        for word, value in _WORDS.items():
            if self.text.startswith(word, self.at):
                self.at += len(word)
                return value
        found = _NUMBER.match(self.text, self.at)
        if found is None or found.end() == len(self.text):  # a number may go on
            raise _Open
        self.at = found.end()
        return json.loads(found[0])
