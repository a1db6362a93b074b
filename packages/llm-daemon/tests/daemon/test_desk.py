"""The desk's part in a replay."""

from __future__ import annotations

import asyncio
from time import monotonic
from types import SimpleNamespace
from typing import Any, cast

import pytest

from llm_daemon.core import events as ev
from llm_daemon.core.lanes import Ticket
from llm_daemon.daemon import desk as desk_module
from llm_daemon.daemon.desk import AT_ONCE, PUT_OFF, RECORD_AFTER, RECORD_WITHIN, DaemonDesk
from llm_daemon.daemon.turn import Ask, Turn
from llm_daemon.errors import EngineError


def test_a_request_that_is_run_again_keeps_its_deadline() -> None:
    posted: list[Any] = []
    instance = SimpleNamespace(id="i1", state=None)
    began = monotonic()
    daemon: Any = SimpleNamespace(
        machine=SimpleNamespace(tickets={"t": Ticket("t", "i1", "regular", arrived=began - 9.0)}, instances={"i1": instance}),
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
    assert began + 10.0 <= first.deadline <= monotonic() + 10.0
    assert began + 1.0 <= again.deadline <= monotonic() + 1.0


@pytest.mark.parametrize(
    ("ends", "now", "made"),
    [
        ([0.0], RECORD_AFTER, 1),
        ([0.0, 0.3], 0.3, 0),  # requests come: it is put off
        ([0.0, RECORD_WITHIN], RECORD_WITHIN, 2),  # but not for ever
        ([0.0] * PUT_OFF, 0.001, AT_ONCE),  # nor without end
        ([0.0] * 2 * AT_ONCE, 1.0, AT_ONCE),  # and a request that comes now does not wait for all of them
    ],
)
def test_records_are_made_when_nobody_asks(monkeypatch: pytest.MonkeyPatch, ends: list[float], now: float, made: int) -> None:
    clock = iter([*ends, now])
    monkeypatch.setattr(desk_module, "perf_counter", lambda: next(clock))
    recorded: list[float] = []
    monkeypatch.setattr(DaemonDesk, "_record", lambda self, exchange, ended: recorded.append(ended))

    async def main() -> None:
        desk = DaemonDesk(cast(Any, None))
        for _ in ends:
            desk.over(cast(Any, object()))
        desk._tell_some()
        assert recorded == ends[:made]
        desk.tell()
        assert recorded == ends

    asyncio.run(main())
