"""pytest plugin: the starter model, scripted fake models, and the proof that no engine process survives a test.

Load it with `-p llm_daemon.testing.plugin`, or `pytest_plugins` in the top conftest.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Read now: a session may take every LLM_DAEMON_* variable away, so that nobody's settings reach its tests.
_GIVEN_MODEL = os.environ.get("LLM_DAEMON_TEST_MODEL")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "real: needs a real engine and the starter model")


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Path of the starter model's file; fetched once into the cache folder.  LLM_DAEMON_TEST_MODEL names another GGUF file."""
    if _GIVEN_MODEL:
        return _GIVEN_MODEL
    from llm_daemon import paths
    from llm_daemon.models.catalog import Catalog
    from llm_daemon.models.fetch import fetch_sync
    from llm_daemon.spec import Wish

    spec = Catalog.load({}).resolve(Wish.parse("smollm2-135m"))
    return str(fetch_sync(spec.artifact, Path(paths.cache_dir())))


@pytest.fixture
def fake_model(tmp_path: Path) -> Callable[..., str]:
    """`fake_model(load_seconds=0.1, tokens=["a"])` writes a scenario (testing/fake_engine.py) and returns its path."""

    def write(**scenario: object) -> str:
        folder = tmp_path / "fake-models"
        folder.mkdir(exist_ok=True)
        path = folder / f"{len(list(folder.iterdir()))}.fake.json"
        path.write_text(json.dumps(scenario))
        return str(path)

    return write


@pytest.fixture
def generation() -> Iterator[str]:
    """A value for LLM_DAEMON_GEN of this test's own; afterwards no process that carries it may live."""
    from llm_daemon.daemon.keeper import unbox
    from llm_daemon.daemon.process import GEN_TAG, kill_tagged
    from llm_daemon.testing.census import boxes

    value = "test-" + os.urandom(8).hex()
    yield value
    left = survivors(value)
    kill_tagged(GEN_TAG, value)
    for box in boxes({value}):  # of a daemon that was killed before its keeper lived, or with it
        unbox(box, 5.0)
    if left:
        pytest.fail("the test left engine processes behind:\n  " + "\n  ".join(left), pytrace=False)


def survivors(generation: str, within: float = 10.0) -> list[str]:
    """`PID: COMMAND` of each process of that generation that still lives after `within` seconds; returns once there is none."""
    import select

    from llm_daemon.daemon.process import GEN_TAG, tagged

    deadline = time.monotonic() + within
    while found := dict(tagged(GEN_TAG, generation)):
        try:
            poll = select.poll()
            poll.register(next(iter(found.values())), select.POLLIN)  # a pidfd is readable when its process has ended
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return [f"{pid}: {_command(pid)}" for pid in found]
        finally:
            for pidfd in found.values():
                os.close(pidfd)
    return []


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return "(gone)"
