"""Sessions and targets as a person names them: a folder, the name of one below `results/`, and the end of a target's name."""

from __future__ import annotations

from pathlib import Path

from llm_daemon.errors import UsageError

from . import sessions
from .compare import Side
from .results import SESSION, Results, load

ROOT = Path("results")


def folder(name: str | None, root: Path = ROOT) -> Path:
    """The folder of a session; None means the newest one below `root`.  Raises ResultsError."""
    return sessions.find(root, name)


def is_session(name: str, root: Path = ROOT) -> bool:
    return any((path / SESSION).exists() for path in (Path(name), root / name))


def target(results: Results, words: str) -> str:
    """The one target that has `words` in its id, or is called so.  Raises UsageError (`unknown_target`)."""
    known = _known(results)
    found = [id_ for id_ in known if id_ == words] or [id_ for id_ in known if words.lower() in id_.lower()]
    if len(found) == 1:
        return found[0]
    what = f"{words!r} may be any of " + ", ".join(found) if found else f"no target {words!r} in {results.session.id}"
    raise UsageError(what, code="unknown_target", hint="targets are " + ", ".join(known))


def sides(a: str, b: str, within: str | None = None, root: Path = ROOT) -> list[tuple[Side, Side]]:
    """What is to be compared with what.

    Two sessions: each target with the one of the same id, or the only one of each; `SESSION:TARGET` picks one; a bare
    target means the session `within` (the newest, if None).  Raises ResultsError and UsageError.
    """
    (old, mine), (new, theirs) = _read(a, within, root), _read(b, within, root)
    if mine is not None or theirs is not None:
        return [(Side(old, mine or _only(old, theirs)), Side(new, theirs or _only(new, mine)))]
    first, second = measured(old), measured(new)
    if len(first) == len(second) == 1:
        return [(Side(old, first[0]), Side(new, second[0]))]
    both = [id_ for id_ in first if id_ in second]
    if not both:
        raise UsageError(
            f"{old.session.id} and {new.session.id} have no target in common", code="unknown_target",
            hint="name them: SESSION:TARGET SESSION:TARGET",
        )  # fmt: skip
    return [(Side(old, id_), Side(new, id_)) for id_ in both]


def gone(a: str, b: str, root: Path = ROOT) -> list[str]:
    """The targets of session `a` that session `b` did not measure, a line for each; none where one target each is named."""
    if not (is_session(a, root) and is_session(b, root)):
        return []
    old, new = measured(load(folder(a, root))), measured(load(folder(b, root)))
    return [f"{id_} was not measured" for id_ in old if id_ not in new and len(old) > 1]


def _read(words: str, within: str | None, root: Path) -> tuple[Results, str | None]:
    if is_session(words, root):
        return load(folder(words, root)), None
    session, colon, rest = words.partition(":")
    if colon and is_session(session, root):
        results = load(folder(session, root))
        return results, target(results, rest)
    results = load(folder(within, root))
    return results, target(results, words)


def _only(results: Results, other: str | None) -> str:
    """The partner of a named target in a session of which no target was named."""
    found = measured(results)
    if other in found:
        return str(other)
    if len(found) == 1:
        return found[0]
    raise UsageError(f"{results.session.id} has several targets", code="unknown_target", hint="name one: SESSION:TARGET")


def measured(results: Results) -> list[str]:
    """Targets with at least one measured trial, in the suite's order."""
    ran = {t.target for t in results.measured()}
    return [id_ for id_ in _known(results) if id_ in ran]


def _known(results: Results) -> list[str]:
    return list(dict.fromkeys([*(t.id for t in results.session.targets), *(t.target for t in results.trials)]))
