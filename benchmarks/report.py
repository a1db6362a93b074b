"""What a measurement becomes: rows with a baseline and a target, tables for people, JSON for programs."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

BUSY = 15.0  # percent of all cores used by others: from here on the numbers are not to be believed
PACKAGES = ("llm-daemon", "uvloop", "httptools", "msgspec", "xllamacpp", "aiohttp")


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def percentile(values: Sequence[float], percent: int) -> float:
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def iqr(values: Sequence[float]) -> float:
    """Distance between the first and the third quartile: the middle half of all samples lies within."""
    return percentile(values, 75) - percentile(values, 25)


@dataclass(frozen=True, slots=True)
class Row:
    """One number beside what it is compared with.

    `value` and `baseline` are in `unit`; `judged` names which of value, difference and ratio must be at most `target`.
    `spread` is the interquartile range of the `samples` values behind `value` (0: not known here).
    """

    what: str
    unit: str
    value: float
    samples: int = 0
    spread: float | None = None
    baseline: float | None = None
    against: str = ""
    target: float | None = None
    judged: Literal["value", "difference", "ratio"] = "value"

    @classmethod
    def of(cls, what: str, unit: str, values: Sequence[float], base: Sequence[float] = (), **more: Any) -> Row:
        """The medians of `values` and of `base`."""
        return cls(what, unit, median(values), len(values), iqr(values), median(base) if base else None, **more)

    @property
    def difference(self) -> float | None:
        return None if self.baseline is None else self.value - self.baseline

    @property
    def ratio(self) -> float | None:
        return self.value / self.baseline if self.baseline else None

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None if there is none."""
        found = {"value": self.value, "difference": self.difference, "ratio": self.ratio}[self.judged]
        return None if self.target is None or found is None else found <= self.target

    def wire(self) -> dict[str, Any]:
        return {
            "what": self.what, "unit": self.unit, "value": self.value, "samples": self.samples, "iqr": self.spread,
            "baseline": self.baseline, "against": self.against, "difference": self.difference, "ratio": self.ratio,
            "target": self.target, "judged": self.judged, "met": self.met,
        }  # fmt: skip


@dataclass(slots=True)
class Grid:
    """The same quantities measured on several ways: `lines` holds (what, unit, {way: value}), all from this run."""

    title: str
    ways: Sequence[str]
    lines: list[tuple[str, str, Mapping[str, float]]] = field(default_factory=list)

    def wire(self) -> dict[str, Any]:
        lines = [{"what": what, "unit": unit, "values": dict(values)} for what, unit, values in self.lines]
        return {"title": self.title, "ways": list(self.ways), "lines": lines}


@dataclass(slots=True)
class Section:
    """One table, and grids.  `busy`: percent of all cores that others used before or after; `failed`: not measured in full."""

    name: str
    title: str
    rows: list[Row] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    busy: float = 0.0
    seconds: float = 0.0
    failed: bool = False

    def wire(self) -> dict[str, Any]:
        return {
            "name": self.name, "title": self.title, "rows": [row.wire() for row in self.rows],
            "grids": [grid.wire() for grid in self.grids], "notes": self.notes, "extra": self.extra,
            "busy_percent": self.busy, "seconds": round(self.seconds, 1), "failed": self.failed,
        }  # fmt: skip


# -- tables


def number(value: float | None, unit: str = "", sign: bool = False) -> str:
    """Three digits that matter.

    >>> number(0.01234, "ms"), number(41.26, "ms", sign=True), number(None)
    ('0.0123 ms', '+41.3 ms', '')
    """
    if value is None:
        return ""
    size = abs(value)
    digits = 4 if 0 < size < 0.1 else 3 if size < 1 else 2 if size < 10 else 1 if size < 1000 else 0
    return f"{value:{'+' if sign else ''}.{digits}f}{' ' + unit if unit else ''}"


def target(row: Row) -> str:
    if row.target is None:
        return ""
    if row.judged == "ratio":
        return f"<= x{row.target:g}"
    return f"<= {'+' if row.judged == 'difference' else ''}{row.target:g} {row.unit}"


def table(section: Section) -> Table:
    title = f"{section.title}  [dim]({section.name}, {section.seconds:.0f} s)"
    out = Table(title=title, title_justify="left", title_style="bold")
    out.add_column("what", overflow="fold")
    for name in ("value", "IQR", "n", "baseline", "difference", "ratio", "target", "met"):
        out.add_column(name, justify="right", no_wrap=name != "baseline")
    for row in section.rows:
        met = {True: "[green]yes", False: "[red]NO", None: ""}[row.met]
        base = f"{number(row.baseline, row.unit)} {row.against}" if row.baseline is not None else ""
        out.add_row(
            escape(row.what), number(row.value, row.unit), number(row.spread), str(row.samples or ""), escape(base),
            number(row.difference, sign=True), f"x{number(row.ratio)}" if row.ratio is not None else "", target(row), met,
        )  # fmt: skip
    return out


def grid_table(grid: Grid) -> Table:
    """Each way's value; in brackets, how many times the first way's it is."""
    out = Table(title=escape(grid.title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    out.add_column("", no_wrap=True)
    for way in grid.ways:
        out.add_column(way, justify="right", no_wrap=True)
    for what, unit, values in grid.lines:
        base, cells = values.get(grid.ways[0]), []
        for way in grid.ways:
            cell = number(values.get(way), unit)
            cells.append(
                f"{cell} [dim](x{number(values[way] / base)})" if base and way in values and way != grid.ways[0] else cell
            )
        out.add_row(escape(what), *cells)
    return out


def show(console: Console, section: Section) -> None:
    if section.rows:
        console.print(table(section))
    else:
        console.print(f"[bold]{escape(section.title)}[/]  [dim]({section.name})")
    for grid in section.grids:
        console.print(grid_table(grid))
    for note in section.notes:
        console.print(f"  {escape(note)}", highlight=False)
    if section.busy > BUSY:
        console.print(
            f"  [red]The machine was {section.busy:.0f} % busy with other work before or after: do not trust this table."
        )
    console.print()


# -- the machine


def busy_percent(seconds: float) -> float:
    """What share of all cores is used while we do nothing but wait, in percent; time stolen by a hypervisor counts."""
    before = psutil.cpu_times()
    time.sleep(seconds)
    after = psutil.cpu_times()
    spent = [b - a for a, b in zip(before, after, strict=True)]
    idle = sum(spent[before._fields.index(name)] for name in ("idle", "iowait") if name in before._fields)
    inside_others = sum(spent[before._fields.index(name)] for name in ("guest", "guest_nice") if name in before._fields)
    total = sum(spent) - inside_others  # the kernel counts guest time as user time too, proc_stat(5)
    return 100 * (1 - idle / total) if total > 0 else 0.0


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(), "python": platform.python_version(), "python_path_is_venv": sys.prefix != sys.base_prefix,
        "load_before": [round(load, 2) for load in os.getloadavg()], "versions": versions,
    }  # fmt: skip


def program_version(argv: Sequence[str]) -> str:
    """The first line of what a program says about itself."""
    done = subprocess.run([*argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=10, check=False)
    return done.stdout.strip().partition("\n")[0]


def show_machine(console: Console, facts: dict[str, Any]) -> None:
    console.print(
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gb']} GB; {facts['system']}; Python {facts['python']}; "
        f"load before {facts['load_before'][0]}, {facts['busy_percent']:.0f} % busy",
        highlight=False,
    )
    console.print(", ".join(f"{name} {version}" for name, version in facts["versions"].items()), style="dim", highlight=False)
    if facts["busy_percent"] > BUSY or facts["load_before"][0] > 0.5 * facts["cores"]:
        console.print("[red bold]The machine is busy with other work: these numbers prove nothing.[/]")
    console.print()
