"""The control socket's messages: one JSON object a line, 64 KiB at most.  Bytes in, messages out; no IO.

HELLO, WELCOME, OLD, GOING, PING, PONG and RETIRE are frozen for ever: they are what two versions share.  After
WELCOME the connection is a lease (unless HELLO said `"lease": false`) and carries ENSURE and CALL, answered by
PROGRESS, READY, RESULT and ERROR with the same `id`.

Imported by every client, so it imports nothing but json.
"""

from __future__ import annotations

import json

from ..errors import RemoteProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PROTO = 1  # what we speak; the daemon also accepts PROTO - 1
LIMIT = 65536  # bytes of one line


def encode(message: dict[str, object]) -> bytes:
    r"""One line, newline included.

    >>> encode({"op": "PING"})
    b'{"op":"PING"}\n'
    """
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Decoder:
    r"""Splits what arrives into messages; keeps the unfinished rest.

    >>> decoder = Decoder()
    >>> decoder.feed(b'{"op":"PI'), decoder.feed(b'NG"}\n{"op":"PONG"}\n')
    ([], [{'op': 'PING'}, {'op': 'PONG'}])
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Messages completed by `data`.  Raises RemoteProtocolError for a line too long or not a JSON object with `op`."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LIMIT:
            raise RemoteProtocolError("the peer sent a line of over 64 KiB on the control socket")
        out = []
        for line in lines:
            try:
                message = json.loads(line)
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
