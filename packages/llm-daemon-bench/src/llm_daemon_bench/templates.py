"""What a suite writes in braces in `launch` and `version`: `str.format` with plain names only; `{{` and `}}` are braces."""

from __future__ import annotations

from collections.abc import Collection
from string import Formatter

# What may stand in braces in `launch`; in `version` all but where it listens.
PLACES = ("artifact", "port", "host", "socket", "threads", "context", "slots", "alias", "gpu_layers")
TOLD = tuple(name for name in PLACES if name not in ("port", "socket"))


def named(text: str, known: Collection[str] = PLACES) -> set[str]:
    """The names in braces.  Raises ValueError, which says what is wrong in a line, for all that `format_map` would not fill in.

    >>> named('--cfg={{"port": {port}, "ctx": {context}}}') == {"port", "context"}, named("{{port}}")
    (True, set())
    >>> named('{"port": {port}}')
    Traceback (most recent call last):
    ValueError: unknown {"port": ...}
    """
    try:
        parts = [(name, spec, conversion) for _, name, spec, conversion in Formatter().parse(text) if name is not None]
    except ValueError as e:
        raise ValueError(f"{text!r}: {str(e).lower()}") from None
    for name, spec, conversion in parts:
        if name not in known:
            raise ValueError(f"unknown {{{name}{': ...' if spec else ''}}}")
        if spec or conversion:
            raise ValueError(f"{{{name}}} takes neither : nor !")
    return {name for name, _, _ in parts}
