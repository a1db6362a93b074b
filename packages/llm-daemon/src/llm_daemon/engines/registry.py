"""Which engines there are: entry points of the group `llm_daemon.engines`, and `[engines.NAME]` with `command` or `adapter`."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from collections.abc import Mapping
from math import inf
from time import monotonic
from typing import Any

from ..errors import EngineError, UsageError
from .base import Adapter, Location, Missing, options_of

GROUP = "llm_daemon.engines"
MISSING_FOR = 10.0  # seconds until a missing program is looked for again


class Registry:
    """The adapters by name, and where their programs are.

    `config` is the settings' `engines`.  `preference` are the names to try first when nobody asks for one.  An entry point
    that cannot be imported is listed in `broken` (name -> reason) and does not disturb the others; an `adapter` of the
    configuration that cannot is the user's to correct: UsageError (`bad_config`).  May be used from any thread.
    """

    def __init__(
        self, config: Mapping[str, Mapping[str, Any]], preference: tuple[str, ...] = ("llama-server", "xllamacpp")
    ) -> None:
        self.config = config
        self.broken: dict[str, str] = {}
        self._found: dict[str, tuple[Location | Missing, float]] = {}
        self._adapters: dict[str, Adapter] = {}
        for point in importlib.metadata.entry_points(group=GROUP):
            try:
                self._adapters[point.name] = point.load()()
            except Exception as e:
                self.broken[point.name] = f"{type(e).__name__}: {e}"
        for name, table in config.items():
            if (made := configured(name, table)) is not None:
                self._adapters[name] = made
                self.broken.pop(name, None)
        first = self._first = [name for name in preference if name in self._adapters]
        self.names: tuple[str, ...] = (*first, *sorted(set(self._adapters) - set(first)))

    def get(self, name: str) -> Adapter:
        """UsageError (`unknown_engine`) if there is none of that name."""
        if name in self._adapters:
            return self._adapters[name]
        if name in self.broken:
            raise EngineError(
                f"the engine {name} cannot be used: {self.broken[name]}", code="engine_missing", hint="install its package anew"
            )
        near = difflib.get_close_matches(name, self.names, 1)
        hint = f"did you mean {near[0]}?" if near else "engines are " + ", ".join(self.names)
        raise UsageError(f"no engine {name!r}", code="unknown_engine", hint=hint)

    def locate(self, name: str) -> Location | Missing:
        """What the adapter finds, with its table of the configuration.

        The first time may take a few seconds: call it in a thread.  A program found is remembered, a missing one is
        looked for again after some seconds: it may have been installed meanwhile.
        """
        adapter = self.get(name)
        where, until = self._found.get(name, (None, 0.0))
        if where is None or monotonic() > until:
            where = adapter.locate(self.config.get(name, {}))
            self._found[name] = where, inf if isinstance(where, Location) else monotonic() + MISSING_FOR
        return where

    def choose(
        self, path: str | None, wanted: str | None = None, options: frozenset[str] = frozenset(), *, asks: bool = True
    ) -> tuple[Adapter, Location]:
        """The engine to load the file at `path` (None: not here yet) with: `wanted`, or the first that is there and takes it.

        `asks`: a program inside the file may be run for its version; without it nothing waits for one.
        It must be able to meet `options` (some of spec.SPECIAL): else UsageError (`unsupported_option`).
        EngineError (`engine_missing`) if it is not installed, with the way to get it; UsageError (`bad_model`) if none
        takes this file.
        """
        refused, missing, unable = [], [], []
        for name in (wanted,) if wanted else self.names:
            adapter = self.get(name)
            if path is not None and (reason := adapter.accepts(path)):
                refused.append((name, reason))
                continue
            if lacking := sorted(options - options_of(adapter)):
                unable.append(f"{name} cannot load a model with {', '.join(lacking)}")
                continue
            where = (path and _inside(adapter, path, asks)) or self.locate(name)
            if isinstance(where, Location):
                return adapter, where
            missing.append((name, where))
        if unable and (wanted or not missing):
            able = [name for name in self.names if options <= options_of(self.get(name))]
            raise UsageError(
                "; ".join(unable), code="unsupported_option",
                hint=f"leave it out, or use the engine {' or '.join(able)}" if able else "leave it out",
            )  # fmt: skip
        if missing:
            raise EngineError(
                "; ".join(f"{name}: {where.reason}" for name, where in missing),
                code="engine_missing",
                # The embedded engine comes last of those that are tried first, and it is the easiest to get.
                hint=next((where.hint for name, where in reversed(missing) if name in self._first), missing[-1][1].hint),
            )
        if not refused:
            raise EngineError("no engine is installed", code="engine_missing", hint='pip install "llm-daemon[llamacpp]"')
        hint = "is it the model itself? A web page or a Git LFS pointer may have been saved in its place: fetch it anew"
        raise UsageError(f"no engine can load {path} ({self._reasons(refused)})", code="bad_model", hint=hint)

    def _reasons(self, refused: list[tuple[str, str]]) -> str:
        """Those of the engines that are here, or of all if none is; one reason once."""
        here = [(name, why) for name, why in refused if isinstance(self._found.get(name, (None,))[0], Location)] or refused
        names: dict[str, list[str]] = {}
        for name, why in here:
            names.setdefault(why, []).append(name)
        return "; ".join(f"{', '.join(each)}: {why}" for why, each in names.items())


def _inside(adapter: Adapter, path: str, asks: bool) -> Location | None:
    """The program that a model file brings along, for adapters that know such files (`inside`)."""
    inside = getattr(adapter, "inside", None)
    found = inside(path, asks) if inside else None
    return found if isinstance(found, Location) else None


def configured(name: str, table: Mapping[str, Any]) -> Adapter | None:
    """The adapter that a table of the configuration describes (`command`) or names (`adapter`); None if it does neither."""
    if "command" in table:
        from .command import Command

        return Command(name, table)
    return _load(name, str(target)) if (target := table.get("adapter")) else None


def _load(name: str, target: str) -> Adapter:
    module, _, attribute = target.partition(":")
    try:
        adapter = getattr(importlib.import_module(module), attribute)()
    except Exception as e:
        raise UsageError(
            f"engines.{name}.adapter: cannot load {target!r}: {type(e).__name__}: {e}",
            code="bad_config",
            hint='write it as "module:Class"',
        ) from e
    if not isinstance(adapter, Adapter):
        raise UsageError(
            f"engines.{name}.adapter: {target} is not an engine adapter", code="bad_config", hint="see llm_daemon/engines/base.py"
        )
    return adapter
