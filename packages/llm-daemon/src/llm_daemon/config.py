"""Settings: file, then environment, then flags, into one frozen object that remembers where each value came from."""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from . import paths
from .budget import budget_bytes
from .errors import UsageError

DEFAULT_PORT = 28282
NAMES = "a name is not empty, has no ? or @ in it and no space around it, and is not like a file's"
# Variables that are not settings: folders, and what the daemon and its tests tell their own processes.
RESERVED = frozenset(
    "LLM_DAEMON_" + name for name in ("RUNTIME_DIR", "STATE_DIR", "CACHE_DIR", "CONFIG", "PYTHON", "GEN", "FAULTS")
)


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting there is.  Times in seconds.

    `ttl`: how long an idle model stays when nobody leases it; `leased_ttl`: while somebody does.
    `linger`: how long the daemon outlives its last reason to live.  `port`: None means 28282 or the next free one;
    a number means that one or an error.  `auth`: `token` or `none`.  `queue_limit`: requests that may wait for one
    model in each lane.  `max_overtake`: how long newer requests may go before one that waits; 0 is strictly oldest first.
    `memory_budget`: memory for all models together, `8GiB`, `50%` of what there is, or `none` for no bound (budget.py).
    `context`, `parallel`: what a model is loaded with when nobody says.  `history_limit`: requests that the
    history in the state folder keeps, 0 for no history; `history_prompts`: with their bodies, which hold what was asked.
    `prompt_cache_limit`: bytes on disk for what conversations leave in an engine until it is loaded again; 0 keeps nothing.
    `allow_origins`: web pages that may use the gateway.  `remote_media`: whether engines may fetch images that a request
    names by URL.  `tls_host`: address where other machines may use it, at `tls_port`, which needs the files `tls_cert`, `tls_key`
    (PEM) and `tls_token_file` (a key of your own).
    `catalog`: user entries and aliases.  `engines`: a table for each engine (`path`, `args`, `env`, `adapter`, `url`;
    with `command` it describes one: engines/command.py).
    """

    ttl: float = 120.0
    leased_ttl: float = 1800.0
    linger: float = 10.0
    port: int | None = None
    host: str = "127.0.0.1"
    auth: str = "token"
    queue_limit: int = 1000
    max_overtake: float = 10.0
    default_model: str = "smollm2-135m"
    default_engine: str | None = None
    context: int = 4096
    parallel: int = 2
    threads: int | None = None
    memory_budget: str = "75%"
    history_limit: int = 10_000
    history_prompts: bool = False
    prompt_cache_limit: int = 2_000_000_000
    allow_origins: tuple[str, ...] = ()
    remote_media: bool = False
    tls_host: str | None = None
    tls_port: int = 28443
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_token_file: str | None = None
    catalog: Mapping[str, Any] = field(default_factory=dict)
    engines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)

    @classmethod
    def load(
        cls, environ: Mapping[str, str] | None = None, file: str | None = None, flags: Mapping[str, Any] | None = None
    ) -> Settings:
        """Reads the file (missing is fine), the environment and the flags (None values are not given).

        Raises UsageError (`bad_config`) that names file and line, variable or flag.
        """
        environ = os.environ if environ is None else environ
        path = file or paths.config_file()
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for key, value, where in _from_file(path):
            values[key] = _checked(key, value, where)
            origins[key] = where
        for name, text in environ.items():
            if not name.startswith("LLM_DAEMON_") or name in RESERVED or not text:
                continue
            key, where = name.removeprefix("LLM_DAEMON_").lower(), f"environment variable {name}"
            if key not in _CHECKS:
                raise _unknown(key, where, list(_CHECKS))
            values[key] = _checked(key, text, where)
            origins[key] = where
        for key, value in (flags or {}).items():
            if value is not None:
                values[key] = _checked(key, value, f"flag --{key.replace('_', '-')}")
                origins[key] = "flag"
        return replace(cls(), **values, origins=origins)

    def origin(self, key: str) -> str:
        """Where the value of `key` came from: `default`, `FILE line N`, an environment variable, `flag`."""
        return self.origins.get(key, "default")


def _bad(what: str, where: str, hint: str = "") -> UsageError:
    # No command is named: each would stop here.
    hint = hint or "correct or remove it: every setting has a default"
    return UsageError(f"{where}: {what}", code="bad_config", hint=hint)


def _unknown(key: str, where: str, known: list[str]) -> UsageError:
    near = difflib.get_close_matches(key, known, 1)
    return _bad(
        f"unknown setting {key!r}", where, f"did you mean {near[0]!r}?" if near else "settings are " + ", ".join(sorted(known))
    )


def _seconds(value: Any) -> float:
    number = float(value)
    if isinstance(value, bool) or not 0 <= number <= 10**9:
        raise ValueError
    return number


def _number(least: int, most: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if isinstance(value, (bool, float)) or not least <= int(value) <= most:
            raise ValueError
        return int(value)

    return check


def _host(value: Any) -> str:
    if value == "localhost" or ipaddress.ip_address(value).is_loopback:
        return str(value)
    raise ValueError


def _auth(value: Any) -> str:
    if value not in ("token", "none"):
        raise ValueError
    return str(value)


def _flag(value: Any) -> bool:
    words = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    return value if isinstance(value, bool) else words[value.lower()]


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _origins(value: Any) -> tuple[str, ...]:
    given = [text.strip() for text in value.split(",")] if isinstance(value, str) else value
    found = tuple(str(text).lower() for text in given if text)
    if not all(re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s*]+", text) for text in found):
        raise ValueError
    return found


def _memory(value: Any) -> str:
    if isinstance(value, (bool, float)):
        raise ValueError
    budget_bytes(value, 10**9)
    return str(value)


def _address(value: Any) -> str:
    return str(ipaddress.ip_address(value))


_CHECKS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "ttl": (_seconds, "seconds, 0 or more"),
    "leased_ttl": (_seconds, "seconds, 0 or more"),
    "linger": (_seconds, "seconds, 0 or more"),
    "port": (_number(1, 65535), "a port from 1 to 65535"),
    "host": (_host, "a loopback address (for others there is tls_host, with TLS and a key of your own)"),
    "auth": (_auth, "'token' or 'none'"),
    "queue_limit": (_number(0, 1_000_000), "a whole number, 0 or more"),
    "max_overtake": (_seconds, "seconds, 0 or more"),
    "default_model": (_text, "a model name"),
    "default_engine": (_text, "an engine name"),
    "context": (_number(1, 2**31 - 1), "tokens, 1 or more"),
    "parallel": (_number(1, 1024), "a whole number from 1 to 1024"),
    "threads": (_number(1, 4096), "a whole number, 1 or more"),
    "memory_budget": (_memory, "an amount like '8GiB' or '50%', or 'none'"),
    "history_limit": (_number(0, 10_000_000), "a whole number, 0 or more"),
    "history_prompts": (_flag, "true or false"),
    "prompt_cache_limit": (_number(0, 2**62), "bytes, 0 or more"),
    "allow_origins": (_origins, "origins like https://app.example, in a list or separated by commas"),
    "remote_media": (_flag, "true or false"),
    "tls_host": (_address, "an IP address"),
    "tls_port": (_number(1, 65535), "a port from 1 to 65535"),
    "tls_cert": (_text, "a file's path"),
    "tls_key": (_text, "a file's path"),
    "tls_token_file": (_text, "a file's path"),
}
_TABLES = ("catalog", "engines")
_ENGINE_KEYS: dict[str, tuple[type, str]] = {
    "path": (str, "a text"),
    "args": (list, "a list of texts"),
    "env": (dict, "a table of texts"),
    "adapter": (str, "a text"),
    "url": (str, "a text"),
}


def _checked(key: str, value: Any, where: str) -> Any:
    if key in _TABLES:
        return value
    check, wanted = _CHECKS[key]
    try:
        return check(value)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise _bad(f"{key} must be {wanted}, not {value!r}", where) from None


def _from_file(path: str) -> list[tuple[str, Any, str]]:
    """(key, value, where) of each top-level entry of the file."""
    try:
        with open(path, "rb") as f:
            raw = f.read()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as e:
        raise _bad(f"cannot read it: {e.strerror}", path, "make it readable for you, or remove it") from e
    import tomllib

    try:
        text = raw.decode()
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise _bad(f"not valid TOML: {e}", path) from None
    known = [*_CHECKS, *_TABLES]
    out: list[tuple[str, Any, str]] = []
    for key, value in table.items():
        where = f"{path} line {_line(text, key)}"
        if key not in known:
            raise _unknown(key, where, known)
        if key in _TABLES and not isinstance(value, dict):
            raise _bad(f"{key} must be a table", where)
        if key == "engines":
            _check_engines(value, text, path)
        if key == "catalog":
            _check_names(value, text, path)
        out.append((key, value, where))
    return out


def _check_names(table: dict[str, Any], text: str, path: str) -> None:
    for name in table:
        if not askable(name):
            where = f"{path} line {_line(text, name, after='catalog')}"
            raise _bad(f"catalog: nobody can ask for a model called {name!r}", where, NAMES)


def askable(name: str) -> bool:
    """Whether a model can go by this name: a wish for it, with options or without, means just it.

    >>> [askable(name) for name in ("my model", "llama3:8b", "", " a", "a?", "a@b", "./a", "a.gguf")]
    [True, True, False, False, False, False, False, False]
    """
    from .client.wishes import is_path
    from .spec import Wish

    try:
        plain, more = Wish.parse(name), Wish.parse(f"{name}?context=1")
    except UsageError:
        return False
    return plain == Wish(name) and more == Wish(name, context=1) and not is_path(name)


def _check_engines(table: dict[str, Any], text: str, path: str) -> None:
    for name, options in table.items():
        where = f"{path} line {_line(text, name)}"
        if not isinstance(options, dict):
            raise _bad(f"engines.{name} must be a table", where)
        known: Mapping[str, tuple[type | tuple[type, ...], str]] = _ENGINE_KEYS
        if "command" in options:
            from .engines import command

            known = {**_ENGINE_KEYS, **command.KEYS}
        for key, value in options.items():
            where = f"{path} line {_line(text, key, after=name)}"
            if key not in known:
                raise _unknown(key, where, list(known))
            kind, wanted = known[key]
            inner = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
            fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            if not fits or not all(isinstance(v, str) for v in inner):
                raise _bad(f"engines.{name}.{key} must be {wanted}", where)
        if "command" in options and (wrong := command.check(options)):
            key, problem = wrong
            raise _bad(f"engines.{name}.{key}: {problem}", f"{path} line {_line(text, key, after=name)}")


def _line(text: str, key: str, after: str = "") -> int:
    """The line a key stands on (tomllib does not say): its first `key =` or `[...key`, past the line of `after`."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if after and after in line), 0)
    bare = re.fullmatch("[A-Za-z0-9_-]+", key)  # any other key stands in quotes
    name = rf"""(\[+.*\b)?["']?{key}["']?""" if bare else rf"""([\w\s\[.-]+\.\s*)?["']{re.escape(key)}["']"""
    pattern = re.compile(rf"^\s*{name}\s*([=.\]]|$)")
    for i in range(start, len(lines)):
        if pattern.search(lines[i]) or (i == start and after and key and key in lines[i]):
            return i + 1
    return start + 1


def effective(settings: Settings) -> dict[str, dict[str, Any]]:
    """{key: {"value": ..., "from": ...}} for `llm-daemon config`."""
    return {
        f.name: {"value": getattr(settings, f.name), "from": settings.origin(f.name)}
        for f in fields(settings)
        if f.name != "origins"
    }
