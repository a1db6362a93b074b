"""Commands that tell what happened: explain, ui, and who's words for who it is."""

from __future__ import annotations

import json
import stat
import webbrowser
from pathlib import Path
from typing import Any

import pytest

from llm_daemon import errors, paths
from llm_daemon.cli import ui
from llm_daemon.core import events as ev
from llm_daemon.daemon.history import History
from llm_daemon.daemon.journal import Journal, TicketRecord
from llm_daemon.spec import Artifact, Spec, Wish

from .conftest import Cli
from .fakes import KEY, FakeDaemon

USUAL: dict[str, Any] = {
    "time": 4_000_000_000.0, "path": "/v1/chat/completions", "model": "smollm2-135m", "end": "served", "total_s": 2.5,
    "instance": "i1", "engine": "xllamacpp", "lane": "regular", "status": 200, "queue_s": 0.5, "load_s": 1.0, "engine_s": 0.25,
    "first_token_s": 1.76, "bytes_out": 2000, "chunks": 20, "prompt_tokens": 12, "completion_tokens": 52, "stream": True,
    "pid": 4300,
}  # fmt: skip


def write_history(*tickets: dict[str, Any]) -> None:
    """What a daemon that has ended has left behind."""
    spec = Spec(Wish("smollm2-135m"), Artifact("file", "/m.gguf", "k"))
    journal = Journal(history := History(paths.history_file(), 100, 0.0), who=lambda _: "vim\x1b[31m (pid 9)")
    journal.saw(ev.Want("c1", 1, spec), [ev.Start("i1", spec)], 100.0)
    journal.saw(ev.Up("i1", 2), [], 102.0)
    for i, fields in enumerate(tickets):
        journal.ticket(TicketRecord(ticket=f"t-{i + 1}", **{**USUAL, **fields}))
    history.close(10.0)


def test_explain_when_nothing_ever_happened(cli: Cli, tmp_path: Path) -> None:
    assert cli("explain").out == "no request is known yet\n"
    assert json.loads(cli("explain", "--json").out)["recent"] == []
    assert not (tmp_path / "state").exists()
    result = cli("explain", "t-1")
    assert result.status == 2 and "no request 't-1' is known" in result.err


def test_explain_without_a_daemon(cli: Cli) -> None:
    write_history({"end": "shed", "status": 503, "code": "queue_full", "model": "m", "time": 1.0}, {})
    out = cli("explain").out
    lines = out.splitlines()
    assert lines[0] == "request t-2: served (200) after 2.50 s"
    assert lines[1].endswith("/v1/chat/completions, smollm2-135m on xllamacpp, regular lane, over tcp, pid 4300")
    assert [line.split()[0] for line in lines[2:6]] == ["queue", "load", "engine", "answer"]
    assert lines[6] == "  its first piece came after 1.76 s; 12 prompt and 52 tokens, 69 a second"
    assert lines[7] == "the last 2 requests: 1 served, 1 shed"
    assert lines[-1].endswith("smollm2-135m is ready after 2.00 s")
    assert "vim?[31m (pid 9) asked for it" in lines[-2] and "\x1b" not in out


def test_explain_one(cli: Cli) -> None:
    write_history({"end": "failed", "status": 502, "code": "engine_died", "replayed": True, "completion_tokens": None}, {})
    lines = cli("explain", "t-1").out.splitlines()
    assert lines[0] == "request t-1: failed (502, engine_died) after 2.50 s"
    assert "2 kB in 20 pieces" in lines[6] and "its first engine died" in lines[7]
    assert not any("the last" in line for line in lines)
    told = json.loads(cli("explain", "t-1", "--json").out)
    assert told["ticket"]["parts"]["load"] == 1.0 and len(told["events"]) == 2


def test_explain_asks_the_daemon(cli: Cli, daemon: FakeDaemon) -> None:
    live = {
        "ticket": "t-9",
        "state": "waiting",
        "total_s": 3.0,
        "model": "smollm2-135m",
        "path": "/infill",
        "lane": "interactive",
    }
    told = {"ticket": None, "recent": [], "summary": {"requests": 0, "ends": {}}, "events": [], "live": [live]}
    daemon.answers["explain"] = told
    assert "now waiting: /infill, smollm2-135m, interactive lane, for 3.00 s\n" in cli("explain", "--last", "7").out
    daemon.answers["explain"] = {**told, "ticket": {**live, "parts": {}}}
    assert cli("explain", "t-9").out == "request t-9: waiting, for 3.00 s; /infill, smollm2-135m, interactive lane\n"
    assert daemon.calls("explain") == [{"ticket": None, "limit": 7}, {"ticket": "t-9", "limit": 20}]


def test_explain_when_the_daemon_ends_meanwhile(cli: Cli, daemon: FakeDaemon) -> None:
    write_history({})
    daemon.answers["explain"] = "die"
    assert cli("explain").out.startswith("request t-1: served (200)")


def test_explain_that_the_daemon_refuses(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.answers["explain"] = errors.UsageError("no request 't-9' is known", code="unknown_ticket", status=404)
    assert cli("explain", "t-9").status == 2


def test_explain_of_a_file_that_is_none(cli: Cli) -> None:
    Path(paths.history_file()).parent.mkdir()
    Path(paths.history_file()).write_text("no database " * 100)
    result = cli("explain")
    assert result.status == 75 and "cannot read the request history" in result.err
    assert "hint: the next use of a model puts it aside, as history.sqlite.broken" in result.err


def test_ui_prints_the_address(cli: Cli, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webbrowser, "open", lambda url: pytest.fail("nobody looks at this terminal"))
    url = f"http://127.0.0.1:{daemon.http.server_port}/ui/#token={KEY}"
    assert cli("ui").out == cli("ui", "--print").out == url + "\n"
    assert json.loads(cli("ui", "--json").out) == {"url": url}
    assert [m.get("lease") for m in daemon.said if m["op"] == "HELLO"] == [False] * 3


def test_ui_without_a_daemon(cli: Cli) -> None:
    result = cli("ui")
    assert result.status == 75 and "no daemon is running" in result.err and "llm-daemon serve" in result.err


def test_ui_keeps_the_key_out_of_the_browsers_arguments(
    cli: Cli, daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(ui, "is_terminal", lambda _: True)
    monkeypatch.setenv("DISPLAY", ":0")

    def open_it(url: str) -> bool:
        opened.append(url)
        return True

    monkeypatch.setattr(webbrowser, "open", open_it)
    daemon.welcome["runtime_dir"] = str(tmp_path / "runtime")
    (tmp_path / "runtime" / "ui.new").write_text("left by one that was killed")
    cli("ui")
    cli("ui")  # a second time, over the first one's page
    page = tmp_path / "runtime" / ui.DOOR
    assert opened == [page.as_uri()] * 2
    assert stat.S_IMODE(page.stat().st_mode) == 0o600 and f"/ui/#token={KEY}" in page.read_text()
    monkeypatch.setattr(webbrowser, "open", lambda url: False)
    assert "no browser was found" in cli("ui").err


@pytest.mark.parametrize(
    ("name", "value", "kept"), [("history_limit", "0", 0), ("history_prompts", "true", True), ("history_prompts", "0", False)]
)
def test_settings_of_the_history(cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str, value: str, kept: object) -> None:
    monkeypatch.setenv(f"LLM_DAEMON_{name.upper()}", value)
    assert json.loads(cli("config", "--json").out)["settings"][name]["value"] == kept


@pytest.mark.parametrize(
    "line", ['history_prompts = "perhaps"', "history_prompts = 2", "history_limit = -1", "history_limit = true"]
)
def test_bad_settings_of_the_history_are_refused_by_name_and_line(cli: Cli, tmp_path: Path, line: str) -> None:
    (tmp_path / "config.toml").write_text("ttl = 5\n" + line)
    result = cli("config")
    assert result.status == 2 and f"config.toml line 2: {line.split()[0]} must be" in result.err
