"""A live endpoint for an asyncio program.  The names are those of `sync`; what blocks there is awaited here."""

from __future__ import annotations

import asyncio

from . import sync

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Sequence
    from os import PathLike
    from typing import Any

    import openai


class Lease:
    """The async face of `sync.Lease`.  Attributes are those of the last attach; `await refresh()` attaches again."""

    def __init__(self, lease: sync.Lease) -> None:
        self._lease = lease
        self._clients: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        facts = self._lease._facts
        if name in ("base_url", "api_key", "model", "pid", "instance", "engine"):
            return facts[name]
        if name == "daemon_pid":
            return facts["daemon_pid"]
        raise AttributeError(name)

    async def refresh(self) -> None:
        """Attaches again if the daemon is gone; cancelling it leaves the lease detached, to be refreshed later."""
        if not self._lease.is_attached():
            await asyncio.to_thread(self._lease.refresh)

    def openai(self, **options: Any) -> openai.AsyncOpenAI:
        """An `openai.AsyncOpenAI` for this lease; it survives the daemon's death too."""
        from .openai_clients import make_async

        return make_async(self._lease, self._clients, **options)

    async def close(self) -> None:
        """Ends the lease; harmless a second time."""
        self._lease.close()
        for client in self._clients:
            await client.aclose()

    async def __aenter__(self) -> Lease:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return repr(self._lease)


class _Attaching:
    """What `attach` returns: await it, or use it in `async with`."""

    def __init__(self, make: Callable[[], Awaitable[Lease]]) -> None:
        self._make = make
        self._got: Lease | None = None

    def __await__(self) -> Generator[Any, None, Lease]:
        return self._make().__await__()

    async def __aenter__(self) -> Lease:
        self._got = await self._make()
        return self._got

    async def __aexit__(self, *exc: object) -> None:
        if self._got is not None:
            await self._got.close()


def attach(
    spec: str | PathLike[str],
    *,
    engine: str | None = None,
    quant: str | None = None,
    context: int | None = None,
    parallel: int | None = None,
    gpu_layers: int | None = None,
    args: Sequence[str] = (),
    mode: str | None = None,
    draft: str | PathLike[str] | None = None,
    mmproj: str | PathLike[str] | None = None,
    lora: str | PathLike[str] | Sequence[str | PathLike[str]] = (),
    keep_alive: float | None = None,
    timeout: float | None = None,
    on_progress: sync.Report | None = None,
) -> _Attaching:
    """As `sync.attach`: `llm = await attach(...)` or `async with attach(...) as llm`.

    `on_progress` is called on the event loop.  Cancelling ends the wait at once and leaves nothing behind.
    """

    async def make() -> Lease:
        loop = asyncio.get_running_loop()
        report: sync.Report | None = None
        if on_progress is not None:
            report = lambda progress: loop.call_soon_threadsafe(on_progress, progress)  # noqa: E731
        wish = sync.wish(
            spec, engine=engine, quant=quant, context=context, parallel=parallel, gpu_layers=gpu_layers, args=args,
            mode=mode, draft=draft, mmproj=mmproj, lora=lora,
        )  # fmt: skip
        lease = sync.Lease(wish, keep_alive, timeout, report)
        work = loop.run_in_executor(None, lease.refresh)
        try:
            await asyncio.shield(work)
        except BaseException:
            lease.close()  # wakes the thread: its connection is shut
            work.add_done_callback(lambda w: w.cancelled() or w.exception())
            raise
        return Lease(lease)

    return _Attaching(make)
