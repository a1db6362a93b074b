"""Server applications that are Python packages: found, and asked for their version, without importing them here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from .base import Location, Missing

# A distribution's version without importing it: importing vllm takes 8 s.
_ASKS = """
import importlib.metadata, importlib.util, sys
if importlib.util.find_spec(sys.argv[1]) is None:
    sys.exit(1)
for name in sys.argv[2:]:
    try:
        print(importlib.metadata.version(name))
        break
    except importlib.metadata.PackageNotFoundError:
        pass
"""


def locate(config: Mapping[str, Any], script: str, module: str, dists: Sequence[str], install: str) -> Location | Missing:
    """The interpreter that has the package: of the configured `path` (an interpreter, or a script beside one), else of
    `script` on PATH, else our own.  `dists` are the names that the package is published under."""
    given = config.get("path")
    found = os.path.abspath(os.path.expanduser(str(given))) if given else shutil.which(script)
    if found is None:
        return _here(module, dists, install)
    python = found if os.path.basename(found).startswith("python") else os.path.join(os.path.dirname(found), "python")
    try:
        asked = subprocess.run(
            [python, "-I", "-c", _ASKS, module, *dists], stdin=subprocess.DEVNULL, capture_output=True, timeout=5, text=True
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        return Missing(f"{python} does not run: {e}", install)
    if asked.returncode:
        return Missing(f"{python} has no package {module}", install)
    return Location((python,), asked.stdout.strip() or "unknown", "config" if given else "PATH")


def _here(module: str, dists: Sequence[str], install: str) -> Location | Missing:
    if importlib.util.find_spec(module) is None:
        return Missing(f"the Python package {module} is not installed", install)
    version = "unknown"
    for name in dists:
        try:
            version = importlib.metadata.version(name)
            break
        except importlib.metadata.PackageNotFoundError:
            pass
    return Location((sys.executable,), version, f"package {module} {version}")


def accepts(path: str) -> str | None:
    """None for a folder of safetensors as the Hugging Face hub has them, else the reason."""
    if not os.path.isdir(path):
        return "not a folder with safetensors"
    names = os.listdir(path)
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        return "the folder has no config.json with safetensors"
    return None


def weights(path: str) -> int:
    """Bytes of the safetensors in a folder."""
    with os.scandir(path) as entries:
        return sum(entry.stat().st_size for entry in entries if entry.name.endswith(".safetensors"))


def refuse(args: Sequence[str], owned: Mapping[str, str], refused: Mapping[str, str]) -> str | None:
    """See base.Adapter.  `owned`: flag -> the option that does the same; `refused`: flag -> why it is not passed on.

    argparse takes the beginning of a flag for the flag, and vLLM's parser `_` for `-`.

    >>> refuse(["--ho", "0.0.0.0"], {}, {"--host": "the daemon owns its address"})
    '--ho is not passed on: the daemon owns its address'
    """
    for arg in args:
        flag = arg.partition("=")[0]
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        if not flag.startswith("-"):
            continue
        for name, option in owned.items():
            if flag == name or (len(flag) > 3 and name.startswith(flag)):
                return f"{flag} is set by the daemon: use {option}"
        for name, why in refused.items():
            if flag == name or (len(flag) > 3 and name.startswith(flag)):
                return f"{flag} is not passed on: {why}"
    return None
