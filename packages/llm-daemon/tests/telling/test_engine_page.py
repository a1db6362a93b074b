"""An engine's own web page, by way of the gateway and in a real browser: its person types the token, and it is drawn."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from llm_daemon import attach
from llm_daemon.testing.world import World

from .chromium import CHROMIUM, browser

pytestmark = [pytest.mark.real, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")]
# Browsers ask for what makes a page an app (its manifest, its service worker) without the password that was typed for the page;
# this engine refuses its tools unless it was started with them.
NOT_OURS = ("manifest.webmanifest", "/tools", "[PWA]")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Folders of their own under a short path, for a real daemon."""
    with tempfile.TemporaryDirectory(prefix="llmd-") as folder:
        world = World(Path(folder))
        for name, path in (("RUNTIME_DIR", world.runtime), ("STATE_DIR", world.state), ("CONFIG", world.config)):
            monkeypatch.setenv(f"LLM_DAEMON_{name}", str(path))
        yield world
        world.close()


def from_elsewhere(complaint: dict[str, Any]) -> bool:
    return any(word in json.dumps(complaint) for word in NOT_OURS)


def test_it_is_drawn(world: World, smollm2: str, tmp_path: Path) -> None:
    async def main(url: str, token: str) -> None:
        async with asyncio.timeout(90), browser(tmp_path) as page:
            page.password = token
            await page.visit(url)
            await page.wait("document.querySelector('textarea')?.checkVisibility()")
            await page.wait("document.body.innerText.includes('smollm2')")  # it has asked the engine what it serves
            assert page.asked_for == ["llm-daemon: the token is the password"]
            assert [it for it in page.complaints if not from_elsewhere(it)] == []

    with attach(smollm2, engine="xllamacpp") as llm:
        base = llm.base_url.removesuffix("/v1")
        asyncio.run(main(f"{base}/upstream/{quote(llm.model, safe='')}/", llm.api_key))
