"""A live endpoint for a blocking program: `attach`, and the lease it returns."""

from __future__ import annotations

import _socket as socket  # the C half: the Python half imports enum and selectors, 10 ms
import os
import time
from _thread import RLock
from _weakref import ref  # weakref without its Python half

from .. import errors
from ..core import control
from . import start
from .wishes import is_path as is_path, wish as wish

TYPE_CHECKING = False  # the typing module costs more than everything here
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    import openai

    Report = Callable[["Progress"], object]

_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT
QUIET, KNOCKS = 20.0, 5  # seconds of silence until we ask whether it is there, and how often in vain: its own watchdog is quicker
DEATHS = 8  # of the daemon in one attach, before we say so: a storm of kills must not fail it, an endless one must


class Progress:
    """One step of a load.  `phase`: wait, resolve, download, verify, extract or load; `done` of `total` bytes if known."""

    __slots__ = ("done", "message", "phase", "total")

    def __init__(self, wire: dict[str, Any]) -> None:
        self.phase: str = wire.get("phase", "")
        self.done: int | None = wire.get("done")
        self.total: int | None = wire.get("total")
        self.message: str = wire.get("message", "")

    def __str__(self) -> str:
        text = f"{self.phase}: {self.message}" if self.message else self.phase
        if self.done is not None and self.total:
            text += f" {self.done / 1e6:.0f}/{self.total / 1e6:.0f} MB"
        return text


class Conversation:
    """Questions and answers on one control connection.  One thread at a time."""

    def __init__(self, connection: start.Connection, asked: int = 0) -> None:
        self.sock = connection.sock
        self.welcome = connection.welcome
        self._peer = connection.peer
        self._decoder = connection.decoder
        self._messages = connection.early
        self._id = asked  # questions already sent, right behind HELLO

    def ask(self, op: str, timeout: float | None = None, on_progress: Report | None = None, **fields: object) -> dict[str, Any]:
        """Sends `op` and waits for its answer (a dict), at most `timeout` seconds.

        Raises what the daemon answered as an error, TimeoutError, ConnectionError when the daemon is gone, or
        DaemonUnresponsive when it shows no sign of life for `QUIET * KNOCKS` seconds; one that was stopped is woken before.
        """
        self._id += 1
        self.sock.settimeout(timeout)
        self.sock.sendall(control.encode({"op": op, "id": self._id, **fields}))
        return self.answer(timeout, on_progress)

    def answer(self, timeout: float | None = None, on_progress: Report | None = None) -> dict[str, Any]:
        """The answer to the last question sent; as `ask`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            message = self._next(deadline)
            if message.get("id") != self._id:
                continue  # the answer to a question that was given up
            if message["op"] == "PROGRESS":
                if on_progress is not None:
                    on_progress(Progress(message.get("info") or {}))
            elif message["op"] == "ERROR":
                raise errors.from_wire(message.get("error") or {})
            else:
                return message

    def _next(self, deadline: float | None) -> dict[str, Any]:
        knocks = 0
        while not self._messages:
            left = QUIET if deadline is None else min(QUIET, max(0.001, deadline - time.monotonic()))
            self.sock.settimeout(left)
            try:
                data = self.sock.recv(65536)
            except TimeoutError:
                if deadline is not None and time.monotonic() >= deadline:
                    raise
                knocks += 1
                error = start.unresponsive(self._peer, wake_it=knocks == 1)
                if knocks == KNOCKS:
                    raise error from None
                self.sock.sendall(control.encode({"op": "PING"}))  # its PONG is a message that answers nothing
                continue
            if not data:
                raise ConnectionResetError("the daemon closed the connection")
            self._messages = self._decoder.feed(data)
        return self._messages.pop(0)

    def is_open(self) -> bool:
        """Whether the daemon is still there; costs two system calls at most, never waits, from any thread."""
        with start.importing:
            import select
        try:
            poll = select.poll()
            poll.register(self.sock, select.POLLIN)
            # Only what is there already: with a timeout set, a bare recv would wait, whatever its flags say.
            return not poll.poll(0) or self.sock.recv(1, _PEEK) != b""
        except (OSError, ValueError):
            return False

    def close(self) -> None:
        """Ends the lease; may be called from another thread, where it wakes whoever waits in `ask`."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.sock.close()


def connect(start_daemon: bool = True, lease: bool = True) -> Conversation | None:
    """A `Conversation` with the daemon without naming a model; None if there is none and `start_daemon` is false.

    With `lease=False` the connection does not keep the daemon alive: for looking, not for using.
    """
    connection = start.ensure({"lease": lease}, start=start_daemon)
    return None if connection is None else Conversation(connection)


class Lease:
    """A claim on a model, held until `close`, the end of a `with` block, or the end of the process.

    The daemon's death does not end it: the next use of any attribute attaches again (and blocks until the model
    answers).  Methods may be called from any thread.  After `os.fork` the child's copy is not attached; its next use
    attaches for the child.
    """

    def __init__(
        self,
        wish: dict[str, Any],
        keep_alive: float | None = None,
        timeout: float | None = None,
        on_progress: Report | None = None,
    ) -> None:
        for name, value in (("keep_alive", keep_alive), ("timeout", timeout)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e9  # False for NaN
            if value is not None and not (number and (name != "timeout" or value > 0)):
                raise errors.UsageError(f"{name} must be a number of seconds, not {value!r}", code="bad_spec")
        if on_progress is not None and not callable(on_progress):
            raise errors.UsageError(f"on_progress must be a function, not {on_progress!r}", code="bad_spec")
        self._wish = wish
        self._keep_alive = keep_alive
        self._timeout = timeout
        self._on_progress = on_progress
        self._lock = RLock()
        self._talk: Conversation | None = None
        self._facts: dict[str, Any] = {}
        self._closed = False
        self._clients: list[Any] = []  # HTTP clients made for this lease, closed with it
        _leases[id(self)] = ref(self)

    def _attach(self) -> None:
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        question = control.encode({"op": "ENSURE", "id": 1, "wish": self._wish, "keep_alive": self._keep_alive})
        if len(question) > control.LIMIT:
            raise errors.UsageError("this wish is longer than 64 KiB", code="bad_spec")
        for death in range(1, DEATHS + 1):
            patience = start.DEADLINE if deadline is None else min(start.DEADLINE, max(0.001, deadline - time.monotonic()))
            connection = start.ensure(None, patience, then=question)
            assert connection is not None  # only `start=False` may find nobody
            talk = self._talk = Conversation(connection, asked=1)
            try:
                if self._closed:  # by another thread while we connected
                    raise errors.Unavailable("the lease was closed", code="closed")
                left = None if deadline is None else max(0.001, deadline - time.monotonic())
                answer = talk.answer(left, self._on_progress)
            except errors.LlmDaemonError:  # first: some of them are TimeoutErrors too
                self._let_go()
                raise
            except TimeoutError as e:
                self._let_go()
                if deadline is None or time.monotonic() < deadline:
                    raise  # of the caller's own on_progress
                raise errors.EngineTimeout(
                    f"{self._wish['model']} was not ready after {self._timeout:g} s",
                    hint="give a larger timeout; `llm-daemon logs` shows why",
                ) from e
            except OSError as e:
                lost = not talk.is_open()
                self._let_go()
                if self._closed:
                    raise errors.Unavailable("the lease was closed", code="closed") from e
                if not lost:
                    raise  # of the caller's own on_progress
                time.sleep(0.05 * death)  # it died while loading; perhaps it is the load that kills it
            except BaseException:
                self._let_go()
                raise
            else:
                self._facts = {**connection.welcome, "daemon_pid": connection.welcome["pid"], **answer}
                return
        raise errors.Unavailable(
            f"the daemon died {DEATHS} times while loading {self._wish['model']}", code="daemon_died",
            hint="`llm-daemon logs --daemon` shows its last words",
        )  # fmt: skip

    def _let_go(self) -> None:
        talk, self._talk = self._talk, None
        if talk is not None:
            talk.close()

    def refresh(self) -> None:
        """Attaches again if the daemon is gone; does nothing otherwise.  Raises what `attach` raises."""
        with self._lock:
            if self._closed:
                raise errors.UsageError("this lease is closed", code="closed", hint="attach again")
            if self._talk is None or not self._talk.is_open():
                self._let_go()
                self._attach()

    def is_open(self) -> bool:
        """Whether the lease holds right now, without attaching again."""
        talk = self._talk
        return talk is not None and talk.is_open()

    def is_attached(self) -> bool:
        """Whether the lease holds and its facts are those of the daemon it holds on to; never waits."""
        talk = self._talk
        return talk is not None and self._facts.get("daemon_pid") == talk.welcome["pid"] and talk.is_open()

    def _fact(self, name: str) -> Any:
        self.refresh()
        return self._facts[name]

    @property
    def base_url(self) -> str:
        """The OpenAI-compatible endpoint, e.g. `http://127.0.0.1:28282/v1`."""
        value: str = self._fact("base_url")
        return value

    @property
    def api_key(self) -> str:
        """The bearer token for `base_url`; it stays the same until the machine restarts."""
        value: str = self._fact("api_key")
        return value

    @property
    def model(self) -> str:
        """What to put into the `model` field of a request."""
        value: str = self._fact("model")
        return value

    @property
    def pid(self) -> int:
        """Process id of the engine that serves us, as of the last attach."""
        value: int = self._fact("pid")
        return value

    @property
    def instance(self) -> str:
        """The daemon's name for the running model; equal for everybody who shares it."""
        value: str = self._fact("instance")
        return value

    @property
    def engine(self) -> str:
        """The server application, e.g. `llama-server`."""
        value: str = self._fact("engine")
        return value

    @property
    def daemon_pid(self) -> int:
        """Process id of the daemon."""
        value: int = self._fact("daemon_pid")
        return value

    def openai(self, **options: Any) -> openai.OpenAI:
        """An `openai.OpenAI` for this lease (`options` go to its constructor); it survives the daemon's death too.

        Raises UsageError when the `openai` package is not installed.
        """
        from .openai_clients import make

        return make(self, **options)

    def close(self) -> None:
        """Ends the lease; harmless a second time.  The daemon closes the model by its own rules."""
        self._closed = True
        _leases.pop(id(self), None)
        self._let_go()
        for client in self._clients:
            client.close()

    def _drop_in_child(self) -> None:
        # The child's copy of the fd would keep the parent's lease alive; never shutdown, that would end the parent's.
        talk, self._talk, self._lock = self._talk, None, RLock()
        if talk is not None:
            talk.sock.close()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        try:
            self.close()
        except Exception:
            pass  # at interpreter exit modules may be gone; the kernel ends the lease

    def __repr__(self) -> str:
        state = "closed" if self._closed else "attached" if self._talk else "detached"
        return f"<Lease {self._wish['model']} {state} {self._facts.get('base_url', '')}>"


_leases: dict[int, ref[Lease]] = {}


def _in_child() -> None:
    start.in_child()
    for found in list(_leases.values()):
        if (lease := found()) is not None:
            lease._drop_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def attach(
    spec: str | os.PathLike[str],
    *,
    engine: str | None = None,
    quant: str | None = None,
    context: int | None = None,
    parallel: int | None = None,
    gpu_layers: int | None = None,
    args: Sequence[str] = (),
    mode: str | None = None,
    draft: str | os.PathLike[str] | None = None,
    mmproj: str | os.PathLike[str] | None = None,
    lora: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    keep_alive: float | None = None,
    timeout: float | None = None,
    on_progress: Report | None = None,
) -> Lease:
    """Starts or joins the daemon, loads or joins the model, and returns when it answers.

    `spec`: a catalog name (`smollm2-135m`, `name@QUANT`), a path, or `pypi:package==version`.  `context`: tokens for
    one conversation; `parallel`: conversations at once; `mode`: `generate`, `embedding` or `rerank`, if not what the model
    is made for; `draft`, `mmproj`, `lora`: models that are loaded beside it, named as `spec` is (a lora perhaps with its
    scale, `./a.gguf:0.5`): one that proposes tokens, a projector for images, adapters.  `timeout`: seconds for everything
    (None: as long as there is progress); `keep_alive`: seconds the model stays when idle, also after this lease (the last
    one given counts for everybody who shares it).  `on_progress` is called with a `Progress`.

    Raises UsageError (your move), Unavailable (try again), EngineError (the engine's; shows its last words).
    KeyboardInterrupt leaves nothing behind.  May be called from any thread.
    """
    lease = Lease(
        wish(
            spec, engine=engine, quant=quant, context=context, parallel=parallel, gpu_layers=gpu_layers, args=args,
            mode=mode, draft=draft, mmproj=mmproj, lora=lora,
        ),
        keep_alive, timeout, on_progress,
    )  # fmt: skip
    return begun(lease)


def begun(lease: Lease) -> Lease:
    """The lease, attached; closed if that fails."""
    try:
        lease.refresh()
    except BaseException:
        lease.close()
        raise
    return lease
