"""The contract between the daemon and one server application.

An adapter is data and pure functions: it opens no socket and starts no process.  The daemon's supervisor calls
`locate` (in a worker thread, it may look at files), then `plan`, and does the rest: spawns the plan under a keeper,
probes readiness on the plan's own address, reads the log, stops it by `stop`.

A new engine is one file with one class and one entry point in the group `llm_daemon.engines`: docs/how-to/add-an-engine.md.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from ..spec import GENERATE, Spec


@dataclass(frozen=True, slots=True)
class Location:
    """A runnable engine: `argv` is what comes before the flags (`["/usr/bin/llama-server"]`), `version` a short text."""

    argv: tuple[str, ...]
    version: str
    origin: str  # where it was found, for people: "PATH", "wheel xllamacpp 2026.10", "config"


@dataclass(frozen=True, slots=True)
class Missing:
    """Why an engine cannot run here, and the shell line (or sentence) that would change that.

    The program is not installed, or the machine does not suit it: CPU features, C library, GPU.
    """

    reason: str
    hint: str


@dataclass(frozen=True, slots=True)
class Grant:
    """What the daemon gives one instance.

    `model_path`: absolute path of the weights, a file or a folder; for a model that the engine has by itself (source
    `engine`), its name, which does not begin with a slash, or nothing.  `alias`: the id the engine must answer to.
    `context`: tokens for each of `parallel` conversations.  `gpu_layers`: None means the engine's own choice.
    `threads`: CPU threads it may use.  `args`: the user's extra flags, already checked by `refuse`.

    Two addresses, of which the plan takes one.  `socket`: name of a unix socket to listen on, relative to the engine's
    working folder, which is fresh and private to this instance.  `host` and `port`: a loopback address that the daemon
    keeps others from, for engines that cannot do that.  `key`: a secret of this instance, for engines that check one.

    The rest concerns only engines with such `options`: `mode`, one of spec.MODES; `draft` and `mmproj`, paths; `lora`, pairs
    of path and scale.  `prompts`: an absolute folder where it may keep what its slots hold (Plan.saved_slots); None: nowhere.
    """

    model_path: str
    alias: str
    socket: str
    context: int
    parallel: int
    threads: int
    gpu_layers: int | None = None
    args: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 0
    key: str = ""
    mode: str = GENERATE
    draft: str | None = None
    mmproj: str | None = None
    lora: tuple[tuple[str, float], ...] = ()
    prompts: str | None = None


@dataclass(frozen=True, slots=True)
class Tcp:
    """The address of an engine that listens on TCP: `Grant.host` and `Grant.port`, as it was told by its flags.

    `rebinds`: it sets SO_REUSEADDR or SO_REUSEPORT before it binds, as Python's, Go's and llama.cpp's servers do.  Then the
    daemon keeps the port reserved all the time; else it has to let go of it right before the start.
    `told`: a pattern for the log of one that was told `--port 0` and says which port it took: the group is the port.
    """

    host: str
    port: int
    rebinds: bool = True
    told: str = ""


@dataclass(frozen=True, slots=True)
class Probe:
    """One request to the engine itself: a GET, or with a `body` (JSON) a POST.  The plan's `headers` go with it.

    A status in `ready` means ready; in `loading`, not yet; any other is kept as a reason and counts as not yet.
    A refused connection while the process lives means not yet, whenever the engine binds.
    `guarded`: without the plan's headers it must answer 401 or 403, else it is not our engine.
    """

    path: str = "/health"
    ready: frozenset[int] = frozenset({200})
    loading: frozenset[int] = frozenset({503})
    body: bytes = b""
    guarded: bool = False


@dataclass(frozen=True, slots=True)
class Stop:
    """After the daemon has cut its own connections: SIGTERM, `grace` seconds, SIGTERM again, `grace` seconds, SIGKILL.

    Signals go to the engine's whole process group; at the end its whole tree is killed.  `request` goes first, for engines
    that would wait for what still runs; a second is what it may take.
    """

    grace: float = 2.0
    request: Probe | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """How to run one instance.

    *Process.*  `env` is added to the environment, of which only paths, locale and device choice are left
    (daemon/process.py, `scrubbed_env`): nothing has to be taken out.  `files`: small text files by name, made in the working
    folder for the engine's user alone; a key may be in one of them or in `env`, never in `argv`, which everybody may read.
    `address`: `Grant.socket`, or a `Tcp`.

    *Readiness.*  `probes` are asked in order until one is not answered by 404, 405 or 501: that one decides.  `warm_up` is
    asked once after that, and readiness waits for its answer, for engines that say they are ready before they are.  `fatal`: a
    pattern for the log of one that may live on though it could not load.
    `stall`: seconds that may pass while loading or answering without a byte of log or answer, a change of state, disk reads
    or CPU time used, before it counts as stuck (core/silence.py).

    *Requests.*  `slots`: requests it serves at once.  `routes`: public routes it answers with this model, None for all those of
    the adapter.  `served_id`: the engine insists on this id in a request's `model`, so the gateway writes it there.  `drop`:
    fields of a request that it must not see.  `paths`: its own path for a public route.  `headers` go with every request.

    *Hang-ups.*  `assembled`: routes whose plain answers the gateway asks for as streams, because the engine would notice a
    hang-up too late otherwise (core/assemble.py).  `deaf`: routes whose plain answers it computes to their end in any case:
    the slot stays taken until then.  `confirms_hangup`: it takes a half-closed connection for a hang-up, and closes its side
    once it has let go of the request; without that, a hang-up closes the connection and the slot counts as free.

    *Conversations.*  `saved_slots`: how many slots write what they hold into `Grant.prompts`, and read it again, on
    `POST /slots/N?action=save` and `restore` with a `filename` (llama.cpp, tools/server/README.md).
    """

    argv: tuple[str, ...]
    address: str | Tcp
    env: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    probes: tuple[Probe, ...] = (Probe(),)
    warm_up: Probe | None = None
    fatal: str = ""
    stop: Stop = field(default_factory=Stop)
    stall: float = 120.0
    slots: int = 1
    routes: frozenset[str] | None = None
    served_id: str | None = None
    drop: frozenset[str] = frozenset()
    paths: Mapping[str, str] = field(default_factory=dict)
    headers: tuple[tuple[str, str], ...] = ()
    assembled: frozenset[str] = frozenset()
    deaf: frozenset[str] = frozenset()
    confirms_hangup: bool = False
    saved_slots: int = 0


# Words for what went wrong while starting, found by an adapter in the log's last lines.
BAD_MODEL, BAD_FLAG, ADDRESS, OUT_OF_MEMORY, MISSING_LIBRARY, CRASHED = (
    "bad_model",
    "bad_flag",
    "address_in_use",
    "out_of_memory",
    "missing_library",
    "crashed",
)


@runtime_checkable
class Adapter(Protocol):
    """One server application.  Stateless; one object serves all instances, and methods may be called from any thread.

    It may have an attribute `options`, a frozenset: which of spec.SPECIAL it can meet (`options_of`).
    """

    name: str
    license: str
    # Public routes this engine answers, e.g. "/v1/chat/completions": with a model of the right kind.
    routes: frozenset[str]

    def locate(self, config: Mapping[str, Any]) -> Location | Missing:
        """Finds the program.  `config` is `[engines.NAME]`.  May read files and /proc; must not run for longer than 5 s."""
        ...

    def accepts(self, path: str) -> str | None:
        """None if this engine can load `path` (see Grant.model_path; looked at by name and first bytes), else the reason."""
        ...

    def refuse(self, args: Sequence[str]) -> str | None:
        """The reason why these extra flags are not passed on (dangerous, or set by the daemon itself), or None."""
        ...

    def plan(self, spec: Spec, where: Location, grant: Grant) -> Plan:
        """The command line and how to tell that it is ready.  Raises UsageError for options it cannot meet."""
        ...

    def diagnose(self, exit_status: int | None, last_words: str) -> tuple[str, str]:
        """(kind, one line) for an engine that ended or never got ready: a word of this module, and its own error line."""
        ...


@runtime_checkable
class Weighs(Protocol):
    """For an adapter that knows better than a GGUF file's header what its engine needs of the host's memory."""

    def memory(self, spec: Spec, grant: Grant) -> int | None:
        """Bytes for the weights at `grant.model_path` with these options; None if it cannot tell.  Must not block for long."""
        ...


def options_of(adapter: Adapter) -> frozenset[str]:
    """Those of spec.SPECIAL that this engine can meet; none if it does not say."""
    found: frozenset[str] = getattr(adapter, "options", frozenset())
    return found


def usable_cores() -> int:
    """Cores this process may use: affinity mask and cgroup v2 quota (`cpu.max`), at least 1.

    >>> usable_cores() >= 1
    True
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as f:
            quota, period = f.read().split()
        if quota != "max":
            cores = min(cores, max(1, int(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return cores
