"""What the admin app needs of the daemon, and nothing else."""

from __future__ import annotations

from typing import Any, Protocol

from ..journal import Journal


class Facts(Protocol):
    """Asked on the loop's thread.  Those that look change nothing and wake nobody.

    Those that act raise an LlmDaemonError, which becomes the answer.
    """

    @property
    def journal(self) -> Journal: ...

    def status(self) -> dict[str, Any]:
        """daemon/status.py."""
        ...

    def tickets(self) -> list[dict[str, Any]]:
        """Requests without an end, oldest first: `ticket`, `state` (waiting, running, aborting), `model`, `instance`, `lane`,
        `position` (in its queue, from 0), `total_s` (seconds since arrival), and `path`, `stream`, `via` where known."""
        ...

    async def load(self, model: str) -> dict[str, Any]:
        """Loads a model; returns `model`, `instance`, `engine`, `pid` when it answers.  Cancelled, it waits no longer."""
        ...

    async def unload(self, model: str, force: bool) -> dict[str, Any]:
        """As `llm-daemon stop MODEL`: `stopped`, a list of model ids."""
        ...

    async def stop(self, force: bool) -> dict[str, Any]:
        """As `llm-daemon stop`; begins a moment after it has answered."""
        ...

    def cancel(self, ticket: str) -> bool:
        """Ends a request, waiting or running; False if there is none."""
        ...
