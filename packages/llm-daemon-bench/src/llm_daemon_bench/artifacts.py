"""What a target's weights are: where the file lies, its hash and header, and which engine of llm-daemon takes it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_daemon import paths
from llm_daemon.client.sync import wish
from llm_daemon.config import Settings
from llm_daemon.engines.base import Adapter, Location
from llm_daemon.engines.registry import Registry
from llm_daemon.errors import LlmDaemonError, UsageError
from llm_daemon.models.catalog import Catalog
from llm_daemon.models.fetch import fetch_sync
from llm_daemon.models.gguf import header
from llm_daemon.spec import Spec, Wish

from .records import Artifact
from .suite import Target

BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Weights:
    """Of one target.  `path`: "" for an attached server.  `engine`: adapter, program and settings, for `engine = ...`."""

    path: str
    artifact: Artifact | None = None
    spec: Spec | None = None
    engine: tuple[Adapter, Location, Settings] | None = None

    @property
    def name(self) -> str:
        """What llm-daemon calls the weights, without options: a name of its catalog or a source, of a file its path."""
        return str(Wish(self.spec.wish.model, quant=self.spec.wish.quant)) if self.spec else ""


class Finder:
    """Finds weights once for a session, fetching what is not here yet.  `memory`: a file that keeps hashes between sessions."""

    def __init__(self, memory: Path, tell: Callable[[str], None]) -> None:
        self.memory, self.tell = memory, tell
        self._settings: Settings | None = None
        self._registry: Registry | None = None

    @property
    def settings(self) -> Settings:
        if self._settings is None:
            self._settings = Settings.load()
        return self._settings

    @property
    def registry(self) -> Registry:
        if self._registry is None:
            self._registry = Registry(self.settings.engines)
        return self._registry

    def find(self, target: Target) -> Weights:
        """Raises LlmDaemonError if there is no such file, model or engine."""
        if not target.artifact:
            return Weights("")
        server = target.server
        spec = Catalog.load(self.settings.catalog).resolve(Wish.of(**wish(target.artifact, **self._options(target))))
        path = str(fetch_sync(spec.artifact, Path(paths.cache_dir()), lambda info: None))
        engine = None
        if server.engine is not None:
            adapter, where = self.registry.choose(path, server.engine)
            if server.args and (reason := adapter.refuse(server.args)):
                raise UsageError(reason, code="bad_flag", hint="change args in the suite")
            engine = (adapter, where, self.settings)
        return Weights(path, self._describe(path), spec, engine)

    def _options(self, target: Target) -> dict[str, Any]:
        server = target.server
        if server.engine is None:
            return {}
        return {
            "engine": server.engine, "context": server.context, "parallel": server.slots, "gpu_layers": server.gpu_layers,
            "args": server.args,
        }  # fmt: skip

    def _describe(self, path: str) -> Artifact:
        if os.path.isdir(path):
            hashes = [(os.path.basename(file), self.sha256(file)) for file in files_of(path)]
            sha = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
            return Artifact(path=path, bytes=sum(os.stat(file).st_size for file in files_of(path)), sha256=sha)
        name = None
        try:
            name = header(path).quant
        except LlmDaemonError:
            pass  # not GGUF
        size = os.stat(path).st_size
        return Artifact(path=path, bytes=size, sha256=self.sha256(path), quant_name=name)

    def sha256(self, path: str) -> str:
        """Of a whole file; known files are not read again as long as size and time of change are the same."""
        st = os.stat(path)
        stamp = [st.st_size, st.st_mtime_ns]
        known = self._known()
        if (found := known.get(path)) and found[:2] == stamp:
            return str(found[2])
        self.tell(f"hashing {os.path.basename(path)}")
        digest = hashlib.sha256()
        with open(path, "rb") as f:
            while block := f.read(BLOCK):
                digest.update(block)
        known[path] = [*stamp, digest.hexdigest()]
        new = self.memory.with_suffix(f".{os.getpid()}")
        try:
            self.memory.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(json.dumps(known))
            new.replace(self.memory)
        except OSError:
            pass  # the next session hashes again
        return digest.hexdigest()

    def _known(self) -> dict[str, list[Any]]:
        try:
            found = json.loads(self.memory.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def files_of(path: str) -> list[str]:
    """The file, or those of a model that is a folder (of safetensors, say): what lies in it, by name, without its folders."""
    return sorted(entry.path for entry in os.scandir(path) if entry.is_file()) if os.path.isdir(path) else [path]


def drop_from_page_cache(path: str) -> None:
    """Asks the kernel to forget a model's pages, posix_fadvise(2); works without root for pages nobody has mapped."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files_of(path):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
