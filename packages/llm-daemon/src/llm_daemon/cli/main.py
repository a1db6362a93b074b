"""The command line's front door: finds the command, and is the one place where errors become words and exit statuses."""

from __future__ import annotations

import errno
import os
import sys
from functools import cache
from importlib import import_module
from io import TextIOWrapper
from typing import TYPE_CHECKING

import click

from ..errors import Bug, LlmDaemonError, Unavailable
from .words import clean, is_terminal

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

# One line each, so that `--help` need not import the commands; a test holds them against the commands' own words.
COMMANDS = {
    "run": "Ask a model once, or chat with it.",
    "exec": "Run a program with a model at hand.",
    "env": "Print variables that point a shell's programs to a model.",
    "serve": "Keep the endpoint up in the foreground.",
    "ps": "Show what runs, and when it will close.",
    "who": "Show who holds which model.",
    "explain": "Show where the time of a request went.",
    "ui": "Open the dashboard in a browser.",
    "stop": "Stop a model, or everything.",
    "load": "Load a model ahead of its first use.",
    "plan": "Show what loading a model would do.",
    "logs": "Show the logs of daemon and engines.",
    "models": "List, fetch, describe and remove models.",
    "engines": "Show which engines can run here.",
    "doctor": "Look for whatever could go wrong here.",
    "config": "Show every setting and where it comes from.",
}
BROKEN_PIPE = 141  # 128 + SIGPIPE: what a shell sees of any program whose reader has left
OUTPUT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # of a write to what stands behind `>`
ENDINGS = (
    "Exit status: 0 fine, 1 `doctor` found a failure, 2 wrong usage, 69 the engine's fault, 70 our bug, 75 try again later, "
    "130 interrupted. Errors go to stderr with a hint."
)


@cache
def added() -> dict[str, EntryPoint]:
    """Commands that other installed packages bring (entry points of the group `llm_daemon.commands`), by name."""
    from importlib.metadata import entry_points  # only for a word that is no command of ours

    return {point.name: point for point in sorted(entry_points(group="llm_daemon.commands")) if point.name not in COMMANDS}


class Cli(click.Group):
    """Commands are modules of this package, imported on demand, and those that other packages bring."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS, *added()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return added()[cmd_name].load() if cmd_name in added() else None
        found: click.Command = import_module(f"{__package__}.{cmd_name}").command
        return found

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-") and args[0] not in added():
            import difflib  # only now: `ps` and the like should start fast

            near = difflib.get_close_matches(args[0], COMMANDS, 1, 0.5)
            hint = f"did you mean `llm-daemon {near[0]}`?" if near else "`llm-daemon --help` lists the commands"
            if args[0] == "bench":
                hint = "pip install llm-daemon-bench"
            elif args[0] in ("chat", "ask"):
                hint = "`llm-daemon run MODEL` is a chat, `llm-daemon run MODEL PROMPT` asks once"
            raise click.UsageError(f"no command {args[0]!r}\n  hint: {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            others = [(name, point.load().get_short_help_str(90)) for name, point in added().items()]
            formatter.write_dl([*COMMANDS.items(), *others])


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        from importlib import metadata

        click.echo(f"llm-daemon {metadata.version('llm-daemon')}")
        ctx.exit()


@click.group(
    cls=Cli,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="\b\nExamples:\n  llm-daemon run smollm2-135m 'Why is the sky blue?'\n"
    "  llm-daemon exec --model smollm2-135m -- python my_script.py\n  llm-daemon ps\n\n" + ENDINGS,
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version and leave.")
@click.option("--debug", is_flag=True, help="Show the traceback of an unexpected error.")
def cli(debug: bool) -> None:
    """A local LLM that is simply there: whoever asks first starts it, everybody shares it, it closes by itself."""


def main(argv: list[str] | None = None) -> None:
    """Runs one command and ends the process with its exit status."""
    for fd in (0, 1, 2):  # one that is closed would be the next socket's number, and a child would write into it
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # None where it was closed
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(args: list[str]) -> int:
    """Runs one command; returns its exit status and has told the user what went wrong, if anything did."""
    if "_LLM_DAEMON_COMPLETE" in os.environ:  # the shell asks what could come next
        cli.main(args, prog_name="llm-daemon")
    try:
        try:
            with cli.make_context("llm-daemon", list(args)) as ctx:
                status = cli.invoke(ctx)
            _flush()
            return status if isinstance(status, int) else 0
        except click.exceptions.Exit as e:
            _flush()
            return e.exit_code
        except (KeyboardInterrupt, EOFError, click.Abort):
            if is_terminal(sys.stderr):
                click.echo(err=True)  # the prompt should not stand behind ^C
            return 130
        except click.exceptions.NoArgsIsHelpError as e:
            e.show()
            return e.exit_code
        except click.ClickException as e:
            return _usage(e)
        except LlmDaemonError as e:
            _say(e.full())
            return e.exit_status
        except OSError as e:
            if isinstance(e, BrokenPipeError):
                raise
            if e.errno not in OUTPUT or e.filename is not None:
                return _crashed(e, "--debug" in args)
            _drop_output()
            _say(f"cannot write the output: {e.strerror}")
            return Unavailable.exit_status
        except Exception as e:
            return _crashed(e, "--debug" in args)
    except BrokenPipeError:  # `... | head`: they have what they wanted
        _drop_output()
        return BROKEN_PIPE
    except KeyboardInterrupt:  # a second Ctrl-C while we say goodbye
        return 130


def _say(text: str) -> None:
    click.echo(f"llm-daemon: {clean(text, keep=chr(10))}", err=True)


def _usage(error: click.ClickException) -> int:
    text = error.format_message()
    ctx = getattr(error, "ctx", None)
    if "hint:" not in text and ctx is not None:
        text += f"\n  hint: {ctx.command_path} --help"
    _say(text[:1].lower() + text[1:])
    return 2


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _drop_output() -> None:
    """What is still in the buffers goes nowhere: the interpreter would fail over it when it ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(null, stream.fileno())
    os.close(null)


def _crashed(error: BaseException, debug: bool) -> int:
    """Our bug: one line, and the traceback in a file that a report can have."""
    import traceback

    from .. import paths

    text = "".join(traceback.format_exception(error))
    what = f"unexpected {type(error).__name__}: {error}".splitlines()[0]
    if debug:
        click.echo(text, err=True, nl=False)
        where = ""
    else:
        where = "see the traceback: add --debug right after `llm-daemon`"
        try:
            path = os.path.join(paths.state_dir(), "last-crash.txt")
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", errors="backslashreplace") as f:
                f.write(text)
            where = f"the traceback is in {path}"
        except OSError:
            pass
    _say(Bug(what, hint="this is our bug, please report it" + (f"; {where}" if where else "")).full())
    return Bug.exit_status


if __name__ == "__main__":
    main()
