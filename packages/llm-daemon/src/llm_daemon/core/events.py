"""What happened, and what is to be done: the whole vocabulary between the core and its shell.

`lease`, `ticket` and `instance` are opaque ids (str), `request` numbers a question on one control connection.
Errors travel as the wire form of `errors.LlmDaemonError`, so that the core needs no exception of the shell's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..spec import Spec

Wire = Mapping[str, Any]


# Events -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Joined:
    """A lease began: a client's control connection, or a process we watch for it."""

    lease: str


@dataclass(frozen=True, slots=True)
class Left:
    lease: str


@dataclass(frozen=True, slots=True)
class Want:
    """A client asks that `spec` be loaded, and is told when it answers.  `keep_alive`: seconds idle, for this model."""

    lease: str
    request: int
    spec: Spec
    keep_alive: float | None = None


@dataclass(frozen=True, slots=True)
class Arrived:
    """A request came in through the gateway."""

    ticket: str
    spec: Spec


@dataclass(frozen=True, slots=True)
class Ended:
    """A ticket is over: served, failed upstream, or its client is gone."""

    ticket: str


@dataclass(frozen=True, slots=True)
class Progressed:
    instance: str
    info: Wire


@dataclass(frozen=True, slots=True)
class Up:
    """The engine of `instance` answers; it serves `slots` requests at once."""

    instance: str
    slots: int


@dataclass(frozen=True, slots=True)
class Down:
    """The engine of `instance` is gone and reaped.  `error` is None when it was stopped on our word."""

    instance: str
    error: Wire | None = None


@dataclass(frozen=True, slots=True)
class StopModel:
    """By hand: end `instance`; running requests are finished first unless `force`."""

    instance: str
    force: bool = False


@dataclass(frozen=True, slots=True)
class Retire:
    """By hand, or on a newer daemon's word: leave as soon as nobody needs us."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed.  A stale tick is normal."""


@dataclass(frozen=True, slots=True)
class ExitVetoed:
    """The shell could not leave: somebody stood at the door in that moment."""


Event = Joined | Left | Want | Arrived | Ended | Progressed | Up | Down | StopModel | Retire | Tick | ExitVetoed


# Commands -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Start:
    """Start an engine for `spec`; Up or Down must follow."""

    instance: str
    spec: Spec


@dataclass(frozen=True, slots=True)
class Halt:
    """End the engine (or its start); Down must follow."""

    instance: str
    force: bool


@dataclass(frozen=True, slots=True)
class TellReady:
    lease: str
    request: int
    instance: str


@dataclass(frozen=True, slots=True)
class TellError:
    lease: str
    request: int
    error: Wire


@dataclass(frozen=True, slots=True)
class TellProgress:
    lease: str
    request: int
    info: Wire


@dataclass(frozen=True, slots=True)
class Run:
    """The slot is the ticket's: relay it to the instance's engine."""

    ticket: str
    instance: str


@dataclass(frozen=True, slots=True)
class Refuse:
    ticket: str
    error: Wire


@dataclass(frozen=True, slots=True)
class Exit:
    """Leave, unless somebody stands at the door; then answer ExitVetoed."""


Command = Start | Halt | TellReady | TellError | TellProgress | Run | Refuse | Exit
