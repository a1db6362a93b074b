"""The admin routes.  GET looks and changes nothing; POST acts and takes a JSON object."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from ...core.openai import error_body, retry_after
from ...errors import Bug, LlmDaemonError, UsageError
from .. import explain
from ..journal import Happening, Journal, Subscription, as_dict
from .facts import Facts
from .metrics import exposition

PING = 15.0  # seconds of silence on an event stream until a comment says that it lives
LAST_EVENTS = 200  # of the history, when no limit is given
STATIC = Path(__file__).parent / "static"
FILES = {
    "": ("index.html", "text/html"), "app.js": ("app.js", "text/javascript"), "draw.js": ("draw.js", "text/javascript"),
    "style.css": ("style.css", "text/css"), "icon.svg": ("icon.svg", "image/svg+xml"),
}  # fmt: skip
# The page runs our own two scripts and speaks to us alone, whatever a model, a program or a file is called.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(facts: Facts) -> Starlette:
    """The ASGI app; who may ask was decided before."""
    routes = _Routes(facts)
    return Starlette(
        routes=[
            Route("/metrics", routes.metrics),
            Route("/api/status", routes.status),
            Route("/api/tickets", routes.tickets),
            Route("/api/events", routes.events),
            Route("/api/history", routes.history),
            Route("/api/explain", routes.explain),
            Route("/api/explain/{ticket}", routes.explain),
            Route("/api/load", routes.load, methods=["POST"]),
            Route("/api/unload", routes.unload, methods=["POST"]),
            Route("/api/stop", routes.stop, methods=["POST"]),
            Route("/api/cancel/{ticket}", routes.cancel, methods=["POST"]),
            Route("/ui", routes.door),
            Route("/ui/{name:path}", routes.page),
        ],
        exception_handlers={LlmDaemonError: _told, HTTPException: _wrong, Exception: _broken},
    )


class _Routes:
    def __init__(self, facts: Facts) -> None:
        self._facts = facts

    # What there is --------------------------------------------------------------------------------------------
    async def metrics(self, _: Request) -> Response:
        return Response(exposition(self._facts), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def status(self, _: Request) -> Response:
        return _json(self._facts.status())

    async def tickets(self, _: Request) -> Response:
        return _json({"tickets": self._facts.tickets()})

    async def history(self, request: Request) -> Response:
        limit = explain.limited(request.query_params.get("limit"), LAST_EVENTS)
        records = await explain.recent(self._facts.journal, limit, request.query_params.get("model"))
        return _json({"tickets": records})

    async def explain(self, request: Request) -> Response:
        limit = explain.limited(request.query_params.get("limit"))
        ticket = request.path_params.get("ticket")
        return _json(await explain.explain(self._facts.journal, ticket, limit, self._facts.tickets()))

    async def events(self, request: Request) -> Response:
        stream = _events(self._facts.journal, request.headers.get("last-event-id"))
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    # What is to be done ---------------------------------------------------------------------------------------
    async def load(self, request: Request) -> Response:
        wanted = await _body(request)
        return _json(await self._facts.load(_model(wanted)))

    async def unload(self, request: Request) -> Response:
        wanted = await _body(request)
        return _json(await self._facts.unload(_model(wanted), _force(wanted)))

    async def stop(self, request: Request) -> Response:
        return _json(await self._facts.stop(_force(await _body(request))))

    async def cancel(self, request: Request) -> Response:
        await _body(request)
        ticket = request.path_params["ticket"]
        if not self._facts.cancel(ticket):
            raise UsageError(f"no request {ticket[:100]!r} waits or runs", code="unknown_ticket", status=404)
        return _json({"cancelled": ticket})

    # The dashboard --------------------------------------------------------------------------------------------
    async def door(self, _: Request) -> Response:
        return RedirectResponse("/ui/", 308)

    async def page(self, request: Request) -> Response:
        found = FILES.get(request.path_params["name"])
        if found is None:
            raise HTTPException(404)
        name, kind = found
        return Response(_static(name), media_type=kind, headers=PAGE_HEADERS)


async def _events(journal: Journal, last_id: str | None) -> AsyncIterator[bytes]:
    """Server-sent events (HTML standard, section 9.2), each with the id that a reader can go on from."""
    subscription = journal.subscribe(last_id)
    try:
        yield b": llm-daemon\n\n"  # whoever waits for the head gets it now
        while True:
            event = await _next(subscription)
            yield b": ping\n\n" if event is None else _frame(journal, event)
    finally:
        subscription.close()


async def _next(subscription: Subscription) -> Happening | None:
    try:
        async with asyncio.timeout(PING):
            return await anext(subscription)
    except TimeoutError:
        return None


def _frame(journal: Journal, event: Happening) -> bytes:
    return f"id: {journal.event_id(event)}\nevent: {event.kind}\ndata: ".encode() + msgspec.json.encode(as_dict(event)) + b"\n\n"


@cache
def _static(name: str) -> bytes:
    return (STATIC / name).read_bytes()


async def _body(request: Request) -> dict[str, Any]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise UsageError("the body must be sent as content-type application/json", code="bad_content_type", status=415)
    try:
        return msgspec.json.decode(await request.body() or b"{}", type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise UsageError(f"the body must be a JSON object: {e}", code="bad_json") from None


def _model(wanted: dict[str, Any]) -> str:
    model = wanted.get("model")
    if not isinstance(model, str) or not model:
        raise UsageError("`model` must name one", code="bad_spec", hint='send {"model": "NAME"}')
    return model


def _force(wanted: dict[str, Any]) -> bool:
    force = wanted.get("force", False)
    if not isinstance(force, bool):
        raise UsageError("`force` must be true or false", code="bad_json")
    return force


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(
        msgspec.json.encode(value), status, {"Cache-Control": "no-store", **(headers or {})}, media_type="application/json"
    )


async def _told(_: Request, error: Exception) -> Response:
    assert isinstance(error, LlmDaemonError)
    wait = retry_after(error)
    headers = {"Cache-Control": "no-store"} | ({} if wait is None else {"Retry-After": str(wait)})
    return Response(error_body(error), error.status, headers, media_type="application/json")


async def _wrong(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:100]
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        answer = await _told(request, UsageError(f"{path} answers {allowed}", code="wrong_method", status=405))
        answer.headers["Allow"] = allowed
        return answer
    return await _told(request, UsageError(f"no route {path}", code="unknown_route", status=404))


async def _broken(request: Request, error: Exception) -> Response:
    return await _told(request, Bug(f"the daemon failed: {error!r}", hint="please report this"))  # uvicorn logs it
