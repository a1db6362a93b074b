"""The dashboard in a real browser, headless: it draws what happens, asks for its key, and believes no name."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from llm_daemon.core import events as ev
from llm_daemon.daemon.admin import Admin

from .fakes import SPEC, FakeFacts, load, record

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-breakpad", "--no-first-run",
    "--disable-background-networking", "--remote-debugging-pipe", "--window-size=1280,1000",
]  # fmt: skip
# The browser reads commands from fd 3 and answers on fd 4.
AS_3_AND_4 = (
    "import fcntl, os, sys\n"
    "fds = [fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]]\n"
    "os.dup2(fds[0], 3); os.dup2(fds[1], 4)\n"
    "os.execv(sys.argv[3], sys.argv[3:])\n"
)
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


class Page:
    """One page, led by the DevTools protocol over two pipes: JSON objects, each ended by a zero byte.

    `complaints` are errors that its console showed: exceptions, and whatever its policy forbade.
    """

    def __init__(self, commands: int, answers: asyncio.StreamReader) -> None:
        self._commands, self._answers, self._asked = commands, answers, 0
        self._session: dict[str, str] = {}
        self.complaints: list[Any] = []

    async def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._asked += 1
        os.write(
            self._commands, json.dumps({"id": self._asked, "method": method, "params": params, **self._session}).encode() + b"\0"
        )
        return await self._until(lambda m: m.get("id") == self._asked)

    async def _until(self, is_it: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        while True:
            message = json.loads((await self._answers.readuntil(b"\0"))[:-1])
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(message["params"])
            if is_it(message):
                assert "error" not in message, message
                return dict(message.get("result", {}))

    async def visit(self, url: str) -> None:
        target = await self.ask("Target.createTarget", url="about:blank")
        attached = await self.ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            await self.ask(f"{domain}.enable")
        await self.load("Page.navigate", url=url)

    async def load(self, method: str, **params: Any) -> None:
        """Asks for something that loads a page, and waits until it is there."""
        await self.ask(method, **params)
        await self._until(lambda m: m.get("method") == "Page.loadEventFired")

    async def run(self, code: str) -> Any:
        """The value of a JavaScript expression, of a promise once it is kept."""
        done = await self.ask("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    async def wait(self, condition: str) -> None:
        await self.run(f"new Promise((done) => {{ const look = () => ({condition}) ? done() : setTimeout(look, 10); look(); }})")

    async def text(self) -> str:
        return str(await self.run("document.documentElement.outerHTML"))


@asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[Page]:
    assert CHROMIUM is not None
    (commands, to), (back, answers) = os.pipe(), os.pipe()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", AS_3_AND_4, str(commands), str(answers), CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}",
        pass_fds=(commands, answers), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    os.close(commands)
    os.close(answers)
    reader = asyncio.StreamReader(limit=2**24)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(back, "rb")
    )
    page = Page(to, reader)
    try:
        yield page
    finally:
        os.close(to)  # it ends when nobody leads it
        try:
            async with asyncio.timeout(10):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        transport.close()


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
