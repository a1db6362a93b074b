"""How long an engine has shown no sign of life: slow is not stuck, and a slept-through hour is no silence."""

from __future__ import annotations

from dataclasses import dataclass

MUTE = 30  # times `stall` an engine may compute without a word; at the usual 120 s an hour, for a long answer in one piece


@dataclass(slots=True)
class Silence:
    """Counted in looks, `step` seconds apart.  Words are bytes of an answer or of the log; work is CPU time and disk reads.

    `still` is how long there was neither, `mute` how long there was no word (both seconds).  `looked` is the monotonic
    time of the last look.
    """

    stall: float
    looked: float
    still: float = 0.0
    mute: float = 0.0

    @property
    def step(self) -> float:
        """Seconds between two looks."""
        return min(5.0, self.stall / 4)

    def begin(self, now: float) -> None:
        """Goes on after a pause in which nothing was expected of the engine: it does not count."""
        self.looked = now

    def heard(self) -> None:
        """It spoke."""
        self.still = self.mute = 0.0

    def look(self, now: float, words: bool, works: bool) -> None:
        """What there was since the last look.  A look that comes late, because we were stopped or slept, counts as one step."""
        passed = min(now - self.looked, 2 * self.step)
        self.looked = now
        self.mute = 0.0 if words else self.mute + passed
        self.still = 0.0 if words or works else self.still + passed

    @property
    def verdict(self) -> str | None:
        """Why it counts as hung; None while it does not.

        >>> silence = Silence(stall=20, looked=0)
        >>> for now in (5, 10, 15):
        ...     silence.look(now, words=False, works=False)
        >>> silence.verdict, silence.still
        (None, 15.0)
        >>> silence.look(3600, words=False, works=False)  # the machine slept
        >>> silence.verdict
        'no sign of life for 25 s'
        """
        if self.still >= self.stall:
            return f"no sign of life for {self.still:.3g} s"
        if self.mute >= MUTE * self.stall:
            return f"it computes without a word for {self.mute:.3g} s"
        return None
