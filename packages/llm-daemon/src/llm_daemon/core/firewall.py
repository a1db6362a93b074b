"""The parameter firewall: what no client may make an engine do (peers.md 3).

Engines parse requests in C++ with the memory of our user.  A body that names one of the fields below is looked at
before any engine sees it; everything else is the engine's business and passes untouched.
"""

from __future__ import annotations

import operator
import re
from typing import Any

import msgspec

from ..errors import UsageError

GRAMMAR_BYTES = 64 * 1024  # a grammar is compiled by a recursive parser: CVE-2026-2069
SCHEMA_BYTES = 256 * 1024
DEPTH = 64  # of brackets in a grammar or schema
CHOICES = 16  # answers to one request: each may take a slot
LOGPROBS = 100

_MEDIA = (b"image", b"audio", b"video", b"media", b"file")  # part of each key that can name something to fetch
_DESCRIBING = ("tools", "json_schema", "response_format", "metadata")  # texts about things, never things
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKET = re.compile(rb"[\[({\])}]")
_REMOTE = re.compile(r"\s*(?:https?|ftps?|file)\s*:|\s*//", re.IGNORECASE)


class Suspects(msgspec.Struct, frozen=True, gc=False):
    """The fields of a body that have hurt engines; base of what the gateway reads of a request."""

    n_discard: msgspec.Raw | None = None
    id_slot: msgspec.Raw | None = None
    n: msgspec.Raw | None = None
    n_cmpl: msgspec.Raw | None = None
    n_probs: msgspec.Raw | None = None
    top_logprobs: msgspec.Raw | None = None
    grammar: msgspec.Raw | None = None
    json_schema: msgspec.Raw | None = None
    response_format: msgspec.Raw | None = None
    tools: msgspec.Raw | None = None


_fields = operator.attrgetter(*Suspects.__struct_fields__)
_NONE = (None,) * len(Suspects.__struct_fields__)


def check(found: Suspects, body: bytes, remote_media: bool = False) -> None:
    """Raises UsageError (`refused_parameter`) that names the field and its bound.

    `remote_media`: whether engines may fetch what a request names by URL (server-side request forgery, CVE-2026-33626).
    """
    if _fields(found) != _NONE:  # most requests have none of them
        _check_fields(found)
    # A key may be spelt with escapes; then, and only then, the whole body has to be read.
    if not remote_media and (
        b"image" in body or b"audio" in body or b"video" in body or b"media" in body or b"file" in body or b"\\u" in body
    ):
        whole = msgspec.json.decode(body)
        if isinstance(whole, dict):
            _no_fetching({key: value for key, value in whole.items() if key not in _DESCRIBING})


def _check_fields(found: Suspects) -> None:
    if found.n_discard is not None:  # negative ones corrupt memory (CVE-2026-21869), and context shift is not ours to steer
        _whole("n_discard", found.n_discard, 0, 2**31 - 1)
    if found.id_slot is not None:
        _whole("id_slot", found.id_slot, -1, -1, "slots are given out by the gateway")
    for name, most in (("n", CHOICES), ("n_cmpl", CHOICES), ("n_probs", LOGPROBS), ("top_logprobs", LOGPROBS)):
        if (value := getattr(found, name)) is not None:
            _whole(name, value, 0, most)
    if found.grammar is not None:
        _bounded("grammar", bytes(found.grammar), GRAMMAR_BYTES, inside=True)
    for name in ("json_schema", "response_format", "tools"):
        if (value := getattr(found, name)) is not None:
            _bounded(name, bytes(value), SCHEMA_BYTES)


def _refused(name: str, why: str, hint: str = "") -> UsageError:
    return UsageError(f"{name} {why}", code="refused_parameter", hint=hint)


def _whole(name: str, raw: msgspec.Raw, least: int, most: int, hint: str = "") -> None:
    value: Any = msgspec.json.decode(raw)
    if value is None or (value is False and name == "n_probs"):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        wanted = str(least) if least == most else f"a number from {least} to {most}"
        raise _refused(name, f"must be {wanted}, not {str(value)[:40]}", hint)


def _bounded(name: str, raw: bytes, most: int, inside: bool = False) -> None:
    """`inside`: brackets inside the string count, for it is a text of its own language."""
    if len(raw) > most:
        raise _refused(name, f"is larger than {most // 1024} KiB")
    depth = 0
    for bracket in _BRACKET.findall(raw if inside else _STRING.sub(b"", raw)):
        depth += 1 if bracket in b"[({" else -1
        if depth > DEPTH:
            raise _refused(name, f"is nested deeper than {DEPTH} levels")


def _no_fetching(value: Any, name: str = "") -> None:
    """Walks a body and refuses URLs where an engine would fetch them: in fields whose name, or whose parent's, is a medium's."""
    stack: list[tuple[Any, str]] = [(value, name)]
    while stack:
        value, name = stack.pop()
        if isinstance(value, dict):
            stack += [(inner, str(key) if not _is_medium(name) or _is_medium(str(key)) else name) for key, inner in value.items()]
        elif isinstance(value, list):
            stack += [(inner, name) for inner in value]
        elif isinstance(value, str) and _is_medium(name) and _REMOTE.match(value):
            raise _refused(
                name, f"names something to fetch ({value[:60]})",
                "send it inside the request (a data: URL), or set remote_media = true",
            )  # fmt: skip


def _is_medium(name: str) -> bool:
    return any(word.decode() in name.lower() for word in _MEDIA)
