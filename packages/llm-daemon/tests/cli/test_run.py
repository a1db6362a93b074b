"""`run`: one question, and the chat."""

from __future__ import annotations

import builtins
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_daemon import errors
from llm_daemon.cli import ask, chat as chat_module, link, progress, run
from llm_daemon.cli.ask import Answer
from llm_daemon.cli.progress import Display
from llm_daemon.client.sync import Progress

from .conftest import Cli
from .fakes import KEY, LAST, FakeDaemon, piece

LINE = "smollm2-135m on xllamacpp, 52 tokens, 48 tok/s; 1 other program uses it: it stays\n"


def test_asks_once_and_says_what_becomes_of_it(cli: Cli, daemon: FakeDaemon) -> None:
    result = cli("run", "smollm2-135m", "Why", "is", "it?")
    assert (result.status, result.out, result.err) == (0, "Because of light.\n", LINE)
    [(path, headers, body)] = daemon.asked
    assert path == "/v1/chat/completions" and headers["authorization"] == f"Bearer {KEY}"
    assert body["model"] == "smollm2-135m" and body["stream"] is True
    assert body["messages"] == [{"role": "user", "content": "Why is it?"}]
    assert daemon.closed.acquire(timeout=10)


@pytest.mark.parametrize("begun", [False, True])
def test_a_long_silence_is_borne_while_the_daemon_lives(
    cli: Cli, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    monkeypatch.setattr(ask, "SILENCE", 0.02)
    daemon.events.insert(begun, {"pause": True})

    def wait_for_looks() -> None:
        for _ in range(3):
            daemon.looks.acquire()
        daemon.go_on.set()

    looked = threading.Thread(target=wait_for_looks)
    looked.start()
    assert cli("run", "smollm2-135m", "hi").out == "Because of light.\n"
    looked.join()


def test_a_daemon_that_hangs_is_told(cli: Cli, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "SILENCE", 0.02)
    monkeypatch.setattr(ask, "ALIVE", 0.5)
    daemon.events.insert(1, {"pause": True, "stuck": True})
    result = cli("run", "smollm2-135m", "hi")
    assert result.status == 75 and "the daemon (pid 77) does not answer" in result.err
    assert result.out == "Because "


def test_nobody_else_uses_it(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.answers["status"] = daemon.status(leases=[])
    assert cli("run", "smollm2-135m", "hi").err.endswith("; nobody else uses it: it closes by itself in 2 min\n")


def test_options_reach_the_model_and_the_daemon(cli: Cli, daemon: FakeDaemon) -> None:
    cli(
        "run",
        "smollm2-135m",
        "hi",
        "--system",
        "be short",
        "--max-tokens",
        "5",
        "--temperature",
        "0.5",
        "--engine",
        "e",
        "--context",
        "99",
    )
    body = daemon.asked[0][2]
    assert (body["max_tokens"], body["temperature"]) == (5, 0.5)
    assert body["messages"][0] == {"role": "system", "content": "be short"}
    [wish] = [m["wish"] for m in daemon.said if m["op"] == "ENSURE"]
    assert wish == {"model": "smollm2-135m", "engine": "e", "context": 99}


def test_stdin_is_appended(cli: Cli, daemon: FakeDaemon) -> None:
    cli("run", "smollm2-135m", "Summarise:", stdin="a text\n")
    assert daemon.asked[0][2]["messages"][0]["content"] == "Summarise:\n\na text\n"


def test_stdin_alone_is_the_prompt(cli: Cli, daemon: FakeDaemon) -> None:
    cli("run", "smollm2-135m", stdin="a text")
    assert daemon.asked[0][2]["messages"][0]["content"] == "a text"


def test_no_prompt_at_all(cli: Cli, daemon: FakeDaemon) -> None:
    result = cli("run", "smollm2-135m")
    assert result.status == 2 and "no prompt" in result.err and daemon.said == []


def test_a_lone_argument_with_a_space_asks_the_default_model(
    cli: Cli, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_DAEMON_DEFAULT_MODEL", "gemma3-270m")
    cli("run", "Why is the sky blue?")
    assert [m["wish"] for m in daemon.said if m["op"] == "ENSURE"] == [{"model": "gemma3-270m"}]
    assert daemon.asked[0][2]["messages"][0]["content"] == "Why is the sky blue?"


def test_a_lone_path_with_a_space_is_a_model(cli: Cli, daemon: FakeDaemon, tmp_path: Path) -> None:
    path = tmp_path / "my model.gguf"
    cli("run", str(path), stdin="hi")
    assert [m["wish"]["model"] for m in daemon.said if m["op"] == "ENSURE"] == [str(path)]


def test_an_unquoted_question_gets_the_right_hint(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.ready = errors.UsageError("unknown model 'Why'", code="unknown_model", hint="known names: a, b")
    result = cli("run", "Why", "is", "it?")
    assert result.status == 2 and "in quotes: 'Why is it?'" in result.err


@pytest.mark.parametrize(("model", "option"), [("smollm2-135m", "--draft"), ("./mine.gguf", "--lora")])
def test_of_a_known_model_no_question_is_made(cli: Cli, daemon: FakeDaemon, model: str, option: str) -> None:
    daemon.ready = errors.UsageError("unknown model 'nope'", code="unknown_model", hint="known names: a, b")
    result = cli("run", model, "hi", option, "nope")
    assert result.err == "llm-daemon: unknown model 'nope'\n  hint: known names: a, b\n"


def test_json_is_one_document(cli: Cli, daemon: FakeDaemon) -> None:
    result = cli("run", "smollm2-135m", "hi", "--json", "-q")
    document = json.loads(result.out)
    assert (document["answer"], document["engine"], document["finish_reason"]) == ("Because of light.", "xllamacpp", "stop")
    assert document["usage"]["completion_tokens"] == 52 and document["timings"]["predicted_per_second"] == 48.2
    assert KEY not in result.out and result.err == ""


def test_a_base_model_continues(cli: Cli, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "has_template", lambda model: False)
    assert cli("run", "gemma3-270m", "Once upon", "--system", "A tale.").out == "Because of light.\n"
    path, _, body = daemon.asked[0]
    assert path == "/v1/completions" and body["prompt"] == "A tale.\n\nOnce upon" and "messages" not in body


@pytest.mark.parametrize(
    ("status", "code", "exit_status"),
    [(400, "bad_request", 2), (429, "rate", 75), (503, "queue_full", 75), (502, "engine_died", 69), (500, "bug", 70)],
)
def test_a_refused_request(cli: Cli, daemon: FakeDaemon, status: int, code: str, exit_status: int) -> None:
    daemon.refusal = (status, {"error": {"message": "not so", "code": code, "hint": "else"}})
    result = cli("run", "smollm2-135m", "hi")
    assert (result.status, result.out, result.err) == (exit_status, "", "llm-daemon: not so\n  hint: else\n")


def test_a_refusal_that_is_no_json(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.refusal = (502, [])  # type: ignore[assignment]  # whatever stands between us and the daemon
    assert "HTTP status 502" in cli("run", "smollm2-135m", "hi").err


def test_an_answer_that_breaks_off(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.events = [piece("Because "), {"break": True}]
    result = cli("run", "smollm2-135m", "hi")
    assert (result.status, result.out) == (69, "Because ")
    assert "broke off" in result.err


def test_an_error_in_the_stream(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.events = [piece("Be"), {"error": {"message": "the engine died", "code": 500}}]
    result = cli("run", "smollm2-135m", "hi")
    assert (result.status, result.err) == (69, "llm-daemon: the engine died\n")


def test_stopped_by_hand_in_the_middle_of_an_answer(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.events = [piece("Be"), {"error": {"message": "m was stopped by hand", "code": "stopped", "hint": "ask again"}}]
    result = cli("run", "smollm2-135m", "hi")
    assert (result.status, result.err) == (75, "llm-daemon: m was stopped by hand\n  hint: ask again\n")


def test_bytes_that_are_no_text_in_the_prompt() -> None:
    assert run.readable("a\udcffb") == "a\ufffdb"


def test_speed_is_counted_where_the_engine_does_not_tell() -> None:
    assert Answer(usage={"completion_tokens": 11}, first=1.0, total=3.0).speed == 5.0
    assert Answer(usage={"completion_tokens": 1}, first=1.0, total=3.0).speed is None
    assert Answer().tokens is None


def test_progress_where_nobody_watches(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.progress = [
        {"phase": "resolve", "message": "reading the index"},
        *({"phase": "download", "done": n * 10**6, "total": 10**8, "message": "a==1"} for n in range(0, 101, 5)),
        {"phase": "load", "message": "xllamacpp loads it"},
        {"phase": "load", "message": "ready"},
    ]
    shown = "reading the index\n" + "".join(f"downloading a==1: {p} % of 100 MB\n" for p in (0, 25, 50, 75, 100))
    assert cli("run", "smollm2-135m", "hi").err == shown + "xllamacpp loads it\n" + LINE
    assert cli("run", "smollm2-135m", "hi", "--quiet").err == ""


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "is_terminal", lambda stream: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with Display() as display:
        display(Progress({"phase": "download", "done": 30_000_000, "total": 98_000_000, "message": "a[b]==1"}))
        display(Progress({"phase": "load", "message": "loads [it]"}))
    err = capsys.readouterr().err
    assert "downloading a[b]==1" in err and "30.0/98.0 MB" in err and "loads [it]" in err
    assert err.rstrip("\r\n\x1b[2KA1").endswith("\x1b[?25h") or "\x1b[?25h" in err  # the cursor is back


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """What the person types: lines, or exceptions for Ctrl-C and Ctrl-D."""
    lines: list[object] = []

    def answer(_prompt: str) -> str:
        line = lines.pop(0) if lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return str(line)

    monkeypatch.setattr(builtins, "input", answer)
    monkeypatch.setattr(run, "is_terminal", lambda stream: False)
    monkeypatch.setattr(chat_module, "_History", type("NoHistory", (), {"save": lambda self: None}))
    yield lines


def talk(daemon: FakeDaemon, templated: bool = True) -> None:
    with link.attach("smollm2-135m") as lease:
        chat_module.chat(lease, {}, None, templated)


def test_a_chat_remembers_until_it_is_cleared(
    daemon: FakeDaemon, typed: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    typed += ["Hello", "", "Again", "/clear", "Fresh", "/nonsense", "/help", "/quit", "never asked"]
    talk(daemon)
    said = [[m["content"] for m in body["messages"]] for _, _, body in daemon.asked]
    assert said == [["Hello"], ["Hello", "Because of light.", "Again"], ["Fresh"]]
    out, err = capsys.readouterr()
    assert "/clear" in out and "no command /nonsense" in err and typed == ["never asked"]


def test_an_error_does_not_end_the_chat_and_is_not_remembered(
    daemon: FakeDaemon, typed: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    typed += ["One", KeyboardInterrupt(), "Two"]
    daemon.refusal = (400, {"error": {"message": "too long", "code": "x"}})
    talk(daemon)
    assert [body["messages"] for _, _, body in daemon.asked] == [[{"role": "user", "content": t}] for t in ("One", "Two")]
    assert capsys.readouterr().err.count("llm-daemon: too long\n") == 2


def test_ctrl_c_stops_the_answer_only(
    daemon: FakeDaemon, typed: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heard: list[str] = []

    def say(text: str) -> None:
        heard.append(text)
        if len(heard) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat_module, "say", say)
    typed += ["One", "Two"]
    talk(daemon)
    said = [[m["content"] for m in body["messages"]] for _, _, body in daemon.asked]
    assert said == [["One"], ["One", "Because ", "Two"]]
    assert "stopped" in capsys.readouterr().err


@pytest.mark.parametrize("outcome", [None, KeyboardInterrupt()])
def test_progress_of_attaching_again_ends_with_it(
    daemon: FakeDaemon, typed: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    outcome: BaseException | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(progress, "is_terminal", lambda stream: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    daemon.progress = [{"phase": "load", "message": "loads it"}]
    draw = Display._draw

    def drawn(self: Display, done: float, total: float) -> None:
        draw(self, done, total)
        if outcome is not None:
            raise outcome

    class Later:
        """Typed when the daemon has died and another waits to be asked."""

        def __str__(self) -> str:
            for connection in daemon.connections:
                connection.shutdown(socket.SHUT_RDWR)
            capsys.readouterr()
            monkeypatch.setattr(Display, "_draw", drawn)
            return "hi again"

    typed.append(Later())
    talk(daemon)
    err = capsys.readouterr().err
    assert "loads it" in err and ("stopped" in err) is (outcome is not None)
    assert err.count("\x1b[?25l") == err.count("\x1b[?25h") == 1  # the cursor was hidden, and is back
    for thread in [t for t in threading.enumerate() if type(t).__module__.startswith("rich")]:
        thread.join(10)
        assert not thread.is_alive(), "it goes on drawing"


def test_a_base_model_has_no_memory(daemon: FakeDaemon, typed: list[object]) -> None:
    typed += ["Once", "Twice"]
    talk(daemon, templated=False)
    assert [body["prompt"] for _, _, body in daemon.asked] == ["Once", "Twice"]


def test_reasoning_is_not_part_of_the_answer(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.events = [{"choices": [{"delta": {"reasoning_content": "hmm"}}]}, piece("Yes"), LAST]
    result = cli("run", "smollm2-135m", "hi")
    assert result.out == "Yes\n" and "hmm" not in result.err
