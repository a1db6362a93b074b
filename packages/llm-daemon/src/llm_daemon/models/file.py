"""Source `file`: weights that already lie on this machine.  They are used in place, never copied."""

from __future__ import annotations

import os
import stat

from ..errors import UsageError
from ..spec import Artifact
from .gguf import purpose

_SUFFIXES = (".gguf", ".llamafile")


def looks_like_path(model: str) -> bool:
    """Whether somebody who wrote this meant a file.

    >>> [looks_like_path(m) for m in ("/m.gguf", "~/m.gguf", "./m", "m.GGUF", "dir/m", "llama3-8b", "pypi:a==1")]
    [True, True, True, True, True, False, False]
    """
    return model.startswith(("/", "~", ".")) or "/" in model or model.lower().endswith(_SUFFIXES)


def resolve(locator: str) -> Artifact:
    """The artifact for an absolute path (or one under `~`); looks at the file's status, and at its first bytes.

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
    if not stat.S_ISREG(st.st_mode):
        what = "a folder" if stat.S_ISDIR(st.st_mode) else "not a regular file"
        raise UsageError(f"{path} is {what}", code="bad_model", hint="name the .gguf file itself")
    if not os.access(real, os.R_OK):
        raise UsageError(f"{path} may not be read by you", code="bad_model", hint=f"chmod +r {path}")
    # The locator keeps the name as given: the parts of a split model find each other by it, and a link's target
    # (say, a blob of a cache) has another.  The key is about the bytes, so it uses the target.
    key = f"file:{real}:{st.st_dev}:{st.st_ino}:{st.st_size}:{st.st_mtime_ns}"
    return Artifact("file", path, key, size=st.st_size, mode=purpose(path, key))
