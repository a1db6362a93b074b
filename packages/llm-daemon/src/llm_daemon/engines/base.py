"""The contract between the daemon and one server application.

An adapter is data and pure functions: it opens no socket and starts no process.  The daemon's supervisor calls
`locate` (in a worker thread, it may look at files), then `plan`, and does the rest: spawns the plan under a keeper,
probes readiness on the plan's own address, reads the log, stops it by `stop`.

A new engine is one file with one class and one entry point in the group `llm_daemon.engines`.
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
    """Why an engine cannot run here, and the shell line (or sentence) that would change that."""

    reason: str
    hint: str


@dataclass(frozen=True, slots=True)
class Grant:
    """What the daemon gives one instance.

    `model_path`: absolute path of the weights.  `alias`: the id the engine must answer to.  `socket`: name of the
    unix socket to listen on, relative to the engine's working folder, which is fresh and private to this instance.
    `context`: tokens for each of `parallel` conversations.  `gpu_layers`: None means the engine's own choice.
    `threads`: CPU threads it may use.  `args`: the user's extra flags, already checked by `refuse`.

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
    mode: str = GENERATE
    draft: str | None = None
    mmproj: str | None = None
    lora: tuple[tuple[str, float], ...] = ()
    prompts: str | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """One readiness check over HTTP on the plan's address.

    A status in `ready` means ready; in `loading`, not yet; any other is kept as a reason and counts as not yet.
    A refused connection while the process lives means not yet.
    """

    path: str = "/health"
    ready: frozenset[int] = frozenset({200})
    loading: frozenset[int] = frozenset({503})


@dataclass(frozen=True, slots=True)
class Stop:
    """After the daemon has cut its own connections: SIGTERM, `grace` seconds, SIGTERM again, `grace` seconds, SIGKILL."""

    grace: float = 2.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How to run one instance.

    `env` is added to the scrubbed environment.  `address` is the unix socket that it listens on (`Grant.socket`, relative
    to the engine's working folder).  `slots`: requests it serves at once.  `stall` is how many seconds may pass while
    loading or answering without a byte of log or answer, a change of state, disk reads or CPU time used, before it counts
    as stuck (core/silence.py).

    `assembled`: routes whose plain answers the gateway asks for as streams, because the engine would notice a hang-up too
    late otherwise (core/assemble.py).  `confirms_hangup`: it takes a half-closed connection for a hang-up, and closes its
    side once it has let go of the request; without that, a hang-up closes the connection and the slot counts as free.

    `saved_slots`: how many slots write what they hold into `Grant.prompts`, and read it again, on
    `POST /slots/N?action=save` and `restore` with a `filename` (llama.cpp, tools/server/README.md).
    """

    argv: tuple[str, ...]
    address: str
    env: Mapping[str, str] = field(default_factory=dict)
    probe: Probe = field(default_factory=Probe)
    stop: Stop = field(default_factory=Stop)
    slots: int = 1
    stall: float = 120.0
    assembled: frozenset[str] = frozenset()
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
    # Public routes this engine answers, e.g. "/v1/chat/completions".
    routes: frozenset[str]

    def locate(self, config: Mapping[str, Any]) -> Location | Missing:
        """Finds the program.  `config` is `[engines.NAME]`.  May read files and /proc; must not run for longer than 5 s."""
        ...

    def accepts(self, path: str) -> str | None:
        """None if this engine can load the file at `path` (looked at by name and first bytes), else the reason."""
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
