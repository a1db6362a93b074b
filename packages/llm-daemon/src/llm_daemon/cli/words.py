"""How things are said: sizes, durations, tables; JSON for scripts; and nothing that could upset a terminal."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from ..spec import MODES


def clean(text: object, keep: str = "") -> str:
    r"""Without control characters: names of processes, files and models come from others.

    >>> clean("a\x1b[31mb\n")
    'a?[31mb?'
    """
    return "".join(c if c.isprintable() or c in keep else "?" for c in str(text))


def size(n: float | None) -> str:
    """Bytes for people.

    >>> [size(n) for n in (None, 0, 999, 98_362_432, 5_200_000_000)]
    ['-', '0 B', '999 B', '98 MB', '5.2 GB']
    """
    if n is None:
        return "-"
    for unit in ("B", "kB", "MB"):
        if n < 999.5:
            return f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:.1f} GB" if n < 999.95 else f"{n / 1000:.1f} TB"


def duration(seconds: float | None) -> str:
    """Seconds for people.

    >>> [duration(s) for s in (None, 0.4, 59, 120, 1800, 3900, 200_000)]
    ['-', '0 s', '59 s', '2 min', '30 min', '1 h 5 min', '2 d 7 h']
    """
    if seconds is None:
        return "-"
    if round(seconds) < 90 and round(seconds) != 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h" + (f" {minutes} min" if minutes else "")
    days, hours = divmod(hours, 24)
    return f"{days} d" + (f" {hours} h" if hours else "")


def count(n: int, one: str, many: str = "") -> str:
    """
    >>> count(1, "client"), count(3, "client"), count(0, "process", "processes")
    ('1 client', '3 clients', '0 processes')
    """
    return f"{n} {one if n == 1 else many or one + 's'}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints aligned columns; the last one may be long."""
    lines = [list(head), *([clean(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, [*widths, 0], strict=True)]
        click.echo("  ".join(cells).rstrip())


def as_json(value: Any) -> None:
    """The one JSON document of a `--json` command."""
    click.echo(json.dumps(value, indent=2))


def is_terminal(stream: Any) -> bool:
    """Whether a person looks at (or types into) this standard stream."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def is_styled(stream: Any) -> bool:
    """Whether what is dim or coloured shall be so there: to a person, on a terminal that can, who does not want it otherwise.

    NO_COLOR as on no-color.org: set to anything but the empty string.
    """
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def note(text: str, quiet: bool = False) -> None:
    """A dim line on stderr: about the work, not part of the answer."""
    if not quiet:
        say_styled(clean(text), sys.stderr, nl=True, dim=True)


def say_styled(text: str, stream: Any, nl: bool = False, **style: Any) -> None:
    """Prints to stdout or stderr, in a style of `click.style` where that is wanted."""
    click.secho(text, nl=nl, err=stream is sys.stderr, color=is_styled(stream), **style)


def subcommand(name: str, examples: str, **settings: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """Decorator: a command with its `Examples:` block, one example a line."""
    return click.command(name, epilog=example_block(examples), **settings)


def example_block(examples: str) -> str:
    r"""The end of a help page.

    >>> example_block("llm-daemon ps")
    '\x08\nExamples:\n  llm-daemon ps'
    """
    return "\b\nExamples:\n" + "\n".join("  " + line.strip() for line in examples.strip().splitlines())


json_option = click.option("--json", "json_", is_flag=True, help="Print one JSON document instead.")
quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress and no remarks on stderr.")


def load_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that loads a model; they reach it as `load`, a dict of those that were given."""

    @functools.wraps(function)
    def gathered(*args: Any, **given: Any) -> Any:
        load = {name: value for name in _LOAD if (value := given.pop(name)) not in (None, ())}
        return function(*args, load=load, **given)

    for name, settings in reversed(_LOAD.items()):
        gathered = click.option("--" + name.replace("_", "-"), **settings)(gathered)
    return gathered


_LOAD: dict[str, dict[str, Any]] = {
    "engine": {"metavar": "NAME", "help": "Load with this engine (see `llm-daemon engines`)."},
    "context": {"type": click.IntRange(min=1), "metavar": "TOKENS", "help": "Room for one conversation."},
    "parallel": {"type": click.IntRange(min=1), "metavar": "N", "help": "Conversations at once."},
    "gpu_layers": {"type": click.IntRange(min=0), "metavar": "N", "help": "Layers to put on a GPU."},
    "mode": {"type": click.Choice(MODES), "help": "What to load it for, if not what it is made for."},
    "draft": {"metavar": "MODEL", "help": "A small model that proposes tokens to a large one."},
    "mmproj": {"metavar": "MODEL", "help": "A projector for images and sound."},
    "lora": {"metavar": "MODEL[:SCALE]", "multiple": True, "help": "An adapter; may be given more than once."},
}
