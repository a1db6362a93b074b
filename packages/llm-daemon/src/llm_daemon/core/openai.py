"""The little of OpenAI's HTTP form that we read and write ourselves: which model a body names, and error bodies."""

from __future__ import annotations

import re
from math import ceil

import msgspec

from ..errors import LlmDaemonError, Unavailable, UsageError
from .firewall import SUSPECTS, Suspects

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Wanted(Suspects, frozen=True, gc=False):
    """The fields of a request body that decide where it goes, and those of the firewall."""

    model: str | None = None
    stream: bool | None = None


_DECODER = msgspec.json.Decoder(Wanted)
_FIELD = re.compile(rb'(?<!file)name\*?\s*=\s*"?([^";\r\n]+)"?', re.IGNORECASE)
_PARTS = 1000  # of a form


def read_wanted(body: bytes) -> Wanted:
    """Reads `model`, `stream` and the firewall's fields from a JSON body.

    >>> found = read_wanted(b'{"model": "smollm2-135m", "messages": [], "stream": true}')
    >>> found.model, found.stream
    ('smollm2-135m', True)

    Raises UsageError (`bad_json`) if the body is not JSON, not an object, or one of the two has a wrong type.
    """
    try:
        return _DECODER.decode(body)
    except msgspec.ValidationError as e:
        raise UsageError(f"request body: {e}", code="bad_json") from None
    except RecursionError:
        raise UsageError("request body is nested too deeply", code="bad_json") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as e:  # the latter: a `model` that is not UTF-8
        raise UsageError(f"request body is not valid JSON: {e}", code="bad_json") from None


def read_form(body: bytes, content_type: bytes) -> tuple[Wanted, list[tuple[str, bytes]]]:
    r"""The same of a form (multipart/form-data, RFC 7578), and its fields (name, value) for the firewall.

    Files are not looked at, unless they have a suspect's name.  A part that may be read under two names has two fields.

    >>> form = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n--x--\r\n'
    >>> wanted, fields = read_form(form, b"multipart/form-data; boundary=x")
    >>> wanted.model, fields
    ('whisper', [('model', b'whisper')])

    Raises UsageError (`bad_form`) for a form that cannot be read.
    """
    given = re.search(rb'boundary="?([^";,\s]{1,70})"?', content_type, re.IGNORECASE)
    if given is None or not body.lstrip(b"\r\n").startswith(mark := b"--" + given[1]):
        raise UsageError("the form does not begin with its boundary", code="bad_form")
    found: dict[str, bytes] = {}
    fields: list[tuple[str, bytes]] = []
    at, parts = body.find(mark) + len(mark), 0
    while body[at : at + 2] == b"\r\n":
        head_end, end, parts = body.find(b"\r\n\r\n", at), body.find(b"\r\n" + mark, at), parts + 1
        if not at <= head_end < end:
            raise UsageError("the form is broken off", code="bad_form")
        if parts > _PARTS:
            raise UsageError(f"the form has more than {_PARTS} parts", code="bad_form")
        head = body[at:head_end]
        for name in [field.decode("latin-1") for field in _FIELD.findall(head)]:
            if b"filename" not in head.lower():
                found[name] = body[head_end + 4 : end]
                fields.append((name, found[name]))
            elif name in SUSPECTS:
                fields.append((name, body[head_end + 4 : end]))
        at = end + 2 + len(mark)
    try:
        return Wanted(model=found.get("model", b"").decode() or None, stream=found.get("stream") in (b"true", b"1")), fields
    except UnicodeDecodeError:
        raise UsageError("the form's model is not UTF-8", code="bad_form") from None


def rewritten(body: bytes, model: str | None, drop: frozenset[str]) -> bytes:
    """A JSON body with this `model` (None: its own) and without the fields in `drop`; all others keep the client's own bytes.

    >>> rewritten(b'{"model": "gpt-4", "temperature": 0.70, "user": "me"}', "m", frozenset({"user"}))
    b'{"model":"m","temperature":0.70}'

    Raises UsageError (`bad_json`) if it is not a JSON object.
    """
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise UsageError(f"request body cannot be read: {e}", code="bad_json") from None
    for name in drop:
        fields.pop(name, None)
    if model is not None:
        fields["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(fields)


def error_body(error: LlmDaemonError) -> bytes:
    """The error as one line of OpenAI's JSON; the engine's `last_words` and `log` ride along when known.

    >>> error_body(UsageError("no model 'x'", code="unknown_model", status=404))
    b'{"error":{"message":"no model \\'x\\'","type":"not_found_error","param":null,"code":"unknown_model"}}'
    """
    inner: dict[str, object] = {"message": error.message, "type": error_type(error), "param": None, "code": error.code}
    if error.hint:
        inner["hint"] = error.hint
    inner.update((key, error.data[key]) for key in ("last_words", "log", "retry_after") if key in error.data)
    return msgspec.json.encode({"error": inner})


def retry_after(error: LlmDaemonError) -> int | None:
    """Whole seconds for `Retry-After`, None for errors that waiting does not cure.

    >>> retry_after(Unavailable("the queue is full", retry_after=0.2)), retry_after(UsageError("no"))
    (1, None)
    """
    given = error.data.get("retry_after")
    if isinstance(given, (int, float)):
        return max(0, ceil(given))
    return 1 if error.status in (429, 503) else None


def error_type(error: LlmDaemonError) -> str:
    """OpenAI's word for the kind of error: ours to answer (`server_error`) or the caller's (`invalid_request_error`, ...)."""
    if error.status >= 500:
        return "unavailable_error" if isinstance(error, Unavailable) else "server_error"
    return _TYPES.get(error.status, "invalid_request_error")
