"""One model of a running Ollama as if it were an engine process of ours: loaded at the start, given back at the end.

Run as `python -I -S _ollama_host.py URL MODEL SOCKET [CONTEXT]`.  It loads MODEL through Ollama's own API, listens on the unix
socket and relays each connection's one request to URL; only routes of `ALLOWED` pass, none that pulls, makes or deletes models.
CONTEXT: the least number of tokens that Ollama must have loaded it with.

Ollama keeps a model for a while after each use (`keep_alive`).  Here that is `KEEP` seconds, renewed as long as this process
lives: so a model is let go of even if this process is killed.  At SIGTERM it is unloaded at once, or, if it was in memory
before we came, given back the time that it had left.

Ends with 4 if no Ollama answers, 5 if it cannot load the model, 6 if it went away, 7 if the socket cannot be listened on.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from contextlib import suppress
from datetime import datetime
from typing import Any, NoReturn
from urllib.parse import urlsplit

ALLOWED = ("/v1/", "/health")
KEEP, RENEW = 300, 120  # seconds
FOR_EVER = 10 * 365 * 86400  # seconds: what Ollama says of a model without an end is centuries away
HEAD = 65536  # bytes
UNLOAD = 2.0  # seconds to wait until it is out of memory


def log(text: str) -> None:
    print(f"ollama host: {text}", file=sys.stderr, flush=True)


def fail(code: int, text: str) -> NoReturn:
    log(f"error: {text}")
    sys.stdout.flush()
    os._exit(code)  # from whatever task: nothing here needs an orderly end


class Gone(OSError):
    """Ollama does not answer."""


class Ollama:
    """The running server.  Each call is a connection of its own."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            fail(4, f"{url} is not an http:// address")
        self.url, self.host, self.port = url, parts.hostname, parts.port or 11434

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            return await asyncio.open_connection(self.host, self.port, limit=HEAD)
        except OSError as e:
            raise Gone(f"no Ollama answers at {self.url}: {e.strerror or e}") from e

    async def call(self, path: str, body: object = None) -> tuple[int, dict[str, Any]]:
        """(status, JSON object): an empty object if it is none."""
        reader, writer = await self.connect()
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        try:
            writer.write(head.encode() + data)
            answer = await reader.read()
        except OSError as e:
            raise Gone(f"Ollama at {self.url} broke off: {e.strerror or e}") from e
        finally:
            writer.close()
        return parse(answer)


def parse(answer: bytes) -> tuple[int, dict[str, Any]]:
    """(status, JSON object) of a whole HTTP/1.1 response, chunked or not."""
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(None, 2)
    if len(words) < 2 or not words[1].isdigit():
        raise Gone("whoever answers is no Ollama (not HTTP)")
    if b"transfer-encoding: chunked" in head.lower():
        whole = b""
        while (size := int(body.partition(b"\r\n")[0].partition(b";")[0] or b"0", 16)) > 0:
            body = body.partition(b"\r\n")[2]
            whole, body = whole + body[:size], body[size + 2 :]
        body = whole
    try:
        value = json.loads(body)
    except ValueError:
        value = None
    return int(words[1]), value if isinstance(value, dict) else {}


class Host:
    def __init__(self, ollama: Ollama, model: str, context: int) -> None:
        self.ollama, self.model, self.context = ollama, model, context
        self.ready = False
        self.before: float | None = None  # monotonic time when it would have been unloaded, if it was there before us
        self.route = "/api/generate"  # that loads it; for a model that only embeds it is another

    async def load(self) -> None:
        """Returns when Ollama has it in memory."""
        try:
            _, about = await self.ollama.call("/api/version")
            log(f"Ollama {about.get('version', 'of unknown version')} at {self.ollama.url} loads {self.model}")
            found = await self.loaded()
            status, answer = await self.keep(KEEP)
            if found is not None:
                left = between(str(answer["created_at"]), str(found.get("expires_at"))) if "created_at" in answer else KEEP
                self.before = time.monotonic() + left
            if status == 400 and "does not support generate" in str(answer.get("error")):
                self.route = "/api/embed"
                status, answer = await self.keep(KEEP)
            if status != 200:
                fail(5, f"{answer.get('error') or f'status {status}'}")
            found = await self.loaded() or {}
        except Gone as e:
            fail(4, str(e))
        have = found.get("context_length")
        if self.context and isinstance(have, int) and have < self.context:
            await self.let_go()
            fail(
                5, f"Ollama loads {self.model} with {have} tokens of context, {self.context} are asked for: OLLAMA_CONTEXT_LENGTH"
            )
        log(f"loaded, {have or 'unknown'} tokens of context, {found.get('size', 'unknown')} bytes")

    async def keep(self, seconds: float) -> tuple[int, dict[str, Any]]:
        """Loads it, or keeps it for so long from now on; 0 unloads it."""
        body: dict[str, object] = {"model": self.model, "keep_alive": f"{seconds:.0f}s" if seconds else 0}
        return await self.ollama.call(self.route, body if self.route == "/api/generate" else {**body, "input": ""})

    async def loaded(self) -> dict[str, Any] | None:
        """What /api/ps says of it; None if it is not in memory."""
        _, answer = await self.ollama.call("/api/ps")
        names = (self.model, self.model + ":latest")
        return next((m for m in answer.get("models") or [] if m.get("name") in names or m.get("model") in names), None)

    async def renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW)
            try:
                await self.keep(KEEP)
            except (Gone, ValueError) as e:
                fail(6, str(e))

    async def let_go(self) -> None:
        """Unloads it, unless it was there before us."""
        try:
            if self.before is not None:
                left = self.before - time.monotonic()
                await self.keep(-1 if left > FOR_EVER else max(1, left))
                return
            await self.keep(0)
            for _ in range(int(UNLOAD / 0.05)):
                if await self.loaded() is None:
                    return
                await asyncio.sleep(0.05)
        except Gone as e:
            log(str(e))  # then nothing of it is in memory either

    # -- relay --

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self.relay(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
            pass  # the client went, or does not speak HTTP
        finally:
            writer.close()

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request, and its answer until either side closes."""
        head = await reader.readuntil(b"\r\n\r\n")
        line, _, headers = head.partition(b"\r\n")
        path = line.split(b" ")[1].decode("ascii").partition("?")[0]
        if not self.ready or path == "/health":
            answer(
                writer, 200 if self.ready else 503, {"status": "ok"} if self.ready else {"error": {"message": "Loading model"}}
            )
            return
        if not path.startswith(ALLOWED) or ".." in path or "%" in path:  # Ollama would tidy them up to another
            length = next(
                (h.partition(b":")[2] for h in headers.split(b"\r\n") if h.lower().startswith(b"content-length:")), b"0"
            )
            with suppress(asyncio.IncompleteReadError):  # a client that still writes would not read our answer
                await reader.readexactly(min(int(length), HEAD))
            answer(writer, 404, {"error": {"message": f"{path} is not relayed to Ollama", "type": "not_found_error"}})
            return
        kept = [h for h in headers.split(b"\r\n") if h and not h.lower().startswith((b"connection:", b"host:"))]
        kept += [b"Connection: close", f"Host: {self.ollama.host}:{self.ollama.port}".encode()]
        try:
            up_reader, up_writer = await self.ollama.connect()
        except Gone as e:
            fail(6, str(e))
        try:
            up_writer.write(b"\r\n".join([line, *kept, b"", b""]))
            # The client's end of file is its hang-up: closing our connection cancels the request at Ollama.
            ends = [asyncio.ensure_future(pump(reader, up_writer)), asyncio.ensure_future(pump(up_reader, writer))]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for end in ends:
                end.cancel()
            await asyncio.gather(*ends, return_exceptions=True)
        finally:
            up_writer.close()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(HEAD):
        writer.write(data)
        await writer.drain()


def answer(writer: asyncio.StreamWriter, status: int, value: object) -> None:
    reason = {200: "OK", 404: "Not Found", 503: "Service Unavailable"}[status]
    data = json.dumps(value).encode()
    head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    writer.write(head.encode() + b"Connection: close\r\n\r\n" + data)


def between(now: str, then: str) -> float:
    """Seconds from one of Ollama's times to another: by its clock, not by ours.  0 if one is none.

    Go writes RFC 3339 with up to nine digits of a second; the digits are left out.
    """
    times = []
    for text in (now, then):
        day, dot, rest = text.partition(".")
        try:
            times.append(datetime.fromisoformat(day + (rest.lstrip("0123456789") if dot else "")))
        except ValueError:
            return 0.0
    try:
        return (times[1] - times[0]).total_seconds()
    except TypeError:  # one of them has no zone
        return 0.0


async def main(url: str, model: str, socket: str, context: str = "0") -> None:
    host = Host(Ollama(url), model, int(context))
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    try:
        server = await asyncio.start_unix_server(host.serve, socket, limit=HEAD)
    except OSError as e:
        fail(7, f"cannot listen on {socket}: {e.strerror or e}")
    loading = asyncio.ensure_future(host.load())
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not stop.is_set():
        try:
            loading.result()
        except Exception as e:
            fail(4, f"whoever answers at {url} is no Ollama ({e!r})")
        host.ready = True
        log("ready")
        renewing = asyncio.ensure_future(host.renew())
        await stopping
        renewing.cancel()
    loading.cancel()
    server.close()
    await host.let_go()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
    os._exit(0)  # open relays end with us
