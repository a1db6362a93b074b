"""What `engines --measure` found, kept in the state folder; one entry for each engine as it was then."""

from __future__ import annotations

import json
import os
from typing import Any

from .. import paths
from ..errors import UsageError

KEPT = 32  # entries; the oldest goes
KEY = ("engine", "version", "argv0")
LARGEST = 2**20  # bytes of a file that is ours


def load() -> list[dict[str, Any]]:
    """All entries, the newest last; none if there is no file, or one that is not ours."""
    try:
        with open(paths.hangups_file()) as f:
            entries = json.loads(f.read(LARGEST))
    except (OSError, ValueError, RecursionError):
        return []
    return [e for e in entries if _is_whole(e)][-KEPT:] if isinstance(entries, list) else []


def find(entries: list[dict[str, Any]], engine: str, version: str, argv0: str) -> dict[str, Any] | None:
    """The entry of this very program, or None."""
    return next((e for e in reversed(entries) if tuple(e[name] for name in KEY) == (engine, version, argv0)), None)


def save(entry: dict[str, Any]) -> None:
    """Puts `entry` in the place of an older one of the same program.  Whoever reads sees the old file or the new one, whole.

    Raises UsageError (`state_unwritable`) if it cannot be kept.
    """
    others = [e for e in load() if any(e[name] != entry[name] for name in KEY)]
    path = paths.hangups_file()
    fresh = f"{path}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        try:
            with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f:
                json.dump([*others, entry][-KEPT:], f)
            os.replace(fresh, path)
        except BaseException:
            if os.path.exists(fresh):
                os.unlink(fresh)
            raise
    except OSError as e:
        raise UsageError(
            f"cannot keep what was measured in {path}: {e.strerror}", code="state_unwritable",
            hint="set LLM_DAEMON_STATE_DIR to a folder of yours",
        ) from e  # fmt: skip


def brief(entry: dict[str, Any] | None) -> str:
    """The worst of the medians of what clients get and, where the gateway asks otherwise than the client, of a plain request.

    >>> way = lambda ms, noticed=True: {"alone": {"ms": 20.4, "noticed": True}, "beside": {"ms": ms, "noticed": noticed}}
    >>> brief({"ways": {"streaming": way(28), "non-streaming": way(25), "plain": way(1720)}})
    '28 ms (plain 1,720 ms)'
    >>> brief({"ways": {"streaming": way(28), "non-streaming": way(7e3, False), "plain": way(7e3, False)}})
    'not noticed'
    >>> brief(None)
    'not measured'
    """
    if entry is None:
        return "not measured"
    ways = entry["ways"]
    plain, clients = list(ways["plain"].values()), [*ways["streaming"].values(), *ways["non-streaming"].values()]
    return _worst(clients) + (f" (plain {_worst(plain)})" if ways["plain"] != ways["non-streaming"] else "")


def _worst(found: list[dict[str, Any]]) -> str:
    return f"{max(one['ms'] for one in found):,.0f} ms" if all(one["noticed"] for one in found) else "not noticed"


def _is_whole(entry: Any) -> bool:
    try:
        brief(entry)
        return all(isinstance(entry[name], str) for name in KEY)
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
