"""What the storms have found, each as one small test."""

from __future__ import annotations

import resource
import shutil
import socket
import threading
import time
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path

import pytest

from llm_daemon import attach, errors
from llm_daemon.client import sync
from llm_daemon.testing.world import World

FEW_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from llm_daemon.client import sync
talk = sync.connect()
print(talk.welcome["pid"], flush=True)
sys.stdin.read()
"""

# A forked child waits for ever for a module that another thread was importing at that moment, unless the fork had to wait
# for that import: so says `client/start.py`, `importing`.
ALL_IMPORTS = """
import sys
from llm_daemon import attach
from llm_daemon.client import start
class Watch:
    def find_spec(self, name, path=None, target=None):
        if not start.importing._is_owned():
            print("unguarded:", name)
sys.meta_path.insert(0, Watch())
for _ in range(2):
    with attach({model!r}) as lease:
        print(lease.is_open(), lease.model)
"""


def test_each_import_of_an_attach_makes_forks_wait(world: World, fake_model: Callable[..., str]) -> None:
    model = fake_model()
    child = world.python(ALL_IMPORTS.format(model=model))
    said, _ = child.communicate(timeout=60)
    assert said.splitlines() == [f"True {model}"] * 2


def test_a_daemon_with_few_files_refuses_newcomers_and_keeps_its_leases(world: World) -> None:
    child = world.python(FEW_FILES)
    assert child.stdout is not None and child.stdin is not None
    pid = int(child.stdout.readline())
    assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (64, 64)
    held: list[sync.Conversation] = []
    with pytest.raises(errors.Unavailable) as refused:
        while len(held) < 64:
            talk = sync.connect()
            assert talk is not None
            held.append(talk)
    assert refused.value.code == "no_resources"
    assert len(held) >= 20
    held[0].ask("CALL", 30, method="status")
    link = HTTPConnection("127.0.0.1", held[0].welcome["port"], timeout=30)  # its gateway is loaded last
    link.request("GET", "/health")
    assert link.getresponse().status == 200
    link.close()
    assert all(talk.is_open() for talk in held)
    for talk in held:
        talk.close()
    end = time.monotonic() + 30
    while True:  # until the daemon has noticed
        try:
            free = sync.connect()
            break
        except errors.Unavailable:
            assert time.monotonic() < end
    assert free is not None and free.welcome["pid"] == pid
    free.close()
    child.stdin.close()
    child.wait()


def test_whoever_leaves_has_closed_its_door(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = world.base / "faults"
    faults.mkdir()
    (faults / "log").touch()
    (faults / "listener_closed").write_text("PAUSE 2")
    monkeypatch.setenv("LLM_DAEMON_FAULTS", str(faults))
    talk = sync.connect()
    assert talk is not None
    talk.close()
    end = time.monotonic() + 20
    while "listener_closed" not in (faults / "log").read_text():
        assert time.monotonic() < end
        time.sleep(0.01)
    with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
        late.connect(str(world.runtime / "sock"))


def test_a_runtime_folder_deleted_while_an_engine_starts_costs_a_moment(world: World, fake_model: Callable[..., str]) -> None:
    gate = world.base / "gate"
    model = fake_model(load_until=str(gate), while_loading="refuse")
    first = sync.connect()
    assert first is not None
    began = time.monotonic()
    deleter = threading.Thread(target=delete_when_loading, args=(world, gate))
    deleter.start()
    with attach(model, timeout=60) as lease:
        deleter.join()
        assert lease.daemon_pid != first.welcome["pid"]
        assert time.monotonic() - began < 9  # not the ten seconds of the daemon's rare look
    first.close()


def delete_when_loading(world: World, gate: Path) -> None:
    end = time.monotonic() + 60
    while not list(world.runtime.glob("g-*/*")) and time.monotonic() < end:
        time.sleep(0.005)
    shutil.rmtree(world.runtime, ignore_errors=True)
    gate.touch()


@pytest.mark.slow  # ten seconds
def test_a_runtime_folder_that_was_emptied_is_given_up(world: World) -> None:
    first = sync.connect()
    assert first is not None
    for entry in world.runtime.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    second = sync.connect()  # the holder of the folder's lock cannot be reached any more, and notices that
    assert second is not None and second.welcome["pid"] != first.welcome["pid"]
    first.close()
    second.close()
