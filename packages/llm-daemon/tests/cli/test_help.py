"""What the command line says about itself, and what it costs to say it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib.metadata import EntryPoint

import click
import pytest

from llm_daemon.cli import main
from llm_daemon.cli.main import COMMANDS, cli

from .conftest import Cli
from .fakes import FakeDaemon

JSON = {
    "run", "ps", "who", "stop", "load", "engines", "doctor", "config", "env",
    "explain", "ui", "models", "plan", "models list", "models pull", "models show", "models rm",
}  # fmt: skip


def commands() -> dict[str, click.Command]:
    """Every command by the words one types, subcommands included."""
    context = click.Context(cli)
    found = {}
    for name in COMMANDS:  # what other packages bring is for their own tests
        command = cli.get_command(context, name)
        assert command is not None
        found[name] = command
        if isinstance(command, click.Group):
            found |= {f"{name} {sub}": c for sub, c in command.commands.items()}
    return found


def examples(text: str) -> list[list[str]]:
    """The arguments of each `llm-daemon ...` in the Examples block of a help page."""
    block = text.partition("Examples:\n")[2].partition("\n\n")[0]
    found = []
    for line in block.splitlines():
        inner = re.search(r"\$\((llm-daemon [^)]*)\)", line)
        call = inner[1] if inner else line[line.index("llm-daemon") :]
        call = re.split(r"\s{3,}| \| ", call)[0]
        found.append(shlex.split(call)[1:])
    return found


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_has_examples_that_parse(name: str) -> None:
    command = commands()[name]
    text = command.get_help(click.Context(command, info_name=name, terminal_width=120))
    found = examples(text)
    assert found
    for args in found:
        with cli.make_context("llm-daemon", args) as context:  # the words before the command's own
            _, sub, rest = cli.resolve_command(context, [*context._protected_args, *context.args])
            assert sub is not None
            while rest and isinstance(sub, click.Group):
                _, sub, rest = sub.resolve_command(click.Context(sub), rest)
                assert sub is not None
            sub.make_context(sub.name, rest)
    assert ("--json" in text) == (name in JSON)


def test_the_list_of_commands_says_what_they_say() -> None:
    top = {name: c for name, c in commands().items() if " " not in name}
    assert {name: (c.help or "").strip().splitlines()[0] for name, c in top.items()} == COMMANDS


def test_help_names_every_command(cli: Cli) -> None:
    result = cli("--help")
    assert (result.status, result.err) == (0, "")
    assert all(re.search(rf"^  {name} +\S", result.out, re.M) for name in COMMANDS)
    assert "Examples:" in result.out
    assert "1 `doctor` found" in " ".join(result.out.split())


def test_no_command_shows_help_and_is_wrong_use(cli: Cli) -> None:
    result = cli()
    assert (result.status, result.out) == (2, "")
    assert "Commands:" in result.err


def test_version(cli: Cli) -> None:
    result = cli("--version")
    assert result.status == 0
    assert re.fullmatch(r"llm-daemon \d\S+\n", result.out)


@pytest.mark.parametrize(("typed", "meant"), [("pss", "ps"), ("model", "models"), ("stat", "stop")])
def test_unknown_command_names_the_nearest(cli: Cli, typed: str, meant: str) -> None:
    result = cli(typed)
    assert (result.status, result.out) == (2, "")
    assert result.err == f"llm-daemon: no command {typed!r}\n  hint: did you mean `llm-daemon {meant}`?\n"


@pytest.mark.parametrize("typed", ["chat", "ask"])
def test_what_others_call_a_chat_is_found(cli: Cli, typed: str) -> None:
    assert "hint: `llm-daemon run MODEL` is a chat" in cli(typed, "smollm2-135m").err


def test_bench_says_where_it_is_when_it_is_not_here(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "added", dict)
    result = cli("bench")
    assert (result.status, result.err) == (2, "llm-daemon: no command 'bench'\n  hint: pip install llm-daemon-bench\n")


def test_commands_of_other_packages_are_found_and_listed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("extra", "llm_daemon.cli.ps:command", "llm_daemon.commands")
    monkeypatch.setattr(main, "added", lambda: {"extra": point})
    assert re.search(r"^  extra +Show what runs", cli("--help").out, re.M)
    assert cli("extra", "--help").status == 0


@pytest.mark.parametrize(
    "args",
    [
        ["ps", "--nonsense"], ["models", "show"], ["run", "m", "hi", "--max-tokens", "0"], ["run", "m", "x", "--temperature=nan"],
        ["load", "m", "--context", "x"], ["serve", "--port", "70000"], ["exec"], ["env", "--shell", "csh"], ["models", "freeze"],
        ["models", "--json", "list"], ["run", "", "hi"], ["load", " "], ["env", ""], ["stop", ""],
    ],
)  # fmt: skip
def test_wrong_use_is_one_line_and_a_hint(cli: Cli, args: list[str]) -> None:
    result = cli(*args)
    assert (result.status, result.out) == (2, "")
    assert re.fullmatch(r"llm-daemon: [^\n]+\n  hint: [^\n]+\n", result.err), result.err


def test_looking_imports_little(daemon: FakeDaemon) -> None:
    code = (
        "import sys; from llm_daemon.cli.main import run; run(['ps']); "
        "print(*sorted({'rich', 'asyncio', 'psutil', 'msgspec', 'platformdirs', 'http.client', 'subprocess', 'tomllib',"
        " 'llm_daemon.models', 'llm_daemon.daemon', 'llm_daemon.config'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "smollm2-135m" in done.stdout
    assert done.stderr.strip() == ""
