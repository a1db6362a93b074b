"""How a client finds the one daemon, and how a candidate becomes it: what to do next after each thing that happened.

Pure: `client/start.py` and `daemon/boot.py` do what is said here, and `tests/test_lifecycle_twin.py` drives it beside
the exhaustive model.  Imported by every client, so it imports nothing that costs.
"""

from __future__ import annotations

from .. import errors

START_PATIENCE = 5.0  # seconds a busy START is respected: its holder may be stopped
FAILURES = 3  # starts that may fail in one call with a word about why
SPAWNS = 10  # starts in one call, failed or not: one that says READY and dies at once must not be started for ever
ELECTION = 10.0  # seconds a candidate waits for a holder of LIFE that neither answers nor goes
DOUBT = 1.0  # of them, until it looks whether somebody has stopped the holder

VANISHED = "daemon_vanished"  # code of the error for a candidate that said nothing: killed, most likely, and not by its own fault

# What to do next.
CONNECT, TAKE_START, SPAWN = "connect", "take START", "spawn"
ALREADY, WAIT, WAKE, WON, REOPEN, GIVE_UP = "already", "wait", "wake", "won", "reopen", "give up"


class Attempt:
    """One search for the daemon: connect, take START, connect again, spawn, and from the top.  Times are monotonic seconds.

    Begin with CONNECT; each method takes what came of the last step and returns the next one.  There is no step
    "done": only a WELCOME ends the search, and whoever reads it knows.  `pause` is the seconds to wait before the next
    step (up to that long, chosen by chance), and START is to be let go whenever `holds_start` is false.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.pause = 0.0
        self.holds_start = False  # or it was busy for so long that we go on without: it only throttles
        self.unresponsive: errors.DaemonUnresponsive | None = None
        self._busy_since: float | None = None
        self._failures = self._spawns = 0

    def down(self) -> str:
        """Nobody serves there.  With START in hand this was the second look: now, and only now, one is started."""
        return SPAWN if self.holds_start else TAKE_START

    def busy(self, error: errors.Unavailable) -> str:
        """It is there and leaves, or does not answer.  Never a reason to start another one."""
        if isinstance(error, errors.DaemonUnresponsive):
            self.unresponsive = error
        return self._again(0.02)

    def start_taken(self) -> str:
        """START is ours, or no lock can be had in that folder: the candidate says better why."""
        self.holds_start = True
        return CONNECT

    def start_busy(self, now: float) -> str:
        """Another client starts the daemon; after START_PATIENCE seconds we no longer believe it."""
        if self._busy_since is None:
            self._busy_since = now
        if now - self._busy_since > START_PATIENCE:
            return self.start_taken()
        return self._again(0.05)

    def start_gone(self) -> str:
        """The runtime folder was deleted between two steps."""
        return self._again(0.05)

    def verdict(self, error: errors.LlmDaemonError | None, words: str) -> str:
        """What the launcher reported: a hint, whatever it says.  `error` is None for READY and ALREADY.

        Raises `error` at once if only the caller can help, after FAILURES of them otherwise; Bug after SPAWNS starts, which
        is all that ends a row of candidates that VANISHED.
        """
        if words == "ALREADY":  # one served, and left before we came: nothing was started
            return self._again(0.02)
        self._spawns += 1
        if error is not None:
            self._failures += error.code != VANISHED
            if isinstance(error, errors.UsageError) or error.code == "port_taken" or self._failures >= FAILURES:
                raise error
        if self._spawns >= SPAWNS:
            raise errors.Bug(
                f"the daemon was started {self._spawns} times and never found (last report: {words})", code="daemon_start",
                hint="`llm-daemon logs --daemon` shows its last words; please report this",
            )  # fmt: skip
        return self._again(0.05 * self._spawns if self._spawns > 2 else 0.0)

    def check(self, now: float) -> None:
        """Called before each pause and each start.  Raises DaemonUnresponsive at the deadline."""
        if now >= self.deadline:
            raise self.unresponsive or errors.DaemonUnresponsive(
                "the daemon could not be reached in time", hint="`llm-daemon doctor` looks for the cause"
            )

    def _again(self, pause: float) -> str:
        self.holds_start, self.pause = False, pause
        return CONNECT


class Election:
    """A candidate's way to LIFE, the lock on the runtime folder."""

    def __init__(self, now: float) -> None:
        self.deadline = now + ELECTION
        self._doubt: float | None = now + DOUBT

    def busy(self, served: bool, now: float) -> str:
        """LIFE is held.  `served`: its holder answered a PING just now.

        If it did not, it is leaving, or stopped: never go away then, for the client that sent us would find nobody.  WAKE
        comes once, and is a WAIT with a SIGCONT.
        """
        if served:
            return ALREADY
        if self._doubt is not None and now > self._doubt:
            self._doubt = None
            return WAKE
        return GIVE_UP if now > self.deadline else WAIT

    def locked(self, same: bool) -> str:
        """LIFE is ours.  `same`: of the folder that the path still leads to; else we hold a deleted folder's."""
        return WON if same else REOPEN
