"""A web page in a real browser, headless: one of a foreign origin gets nothing, an allowed one what it asks for."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import tempfile
from contextlib import suppress
from typing import Any

import pytest

from .fakes import CHAT, World

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-breakpad", "--no-first-run",
    "--disable-background-networking", "--remote-debugging-port=0",
]  # fmt: skip
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
TOKEN = "plain-token"
# Everything that a page can try: what comes of it is sent to the page's own server.
PAGE = """<!doctype html><link rel=icon href="data:,"><script>
const base = "BASE", found = {};
const key = {authorization: "Bearer TOKEN"};
async function attempt(name, path, options) {
  try { const r = await fetch(base + path, options); found[name] = r.type == "opaque" ? "opaque" : r.status; }
  catch (e) { found[name] = "refused"; }
}
(async () => {
  await attempt("get", "/health", {});
  await attempt("blind get", "/v1/models", {mode: "no-cors"});
  await attempt("blind post", "CHAT", {method: "POST", mode: "no-cors", body: '{"model":"m"}'});
  await attempt("post", "CHAT", {method: "POST", body: '{"model":"m"}', headers: {"content-type": "application/json"}});
  await attempt("post with key", "CHAT",
    {method: "POST", body: '{"model":"m"}', headers: {"content-type": "application/json", "x-stainless-os": "x", ...key}});
  await new Promise(done => { const i = new Image(); i.onload = i.onerror = done; i.src = base + "/upstream/m/x.png"; });
  await new Promise(done => { const s = new WebSocket(base.replace("http", "ws") + "/upstream/m/ws");
    s.onopen = () => { found.socket = "open"; done(); }; s.onerror = () => { found.socket = "refused"; done(); }; });
  await fetch("/found", {method: "POST", body: JSON.stringify(found)});
})();
</script>"""


async def visit(w: World, sock: socket.socket) -> dict[str, Any]:
    """Shows a page, served at a bound socket, to the browser: what came of each attempt."""
    told: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
    page = PAGE.replace("BASE", f"http://127.0.0.1:{w.port}").replace("CHAT", CHAT).replace("TOKEN", TOKEN).encode()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"POST /found"):
                size = int(head.lower().partition(b"content-length:")[2].split()[0])
                told.set_result(json.loads(await reader.readexactly(size)))
            kind = b"Content-Type: text/html\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(page)
            writer.write(b"HTTP/1.1 200 OK\r\n" + kind + page)
            await writer.drain()
        writer.close()

    assert CHROMIUM is not None
    server = await asyncio.start_server(serve, sock=sock)
    with tempfile.TemporaryDirectory(prefix="llmd-", ignore_cleanup_errors=True) as home:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/"
        quiet = asyncio.subprocess.DEVNULL
        browser = await asyncio.create_subprocess_exec(
            CHROMIUM, *FLAGS, f"--user-data-dir={home}", url, stdin=quiet, stdout=quiet, stderr=quiet
        )
        try:
            return await told
        finally:
            browser.terminate()
            await browser.wait()
            server.close()
            await server.wait_closed()


def test_a_foreign_page_gets_nothing_even_where_no_token_is_asked_for(world: Any) -> None:
    async def main() -> None:
        async with world(token=None) as w:
            found = await visit(w, socket.create_server(("127.0.0.1", 0)))
            blind = {"blind get": "opaque", "blind post": "opaque"}  # a page is not told more than that
            assert found == blind | dict.fromkeys(("get", "post", "post with key", "socket"), "refused")
            assert w.engine.calls == [] and w.desk.log.items == []

    asyncio.run(main())


def test_an_allowed_page_still_needs_the_token(world: Any) -> None:
    async def main() -> None:
        sock = socket.create_server(("127.0.0.1", 0))
        origin = f"http://127.0.0.1:{sock.getsockname()[1]}"
        async with world(token=TOKEN, origins=frozenset({origin})) as w:
            found = await visit(w, sock)
            assert (found["get"], found["post"], found["post with key"], found["socket"]) == (200, 401, 200, "refused")
            assert [call.body for call in w.engine.calls] == [b'{"model":"m"}']

    asyncio.run(main())
