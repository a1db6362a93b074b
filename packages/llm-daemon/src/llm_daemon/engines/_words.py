"""What servers written in Python, and most others, say when they cannot start."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .base import ADDRESS, BAD_FLAG, BAD_MODEL, CRASHED, MISSING_LIBRARY, OUT_OF_MEMORY

_SYMPTOMS = (
    (ADDRESS, r"[Aa]ddress already in use|EADDRINUSE|[Ff]ailed to bind|couldn't bind|could not bind|cannot bind"),
    (MISSING_LIBRARY, r"ModuleNotFoundError|ImportError|cannot open shared object file|error while loading shared libraries"),
    (BAD_FLAG, r"unrecognized arguments|invalid choice|error: argument |[Nn]o such option|[Uu]nknown (flag|option|argument)"),
    (BAD_MODEL, r"error loading model|SafetensorError|corrupted or incomplete"),
    (OUT_OF_MEMORY, r"[Oo]ut of memory|OutOfMemoryError|MemoryError|std::bad_alloc|[Ii]nsufficient memory"),
    (BAD_MODEL, r"[Ff]ailed to load (the )?(model|GGUF)|No safetensors found"),
    (BAD_MODEL, r"[Ii]nvalid (magic|GGUF|model)|load_safetensors|does not appear to have a file named|[Uu]nsupported model"),
    (BAD_MODEL, r"FileNotFoundError: .*\.(safetensors|gguf|json|bin)|Model type .* not supported|incomplete metadata"),
)
_CAUSE = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception)\b:? ?")
SIGNALS = {  # exit status of a process that a signal ended -> what that means
    -4: "illegal instruction: this build needs CPU features that this machine lacks",
    -6: "it aborted",
    -9: "it was killed, perhaps by the system for want of memory",
    -11: "it crashed (segmentation fault)",
}


def diagnose(exit_status: int | None, last_words: str, own: Sequence[tuple[str, str]] = ()) -> tuple[str, str]:
    """See base.Adapter.  `own`: (kind, pattern) that only this engine says; they are looked for first.

    >>> diagnose(1, "Traceback (most recent call last):\\n  ...\\nOSError: [Errno 98] Address already in use")
    ('address_in_use', 'OSError: [Errno 98] Address already in use')
    >>> diagnose(1, "INFO loading\\nTraceback ...\\nValueError: no such thing\\nbye")
    ('crashed', 'ValueError: no such thing')
    """
    lines = [re.sub(r"\s{2,}", " ", line.strip()) for line in last_words.splitlines() if line.strip()]
    for kind, pattern in (*own, *_SYMPTOMS):
        for line in lines:
            if re.search(pattern, line):
                return kind, line
    if exit_status in SIGNALS:
        return CRASHED, SIGNALS[exit_status]
    causes = [line for line in lines if _CAUSE.match(line)]
    return CRASHED, causes[-1] if causes else lines[-1] if lines else "it said nothing"
