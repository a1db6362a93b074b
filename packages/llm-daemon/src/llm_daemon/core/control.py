"""The control socket's messages: one JSON object a line, of bounded length.  Bytes in, messages out; no IO.

HELLO, WELCOME, OLD, GOING, PING, PONG and RETIRE are frozen for ever: they are what two versions share.  After
WELCOME the connection is a lease (unless HELLO said `"lease": false`) and carries ENSURE and CALL, answered by
PROGRESS, READY, RESULT and ERROR with the same `id`.

Imported by every client, so it uses the C half of the json module alone: the Python half imports re, enum and
collections, which costs a fresh process more than all the rest of an attach.
"""

from __future__ import annotations

from _json import encode_basestring_ascii, make_scanner

from ..errors import RemoteProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PROTO = 1  # what we speak; the daemon also accepts PROTO - 1
LIMIT = 65536  # bytes of one line from a client
ANSWER_LIMIT = 16 * 2**20  # bytes of one line from the daemon: a status names every lease


def encode(message: dict[str, object]) -> bytes:
    r"""One line, newline included.

    >>> encode({"op": "PING", "n": [1, None, True]})
    b'{"op":"PING","n":[1,null,true]}\n'
    """
    return _text(message).encode() + b"\n"


def _text(value: object) -> str:
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    if value is None or value is True or value is False:
        return "null" if value is None else "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value + 0)  # + 0: an enum member says its number
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_text, value)) + "]"
    assert isinstance(value, dict), f"cannot be sent: {value!r}"
    return "{" + ",".join(f"{encode_basestring_ascii(str(k))}:{_text(v)}" for k, v in value.items()) + "}"


class _Json:
    """What json.JSONDecoder would tell the scanner (json/decoder.py)."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    array_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float
    memo: dict[str, str] = {}  # noqa: RUF012


_scan = make_scanner(_Json)  # type: ignore[arg-type]


def _parse(line: bytes) -> object:
    text = line.decode().strip()
    try:
        value, end = _scan(text, 0)
    except (StopIteration, RecursionError, SystemError):  # the last: its errors live in json.decoder, which is not imported
        return None
    return value if end == len(text) else None


class Decoder:
    r"""Splits what arrives into messages; keeps the unfinished rest.

    >>> decoder = Decoder()
    >>> decoder.feed(b'{"op":"PI'), decoder.feed(b'NG"}\n{"op":"PONG"}\n')
    ([], [{'op': 'PING'}, {'op': 'PONG'}])
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._rest, self._limit = b"", limit

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Messages completed by `data`.  Raises RemoteProtocolError for a line too long or not a JSON object with `op`."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > self._limit:
            raise RemoteProtocolError(f"the peer sent a line of over {self._limit} bytes on the control socket")
        out = []
        for line in lines:
            try:
                message = _parse(line)
            except ValueError:
                message = None
            if not isinstance(message, dict) or not isinstance(message.get("op"), str):
                raise RemoteProtocolError("the peer sent something that is not a control message")
            out.append(message)
        return out


def accepts(proto: object) -> bool:
    """Whether a daemon of this version serves a client that speaks `proto`.

    >>> accepts(PROTO), accepts(PROTO + 1), accepts("x")
    (True, False, False)
    """
    return isinstance(proto, int) and PROTO - 1 <= proto <= PROTO
