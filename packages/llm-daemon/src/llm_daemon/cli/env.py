"""`env`: variables for a shell, and a lease that lasts as long as the shell."""

from __future__ import annotations

import json
import os
import shlex
import sys
from typing import Any

import click

from . import link
from .words import is_terminal, load_options, note, subcommand


@subcommand(
    "env",
    """
    eval "$(llm-daemon env smollm2-135m)"                in sh, bash or zsh
    llm-daemon env smollm2-135m --shell fish | source    in fish
    llm-daemon env smollm2-135m --json | jq -r .OPENAI_BASE_URL
    """,
)
@click.argument("model", required=False)
@click.option("--shell", type=click.Choice(["sh", "fish", "json"]), show_default="sh", help="Whose syntax to print.")
@click.option("--json", "json_", is_flag=True, help="The same as --shell json.")
@click.option(
    "--pid", type=click.IntRange(min=1), metavar="PID", help="Keep the endpoint while this process lives, not the caller."
)
@load_options
def command(model: str | None, shell: str | None, json_: bool, pid: int | None, load: dict[str, Any]) -> None:
    """Print variables that point a shell's programs to a model.

    Sets OPENAI_BASE_URL, OPENAI_API_KEY and OPENAI_MODEL. The endpoint stays up until the shell that called this ends;
    the model is loaded by the first request. The default model is taken if none is named.
    """
    if json_ and shell not in (None, "json"):
        raise click.UsageError(f"--json and --shell {shell} exclude each other", click.get_current_context())
    shell = "json" if json_ else shell or "sh"
    spec = link.resolve(model if model is not None else link.default_model(), **load)
    talk = link.sync.connect()
    try:
        link.call(talk, "hold", pid=pid or caller())
        values = {
            "OPENAI_BASE_URL": talk.welcome["base_url"],
            "OPENAI_API_KEY": talk.welcome["api_key"],
            "OPENAI_MODEL": spec.model,
        }
        click.echo(lines(values, shell))
    finally:
        talk.close()
    if is_terminal(sys.stdout) and shell != "json":
        name = f" {shlex.quote(model)}" if model else ""
        how = f"llm-daemon env{name} --shell fish | source" if shell == "fish" else f'eval "$(llm-daemon env{name})"'
        note(f"# to set them: {how}")


def lines(values: dict[str, str], shell: str) -> str:
    r"""The variables in a shell's syntax, safe to evaluate whatever they hold.

    >>> print(lines({"A": "it's $x"}, "sh"))
    export A='it'"'"'s $x'
    >>> print(lines({"A": "it's \\"}, "fish"))
    set -gx A 'it\'s \\'
    """
    if shell == "json":
        return json.dumps(values, indent=2)
    if shell == "fish":
        quoted = {k: "'" + v.replace("\\", "\\\\").replace("'", "\\'") + "'" for k, v in values.items()}
        return "\n".join(f"set -gx {k} {v}" for k, v in quoted.items())
    return "\n".join(f"export {k}={shlex.quote(v)}" for k, v in values.items())


def caller() -> int:
    """The shell that will live on with the variables.

    Our parent may be a copy of the shell made for `$(...)` or a pipe, which ends when we do.  Such a copy runs the same
    command line and, made by fork alone, leads no process group; a shell started inside a shell does.
    """
    import psutil

    pid = os.getppid()
    try:
        while True:
            process = psutil.Process(pid)
            above = process.parent()
            if above is None or above.pid <= 1 or os.getpgid(pid) == pid or process.cmdline() != above.cmdline():
                return pid
            pid = above.pid
    except (psutil.Error, OSError):  # not ours to look at: the parent it is
        return pid
