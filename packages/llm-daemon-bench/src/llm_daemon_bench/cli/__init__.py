"""The verbs of `llm-daemon bench`, also to be had as `llm-daemon-bench`; one file each, imported on demand."""

from __future__ import annotations

from importlib import import_module

import click

# One line each, so that `--help` need not import the verbs; a test holds them against the verbs' own words.
VERBS: dict[str, str] = {
    "init": "Write a commented suite to start from, out of what is installed here.",
    "run": "Measure a suite: every server, model and quantization on every case.",
    "list": "Show the sessions there are.",
    "show": "Show one session: its cells, medians and failures.",
    "report": "Show a session for people: in the terminal, as Markdown, as one HTML file.",
    "compare": "Say in which cells B is faster or slower than A.",
    "gate": "Exit with 1 if anything became slower or wrong.",
    "aa": "Tell how large a difference is where there is none.",
    "recommend": "Name the target to use, and why not the others.",
    "export": "Print every trial as a line of CSV.",
    "import": "Make a session of what llama-bench or llama-benchy measured.",
    "doctor": "Look for what would spoil a measurement here.",
    "validate": "Hold our numbers against references, and print how far they agree.",
}
FILES = {"import": "import_"}  # of a verb that no module may be called by
ENDINGS = (
    "Exit status: 0 fine, 1 a gate was not passed or no target is recommended, 2 wrong usage, "
    "3 the machine or a server's fault, 130 interrupted."
)


class Verbs(click.Group):
    """Verbs are modules of this package, imported on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*VERBS]  # once its module is imported, `list` is a verb here

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        found: click.Command = import_module(f"{__package__}.{FILES.get(cmd_name, cmd_name)}").command
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([*VERBS.items()])


@click.group("bench", cls=Verbs, epilog=ENDINGS, context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Measure which server, model and quantization is fast enough for your cases."""
