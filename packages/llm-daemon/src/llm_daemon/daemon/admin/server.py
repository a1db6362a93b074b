"""The admin app's server: uvicorn's protocol on the daemon's own loop."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from .facts import Facts

if TYPE_CHECKING:
    import uvicorn


class Admin:
    """Serves the app for `facts` at the unix socket `path`, from the first call of `socket` on.

    Nothing of it is imported before: starlette, uvicorn and prometheus-client cost 10 MB and a quarter of a second.
    """

    def __init__(self, facts: Facts, path: str) -> None:
        self._facts, self.path = facts, path
        self._starting: asyncio.Task[uvicorn.Server] | None = None

    async def socket(self) -> str:
        """The socket's path, once somebody listens there.  Cancelling a caller leaves the start to the others."""
        if self._starting is None or (self._starting.done() and self._starting.exception() is not None):
            self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)
        return self.path

    async def close(self) -> None:
        """Listens no more and breaks off what runs.  May be called at any time, and twice."""
        starting, self._starting = self._starting, None
        if starting is None:
            return
        if not starting.done():
            starting.cancel()
        with suppress(asyncio.CancelledError, Exception):
            server = await starting
            for listener in server.servers:
                listener.close()
            for connection in list(server.server_state.connections):
                if connection.transport is not None:
                    connection.transport.abort()
            for task in list(server.server_state.tasks):
                task.cancel()
            await asyncio.gather(*server.server_state.tasks, return_exceptions=True)
        with suppress(OSError):
            os.unlink(self.path)

    async def _start(self) -> uvicorn.Server:
        await asyncio.to_thread(_import)  # requests are served meanwhile
        import uvicorn

        from .app import make_app

        config = uvicorn.Config(
            make_app(self._facts), uds=self.path, loop="none", http="httptools", ws="none", lifespan="off", log_config=None,
            log_level="warning", access_log=False, server_header=False, date_header=False,
        )  # fmt: skip
        config.load()
        server = uvicorn.Server(config)
        server.lifespan = config.lifespan_class(config)
        with suppress(FileNotFoundError):
            os.unlink(self.path)
        # Not `serve`: it takes the process's signals, and its main loop wakes ten times a second.
        await server.startup()
        return server


def _import() -> None:
    from . import app  # noqa: F401
