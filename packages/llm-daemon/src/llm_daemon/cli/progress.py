"""Progress of a load on stderr: a bar where a person watches, a line for each step elsewhere."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from .words import clean, is_terminal, size

PHASES = {
    "wait": "waiting", "resolve": "looking it up", "download": "downloading", "verify": "checking", "extract": "unpacking",
    "start": "starting", "load": "loading",
}  # fmt: skip
STEP = 25  # percent between two lines where there is no terminal


class Display:
    """Call it with each `Progress`; use it in `with`, as often as you like, so that the terminal is left as it was found."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._rich = is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb"
        self._step = ("", False)
        self._text = ""
        self._next = 0  # percent at which the next line is due
        self._shown: Any = None  # a rich Status or Progress
        self._task: Any = None

    def __enter__(self) -> Display:
        self._step = ("", False)
        return self

    def __exit__(self, *exc: object) -> None:
        self._end()

    def __call__(self, progress: Any) -> None:
        if self._quiet:
            return
        done, total = progress.done or 0, progress.total or 0
        step = (progress.phase, bool(total))
        is_new = step != self._step
        if is_new or total:  # a download may have several parts; other messages only tell a step's inner workings
            doing = PHASES.get(progress.phase, progress.phase)
            self._text = clean(f"{doing} {progress.message}".strip() if total else progress.message or doing)
        if is_new:
            self._step, self._next = step, 0
        if self._rich:
            self._draw(done, total)
        else:
            self._line(done, total, is_new)

    def _line(self, done: float, total: float, is_new: bool) -> None:
        percent = int(100 * done / total) if total else 0
        if is_new or (total and percent >= self._next):
            self._next = (percent // STEP + 1) * STEP
            click.echo(self._text + (f": {percent} % of {size(total)}" if total else ""), err=True)

    def _draw(self, done: float, total: float) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        if bool(total) != (self._task is not None):
            self._end()
        if self._shown is None:
            console = Console(stderr=True)
            if total:
                columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
                self._shown = Progress(*columns, console=console, transient=True)
                self._task = self._shown.add_task("", total=total)
            else:
                self._shown = console.status("")
            self._shown.start()
        if total:
            self._shown.update(self._task, description=self._text, completed=done, total=total)
        else:
            from rich.text import Text

            self._shown.update(Text(self._text))

    def _end(self) -> None:
        if self._shown is not None:
            self._shown.stop()
        self._shown = self._task = None
