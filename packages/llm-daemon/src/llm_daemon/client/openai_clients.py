"""OpenAI clients that follow their lease: when the daemon is gone they attach again and go where it went."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    import openai

    from .sync import Lease


def _import() -> tuple[Any, Any]:
    """openai, and the HTTP library that this release of it is built on (httpx, or httpx2 from openai 3 on)."""
    from importlib import import_module

    try:
        import openai
    except ImportError:
        raise UsageError("the openai package is not installed", code="no_openai", hint="pip install openai") from None
    library = openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0]
    return openai, import_module(library)


def make(lease: Lease, **options: Any) -> openai.OpenAI:
    """An `openai.OpenAI` whose every request goes to the lease's current endpoint."""
    openai_module, httpx = _import()

    class Transport(httpx.HTTPTransport):  # type: ignore[misc, name-defined]
        def handle_request(self, request: Any) -> Any:
            lease.refresh()
            _aim(httpx, lease, request)
            try:
                return super().handle_request(request)
            except httpx.ConnectError:  # nothing was sent: safe to send elsewhere
                lease.refresh()
                _aim(httpx, lease, request)
                return super().handle_request(request)

    http_client = openai_module.DefaultHttpxClient(transport=Transport())
    lease._clients.append(http_client)
    client: openai.OpenAI = openai_module.OpenAI(
        **{"base_url": lease.base_url, "api_key": lease.api_key, "http_client": http_client, **options}
    )
    return client


def make_async(lease: Lease, closing: list[Any], **options: Any) -> openai.AsyncOpenAI:
    """The async twin of `make`; the caller closes what is put into `closing`.  Attaching again happens in a worker thread."""
    openai_module, httpx = _import()

    async def follow() -> None:
        if not lease.is_attached():  # attaching blocks, and whoever comes meanwhile waits for it too: in a thread
            await asyncio.to_thread(lease.refresh)

    class Transport(httpx.AsyncHTTPTransport):  # type: ignore[misc, name-defined]
        async def handle_async_request(self, request: Any) -> Any:
            await follow()
            _aim(httpx, lease, request)
            try:
                return await super().handle_async_request(request)
            except httpx.ConnectError:
                await follow()
                _aim(httpx, lease, request)
                return await super().handle_async_request(request)

    http_client = openai_module.DefaultAsyncHttpxClient(transport=Transport())
    closing.append(http_client)
    client: openai.AsyncOpenAI = openai_module.AsyncOpenAI(
        **{"base_url": lease.base_url, "api_key": lease.api_key, "http_client": http_client, **options}
    )
    return client


def _aim(httpx: Any, lease: Lease, request: Any) -> None:
    """Points the request at the lease's endpoint of now: a new daemon may have another port, and another token."""
    now = httpx.URL(lease._facts["base_url"])
    request.url = request.url.copy_with(host=now.host, port=now.port)
    request.headers["host"] = f"{now.host}:{now.port}"
    request.headers["authorization"] = f"Bearer {lease._facts['api_key']}"
