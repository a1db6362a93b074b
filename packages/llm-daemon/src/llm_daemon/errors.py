"""What can go wrong, and whose move it is.

The branches tell whose move it is: `UsageError` yours, `Unavailable` wait and retry, `EngineError` the
engine's, `ProtocolError` a peer's or ours, `Bug` ours.  Each carries a stable `code` for the wire, an HTTP
`status` and an `exit_status` for the shell.  Imported by the client, so it imports nothing itself.
"""

from __future__ import annotations


class LlmDaemonError(Exception):
    """Base of every error this package raises on purpose.

    `message` is one line; `hint` is the next thing to try; `data` travels on the wire as it is (JSON types
    only).  Keys of `data` with a meaning of their own: `log` (path of the engine's or daemon's log),
    `last_words` (its last lines, one string), `retry_after` (seconds).
    """

    code = "error"
    status = 500
    exit_status = 70

    def __init__(
        self, message: str, *, hint: str = "", code: str | None = None, status: int | None = None, **data: object
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint:
            self.add_note(f"hint: {hint}")  # what a traceback shows
        self.data = data
        if code is not None:
            self.code = code
        if status is not None:
            self.status = status

    def __str__(self) -> str:
        return self.message

    def full(self) -> str:
        """Everything a person may want, several lines: message, the engine's last words, log, hint."""
        lines = [self.message]
        if words := self.data.get("last_words"):
            lines += ["  | " + line for line in str(words).splitlines()]
        if log := self.data.get("log"):
            lines.append(f"  log: {log}")
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)

    def to_wire(self) -> dict[str, object]:
        """JSON object that `from_wire` turns back into the same class, code, status, hint and data."""
        return {
            "kind": type(self).__name__,
            "code": self.code,
            "status": self.status,
            "message": self.message,
            "hint": self.hint,
            "data": self.data,
        }


class UsageError(LlmDaemonError, ValueError):
    """The caller's move: unknown model, bad option, bad configuration."""

    code = "usage"
    status = 400
    exit_status = 2


class Unavailable(LlmDaemonError):
    """Wait and retry: the daemon leaves, a queue is full, a port or lock is taken."""

    code = "unavailable"
    status = 503
    exit_status = 75


class DaemonUnresponsive(Unavailable, TimeoutError):
    """A daemon lives but did not answer by the deadline; `data` has its `pid` and process `state`."""

    code = "daemon_unresponsive"


class EngineError(LlmDaemonError):
    """The engine's: binary missing, start failed, model refused, crashed."""

    code = "engine"
    status = 502
    exit_status = 69


class EngineTimeout(EngineError, TimeoutError):
    """The engine made no progress for too long."""

    code = "engine_timeout"
    status = 504


class ProtocolError(LlmDaemonError):
    """Two sides of the control socket did not understand each other."""

    code = "protocol"
    status = 500
    exit_status = 75


class LocalProtocolError(ProtocolError):
    """We broke it."""

    code = "protocol_local"
    exit_status = 70


class RemoteProtocolError(ProtocolError):
    """The peer broke it, or speaks a version that we cannot serve; both versions are named."""

    code = "protocol_remote"


class Bug(LlmDaemonError):
    """Ours: please report it."""

    code = "bug"


_KINDS = {
    cls.__name__: cls
    for cls in (
        LlmDaemonError, UsageError, Unavailable, DaemonUnresponsive, EngineError, EngineTimeout,
        ProtocolError, LocalProtocolError, RemoteProtocolError, Bug,
    )
}  # fmt: skip


def from_wire(wire: dict[str, object]) -> LlmDaemonError:
    """The error that `to_wire` described; an unknown kind (a newer peer's) becomes the base class.

    >>> error = from_wire(UsageError("no model 'x'", hint="try y", code="unknown_model").to_wire())
    >>> type(error).__name__, error.code, error.hint, error.exit_status
    ('UsageError', 'unknown_model', 'try y', 2)
    """
    cls = _KINDS.get(str(wire.get("kind")), LlmDaemonError)
    status, data = wire.get("status"), wire.get("data")
    error = cls(
        str(wire.get("message", "unknown error")),
        hint=str(wire.get("hint") or ""),
        code=str(wire.get("code") or cls.code),
        status=status if isinstance(status, int) else None,
    )
    if isinstance(data, dict):
        error.data = dict(data)
    return error
