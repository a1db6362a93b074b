"""A daemon made of nothing: facts a test may change, the journal real, and a client that speaks HTTP by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from llm_daemon import errors
from llm_daemon.core import events as ev
from llm_daemon.daemon.history import History
from llm_daemon.daemon.journal import Journal, TicketRecord
from llm_daemon.spec import Artifact, Spec, Wish

SPEC = Spec(Wish("smollm2-135m"), Artifact("file", "/m.gguf", "k"))
OTHER = Spec(Wish("gemma3-270m"), Artifact("file", "/g.gguf", "g"))


def record(ticket: str = "t-1", **fields: Any) -> TicketRecord:
    """A served request of 2.5 s: 0.5 waiting, 1 loading, 0.25 until its answer began."""
    usual: dict[str, Any] = {
        "time": 1_750_000_000.0, "path": "/v1/chat/completions", "model": "smollm2-135m", "end": "served", "total_s": 2.5,
        "instance": "i1", "engine": "xllamacpp", "lane": "regular", "status": 200, "queue_s": 0.5, "load_s": 1.0,
        "engine_s": 0.25, "first_token_s": 1.76, "bytes_in": 100, "bytes_out": 2000, "chunks": 20,
        "prompt_tokens": 12, "completion_tokens": 52,
        "stream": True, "pid": 4300,
    }  # fmt: skip
    return TicketRecord(ticket=ticket, **{**usual, **fields})


def load(journal: Journal, instance: str = "i1", spec: Spec = SPEC, at: float = 100.0) -> None:
    """A model is asked for and ready two seconds later."""
    journal.saw(ev.Want("c1", 1, spec), [ev.Start(instance, spec)], at)
    journal.saw(ev.Up(instance, 2), [], at + 2.0)


class FakeFacts:
    """`asked` is what was to be done; `answer` is given to it, or raised."""

    def __init__(self, history: History | None = None) -> None:
        self.journal = Journal(history)
        self.asked: list[tuple[Any, ...]] = []
        self.answer: dict[str, Any] | Exception = {"stopped": ["smollm2-135m"]}
        self.live: list[dict[str, Any]] = []
        self.looks = 0

    def status(self) -> dict[str, Any]:
        self.looks += 1
        daemon = {
            "pid": 77, "version": "1.2.3", "uptime": 60.0, "base_url": "http://127.0.0.1:28282/v1", "memory_bytes": 22_000_000,
            "exit_in": None, "leases": 1,
        }  # fmt: skip
        one = {
            "id": "i1", "model": "smollm2-135m", "state": "ready", "engine": "xllamacpp", "engine_version": "1", "pid": 4242,
            "memory_bytes": 350_000_000, "leases": ["c2"], "running": 1, "aborting": 0, "waiting": 3,
            "waiting_interactive": 1, "slots": 2, "context": 4096,
            "idle": None, "closes_in": 1800.0, "error": None, "progress": None, "stalled_seconds": None,
        }  # fmt: skip
        lease = {"pid": 4300, "program": "python train.py", "kind": "client", "since": 120.0, "models": ["smollm2-135m"]}
        return {"daemon": daemon, "instances": [one], "leases": [lease]}

    def tickets(self) -> list[dict[str, Any]]:
        return self.live

    def _done(self, *what: Any) -> dict[str, Any]:
        self.asked.append(what)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def load(self, model: str) -> dict[str, Any]:
        return self._done("load", model)

    async def unload(self, model: str, force: bool) -> dict[str, Any]:
        return self._done("unload", model, force)

    async def stop(self, force: bool) -> dict[str, Any]:
        return self._done("stop", force)

    def cancel(self, ticket: str) -> bool:
        self.asked.append(("cancel", ticket))
        return ticket in [one["ticket"] for one in self.live]


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes = b""
    json: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.headers.get("content-type") == "application/json" and self.body:
            self.json = json.loads(self.body)


async def fetch(path: str, target: str, *, method: str = "GET", body: bytes | None = None, **headers: str) -> Answer:
    """One request over the unix socket `path`."""
    reader, writer = await _send(path, target, method, body, headers)
    try:
        status, found = await _head(reader)
        return Answer(status, found, await reader.read())
    finally:
        writer.close()
        await writer.wait_closed()


async def frames(path: str, **headers: str) -> AsyncGenerator[dict[str, str], None]:
    """Server-sent events of `/api/events`, one dict of fields each; a comment is `{"": text}`."""
    reader, writer = await _send(path, "/api/events", "GET", None, headers)
    try:
        status, found = await _head(reader)
        assert status == 200 and found["content-type"].startswith("text/event-stream")
        text = b""
        while size := int(await reader.readline(), 16):
            text += (await reader.readexactly(size + 2))[:-2]
            *whole, text = text.split(b"\n\n")
            for frame in whole:
                fields = (line.partition(": ") for line in frame.decode().split("\n"))
                yield {name: value for name, _, value in fields}
    finally:
        writer.close()
        await writer.wait_closed()


async def _send(
    path: str, target: str, method: str, body: bytes | None, headers: dict[str, str]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_unix_connection(path)
    lines = [f"{method} {target} HTTP/1.1", "Host: x", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + (body or b""))
    return reader, writer


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    status = int((await reader.readline()).split()[1])
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode().partition(": ")
        headers[name.lower()] = value
    return status, headers


IN_USE = errors.Unavailable("1 client uses smollm2-135m: pid 9", code="in_use", hint="end it, or use --force")
