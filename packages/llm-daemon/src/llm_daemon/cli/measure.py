"""`engines --measure`: starts each engine that can run here, for as long as its hang-ups are measured."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .. import paths
from ..client.sync import Progress
from ..config import Settings
from ..daemon import hangup
from ..daemon.address import reserve
from ..daemon.logs import RotatingLog
from ..daemon.probe import wait_ready
from ..daemon.process import EngineProcess, scrubbed_env
from ..engines.base import Adapter, Grant, Location, Plan, usable_cores
from ..engines.registry import Registry
from ..errors import LlmDaemonError, UsageError
from ..models.fetch import fetch
from ..spec import Spec
from . import link, measured
from .progress import Display

PLACES = {"alone": 1, "beside": 2}  # slots: with one the request is alone, with two it is beside a stream
CONTEXT = 2048  # tokens for each; longer than anything that is measured
TIMES, NATURAL = 5, 4.0  # hang-ups of each kind, and seconds that a request lives if nobody stops it


def run(model: str, settings: Settings, quiet: bool) -> dict[str, LlmDaemonError]:
    """Measures one engine after the other and keeps each result; returns the failures by engine, none of which stops the others.

    Raises UsageError for an unknown model, or if no engine here takes it.  Ctrl-C ends what runs, and leaves nothing.
    """
    spec = link.resolve(model, settings)
    failed: dict[str, LlmDaemonError] = {}
    with Display(quiet) as display:
        path = str(asyncio.run(fetch(spec.artifact, Path(paths.cache_dir()), lambda info: display(Progress(info)))))
        for adapter, where in _able(Registry(settings.engines), path):
            try:
                asyncio.run(_Measuring(adapter, where, spec, path, settings, display).run())
            except LlmDaemonError as e:
                failed[adapter.name] = e
    return failed


def _able(registry: Registry, path: str) -> Iterator[tuple[Adapter, Location]]:
    refused = []
    for name in registry.names:
        adapter, where = registry.get(name), registry.locate(name)
        if reason := where.reason if not isinstance(where, Location) else adapter.accepts(path):
            refused.append(f"{name}: {reason}")
        elif isinstance(where, Location):
            yield adapter, where
    if len(refused) == len(registry.names):
        raise UsageError(f"no engine here can load {path} ({'; '.join(refused)})", code="bad_model")


class _Measuring:
    """One engine, started once for each of PLACES."""

    def __init__(
        self, adapter: Adapter, where: Location, spec: Spec, path: str, settings: Settings, say: Callable[[Progress], None]
    ) -> None:
        self._adapter, self._where, self._spec, self._path, self._settings = adapter, where, spec, path, settings
        self._say = say
        self._table = settings.engines.get(adapter.name, {})

    async def run(self) -> None:
        ways: dict[str, dict[str, Any]] = {kind: {} for kind in hangup.KINDS}
        for place, slots in PLACES.items():
            for kind, found in (await self._place(place, slots)).items():
                ways[kind][place] = found.to_json()
        program = {"engine": self._adapter.name, "version": self._where.version, "argv0": self._where.argv[0]}
        measured.save({**program, "model": self._spec.model, "at": time.time(), "ways": ways})

    async def _place(self, place: str, slots: int) -> dict[str, hangup.HangUps]:
        name = self._adapter.name
        generation = "measure-" + os.urandom(8).hex()
        where = {"alone": "alone", "beside": "beside a stream"}[place]
        self._tell(f"{name} starts")
        with reserve() as reserved, tempfile.TemporaryDirectory(prefix="llm-daemon-") as folder:
            plan = self._plan(slots, reserved.getsockname())
            log = RotatingLog(os.path.join(paths.log_dirs()[0], f"measure-{name}.log"))
            env = {str(k): str(v) for k, v in self._table.get("env", {}).items()}
            try:
                process = await EngineProcess.start(
                    plan, folder=os.path.join(folder, "e"), env={**scrubbed_env(os.environ, generation), **env}, log=log,
                    name=name, on_exit=lambda exit: None, reserved=reserved,
                )  # fmt: skip
                try:
                    await wait_ready(process, plan, self._adapter)
                    tell = lambda kind: self._tell(f"{name}: hang-ups, {kind}, {where}")  # noqa: E731
                    return await hangup.measure(process.socket, plan, times=TIMES, natural=NATURAL, on_step=tell)
                finally:
                    await process.stop(force=True)
            finally:
                log.close()

    def _plan(self, slots: int, place: tuple[str, int]) -> Plan:
        args = tuple(map(str, self._table.get("args", ())))
        if args and (reason := self._adapter.refuse(args)):
            raise UsageError(reason, code="bad_config")
        threads = min(self._settings.threads or usable_cores() - 1, usable_cores())
        grant = Grant(
            self._path, self._spec.model, "e.sock", CONTEXT, parallel=slots, threads=max(1, threads), args=args,
            host=place[0], port=place[1], key=os.urandom(16).hex(),
        )  # fmt: skip
        return self._adapter.plan(self._spec, self._where, grant)

    def _tell(self, text: str) -> None:
        self._say(Progress({"phase": text, "message": text}))
