"""The parameter firewall: what no client may make an engine do (peers.md 3).

Engines parse requests in C++ with the memory of our user.  A body that names one of the fields below is looked at
before any engine sees it; everything else is the engine's business and passes untouched.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from typing import Any

import msgspec

from ..errors import UsageError

GRAMMAR_BYTES = 64 * 1024  # a grammar is compiled by a recursive parser: CVE-2026-2069
SCHEMA_BYTES = 256 * 1024
DEPTH = 64  # of brackets in a grammar or schema
CHOICES = 16  # answers to one request: each may take a slot
LOGPROBS = 100

LONG = 1024  # bytes of a body from which reading it costs less than six looks for a word
# Part of each key or `type` that can name something to fetch.
_MEDIUM = re.compile(r"image|audio|video|media|file", re.IGNORECASE)
_LABELS = ("filename", "file_name")  # an editor's word for a text, often a URI: nobody fetches it
_DESCRIBING = ("tools", "json_schema", "response_format", "metadata")  # texts about things, never things
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKET = re.compile(r"[\[({\])}]")
# What a GBNF grammar only quotes: literals, character classes and comments.
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|#[^\n]*', re.DOTALL)
_REMOTE = re.compile(r"\s*(?:https?|ftps?|file)\s*:|\s*(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
_ABSENT = msgspec.Raw()


class Suspects(msgspec.Struct, frozen=True, gc=False):
    """The fields of a body that have hurt engines, as sent; base of what the gateway reads of a request."""

    # Raw, and never `Raw | None`: msgspec takes that for "null or nothing".
    n_discard: msgspec.Raw = _ABSENT
    id_slot: msgspec.Raw = _ABSENT
    n: msgspec.Raw = _ABSENT
    n_cmpl: msgspec.Raw = _ABSENT
    n_probs: msgspec.Raw = _ABSENT
    top_logprobs: msgspec.Raw = _ABSENT
    grammar: msgspec.Raw = _ABSENT
    json_schema: msgspec.Raw = _ABSENT
    response_format: msgspec.Raw = _ABSENT
    tools: msgspec.Raw = _ABSENT
    text: msgspec.Raw = _ABSENT  # where /v1/responses has its format
    output_format: msgspec.Raw = _ABSENT  # and /v1/messages
    output_config: msgspec.Raw = _ABSENT


SUSPECTS = frozenset(Suspects.__struct_fields__)
_fields = operator.attrgetter(*Suspects.__struct_fields__)
_NONE = (_ABSENT,) * len(Suspects.__struct_fields__)


def check(found: Suspects, body: bytes, remote_media: bool = False) -> None:
    """Raises UsageError: `refused_parameter` names the field and its bound, `bad_json` is for what cannot be read.

    `remote_media`: whether engines may fetch what a request names by URL (server-side request forgery, CVE-2026-33626).
    """
    if _fields(found) != _NONE:  # most requests have none of them
        _check_fields(found)
    # A key may be spelt with escapes; a short body without either is not read.
    if not remote_media and (
        len(body) > LONG or b"image" in body or b"audio" in body or b"video" in body or b"media" in body or b"file" in body
        or b"\\u" in body
    ):  # fmt: skip
        whole = _read(body)
        if isinstance(whole, dict):
            _no_fetching({key: value for key, value in whole.items() if key not in _DESCRIBING})


def check_form(fields: Iterable[tuple[str, bytes]], remote_media: bool = False) -> None:
    """The same of a form's fields, whose texts engines take for what a JSON body would say.

    >>> check_form([("n_discard", b"0"), ("response_format", b"text")])
    >>> check_form([("n_discard", b"-5")])
    Traceback (most recent call last):
    llm_daemon.errors.UsageError: n_discard must be a number from 0 to 2147483647, not -5
    """
    for name, value in fields:
        text = value.decode("latin-1").strip()
        if name in SUSPECTS:
            raw = msgspec.json.encode(text) if name == "grammar" else value.strip()
            try:
                _check_fields(Suspects(**{name: msgspec.Raw(raw)}))
            except UsageError as e:
                if e.code == "bad_json":
                    raise _refused(name, f"must be a number, not {text[:40]!r}") from None
                raise
        if not remote_media:
            _no_fetching({name: text})


def _check_fields(found: Suspects) -> None:
    # Negative ones corrupt memory (CVE-2026-21869), and context shift is not ours to steer.
    _whole("n_discard", found.n_discard, 0, 2**31 - 1)
    _whole("id_slot", found.id_slot, -1, -1, "slots are given out by the gateway")
    _whole("n", found.n, 0, CHOICES)
    _whole("n_cmpl", found.n_cmpl, 0, CHOICES)
    _whole("n_probs", found.n_probs, 0, LOGPROBS)
    _whole("top_logprobs", found.top_logprobs, 0, LOGPROBS)
    if found.grammar is not _ABSENT:
        _sane_grammar(found.grammar)
    for name in ("json_schema", "response_format", "tools", "text", "output_format", "output_config"):
        if (raw := getattr(found, name)) is not _ABSENT:
            _sane_schema(name, bytes(raw))


def _refused(name: str, why: str, hint: str = "") -> UsageError:
    return UsageError(f"{name} {why}", code="refused_parameter", hint=hint)


def _read(raw: bytes | msgspec.Raw) -> Any:
    try:
        return msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:  # only skipped when `model` was looked for
        raise UsageError(f"request body cannot be read: {e}", code="bad_json") from None


def _whole(name: str, raw: msgspec.Raw, least: int, most: int, hint: str = "") -> None:
    if raw is _ABSENT:
        return
    value = _read(raw)
    if value is None or (value is False and name == "n_probs"):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        wanted = str(least) if least == most else f"a number from {least} to {most}"
        raise _refused(name, f"must be {wanted}, not {str(value)[:40]}", hint)


def _sane_grammar(raw: msgspec.Raw) -> None:
    if len(bytes(raw)) > GRAMMAR_BYTES:
        raise _refused("grammar", f"is larger than {GRAMMAR_BYTES // 1024} KiB")
    text = _read(raw)
    if isinstance(text, str):
        _shallow("grammar", _QUOTED.sub("", text))


def _sane_schema(name: str, raw: bytes) -> None:
    """Bounds what engines turn into a grammar; texts inside too, for a `pattern` is compiled like one."""
    if not raw.startswith((b"{", b"[")):
        return
    if len(raw) > SCHEMA_BYTES:
        raise _refused(name, f"is larger than {SCHEMA_BYTES // 1024} KiB")
    _shallow(name, _STRING.sub(b"", raw).decode("latin-1"))
    for text in _STRING.findall(raw):
        _shallow(name, text.decode("latin-1"))


def _shallow(name: str, text: str) -> None:
    depth = 0
    for bracket in _BRACKET.findall(text):
        depth = depth + 1 if bracket in "[({" else max(0, depth - 1)  # what closes nothing makes no room
        if depth > DEPTH:
            raise _refused(name, f"is nested deeper than {DEPTH} levels")


def _no_fetching(whole: Any) -> None:
    """Walks a body and refuses URLs where an engine would fetch them: below a key, or in an object of a `type`, of a medium."""
    stack: list[tuple[Any, str]] = [(whole, "")]  # values, and the medium that each belongs to, if any
    while stack:
        value, medium = stack.pop()
        if isinstance(value, dict):
            kind = value.get("type")
            if not medium and isinstance(kind, str) and _is_medium(kind):
                medium = kind  # {"type": "image", "source": {"type": "url", "url": ...}}
            stack += [
                (inner, key if _is_medium(key) else medium)
                for key, inner in value.items()
                if isinstance(inner, (dict, list, str))
            ]
        elif isinstance(value, list):
            stack += [(inner, medium) for inner in value if isinstance(inner, (dict, list, str))]
        elif medium and _REMOTE.match(value):
            raise _refused(
                medium, f"names something to fetch ({value[:60]})",
                "send it inside the request (a data: URL), or set remote_media = true",
            )  # fmt: skip


def _is_medium(name: str) -> bool:
    return _MEDIUM.search(name) is not None and name.lower() not in _LABELS
