"""`ui`: the dashboard, in the browser of whoever calls."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from .. import errors
from . import link
from .ps import NOBODY
from .words import as_json, is_terminal, json_option, note, subcommand

DOOR = "ui.html"  # in the runtime folder, which nobody else can open


@subcommand(
    "ui",
    """
    llm-daemon ui
    llm-daemon ui --print                                only the address, e.g. for a browser elsewhere
    """,
)
@click.option("--print", "print_", is_flag=True, help="Print the address and open nothing.")
@json_option
def command(print_: bool, json_: bool) -> None:
    """Open the dashboard in a browser.

    Its address holds the key, behind a #, where it stays in the browser: whoever has it may use your models. A dashboard
    keeps nothing alive; when the daemon ends, it says so.
    """
    talk = link.look()
    if talk is None:
        raise errors.Unavailable(NOBODY, code="no_daemon", hint="`llm-daemon serve` keeps one up")
    talk.close()
    url = address(talk.welcome["base_url"], talk.welcome["api_key"])
    if json_:
        as_json({"url": url})
        return
    click.echo(url)
    if not print_ and is_terminal(sys.stdout) and _has_screen():
        import webbrowser

        if not webbrowser.open(door(talk.welcome["runtime_dir"], url).as_uri()):
            note("no browser was found: open the address by hand")


def address(base_url: str, key: str) -> str:
    """
    >>> address("http://127.0.0.1:28282/v1", "s3cret")
    'http://127.0.0.1:28282/ui/#token=s3cret'
    """
    return base_url.removesuffix("/v1") + "/ui/" + ("" if key == "none" else f"#token={key}")


def door(folder: str, url: str) -> Path:
    """A page of our own that leads to `url`: every user of the machine sees a browser's arguments, and must not see the key."""
    from html import escape

    path, new = Path(folder, DOOR), Path(folder, "ui.new")
    new.unlink(missing_ok=True)
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as f:
        f.write(f'<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url={escape(url)}">\n')
    new.replace(path)
    return path


def _has_screen() -> bool:
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
