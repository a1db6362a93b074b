"""`export`: every trial as a line of CSV, for a spreadsheet or a data frame."""

from __future__ import annotations

import csv
import sys

import click

from llm_daemon.cli.words import subcommand

from .. import pick
from ..faces import CSV_HEAD, csv_rows
from ..results import load


@subcommand(
    "export",
    """
    llm-daemon bench export csv | head
    llm-daemon bench export csv results/monday
    """,
)
@click.argument("format_", metavar="FORMAT", type=click.Choice(["csv"]))
@click.argument("session", required=False)
def command(format_: str, session: str | None) -> None:
    """Print every trial as a line of CSV.

    One line for each checkpoint of each trial, warm-ups included and marked.
    """
    found = load(pick.folder(session))
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(CSV_HEAD)
    writer.writerows(csv_rows(found))
