"""Wires everything; the one file that knows every other."""

from __future__ import annotations

import asyncio
import faulthandler
import fcntl
import gc
import logging
import os
import select
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from .. import errors, paths
from ..core import events as ev, refusals
from ..core.events import Command, Event
from ..core.instance import State
from ..core.leases import Leases
from ..core.machine import Machine
from ..faults import fp
from ..models.fetch import fetch
from ..models.store import Store
from ..models.templates import described
from ..spec import Wish
from . import identity
from .admin import Admin
from .boot import Born
from .control_server import ControlServer, Say
from .desk import DaemonDesk, known
from .facts import TOLD, DaemonFacts
from .loan import Lender
from .logs import RotatingLog
from .pump import Pump
from .status import status
from .supervisor import Supervisor
from .sweep import sweep

if TYPE_CHECKING:
    from .gateway import Gateway

log = logging.getLogger("llm_daemon")
BEAT = 10.0  # seconds between two looks at ourselves: rare, because an idle daemon should sleep
LOOK_OUT = 1.0  # seconds between two looks at the runtime folder while an engine starts
WEDGED = 6  # beats of the watchdog without one of the loop
ENGINE_FIRST = 0.15  # seconds the gateway waits for the first engine to be on its way
UNSENT_WAIT = 2.0  # seconds that a client which does not read may delay our end
TOUCH_EVERY = 360  # beats between touches of our files, so that no cleaner of old files takes them


class Daemon:
    """The running daemon.  Everything here happens on the loop's thread."""

    def __init__(self, born: Born) -> None:
        self.born = born
        self.settings = born.settings
        self.started = monotonic()
        self.token = born.token
        self.supervisor = Supervisor(self.settings, born.catalog, born.registry, born.generation, born.log_dir, self.post)
        self.machine = Machine(
            Leases.born(self.settings.linger, self.started),
            self.settings.ttl,
            self.settings.leased_ttl,
            self.settings.queue_limit,
            self.settings.max_overtake,
            self.supervisor.memory.budget,
        )
        self.desk = DaemonDesk(self)
        self.facts = DaemonFacts(self)
        self.journal = self.facts.journal
        self.admin = Admin(self.facts, os.path.join(f"g-{born.generation}", "admin.sock"))
        self.pump = Pump(self.machine, self._do, saw=self.journal.saw)
        self.control = ControlServer(self)
        self.gateway: Gateway | None = None
        self.beats = 0
        self.is_ghost = False
        self.is_looking_out = False
        self.lender: Lender | None = None
        self.returning: asyncio.Task[None] | None = None
        self.vetoed_since: float | None = None
        host, port = born.tcp.getsockname()[:2]
        self._base = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._welcome: dict[str, object] = {
            "version": version(),
            "pid": os.getpid(),
            "base_url": self._base + "/v1",
            "api_key": self.token or "none",
            "port": port,
            "port_note": born.port_note,
            "socket": os.path.join(born.runtime_dir, "http.sock"),
            "http_socket": os.path.join(born.runtime_dir, "http.sock"),
            "runtime_dir": born.runtime_dir,
            "log": paths.daemon_log(born.log_dir),
        }

    async def run(self) -> None:
        """Serves until the process ends; never returns."""
        swept = sweep(Path("."), self.born.generation)
        if swept:
            log.warning("ended %d processes that a killed daemon left behind", swept)
        locating = asyncio.create_task(self.supervisor.ready())
        await self.control.serve(self.born.listener)
        if self.born.loan is not None:
            pid, _ = identity.peer(self.born.loan)
            self.control.keep(self.born.loan.detach(), pid, "ghost")
        note = f" ({self.born.port_note})" if self.born.port_note else ""
        log.info("serving at %s%s, pid %d, generation %s", self._base, note, os.getpid(), self.born.generation)
        self.pump.post(ev.Tick())
        self._beat()
        threading.Thread(target=watch, args=(self,), daemon=True, name="watchdog").start()
        await locating
        # Whoever started us waits for a model: its engine goes first, and the gateway is loaded while that starts.
        # HTTP clients wait in the backlog meanwhile.
        with suppress(TimeoutError):
            async with asyncio.timeout(ENGINE_FIRST):
                await self.supervisor.spawned.wait()
        from .gateway import Gateway

        settings = self.settings
        self.gateway = Gateway(
            self.desk, token=self.token, origins=frozenset(settings.allow_origins), remote_media=settings.remote_media
        )
        lent = self.lender is not None and self.lender.is_lent
        await self.gateway.serve(None if lent else self.born.tcp.dup(), self.born.http)
        if self.born.tls is not None:
            from . import remote

            await self.gateway.serve_remote(self.born.tls, remote.context(settings), remote.key(settings))
            log.info("serving other machines at https://%s", ":".join(map(str, self.born.tls.getsockname()[:2])))
        gc.enable()
        gc.collect()
        gc.freeze()  # what is loaded now stays: later collections need not look at it
        await asyncio.get_running_loop().create_future()

    def post(self, event: Event) -> None:
        self.pump.post(event)

    # Commands of the core -------------------------------------------------------------------------------------
    def _do(self, command: Command) -> None:
        match command:
            case ev.Run(ticket, instance, loaded_for):
                self.desk.run(ticket, instance, loaded_for)
            case ev.Start(instance, spec):
                for forgotten in set(self.supervisor.live) - set(self.machine.instances):
                    del self.supervisor.live[forgotten]
                self.supervisor.start(instance, spec)
                if not self.is_looking_out:
                    self._look_out()
            case ev.Weigh(instance, spec):
                self.supervisor.weigh(instance, spec)
            case ev.Waits(_, text):
                log.info("%s", text)
            case ev.Halt(instance, force, leaves_for):
                if leaves_for:
                    log.info("%s leaves: %s", self.machine.instances[instance].spec.model, leaves_for)
                if self.gateway and (live := self.supervisor.live.get(instance)) and live.process:
                    # llama-server waits half a minute for open streams after SIGTERM
                    self.gateway.cut(live.process.socket, self._why_cut(instance))
                self.supervisor.halt(instance, force)
            case ev.Refuse(ticket, error):
                self.desk.refuse(ticket, errors.from_wire(dict(error)))
            case ev.Abort(ticket, error):
                self.desk.abort(ticket, errors.from_wire(dict(error)))
            case ev.TellReady(lease, request, instance):
                self._tell_ready(lease, request, instance)
            case ev.TellError(lease, request, error):
                if not self.is_ghost and self.is_deposed():
                    self._deposed()  # no engine starts in a deleted folder: our successor serves this client
                else:
                    self.control.tell(lease, "ERROR", request, error=error)
            case ev.TellProgress(lease, request, info):
                self.control.tell(lease, "PROGRESS", request, info=info)
            case ev.Exit():
                self._leave()

    def _why_cut(self, instance: str) -> errors.LlmDaemonError | None:
        """What those hear whose answers a Halt breaks off: only somebody's word ends an engine that is answering."""
        it = self.machine.instances[instance]
        return errors.from_wire(dict(refusals.stopped(it.spec))) if it.lanes.running else None

    def _tell_ready(self, lease: str, request: int, instance: str) -> None:
        live = self.supervisor.live[instance]
        pid = live.process.pid if live.process else None
        model = self.machine.instances[instance].spec.model
        self.control.tell(lease, "READY", request, model=model, instance=instance, pid=pid, engine=live.engine)

    def _leave(self) -> None:
        """Leaves, if nobody stands at the door.  No await from the look at the door to the end (docs/reference/lifecycle.md)."""
        self.desk.tell()
        self.journal.flush()  # before the look: the disk may take its time
        doors = [s for s in (self.born.listener, self.born.tcp, self.born.http) if s.fileno() >= 0]
        if self.lender is not None and self.lender.is_lent:
            doors.remove(self.born.tcp)
        poll = select.poll()
        for door in doors:
            poll.register(door, select.POLLIN)
        # An answer on its way counts too, for a moment: `stop` wants to hear that it worked.
        self.vetoed_since = self.vetoed_since or monotonic()
        unsent = any(c.transport.get_write_buffer_size() for c in self.control.connections.values())
        if (unsent and monotonic() < self.vetoed_since + UNSENT_WAIT) or poll.poll(0):
            self.post(ev.ExitVetoed())
            return
        try:
            fp("idle_decided")
            self.control.close()  # uvloop keeps the listener open for its server, whoever else closes it
            self.born.listener.close()
            fp("listener_closed")
            log.info("nobody needs us: leaving")
            logging.shutdown()
        finally:  # nothing may keep us now
            os._exit(0)  # a voluntary exit looks like SIGKILL to everybody: no clean-up, no race

    # What the control server asks -----------------------------------------------------------------------------
    def welcome(self) -> dict[str, object]:
        return self._welcome

    def is_deposed(self) -> bool:
        """Whether the runtime folder is no longer ours: then we serve who is here and let nobody in."""
        if self.is_ghost:
            return True
        try:
            same = os.path.samestat(os.stat(self.born.runtime_dir, follow_symlinks=False), os.fstat(self.born.life_fd))
            os.stat(f"g-{self.born.generation}")  # a cleaner may take what is in the folder and leave the folder
            return not same or os.stat("sock").st_ino != self.born.sock_inode
        except OSError:
            return True

    def retire(self) -> None:
        """A newer client wants a newer daemon: serve who is here as a ghost, and leave (docs/adr/0002)."""
        log.info("retired: serving the last %d leases", len(self.machine.leases.holders))
        try:
            self._let_successor_in(lend=True)
        finally:
            self.post(ev.Retire())

    def _let_successor_in(self, lend: bool = False) -> None:
        """Accepts no client any more and gives LIFE away: from here on we only serve those who are here."""
        if not self.is_ghost:
            self.is_ghost = True
            self.control.close()
            self.born.listener.close()
            try:
                fp("listener_closed")
                if lend:
                    self.lender = Lender(self.born.tcp, f"g-{self.born.generation}", self._port_lent, self._port_returned)
            except OSError as e:
                log.warning("our successor will have another port: %s", e)
            fcntl.flock(self.born.life_fd, fcntl.LOCK_UN)
            fp("ghost_unlocked")

    def _port_lent(self) -> None:
        log.info("our successor serves the port")
        if self.gateway is not None:
            self.gateway.leave_port()

    def _port_returned(self) -> None:
        log.info("our successor is gone: serving the port again")
        if self.gateway is not None:
            self.returning = asyncio.create_task(self.gateway.serve(self.born.tcp.dup(), None))

    def ensure(self, lease: str, request: int, message: Mapping[str, Any]) -> None:
        """A client wants a model; it is answered by READY or ERROR."""

        def want() -> None:
            keep_alive = message.get("keep_alive")
            try:
                wish = wished(message.get("wish"))
                if keep_alive is not None and not (isinstance(keep_alive, (int, float)) and 0 <= keep_alive <= 1e9):
                    raise errors.UsageError(f"keep_alive must be seconds, 0 or more, not {keep_alive!r}", code="bad_spec")
                spec = self.supervisor.resolve(wish)
            except Exception as e:
                self.control.tell(lease, "ERROR", request, error=known(e).to_wire())
            else:
                if lease in self.control.connections:
                    self.post(ev.Want(lease, request, spec, keep_alive))

        self.desk.when_ready(f"{lease}/{request}", want)

    async def call(self, method: str, params: Mapping[str, Any], say: Say) -> dict[str, object]:
        """Answers a CALL of the control socket."""
        await self.supervisor.ready()
        if method == "status":
            return status(self)
        if method in TOLD:
            return await self.facts.tell(method, params)
        if method == "plan":
            return await self._plan(wished(params.get("wish")))
        if method == "hold":
            pid = params.get("pid")
            self.control.hold(pid if isinstance(pid, int) else 0)
            return {}
        if method == "stop":
            return self._stop(params.get("model"), bool(params.get("force")))
        if method == "pull":
            spec = self.supervisor.catalog.resolve(wished(params.get("wish")))
            root, began = Path(paths.cache_dir()), monotonic()
            path, *_ = [
                await fetch(artifact, root, lambda info: say("PROGRESS", info=info))
                for artifact in (spec.artifact, *(extra.artifact for extra in spec.extras))
            ]
            about = await asyncio.to_thread(described, spec.artifact, path)
            return {"path": str(path), "size": Store(root).size(spec.artifact), "seconds": monotonic() - began, **about}
        raise errors.RemoteProtocolError(
            f"this daemon ({version()}) has no method {method!r}", hint="are client and daemon of one version?"
        )

    async def _plan(self, wish: Wish) -> dict[str, object]:
        from . import plan

        spec = self.supervisor.resolve(wish)
        found = await asyncio.to_thread(plan.look, self.supervisor, spec, self.supervisor.threads())
        return {**found, "outcome": plan.outcome(self.machine, spec, found["memory"]["need_bytes"], monotonic())}

    def _stop(self, model: str | None, force: bool) -> dict[str, object]:
        instances = list(self.machine.instances.values())
        if model:
            artifact = self.supervisor.catalog.resolve(Wish.parse(str(model))).artifact
            instances = [it for it in instances if it.spec.model == model or it.spec.artifact.key == artifact.key]
        held = {lease for it in instances for lease in it.leases} if model else set(self.machine.leases.holders)
        if held and not force:
            raise errors.Unavailable(
                f"{len(held)} client{'s use' if len(held) > 1 else ' uses'} {model or 'this daemon'}: "
                + ", ".join(sorted({f"pid {self.control.holders[h].pid}" for h in held if h in self.control.holders})),
                code="in_use", hint="end them, or use --force",
            )  # fmt: skip
        stopped = [it.spec.model for it in instances if it.has_process or it.state is State.QUEUED]
        for it in instances:
            self.post(ev.StopModel(it.id, force))
        if not model:
            self.vetoed_since = None  # this answer gets its moment, whatever delayed us once before
            if force:  # whoever attaches again must find our successor, not us
                self._let_successor_in()
                if self.gateway is not None:
                    self.gateway.close()
                self.born.tcp.close()
                self._drop_everybody()
            self.post(ev.Retire())
        return {"stopped": stopped, "daemon": not model}

    def _drop_everybody(self) -> None:
        """Ends every lease: to the clients it looks as if we had died, and their next use starts another daemon."""
        for lease, holder in list(self.control.holders.items()):
            if holder.kind != "client":
                del self.control.holders[lease]
                self.post(ev.Left(lease))
        for connection in list(self.control.connections.values()):
            if connection.holds:
                connection.transport.abort()

    # Watching ourselves ---------------------------------------------------------------------------------------
    def _beat(self) -> None:
        self.beats += 1
        self._look_at_folder()
        if self.beats % TOUCH_EVERY == 0 and not self.is_deposed():
            for name in (".", "sock", "start", "token", "http.sock"):
                with suppress(OSError):
                    os.utime(name)
        asyncio.get_running_loop().call_later(BEAT, self._beat)

    def _look_out(self) -> None:
        """While an engine starts, more often than at each beat: in a deleted folder nobody would ever find it ready."""
        self._look_at_folder()
        self.is_looking_out = any(it.state is State.STARTING for it in self.machine.instances.values())
        if self.is_looking_out:
            asyncio.get_running_loop().call_later(LOOK_OUT, self._look_out)

    def _look_at_folder(self) -> None:
        if not self.machine.leases.retiring and self.is_deposed():
            self._deposed()

    def _deposed(self) -> None:
        log.warning("the runtime folder is gone: our clients attach to the next daemon")
        self._let_successor_in()
        self._drop_everybody()
        self.post(ev.Retire())


def watch(daemon: Daemon) -> None:
    """The watchdog thread: counts its own beats against the loop's, so that a stopped or sleeping machine freezes both."""
    pause = threading.Event()
    seen, missed = daemon.beats, 0
    while True:
        pause.wait(BEAT)
        missed = missed + 1 if daemon.beats == seen else 0
        seen = daemon.beats
        if missed >= WEDGED:
            faulthandler.dump_traceback(all_threads=True)
            os._exit(70)


def wished(wire: object) -> Wish:
    """The wish of a client's message.  Raises UsageError for anything that is none."""
    if not isinstance(wire, dict) or not isinstance(wire.get("model"), str):
        raise errors.UsageError("a wish needs a model", code="bad_spec", hint="e.g. smollm2-135m")
    return Wish.of(wire["model"], **{str(k): v for k, v in wire.items() if k != "model"})


def version() -> str:
    from importlib import metadata

    try:
        return metadata.version("llm-daemon")
    except metadata.PackageNotFoundError:
        return "0"


def start_logging(folder: str) -> None:
    """The daemon's log: rotated, best effort (a full disk loses lines, never the daemon)."""
    target = RotatingLog(paths.daemon_log(folder))

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            target.write((self.format(record) + "\n").encode(errors="replace"))

    handler = Handler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def serve(born: Born) -> None:
    """The daemon's life after READY.  Never returns."""
    start_logging(born.log_dir)
    faulthandler.enable()
    try:
        if sys.platform == "win32":
            raise ImportError
        import uvloop

        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    except ImportError:
        runner = asyncio.Runner()
    try:
        with runner:
            runner.run(Daemon(born).run())
    except BaseException:
        log.exception("the daemon fell over")
        logging.shutdown()
        os._exit(70)
