"""Writes a choice into the user's config of llm-daemon, so that `attach(MODEL)` uses its engine and quantization.

The file's other entries, their order and comments stay (tomlkit keeps them).  The new text is checked by the daemon's own reader
before it replaces the file, all or nothing; the old one stays beside it with `.bak` at its end.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from llm_daemon import paths
from llm_daemon.config import NAMES, Settings, askable
from llm_daemon.errors import UsageError
from llm_daemon.models.catalog import Catalog
from llm_daemon.models.store import Store
from llm_daemon.spec import Wish

from .errors import MachineError
from .records import TargetInfo


@dataclass(frozen=True, slots=True)
class Applied:
    """What was written: `name` now means `wish`; `backup` is None where there was no file before."""

    file: Path
    name: str
    wish: str
    backup: Path | None


def wish_for(info: TargetInfo, user_catalog: MutableMapping[str, Any] | None = None) -> Wish:
    """The wish that `attach` turns into this target's weights and engine.  Raises UsageError (`cannot_apply`).

    By the catalog's name or the source where that means these very weights, else by the file's absolute path.
    """
    if not info.engine:
        raise UsageError(
            f"the daemon has no engine for {info.id}", code="cannot_apply",
            hint="`llm-daemon engines` lists them; any other server can be an engine of kind `command`",
        )  # fmt: skip
    path = os.path.abspath(os.path.expanduser(info.artifact.path)) if info.artifact else None
    there = path is not None and os.path.exists(path)
    if info.weights and not info.weights.startswith("/"):
        wish = replace(Wish.parse(info.weights), engine=info.engine)
        if _means(wish, path if there else None, user_catalog or {}):  # what was fetched may be fetched again
            return wish
    named = Wish(info.model, quant=info.quant or None, engine=info.engine)
    for wish in (named, Wish(info.model, engine=info.engine)):
        if _means(wish, path, user_catalog or {}):
            return wish
    if path is None or not there:
        raise UsageError(f"no weights are known for {info.id}", code="cannot_apply", hint="name the model in the catalog")
    return Wish(path, engine=info.engine)


def _means(wish: Wish, path: str | None, user_catalog: MutableMapping[str, Any]) -> bool:
    """Whether the catalog knows the name, and its file on disk is the one that was measured."""
    try:
        # Without the user's alias of that name: it may be our own, of an earlier choice.
        others = {k: v for k, v in user_catalog.items() if k.lower() != wish.model.lower() or not isinstance(v, str)}
        artifact = Catalog.load(others).resolve(wish).artifact
    except UsageError:
        return False
    if path is None:
        return True
    found = Store(Path(paths.cache_dir())).path(artifact)
    return found is not None and os.path.realpath(found) == os.path.realpath(path)


def apply(info: TargetInfo, *, name: str | None = None, file: str | None = None) -> Applied:
    """Sets `catalog.NAME` (the target's model, unless a name is given) to the choice, and `default_model` to NAME.

    Raises UsageError for a target that the daemon cannot serve, a broken file and a name that is taken by a table of the
    user's own or cannot be asked for, and MachineError if the file cannot be written; the file is then as it was.
    """
    path = Path(os.path.realpath(file or paths.config_file()))
    name = info.model if name is None else name
    if not askable(name):
        raise UsageError(
            f"nobody can ask for a model called {name!r}", code="cannot_apply", hint=f"choose another name with --as: {NAMES}"
        )
    before = _read(path)
    try:
        document = tomlkit.parse(before or "")
    except TOMLKitError as e:
        raise UsageError(f"{path}: not valid TOML: {e}", code="bad_config", hint="mend it first, nothing was changed") from None
    catalog = document.get("catalog")
    if catalog is None:
        catalog = document["catalog"] = tomlkit.table()
    if not isinstance(catalog, MutableMapping):
        raise UsageError(f"{path}: catalog must be a table", code="bad_config", hint="mend it first, nothing was changed")
    wish = wish_for(info, catalog)
    key = next((k for k in catalog if k.lower() == name.lower()), name)
    if isinstance(catalog.get(key), MutableMapping):
        raise UsageError(
            f"{path}: catalog.{key} is a model of your own", code="cannot_apply", hint="choose another name with --as"
        )
    catalog[key] = str(wish)
    document["default_model"] = name
    return _write(path, before, tomlkit.dumps(document), name, str(wish))


def _read(path: Path) -> str | None:
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"cannot read {path}: {e}", code="bad_config") from e


def _write(path: Path, before: str | None, text: str, name: str, wish: str) -> Applied:
    backup = path.with_name(path.name + ".bak") if before is not None else None
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
        with os.fdopen(fd, "wb") as f:
            f.write(text.encode())
            f.flush()
            os.fsync(f.fileno())
        _check(temporary, path)
        if backup is not None and before is not None:
            os.chmod(temporary, path.stat().st_mode & 0o777)
            backup.write_bytes(before.encode())
        os.replace(temporary, path)
    except OSError as e:
        raise MachineError(f"cannot write {path}: {e.strerror}", code="unwritable", hint="nothing was changed") from e
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
    return Applied(path, name, wish, backup)


def _check(written: str, path: Path) -> None:
    """The daemon's own reader has to like the whole file, before it is put in its place."""
    try:
        Catalog.load(Settings.load({}, written).catalog)
    except UsageError as e:
        raise UsageError(
            e.message.replace(written, str(path)), code="bad_config", hint="nothing was changed; mend this first"
        ) from None
