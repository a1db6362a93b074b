"""On which line of a TOML text a value stands: tomllib does not say."""

from __future__ import annotations

import re
from collections.abc import Sequence

_HEADER = re.compile(r"^[ \t]*\[(\[?)\s*([A-Za-z0-9_.\"' -]+?)\s*\]\]?[ \t]*(?:#.*)?$", re.MULTILINE)
# A string, a comment or a bracket: what a scan for brackets must tell apart.
_TOKEN = re.compile(r'"""(?:\\.|[^\\])*?"""|\'\'\'.*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|#[^\n]*|[{}\[\],]', re.DOTALL)


def line_of(text: str, path: Sequence[str | int]) -> int:
    """The line (from 1) of what `path` leads to; if that is not found, of the last step that is.

    >>> text = '[suite]\\nname = "x"\\n[[case]]\\n[[case]]\\nid = "b"\\ncheckpoints = [\\n { id = "c" },\\n { idd = "d" } ]'
    >>> line_of(text, ["suite", "name"]), line_of(text, ["case", 1, "id"])
    (2, 5)
    >>> line_of(text, ["case", 1, "checkpoints", 1, "idd"])
    8
    """
    start, end, rest = _section(text, list(path))
    at = start
    for step in rest:
        found = _key(text, step, at, end) if isinstance(step, str) else _item(text, step, at, end)
        if found is None:
            break
        at = found
    return text.count("\n", 0, at) + 1


def _section(text: str, path: list[str | int]) -> tuple[int, int, list[str | int]]:
    """(begin, end, rest of the path) of the table that the path's head names."""
    heads = list(_HEADER.finditer(text))
    if not path:
        return 0, len(text), []
    name, index = str(path[0]), path[1] if len(path) > 1 and isinstance(path[1], int) else 0
    mine = [i for i, head in enumerate(heads) if head[2].strip("\"' ") == name]
    if index >= len(mine):
        return 0, heads[0].start() if heads else len(text), path
    head = mine[index]
    after = heads[head + 1].start() if head + 1 < len(heads) else len(text)
    return heads[head].start(), after, path[2:] if heads[head][1] else path[1:]


def _key(text: str, name: str, start: int, end: int) -> int | None:
    pattern = re.compile(rf"""(?:^|[\s{{,.])["']?({re.escape(name)})["']?\s*[=.]""", re.MULTILINE)
    for found in pattern.finditer(text, start, end):
        if "#" not in text[text.rfind("\n", 0, found.start(1)) + 1 : found.start(1)]:  # else it stands in a comment
            return found.start(1)
    return None


def _item(text: str, index: int, start: int, end: int) -> int | None:
    """Where item `index` of the first array after `start` begins."""
    depth, count = 0, 0
    for token in _TOKEN.finditer(text, start, end):
        mark = token[0]
        if mark[0] == "#":
            continue
        if depth == 1 and count == index and mark not in ("]", ","):
            return token.start()
        if mark in ("[", "{"):
            depth += 1
        elif mark in ("]", "}"):
            depth -= 1
            if depth <= 0:
                return None
        elif mark == "," and depth == 1:
            count += 1
    return None
