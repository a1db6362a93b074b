"""Which chat template each model had when it was last seen: a program that comes with the weights, and may change with them."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .. import paths
from ..spec import Artifact
from .gguf import header
from .sources import named


@dataclass(frozen=True, slots=True)
class Seen:
    """A template as it was.  `text` is None where only its hash was looked at."""

    sha256: str
    text: str | None = None


class Templates:
    """What was seen, in `folder`, one small file for each model.  Losing it costs nothing but the comparison."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _file(self, model: str) -> Path:
        return self.folder / (hashlib.sha256(model.encode()).hexdigest()[:32] + ".json")

    def last(self, model: str) -> Seen | None:
        """What `model` (a source string) had when it was last seen; None if it never was."""
        with suppress(OSError, ValueError, TypeError, KeyError):
            wire = json.loads(self._file(model).read_text("utf-8"))
            return Seen(str(wire["sha256"]), wire["text"])
        return None

    def notice(self, model: str, sha256: str) -> bool:
        """Whether the template is another one than last time.  The first one seen is remembered."""
        if (last := self.last(model)) is None:
            self.remember(model, Seen(sha256))
        return last is not None and last.sha256 != sha256

    def remember(self, model: str, seen: Seen) -> None:
        """From now on this is what was seen last."""
        path = self._file(model)
        half = path.with_suffix(f".{os.getpid()}")
        with suppress(OSError):  # a disk that is full or read-only
            self.folder.mkdir(parents=True, exist_ok=True)
            half.write_text(json.dumps({"model": model, "sha256": seen.sha256, "text": seen.text}), "utf-8")
            half.replace(path)


def templates() -> Templates:
    """Those of the state folder."""
    return Templates(Path(paths.state_dir()) / "templates")


def described(artifact: Artifact, path: Path) -> dict[str, object]:
    """Of a model that is here: its licence, and whether its chat template is another one than last time.  Reads files."""
    if path.suffix != ".gguf":
        return {"license": artifact.license}
    found = header(path, stored=artifact.source != "file")
    sha256 = found.chat_template_sha256
    changed = sha256 is not None and templates().notice(named(artifact.source, artifact.locator), sha256)
    return {"license": artifact.license or found.license, "template_changed": changed}
