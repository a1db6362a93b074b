"""One started engine in the hands of a test: requests as the gateway would make them."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..daemon.address import tcp
from ..daemon.process import EngineProcess, Exit
from ..engines.base import Plan

ALIAS = "the-alias"
CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


class EngineConnection(http.client.HTTPConnection):
    """http.client at an engine's address (daemon/address.py); blocking, so use it in a thread."""

    def __init__(self, address: str, timeout: float = 60.0) -> None:
        super().__init__("localhost", timeout=timeout)
        self.address = address

    def connect(self) -> None:
        place = tcp(self.address)
        self.sock = socket.socket(socket.AF_UNIX if place is None else socket.AF_INET)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.address if place is None else place)


def call(address: str, route: str, body: object = None, headers: Mapping[str, str] | None = None) -> tuple[int, Any]:
    """One request to an engine: status, and the JSON of the answer (None if it is not JSON)."""
    with contextlib.closing(EngineConnection(address)) as connection:
        data = None if body is None else json.dumps(body)
        connection.request(
            "GET" if data is None else "POST", route, data, {"Content-Type": "application/json", **(headers or {})}
        )
        response = connection.getresponse()
        text = response.read()
    try:
        return response.status, json.loads(text)
    except ValueError:
        return response.status, None


@dataclass
class Running:
    """One started engine, for tests."""

    process: EngineProcess
    plan: Plan
    exits: list[Exit] = field(default_factory=list)

    @property
    def model(self) -> str:
        """The id that it answers to."""
        return self.plan.served_id or ALIAS

    async def call(self, route: str, body: Mapping[str, object] | None = None, keyed: bool = True) -> tuple[int, Any]:
        """One request as the gateway would make it; without the engine's key if not `keyed`."""
        asked = None if body is None else {"model": self.model, **body}
        headers = dict(self.plan.headers) if keyed else {}
        return await asyncio.to_thread(call, self.process.socket, self.plan.paths.get(route, route), asked, headers)

    async def stream(self, body: Mapping[str, object], route: str = CHAT) -> tuple[EngineConnection, http.client.HTTPResponse]:
        """An open stream whose first event has arrived; closing the connection is the hang-up."""

        def begin() -> tuple[EngineConnection, http.client.HTTPResponse]:
            connection = EngineConnection(self.process.socket)
            data = json.dumps({"model": self.model, **body, "stream": True})
            headers = {"Content-Type": "application/json", **dict(self.plan.headers)}
            connection.request("POST", self.plan.paths.get(route, route), data, headers)
            response = connection.getresponse()
            assert response.status == 200, response.read()
            while not response.readline().startswith(b"data: "):  # a comment keeps a connection alive
                pass
            return connection, response

        return await asyncio.to_thread(begin)
