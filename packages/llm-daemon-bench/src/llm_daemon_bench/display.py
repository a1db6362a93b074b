"""Progress of a run: a bar and the time left for each target where a person watches, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from llm_daemon.cli.words import clean, duration, is_terminal

STEP_S = 10.0  # between two plain lines about the same target


class Pace:
    """How long a target's trials take, launches included: what its time left is told from."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}
        self.done: dict[str, int] = {}
        self.spent: dict[str, float] = {}
        self._at: tuple[str, float] | None = None

    def plan(self, left: dict[str, int]) -> None:
        self.left, self.done = dict(left), dict.fromkeys(left, 0)
        self.spent = dict.fromkeys(left, 0.0)

    def busy(self, target: str, now: float) -> None:
        """From `now` (seconds) on, time is spent on this target."""
        if self._at is not None:
            self.spent[self._at[0]] = self.spent.get(self._at[0], 0.0) + now - self._at[1]
        self._at = (target, now)

    def did(self, target: str, now: float) -> None:
        self.busy(target, now)
        self.done[target] = self.done.get(target, 0) + 1

    def seconds_left(self, target: str) -> float | None:
        """None until a trial of this target, or of any, is done."""
        rest = self.left.get(target, 0) - self.done.get(target, 0)
        if not rest:
            return 0.0
        mine = target if self.done.get(target) else None
        spent, done = (self.spent[mine], self.done[mine]) if mine else (sum(self.spent.values()), sum(self.done.values()))
        return rest * spent / done if done else None

    def all_left(self) -> float | None:
        each = [self.seconds_left(t) for t in self.left]
        return None if None in each else sum(s for s in each if s is not None)


class Display:
    """A `runner.Watcher`.  Use it in `with`, so that the terminal is left as it was found."""

    def __init__(self, plain: bool = False, quiet: bool = False) -> None:
        self.quiet = quiet
        self.pace = Pace()
        self.problems: list[str] = []
        self._rich = not plain and not quiet and is_terminal(sys.stderr)
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._said: dict[str, float] = {}

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def planned(self, left: dict[str, int]) -> None:
        self.pace.plan(left)
        if not self._rich:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        left_column = TextColumn("{task.fields[left]:>9}", markup=False)
        now_column = TextColumn("{task.fields[now]}", markup=False)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn(), left_column,
            now_column,
            console=Console(stderr=True),
        )  # fmt: skip
        self._tasks = {name: self._bar.add_task(clean(name), total=n, left="", now="") for name, n in left.items()}
        self._tasks[""] = self._bar.add_task("all", total=sum(left.values()), left="", now="")
        self._bar.start()

    def doing(self, target: str, what: str) -> None:
        self.pace.busy(target, time.monotonic())
        if self._bar is not None:
            for name, task in self._tasks.items():
                self._bar.update(task, now=clean(what) if name == target else "")
        elif not self.quiet and what.startswith("launch") and "," not in what:
            click.echo(clean(f"{target}: {what}"), err=True)

    def did(self, target: str, what: str) -> None:
        now = time.monotonic()
        self.pace.did(target, now)
        left, all_left = self.pace.seconds_left(target), self.pace.all_left()
        if self._bar is not None:
            self._bar.update(self._tasks[target], advance=1, left=_left(left))
            self._bar.update(self._tasks[""], advance=1, left=_left(all_left))
        elif not self.quiet and now - self._said.get(target, 0.0) >= STEP_S:
            self._said[target] = now
            done, total = self.pace.done[target], self.pace.left[target]
            click.echo(clean(f"{target}: {done}/{total}, {_left(left)} left here, {_left(all_left)} in all"), err=True)

    def problem(self, target: str, what: str) -> None:
        line = clean(f"{target}: {what}")
        self.problems.append(line)
        if self._bar is not None:
            self._bar.console.print(line, style="red", markup=False, highlight=False)
        else:
            click.echo(line, err=True)


def _left(seconds: float | None) -> str:
    return "" if seconds is None else duration(seconds)
