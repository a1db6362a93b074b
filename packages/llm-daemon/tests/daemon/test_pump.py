"""The pump's timer, with a machine that only says what is due."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, cast

from llm_daemon.core import events as ev
from llm_daemon.daemon.pump import Pump
from llm_daemon.spec import Artifact, Spec, Wish

SPEC = Spec(Wish("m"), Artifact("file", "m", "m"))


@dataclass
class Due:
    """`Ended` makes something due at once; a request that came runs."""

    wake_at: float | None = 1000.0
    seen: list[str] = field(default_factory=list)

    def handle(self, event: ev.Event, now: float) -> list[ev.Command]:
        self.seen.append(type(event).__name__)
        if isinstance(event, ev.Ended):
            self.wake_at = 0.0
        return [ev.Run(event.ticket, "i1")] if isinstance(event, ev.Arrived) else []


def test_what_comes_of_a_request_is_waited_for_too() -> None:
    """An engine that died in this very moment: the ticket ends inside the command that should have run it."""

    async def main() -> None:
        machine, ticked = Due(), asyncio.Event()

        def do(command: ev.Command) -> None:
            pump.post(ev.Ended("t1"))

        def saw(event: ev.Event, commands: list[ev.Command], now: float) -> None:
            if isinstance(event, ev.Tick):
                machine.wake_at = None
                ticked.set()

        pump = Pump(cast(Any, machine), do, now=lambda: 0.0, saw=saw)
        pump.post(ev.Joined("l1"))  # a timer far away
        pump.post(ev.Arrived("t1", SPEC))
        await asyncio.wait_for(ticked.wait(), 5)
        assert machine.seen == ["Joined", "Arrived", "Ended", "Tick"]

    asyncio.run(main())
