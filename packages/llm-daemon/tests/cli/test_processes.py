"""`exec`, `env` and `serve`: leases, signals and exit statuses of real processes, against the stand-in daemon."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_daemon import errors
from llm_daemon.cli.env import lines

from .conftest import Cli
from .fakes import KEY, FakeDaemon

Start = Callable[..., subprocess.Popen[str]]
PRINT = "import os; print(*(os.environ['OPENAI_' + n] for n in ('BASE_URL', 'API_KEY', 'MODEL')))"


def test_exec_sets_the_variables_and_lets_go(start: Start, daemon: FakeDaemon) -> None:
    out, err = (process := start("exec", "-m", "smollm2-135m", "--", sys.executable, "-c", PRINT)).communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert out.split() == [daemon.welcome["base_url"], KEY, "smollm2-135m"]
    assert daemon.closed.acquire(timeout=10)


@pytest.mark.parametrize(
    ("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill -TERM $$", 143), ("exit 130", 130)]
)
def test_exec_ends_as_its_program(start: Start, daemon: FakeDaemon, script: str, status: int) -> None:
    process = start("exec", "-m", "smollm2-135m", "sh", "-c", script)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (status, "")


def test_exec_without_such_a_program_loads_nothing(cli: Cli, daemon: FakeDaemon, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("hello")
    for name, status in (
        ("no-such-program", 127),
        (str(tmp_path / "nothing"), 127),
        (str(tmp_path), 126),
        (str(tmp_path / "plain"), 126),
    ):
        result = cli("exec", name)
        assert (result.status, result.out) == (status, "")
        assert result.err.startswith(f"llm-daemon: cannot run {name!r}: ")
    assert daemon.said == []


@pytest.mark.parametrize("words", [("smollm2-135m", "--", "sh", "-c", "a b"), ("smollm2-135m", "sh", "-c", "a b")])
def test_exec_of_a_model_tells_how_to_name_it(cli: Cli, words: tuple[str, ...]) -> None:
    result = cli("exec", *words)
    hint = "a model is named by an option: llm-daemon exec --model smollm2-135m -- sh -c 'a b'"
    assert result.status == 127 and result.err.endswith(f"no such program\n  hint: {hint}\n")


def test_exec_of_something_that_is_no_program(start: Start, daemon: FakeDaemon, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("echo hello\n")
    script.chmod(0o755)
    process = start("exec", str(script))
    _, err = process.communicate(timeout=30)
    assert process.returncode == 126 and "format" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_exec_passes_signals_on(start: Start, daemon: FakeDaemon, number: signal.Signals) -> None:
    code = (
        f"import signal, sys\nsignal.signal({int(number)}, lambda *a: sys.exit(42))\nprint('ready', flush=True)\nsignal.pause()"
    )
    process = start("exec", "-m", "smollm2-135m", "--", sys.executable, "-c", code)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.wait(30) == 42


def test_exec_leaves_its_program_the_usual_signals(start: Start, daemon: FakeDaemon) -> None:
    code = "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []), open('/proc/self/status').read())"
    if not os.path.exists("/proc/self/status"):
        pytest.skip("no /proc here")
    out, _ = start("exec", "--", sys.executable, "-c", code).communicate(timeout=30)
    assert out.startswith("set()")


def test_exec_tells_when_the_daemon_is_gone(start: Start, daemon: FakeDaemon) -> None:
    process = start("exec", "-m", "smollm2-135m", "--", "sh", "-c", "echo ready; read x", stdin=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    daemon.die()
    assert process.stderr.readline() == "llm-daemon: the daemon has ended; attaching again\n"
    assert process.stderr.readline().startswith("llm-daemon: cannot attach again")
    process.communicate("go on\n", timeout=30)
    assert process.returncode == 0


def test_env_prints_lines_for_the_shell_and_holds_for_it(daemon: FakeDaemon) -> None:
    script = f'eval "$({sys.executable} -m llm_daemon.cli.main env smollm2-135m{{}})"; '
    script += "echo $$ $OPENAI_BASE_URL $OPENAI_API_KEY $OPENAI_MODEL"
    for more in ("", " | cat"):  # in a pipe our parent is a copy of the shell that ends at once
        done = subprocess.run(["sh", "-c", script.format(more)], capture_output=True, text=True, timeout=60)
        pid, *values = done.stdout.split()
        assert values == [daemon.welcome["base_url"], KEY, "smollm2-135m"], done.stderr
        assert daemon.calls("hold")[-1] == {"pid": int(pid)}


def test_env_in_other_forms(cli: Cli, daemon: FakeDaemon) -> None:
    fish = cli("env", "smollm2-135m?context=512", "--shell", "fish", "--pid", "1234").out
    assert "set -gx OPENAI_MODEL 'smollm2-135m?context=512'\n" in fish
    assert daemon.calls("hold") == [{"pid": 1234}]
    values = json.loads(cli("env", "--json", "--shell", "json").out)
    result = cli("env", "--json", "--shell", "fish")
    assert (result.status, result.out) == (2, "") and "--json and --shell fish exclude each other" in result.err
    assert values == {"OPENAI_BASE_URL": daemon.welcome["base_url"], "OPENAI_API_KEY": KEY, "OPENAI_MODEL": "smollm2-135m"}


def test_env_of_an_unknown_model_starts_nothing(cli: Cli, daemon: FakeDaemon) -> None:
    result = cli("env", "smollm3")
    assert (result.status, result.out, daemon.said) == (2, "", [])
    assert "did you mean smollm2-135m" in result.err


@pytest.mark.parametrize("value", ["plain", "with space", "it's", '$(rm x) `y` \\ "', "a\nb", ""])
def test_env_quotes_whatever_it_is(value: str) -> None:
    done = subprocess.run(
        ["sh", "-c", lines({"X": value}, "sh") + '\nprintf "%s" "$X"'], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == value


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_serve_holds_until_a_signal(start: Start, daemon: FakeDaemon, number: signal.Signals, status: int) -> None:
    process = start("serve", "smollm2-135m")
    assert process.stdout is not None
    told = [process.stdout.readline()]
    while not told[-1].startswith("Ctrl-C"):
        told.append(process.stdout.readline())
        assert told[-1], process.communicate()
    text = "".join(told)
    assert str(daemon.welcome["base_url"]) in text and "loaded: smollm2-135m" in text
    assert KEY not in text and f"--unix-socket {daemon.welcome['http_socket']}" in text
    assert not daemon.closed.acquire(blocking=False)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err.strip()) == (status, "")
    assert daemon.closed.acquire(timeout=10)


def test_serve_shows_the_key_when_told_to(start: Start, daemon: FakeDaemon) -> None:
    process = start("serve", "--show-key")
    assert process.stdout is not None
    process.stdout.readline()
    assert process.stdout.readline().split() == ["key:", KEY]
    assert [m for m in daemon.said if m["op"] == "ENSURE"] == []


def test_serve_on_another_port_than_the_running_daemon(cli: Cli, daemon: FakeDaemon) -> None:
    result = cli("serve", "--port", "1")
    assert (result.status, result.out) == (75, "")
    assert f"(pid 77) already serves on port {daemon.http.server_port}, not on 1" in result.err
    assert "LLM_DAEMON_PORT" not in os.environ


def test_serve_blames_its_own_option_for_the_port(cli: Cli, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_DAEMON_PORT", "")  # put back at the end
    hint = "choose another port (it was set by environment variable LLM_DAEMON_PORT)"
    daemon.ready = errors.Unavailable("port 1 on 127.0.0.1 is taken by nginx", code="port_taken", hint=hint)
    port = str(daemon.http.server_port)
    assert cli("serve", "--port", port, "smollm2-135m").err.endswith("hint: choose another port (it was set by --port)\n")
    assert cli("serve", "smollm2-135m").err.endswith(f"hint: {hint}\n")


def test_serve_knows_all_its_models_before_it_starts(cli: Cli, daemon: FakeDaemon) -> None:
    assert cli("serve", "smollm2-135m", "nonsense").status == 2
    assert daemon.said == []
