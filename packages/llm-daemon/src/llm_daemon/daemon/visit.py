"""One request for the admin app."""

from __future__ import annotations

import asyncio

from ..errors import LlmDaemonError
from .exchange import Exchange, report
from .route import Route


class Visit(Exchange):
    """A request for the admin app: it needs no ticket, wakes nobody and keeps nobody alive."""

    _task: asyncio.Task[None] | None = None

    def _open(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._visit())

    async def _visit(self) -> None:
        try:
            path = await self._gateway.desk.admin()
        except Exception as e:
            self.refuse(report(e))
        else:
            self.run(Route("", path))

    def _gone(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _aborting(self) -> None:
        pass

    def _ended(self, served: bool) -> None:
        pass

    def _lost(self, error: LlmDaemonError) -> bool:
        return False

    def _own_headers(self) -> bytes:
        return b""
