"""A world of its own for each test, and a scripted model."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llm_daemon.testing.world import World


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Folders under a short path (unix sockets have short names), and nothing alive in them at the end."""
    base = Path(tempfile.mkdtemp(prefix="llmd-"))
    world = World(base)
    for name, path in (("RUNTIME_DIR", world.runtime), ("STATE_DIR", world.state), ("CONFIG", world.config)):
        monkeypatch.setenv(f"LLM_DAEMON_{name}", str(path))
    yield world
    world.close()
    shutil.rmtree(base)


@pytest.fixture
def quick(fake_model: Callable[..., str]) -> str:
    """A scripted model that loads in a blink."""
    return fake_model(tokens=["Hello", " world"])
