"""The helper process: started, listened to, cancelled, orphaned; against an index on loopback."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from llm_daemon.errors import Bug, Unavailable, UsageError
from llm_daemon.models.fetch import fetch, fetch_sync
from llm_daemon.models.pypi import Piece, from_pieces
from llm_daemon.models.store import Store
from llm_daemon.spec import Artifact

if TYPE_CHECKING:
    from .conftest import Packed, Server


Helpers = Callable[[], list[psutil.Process]]


@pytest.fixture
def env(server: Server, tmp_path: Path) -> dict[str, str]:
    """An environment in which only the test's index exists, with a password that must not show."""
    kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(("PIP_", "UV_")) and not k.upper().endswith("_PROXY")}
    server.credentials = "Basic bWU6czNjcmV0"
    url = server.url.replace("://", "://me:s3cret@")
    return kept | {"PIP_INDEX_URL": url, "PIP_CONFIG_FILE": os.devnull, "HOME": str(tmp_path)}


@pytest.fixture
def helpers() -> Helpers:
    """Children of this process that it had not before the test: those of others are none of ours."""
    before = psutil.Process().children()
    return lambda: [child for child in psutil.Process().children() if child not in before]


def files(root: Path) -> set[str]:
    return {p.name for p in root.glob("models/*/*")}


def test_fetch_and_fetch_again(server: Server, packed: Packed, env: dict[str, str], tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    path = fetch_sync(packed.artifact, tmp_path, seen.append, env=env)
    assert path.read_bytes() == packed.weights and path == Store(tmp_path).path(packed.artifact)
    assert {m["phase"] for m in seen} == {"resolve", "download", "extract", "verify"}
    assert all(m.keys() == {"phase", "done", "total", "unit", "message"} for m in seen)
    assert "s3cret" not in json.dumps(seen)
    # Present: no helper is started, whatever Python is named.
    assert fetch_sync(packed.artifact, tmp_path, python="/no/such/python") == path


def test_errors_come_back_as_they_were_raised(server: Server, packed: Packed, env: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        fetch_sync(from_pieces([Piece("tiny==2")]), tmp_path, env=env)
    error = caught.value
    assert (error.code, error.status) == ("no_such_package", 404)
    assert "***@127.0.0.1" in error.hint and "s3cret" not in error.full()


def test_a_file_in_place_is_only_checked(tmp_path: Path, gguf: Callable[..., bytes]) -> None:
    model = tmp_path / "m.gguf"
    artifact = Artifact("file", str(model), "file:m")
    with pytest.raises(UsageError, match="no model file"):
        fetch_sync(artifact, tmp_path / "store")
    model.write_bytes(gguf())
    assert fetch_sync(artifact, tmp_path / "store") == model
    model.write_bytes(gguf()[:-9])
    with pytest.raises(UsageError, match="truncated: it needs"):
        fetch_sync(artifact, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_two_fetches_download_once(server: Server, packed: Packed, env: dict[str, str], tmp_path: Path) -> None:
    server.gate = gate = threading.Event()
    seen: list[dict[str, Any]] = []

    def on_progress(message: dict[str, Any]) -> None:
        seen.append(message)
        if message["message"] == "another process is downloading it":
            gate.set()

    async def both() -> list[Path]:
        return list(await asyncio.gather(*(fetch(packed.artifact, tmp_path, on_progress, env=env) for _ in range(2))))

    first, second = asyncio.run(both())
    assert first == second and first.read_bytes() == packed.weights
    assert len(server.downloads()) == 1
    assert [m["message"] for m in seen].count("another process is downloading it") == 1


def test_cancelling_ends_the_helper_and_keeps_the_beginning(
    server: Server, packed: Packed, env: dict[str, str], tmp_path: Path, helpers: Helpers
) -> None:
    server.gate = gate = threading.Event()
    seen: list[psutil.Process] = []

    async def cancel_midway() -> None:
        def on_progress(message: dict[str, Any]) -> None:
            if message["phase"] == "download" and message["done"] >= 10_000 and not seen:
                seen.extend(helpers())
                task.cancel()

        task = asyncio.create_task(fetch(packed.artifact, tmp_path, on_progress, env=env))
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 60)
        assert seen and not any(p.is_running() for p in seen), "gone before cancel returns"

    asyncio.run(cancel_midway())
    (part,) = files(tmp_path)
    assert part.endswith(".part")
    size = next(tmp_path.glob("models/*/*.part")).stat().st_size
    assert 10_000 <= size <= 20_000
    gate.set()
    assert fetch_sync(packed.artifact, tmp_path, env=env).read_bytes() == packed.weights
    assert server.downloads() == [None, f"bytes={size}-"]


def test_cancelling_at_once_leaves_nothing(
    server: Server, packed: Packed, env: dict[str, str], tmp_path: Path, helpers: Helpers
) -> None:
    async def cancel_early(turns: int) -> None:
        task = asyncio.create_task(fetch(packed.artifact, tmp_path, env=env))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    for turns in (1, 5, 20):
        asyncio.run(cancel_early(turns))
    psutil.wait_procs(helpers(), timeout=20)
    assert helpers() == [] and files(tmp_path) == set() and server.downloads() == []


def test_what_on_progress_raises_ends_the_fetch(packed: Packed, env: dict[str, str], tmp_path: Path, helpers: Helpers) -> None:
    def on_progress(message: dict[str, Any]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fetch_sync(packed.artifact, tmp_path, on_progress, env=env)
    assert helpers() == []


def test_the_helper_ends_when_its_parent_is_killed(server: Server, packed: Packed, env: dict[str, str], tmp_path: Path) -> None:
    server.gate = threading.Event()
    script = """
        import json, sys
        from pathlib import Path
        from llm_daemon.models.fetch import fetch_sync
        from llm_daemon.spec import Artifact
        wire = json.loads(sys.argv[1])
        artifact = Artifact(**{**wire, "files": tuple(wire["files"])})
        fetch_sync(artifact, Path(sys.argv[2]), lambda m: m["done"] and print(m["phase"], flush=True))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), json.dumps(dataclasses.asdict(packed.artifact)), str(tmp_path)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout and parent.stdout.readline() == "download\n"
        (helper,) = psutil.Process(parent.pid).children()
        parent.send_signal(signal.SIGKILL)
    gone, alive = psutil.wait_procs([helper], timeout=20)
    assert gone and not alive
    assert all(name.endswith(".part") for name in files(tmp_path))


def wrapper(tmp_path: Path, before: str) -> str:
    """A "Python" that first runs a shell line."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\n{before}\nexec {shlex.quote(sys.executable)} "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_a_disk_that_fills_up_midway(server: Server, packed: Packed, env: dict[str, str], tmp_path: Path) -> None:
    root = tmp_path / "store"
    small = wrapper(tmp_path, "ulimit -f 200")  # blocks of 512 or 1024 bytes, by shell: a part of the 300 kB in any case
    with pytest.raises(Unavailable) as caught:
        fetch_sync(packed.artifact, root, env=env, python=small)
    assert caught.value.code == "disk_full" and str(root) in caught.value.message
    assert f"{len(packed.weights):,}" in caught.value.message
    assert not any(name.endswith((".gguf", ".tmp", ".json")) for name in files(root))
    assert fetch_sync(packed.artifact, root, env=env).read_bytes() == packed.weights


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(packed: Packed, env: dict[str, str], tmp_path: Path) -> None:
    root = tmp_path / "store"
    root.mkdir(mode=0o500)
    with pytest.raises(UsageError, match="cannot write to") as caught:
        fetch_sync(packed.artifact, root, env=env)
    assert caught.value.code == "cache_unwritable"


def test_a_killed_helper_means_try_again(packed: Packed, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="signal 9") as caught:
        fetch_sync(packed.artifact, tmp_path / "store", python=wrapper(tmp_path, "kill -9 $$"))
    assert "resumes" in caught.value.hint


def test_a_helper_without_an_answer_is_our_bug(packed: Packed, tmp_path: Path) -> None:
    broken = wrapper(tmp_path, "echo 'cannot start https://me:s3cret@host/' >&2; exit 3")
    with pytest.raises(Bug, match="status 3") as caught:
        fetch_sync(packed.artifact, tmp_path / "store", python=broken)
    assert "cannot start https://***@host/" in caught.value.full()


def test_the_daemon_stays_small() -> None:
    code = "import sys, llm_daemon.models.fetch, llm_daemon.models.catalog; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"unearth", "httpx2", "httpcore2", "huggingface_hub", "requests", "pip", "numpy", "gguf", "zipfile"} & set(loaded)


@pytest.mark.real
def test_the_starter_model_is_whole(starter: Path) -> None:
    assert starter.stat().st_size == 98_362_432
    suffixes = {p.suffix for p in starter.parent.iterdir()}  # another process may just be noting the header beside it
    assert suffixes >= {".gguf", ".json"} and not suffixes & {".part", ".tmp"}
