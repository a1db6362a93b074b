"""The dashboard in a real browser, headless: it draws what happens, asks for its key, and believes no name."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from llm_daemon.core import events as ev
from llm_daemon.daemon.admin import Admin

from .chromium import CHROMIUM, browser
from .fakes import SPEC, FakeFacts, load, record

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
                elif b" /v1/models " in data:  # the gateway's own
                    writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 26\r\n\r\n{"data":[{"id":"gemma3"}]}')
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


TICKETS = "[...document.querySelectorAll('[data-ticket]')].map((row) => row.dataset.ticket).join()"


async def test_it_draws_what_was_and_what_comes(folder: Path) -> None:
    facts = FakeFacts()
    load(facts.journal)
    facts.journal.ticket(record("t-was"))
    facts.live = [{"ticket": "t-live", "state": "running", "model": "smollm2-135m", "total_s": 1.0}]
    async with opened(folder, facts) as (door, url), browser(folder) as page:
        await page.visit(url + "#token=s3cret")
        await page.wait(f"{TICKETS} === 't-live,t-was'")
        await page.wait("document.body.innerText.includes('python train.py')")
        facts.journal.saw(ev.Arrived("t-new", SPEC), [], 200.0)
        facts.journal.ticket(record("t-odd", model="<img src=x onerror=alert(1)>", end="failed", code="engine_died"))
        await page.wait(f"{TICKETS}.split(',').sort().join() === 't-live,t-new,t-odd,t-was'")
        text = await page.text()
        assert "smollm2-135m is ready after 2.00 s" in text and "xllamacpp" in text and "engine_died" in text
        assert "<img" not in text and "&lt;img src=x" in text
        assert await page.run("[location.hash, document.querySelectorAll('svg .load').length].join()") == ",2"
        facts.journal.ticket(record("t-live", end="cancelled"))
        await page.wait("document.querySelectorAll('.press').length === 1")
        await page.wait("document.querySelector('#names option')?.value === 'gemma3'")
        assert page.complaints == []  # no error, nothing that the policy forbids
    assert b"token=" not in door.heard and b"s3cret" in door.heard


async def test_its_buttons_act(folder: Path) -> None:
    facts = FakeFacts()
    facts.live = [{"ticket": "t-live", "state": "running", "model": "smollm2-135m", "total_s": 1.0}]
    facts.answer = {"model": "m", "engine": "e", "stopped": []}
    async with opened(folder, facts) as (_, url), browser(folder) as page:
        await page.visit(url + "#token=s3cret")
        await page.wait("document.querySelector('.press') && document.querySelector('td button')")
        await page.run("document.querySelector('.press').dispatchEvent(new MouseEvent('click', { bubbles: true }))")
        await page.run("document.querySelector('td button').click()")
        await page.run("document.getElementById('load-name').value = 'm'; document.querySelector('#load button').click()")
        await page.wait("document.getElementById('load-says').textContent === 'm is ready on e'")
        while len(facts.asked) < 3:
            await page.run("new Promise((done) => setTimeout(done, 10))")
    assert sorted(facts.asked) == [("cancel", "t-live"), ("load", "m"), ("unload", "smollm2-135m", False)]


async def test_it_asks_for_a_key_and_keeps_it(folder: Path) -> None:
    async with opened(folder, FakeFacts()) as (_, url), browser(folder) as page:
        await page.visit(url)
        await page.wait("document.getElementById('ask').open")
        assert await page.run(TICKETS) == ""
        await page.run("document.getElementById('key').value = 's3cret'; document.querySelector('#ask button').click()")
        await page.wait("document.body.innerText.includes('python train.py') && !document.getElementById('ask').open")
        await page.load("Page.reload")
        await page.wait("document.body.innerText.includes('python train.py')")
