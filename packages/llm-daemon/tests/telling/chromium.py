"""A real browser, headless, led by the DevTools protocol: for tests of pages."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

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


class Page:
    """One page, led by the DevTools protocol over two pipes: JSON objects, each ended by a zero byte.

    `complaints` are errors that its console showed: exceptions, and whatever its policy forbade.  `password` is what its person
    types when the browser asks for one, `asked_for` the realms it was asked for.
    """

    def __init__(self, commands: int, answers: asyncio.StreamReader) -> None:
        self._commands, self._answers, self._asked = commands, answers, 0
        self._session: dict[str, str] = {}
        self.complaints: list[Any] = []
        self._loads = 0  # pages that are there
        self.password, self.asked_for = "", list[str]()

    def _say(self, method: str, **params: Any) -> int:
        self._asked += 1
        message = {"id": self._asked, "method": method, "params": params, **self._session}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        return self._asked

    async def ask(self, method: str, **params: Any) -> dict[str, Any]:
        number = self._say(method, **params)
        return await self._until(lambda m: m.get("id") == number)

    async def _until(self, is_it: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        while True:
            message = json.loads((await self._answers.readuntil(b"\0"))[:-1])
            self._heed(message.get("method", ""), message.get("params", {}))
            if is_it(message):
                assert "error" not in message, message
                return dict(message.get("result", {}))

    def _heed(self, event: str, about: dict[str, Any]) -> None:
        if event in ("Runtime.exceptionThrown", "Log.entryAdded") or about.get("type") == "error":
            self.complaints.append(about)
        elif event == "Page.loadEventFired":
            self._loads += 1
        elif event == "Fetch.requestPaused":
            self._say("Fetch.continueRequest", requestId=about["requestId"])
        elif event == "Fetch.authRequired":
            self.asked_for.append(about["authChallenge"]["realm"])
            answer = {"response": "ProvideCredentials", "username": "", "password": self.password}
            self._say("Fetch.continueWithAuth", requestId=about["requestId"], authChallengeResponse=answer)

    async def visit(self, url: str) -> None:
        target = await self.ask("Target.createTarget", url="about:blank")
        attached = await self.ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            await self.ask(f"{domain}.enable")
        if self.password:
            await self.ask("Fetch.enable", handleAuthRequests=True)
        await self.load("Page.navigate", url=url)

    async def load(self, method: str, **params: Any) -> None:
        """Asks for something that loads a page, and waits until it is there; that may be told before the answer."""
        before = self._loads
        await self.ask(method, **params)
        if self._loads == before:
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
