"""Where things live.  The runtime folder is found with `os` alone, because every client asks for it."""

from __future__ import annotations

import os
import sys

from .errors import UsageError


def runtime_dir() -> str:
    """Absolute path of the runtime folder; it may not exist yet.

    `$LLM_DAEMON_RUNTIME_DIR`, else `/tmp/llm-daemon-<euid>` (macOS: the per-user temporary folder).  If that
    path exists and is not ours, `/run/user/<euid>/llm-daemon`.  XDG_RUNTIME_DIR is not read: it differs between
    terminal, cron, sudo and notebook servers, and two folders would mean two daemons.
    """
    if given := os.environ.get("LLM_DAEMON_RUNTIME_DIR"):
        if not os.path.isabs(given):  # else there would be one daemon for each working folder
            raise UsageError(f"LLM_DAEMON_RUNTIME_DIR must be an absolute path, not {given!r}", code="bad_config")
        return os.path.normpath(given)
    uid = os.geteuid()
    if sys.platform == "darwin":
        base = os.confstr(65537) or "/tmp"  # 65537 = _CS_DARWIN_USER_TEMP_DIR, <unistd.h>
        return os.path.join(base, f"llm-daemon-{uid}")
    path = f"/tmp/llm-daemon-{uid}"
    try:
        st = os.lstat(path)
    except OSError:
        return path
    return path if st.st_uid == uid else f"/run/user/{uid}/llm-daemon"


def state_dir() -> str:
    """Logs and request history: `$LLM_DAEMON_STATE_DIR`, else the platform's user state folder."""
    return _folder("LLM_DAEMON_STATE_DIR", "user_state_dir")


def cache_dir() -> str:
    """Downloaded models: `$LLM_DAEMON_CACHE_DIR`, else the platform's user cache folder."""
    return _folder("LLM_DAEMON_CACHE_DIR", "user_cache_dir")


def config_file() -> str:
    """`$LLM_DAEMON_CONFIG`, else `config.toml` in the platform's user config folder."""
    if given := os.environ.get("LLM_DAEMON_CONFIG"):
        return os.path.abspath(given)
    return os.path.join(_folder("", "user_config_dir"), "config.toml")


def _folder(variable: str, kind: str) -> str:
    if given := os.environ.get(variable):
        return os.path.abspath(given)
    import platformdirs

    found: str = getattr(platformdirs, kind)("llm-daemon", appauthor=False)
    # A user without a home: platformdirs then leaves the ~ as it is.
    return found if os.path.isabs(found) else os.path.join(runtime_dir(), kind)


def history_file() -> str:
    """The history of requests, a sqlite file in the state folder."""
    return os.path.join(state_dir(), "history.sqlite")


def hangups_file() -> str:
    """What `llm-daemon engines --measure` found, a small JSON file in the state folder."""
    return os.path.join(state_dir(), "hang-ups.json")


def memory_file() -> str:
    """What models needed of the memory when they ran, a small JSON file in the state folder."""
    return os.path.join(state_dir(), "memory.json")


def log_dirs() -> list[str]:
    """Where logs may be, best first: the state folder, and the runtime folder when the former cannot be written."""
    return [os.path.join(state_dir(), "logs"), os.path.join(runtime_dir(), "logs")]


def daemon_log(folder: str) -> str:
    """The daemon's own log in one of `log_dirs`."""
    return os.path.join(folder, "daemon.log")


def engine_log(folder: str, model: str) -> str:
    """The log of the engine that serves `model` (a public model id).

    >>> engine_log("/l", "smollm2-135m@Q4_1")
    '/l/engine-smollm2-135m_Q4_1.log'
    """
    slug = "".join(c if c.isalnum() or c in "-." else "_" for c in os.path.basename(model.partition("?")[0]))
    if "/" in model or "?" in model:  # two paths may end alike
        import hashlib

        slug += "-" + hashlib.sha256(model.encode()).hexdigest()[:8]
    return os.path.join(folder, f"engine-{slug}.log")
