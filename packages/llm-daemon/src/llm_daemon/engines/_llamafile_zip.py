"""What a llamafile is and what it carries: read from its first bytes and its zip directory, never by running it.

A llamafile is a program in Cosmopolitan's APE format (or a plain ELF made from one) with a zip archive behind it.  Weights
lie in that archive uncompressed, next to `.args`, one argument a line (docs/creating_llamafiles.md of llamafile).
"""

from __future__ import annotations

import itertools
import os
import zipfile
from dataclasses import dataclass

APE, ELF = b"MZqFpD", b"\x7fELF"
_MAX_ARGS = 65536  # bytes of .args; real ones have some hundred


@dataclass(frozen=True, slots=True)
class Contents:
    """`ape`: it needs /bin/sh to start.  `model`: the weights' name inside, None for a bare runtime.

    `model_bytes` are the sizes of all .gguf files inside, projector included.  `args` is what it adds to its command line.
    """

    ape: bool
    model: str | None
    model_bytes: int
    args: tuple[str, ...]


def is_program(path: str) -> bool:
    """Whether the file begins like a llamafile.  OSError if it cannot be read."""
    with open(path, "rb") as f:
        magic = f.read(len(APE))
    return magic == APE or magic.startswith(ELF)


def look(path: str) -> Contents | str:
    """Its contents, or one line that says why it is none."""
    try:
        with open(path, "rb") as f:
            magic = f.read(len(APE))
    except OSError as e:
        return f"cannot read it: {e.strerror}"
    if magic != APE and not magic.startswith(ELF):
        return "not a llamafile (it begins neither as APE nor as ELF)"
    try:
        with zipfile.ZipFile(path) as archive:
            weights = {i.filename: i.file_size for i in archive.infolist() if i.filename.lower().endswith(".gguf")}
            args = _args(archive)
    except (OSError, zipfile.BadZipFile, ValueError) as e:
        return f"a program without a readable zip archive in it ({e}): no llamafile, or not all of one"
    return Contents(magic == APE, _model(weights, args), sum(weights.values()), args)


def _args(archive: zipfile.ZipFile) -> tuple[str, ...]:
    try:
        info = archive.getinfo(".args")
    except KeyError:
        return ()
    if info.file_size > _MAX_ARGS:
        raise ValueError("its .args is larger than 64 KiB")
    return tuple(line for line in archive.read(info).decode("utf-8", "replace").splitlines() if line)


def _model(weights: dict[str, int], args: tuple[str, ...]) -> str | None:
    """The file that its own arguments name, else the largest."""
    for flag, value in itertools.pairwise(args):
        name = value.removeprefix("/zip/")
        if flag in ("-m", "--model") and name in weights:
            return name
    return max(weights, key=lambda name: weights[name], default=None)


def runnable(path: str) -> str | None:
    """None if it may be executed, else the reason: its header looks itself up as a command."""
    return None if os.access(path, os.X_OK) else f"it may not be executed: chmod +x {path}"
