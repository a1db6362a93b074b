"""Starts, watches and stops instances: the hands of the core's Start and Halt."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from .. import errors, paths
from ..config import Settings
from ..core.events import Down, Event, Progressed, Up, Weighed
from ..engines.base import ADDRESS, Adapter, Grant, Location, Plan, Tcp, usable_cores
from ..engines.registry import Registry
from ..models.catalog import Catalog
from ..models.engine import owner, split as own_model
from ..models.fetch import fetch
from ..models.store import Store
from ..models.templates import described
from ..spec import Artifact, Extra, Spec, Wish
from .address import TRIES, reserve
from .logs import RotatingLog
from .memory import Memory, peak_bytes, room
from .probe import UNPROBED, Pulse, ask, wait_ready
from .process import EngineProcess, Exit, scrubbed_env
from .prompts import PromptCache, identity

if TYPE_CHECKING:
    from .upstream import Pool

log = logging.getLogger("llm_daemon")
SOCKET = "engine.sock"
KEEPER_DEATHS = 8  # in one start, before we say so: whoever kills keepers, it is no fault of the engine's
LAST_REQUEST = 1.0  # seconds, see engines.base.Stop
LOOK_AGAIN = 10.0  # seconds between two looks at what an engine in use takes of the memory
RESOLVED, RESOLVED_FOR = 256, 5.0  # wishes remembered, and seconds for which a name keeps its meaning


@dataclass(slots=True)
class Live:
    """What the shell knows of one instance's process, for routing and for `ps`."""

    spec: Spec
    model: str  # of the spec; each request asks for it
    engine: str = ""
    version: str = ""
    log_path: str = ""
    context: int | None = None
    plan: Plan | None = None
    process: EngineProcess | None = None
    pulse: Pulse | None = None  # as long as it is expected to do something
    watch: asyncio.Task[None] | None = None  # while requests run
    hung: errors.EngineTimeout | None = None  # why it is being killed
    progress: dict[str, Any] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None  # its start
    stop: asyncio.Task[None] | None = None
    log: RotatingLog | None = None
    folder: str = ""
    prompts: str | None = None  # folder of what its conversations left
    reserved: socket.socket | None = None  # a port, until its process takes it over
    peak: int | None = None  # bytes that it took at most, as far as seen
    looked: float = 0.0  # when that was
    ending: bool = False  # a failed or abandoned start clears up: too late to cancel it


class Supervisor:
    """One for the daemon; used on the loop's thread only.  Reports Up, Down and Progressed through `post`."""

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        registry: Registry,
        generation: str,
        log_dir: str,
        post: Callable[[Event], None],
    ) -> None:
        self.settings = settings
        self.catalog = catalog
        self.live: dict[str, Live] = {}
        self.memory = Memory(settings, registry)
        self.registry = registry
        self._generation = generation
        self._log_dir = log_dir
        self._post = post
        self._locating: asyncio.Task[None] | None = None
        self._starts = 0
        self.prompts = PromptCache(os.path.join(paths.state_dir(), "prompts"), settings.prompt_cache_limit)
        self._tasks: set[asyncio.Task[None]] = set()
        self._resolved: dict[Wish | str, tuple[Spec, float]] = {}
        self.spawned = asyncio.Event()  # an engine process was started, for the first time

    # What is asked for ----------------------------------------------------------------------------------------
    async def ready(self) -> None:
        """Engines are located; done once, in a worker thread, for it may run `--version` of something."""
        if self._locating is None:
            self._locating = asyncio.create_task(asyncio.to_thread(self._locate))
        await asyncio.shield(self._locating)

    @property
    def is_ready(self) -> bool:
        return self._locating is not None and self._locating.done()

    def _locate(self) -> None:
        for name in self.registry.names:
            try:
                self.registry.locate(name)
            except Exception:  # whoever wishes for this one will hear of it
                log.exception("looking for %s failed", name)
        self.prompts.trim()

    def resolve(self, wish: Wish | str) -> Spec:
        """The spec of a wish or of its text, with its open options decided.  Call `ready` first.

        Raises UsageError for an unknown model or engine, EngineError when no engine can run it here.
        """
        # Asked for every request.  A name means the same for a while; a file may soon be another one.
        spec, until = self._resolved.get(wish, (None, 0.0))
        if spec is None or monotonic() > until:
            spec = self._resolve(Wish.parse(wish) if isinstance(wish, str) else wish)
            if len(self._resolved) >= RESOLVED:
                self._resolved.clear()
            self._resolved[wish] = spec, monotonic() + (0.5 if spec.artifact.source == "file" else RESOLVED_FOR)
        return spec

    def _resolve(self, wish: Wish) -> Spec:
        spec = self.catalog.resolve(wish)
        wish = spec.wish
        path = spec.artifact.locator if spec.artifact.source == "file" else self._stored_folder(spec.artifact)
        engine = wish.engine or self.settings.default_engine
        if spec.artifact.source == "engine":
            path = own_model(spec.artifact.locator)[1]
        if only := owner(spec.artifact):
            if wish.engine not in (None, only):
                raise errors.UsageError(
                    f"{wish.model} is for the engine {only} alone: {wish.engine} cannot load it",
                    code="bad_spec", hint=f"leave engine out, or ask for {only}",
                )  # fmt: skip
            engine = only
        adapter, _ = self.registry.choose(path, engine, spec.special, asks=False)
        for args, code in ((wish.args, "bad_args"), (self.configured(adapter.name), "bad_config")):
            if args and (reason := adapter.refuse(args)):
                raise errors.UsageError(reason, code=code)
        full = replace(
            wish,
            engine=adapter.name,
            context=wish.context or self.settings.context,
            parallel=wish.parallel or self.settings.parallel,
        )
        return replace(spec, full=full)

    def _stored_folder(self, artifact: Artifact) -> str | None:
        """A fetched model that is a folder: few engines take one, and until it is here nobody knows that it is one."""
        path = Store(Path(paths.cache_dir())).path(artifact)
        return str(path) if path is not None and path.is_dir() else None

    def configured(self, engine: str) -> tuple[str, ...]:
        """Extra flags from `[engines.NAME] args`."""
        return tuple(map(str, self.settings.engines.get(engine, {}).get("args", ())))

    # Memory ---------------------------------------------------------------------------------------------------
    def weigh(self, instance: str, spec: Spec) -> None:
        """Finds out what an engine for `spec` needs; Weighed follows."""
        self._spawn(self._weigh(instance, spec))

    def _spawn(self, job: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _weigh(self, instance: str, spec: Spec) -> None:
        need = 0
        try:
            need = (await asyncio.to_thread(self.memory.weigh, spec)).need
        except errors.LlmDaemonError:
            pass  # a bad file, no engine: its start will say so
        except Exception:
            log.exception("weighing %s failed", spec.model)
        self._post(Weighed(instance, need))

    async def _look(self, instance: str, live: Live, is_over: bool = False) -> None:
        """What its engine took until now is learned, and counts from now on."""
        process = live.process
        if process is None or process.exit is not None:
            return
        live.looked = monotonic()
        try:
            found = await asyncio.to_thread(self._learn, live.spec, process.pid, is_over)
        except Exception:
            log.exception("looking at the memory of %s failed", live.spec.model)
            return
        if found is not None and live.process is process:
            live.peak = max(live.peak or 0, found)
            if not is_over:
                self._post(Weighed(instance, live.peak))

    def _learn(self, spec: Spec, pid: int, is_over: bool) -> int | None:
        peak = peak_bytes(pid)
        if peak is not None:
            self.memory.learn(spec, peak, is_over)
        return peak

    # Start ----------------------------------------------------------------------------------------------------
    def start(self, instance: str, spec: Spec) -> None:
        """Begins to start an engine; Up or Down follows."""
        live = self.live[instance] = Live(spec, spec.model)
        live.task = asyncio.create_task(self._start(instance, live))

    async def _start(self, instance: str, live: Live) -> None:
        error: errors.LlmDaemonError | None = None
        try:
            for attempt in range(1, KEEPER_DEATHS + 1):  # whatever comes of it, Up or Down is said in the end
                try:
                    await self._bring_up(instance, live)
                    break
                except errors.EngineError as e:
                    on_tcp = live.plan is not None and isinstance(live.plan.address, Tcp)
                    patience = {"keeper_died": KEEPER_DEATHS, "prompts_deadly": 2, ADDRESS: TRIES if on_tcp else 1}
                    if attempt >= patience.get(e.code, 1):
                        raise
                    log.warning("%s starts again: %s", instance, e)
                    if live.process is not None:  # another has its port, and it may still run
                        live.process.kill_now()
                        await live.process.wait()
                    live.process = None
                    self._cleared(live)
        except asyncio.CancelledError:
            pass  # Halt: nobody waits for this start any more
        except errors.LlmDaemonError as e:
            error = e
        except Exception as e:
            log.exception("start of %s failed", instance)
            error = errors.Bug(f"starting {instance} failed: {e!r}", hint="please report this")
        else:
            assert live.plan is not None
            log.info("%s is ready: %s, pid %s", instance, live.engine, live.process and live.process.pid)
            self._post(Up(instance, live.plan.slots))
            self._spawn(self._look(instance, live))
            return
        live.ending = True
        process, live.process = live.process, None
        if process is not None:
            process.kill_now()
            await process.wait()  # never raises, and nobody cancels us any more
        if error is not None:
            log.warning("%s did not start: %s", instance, error)
            if live.log_path:
                error.data.setdefault("log", live.log_path)
        self._cleared(live)
        self._post(Down(instance, error.to_wire() if error else None))

    async def _bring_up(self, instance: str, live: Live) -> None:
        def progress(info: Mapping[str, Any]) -> None:
            live.progress = dict(info)
            self._post(Progressed(instance, live.progress))

        path, beside, adapter, where = await self._fetched(live, progress)
        spec = live.spec
        if self.memory.budget is None:
            await asyncio.to_thread(self.memory.check, spec, str(path))
        else:  # known better now, if it had to be fetched; if there is no place for it, this is where we are cancelled
            self._post(Weighed(instance, (await asyncio.to_thread(self.memory.weigh, spec)).need))
            await asyncio.sleep(0)
        await self._prepared(live, str(path), beside, adapter, where)
        assert live.plan is not None and live.log is not None
        progress({"phase": "load", "message": f"{live.engine} loads {spec.model}"})
        await self._spawned(instance, live, live.plan, live.log)
        assert live.process is not None
        live.pulse = Pulse(live.process, live.plan.stall)
        said = lambda state: progress({"phase": "load", "message": state})  # noqa: E731
        await wait_ready(live.process, live.plan, adapter, said, live.pulse)
        restoring = live.plan.saved_slots > 0 and self.prompts.holds(live.prompts)
        if restoring:
            await self.prompts.restore(live.process, str(live.prompts), spec.model)
        if live.process.exit is not None:  # it answered and died before we were told
            code = "keeper_died" if live.process.lost_keeper else "prompts_deadly" if restoring else "engine_died"
            raise errors.EngineError(f"{live.engine} died right after loading {spec.model} ({live.process.exit})", code=code)

    async def _fetched(
        self, live: Live, progress: Callable[[Mapping[str, Any]], None]
    ) -> tuple[Path | str, list[tuple[Extra, str]], Adapter, Location]:
        """Where its weights and what is loaded beside them are, now that they are here, and what loads them."""
        spec = live.spec
        full = spec.full or spec.wish
        root = Path(paths.cache_dir())
        path: Path | str
        if spec.artifact.source == "engine":
            path = own_model(spec.artifact.locator)[1]
        else:
            path = await fetch(spec.artifact, root, progress)
        beside = [(extra, str(await fetch(extra.artifact, root, progress))) for extra in spec.extras]
        wanted = full.engine
        if os.path.isdir(path):  # what it is was not known when its engine was chosen
            wanted = owner(spec.artifact) or spec.wish.engine or self.settings.default_engine
        adapter, where = await asyncio.to_thread(self.registry.choose, str(path), wanted, spec.special)
        if adapter.name != full.engine:
            live.spec = replace(spec, full=replace(full, engine=adapter.name))
        about = await asyncio.to_thread(described, spec.artifact, Path(path))
        if about.get("template_changed"):
            log.warning("%s: its chat template is not the one it was: `llm-daemon models show --template`", spec.model)
        return path, beside, adapter, where

    async def _prepared(self, live: Live, path: str, beside: list[tuple[Extra, str]], adapter: Adapter, where: Location) -> None:
        """Its address, its plan and its log."""
        spec, name = live.spec, adapter.name
        full = spec.full or spec.wish
        context, parallel, _ = await asyncio.to_thread(room, self.settings, spec, path)
        live.reserved = reserve()
        host, port = live.reserved.getsockname()
        grant = Grant(
            model_path=path, alias=spec.model, socket=SOCKET, context=context,
            parallel=parallel, threads=self.threads(), gpu_layers=full.gpu_layers,
            args=(*self.configured(name), *full.args), host=host, port=port, key=os.urandom(16).hex(),
            mode=spec.mode, **loaded_beside(beside),
        )  # fmt: skip
        live.prompts = await asyncio.to_thread(self._prompts, [path, *(p for _, p in beside)], full, where, grant)
        grant = replace(grant, prompts=live.prompts)
        live.plan = adapter.plan(spec, where, grant)
        live.engine, live.version, live.context = name, where.version, context
        live.log_path = paths.engine_log(self._log_dir, spec.model)
        live.log = RotatingLog(live.log_path)

    async def _spawned(self, instance: str, live: Live, plan: Plan, log_file: RotatingLog) -> None:
        """Its process runs."""
        name, spec = live.engine, live.spec
        user_env = {str(k): str(v) for k, v in self.settings.engines.get(name, {}).get("env", {}).items()}
        self._starts += 1
        # Relative to the runtime folder, our working folder: if that was deleted this fails, and never meets our successor's.
        live.folder = os.path.join(f"g-{self._generation}", f"{instance}-{self._starts}")
        log.info("%s starts: %s", instance, " ".join(plan.argv))
        try:
            async with asyncio.timeout(plan.stall):
                live.process = await EngineProcess.start(
                    plan, folder=live.folder, env={**scrubbed_env(os.environ, self._generation), **user_env},
                    log=log_file, name=spec.model, on_exit=lambda exit: self._exited(instance, live, exit),
                    reserved=live.reserved,
                )  # fmt: skip
        except TimeoutError:  # its keeper was stopped, or its program's disk hangs
            raise errors.EngineTimeout(
                f"{name} did not begin to run within {plan.stall:g} s", hint="is its disk there?"
            ) from None
        self.spawned.set()

    def _prompts(self, files: list[str], full: Wish, where: Location, grant: Grant) -> str | None:
        """The folder for what its conversations leave, by everything that decides what that means."""
        about = [full.engine, where.version, grant.context, grant.parallel, full.gpu_layers, grant.mode, grant.lora, grant.args]
        return self.prompts.folder(identity(files, where.argv[0], {"options": about, "site": where.argv[1:]}))

    def threads(self) -> int:
        """Cores minus one, shared with the engines that run already: spinning on all cores costs a factor of 3 to 70."""
        if self.settings.threads:
            return min(self.settings.threads, usable_cores())
        others = sum(1 for live in self.live.values() if live.process is not None)
        return max(1, (usable_cores() - 1) // (others + 1))

    # Watch ----------------------------------------------------------------------------------------------------
    def watch(self, instance: str, pool: Pool) -> None:
        """Looks for signs of life while calls are open, and ends an engine that hangs; Down follows.  May be called twice."""
        live = self.live[instance]
        if live.watch is None and live.process is not None and live.pulse is not None:
            live.watch = asyncio.create_task(self._watch(instance, live, live.process, live.pulse, pool))

    async def _watch(self, instance: str, live: Live, process: EngineProcess, pulse: Pulse, pool: Pool) -> None:
        path = process.socket
        pulse.begin()
        try:
            while process.exit is None and live.stop is None and (calls := pool.open(path)):
                if monotonic() - live.looked > LOOK_AGAIN:
                    await self._look(instance, live)
                if all(call.is_paused for call in calls):
                    pulse.begin()  # silent because its clients do not read
                elif reason := pulse.look(UNPROBED, pool.heard(path), unseen=True):
                    live.hung = errors.EngineTimeout(
                        f"{live.engine} with {live.spec.model} hung and was ended: {reason}",
                        code="engine_hung", hint="ask again: it is started anew",
                        last_words=process.last_words()[-2000:], log=live.log_path,
                    )  # fmt: skip
                    process.kill_now()
                    pool.cut(path, live.hung)
                    return
                await asyncio.sleep(pulse.silence.step)
        finally:
            live.watch = None

    # End ------------------------------------------------------------------------------------------------------
    def halt(self, instance: str, force: bool) -> None:
        """Ends the engine or its start; Down follows.  A second call with `force` is quicker."""
        live = self.live[instance]
        if live.task is not None and not live.task.done():
            if not live.ending:
                live.task.cancel()
        elif live.process is not None:
            log.info("%s stops", instance)
            live.stop = asyncio.create_task(self._stop(instance, live, live.process, force))

    async def _stop(self, instance: str, live: Live, process: EngineProcess, force: bool) -> None:
        if not force:
            try:
                await self._look(instance, live, is_over=True)
                await self._last_words(process, live)
            except Exception:  # whatever that was: it is told to go next
                log.exception("%s could not be asked before its end", instance)
        await process.stop(force)
        if live.process is process:  # a second, forceful call may have been quicker
            live.process = None
            self._cleared(live)
            self._post(Down(instance))

    async def _last_words(self, process: EngineProcess, live: Live) -> None:
        """What an engine is asked before it is told to go."""
        if live.prompts and process.plan.saved_slots:
            await self.prompts.save(process, live.prompts, process.plan.saved_slots, live.spec.model)
        if (last := process.plan.stop.request) is not None:
            with suppress(Exception):  # whatever it answers: it is told to go next
                async with asyncio.timeout(LAST_REQUEST):
                    await ask(process, last, process.plan.headers)

    def _exited(self, instance: str, live: Live, exit: Exit) -> None:
        """An engine ended.  On our word, or while starting: whoever asked is waiting and reports."""
        if (exit.asked and not live.hung) or live.process is None or (live.task is not None and not live.task.done()):
            return
        process, live.process = live.process, None
        error = live.hung or self._death(live, process, exit)
        log.warning("%s: %s", instance, error)
        self._cleared(live)
        self._post(Down(instance, error.to_wire()))

    def _death(self, live: Live, process: EngineProcess, exit: Exit) -> errors.EngineError:
        status = exit.status if exit.signal is None else -exit.signal
        try:
            _, line = self.registry.get(live.engine).diagnose(status, process.heard())
        except Exception:
            log.exception("the adapter of %s failed", live.engine)
            line = ""
        return errors.EngineError(
            f"{live.engine} with {live.spec.model} died ({exit})" + (f": {line}" if line else ""),
            code="engine_died",
            last_words=process.last_words()[-2000:],
            log=live.log_path,
        )

    def _cleared(self, live: Live) -> None:
        if live.reserved is not None:
            live.reserved.close()
            live.reserved = None
        if live.log is not None:
            live.log.close()
            live.log = None
        if live.folder:
            with suppress(OSError):
                shutil.rmtree(live.folder)


def loaded_beside(files: Sequence[tuple[Extra, str]]) -> dict[str, Any]:
    """The fields of a Grant for the models, and their paths, of a spec's options."""
    single = {extra.option: path for extra, path in files if extra.option != "lora"}
    return {**single, "lora": tuple((path, extra.scale) for extra, path in files if extra.option == "lora")}
