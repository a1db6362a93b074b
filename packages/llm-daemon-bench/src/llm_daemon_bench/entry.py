"""What the script `llm-daemon-bench` calls; imports as little as the other's (llm_daemon/cli/entry.py)."""

from __future__ import annotations

import sys

from llm_daemon.cli.entry import main as front


def main() -> None:
    """Runs one verb and ends the process with its exit status."""
    front(["bench", *sys.argv[1:]])
