"""The desk's part in a replay."""

from __future__ import annotations

import asyncio
from time import monotonic
from types import SimpleNamespace
from typing import Any, cast

from llm_daemon.core import events as ev
from llm_daemon.core.lanes import Ticket
from llm_daemon.daemon.desk import DaemonDesk
from llm_daemon.daemon.turn import Ask, Turn
from llm_daemon.errors import EngineError


def test_a_request_that_is_run_again_keeps_its_deadline() -> None:
    posted: list[Any] = []
    instance = SimpleNamespace(id="i1", state=None)
    daemon: Any = SimpleNamespace(
        machine=SimpleNamespace(
            tickets={"t": Ticket("t", "i1", "regular", arrived=monotonic() - 9.0)}, instances={"i1": instance}
        ),
        supervisor=SimpleNamespace(live={}, is_ready=True, resolve=lambda model: SimpleNamespace(mode="generate", full=None)),
        post=posted.append,
    )

    async def main() -> None:
        desk, turn = DaemonDesk(daemon), cast(Turn, object())
        ask = Ask("t", "/v1/completions", "m", True, "tcp", deadline=10.0)
        desk.open(ask, turn)
        assert desk.lost(ask, turn, EngineError("gone"))
        await asyncio.gather(*desk._asking.values())

    asyncio.run(main())
    first, ended, again = posted
    assert isinstance(ended, ev.Ended)
    assert abs(first.deadline - monotonic() - 10.0) < 1.0
    assert abs(again.deadline - monotonic() - 1.0) < 0.9
