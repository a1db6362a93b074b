"""What passes between the gateway and its desk: what a request asks for, and its turn."""

from __future__ import annotations

from typing import Protocol

import msgspec

from ..errors import LlmDaemonError
from .route import Route


class Ask(msgspec.Struct, frozen=True):
    """A request that wants an engine.  `model` is None when it names none; `via` is `tcp`, `unix` or `tls`.

    `deadline` is seconds from now until it must have begun, `keep_alive` seconds that its model stays when idle.
    `peer` is the client's process id where the kernel tells it, else 0.
    """

    ticket: str
    path: str
    model: str | None
    stream: bool
    via: str
    lane: str = "regular"
    supersede: str | None = None
    deadline: float | None = None
    keep_alive: float | None = None
    peer: int = 0


class Turn(Protocol):
    """A waiting request, as the desk sees it.  Calls that come too late (the client is gone) do nothing."""

    def run(self, route: Route, loaded_for: float = 0.0) -> None:
        """The slot is yours: relay now.  `loaded_for`: seconds of the waiting in which the model was not ready."""
        ...

    def refuse(self, error: LlmDaemonError) -> None:
        """Ends a waiting ticket: the client gets the error, `Retry-After` from `error.data["retry_after"]`."""
        ...

    def abort(self, error: LlmDaemonError) -> None:
        """Breaks off a running ticket: the client gets the error now, and `Desk.ended` follows when the engine has let go."""
        ...
