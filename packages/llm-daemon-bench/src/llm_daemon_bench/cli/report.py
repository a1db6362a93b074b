"""`report`: a session for people: in the terminal, as Markdown, as one HTML file."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import click

from llm_daemon.cli.words import as_json, clean, is_terminal, json_option, subcommand

from .. import pick
from ..faces import view_json
from ..report import text
from ..report.tables import View
from ..results import load, unwritable


@subcommand(
    "report",
    """
    llm-daemon bench report                                the newest session, in the terminal
    llm-daemon bench report results/monday --html monday.html
    llm-daemon bench report results/monday --markdown - | pbcopy
    """,
)
@click.argument("session", required=False)
@click.option(
    "--html", "html_", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write one HTML file (- for stdout)."
)
@click.option(
    "--markdown", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write Markdown (- for stdout)."
)
@click.option("--plain", is_flag=True, help="No colours, also on a terminal.")
@json_option
def command(session: str | None, html_: Path | None, markdown: Path | None, plain: bool, json_: bool) -> None:
    """Show a session for people: in the terminal, as Markdown, as one HTML file.

    A table a case, what to use by the suite's limits, and what makes figures doubtful.
    """
    view = View.of(load(pick.folder(session)))
    if json_:
        as_json(view_json(view))
        return
    if html_:
        from ..report.html import html

        _put(html_, html(view))
    if markdown:
        _put(markdown, text.markdown(view))
    if not html_ and not markdown:
        click.echo(text.terminal(view, colour=not plain and is_terminal(sys.stdout)), nl=False)


def _put(path: Path, content: str) -> None:
    """Whole or not at all; `-` is stdout."""
    if str(path) == "-":
        click.echo(content, nl=False)
        return
    temporary = ""
    try:
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
        with open(fd, "w", encoding="utf-8") as f:
            f.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as e:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise unwritable(path, e, "name a file in a folder that is there and yours") from e
    click.echo(clean(path), err=True)
