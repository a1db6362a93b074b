"""The parsers under atheris, guided by coverage: `python -m tests.fuzz.cover [libFuzzer's flags] [FOLDER]`.

Atheris is no dependency: it is used where it is installed, and exists for few platforms.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def seed(folder: Path) -> None:
    """Writes the seeds as files, the way libFuzzer wants them."""
    from . import parsers

    folder.mkdir(parents=True, exist_ok=True)
    for n, seeds in enumerate(parsers.SEEDS):
        for m, data in enumerate(seeds):
            (folder / f"seed-{n}-{m}").write_bytes(bytes([n]) + data[:4000])


def main() -> None:
    atheris: Any = __import__("atheris")
    with atheris.instrument_imports(include=["llm_daemon"]):
        from llm_daemon.core import assemble, control, openai, sse  # noqa: F401
        from llm_daemon.daemon import http1  # noqa: F401

        from . import parsers
    atheris.Setup(sys.argv, parsers.one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
