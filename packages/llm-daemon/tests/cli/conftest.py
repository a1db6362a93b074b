from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llm_daemon.cli import main

from .fakes import FakeDaemon


@dataclass
class Result:
    status: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has folders of its own and no settings."""
    for name in [n for n in os.environ if n.startswith("LLM_DAEMON_")]:
        monkeypatch.delenv(name)
    for name in ("RUNTIME", "STATE", "CACHE"):
        monkeypatch.setenv(f"LLM_DAEMON_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.setenv("LLM_DAEMON_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("LLM_DAEMON_PYTHON", "/no/such/python")  # no test here starts a real daemon
    monkeypatch.setenv("TERM", "dumb")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    fake = FakeDaemon(tmp_path / "runtime")
    yield fake
    fake.close()


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs one command in this process: `cli("ps", "--json", stdin="...")`."""

    def run(*args: str, stdin: str = "") -> Result:
        (tmp_path / "stdin").write_text(stdin)
        with open(tmp_path / "stdin") as file, monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", file)
            status = main.run(list(args))
        return Result(status, *capsys.readouterr())

    return run


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a command as a process of its own; none outlives the test, nor its daemon."""
    if "daemon" in request.fixturenames:
        request.getfixturevalue("daemon")  # set up before us, so ended after us
    started: list[subprocess.Popen[str]] = []

    def start(*args: str, **options: Any) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "llm_daemon.cli.main", *args]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(argv, text=True, **{**pipes, **options})
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        with process:
            pass
