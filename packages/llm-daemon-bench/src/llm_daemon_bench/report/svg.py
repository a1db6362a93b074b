"""The little of SVG that the pictures need: elements with everything escaped, axes with round ticks, a legend."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH = 760.0
GUTTER = 208.0  # left of the plot: names of targets
LETTER = 6.1  # px a letter of the 11 px font has on average
COLOURS = 8  # classes k0 .. k7 of the style sheet; further targets repeat them with dashes


def el(name: str, *children: str | Markup, **attributes: object) -> Markup:
    """One element; `class_` and `stroke_width` become `class` and `stroke-width`, None is left out.

    >>> el("text", "<b>", x=1.23456, class_="t")
    Markup('<text x="1.2" class="t">&lt;b&gt;</text>')
    """
    pairs = "".join(f' {k.rstrip("_").replace("_", "-")}="{escape(_number(v))}"' for k, v in attributes.items() if v is not None)
    inner = Markup("").join(children)
    return Markup(f"<{name}{pairs}>{inner}</{name}>") if children else Markup(f"<{name}{pairs}/>")


def _number(value: object) -> object:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value


def text(x: float, y: float, words: str, cls: str = "", anchor: str | None = None, hint: str = "") -> Markup:
    inner: list[str | Markup] = [words]
    if hint:
        inner.append(el("title", hint))
    return el("text", *inner, x=x, y=y, class_=cls or None, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, cls: str, hint: str = "") -> Markup:
    return el("line", *([el("title", hint)] if hint else []), x1=x1, y1=y1, x2=x2, y2=y2, class_=cls)


def rect(x: float, y: float, width: float, height: float, cls: str, hint: str = "") -> Markup:
    return el("rect", *([el("title", hint)] if hint else []), x=x, y=y, width=max(width, 0.0), height=height, class_=cls)


def dot(x: float, y: float, r: float, cls: str, hint: str) -> Markup:
    return el("circle", el("title", hint), cx=x, cy=y, r=r, class_=cls)


def shortened(words: str, room: float) -> str:
    """Fits `room` px; the middle goes, for targets differ at their ends.

    >>> shortened("llama-server/smollm2-135m/Q4_K_M", 100)
    'llama-s…m/Q4_K_M'
    """
    most = int(room / LETTER)
    if len(words) <= most:
        return words
    return words[: (most - 1) // 2] + "…" + words[len(words) - (most - 1) + (most - 1) // 2 :]


def label(y: float, words: str, room: float = GUTTER - 12) -> Markup:
    """The name of a row, left of the plot."""
    return text(0, y, shortened(words, room), "t", hint=words if len(words) * LETTER > room else "")


def picture(name: str, about: str, height: float, parts: Iterable[Markup]) -> Markup:
    """A whole picture with an accessible name."""
    return el(
        "svg", el("title", name), el("desc", about), *parts, xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH:g} {height:g}", role="img", aria_label=name,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Axis:
    """Maps values to px, linear from `low` or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float) -> Axis:
        """From 0, or by logarithm where the largest is more than twenty times the smallest."""
        finite = [v for v in values if math.isfinite(v)]
        high = max(finite, default=1.0) or 1.0
        low = min((v for v in finite if v > 0), default=high)
        if high / low > 20:
            return cls(low / 1.2, high * 1.1, start, end, True)
        return cls(0.0, high * 1.04, start, end)

    def at(self, value: float) -> float:
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + (self.end - self.start) * min(max(share, 0.0), 1.0)

    def ticks(self) -> list[float]:
        """
        >>> Axis(0, 470, 0, 500).ticks()
        [0.0, 100.0, 200.0, 300.0, 400.0]
        >>> Axis(8, 1300, 0, 500, log=True).ticks()
        [10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0]
        """
        if self.log:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            marks = [m * 10.0**e for e in exponents for m in (1, 2, 5)]
            marks = [m for m in marks if self.low <= m <= self.high]
            return marks if len(marks) <= 9 else [m for m in marks if math.log10(m) % 1 < 1e-9] or marks
        wide = (self.high - self.low) / 6
        base = 10.0 ** math.floor(math.log10(wide))
        step = next(m * base for m in (1, 2, 5, 10) if m * base >= wide)
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 10) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def horizontal(self, top: float, bottom: float, unit: str) -> list[Markup]:
        """Grid lines from `top` to `bottom`, numbers below, the unit at the end."""
        out = []
        for tick in self.ticks():
            x = self.at(tick)
            out.append(line(x, top, x, bottom, "grid"))
            if x < self.end - 34:  # room for the unit
                out.append(text(x, bottom + 14, f"{tick:g}", "n", "middle"))
        return [*out, text(self.end, bottom + 14, unit, "n", "end")]


def colour(index: int) -> str:
    """The classes of a target's colour."""
    return f"k{index % COLOURS}" + (f" d{index // COLOURS % 3}" if index >= COLOURS else "")


def legend(names: Sequence[str], top: float) -> tuple[list[Markup], float]:
    """Numbered swatches of all targets, two a row, and the y where they end."""
    out = []
    for i, name in enumerate(names):
        x, y = (i % 2) * (WIDTH / 2), top + (i // 2) * 18
        out.append(line(x, y - 4, x + 18, y - 4, f"l {colour(i)}"))
        out.append(text(x + 24, y, shortened(f"{i + 1}  {name}", WIDTH / 2 - 34), "t", hint=name))
    return out, top + math.ceil(len(names) / 2) * 18


class Spots:
    """Places for small numbers, none upon another."""

    def __init__(self) -> None:
        self._taken: list[tuple[float, float]] = []

    def free(self, x: float, y: float) -> tuple[float, float]:
        """The spot itself, or the next free one to its right, or below where the picture ends.

        >>> spots = Spots()
        >>> spots.free(10, 20), spots.free(12, 21)
        ((10, 20), (24, 20))
        """
        start = x
        while near := next((t for t in self._taken if abs(x - t[0]) < 13 and abs(y - t[1]) < 11), None):
            x, y = (near[0] + 14, near[1]) if near[0] + 14 < WIDTH - 8 else (start, near[1] + 12)
        self._taken.append((x, y))
        return x, y
