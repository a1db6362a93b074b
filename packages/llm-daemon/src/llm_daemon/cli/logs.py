"""`logs`: the daemon's log and each engine's, apart or together."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import click

from .. import errors, paths
from . import link
from .words import clean, is_terminal, subcommand

POLL = 0.25  # seconds between two looks; inotify would save little here and exists on Linux alone
RECENT = 86400.0  # seconds; logs of models nobody used for longer are shown only when asked for by name
CHUNK = 1 << 16


@subcommand(
    "logs",
    """
    llm-daemon logs                                      the end of each log
    llm-daemon logs -f                                   and what comes, until Ctrl-C
    llm-daemon logs smollm2-135m -n 200                  one engine's
    llm-daemon logs --daemon                             the daemon's own
    """,
)
@click.argument("model", required=False)
@click.option("--follow", "-f", is_flag=True, help="Go on with what comes, through rotations, until Ctrl-C.")
@click.option("--daemon", is_flag=True, help="Only the daemon's own log.")
@click.option("-n", "lines", type=click.IntRange(0, 1_000_000), default=50, show_default=True, help="So many lines of each log.")
def command(model: str | None, follow: bool, daemon: bool, lines: int) -> None:
    """Show the logs of daemon and engines.

    Without arguments: the daemon's and those of all models used within a day, each line with the name of its log in front.
    """
    if model is not None and daemon:
        raise errors.UsageError("--daemon and a model exclude each other", hint="leave both out to see both")
    tails: dict[str, Tail] = {}
    try:
        _show(tails, model, follow, daemon, lines)
    finally:
        for tail in tails.values():
            tail.close()


def _show(tails: dict[str, Tail], model: str | None, follow: bool, daemon: bool, lines: int) -> None:
    for name, path in sorted(_wanted(model, daemon).items(), key=lambda pair: _age(pair[1]), reverse=True):
        tails[path] = Tail(path, name)
        for line in tails[path].last(lines, unfinished=not follow):
            _print(line, tails[path].name, model is None and not daemon)
    if not tails:
        if model is not None and not follow:
            raise errors.UsageError(_nothing(model), code="no_log")
        click.echo(_nothing(model), err=True)
    pause = threading.Event()
    while follow:
        for name, path in _wanted(model, daemon).items():  # an engine may just have been started
            tail = tails.setdefault(path, Tail(path, name))
            for line in tail.new():
                _print(line, tail.name, model is None and not daemon)
        pause.wait(POLL)


def _wanted(model: str | None, daemon: bool) -> dict[str, str]:
    """Name -> path of the logs asked for that exist."""
    for folder in paths.log_dirs():
        found = {"daemon": paths.daemon_log(folder)}
        if model is not None:
            found = {model: paths.engine_log(folder, _id(model))}
        elif not daemon:
            engines = sorted(Path(folder).glob("engine-*.log"))
            found |= {p.stem.removeprefix("engine-"): str(p) for p in engines if _age(str(p)) < RECENT}
        if found := {name: path for name, path in found.items() if os.path.exists(path)}:
            return found
    return {}


def _id(model: str) -> str:
    """The public id of a model: its log has that name."""
    try:
        return link.resolve(model).model
    except errors.UsageError:  # forgotten by the catalog, deleted since: its log may still be there
        return str(link.sync.wish(model)["model"])


def _nothing(model: str | None) -> str:
    if model is None:
        return "there is no log yet"
    have = sorted(p.stem.removeprefix("engine-") for f in paths.log_dirs() for p in Path(f).glob("engine-*.log"))
    return f"there is no log of {clean(model)}" + (f"; there is one of {', '.join(map(clean, have))}" if have else "")


def _age(path: str) -> float:
    try:
        return time.time() - os.stat(path).st_mtime
    except OSError:
        return float("inf")


def _print(line: bytes, name: str, prefixed: bool) -> None:
    text = line.decode("utf-8", "replace")
    if is_terminal(sys.stdout):
        text = clean(text, keep="\t")  # an engine prints what it is sent
    click.echo(f"{clean(name)} | {text}" if prefixed else text)


class Tail:
    """Reads one log: its last lines, then what is added.  Rotation renames the file: the rest of the old one comes first."""

    def __init__(self, path: str, name: str) -> None:
        self.path = path
        self.name = name
        self._file: BinaryIO | None = None
        self._rest = b""

    def last(self, n: int, unfinished: bool) -> list[bytes]:
        """The last `n` lines, a line that is still being written among them only if `unfinished`; `new` goes on behind them."""
        if not self._open():
            return []
        lines = deque(self._read(), maxlen=n)
        if unfinished and self._rest:
            lines.append(self._rest)
        return list(lines)

    def new(self) -> Iterator[bytes]:
        """Lines that are whole by now and have not been given out."""
        if not self._open():
            return
        yield from self._read()
        while self._rotated():
            if self._rest:
                yield self._rest
            self.close()
            if not self._open():
                return
            yield from self._read()

    def close(self) -> None:
        """Forgets the file; a later read begins at the start of what has the name then."""
        if self._file is not None:
            self._file.close()
        self._file, self._rest = None, b""

    def _open(self) -> bool:
        if self._file is None:
            try:
                self._file = open(self.path, "rb")
            except FileNotFoundError:
                return False
            except OSError as e:
                raise errors.UsageError(f"cannot read {self.path}: {e.strerror}") from e
        return True

    def _read(self) -> Iterator[bytes]:
        assert self._file is not None
        while data := self._file.read(CHUNK):
            *lines, self._rest = (self._rest + data).split(b"\n")
            yield from lines

    def _rotated(self) -> bool:
        assert self._file is not None
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False  # deleted: there may be more to come
