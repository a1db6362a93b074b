"""A local LLM that is simply there: name a model, get a live OpenAI-compatible endpoint.

    from llm_daemon import attach
    with attach("smollm2-135m") as llm:
        print(llm.base_url, llm.model)

Names are loaded on first use, so that importing this package costs next to nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .client import aio as aio
    from .client.sync import Lease as Lease, Progress as Progress, attach as attach, connect as connect
    from .errors import (
        Bug as Bug,
        DaemonUnresponsive as DaemonUnresponsive,
        EngineError as EngineError,
        EngineTimeout as EngineTimeout,
        LlmDaemonError as LlmDaemonError,
        LocalProtocolError as LocalProtocolError,
        ProtocolError as ProtocolError,
        RemoteProtocolError as RemoteProtocolError,
        Unavailable as Unavailable,
        UsageError as UsageError,
    )

    __version__: str

_HOMES = {
    "attach": ".client.sync", "connect": ".client.sync", "Lease": ".client.sync", "Progress": ".client.sync",
    "aio": ".client.aio",
    "LlmDaemonError": ".errors", "UsageError": ".errors", "Unavailable": ".errors", "DaemonUnresponsive": ".errors",
    "EngineError": ".errors", "EngineTimeout": ".errors", "ProtocolError": ".errors", "LocalProtocolError": ".errors",
    "RemoteProtocolError": ".errors", "Bug": ".errors",
}  # fmt: skip
__all__ = [*_HOMES, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name == "__version__":
        from importlib import metadata  # on demand: it costs milliseconds

        return metadata.version("llm-daemon")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_HOMES[name], __name__)
    value = module if name == "aio" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
