"""Fetches from the Hugging Face hub.  Worker process only: imports the hub's own client.

That client knows the tokens, the endpoint, the offline mode and the layout of the cache, and is asked for them.  The bytes
are streamed by ourselves into its cache, because it begins anew after every interruption and says nothing of hashes.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

# Read when the client is imported.  Its second protocol (Xet) cannot resume, so no part of it is wanted.
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import httpx2
from filelock import Timeout
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]  # imported there, not listed

from ..errors import LlmDaemonError, Unavailable, UsageError
from . import download as http, snapshot
from .delivery import Delivery, bad_weights, redact, storage_error

_LOCKED = 0.1  # seconds to wait for a lock before we say that we wait
_TIMEOUT = 15.0  # seconds for an answer about a repository or a file


@dataclass(frozen=True, slots=True)
class _File:
    """A file to fetch.  `etag` names its bytes: the sha256 of a large file, git's hash of a small one; `size` in bytes."""

    name: str
    commit: str
    etag: str
    size: int

    @property
    def sha256(self) -> str | None:
        return self.etag if re.fullmatch(r"[0-9a-f]{64}", self.etag) else None

    def fits(self, path: Path) -> bool:
        """Whether the bytes at `path` are this file's."""
        if path.stat().st_size != self.size:
            return False
        if self.sha256:
            return http.sha256_of(path) == self.sha256
        if not re.fullmatch(r"[0-9a-f]{40}", self.etag):
            return True  # a server with etags of its own: the size is all there is
        digest = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        for chunk in http.read(path):
            digest.update(chunk)
        return digest.hexdigest() == self.etag


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is asked of the hub: `name` for people, and which of the files (`choose`, see hf.choose), at which revision (a
    branch, tag or commit) if not the latest."""

    name: str
    repo: str
    choose: Callable[[Mapping[str, int | None]], list[str]]
    revision: str | None

    @property
    def ref(self) -> str:
        """The file below `refs` in the cache that says which commit that is."""
        return self.revision or "main"


def deliver_from_hub(
    delivery: Delivery, repo: str, choose: Callable[[Mapping[str, int | None]], list[str]], revision: str | None = None
) -> None:
    """Downloads what is not in the cache yet, checks all of it, and gives it to `delivery`: a GGUF file, or else a folder."""
    name = f"{delivery.artifact.source}:{repo}" + (f"@{revision}" if revision else "")
    asked = _Asked(name, repo, choose, revision)
    cache = Path(constants.HF_HUB_CACHE)
    delivery.report("resolve", 0, 0, f"asking for {repo}")
    try:
        with _translated(asked):
            files, paths = _fetched(delivery, cache, asked)
        delivery.commit = files[0].commit
        if _is_gguf(files[0]):
            delivery.adopt(paths, files[0].sha256 or http.sha256_of(paths[0]))
        else:
            text = "".join(f"{f.name}\0{f.size}\0{f.etag}\0" for f in files)
            delivery.adopt_folder(paths, hashlib.sha256(text.encode()).hexdigest())
    except LlmDaemonError as e:
        raise _of_the_cache(e) from e.__cause__
    except OSError as e:
        raise _of_the_cache(storage_error(e, cache, delivery.asked)) from e


def _of_the_cache(error: LlmDaemonError) -> LlmDaemonError:
    """The error, with what helps where the disk is not the store's."""
    hints = {
        "disk_full": "free some space, or set HF_HOME to another disk",
        "cache_unwritable": "set HF_HOME to a folder of yours",
    }
    error.hint = hints.get(error.code, error.hint)
    return error


def _is_gguf(f: _File) -> bool:
    return f.name.lower().endswith(".gguf")


def _fetched(delivery: Delivery, cache: Path, asked: _Asked) -> tuple[list[_File], list[Path]]:
    """The files, and where they are in the cache."""
    repo = asked.repo
    online = _online(repo, asked.revision)
    if online is None:
        return _cached(delivery, cache, asked)
    commit, sizes = online
    files = [_ask(repo, commit, name) for name in asked.choose(sizes)]
    blobs = cache / _folder(repo) / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    total, before = sum(f.size for f in files), 0
    missing = [f for f in files if not (blobs / f.etag).exists()]
    delivery.need(sum(f.size - _have(blobs, f) for f in missing), blobs)
    for f in files:
        _get(delivery, repo, f, blobs, before, total)
        before += f.size
    # The bytes are there: this only makes the cache's own links to them.
    paths = [Path(hf_hub_download(repo, f.name, revision=f.commit, etag_timeout=_TIMEOUT)) for f in files]
    if asked.revision != commit:
        ref = cache / _folder(repo) / "refs" / asked.ref
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit, "utf-8")
    if lacking := _lacking(asked, paths):
        raise bad_weights(f"{asked.name} is not whole: it has no {lacking[0]}")
    return files, paths


def _lacking(asked: _Asked, paths: list[Path]) -> list[str]:
    try:
        return snapshot.lacking(paths)
    except ValueError as e:
        raise bad_weights(f"{asked.name}: {e}") from None


def _online(repo: str, revision: str | None) -> tuple[str, dict[str, int | None]] | None:
    """(commit, sizes in bytes by file name) of a repository as it is now, or at `revision`.

    None if the hub is not to be reached.
    """
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT)
    except (OfflineModeIsEnabled, httpx2.ConnectError, httpx2.TimeoutException):
        return None
    if not re.fullmatch(r"[0-9a-f]{40}", info.sha or ""):
        raise bad_weights(f"the hub does not say which version of {repo} it has")
    return str(info.sha), {s.rfilename: s.size for s in info.siblings or ()}


def _ask(repo: str, commit: str, name: str) -> _File:
    told = get_hf_file_metadata(hf_hub_url(repo, name, revision=commit), timeout=_TIMEOUT)
    # The etag becomes a file's name: nothing but letters and digits gets through.
    if told.size is None or not re.fullmatch(r"[A-Za-z0-9]{1,128}", told.etag or ""):
        raise bad_weights(f"the hub does not say what {name} in {repo} is")
    return _File(name, commit, str(told.etag), told.size)


def _have(blobs: Path, f: _File) -> int:
    part = blobs / f"{f.etag}.incomplete"
    return part.stat().st_size if part.exists() else 0


def _get(delivery: Delivery, repo: str, f: _File, blobs: Path, before: int, total: int) -> None:
    """Puts one file into the cache, under the lock that the hub's own client uses too."""
    blob = blobs / f.etag
    lock = blobs.parents[1] / ".locks" / blobs.parent.name / f"{f.etag}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(WeakFileLock(lock, timeout=_LOCKED))
        except Timeout:
            delivery.report("download", before, total, "another process is downloading it")
            held.enter_context(WeakFileLock(lock))
        if blob.exists():
            delivery.report("verify", before + f.size, total, f.name)
            if f.fits(blob):
                return
            blob.unlink()  # damaged; the links to it will mean the new one
        url = hf_hub_url(repo, f.name, revision=f.commit)
        wanted = http.Wanted(
            url, blobs / f"{f.etag}.incomplete", f.size, f.sha256, build_hf_headers(), fixed=True, configured=True,
            magic=b"GGUF" if _is_gguf(f) else b"",
        )  # fmt: skip
        unfinished = delivery.folder / f"{f.etag}.part"  # so that `models rm` finds it
        unfinished.unlink(missing_ok=True)
        unfinished.symlink_to(wanted.part)
        try:
            http.download(
                wanted,
                lambda done, _: delivery.report("download", before + done, total, f.name),
                lambda size: delivery.need(size, blobs),
            )
        except http.Refused as e:
            raise http.failed(url, f"HTTP {e.status}") from e
        if not (f.sha256 or f.fits(wanted.part)):
            http.forget(wanted)
            raise bad_weights(f"{f.name} of {repo} is not what the hub says it is")
        os.replace(wanted.part, blob)


def _cached(delivery: Delivery, cache: Path, asked: _Asked) -> tuple[list[_File], list[Path]]:
    """The files as an earlier download left them; nobody can be asked what is newest."""
    folder = cache / _folder(asked.repo)
    try:
        commit = (folder / "refs" / asked.ref).read_text("utf-8").strip()
    except OSError:
        commit = asked.revision or "none"  # nothing refers to a commit
    place = folder / "snapshots" / os.path.basename(commit)
    sizes: dict[str, int | None] = {
        path.relative_to(place).as_posix(): path.stat().st_size for path in place.rglob("*") if path.is_file()
    }
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{redact(constants.ENDPOINT)} is not to be reached"
    hint = "unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "check the network and HF_ENDPOINT, then try again"
    if not sizes:
        raise Unavailable(f"{why}, and {asked.name} is not in the cache {cache}", code="download_failed", hint=hint)
    try:
        names = asked.choose(sizes)
    except UsageError as e:
        e.message += f" in the cache ({why})"
        raise
    files = [_File(name, commit, _etag(place / name), (place / name).stat().st_size) for name in names]
    for f in files:
        delivery.report("verify", 0, f.size, f.name)
        if not f.fits(place / f.name):
            raise bad_weights(f"{f.name} of {asked.repo} is damaged in the cache {cache}")
    paths = [place / f.name for f in files]
    if lacking := _lacking(asked, paths):  # another program may have wanted some files only
        raise Unavailable(
            f"{why}, and {lacking[0]} of {asked.name} is not in the cache {cache}", code="download_failed", hint=hint
        )
    return files, paths


def _etag(entry: Path) -> str:
    """What the cache says a file's bytes are: the name of what the entry links to; empty where links are not to be had."""
    return entry.readlink().name if entry.is_symlink() else ""


def _folder(repo: str) -> str:
    return "models--" + repo.replace("/", "--")


@contextmanager
def _translated(asked: _Asked) -> Iterator[None]:
    """The hub client's errors as ours."""
    repo, page = asked.repo, redact(f"{constants.ENDPOINT}/{asked.repo}")
    login = "give your token: `hf auth login`, or HF_TOKEN for the daemon"
    try:
        yield
    except GatedRepoError as e:
        hint = f"accept the terms on {page}, then {login}"
        raise UsageError(
            f"{asked.name} is given only to people who accepted its terms", code="gated_repo", status=403, hint=hint
        ) from e
    except RevisionNotFoundError as e:
        hint = "check it, or leave it out; a quantization is named behind a colon"
        raise UsageError(
            f"{repo} has no branch, tag or commit {asked.revision}", code="no_such_repo", status=404, hint=hint
        ) from e
    except RepositoryNotFoundError as e:
        hint = f"check the name; if it is private, {login}"
        raise UsageError(f"the hub has no {repo}, or does not show it to you", code="no_such_repo", status=404, hint=hint) from e
    except HfHubHTTPError as e:
        status = e.response.status_code
        if status in (401, 403):
            raise UsageError(f"the hub refuses {asked.name} (HTTP {status})", code="access_denied", status=403, hint=login) from e
        raise http.failed(page, f"HTTP {status}") from e
    except httpx2.HTTPError as e:
        raise http.failed(page, str(e) or type(e).__name__) from e
    except FileMetadataError as e:
        raise http.failed(page, "what answers there is not a hub (HF_ENDPOINT, proxy?)") from e
    except (OfflineModeIsEnabled, FileNotFoundError) as e:
        if isinstance(e, FileNotFoundError) and e.errno is not None:
            raise
        raise http.failed(page, "the hub went away in between") from e
