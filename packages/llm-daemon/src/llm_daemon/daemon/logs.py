"""Logs that never get in the way: size-bounded files, and the last words of a process in memory."""

from __future__ import annotations

import itertools
import os


class RotatingLog:
    """Appends bytes to `path`; past `max_bytes` it becomes `path.1`, `path.1` becomes `path.2`, ..., up to `keep`.

    Best effort: a full disk or a read-only folder never raises and never loses the process its log belongs to; what
    could not be written is counted in `dropped` (bytes) and the file is tried again with the next write.  Readers may
    follow by inode: rotation renames, it never truncates.  One writer, one thread.
    """

    def __init__(self, path: str, max_bytes: int = 5_000_000, keep: int = 3) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.keep = keep
        self.dropped = 0
        self._fd = -1
        self._size = 0

    def write(self, data: bytes) -> None:
        """Appends `data` whole to one file: a chunk is never split by a rotation."""
        view = memoryview(data)
        try:
            self._open(len(data))
            while view:
                n = os.write(self._fd, view)
                self._size += n
                view = view[n:]
        except OSError:
            self.dropped += len(view)
            self.close()  # perhaps the folder was deleted or the disk gets room: start afresh next time

    def close(self) -> None:
        """Closes the file; a later write opens it again."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def _open(self, coming: int) -> None:
        if self._fd >= 0 and self._size and self._size + coming > self.max_bytes:
            self.close()
            self._rotate()
        if self._fd < 0:
            os.makedirs(os.path.dirname(self.path) or ".", mode=0o700, exist_ok=True)
            self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._size = os.fstat(self._fd).st_size
            if self._size and self._size + coming > self.max_bytes:
                self._open(coming)

    def _rotate(self) -> None:
        names = [self.path, *(f"{self.path}.{i}" for i in range(1, self.keep + 1))]
        for old, new in reversed(list(itertools.pairwise(names))):
            if os.path.exists(old):
                os.replace(old, new)
        if self.keep == 0:
            os.unlink(self.path)


SHOWN = 8192  # bytes of an engine's last words that people are shown


class Tail:
    """The last `limit` bytes of what was fed, for error messages.

    >>> tail = Tail(limit=20)
    >>> tail.feed(b"loading\\nerror: no")
    >>> tail.feed(b" memory\\n")
    >>> tail.text()
    'error: no memory'
    >>> tail.text(limit=9)
    'o memory'
    """

    def __init__(self, limit: int = 4 * SHOWN) -> None:
        self.limit = limit
        self._data = bytearray()
        self._cut = False

    def feed(self, data: bytes) -> None:
        """Remembers `data`, forgets what is too old."""
        self._data += data
        if len(self._data) > self.limit:
            self._cut = True
            del self._data[: -self.limit]

    def text(self, limit: int = SHOWN) -> str:
        """Whole lines, of the last `limit` bytes: the first one is left out if it was cut (and is not the only one); bad UTF-8
        is replaced."""
        data = bytes(self._data[-limit:])
        if self._cut or len(data) < len(self._data):
            _, _, rest = data.partition(b"\n")
            data = rest or data
        return data.decode(errors="replace").strip("\n")
