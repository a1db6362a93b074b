"""The HTTP routes: which path goes where, and how its model is named (architecture.md 3)."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from ..spec import EMBEDDING, GENERATE, RERANK

INTERACTIVE, REGULAR = "interactive", "regular"
ASIDE = "aside"  # needs the engine, but none of its slots: queued for nobody, run as soon as the model is there

UPSTREAM = "/upstream/"


class Kind(StrEnum):
    """Who answers."""

    RELAYED = "relayed"  # an engine, chosen by the `model` in the body
    PASSED = "passed"  # an engine, chosen by the path: anything else that it answers
    ADMIN = "admin"  # the admin app, as one more upstream
    ANSWERED = "answered"  # the gateway itself


class Route(NamedTuple):
    """Where a request goes.  `path` is what the engine is asked, without the query; `model`, as sent, if the path names one."""

    kind: Kind
    path: str
    lane: str = REGULAR
    model: str | None = None
    multipart: bool = False  # may be a form with a file in it


def _relayed(lane: str, *paths: str, multipart: bool = False) -> dict[str, Route]:
    return {path: Route(Kind.RELAYED, path, lane, multipart=multipart) for path in paths}


# Completions serve an editor's last keystroke; a conversation can wait its turn.
RELAYED = {
    **_relayed(INTERACTIVE, "/v1/completions", "/completion", "/infill"),
    **_relayed(REGULAR, "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/rerank"),
    **_relayed(ASIDE, "/v1/messages/count_tokens", "/tokenize", "/detokenize", "/apply-template"),
    **_relayed(REGULAR, "/v1/audio/speech"),
    **_relayed(REGULAR, "/v1/audio/transcriptions", "/v1/audio/translations", multipart=True),
}
# What a model must be loaded for; the others do not care.
MODES = {
    **dict.fromkeys(("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"), GENERATE),
    **dict.fromkeys(("/completion", "/infill"), GENERATE),
    "/v1/embeddings": EMBEDDING,
    "/v1/rerank": RERANK,
}
ANSWERED = {path: Route(Kind.ANSWERED, path) for path in ("/health", "/v1/models")}
_EXACT = {**RELAYED, **ANSWERED, "/metrics": Route(Kind.ADMIN, "/metrics"), "/ui": Route(Kind.ADMIN, "/ui")}


def find(path: str) -> Route | None:
    """The route of a request's path (as sent, no query); None if there is none.

    >>> find("/v1/completions").lane, find("/v1/chat/completions").lane, find("/v2/nothing")
    ('interactive', 'regular', None)
    >>> find("/upstream/hf%3Aorg%2Frepo/props")
    Route(kind=<Kind.PASSED: 'passed'>, path='/props', lane='regular', model='hf%3Aorg%2Frepo', multipart=False)
    >>> find("/upstream/m/v1/chat/completions").kind  # what is known is relayed as ever
    <Kind.RELAYED: 'relayed'>
    """
    if (route := _EXACT.get(path)) is not None:
        return route
    if path.startswith(UPSTREAM):
        model, slash, rest = path.removeprefix(UPSTREAM).partition("/")
        if not (model and slash):
            return None
        known = RELAYED.get("/" + rest) or Route(Kind.PASSED, "/" + rest)
        return known._replace(model=model)
    if path.startswith("/v1/models/"):
        return Route(Kind.ANSWERED, path)
    if path.startswith(("/api/", "/ui/")):
        return Route(Kind.ADMIN, path)
    return None


def is_open(path: str) -> bool:
    """Whether a route needs no token: that we live, and the dashboard's files, which hold nothing."""
    return path == "/health" or path == "/ui" or path.startswith("/ui/")


def known() -> list[str]:
    """What to tell somebody who asked for something else."""
    return sorted([*_EXACT, "/api/...", "/ui/", "/upstream/{model}/...", "/v1/models/{id}"])
