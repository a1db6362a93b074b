"""Each client gets through the gateway what it gets from the engine spoken to directly.  The engine is a real one.

Left out is only what cannot be the same twice: random ids, times of day and of work.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from llm_daemon import attach
from llm_daemon.testing.world import World

pytestmark = pytest.mark.real

SAME: dict[str, Any] = {"temperature": 0, "cache_prompt": False, "seed": 1}
MESSAGES = [{"role": "user", "content": "Name three colours."}]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 12, **SAME}),
    "text": ("/v1/completions", {"prompt": "The capital of France is", "max_tokens": 8, "logprobs": 2, **SAME}),
    "two": ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 4, "n": 2, **SAME}),
    "native": ("/completion", {"prompt": "Once upon a time", "n_predict": 6, "n_probs": 2, **SAME}),
    "tokens": ("/tokenize", {"content": "Hello, 비형!"}),
    "wrong": ("/v1/chat/completions", {"messages": "none", **SAME}),
    "format": (
        "/v1/chat/completions",
        {"messages": MESSAGES, "max_tokens": 20, "response_format": {"type": "json_object"}, **SAME},
    ),
}
STREAMED = ("chat", "text", "native", "wrong")
VARYING = {"id", "created", "timings", "id_slot"}
Seen = tuple[int, str, list[Any]]


@dataclass(frozen=True)
class Door:
    """Where to ask: the gateway's port, or the engine's unix socket."""

    model: str
    base: str
    token: str = ""
    path: str | None = None

    def body(self, case: str, stream: bool) -> tuple[str, dict[str, Any]]:
        path, body = CASES[case]
        return path, {"model": self.model, **body} | ({"stream": True} if stream else {})

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token}"} if self.token else {}


@pytest.fixture(scope="module")
def doors(smollm2: str) -> Iterator[tuple[Door, Door]]:
    """The gateway of a real daemon, and its engine."""
    base = Path(tempfile.mkdtemp(prefix="llmd-"))
    world = World(base)
    with pytest.MonkeyPatch.context() as patch:
        for name, path in (("RUNTIME_DIR", world.runtime), ("STATE_DIR", world.state), ("CONFIG", world.config)):
            patch.setenv(f"LLM_DAEMON_{name}", str(path))
        with attach(smollm2, engine="xllamacpp") as llm:
            (engine,) = world.runtime.rglob("engine.sock")
            yield (
                Door(llm.model, llm.base_url.removesuffix("/v1"), llm.api_key),
                Door(llm.model, "http://localhost", path=str(engine)),
            )
        world.close()
    shutil.rmtree(base)


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items() if key not in VARYING}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def seen(status: int, kind: str, text: str) -> Seen:
    if kind.startswith("text/event-stream"):
        events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
        return status, kind, [plain(json.loads(event)) if event != "[DONE]" else event for event in events]
    return status, kind, [plain(json.loads(text))]


def by_httpx(door: Door, case: str, stream: bool) -> Seen:
    path, body = door.body(case, stream)
    with httpx.Client(transport=httpx.HTTPTransport(uds=door.path), base_url=door.base, headers=door.headers, timeout=60) as http:
        answer = http.post(path, json=body)
    return seen(answer.status_code, answer.headers["content-type"], answer.text)


def by_async_httpx(door: Door, case: str, stream: bool) -> Seen:
    async def main() -> Seen:
        path, body = door.body(case, stream)
        transport = httpx.AsyncHTTPTransport(uds=door.path)
        async with httpx.AsyncClient(transport=transport, base_url=door.base, headers=door.headers, timeout=60) as http:
            async with http.stream("POST", path, json=body) as answer:
                text = "".join([piece async for piece in answer.aiter_text()])
        return seen(answer.status_code, answer.headers["content-type"], text)

    return asyncio.run(main())


def by_curl(door: Door, case: str, stream: bool) -> Seen:
    path, body = door.body(case, stream)
    command = ["curl", "-sSN", "--max-time", "60", "-H", "Content-Type: application/json", "--data-binary", "@-"]
    command += [part for name, value in door.headers.items() for part in ("-H", f"{name}: {value}")]
    command += ["--unix-socket", door.path] if door.path else []
    command += ["-w", "\n%{http_code} %{content_type}", door.base + path]
    done = subprocess.run(command, input=json.dumps(body), capture_output=True, text=True, check=True)
    text, _, told = done.stdout.rpartition("\n")
    status, _, kind = told.partition(" ")
    return seen(int(status), kind, text)


def by_bytes(door: Door, case: str, stream: bool) -> Seen:
    """HTTP/1.0, a byte at a time: as little of a client as there can be."""
    path, body = door.body(case, stream)
    given = json.dumps(body).encode()
    lines = "".join(f"{name}: {value}\r\n" for name, value in door.headers.items())
    lines += f"Content-Type: application/json\r\nContent-Length: {len(given)}\r\n"
    head = f"POST {path} HTTP/1.0\r\nHost: localhost\r\n{lines}\r\n"
    with socket.socket(socket.AF_UNIX) if door.path else socket.socket() as sock:
        sock.settimeout(60)
        sock.connect(door.path or ("127.0.0.1", int(door.base.rpartition(":")[2])))
        for byte in head.encode() + given:
            sock.send(bytes([byte]))
        data = b"".join(iter(lambda: sock.recv(65536), b""))
    answer, _, rest = data.partition(b"\r\n\r\n")
    first, *told = answer.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in told)}
    if headers.get("transfer-encoding") == "chunked":  # the engine's own mistake: HTTP/1.0 knows no chunks
        assert door.path is not None
        rest = unchunked(rest)
    return seen(int(first.split()[1]), headers["content-type"], rest.decode())


def unchunked(data: bytes) -> bytes:
    out = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        out, data = out + data[: int(size, 16)], data[int(size, 16) + 2 :]
    return out


By = Callable[[Door, str, bool], Seen]
ROUNDS: list[tuple[By, str, bool]] = []
ROUNDS += [(by_httpx, case, False) for case in CASES] + [(by_httpx, case, True) for case in STREAMED]
ROUNDS += [
    (by, case, stream) for by in (by_async_httpx, by_curl, by_bytes) for case in ("chat", "wrong") for stream in (False, True)
]


@pytest.mark.parametrize(("by", "case", "stream"), ROUNDS)
def test_raw_clients(doors: tuple[Door, Door], by: By, case: str, stream: bool) -> None:
    if by is by_curl and shutil.which("curl") is None:
        pytest.skip("no curl here")
    through, direct = (by(door, case, stream) for door in doors)
    assert through == direct
    assert (through[0] == 200) == (case != "wrong")
    assert len(through[2]) > 3 or not stream or case == "wrong"


def chat_and_text(llm: Any, door: Door) -> list[Any]:
    found: list[Any] = []
    for case, create in (("chat", llm.chat.completions.create), ("text", llm.completions.create)):
        body = door.body(case, False)[1]
        more = {"extra_body": {"cache_prompt": body.pop("cache_prompt")}}
        found.append(create(**body, **more).model_dump())
        found.append([piece.model_dump() for piece in create(**body, **more, stream=True)])
    found.append(llm.models.list().data[0].id)
    with pytest.raises(openai.BadRequestError) as caught:
        llm.chat.completions.create(model=door.model, messages=[], extra_body={"messages": "none"})
    found.append((caught.value.code, caught.value.type, caught.value.body))
    return [plain(it) for it in found]


def test_the_openai_client(doors: tuple[Door, Door]) -> None:
    found = []
    for door in doors:
        with httpx.Client(transport=httpx.HTTPTransport(uds=door.path), timeout=60) as http:
            llm = openai.OpenAI(base_url=door.base + "/v1", api_key=door.token or "none", http_client=http, max_retries=0)
            found.append(chat_and_text(llm, door))
    assert found[0] == found[1]


def test_the_async_openai_client(doors: tuple[Door, Door]) -> None:
    async def ask(door: Door) -> list[Any]:
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=door.path), timeout=60) as http:
            llm: Any = openai.AsyncOpenAI(
                base_url=door.base + "/v1", api_key=door.token or "none", http_client=http, max_retries=0
            )
            body = door.body("chat", False)[1]
            more = {"extra_body": {"cache_prompt": body.pop("cache_prompt")}}
            whole = (await llm.chat.completions.create(**body, **more)).model_dump()
            stream = await llm.chat.completions.create(**body, **more, stream=True)
            return [plain(whole), plain([piece.model_dump() async for piece in stream])]

    through, direct = (asyncio.run(ask(door)) for door in doors)
    assert through == direct


def test_the_engines_own_page_is_the_same_through_the_gateway(doors: tuple[Door, Door]) -> None:
    from urllib.parse import quote

    def get(door: Door, before: str, path: str) -> tuple[int, str | None, bytes]:
        transport = httpx.HTTPTransport(uds=door.path)
        with httpx.Client(
            transport=transport, base_url=door.base, headers={**door.headers, "accept-encoding": "identity"}
        ) as http:
            answer = http.get(before + path)
        return answer.status_code, answer.headers.get("content-type"), answer.content

    for path in ("/props", "/v1/models", "/nowhere"):
        through, direct = get(doors[0], f"/upstream/{quote(doors[0].model, safe='')}", path), get(doors[1], "", path)
        assert through[:2] == direct[:2]
        if path == "/props":
            assert json.loads(through[2]).keys() == json.loads(direct[2]).keys()
