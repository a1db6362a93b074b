"""How fast a model was so far: learned from what was served, to refuse at once what cannot be in time."""

from __future__ import annotations

import msgspec

NEW_WEIGHT = 0.2  # of the newest measurement in the mean: the last ten or so count
DOUBT = 0.9  # what is left of a load time after each refusal because of it


class Pace(msgspec.Struct, eq=False):
    """Seconds that one spec took: to `load`, and to serve one request.  None until measured.  `slots` as last seen.

    Both are guesses on the low side where they can be: to refuse somebody who would have been served is worse than to
    let somebody wait who is not.
    """

    load: float | None = None
    service: float | None = None
    slots: int = 1

    def note_load(self, seconds: float) -> None:
        """A faster load is believed at once, a slower one little by little: the first one reads a cold disk."""
        self.load = seconds if self.load is None else min(seconds, _mean(self.load, seconds))

    def note_service(self, seconds: float) -> None:
        self.service = seconds if self.service is None else _mean(self.service, seconds)

    def doubt_load(self) -> None:
        """Somebody was refused because loading takes too long.

        Without a load nothing is measured, so that a wrong time would refuse for ever.
        """
        if self.load is not None:
            self.load *= DOUBT

    def wait(self, ahead: int, running: list[float]) -> float:
        """Seconds until a slot is free for somebody with `ahead` others before him; 0 as long as nothing was measured.

        `running`: for each taken slot, the seconds it has been so.
        """
        if self.service is None:
            return 0.0
        left = sorted([0.0] * (self.slots - len(running)) + [max(0.0, self.service - seconds) for seconds in running])
        rounds, slot = divmod(ahead, self.slots)
        return left[slot] + rounds * self.service


def _mean(old: float, new: float) -> float:
    return old + NEW_WEIGHT * (new - old)
