"""Names for models.  Turns a wish into a spec: the artifact that is meant, found without network and without opening it."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..spec import FILES, GENERATE, MODES, Artifact, Extra, Spec, Wish, scaled
from . import file, pypi, sources
from .engine import ENGINES

SHIPPED = Path(__file__).with_name("catalog.toml")
_PIECE_KEYS = {"requirement": "requirement", "member": "member", "wheel_sha256": "sha256", "wheel_size": "size"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a listing.  An alias has the source `alias` and its target as note; `size` is in bytes."""

    name: str
    quant: str | None
    source: str
    size: int | None
    license: str | None
    note: str


@dataclass(frozen=True, slots=True)
class _Table:
    """A model's table as it stands in the file; the keys are these names.

    Where the weights are: `path`, or `requirement` (`package==version`, with `member`, `wheel_sha256`, `wheel_size`),
    or `parts` (a list of tables of those four), or `source` and `locator` (`hf` and `org/repo:quant`, `https` and the
    address).  What they are: `sha256`, `size` (bytes), `quant`, `license`, `note`, `mode` (what it is made for, if not to
    generate text).  `quants` holds further quantizations: tables of the same keys, each on top of this one; one of the
    source `mlc` (`org/repo`) is the default for the engine mlc-llm.
    """

    source: str | None = None
    locator: str | None = None
    path: str | None = None
    requirement: str | None = None
    member: str | None = None
    wheel_sha256: str | None = None
    wheel_size: int | None = None
    parts: tuple[Mapping[str, Any], ...] | None = None
    sha256: str | None = None
    size: int | None = None
    quant: str | None = None
    license: str | None = None
    note: str = ""
    mode: str | None = None

    def place(self) -> str:
        """A key of SOURCES; checks that exactly one place is named, and what belongs to it."""
        if self.source is not None or self.locator is not None:
            if self.source not in sources.SOURCES or not self.locator:
                raise _bad("source and locator belong together; sources are " + ", ".join(sources.SOURCES))
        named = [k for k in ("locator", "path", "requirement", "parts") if getattr(self, k)]
        if len(named) != 1:
            raise _bad("name one place: path, requirement, parts, or source and locator")
        place = {"path": "file", "locator": self.source}.get(named[0]) or "pypi"
        if place == "file" and (self.sha256 or self.size):
            raise _bad("sha256 and size belong to models that are fetched, not to a file in place")
        if named[0] != "requirement" and (self.member or self.wheel_sha256 or self.wheel_size):
            raise _bad("member, wheel_sha256 and wheel_size belong to a requirement")
        return place

    def artifact(self) -> Artifact:
        """The artifact; for a file in place this looks at the file."""
        if self.place() == "file":
            found = file.resolve(self.path or self.locator or "")
            return replace(found, quant=self.quant, license=self.license, note=self.note, mode=self.mode or found.mode)
        if (place := self.place()) == "pypi":
            found = pypi.from_pieces(self.pieces())
        else:
            found = sources.source(place).resolve(self.locator or "")
        key = f"sha256:{self.sha256}" if self.sha256 else found.key
        found = replace(found, key=key, size=self.size, license=self.license, note=self.note, mode=self.mode or GENERATE)
        return replace(found, quant=self.quant or found.quant, sha256=self.sha256 or found.sha256)

    def pieces(self) -> list[pypi.Piece]:
        place = pypi.pinned(self.requirement or self.locator or "") if not self.parts else ""
        tables = self.parts or (
            {"requirement": place, "member": self.member, "wheel_sha256": self.wheel_sha256, "wheel_size": self.wheel_size},
        )
        return [pypi.Piece(**{_PIECE_KEYS[k]: v for k, v in t.items()}) for t in tables]

    def check(self) -> None:
        """Raises UsageError for what can be known to be wrong without looking at the disk."""
        if self.place() != "file":
            self.artifact()
        elif not os.path.isabs(os.path.expanduser(self.path or self.locator or "")):
            raise _bad("the path must be absolute, or begin with ~")


class Catalog:
    """Shipped and own names.  Immutable; may be used from any thread."""

    def __init__(self, models: Mapping[str, list[_Table]], aliases: Mapping[str, Wish]) -> None:
        self._models = models  # lower-case name -> its quantizations, the default one first
        self._aliases = aliases

    @classmethod
    def load(cls, user: Mapping[str, Any]) -> Catalog:
        """The shipped catalog with the user's `[catalog]` on top.  Raises UsageError (`bad_config`) that names the entry.

        >>> mine = Catalog.load({"tiny": "smollm2-135m?context=512"})
        >>> mine.resolve(Wish.parse("Tiny")).model
        'smollm2-135m?context=512'
        """
        models = {name: _variants(value) for name, value in tomllib.loads(SHIPPED.read_text("utf-8")).items()}
        aliases: dict[str, Wish] = {}
        own: set[str] = set()
        for name, value in user.items():
            key = name.lower()
            try:
                if key in own:
                    raise _bad("the same name comes twice (case does not count)")
                own.add(key)
                if isinstance(value, str):
                    aliases[key] = Wish.parse(value)  # a shipped model of this name stays: the alias may mean it
                elif isinstance(value, Mapping) and "model" in value:
                    aliases[key] = _alias(value)
                else:
                    models[key] = _variants(value)
            except UsageError as e:
                raise _at(name, e) from None
        catalog = cls(models, aliases)
        for name, target in aliases.items():
            try:
                catalog._check_alias(target)
            except UsageError as e:
                raise _at(name, e) from None
        return catalog

    def entries(self) -> list[Entry]:
        """Everything that can be named, by name; the first of several quantizations is the default."""
        found = [
            Entry(name, t.quant, t.place(), t.size, t.license, t.note)
            for name, tables in self._models.items()
            if name not in self._aliases
            for t in tables
        ]
        found += [Entry(name, wish.quant, "alias", None, None, f"= {wish}") for name, wish in self._aliases.items()]
        return sorted(found, key=lambda entry: entry.name)

    def resolve(self, wish: Wish) -> Spec:
        """The spec that is wished for: the model's name in its normal form, its default quantization left out.

        So are the models of its options.  Raises UsageError: `unknown_model` (404), `unknown_quant` (404), `bad_spec`, and
        for a file what file.py says.
        """
        spec = self._model(self._follow(wish))
        wish, extras = spec.wish, []
        if wish.mode == spec.artifact.mode:
            wish = replace(wish, mode=None)
        for option in FILES:
            if not (given := getattr(wish, option)):
                continue
            found = [self._extra(option, text) for text in (given if option == "lora" else (given,))]
            extras += [extra for extra, _ in found]
            names = tuple(name for _, name in found)
            change: dict[str, Any] = {option: names if option == "lora" else names[0]}
            wish = replace(wish, **change)
        return replace(spec, wish=wish, extras=tuple(extras))

    def _extra(self, option: str, text: str) -> tuple[Extra, str]:
        """The model of an option, and its normal form in the wish."""
        name, scale = scaled(text) if option == "lora" else (text, 1.0)
        asked = Wish.parse(name)
        if asked != Wish(asked.model, quant=asked.quant):
            raise UsageError(f"{option} names a model and no options: {text!r}", code="bad_spec")
        found = self._follow(asked)
        try:
            spec = self._model(Wish(found.model, quant=found.quant))
        except UsageError as e:
            e.message = f"{option}: {e.message}"
            raise
        return Extra(option, spec.artifact, scale), spec.model + ("" if scale == 1.0 else f":{scale:g}")

    def _model(self, wish: Wish) -> Spec:
        name = wish.model.lower()
        if tables := self._models.get(name):
            table = _pick(name, tables, wish.quant, wish.engine)
            return Spec(replace(wish, model=name, quant=None if table is tables[0] else table.quant), table.artifact())
        if named := sources.split(wish.model):
            return self._from_source(wish, *named)
        if file.looks_like_path(wish.model):
            return self._from_source(wish, "file", wish.model)
        raise self._unknown(wish.model)

    def _from_source(self, wish: Wish, source: str, locator: str) -> Spec:
        if source == "file" and wish.quant and os.path.exists(os.path.expanduser(f"{locator}@{wish.quant}")):
            locator, wish = f"{locator}@{wish.quant}", replace(wish, quant=None)  # an @ in a file's name
        if source == "hf" and wish.quant and not any(mark in locator for mark in (":", ".gguf")):
            from . import hf  # as sources.py has it: only for those who use it

            repo, revision, _ = hf.parse(locator)  # what was asked for later wins over the quantization of an alias
            locator, wish = f"{hf.at(repo, revision)}:{wish.quant}", replace(wish, quant=None)
        if wish.quant:
            raise UsageError(
                f"@{wish.quant}: {wish.model} has the quantization it has", code="unknown_quant", status=404, hint="leave it out"
            )
        artifact = sources.source(source).resolve(locator)
        for name, tables in self._models.items():  # somebody may have pinned this very thing
            for table in tables:
                if source != "file" and table.place() == source and table.artifact().locator == artifact.locator:
                    quant = None if table is tables[0] else table.quant
                    return Spec(replace(wish, model=name, quant=quant), table.artifact())
        model = sources.named(source, artifact.locator)
        if "://" in model and artifact.sha256:
            model += f"#sha256={artifact.sha256}"
        return Spec(replace(wish, model=model), artifact)

    def _follow(self, wish: Wish) -> Wish:
        """Puts aliases' targets in their place; options of the wish win over those of the alias."""
        seen: set[str] = set()
        while (key := wish.model.lower()) in self._aliases and key not in seen:
            seen.add(key)
            options = {f.name: getattr(wish, f.name) for f in fields(Wish) if f.name != "model"}
            wish = replace(self._aliases[key], **{k: v for k, v in options.items() if v not in (None, ())})
        return wish

    def _check_alias(self, target: Wish) -> None:
        end = self._follow(target)
        key = end.model.lower()
        if tables := self._models.get(key):
            _pick(key, tables, end.quant)
        elif key in self._aliases:
            raise _bad("this alias leads back to itself")
        elif named := sources.split(end.model):
            if named[0] != "file":
                sources.source(named[0]).resolve(named[1])
        elif not file.looks_like_path(end.model):
            raise self._unknown(end.model)
        elif not os.path.isabs(os.path.expanduser(end.model)):
            raise _bad(f"the path {end.model} must be absolute, or begin with ~")

    def _unknown(self, name: str) -> UsageError:
        known = sorted({*self._models, *self._aliases})
        near = difflib.get_close_matches(name.lower(), known, 3, 0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        hint += "known names: " + ", ".join(known) + "; or give the whole path of a .gguf file"
        return UsageError(f"unknown model {name!r}", code="unknown_model", status=404, hint=hint, near=near)


def _pick(name: str, tables: list[_Table], quant: str | None, engine: str | None = None) -> _Table:
    if quant is None:  # the first that is made for the engine that is asked for, if there is one
        return next((t for t in tables if engine and engine == ENGINES.get(t.source or "")), tables[0])
    for table in tables:
        if table.quant and table.quant.lower() == quant.lower():
            return table
    have = ", ".join(t.quant for t in tables if t.quant) or "no named quantization"
    raise UsageError(f"{name} has no quantization {quant}", code="unknown_quant", status=404, hint=f"it has {have}")


def _alias(value: Mapping[str, Any]) -> Wish:
    """An alias as a table: `model`, and its options."""
    try:
        return Wish.of(**value)
    except UsageError as e:
        raise _bad(e.message, e.hint) from None


def _bad(message: str, hint: str = "") -> UsageError:
    return UsageError(message, code="bad_config", hint=hint)


def _at(name: str, error: UsageError) -> UsageError:
    return _bad(f"catalog.{name}: {error.message}", error.hint)


def _variants(value: object) -> list[_Table]:
    """The quantizations in one model's table, the default one first."""
    if not isinstance(value, Mapping):
        raise _bad("must be a model spec in quotes, or a table")
    base = {k: v for k, v in value.items() if k != "quants"}
    more = value.get("quants", {})
    if not isinstance(more, Mapping) or not all(isinstance(v, Mapping) for v in more.values()):
        raise _bad("quants must be a table of tables")
    places = ("path", "requirement", "parts", "locator")
    rows = [base] if not more or any(p in base for p in places) else []
    for quant, own in more.items():
        # A place of its own replaces the base's place whole: half of each would be neither.
        kept = {k: v for k, v in base.items() if k in ("license", "note", "mode") or (k == "source" and "locator" in own)}
        rows.append({**kept, **own, "quant": quant})
    tables = [_Table(**dict(_typed(row))) for row in rows]
    for table in tables:
        table.check()
    return tables


def _typed(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    known = {f.name for f in fields(_Table)}
    for key, value in row.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise _bad(f"unknown key {key!r}", f"did you mean {near[0]!r}?" if near else "keys are " + ", ".join(sorted(known)))
        if key == "parts":
            if not isinstance(value, list) or not value or not all(isinstance(p, Mapping) for p in value):
                raise _bad("parts must be a list of tables")
            for part in value:
                if "requirement" not in part or not part.keys() <= _PIECE_KEYS.keys():
                    raise _bad("each of parts has a requirement and may have " + ", ".join(list(_PIECE_KEYS)[1:]))
            yield key, tuple({k: _checked(k, v) for k, v in part.items()} for part in value)
        else:
            yield key, _checked(key, value)


def _checked(key: str, value: object) -> object:
    if key.endswith("size"):
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise _bad(f"{key} must be a number of bytes, not {value!r}")
    elif not isinstance(value, str) or not value.strip():
        raise _bad(f"{key} must be a text, not {value!r}")
    elif key.endswith("sha256"):
        value = value.lower()
        if not re.fullmatch(r"[0-9a-f]{64}", value):
            raise _bad(f"{key} must be 64 hexadecimal digits")
    elif key == "requirement":
        value = pypi.pinned(value)
    elif key == "mode" and value not in MODES:
        raise _bad(f"mode must be {', '.join(MODES[:-1])} or {MODES[-1]}")
    return value
