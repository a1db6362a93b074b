"""What a source is given to deliver weights: where to, how to report, what to do when the disk does not play along.

Runs in the worker process; imported by the daemon for its types only, so it imports nothing heavy.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LlmDaemonError, Unavailable, UsageError
from ..spec import Artifact

_INTERVAL = 0.1  # seconds between two progress reports of one phase
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # EFBIG: a limit on the size of files is a full disk by another name


def redact(text: str) -> str:
    """`text` without credentials and query strings of URLs.

    >>> redact("cannot reach https://me:s3cr@t@host/simple/?token=x (refused)")
    'cannot reach https://***@host/simple/ (refused)'
    """
    text = re.sub(r"(://)[^/\s'\"<>]*@", r"\1***@", text)
    return re.sub(r"(://[^\s?'\"<>]*)\?[^\s'\"<>)]*", r"\1", text)


class Reporter:
    """Sends progress, at most some ten reports a second; a new phase or message and the end of one always go out."""

    def __init__(self, emit: Callable[[dict[str, Any]], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._emit, self._clock = emit, clock
        self._last: tuple[str, str] = ("", "")
        self._next = 0.0

    def __call__(self, phase: str, done: int, total: int, message: str = "") -> None:
        """`done` of `total` bytes; a `total` of 0 means nobody knows it."""
        now = self._clock()
        if (phase, message) == self._last and now < self._next and done != total:
            return
        self._last, self._next = (phase, message), now + _INTERVAL
        self._emit({"phase": phase, "done": done, "total": total, "unit": "bytes", "message": redact(message)})


@dataclass
class Delivery:
    """One artifact on its way into `folder`, which is ours alone while we hold its lock.

    A source downloads into files of its own in `folder` (named `*.part`) and then gives the weights, piece by piece,
    to `write`.
    """

    artifact: Artifact
    folder: Path
    report: Reporter
    written: int = field(default=0, init=False)
    asked: int = field(default=0, init=False)  # bytes, by the latest `need`

    def __post_init__(self) -> None:
        self._hash = hashlib.sha256()
        self._sha256: str | None = None
        self.more: list[Path] = []
        self.commit: str | None = None
        self.target = self.folder / "weights.tmp"

    @property
    def sha256(self) -> str:
        """Of what has been written so far, or of the first file."""
        return self._sha256 or self._hash.hexdigest()

    def need(self, size: int, folder: Path | None = None) -> None:
        """Raises Unavailable (`disk_full`) unless `size` more bytes fit on the disk of `folder`, our own by default."""
        folder, self.asked = folder or self.folder, size
        free = shutil.disk_usage(folder).free
        if size > free:
            raise disk_full(folder, size, free)

    def take(self, part: Path, sha256: str) -> None:
        """Makes the whole, synced file `part` the weights."""
        os.replace(part, self.target)
        self.written, self._sha256 = self.target.stat().st_size, sha256

    def adopt(self, files: list[Path], sha256: str) -> None:
        """Makes files that lie elsewhere, and are checked, the weights: `target` is a link to the first, `more` the others.

        `sha256` is the first one's.
        """
        self.discard_target()
        self.target.symlink_to(files[0])
        self.more = files[1:]
        self.written = sum(file.stat().st_size for file in files)
        self._sha256 = sha256

    def adopt_folder(self, files: list[Path], sha256: str) -> None:
        """Makes a folder of links to `files`, which lie elsewhere and are checked, the weights; `sha256` stands for all."""
        self.discard_target()
        self.target.mkdir()
        for file in files:
            (self.target / file.name).symlink_to(file)
        self.written = sum(file.stat().st_size for file in files)
        self._sha256 = sha256

    def discard_target(self) -> None:
        """Removes weights that nobody took over."""
        if self.target.is_dir() and not self.target.is_symlink():
            shutil.rmtree(self.target)
        else:
            self.target.unlink(missing_ok=True)

    def write(self, chunks: Iterable[bytes], total: int) -> None:
        """Appends `chunks` to the weights, on the way to `total` bytes in all and never more."""
        with open(self.target, "ab" if self.written else "wb") as f:
            for chunk in chunks:
                self.written += len(chunk)
                if self.written > total:
                    raise bad_weights(f"{self.artifact.locator} unpacks to more than the {total:,} bytes it announces")
                f.write(chunk)
                self._hash.update(chunk)
                self.report("extract", self.written, total)
            f.flush()
            os.fsync(f.fileno())

    def discard_parts(self) -> None:
        """Removes what was downloaded: it is used up, or of no use."""
        for part in self.folder.glob("*.part"):
            with suppress(OSError):
                part.unlink()


def disk_full(folder: Path, needed: int, free: int) -> Unavailable:
    return Unavailable(
        f"the disk is full: {folder} needs {needed:,} bytes and has {free:,}",
        code="disk_full",
        status=507,
        hint="free some space (`llm-daemon models list` shows what can go), or set LLM_DAEMON_CACHE_DIR to another disk",
        needed=needed,
        free=free,
    )


def bad_weights(message: str) -> UsageError:
    return UsageError(message, code="bad_model", status=502, hint="what the source serves is not what was promised: take another")


def mismatch(what: str, wanted: str, got: str) -> UsageError:
    return UsageError(
        f"{what} has sha256 {got}, but {wanted} is pinned",
        code="hash_mismatch",
        status=502,
        hint="the source serves another file than the catalog means: check its entry, or index-url in pip's configuration",
    )


def storage_error(error: OSError, folder: Path, needed: int) -> LlmDaemonError:
    """What a failed write under `folder` means to the person who waits for `needed` more bytes."""
    if error.errno in _FULL:
        try:
            free = shutil.disk_usage(folder).free
        except OSError:
            free = 0
        return disk_full(folder, needed, free)
    return UsageError(
        f"cannot write to {folder}: {error.strerror or error}",
        code="cache_unwritable",
        status=507,
        hint="make the folder writable for you, or set LLM_DAEMON_CACHE_DIR to one that is",
    )
