"""Two versions on one machine: the newer daemon takes over, and nobody's request fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

import llm_daemon
from llm_daemon import attach, errors
from llm_daemon.daemon.address import reserve
from llm_daemon.testing.world import World, wait_gone


@pytest.fixture(autouse=True)
def soon_unloaded(world: World) -> None:
    world.config.write_text(world.config.read_text().replace("ttl = 30", "ttl = 1"))


def version(folder: Path, proto: int) -> str:
    """A copy of the package that speaks another protocol: a value for PYTHONPATH."""
    package = folder / f"proto-{proto}" / "llm_daemon"
    if not package.exists():
        shutil.copytree(Path(llm_daemon.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
        control = package / "core" / "control.py"
        text = control.read_text()
        assert text.count("\nPROTO = 1 ") == 1
        control.write_text(text.replace("\nPROTO = 1 ", f"\nPROTO = {proto} "))
    return str(package.parent)


def ask(base_url: str, key: str, model: str) -> None:
    """One request on a connection of its own.  Raises OSError if it cannot be made."""
    request = urllib.request.Request(
        base_url + "/chat/completions",
        json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}]}).encode(),
        {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert json.load(answer)["choices"][0]["message"]["content"] == "Hello world"


class Asking(threading.Thread):
    """Asks again and again, each time on a new connection, as an old client does that knows only the address."""

    def __init__(self, llm: llm_daemon.Lease) -> None:
        super().__init__()
        self.address = (llm.base_url, llm.api_key, llm.model)
        self.failed: list[str] = []
        self.count = 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            try:
                ask(*self.address)
            except Exception as e:
                self.failed.append(repr(e))
            self.count += 1

    def until(self, more: int) -> None:
        """Returns when that many requests more have ended."""
        end, limit = self.count + more, time.monotonic() + 60
        while self.count < end and time.monotonic() < limit:
            self.over.wait(0.01)
        assert self.failed == []

    def __exit__(self, *exc: object) -> None:
        self.over.set()
        self.join()
        assert self.failed == []

    def __enter__(self) -> Asking:
        self.start()
        return self


@pytest.mark.parametrize("port", ["", "port = 28991\n"], ids=["any port", "a port of the user's choice"])
def test_the_newer_daemon_takes_over_and_no_request_fails(
    world: World, quick: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: str
) -> None:
    with reserve() as sock:
        monkeypatch.setenv("LLM_DAEMON_HOST", sock.getsockname()[0])  # where no other test takes that port
    world.config.write_text(port + world.config.read_text())
    with attach(quick) as old:
        ghost, address = old.daemon_pid, old.base_url
        with Asking(old) as asking:
            asking.until(20)
            newer, _, successor = world.client(quick, PYTHONPATH=version(tmp_path, 2))
            assert successor != ghost
            asking.until(50)
            assert old.is_open(), "the ghost serves its leases to the end"
            assert old.daemon_pid == ghost
            with attach(quick) as joined:  # an older client is welcome at the newer daemon
                assert (joined.daemon_pid, joined.base_url) == (successor, address), "the ghost lent its port"
            world.leave(newer)
            asking.until(20)  # the successor stays as long as the ghost's clients need the port
        os.kill(successor, signal.SIGKILL)  # what runs on it fails, of course; nobody asks in this moment
        with Asking(old) as asking:
            asking.until(20)  # the ghost serves its port again
            third, _, pid = world.client(quick, PYTHONPATH=version(tmp_path, 2))
            assert pid not in (ghost, successor)
            asking.until(20)
        world.leave(third)
    world.wait_empty(within=30)


def test_a_retired_daemon_finishes_its_streams(world: World, fake_model: Callable[..., str], tmp_path: Path) -> None:
    slow = fake_model(tokens=["a"] * 40, token_ms=30)
    with attach(slow) as old, old.openai() as client:
        stream = client.chat.completions.create(model=old.model, messages=[{"role": "user", "content": "hi"}], stream=True)
        words = [next(iter(stream)).choices[0].delta.content]
        newer, _, successor = world.client(slow, PYTHONPATH=version(tmp_path, 2))
        assert successor != old.daemon_pid
        words += [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
        assert [w for w in words if w] == ["a"] * 40
        world.leave(newer)
    world.wait_empty(within=30)


def test_a_client_too_old_for_the_daemon_is_told_what_to_do(world: World, quick: str, tmp_path: Path) -> None:
    newer, _, daemon = world.client(quick, PYTHONPATH=version(tmp_path, 3))
    with pytest.raises(errors.RemoteProtocolError, match="newer than this client") as told:
        attach(quick, timeout=10)
    assert "upgrade" in told.value.hint
    assert not wait_gone(daemon, 0), "only the newer side may end the other: no ping-pong"
    world.leave(newer)
    assert wait_gone(daemon, 30)


def test_a_running_request_without_a_lease_keeps_no_newer_client_waiting(
    world: World, fake_model: Callable[..., str], tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    slow = fake_model(tokens=["a"] * 100, tokens_until=str(gate))
    first = attach(slow)
    body = json.dumps({"model": first.model, "prompt": "hi", "stream": True}).encode()
    headers = {"Authorization": f"Bearer {first.api_key}", "Content-Type": "application/json"}
    answer = urllib.request.urlopen(urllib.request.Request(first.base_url + "/completions", body, headers), timeout=60)
    ghost = first.daemon_pid
    answer.readline()
    first.close()
    newer, _, successor = world.client(slow, PYTHONPATH=version(tmp_path, 2))
    assert successor != ghost
    assert not wait_gone(ghost, 0), "the request still runs"
    gate.touch()
    assert answer.read().count(b'"text":') >= 98
    answer.close()
    assert wait_gone(ghost, 30)
    world.leave(newer)
    world.wait_empty(within=30)
