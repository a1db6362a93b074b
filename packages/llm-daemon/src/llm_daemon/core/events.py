"""What happened, and what is to be done: the whole vocabulary between the core and its shell.

`lease`, `ticket` and `instance` are opaque ids (str), `request` numbers a question on one control connection.
Errors travel as the wire form of `errors.LlmDaemonError`, so that the core needs no exception of the shell's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ..spec import Spec

Wire = Mapping[str, Any]


class Fact(msgspec.Struct, frozen=True):
    """Base of both: immutable, equal by value.  Not dataclasses, because two dozen of those cost a starting daemon 13 ms."""


# Events -------------------------------------------------------------------------------------------------------
class Joined(Fact, frozen=True):
    """A lease began: a client's control connection, or a process we watch for it."""

    lease: str


class Left(Fact, frozen=True):
    lease: str


class Want(Fact, frozen=True):
    """A client asks that `spec` be loaded, and is told when it answers.  `keep_alive`: seconds idle, for this model."""

    lease: str
    request: int
    spec: Spec
    keep_alive: float | None = None


class Arrived(Fact, frozen=True):
    """A request came in through the gateway.

    `lane`: `interactive` or `regular`.  `supersede`: ends the ticket that came before with the same key, for whatever model.
    `deadline`: monotonic seconds, start it by then or not at all.  `keep_alive`: seconds idle, for this model.
    """

    ticket: str
    spec: Spec
    lane: str = "regular"
    supersede: str | None = None
    deadline: float | None = None
    keep_alive: float | None = None


class Aborting(Fact, frozen=True):
    """The client of a running ticket is gone, its engine is being told; Ended must follow when that has let go."""

    ticket: str


class Cancel(Fact, frozen=True):
    """By hand: end the ticket; its client hears `error`."""

    ticket: str
    error: Wire


class Ended(Fact, frozen=True):
    """A ticket is over: served in full, failed upstream, let go by its engine, or its client left the queue."""

    ticket: str
    served: bool = False


class Progressed(Fact, frozen=True):
    instance: str
    info: Wire


class Up(Fact, frozen=True):
    """The engine of `instance` answers; it serves `slots` requests at once."""

    instance: str
    slots: int


class Down(Fact, frozen=True):
    """The engine of `instance` is gone and reaped.  `error` is None when it was stopped on our word."""

    instance: str
    error: Wire | None = None


class Weighed(Fact, frozen=True):
    """How many bytes of memory `instance` needs, as far as known now: the answer to Weigh, again when its weights were fetched,
    and whenever its engine was seen to take more."""

    instance: str
    need: int


class StopModel(Fact, frozen=True):
    """By hand: end `instance`; running requests are finished first unless `force`."""

    instance: str
    force: bool = False


class Retire(Fact, frozen=True):
    """By hand, or on a newer daemon's word: leave as soon as nobody needs us."""


class Tick(Fact, frozen=True):
    """Time passed.  A stale tick is normal."""


class ExitVetoed(Fact, frozen=True):
    """The shell could not leave: somebody stood at the door in that moment."""


Event = (
    Joined
    | Left
    | Want
    | Arrived
    | Aborting
    | Cancel
    | Ended
    | Progressed
    | Up
    | Down
    | Weighed
    | StopModel
    | Retire
    | Tick
    | ExitVetoed
)


# Commands -----------------------------------------------------------------------------------------------------
class Weigh(Fact, frozen=True):
    """Find out what an engine for `spec` would need of the memory; Weighed must follow."""

    instance: str
    spec: Spec


class Waits(Fact, frozen=True):
    """`instance` has to wait for memory; `text` says for whose, in one line for people."""

    instance: str
    text: str


class Start(Fact, frozen=True):
    """Start an engine for `spec`; Up or Down must follow."""

    instance: str
    spec: Spec


class Halt(Fact, frozen=True):
    """End the engine (or its start); Down must follow.  `leaves_for`: why, if others need its memory."""

    instance: str
    force: bool
    leaves_for: str = ""


class TellReady(Fact, frozen=True):
    lease: str
    request: int
    instance: str


class TellError(Fact, frozen=True):
    lease: str
    request: int
    error: Wire


class TellProgress(Fact, frozen=True):
    lease: str
    request: int
    info: Wire


class Run(Fact, frozen=True):
    """The slot is the ticket's: relay it to the instance's engine.

    `loaded_for`: of the seconds it has waited, those in which the instance was not ready.
    """

    ticket: str
    instance: str
    loaded_for: float = 0.0


class Refuse(Fact, frozen=True):
    """The end of a ticket that waits: its client hears `error`."""

    ticket: str
    error: Wire


class Abort(Fact, frozen=True):
    """End a running ticket: its client hears `error`, its engine is told; Ended must follow when that has let go."""

    ticket: str
    error: Wire


class Exit(Fact, frozen=True):
    """Leave, unless somebody stands at the door; then answer ExitVetoed."""


Command = Weigh | Waits | Start | Halt | TellReady | TellError | TellProgress | Run | Refuse | Abort | Exit
