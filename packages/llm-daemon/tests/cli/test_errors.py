"""Whatever goes wrong: words on stderr, an exit status, never a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_daemon import errors
from llm_daemon.cli import entry, link, main, words

from .conftest import Cli
from .fakes import FakeDaemon

ROOT = Path(__file__).parents[3]  # where the packages are


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.UsageError("no", hint="do so"), 2),
        (errors.EngineError("it died", last_words="out of memory", log="/l/e.log"), 69),
        (errors.Bug("oh"), 70),
        (errors.Unavailable("later"), 75),
        (errors.LocalProtocolError("we"), 70),
    ],
)
def test_an_error_of_the_daemon_is_told_in_full(cli: Cli, daemon: FakeDaemon, error: errors.LlmDaemonError, status: int) -> None:
    daemon.ready = error
    result = cli("load", "smollm2-135m")
    assert (result.status, result.out) == (status, "")
    assert result.err == f"llm-daemon: {error.full()}\n"


def test_nothing_from_outside_reaches_the_terminal_as_control(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.ready = errors.EngineError("bad\x1b[2J", last_words="a\x07b")
    result = cli("load", "smollm2-135m")
    assert "\x1b" not in result.err and "\x07" not in result.err
    assert "\x1b" not in cli("who").out


@pytest.mark.parametrize(
    ("environ", "shown"),
    [
        ({}, "\x1b[2mso\x1b[0m\n"),
        ({"NO_COLOR": ""}, "\x1b[2mso\x1b[0m\n"),
        ({"NO_COLOR": "1"}, "so\n"),
        ({"TERM": "dumb"}, "so\n"),
    ],
)
def test_remarks_are_dim_where_that_is_wanted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], environ: dict[str, str], shown: str
) -> None:
    monkeypatch.setattr(words, "is_terminal", lambda stream: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in ({"TERM": "xterm"} | environ).items():
        monkeypatch.setenv(name, value)
    words.note("so")
    assert capsys.readouterr().err == shown


def test_interrupted(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(link, "status", interrupt)
    result = cli("ps")
    assert (result.status, result.out, result.err) == (130, "", "")


@pytest.mark.parametrize(("package", "script"), [("llm-daemon", "llm-daemon"), ("llm-daemon", "llmd"), ("llm-daemon-bench",) * 2])
def test_interrupted_while_it_is_imported(package: str, script: str) -> None:
    """Ctrl-C in the moment in which the first heavy module is looked for."""
    project = tomllib.loads((ROOT / package / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"][script].partition(":")
    code = (
        "import os, signal, sys\n"
        "class Press:\n"
        "    def find_spec(self, name, *args):\n"
        "        if name == 'click': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Press())\n"
        f"from {module} import {function}\n"
        "print('here', flush=True)\n"
        f"{function}()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "here\n", "")


def test_interrupted_once_more_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_argv: list[str]) -> None:
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "as it was before"
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "main", interrupted)
    with pytest.raises(SystemExit) as ended:
        entry.main(["ps"])
    assert ended.value.code == 130


def crash() -> None:
    raise RuntimeError("the sky fell")


def test_our_bug_is_one_line_and_a_saved_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(link, "status", crash)
    result = cli("ps")
    saved = tmp_path / "state" / "last-crash.txt"
    assert (result.status, result.out) == (70, "")
    assert result.err.splitlines()[0] == "llm-daemon: unexpected RuntimeError: the sky fell"
    assert "report" in result.err and str(saved) in result.err and "Traceback" not in result.err
    assert "the sky fell" in saved.read_text() and saved.stat().st_mode & 0o077 == 0


def test_our_bug_with_debug_shows_the_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(link, "status", crash)
    result = cli("--debug", "ps")
    assert result.status == 70
    assert "Traceback" in result.err and not (tmp_path / "state").exists()


def test_our_bug_without_a_place_for_the_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(link, "status", crash)
    (tmp_path / "state").write_text("not a folder")
    result = cli("ps")
    assert result.status == 70 and "--debug" in result.err


def test_the_daemon_dies_while_asked(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.answers["status"] = "die"
    result = cli("ps")
    assert result.status == 75 and "ended before it answered" in result.err


Start = Callable[..., subprocess.Popen[str]]


def test_a_reader_that_leaves_is_no_error(start: Start, daemon: FakeDaemon) -> None:
    read, write = os.pipe()
    os.close(read)
    process = start("ps", "--json", stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_behind_stdout(start: Start, daemon: FakeDaemon) -> None:
    with open("/dev/full", "w") as full:
        process = start("ps", stdout=full)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert err == "llm-daemon: cannot write the output: No space left on device\n"


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_standard_streams(closed: str, daemon: FakeDaemon) -> None:
    command = f'exec "{sys.executable}" -m llm_daemon.cli.main load smollm2-135m {closed}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_home_and_an_empty_environment(daemon: FakeDaemon) -> None:
    environ = {"LLM_DAEMON_RUNTIME_DIR": os.environ["LLM_DAEMON_RUNTIME_DIR"]}
    done = subprocess.run(
        [sys.executable, "-m", "llm_daemon.cli.main", "ps"], env=environ, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["no such", "a\nb", "x" * 5000, "../..", "\udcff", "%s{}'\""])
def test_odd_names(start: Start, name: str) -> None:
    process = start("models", "show", name)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("llm-daemon: ") and "Traceback" not in err


def test_a_bad_setting_is_named(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("ttl = 'long'\n")
    result = cli("config")
    assert result.status == 2
    assert f"{tmp_path}/config.toml line 1" in result.err
