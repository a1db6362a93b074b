"""What a program asks for, in the form that goes over the wire.  Standard library only, and little of that."""

from __future__ import annotations

import os

from .. import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def wish(spec: str | os.PathLike[str], **options: Any) -> dict[str, Any]:
    """The wire form of a wish: what `attach` was asked, with paths made absolute (the daemon has another working folder)."""
    text: Any = os.fspath(spec) if hasattr(spec, "__fspath__") else spec
    if not isinstance(text, str) or not text.strip():
        raise errors.UsageError(f"a model is named by text, not {spec!r}", code="bad_spec", hint="e.g. smollm2-135m")
    out: dict[str, Any] = {"model": _whole(text)}
    for name, value in options.items():
        if value is not None and value != () and value != []:
            if value == "":
                raise errors.UsageError(f"{name} must not be empty", code="bad_spec")
            if name in ("args", "lora") and isinstance(value, (list, tuple)):
                value = list(value)
            out[name] = value
    for name in ("draft", "mmproj"):
        if name in out:
            out[name] = _whole(out[name])
    if lora := out.get("lora"):
        out["lora"] = [_whole(one) for one in (lora if isinstance(lora, list) else [lora])]
    return out


def _whole(given: Any) -> Any:
    """A path made absolute; anything else as it is."""
    text = os.fspath(given) if hasattr(given, "__fspath__") else given
    if not isinstance(text, str):
        raise errors.UsageError(f"a model is named by text, not {given!r}", code="bad_spec")
    if not is_path(text):
        return text
    try:
        return os.path.abspath(os.path.expanduser(text))
    except OSError as e:  # the working folder was deleted
        raise errors.UsageError(f"cannot tell where {text} is: {e.strerror}", code="bad_spec", hint="give a whole path") from None


def is_path(text: str) -> bool:
    """Whether a spec means a file: it begins like a path or ends like a model file.

    >>> is_path("./m.gguf"), is_path("smollm2-135m"), is_path("hf:org/repo:Q4_K_M"), is_path("m.gguf"), is_path("a.gguf:0.5")
    (True, False, False, True, True)
    """
    head, _, options = text.partition("?")
    head = head if "=" in options else text  # a file's name may have a question mark in it
    scale = head.rpartition(":")[2]  # of an adapter
    if scale != head and scale.strip("-.0123456789") == "":
        head = head[: -len(scale) - 1]
    return text[:1] in "/~." or (":" not in head and head.endswith((".gguf", ".llamafile", ".json")))
