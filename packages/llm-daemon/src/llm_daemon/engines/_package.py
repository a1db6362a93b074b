"""Finding an engine that is a Python package: in a Python of the user's, in this one, or behind a command on PATH.

The package is never imported here: some take ten seconds for that, and map a GPU's libraries.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Run by a foreign Python: is the module there, and what is the version of the first distribution that is?
_PROBE = """
import importlib.metadata as m, importlib.util as u, json, sys
def version(names):
    for name in names:
        try:
            return m.version(name)
        except m.PackageNotFoundError:
            pass
    return "unknown"
print(json.dumps(version(sys.argv[2:]) if u.find_spec(sys.argv[1]) else None))
"""


@dataclass(frozen=True, slots=True)
class Package:
    """`python` is the interpreter that has the module."""

    python: str
    version: str
    origin: str


def find(module: str, distributions: tuple[str, ...], config: Mapping[str, Any], table: str, command: str = "") -> Package | str:
    """The Python that has `module`, or one line that says why there is none.

    `config["python"]` alone if it is set; else this Python; else the one that `command` on PATH is written for.
    """
    if given := config.get("python"):
        path = os.path.abspath(os.path.expanduser(str(given)))
        if not (os.path.isfile(path) and os.access(path, os.X_OK)):
            return f"{path} is not an executable file: correct python in [engines.{table}]"
        version = ask(path, os.stat(path).st_mtime_ns, module, distributions)
        return Package(path, version, "config") if version else f"{path} has no module {module}"
    if importlib.util.find_spec(module):
        return Package(sys.executable, _version(distributions), f"package {module} of this Python")
    if python := _behind(command):
        version = ask(python, os.stat(python).st_mtime_ns, module, distributions)
        if version:
            return Package(python, version, f"PATH ({command})")
    return f"the Python package {module} is not installed"


def _version(distributions: tuple[str, ...]) -> str:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def _behind(command: str) -> str | None:
    """The interpreter in the first line of a console script on PATH."""
    path = shutil.which(command) if command else None
    if path is None:
        return None
    try:
        with open(path, "rb") as f:
            line = f.readline(4096)
    except OSError:
        return None
    python = line[2:].strip().decode(errors="replace") if line.startswith(b"#!") else ""
    return python if os.path.isabs(python) and os.access(python, os.X_OK) and "python" in os.path.basename(python) else None


@functools.lru_cache(maxsize=64)
def ask(python: str, mtime: int, module: str, distributions: tuple[str, ...]) -> str | None:
    """The version of a package as that Python sees it, None if it has none.  Remembered for each state of the file."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}  # as the engine will be run
    try:
        done = subprocess.run(
            [python, "-c", _PROBE, module, *distributions],
            env=env, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, timeout=5, text=True, check=False,
        )  # fmt: skip
        version = json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None
    return version if isinstance(version, str) else None
