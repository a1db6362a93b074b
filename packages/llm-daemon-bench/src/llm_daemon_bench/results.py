"""What a session leaves behind: `session.json`, `trials.jsonl` and `streams.jsonl.gz` in one folder.

`trials.jsonl` is appended a whole trial at a time and synced to the disk, so a killed run loses the trial it was in and
nothing else.  A trial has one line for each part (turn of a conversation, stream of a load): it counts once all are there.
What stands in them is in `records`.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from .errors import MachineError, ResultsError
from .records import SCHEMA, Launch, Session, Stream, Trial

SESSION, TRIALS, STREAMS = "session.json", "trials.jsonl", "streams.jsonl.gz"

_line: msgspec.json.Decoder[Trial | Launch] = msgspec.json.Decoder(Trial | Launch)


@dataclass(frozen=True, slots=True)
class Results:
    """What was read: whole trials and launches in the order in which they ran, warm-ups included.

    `broken`: lines at the end that a kill left unfinished.
    """

    folder: Path
    session: Session
    trials: list[Trial] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    broken: int = 0

    def measured(self) -> list[Trial]:
        """Trials without warm-ups."""
        return [t for t in self.trials if not t.warmup]

    def damage(self) -> list[str]:
        """A line for each sign that `trials.jsonl` is not as a run left it."""
        path, held, was = self.folder / TRIALS, len({t.key for t in self.measured()}), self.session.held
        out = [] if held else [f"{path} holds no measured trial" if path.exists() else f"{path} is missing"]
        if was is not None and 0 < held < was:
            out.append(f"{path} holds {held} of the {was} trials that were measured: it was cut or changed")
        if self.broken:
            out.append(f"{path}: what follows its last whole trial cannot be read: a run was killed there, or the file was cut")
        return out

    def keys(self) -> set[str]:
        """Keys of whole trials and of launches: what a resumed run need not do again."""
        return {t.key for t in self.trials} | {x.key for x in self.launches}


def load(folder: str | Path) -> Results:
    """Reads a session's folder.  Raises ResultsError, which names file and line."""
    folder = Path(folder)
    try:
        session = msgspec.json.decode((folder / SESSION).read_bytes(), type=Session)
    except OSError as e:
        raise ResultsError(f"{folder} holds no results: {e.strerror}", hint="`llm-daemon bench list` shows what there is") from e
    except msgspec.MsgspecError as e:
        raise ResultsError(f"{folder / SESSION}: {e}", hint="written by another version, or broken") from e
    if session.schema > SCHEMA:
        raise ResultsError(f"{folder}: written by a newer version (schema {session.schema})", hint="upgrade llm-daemon-bench")
    records, _, broken = _whole(folder / TRIALS)
    return Results(
        folder, session, [r for r in records if isinstance(r, Trial)], [r for r in records if isinstance(r, Launch)], broken
    )


def _whole(path: Path) -> tuple[list[Trial | Launch], int, int]:
    """(records of whole trials, bytes up to the end of the last of them, lines after that)."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], 0, 0
    except OSError as e:
        raise ResultsError(f"cannot read {path}: {e.strerror}") from e
    out: list[Trial | Launch] = []
    group: list[Trial] = []
    end = at = 0
    lines = data.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        at += len(line)
        try:
            record = _line.decode(line)
        except msgspec.MsgspecError as e:
            if number == len(lines):
                break  # the write that a kill cut short
            raise ResultsError(f"{path} line {number}: {e}", hint="the file was changed by hand, or by another version") from e
        if not line.endswith(b"\n"):
            break
        if isinstance(record, Launch):
            out.append(record)
            end = at
            continue
        group = [*group, record] if group and group[0].key == record.key else [record]
        if len(group) == record.parts:
            out += group
            group, end = [], at
    return out, end, data[end:].count(b"\n") + (0 if data[end:].endswith(b"\n") or end == len(data) else 1)


def read_streams(folder: str | Path) -> Iterator[Stream]:
    """The raw replies; where a part was run twice because of a kill, the later one counts."""
    path = Path(folder) / STREAMS
    decoder = msgspec.json.Decoder(Stream)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    for _, raw in _members(data):
        for line in raw.splitlines():
            yield decoder.decode(line)


def _members(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(end, text) of each whole gzip member."""
    at = 0
    while at < len(data):
        unpack = zlib.decompressobj(wbits=31)  # 16 + 15: gzip's own header, RFC 1952
        try:
            text = unpack.decompress(data[at:])
        except zlib.error:
            return
        if not unpack.eof:
            return
        at = len(data) - len(unpack.unused_data)
        yield at, text


class Writer:
    """Appends to a session's folder.  One process and one thread at a time.

    Opening cuts off what a kill left unfinished.  Every call returns after the data is on the disk; raises
    MachineError (`disk_full` or `unwritable`) if it cannot be written, and then what was there before is still whole.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.done: set[str] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            records, end, _ = _whole(self.folder / TRIALS)
            self._trials = _open(self.folder / TRIALS, end)
            ends = [end for end, _ in _members(_read(self.folder / STREAMS))]
            self._streams = _open(self.folder / STREAMS, ends[-1] if ends else 0)
        except OSError as e:
            raise unwritable(self.folder, e) from e
        self.done = {record.key for record in records}

    def session(self, session: Session) -> None:
        """Writes `session.json` anew, all or nothing."""
        path, new = self.folder / SESSION, self.folder / (SESSION + ".new")
        try:
            with open(new, "wb") as f:
                f.write(msgspec.json.format(msgspec.json.encode(session), indent=1) + b"\n")
                f.flush()
                os.fsync(f.fileno())
            os.replace(new, path)
        except OSError as e:
            raise unwritable(path, e) from e

    def trial(self, parts: Sequence[Trial], streams: Sequence[Stream] = ()) -> None:
        """Appends a whole trial, its raw replies first: a trial that counts has them."""
        if streams:
            packed = gzip.compress(b"".join(msgspec.json.encode(s) + b"\n" for s in streams), mtime=0)
            self._append(self._streams, packed, STREAMS)
        self._append(self._trials, b"".join(msgspec.json.encode(p) + b"\n" for p in parts), TRIALS)
        self.done.update(p.key for p in parts)

    def launch(self, launch: Launch) -> None:
        self._append(self._trials, msgspec.json.encode(launch) + b"\n", TRIALS)
        self.done.add(launch.key)

    def _append(self, fd: int, data: bytes, name: str) -> None:
        start = os.lseek(fd, 0, os.SEEK_END)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        except OSError as e:
            try:
                os.ftruncate(fd, start)
            except OSError:
                pass  # the next one who opens it cuts it off
            raise unwritable(self.folder / name, e) from e

    def close(self) -> None:
        for fd in (self._trials, self._streams):
            os.close(fd)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _open(path: Path, size: int) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    os.ftruncate(fd, size)
    return fd


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def unwritable(path: Path, error: OSError, move: str = "choose another folder with --out") -> MachineError:
    """The error to raise for results that cannot be written; `move`: what to try, unless the disk is full."""
    import errno

    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return MachineError(
        f"cannot write {path}: {error.strerror}",
        code="disk_full" if full else "unwritable",
        hint="make room and resume: what was measured is kept" if full else move,
    )
