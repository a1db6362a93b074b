"""Session folders: `OUT/YYYYMMDD-N`, made for a run, found again to resume, listed."""

from __future__ import annotations

import fnmatch
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import msgspec

from . import machine, results, servers
from .errors import ResultsError, SuiteError
from .records import Artifact, ServerRef, Session, TargetInfo
from .results import Results
from .runner import Ready
from .suite import Suite, Target

HASHES = ".sha256.json"  # beside the sessions: hashes of model files


@dataclass(frozen=True, slots=True)
class Chosen:
    """What the command line changes of a suite; None or () is as the suite has it."""

    trials: int | None = None
    launches: int | None = None
    max_minutes: float | None = None
    targets: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()

    def apply(self, suite: Suite) -> Suite:
        """Raises SuiteError if a name fits nothing."""
        table = suite.table
        given = {k: v for k in ("trials", "launches", "max_minutes") if (v := getattr(self, k)) is not None}
        out = msgspec.structs.replace(suite, table=msgspec.structs.replace(table, **given))
        if self.trials is not None:
            own = [msgspec.structs.replace(c, table=msgspec.structs.replace(c.table, trials=None)) for c in out.cases]
            out = msgspec.structs.replace(out, cases=tuple(own))
        targets = _fitting([t.id for t in out.targets], self.targets, "target")
        cases = _fitting([c.id for c in out.cases], self.cases, "case")
        return msgspec.structs.replace(
            out, targets=tuple(t for t in out.targets if t.id in targets), cases=tuple(c for c in out.cases if c.id in cases)
        )


def _fitting(names: list[str], patterns: tuple[str, ...], what: str) -> list[str]:
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise SuiteError(f"no {what} {pattern!r} in this suite", hint=f"{what}s are " + ", ".join(names))
    return [n for n in names if not patterns or any(fnmatch.fnmatchcase(n, p) for p in patterns)]


def new(
    suite: Suite, ready: dict[str, Ready], out: Path, command: Sequence[str], notes: Sequence[str], *, trials_given: bool = False
) -> tuple[Path, Session]:
    """A folder of its own and what goes into its `session.json` (not yet written)."""
    folder = make(out)
    table = suite.table
    session = Session(
        id=folder.name, bench_version=metadata.version("llm-daemon-bench"), suite=table.name, suite_text=suite.text,
        suite_sha256=suite.sha256, command=tuple(command), git=machine.git_state(suite.path.absolute().parent), began=time.time(),
        trials=table.trials, trials_given=trials_given, launches=table.launches, interleave=table.interleave, warmup=table.warmup,
        seed=table.seed if table.seed is not None else int(time.time_ns() // 1000 % 1_000_000), machine=machine.describe(),
        targets=tuple(_about(t, ready.get(t.id)) for t in suite.targets), cases=tuple(c.info() for c in suite.cases),
        notes=tuple(notes),
    )  # fmt: skip
    return folder, session


def make(out: Path) -> Path:
    """A new folder for a session of today.  Raises MachineError."""
    day = time.strftime("%Y%m%d")
    try:
        out.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            folder = out / f"{day}-{number}"
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                number += 1
    except OSError as e:
        raise results.unwritable(out, e) from e


def _about(target: Target, ready: Ready | None) -> TargetInfo:
    server = target.server
    argv: tuple[str, ...] = ()
    if ready is not None and server.launch is not None:
        left_open = {"port": "{port}", "socket": "{socket}"}
        argv = tuple(part.format_map({**servers.places(target, ready.weights), **left_open}) for part in server.launch)
    elif ready is not None and server.engine is not None:
        with suppress(servers.NotReady):  # told again, and recorded, when it is launched
            argv = tuple(servers.command(target, ready.weights, "", {})[0])
    return TargetInfo(
        id=target.id, server=ServerRef(id=server.id, version=ready.version if ready else ""), via=server.via,
        engine=server.engine, model=target.model.id, params=target.model.params, quant=target.quant,
        weights=ready.weights.name if ready else "", artifact=ready.weights.artifact if ready else None, argv=argv,
        command=_typed(target, argv),
    )  # fmt: skip


def _typed(target: Target, argv: Sequence[str]) -> str:
    """What a person would type to have this."""
    server = target.server
    if server.engine is not None:
        words = ["llm-daemon", "serve", target.artifact, "--engine", server.engine, "--context", str(server.context)]
        return shlex.join(words)
    return shlex.join(argv) if argv else server.attach or ""


def resumed(folder: Path, suite: Suite) -> tuple[Session, Suite]:
    """A session to go on with, and the suite as it was run then.  Raises ResultsError if they do not belong together."""
    session = results.load(folder).session
    if session.suite_sha256 != suite.sha256:
        raise ResultsError(
            f"{folder} was measured with another version of the suite", hint="run without --resume: a session has one suite"
        )
    if session.bench_version != metadata.version("llm-daemon-bench"):
        session = msgspec.structs.replace(session, notes=(*session.notes, f"resumed by {metadata.version('llm-daemon-bench')}"))
    given = session.trials != suite.table.trials if session.trials_given is None else session.trials_given
    trials = session.trials if given else None  # else cases keep their own
    names = tuple(t.id for t in session.targets), tuple(c.id for c in session.cases)
    suite = Chosen(trials, session.launches, None, *names).apply(suite)
    session = msgspec.structs.replace(session, resumed=(*session.resumed, time.time()), ended=None)
    if session.machine.boot_id != machine.boot_id():
        session = msgspec.structs.replace(session, notes=(*session.notes, "resumed after a restart of the machine"))
    return session, suite


def still(found: Results, session: Session, ready: dict[str, Ready]) -> Session:
    """The session with what is known now of targets that were not measured before.  `found`: what is on the disk of it.

    Raises ResultsError if a measured one has other weights or another version now: two things would stand under one name.
    """
    versions = {t.target: t.server.version for t in found.trials}
    versions |= {x.target: x.server.version for x in found.launches if x.error is None}  # what never ran may be repaired
    changes: list[str] = []
    targets = []
    for old in session.targets:
        now = ready.get(old.id)
        if now is not None and old.id in versions:
            changes += [f"{old.id} {change}" for change in _changes(old, versions[old.id], now)]
        targets.append(old if now is None or old.id in versions else _about(now.target, now))
    if changes:
        more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
        raise ResultsError(
            f"{session.id} cannot go on: {changes[0]}{more}",
            hint="measure anew without --resume, or bring back what it was begun with",
        )
    return msgspec.structs.replace(session, targets=tuple(targets))


def _changes(old: TargetInfo, version: str, now: Ready) -> Iterator[str]:
    """What of a target is not as it was recorded, in words."""
    if version != now.version:
        yield f"was measured with version {version or '(not told)'} of {old.server.id}, now it is {now.version or '(not told)'}"
    was, is_ = old.artifact, now.weights.artifact
    if was is not None and is_ is not None and was.sha256 != is_.sha256:
        yield f"was measured with other weights than {is_.path} holds now ({_print(was)}, now {_print(is_)})"


def _print(artifact: Artifact) -> str:
    return f"{artifact.bytes} bytes, SHA-256 {(artifact.sha256 or '?')[:8]}"


def folders(out: Path) -> list[Path]:
    """Sessions below `out`, the oldest first."""
    found = [p.parent for p in out.glob(f"*/{results.SESSION}")]
    return sorted(found, key=lambda p: [int(n) if n.isdigit() else 0 for n in p.name.split("-")] + [p.name])


def find(out: Path, name: str | None, suite: Suite | None = None) -> Path:
    """The folder of session `name` (an id, or a path), else the latest one (of this suite).  Raises ResultsError."""
    if name is not None:
        for folder in (out / name, Path(name)):
            if (folder / results.SESSION).is_file():
                return folder
        near = ", ".join(f.name for f in folders(out)[-5:])
        raise ResultsError(
            f"no session {name!r} in {out}", hint=f"there are {near}" if near else "`llm-daemon bench run` makes one"
        )
    for folder in reversed(folders(out)):
        with suppress(ResultsError):
            session = results.load(folder).session
            if suite is None or (session.suite_sha256 == suite.sha256 and session.ended is None):
                return folder
    what = "no unfinished session of this suite" if suite else "no session"
    raise ResultsError(f"{what} in {out}", hint="`llm-daemon bench run` makes one")


def invoked() -> list[str]:
    """The command line, without the path of our own program."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
