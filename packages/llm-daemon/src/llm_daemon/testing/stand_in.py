"""A process that stands in for the daemon, so that tests can kill it: starts one engine and waits for its own end.

Run as `python -m llm_daemon.testing.stand_in JSON`, keys `adapter` ("module:Class"), `config`, `model`, `folder`,
`generation`, `parallel`, `args`, `wait` (until ready), `leak` (a forked child keeps every file descriptor open), `box` (false: as
where there are no cgroups).
Prints `starting`, `started KEEPER ENGINE`, then `ready`.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

from ..daemon import cgroup
from ..daemon.address import reserve
from ..daemon.logs import RotatingLog
from ..daemon.probe import wait_ready
from ..daemon.process import EngineProcess, scrubbed_env
from ..engines.base import Adapter, Grant, Location
from ..engines.registry import configured
from ..spec import Artifact, Spec, Wish


def make_adapter(target: str, config: Mapping[str, Any]) -> Adapter:
    """The adapter "module:Class"; or the one called `target`, if `config` describes it by `command`."""
    adapter = configured(target, config if "command" in config else {"adapter": target})
    assert adapter is not None
    return adapter


async def serve(task: dict[str, Any]) -> None:
    adapter = make_adapter(task["adapter"], task.get("config", {}))
    where = adapter.locate(task.get("config", {}))
    assert isinstance(where, Location), where
    model = task["model"]
    reserved = reserve()
    host, port = reserved.getsockname()
    parallel = task.get("parallel", 1)
    grant = Grant(
        model, "stand-in", "e.sock", 512, parallel, threads=1, args=tuple(task.get("args", ())), host=host, port=port,
        key=os.urandom(16).hex(),
    )  # fmt: skip
    plan = adapter.plan(Spec(Wish(model), Artifact("file", model, model)), where, grant)
    if not task.get("box", True):
        cgroup.home = lambda: None  # type: ignore[assignment]
    print("starting", flush=True)
    process = await EngineProcess.start(
        plan,
        folder=task["folder"],
        env=scrubbed_env(os.environ, task["generation"]),
        log=RotatingLog(task["folder"] + ".log"),
        name=adapter.name,
        on_exit=lambda exit: print("exit", exit, flush=True),
        reserved=reserved,
    )
    if task.get("leak") and os.fork() == 0:  # as a careless library would: a copy of every file descriptor lives on
        signal.pause()
    print("started", process.keeper_pid, process.pid, flush=True)
    if task.get("wait", True):
        await wait_ready(process, plan, adapter)
        print("ready", flush=True)
    await process.wait()


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))
