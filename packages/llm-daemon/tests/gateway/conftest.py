"""Each test of the gateway runs on the standard loop and on uvloop, with a deadline, and fails on errors the loop reports."""

from __future__ import annotations

import asyncio
import gc
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from .fakes import World

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(params=sorted(LOOPS))
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    """Runs a coroutine to its end."""

    def run(main: Coroutine[Any, Any, None]) -> None:
        complaints: list[dict[str, Any]] = []

        async def bounded() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
            async with asyncio.timeout(30):
                await main
            for _ in range(5):  # whoever was cancelled just now ends in one of the loop's next rounds
                await asyncio.sleep(0)
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, f"tasks left behind: {left}"

        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            runner.run(bounded())
            gc.collect(1)  # a task's unread error is told when the task is collected
        assert not complaints

    return run


@pytest.fixture
def world() -> Iterator[Callable[..., World]]:
    """Makes a gateway with options of its own, to be entered inside the loop; its sockets need a short path."""
    with tempfile.TemporaryDirectory(prefix="llmd-") as folder:
        yield lambda **options: World(Path(folder), **options)
