"""Finding the line of a log that says why an engine ended.  Used by the adapters of programs that are not llama.cpp."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .base import ADDRESS, BAD_FLAG, CRASHED, MISSING_LIBRARY, OUT_OF_MEMORY

# Servers in Python: uvicorn's and asyncio's words for a port in use, argparse's for a flag, the linker's and importer's.
PYTHON = (
    (ADDRESS, r"\[Errno 98\]|[Aa]ddress already in use|error while attempting to bind on address"),
    (BAD_FLAG, r"unrecognized arguments:|argument .+: (invalid|expected)|the following arguments are required"),
    (MISSING_LIBRARY, r"ModuleNotFoundError|ImportError|cannot open shared object file"),
    (OUT_OF_MEMORY, r"out of memory|OutOfMemoryError|MemoryError|Insufficient GPU memory"),
)
# What a log line begins with: time, level, place.
_PREFIX = re.compile(r"^(?:\[[^\]]*\]\s*)*(?:(?:INFO|WARNING|ERROR|CRITICAL)\b:?\s*)?(?:[\w/.-]+\.(?:py|cpp|hpp|cc):\d+:?\s*)?")
_SIGNALS = {
    -4: "illegal instruction: this build needs CPU features that this machine lacks",
    -6: "it aborted",
    -9: "it was killed, perhaps by the system for want of memory",
    -11: "it crashed (segmentation fault)",
}


def read(symptoms: Sequence[tuple[str, str]], exit_status: int | None, last_words: str) -> tuple[str, str]:
    """(kind, one line): the first line that fits the first symptom found; else the signal, an error, or the last line.

    >>> read(PYTHON, 2, "usage: serve\\nserve: error: unrecognized arguments: --bogus")
    ('bad_flag', 'serve: error: unrecognized arguments: --bogus')
    >>> read(PYTHON, -9, "loading")[0], read(PYTHON, 1, "")[1]
    ('crashed', 'it said nothing')
    """
    lines = [_PREFIX.sub("", line.strip()).strip() for line in last_words.splitlines()]
    lines = [line for line in lines if line]
    for kind, pattern in symptoms:
        for line in lines:
            if re.search(pattern, line):
                return kind, line
    if exit_status in _SIGNALS:
        return CRASHED, _SIGNALS[exit_status]
    # Of a Python traceback the last line is the error itself.
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    complaint = errors[-1] if errors else next((line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)), None)
    return CRASHED, complaint or (lines[-1] if lines else "it said nothing")
