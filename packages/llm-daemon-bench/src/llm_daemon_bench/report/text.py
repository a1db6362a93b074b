"""Tables for a terminal (coloured by rich, or plain) and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO

from llm_daemon.cli.words import clean

from .tables import Table, View, advice_lines, case_tables, environment, limited, summary

STYLES = {"bad": "red", "good": "green", "dim": "dim", "": ""}


def plain(table: Table) -> str:
    """Aligned columns without any escape sequence; a missed limit has a `!` behind it."""
    lines = [list(table.head), *([_plain(v.whole, v.mark) for v in row] for row in table.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.head))]
    body = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([clean(table.title), *body])


def _plain(text: str, mark: str) -> str:
    return clean(text) + (" !" if mark == "bad" else "")


def rich(table: Table, width: int | None = None) -> str:
    """With colours, for a terminal of `width` columns (None: the one at hand)."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    title = Text(clean(table.title), style="bold")  # as text: in a str rich takes [warm] for markup
    made = RichTable(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for i, name in enumerate(table.head):
        made.add_column(Text(clean(name)), justify="left" if i == 0 else "right", overflow="fold")
    for row in table.rows:
        made.add_row(*(Text(clean(v.whole), style=STYLES[v.mark]) for v in row))
    out = StringIO()
    console = Console(file=out, force_terminal=True, width=width, highlight=False)
    console.print(made)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def terminal(view: View, *, colour: bool, width: int | None = None) -> str:
    """The whole report: a table a case, the summary, the recommendation, and what makes figures doubtful."""
    tables = [*case_tables(view), summary(view)]
    blocks = [rich(t, width) if colour else plain(t) for t in tables]
    if view.advice:
        blocks.append("\n".join(clean(line) for line in advice_lines(view.advice)))
    if view.warnings:
        blocks.append("\n".join("warning: " + clean(line) for line in limited(view.warnings, 12)))
    blocks.append("Times in ms: median (95 % interval of it); 4/6: reached by four of six.")
    return "\n\n".join(blocks) + "\n"


def markdown(view: View) -> str:
    """To paste into an issue: the same tables and an environment block."""
    out = [f"# {_cell(view.results.session.suite)}: {_cell(view.results.session.id)}", ""]
    if view.advice:
        out += [*(f"- {_cell(line)}" for line in advice_lines(view.advice)), ""]
    for table in [summary(view), *case_tables(view)]:
        out += [f"## {_cell(table.title)}", "", *_rows(table), ""]
    out += ["Times in ms: median (95 % order-statistic interval); 4/6: reached by four of six. **!**: above the limit.", ""]
    if view.warnings:
        out += ["## Warnings", "", *(f"- {_cell(line)}" for line in view.warnings), ""]
    out += ["## Environment", "", *(f"- {_cell(name)}: {_code(value)}" for name, value in environment(view)), ""]
    return "\n".join(out)


def _rows(table: Table) -> Sequence[str]:
    head = "| " + " | ".join(_cell(name) for name in table.head) + " |"
    rule = "| " + " | ".join("---" if i == 0 else "---:" for i in range(len(table.head))) + " |"
    rows = ["| " + " | ".join(_cell(v.whole) + (" **!**" if v.mark == "bad" else "") for v in row) + " |" for row in table.rows]
    return [head, rule, *rows]


def _cell(text: str) -> str:
    r"""Text that Markdown takes as it is.

    >>> _cell("a|b <i>*c*")
    'a\\|b \\<i\\>\\*c\\*'
    """
    return "".join("\\" + c if c in "\\`*|<>[]" else c for c in clean(text))


def _code(text: str) -> str:
    text = clean(text)
    fence = "``" if "`" in text else "`"
    return f"{fence} {text} {fence}" if fence == "``" else f"{fence}{text}{fence}"
