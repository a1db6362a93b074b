"""The dashboard in a real browser, headless: it draws what happens, asks for its key, and believes no name."""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from llm_daemon.core import events as ev
from llm_daemon.daemon.admin import Admin
from llm_daemon.daemon.journal import Subscription

from .fakes import SPEC, FakeFacts, load, record

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-breakpad", "--no-first-run",
    "--disable-background-networking", "--enable-logging=stderr", "--virtual-time-budget=3000",
]  # fmt: skip
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="llmd-", ignore_cleanup_errors=True) as name:
        yield Path(name)


class Door:
    """Between browser and admin app, in the gateway's place: TCP to the unix socket, with a key.  `heard` is what came in."""

    def __init__(self, path: str) -> None:
        self.path, self.heard = path, b""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            inner_reader, inner_writer = await asyncio.open_unix_connection(self.path)
            back = asyncio.create_task(self._pipe(inner_reader, writer))
            while data := await reader.read(65536):
                self.heard += data
                if b" /api/" in data and b"authorization: bearer s3cret" not in data.lower():
                    writer.write(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")
                else:
                    inner_writer.write(data)
            inner_writer.close()
            await back
        writer.close()

    @staticmethod
    async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)


@asynccontextmanager
async def opened(folder: Path, facts: FakeFacts) -> AsyncIterator[tuple[Door, str]]:
    admin = Admin(facts, str(folder / "admin.sock"))
    door = Door(await admin.socket())
    server = await asyncio.start_server(door.serve, "127.0.0.1", 0)
    try:
        yield door, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/ui/"
    finally:
        await admin.close()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
            await asyncio.wait([task])


async def visit(folder: Path, url: str) -> tuple[str, list[str]]:
    """The page some seconds later, and what its console said."""
    assert CHROMIUM is not None
    process = await asyncio.create_subprocess_exec(
        CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", url,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return out.decode(), re.findall(r"CONSOLE.*", err.decode())


async def test_it_draws_what_was_and_what_comes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = FakeFacts()
    load(facts.journal)
    facts.journal.ticket(record("t-was"))
    facts.live = [{"ticket": "t-live", "state": "running", "model": "smollm2-135m", "total_s": 1.0}]

    listening, subscribe = asyncio.Event(), facts.journal.subscribe

    def subscribed(last_id: str | None = None) -> Subscription:
        listening.set()
        return subscribe(last_id)

    monkeypatch.setattr(facts.journal, "subscribe", subscribed)

    async def go_on() -> None:
        await listening.wait()
        facts.journal.saw(ev.Arrived("t-new", SPEC), [], 200.0)
        facts.journal.ticket(record("t-odd", model="<img src=x onerror=alert(1)>", end="failed", code="engine_died"))

    async with opened(folder, facts) as (door, url):
        coming = asyncio.create_task(go_on())
        page, console = await visit(folder, url + "#token=s3cret")
        await coming
    assert console == []  # no error, nothing that the policy forbids
    assert set(re.findall(r'data-ticket="([^"]+)"', page)) == {"t-was", "t-live", "t-new", "t-odd"}
    assert "smollm2-135m is ready after 2.00 s" in page and "python train.py" in page and "xllamacpp" in page
    assert "<img" not in page and "&lt;img src=x" in page
    assert page.count('class="queue"') >= 2 and page.count('class="load"') >= 2  # legend and bars
    assert b"token=" not in door.heard and b"s3cret" in door.heard


async def test_it_asks_for_a_key(folder: Path) -> None:
    async with opened(folder, FakeFacts()) as (_, url):
        page, _ = await visit(folder, url)
    assert re.search(r'<dialog id="ask"[^>]* open', page) and "data-ticket" not in page
