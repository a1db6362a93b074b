"""The folder of fetched weights.

<root>/models/<id>/weights-file        `id` is `sha256-<hex>`, or made from the artifact's key where no hash is pinned
                                       or a link into the hub's cache; `...-0000N-of-0000N.gguf` for each part of a split model
<root>/models/<id>/weights-folder/     ... of links into the hub's cache, for a model that is a folder
<root>/models/<id>/model.json          written last: a model without it is not there
<root>/models/<id>/*.part, weights.tmp what a running or broken fetch leaves; never used as weights
<root>/locks/<id>                      flock of whoever fetches or removes; never unlinked, or two could hold it
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import Unavailable, UsageError
from ..spec import Artifact
from .sources import slug


@dataclass(frozen=True, slots=True)
class Stored:
    """One model in the store.  `size` and `disk` in bytes: of the weights, and of its whole folder with what it links to.

    `parts` files make the model; `file` is the first, `sha256` is the first one's.  Of a model that is a folder `file` is the
    folder, and `sha256` is made from its files' names and hashes.  `commit`: of the repository it came from.
    """

    id: str
    key: str
    source: str
    locator: str
    file: str
    size: int
    sha256: str
    quant: str | None
    license: str | None
    disk: int = 0
    parts: int = 1
    commit: str | None = None


class Store:
    """The models under `root`.  Holds no state: several processes may use one folder at once."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._models = self.root / "models"

    @staticmethod
    def id(artifact: Artifact) -> str:
        """The name of the artifact's folder."""
        return f"sha256-{artifact.sha256}" if artifact.sha256 else "key-" + hashlib.sha256(artifact.key.encode()).hexdigest()[:32]

    def folder(self, artifact: Artifact) -> Path:
        return self._models / self.id(artifact)

    def path(self, artifact: Artifact) -> Path | None:
        """The weights, if they are here and whole (by size; their hash was checked when they came)."""
        if artifact.source == "file":
            return path if (path := Path(artifact.locator)).exists() else None
        stored = self._read(self.folder(artifact))
        return self.folder(artifact) / stored.file if stored else None

    def about(self, artifact: Artifact) -> Stored | None:
        """What is known of a fetched model; None if it is not here whole."""
        return self._read(self.folder(artifact)) if artifact.source != "file" else None

    def place(self, artifact: Artifact) -> Path:
        """Where the weights are, or will be once they are fetched."""
        return (
            Path(artifact.locator)
            if artifact.source == "file"
            else self.folder(artifact) / _file_name(artifact, 1, artifact.source == "mlc")
        )

    def size(self, artifact: Artifact) -> int | None:
        """The bytes of all its weights, if they are here."""
        if artifact.source == "file":
            if (path := self.path(artifact)) is None:
                return None
            return sum(part.stat().st_size for part in _parts(path)) if path.is_file() else artifact.size
        stored = self._read(self.folder(artifact))
        return stored.size if stored else None

    def list(self) -> list[Stored]:
        """All whole models, by locator."""
        try:
            folders = [Path(entry) for entry in os.scandir(self._models) if entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            return []
        except OSError as e:
            raise UsageError(
                f"cannot read the model store {self._models}: {e.strerror}",
                code="cache_unwritable",
                hint="set LLM_DAEMON_CACHE_DIR to a folder of yours",
            ) from None
        return sorted((s for f in folders if (s := self._read(f))), key=lambda s: (s.locator, s.id))

    def disk_bytes(self) -> int:
        """What the store takes on disk, unfinished downloads included."""
        return _disk(self._models)

    def remove(self, which: Artifact | str) -> int:
        """Removes a model or its unfinished download and returns the bytes freed; 0 if there was none.

        `which` may be an artifact, or the id, key, hash or locator of a stored one.  An engine that has the file open keeps
        it until it ends.  Files in the hub's cache go too.  Raises Unavailable while it is being fetched.
        """
        if isinstance(which, str):
            ids = [s.id for s in self.list() if which in (s.id, s.key, s.sha256, s.locator)]
        else:
            ids = [self.id(which)] if which.source != "file" else []
        freed = 0
        for name in ids:
            folder = self._models / name
            if not folder.is_dir():
                continue
            with self._lock(name, None):
                freed += _disk(folder)
                (folder / "model.json").unlink(missing_ok=True)  # first: from here on it is not there
                _remove_linked(folder, {link.resolve() for link in _links(folder.parent) if folder not in link.parents})
                shutil.rmtree(folder)
        return freed

    @contextmanager
    def lock(self, artifact: Artifact, on_wait: Callable[[], None]) -> Iterator[None]:
        """Holds the artifact's lock; calls `on_wait` once before it waits for another holder."""
        with self._lock(self.id(artifact), on_wait):
            yield

    @contextmanager
    def _lock(self, name: str, on_wait: Callable[[], None] | None) -> Iterator[None]:
        locks = self.root / "locks"
        try:
            locks.mkdir(parents=True, exist_ok=True)
            fd = os.open(locks / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            if on_wait is not None:
                raise  # the worker knows more about the disk, and says it
            raise UsageError(
                f"cannot write to the model store {self.root}: {e.strerror}", code="cache_unwritable", status=507,
                hint="set LLM_DAEMON_CACHE_DIR to a folder that can be written",
            ) from None  # fmt: skip
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if on_wait is None:
                    raise Unavailable("this model is being fetched right now", hint="stop that first, or wait for it") from None
                on_wait()
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def commit(
        self, artifact: Artifact, temp: Path, size: int, sha256: str, more: Sequence[Path] = (), commit: str | None = None
    ) -> Path:
        """Makes the checked and synced file or folder of links `temp`, in the artifact's folder, the weights of `artifact`.

        `more` are the further parts of a split model, linked to where they lie; `size` (bytes) is of all, `sha256` of `temp`.
        `commit`: of its repository, for the record.
        """
        folder = self.folder(artifact)
        parts = 1 + len(more)
        name = _file_name(artifact, parts, temp.is_dir())
        stored = Stored(
            self.id(artifact), artifact.key, artifact.source, artifact.locator, name, size, sha256,
            artifact.quant, artifact.license, parts=parts, commit=commit,
        )  # fmt: skip
        for path, name in zip(more, _part_names(stored.file, parts)[1:], strict=True):
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(path)
        note = folder / "model.json.tmp"
        with open(note, "w", encoding="utf-8") as f:
            json.dump({k: v for k, v in asdict(stored).items() if k != "disk"}, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        if temp.is_dir():
            shutil.rmtree(folder / stored.file, ignore_errors=True)  # links that lead nowhere any more
        os.replace(temp, folder / stored.file)
        os.replace(note, folder / "model.json")
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        return folder / stored.file

    def _read(self, folder: Path) -> Stored | None:
        try:
            wire = json.loads((folder / "model.json").read_text("utf-8"))
            stored = Stored(**{**wire, "id": folder.name, "disk": _disk(folder)})
            files = [folder / name for name in _part_names(stored.file, stored.parts)]
            if files[0].is_dir():
                files = list(files[0].iterdir())
            whole = os.path.basename(stored.file) == stored.file and sum(f.stat().st_size for f in files) == stored.size
        except (OSError, ValueError, TypeError):
            return None
        return stored if whole else None


def _file_name(artifact: Artifact, parts: int, is_folder: bool) -> str:
    """Something to recognise in a log; from what we were asked for, never from what a server sent."""
    name = re.sub(r"^https?://|(-\d{5}-of-\d{5})?\.gguf$", "", artifact.locator, flags=re.IGNORECASE)
    name = "weights" if len(artifact.files) > 1 else slug(name)
    if is_folder:
        return name
    return f"{name}-00001-of-{parts:05}.gguf" if parts > 1 else f"{name}.gguf"


def _part_names(first: str, parts: int) -> list[str]:
    """The names by which an engine finds the parts of a split model.

    >>> _part_names("m-00001-of-00002.gguf", 2)
    ['m-00001-of-00002.gguf', 'm-00002-of-00002.gguf']
    """
    return [first] + [first.replace("-00001-of-", f"-{n:05}-of-") for n in range(2, parts + 1)]


def _parts(first: Path) -> list[Path]:
    """The files of a model of one's own, of which the first is named; those that are there."""
    found = re.fullmatch(r".+-00001-of-(\d{5})\.gguf", first.name)
    names = _part_names(first.name, int(found[1])) if found else [first.name]
    return [path for name in names if (path := first.with_name(name)).is_file()]


def _links(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_symlink()]


def _remove_linked(folder: Path, kept: set[Path]) -> None:
    """Removes what the links in `folder` lead to: an entry of the hub's cache is itself a link to the bytes beside it.

    `kept`: bytes that another model has too, as the same weights at another revision.
    """
    for link in _links(folder):
        if link.resolve() in kept:
            continue
        entry = link.readlink()
        blob = entry.parent / entry.readlink() if entry.is_symlink() else entry
        entry.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)


def _disk(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:  # stat, not lstat: weights may be links into the hub's cache
                total += os.stat(os.path.join(place, name)).st_blocks * 512
            except OSError:  # gone in between
                continue
    return total
