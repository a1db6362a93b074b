"""A process that stands in for the daemon, so that tests can kill it: starts one engine and waits for its own end.

Run as `python -m llm_daemon.testing.stand_in JSON`, keys `adapter` ("module:Class"), `config`, `model`, `folder`,
`generation`, `parallel`, `wait` (until ready), `leak` (a forked child keeps every file descriptor open), `box` (false: as
where there are no cgroups).
Prints `starting`, `started KEEPER ENGINE`, then `ready`.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import signal
import sys
from typing import Any

from ..daemon import cgroup
from ..daemon.logs import RotatingLog
from ..daemon.probe import wait_ready
from ..daemon.process import EngineProcess, scrubbed_env
from ..engines.base import Grant, Location
from ..spec import Artifact, Spec, Wish


async def serve(task: dict[str, Any]) -> None:
    module, _, name = task["adapter"].partition(":")
    adapter = getattr(importlib.import_module(module), name)()
    where = adapter.locate(task.get("config", {}))
    assert isinstance(where, Location), where
    model = task["model"]
    grant = Grant(model, "stand-in", "e.sock", context=512, parallel=task.get("parallel", 1), threads=1)
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
