"""Runs a suite: every target, launch after launch, trial after trial, into a session's folder; resumes what was cut short."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec

from llm_daemon.errors import LlmDaemonError

from . import plan, servers
from .artifacts import Finder, Weights, drop_from_page_cache
from .machine import conditions
from .meter import memory_mib, tree
from .plan import Job, Visit
from .records import Conditions, Launch, Reached, Resources, Session, Trial
from .results import Writer
from .servers import NotReady, Server
from .suite import Suite, Target
from .trial import Bench, first_token, slot_free

FAILURES = 2  # launches in a row that never got ready, until a target is given up
DEATHS = 3  # in one launch
DYING_S = 1.0  # for a server that broke a connection off to be seen dead


class Watcher(Protocol):
    """Who looks on.  Called from the runner's thread."""

    def planned(self, left: dict[str, int]) -> None:
        """Trials still to be run, by target."""

    def doing(self, target: str, what: str) -> None: ...

    def did(self, target: str, what: str) -> None:
        """A trial is on the disk."""

    def problem(self, target: str, what: str) -> None:
        """One line about what went wrong; others go on."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A target whose weights and program were found.  `identity`: what its keys are made of."""

    target: Target
    weights: Weights
    version: str

    @property
    def identity(self) -> str:
        sha = self.weights.artifact.sha256 if self.weights.artifact else ""
        return plan.digest(self.target.id, sha, self.version)


def prepare(suite: Suite, finder: Finder, problem: Callable[[str, str], None]) -> dict[str, Ready]:
    """The targets that can be run, by id; what is wrong with the others is told."""
    out: dict[str, Ready] = {}
    for target in suite.targets:
        try:
            weights = finder.find(target)
            out[target.id] = Ready(target, weights, servers.version(target, weights))
        except LlmDaemonError as e:
            problem(target.id, e.message + (f" ({e.hint})" if e.hint else ""))
        except OSError as e:
            problem(target.id, f"{e.filename or target.artifact}: {e.strerror}")
    return out


@dataclass(slots=True)
class Summary:
    """`trials` were run now, `kept` were there before; `lost` targets with their reasons; `out_of_time`: no time left."""

    trials: int = 0
    kept: int = 0
    errors: int = 0
    lost: dict[str, str] = field(default_factory=dict)
    out_of_time: bool = False


@dataclass(slots=True)
class Up:
    """A server that runs now."""

    server: Server
    at: float
    env: Conditions
    warm: bool = False


class Runner:
    """One run of a session.  `run` may be called once."""

    def __init__(self, suite: Suite, session: Session, ready: dict[str, Ready], writer: Writer, watcher: Watcher) -> None:
        self.suite, self.session, self.ready, self.writer, self.watcher = suite, session, ready, writer, watcher
        self.seed = session.seed or 0
        self.summary = Summary()
        self._up: dict[str, Up] = {}
        self._failures: dict[str, int] = {}
        self._deaths: dict[tuple[str, int], int] = {}
        minutes = suite.table.max_minutes
        self._until = None if minutes is None else time.monotonic() + 60 * minutes
        logs = Path(writer.folder) / "logs"
        logs.mkdir(exist_ok=True)
        self._starter = servers.Starter(suite, logs)

    def run(self) -> Summary:
        """Everything that is not on the disk yet.  Raises MachineError when results cannot be written; no server is left then."""
        self.watcher.planned({name: sum(1 for _ in self._missing(name)) for name in self.ready})
        self.summary.kept = sum(plan.total(self.suite, r.target) for r in self.ready.values()) - sum(
            1 for name in self.ready for _ in self._missing(name)
        )
        servers.sweep()
        with ExitStack() as stack:
            if any(r.target.server.via == "daemon" for r in self.ready.values()):
                stack.enter_context(servers.own_daemon())
            stack.callback(self._stop_all)
            for group in plan.visits(self.suite, self.seed):
                for visit in group:
                    if visit.target.id not in self.ready or visit.target.id in self.summary.lost:
                        continue
                    if self._late():
                        return self.summary
                    try:
                        self._visit(visit)
                    except NotReady as e:
                        self._not_ready(visit, e)
                self._stop_all()
        for name in () if self.summary.out_of_time else self.ready:
            if name not in self.summary.lost and (left := sum(1 for _ in self._missing(name))):
                self.summary.lost[name] = f"{left} of its trials could not be held"
        return self.summary

    def _late(self) -> bool:
        self.summary.out_of_time = self._until is not None and time.monotonic() > self._until
        return self.summary.out_of_time

    def _missing(self, name: str) -> Iterator[Job]:
        identity, done = self.ready[name].identity, self.writer.done
        for group in plan.visits(self.suite, self.seed):
            for visit in group:
                if visit.target.id == name:
                    cold = plan.cold_starts(self.suite, visit) if visit.first == 1 else []
                    yield from (j for j in [*cold, *plan.jobs(self.suite, visit, self.seed)] if j.key(identity) not in done)

    # One visit --------------------------------------------------------------------------------------------------------

    def _visit(self, visit: Visit) -> None:
        ready = self.ready[visit.target.id]

        def fresh(job: Job) -> bool:
            return job.key(ready.identity) not in self.writer.done

        cold = plan.cold_starts(self.suite, visit) if visit.first == 1 else []
        todo = [job for job in plan.jobs(self.suite, visit, self.seed) if fresh(job)]
        for start, job in enumerate(cold, 1):
            # A run may have been killed between a trial and the record of its launch.
            if (fresh(job) or not self._launched(visit, start)) and not self._over(visit):
                self._stop(visit.target.id)
                self._cold_start(visit, start, job)
                if start < len(cold):
                    self._stop(visit.target.id)
        for job in todo:
            up = self._warm(visit, len(cold) or 1)
            if up is None:
                return
            self._trial(visit, up, job)

    def _warm(self, visit: Visit, start: int) -> Up | None:
        """The target's server, started and warmed up if need be; None if there is no more to do here.  Raises NotReady."""
        while not self._over(visit):
            up = self._up.get(visit.target.id) or self._bring_up(visit, start)
            if not up.warm:
                self._warm_up(visit, up)
            if self._up.get(visit.target.id) is up:  # else it died over that
                return up
        return None

    def _over(self, visit: Visit) -> bool:
        return visit.target.id in self.summary.lost or self._late()

    def _start(self, visit: Visit) -> Up:
        """Raises NotReady."""
        target, weights = visit.target, self.ready[visit.target.id].weights
        self.watcher.doing(target.id, f"launch {visit.launch}")
        if self.suite.table.page_cache == "drop" and weights.path:
            with suppress(OSError):
                drop_from_page_cache(weights.path)
        time.sleep(self.suite.table.cool_down_s)
        at, env = time.time(), conditions()
        up = self._up[target.id] = Up(self._starter.start(target, weights), at, env)
        self._failures[target.id] = 0
        return up

    def _bring_up(self, visit: Visit, start: int) -> Up:
        """Starts the server with a short first request of our own.  Raises NotReady."""
        up = self._start(visit)
        if not self._launched(visit, start):
            up.server.cp["first_token"], error = first_token(Bench(self.suite, visit.target, up.server))
            self._launch(visit, up, start, None, error)
        return up

    def _cold_start(self, visit: Visit, start: int, job: Job) -> None:
        """Starts the server with a case as its first request.  Raises NotReady."""
        up = self._start(visit)
        part = self._trial(visit, up, job)[0]
        if self._up.get(visit.target.id) is not up:
            return  # it died over it
        since, ms = part.since_spawn_ms, part.t_ms.get("first_token")
        if since is not None:
            up.server.cp["first_token"] = Reached(ms=None, censored_ms=since) if ms is None else Reached(ms=round(since + ms, 3))
        if not self._launched(visit, start):
            self._launch(visit, up, start, job.case.id, part.error)

    def _launched(self, visit: Visit, start: int) -> bool:
        return self._launch_key(visit, start) in self.writer.done

    def _launch_key(self, visit: Visit, start: int) -> str:
        return plan.launch_key(self.ready[visit.target.id].identity, visit.launch, start)

    def _launch(self, visit: Visit, up: Up, start: int, first: str | None, error: str | None) -> None:
        """Measures a hang-up, and records the launch."""
        server = up.server
        server.cp["slot_free"] = slot_free(Bench(self.suite, visit.target, server))
        gone = server.gone(DYING_S if server.cp["slot_free"].ms is None else 0.0)
        if gone is not None:
            error = f"the server died after a hang-up ({gone})"
        rss, pss = memory_mib(tree(server.pids()))
        self.writer.launch(
            Launch(
                **self._names(visit),
                key=self._launch_key(visit, start),
                start=start,
                process=server.name,
                first=first,
                at=up.at,
                argv=server.argv,
                cp=dict(server.cp),
                res=Resources(rss_mib=rss, pss_mib=pss),
                env=up.env,
                error=error,
            )
        )
        if gone is not None:
            self._died(visit, gone, "a hang-up")

    def _names(self, visit: Visit) -> dict[str, Any]:
        """The fields that trials and launches share."""
        target, ready = visit.target, self.ready[visit.target.id]
        server = next(t.server for t in self.session.targets if t.id == target.id)
        return {
            "session": self.session.id, "target": target.id, "server": msgspec.structs.replace(server, version=ready.version),
            "via": target.server.via, "model": target.model.id, "params": target.model.params, "quant": target.quant,
            "launch": visit.launch, "round": visit.round,
        }  # fmt: skip

    def _warm_up(self, visit: Visit, up: Up) -> None:
        """Every case once (or as the suite says) with another text; recorded unless a run before has."""
        up.warm = True
        for job in plan.warmups(self.suite, visit):
            if self._up.get(visit.target.id) is not up or self._over(visit):
                return
            self._trial(visit, up, job)

    def _trial(self, visit: Visit, up: Up, job: Job) -> list[Trial]:
        """Runs and records one (unless it is on the disk already); a server that died over it is put away."""
        target = visit.target
        self.watcher.doing(target.id, f"launch {visit.launch}, {'warm-up' if job.warmup else job.case.id} {job.repeat}")
        key = job.key(self.ready[target.id].identity)
        record = Trial(**self._names(visit), key=key, case=job.case.id, repeat=job.repeat, cache=job.cache, warmup=job.warmup)
        parts, streams = Bench(self.suite, target, up.server).run(job.case, record, job.cache)
        gone = up.server.gone(DYING_S) if any(p.finish == "broken" for p in parts) else None
        if gone is not None:
            parts = [msgspec.structs.replace(p, error=f"the server died ({gone}): {p.error}") if p.error else p for p in parts]
        new = key not in self.writer.done
        if new:
            self.writer.trial(parts, streams)
        if new and not job.warmup:
            self.summary.trials += 1
            self.summary.errors += any(p.error for p in parts)
            self.watcher.did(target.id, f"{job.case.id} {job.repeat}")
        if gone is not None:
            self._died(visit, gone, job.case.id)
        return parts

    # What goes wrong --------------------------------------------------------------------------------------------------

    def _died(self, visit: Visit, how: str, over: str) -> None:
        name = visit.target.id
        self._stop(name)
        deaths = self._deaths[name, visit.launch] = self._deaths.get((name, visit.launch), 0) + 1
        self.watcher.problem(name, f"the server died over {over} ({how}); it is started again")
        if deaths >= DEATHS:
            self._lose(name, f"its server died {deaths} times in launch {visit.launch}, last {how}")

    def _not_ready(self, visit: Visit, error: NotReady) -> None:
        name = visit.target.id
        self._stop(name)
        failures = self._failures[name] = self._failures.get(name, 0) + 1
        nonce = plan.digest(self.session.id, name, visit.launch, time.time())
        self.writer.launch(
            Launch(
                **self._names(visit),
                key=f"failed-{nonce}",
                at=time.time(),
                argv=error.argv,
                cp=error.cp,
                error=str(error),
                last_words=error.words[-2000:],
            )
        )
        said = error.words.splitlines()[-1:] or [""]
        self.watcher.problem(name, f"launch {visit.launch}: {error}" + (f"; it said: {said[0][:200]}" if said[0] else ""))
        if failures >= FAILURES:
            self._lose(name, str(error))

    def _lose(self, name: str, why: str) -> None:
        if name not in self.summary.lost:
            self.summary.lost[name] = why
            self.watcher.problem(name, "given up")

    def _stop(self, name: str) -> None:
        if (up := self._up.pop(name, None)) is not None:
            up.server.stop()

    def _stop_all(self) -> None:
        for name in list(self._up):
            self._stop(name)
