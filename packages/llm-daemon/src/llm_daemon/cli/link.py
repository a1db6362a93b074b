"""The commands' way to the daemon: attach with progress, ask, look without waking anybody."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .. import errors
from ..client import sync as _sync

if TYPE_CHECKING:
    from ..config import Settings
    from ..spec import Spec
    from .progress import Display

sync: Any = _sync  # the client is kept free of annotations: typing alone would cost it more than all its own work
CALL_WAIT = 30.0  # seconds for an answer that needs no model
PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between attempts to attach again


def attach(model: str, quiet: bool = False, keep_alive: float | None = None, **options: Any) -> Any:
    """A `Lease` on a loaded model, with progress on stderr."""
    from ..config import Settings
    from .progress import Display

    Settings.load()  # a daemon that runs does not read them again: what is wrong with them is said now
    return sync.begun(_Shown(sync.wish(model, **options), keep_alive, Display(quiet)))


class _Shown(_sync.Lease):
    """A lease that shows progress while it attaches, also when it does so again after the daemon's death, and only then."""

    def __init__(self, wish: dict[str, Any], keep_alive: float | None, display: Display) -> None:
        self._display = display
        super().__init__(wish, keep_alive, on_progress=display)

    def _attach(self) -> None:
        with self._display:  # however it ends, Ctrl-C among it: nothing may go on drawing over what comes next
            super()._attach()


def look() -> Any:
    """A `Conversation` that keeps nothing alive, or None if no daemon runs."""
    return sync.connect(start_daemon=False, lease=False)


def call(talk: Any, method: str, on_progress: Any = None, timeout: float | None = CALL_WAIT, **params: object) -> dict[str, Any]:
    """Asks the daemon one thing.  `timeout` None waits for as long as it takes."""
    try:
        answer = talk.ask("CALL", timeout, on_progress, method=method, params=params)
    except errors.LlmDaemonError:  # first: some of them are TimeoutErrors too
        raise
    except TimeoutError as e:
        raise errors.DaemonUnresponsive(
            f"the daemon (pid {talk.welcome['pid']}) did not answer within {timeout:g} s",
            hint="`llm-daemon doctor` looks for the cause",
        ) from e
    except OSError as e:
        raise errors.Unavailable(
            "the daemon ended before it answered",
            code="daemon_ended",
            hint="try again; `llm-daemon logs --daemon` may say why",
        ) from e
    result: dict[str, Any] = answer["result"]
    return result


def status() -> dict[str, Any] | None:
    """What `ps` shows, or None if no daemon runs; reading it wakes nobody."""
    talk = look()
    if talk is None:
        return None
    try:
        return call(talk, "status")
    finally:
        talk.close()


def resolve(model: str, settings: Settings | None = None, **options: object) -> Spec:
    """What a model's name means, found without the daemon.  Raises UsageError for a name nobody knows."""
    from ..config import Settings
    from ..models.catalog import Catalog
    from ..spec import Wish

    settings = settings or Settings.load()
    return Catalog.load(settings.catalog).resolve(Wish.of(**sync.wish(model, **options)))


def default_model() -> str:
    """The model of whoever names none."""
    from ..config import Settings

    return Settings.load().default_model


def wait_lost(lease: Any) -> None:
    """Returns when the daemon behind an attached lease is gone; costs nothing meanwhile."""
    talk = lease._talk
    if talk is None or talk.sock.fileno() < 0:
        return
    poll = select.poll()
    poll.register(talk.sock, 0)  # only POLLHUP and POLLERR, which are always reported: a message must not wake us
    poll.poll()


def stay(lease: Any, say: Callable[[str], None], over: threading.Event) -> None:
    """Attaches again whenever the daemon dies, until `over` is set, which comes before the lease is closed.

    After a failure, or a short life, it waits longer each time.
    """
    pause = PAUSE
    while not over.is_set():
        wait_lost(lease)
        if over.is_set():
            return
        say("the daemon has ended; attaching again")
        try:
            lease.refresh()
            say(f"attached again: {lease.base_url}")
            over.wait(pause)
            if lease.is_open():
                pause = PAUSE
                continue
        except (errors.LlmDaemonError, OSError) as e:
            say(f"cannot attach again, will try later: {e}")
            over.wait(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
