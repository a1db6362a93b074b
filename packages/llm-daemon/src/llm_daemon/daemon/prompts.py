"""What conversations left in an engine's slots, kept on disk from an unload until the next load of the very same thing.

<state>/prompts/<key>/slot-N.bin     as the engine wrote it; 0600 in folders of 0700, for it is what was said
<state>/prompts/<key>/index.json     written last: whose it is, size, hash and tokens of each file

The key is made of everything that decides what the bytes mean: the model's files, the engine's program and version, the
options.  Where one of them differs nothing is found.  What is restored is taken: its index goes before the engine sees
the files, so whatever a file does to an engine, it does it once.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

from .probe import post

if TYPE_CHECKING:
    from .process import EngineProcess

log = logging.getLogger("llm_daemon")
SAVE_WAIT, RESTORE_WAIT = 10.0, 10.0  # seconds that an unload, or a load, may take longer
LEAST_TOKENS = 64  # fewer are read again as fast as they are restored
FORMAT = 1


def identity(files: Iterable[str], program: str, about: Mapping[str, object]) -> str:
    """The key: a name for a folder.

    `files` are the model and what is loaded beside it, known by place, inode, size and time of change; `program` is the
    engine's executable; `about` is whatever else counts.
    """

    def stamp(path: str) -> list[object]:
        real = os.path.realpath(path)
        try:
            st = os.stat(real)
        except OSError:  # a bare name, found by PATH
            return [path]
        return [real, st.st_ino, st.st_size, st.st_mtime_ns]

    parts = {"format": FORMAT, "files": [stamp(f) for f in files], "program": stamp(program), "about": about}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class PromptCache:
    """The folder `root`, of at most `limit` bytes (0: nothing is kept).  Used on the loop's thread; the disk waits in others."""

    def __init__(self, root: str, limit: int) -> None:
        self.root, self.limit = root, limit
        self._busy: set[str] = set()  # folders that are being written or read
        self._given: set[str] = set()  # folders that engines of ours may write to, which must be there when they start

    def folder(self, key: str) -> str | None:
        """Where an engine may write what is known as `key`; None if nothing is to be kept, or nothing can be."""
        if not self.limit:
            return None
        path = os.path.join(self.root, key)
        try:
            os.makedirs(self.root, mode=0o700, exist_ok=True)
            os.makedirs(path, mode=0o700, exist_ok=True)
        except OSError as e:
            log.warning("conversations cannot be kept: %s", e)
            return None
        self._given.add(path)
        return path

    def holds(self, folder: str | None) -> bool:
        """Whether there is something to restore."""
        return folder is not None and os.path.exists(os.path.join(folder, "index.json"))

    async def save(self, process: EngineProcess, folder: str, slots: int, model: str) -> None:
        """Has an idle engine write its slots.  Never raises, takes SAVE_WAIT seconds at most."""
        began, found = monotonic(), dict[str, dict[str, Any]]()
        self._busy.add(folder)
        try:
            async with asyncio.timeout(SAVE_WAIT):
                os.makedirs(folder, mode=0o700, exist_ok=True)
                if not await asyncio.to_thread(self._has_room):
                    log.warning("%s: its conversations are not kept: the disk is nearly full", model)
                    return
                for slot in range(slots):
                    name = f"slot-{slot}.bin"
                    status, said = await post(process, f"/slots/{slot}?action=save", {"filename": name})
                    if status == 200 and said.get("n_saved", 0) >= LEAST_TOKENS:
                        found[name] = {"slot": slot, "tokens": said["n_saved"], "size": said.get("n_written")}
                kept = await asyncio.to_thread(self._commit, folder, found, model)
        except Exception as e:  # an engine may answer anything
            log.warning("%s: its conversations could not be kept: %s", model, str(e) or "it took too long")
            return
        finally:
            self._busy.discard(folder)
        if kept:
            tokens, size = (sum(about[what] for about in kept.values()) for what in ("tokens", "size"))
            log.info("%s: %d tokens of conversation kept in %.1f MB, %.2f s", model, tokens, size / 1e6, monotonic() - began)

    async def restore(self, process: EngineProcess, folder: str, model: str) -> int:
        """Has an engine that has just become ready read what was kept: so many tokens.  Never raises; RESTORE_WAIT at most."""
        began, tokens = monotonic(), 0
        self._busy.add(folder)
        try:
            async with asyncio.timeout(RESTORE_WAIT):
                for name, about in (await asyncio.to_thread(self._take, folder)).items():
                    status, said = await post(process, f"/slots/{about['slot']}?action=restore", {"filename": name})
                    if status == 200:
                        tokens += int(said.get("n_restored", 0))
                    else:
                        log.warning("%s: a kept conversation was refused (%d): %s", model, status, said.get("error"))
        except Exception as e:  # an engine may answer anything
            log.warning("%s: kept conversations could not be restored: %s", model, str(e) or "it took too long")
        finally:
            try:
                await asyncio.shield(asyncio.to_thread(_clear, folder))
            finally:
                self._busy.discard(folder)
        if tokens:
            log.info("%s: %d tokens of conversation restored, %.2f s", model, tokens, monotonic() - began)
        return tokens

    def trim(self) -> None:
        """Removes what was used longest ago until the rest is within the limit, and what nobody finished."""
        entries = []
        for name in os.listdir(self.root) if os.path.isdir(self.root) else ():
            path = os.path.join(self.root, name)
            index = os.path.join(path, "index.json")
            with suppress(OSError):  # one that goes at this moment
                size = sum(f.stat().st_size for f in os.scandir(path))
                if path not in self._busy and (size or path not in self._given):
                    entries.append((os.stat(index).st_mtime if os.path.exists(index) else 0.0, path, size))
        total = sum(size for _, _, size in entries)
        for used, path, size in sorted(entries):
            if total > self.limit or not used:
                shutil.rmtree(path, ignore_errors=True)
                total -= size

    # In threads -----------------------------------------------------------------------------------------------
    def _has_room(self) -> bool:
        return shutil.disk_usage(self.root).free > self.limit

    def _commit(self, folder: str, found: dict[str, dict[str, Any]], model: str) -> dict[str, dict[str, Any]]:
        """Checks and hashes what an engine wrote, and writes the index; then makes room."""
        for name in set(os.listdir(folder)) - set(found):
            os.unlink(os.path.join(folder, name))
        for name, about in found.items():
            path = os.path.join(folder, name)
            os.chmod(path, 0o600)
            if os.path.getsize(path) != about["size"]:
                raise ValueError(f"{name} was cut short")
            about["sha256"] = _sha256(path)
        if found:
            half = os.path.join(folder, f"index.{os.getpid()}")
            with open(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f:
                json.dump({"model": model, "files": found}, f)
            os.replace(half, os.path.join(folder, "index.json"))
        self._busy.discard(folder)
        self.trim()
        return found if os.path.exists(os.path.join(folder, "index.json")) else {}

    def _take(self, folder: str) -> dict[str, dict[str, Any]]:
        """The whole files in `folder`, out of the index from now on; none if anything is odd."""
        try:
            with open(os.path.join(folder, "index.json")) as f:
                files: dict[str, dict[str, Any]] = json.load(f)["files"]
            os.unlink(os.path.join(folder, "index.json"))
            for name, about in files.items():
                path = os.path.join(folder, os.path.basename(name))
                if os.path.getsize(path) != about["size"] or _sha256(path) != about["sha256"]:
                    raise ValueError(f"{name} is not as it was written")
                int(about["slot"])
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            log.warning("a kept conversation is broken, and left out: %s", e)
            return {}
        return files


def _sha256(path: str) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _clear(folder: str) -> None:
    with suppress(OSError):
        for name in os.listdir(folder):
            os.unlink(os.path.join(folder, name))
