"""Source `file`: weights that already lie on this machine, a file or a folder.  They are used in place, never copied."""

from __future__ import annotations

import hashlib
import os
import stat

from ..errors import UsageError
from ..spec import Artifact
from .gguf import purpose

# What a folder of weights has in it: safetensors as on the Hugging Face hub, MLC, OpenVINO.
_MARKS = ("config.json", "mlc-chat-config.json", "openvino_model.xml")
_SUFFIXES = (".gguf", ".llamafile")


def looks_like_path(model: str) -> bool:
    """Whether somebody who wrote this meant a file.

    >>> [looks_like_path(m) for m in ("/m.gguf", "~/m.gguf", "./m", "m.GGUF", "dir/m", "llama3-8b", "pypi:a==1")]
    [True, True, True, True, True, False, False]
    """
    return model.startswith(("/", "~", ".")) or "/" in model or model.lower().endswith(_SUFFIXES)


def resolve(locator: str) -> Artifact:
    """The artifact for an absolute path (or one under `~`); looks at the status of the file or files and at first bytes.

    Raises UsageError: `unknown_model` if nothing is there, `bad_spec` for a relative path, `bad_model` for what
    cannot be a model.
    """
    path = os.path.normpath(os.path.expanduser(locator))
    if not os.path.isabs(path):
        raise UsageError(
            f"{locator!r} is a relative path, and the daemon does not know your working folder",
            code="bad_spec",
            hint=f"give the whole path, e.g. {os.path.join('/', 'home', 'me', os.path.basename(path))}",
        )
    try:
        real = os.path.realpath(path, strict=True)
        st = os.stat(real)
    except OSError as e:
        raise UsageError(f"no model file {path}: {e.strerror}", code="unknown_model", status=404, hint="check the path") from None
    if stat.S_ISDIR(st.st_mode):
        return _folder(path, real)
    if not stat.S_ISREG(st.st_mode):
        raise UsageError(f"{path} is not a regular file", code="bad_model", hint="name the .gguf file itself")
    if not os.access(real, os.R_OK):
        raise UsageError(f"{path} may not be read by you", code="bad_model", hint=f"chmod +r {path}")
    # The locator keeps the name as given: the parts of a split model find each other by it, and a link's target
    # (say, a blob of a cache) has another.  The key is about the bytes, so it uses the target.
    key = f"file:{real}:{st.st_dev}:{st.st_ino}:{st.st_size}:{st.st_mtime_ns}"
    return Artifact("file", path, key, size=st.st_size, mode=purpose(path, key))


def _folder(path: str, real: str) -> Artifact:
    """Its key is about the files that lie in it, by name, size and time."""
    try:
        found = sorted((entry.name, entry.stat()) for entry in os.scandir(real) if entry.is_file())
    except OSError as e:
        raise UsageError(f"{path} may not be read by you: {e.strerror}", code="bad_model") from None
    if not any(name in _MARKS for name, _ in found):
        raise UsageError(
            f"{path} is a folder without a model", code="bad_model",
            hint="name the .gguf file itself, or a folder with " + " or ".join(_MARKS),
        )  # fmt: skip
    text = "".join(f"{name}\0{st.st_size}\0{st.st_mtime_ns}\0" for name, st in found)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Artifact("file", path, f"folder:{real}:{digest}", size=sum(st.st_size for _, st in found))
