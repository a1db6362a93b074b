"""Downloads one file over HTTP: resumed, hashed, limited, and only from where it may come.  Worker process only.

What a server says is not believed: where it sends us on to is checked against the address that is really connected to (a
name that means another address a moment later gains nothing), and how much it may send is known before it sends anything.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import re
import socket
import ssl
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast
from urllib.parse import unquote, urljoin, urlsplit

import httpcore2

from ..errors import LlmDaemonError, Unavailable, UsageError
from .delivery import bad_weights, redact
from .url import is_loopback

_CHUNK = 2**20
MAX_BYTES = 2**40  # of one file; the largest published parts have some 50 GB
MAX_REDIRECTS = 5
_TIMEOUT = {"connect": 15.0, "read": 60.0, "write": 60.0, "pool": 15.0}  # seconds, each for one step


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file to download to `part`, and what is known of it: `size` in bytes, `sha256`.

    `headers` go to the host of `url` and to no other.  `fixed` says that `url` means the same bytes for ever, so that a
    broken download may be resumed without asking; `configured`, that the user has set this host up for the purpose: it
    may use plain http and redirect within itself, wherever it is.  `magic`: what the file must begin with.
    """

    url: str
    part: Path
    size: int | None = None
    sha256: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    fixed: bool = False
    configured: bool = False
    magic: bytes = b"GGUF"

    @property
    def note(self) -> Path:
        """Where the version of what is in `part` is noted; `*.part` too, so that it goes with it."""
        return self.part.with_name("etag-" + self.part.name)


class Refused(Exception):
    """The server answered with this status, and no file."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status


class _Changed(Exception):
    """What is in `part` is not the beginning of what the server has."""


def failed(url: str, why: str) -> Unavailable:
    return Unavailable(
        f"downloading {redact(url)} failed: {why}",
        code="download_failed",
        hint="check the network, then try again: a download resumes where it stopped",
    )


def download(wanted: Wanted, progress: Callable[[int, int], None], need: Callable[[int], None]) -> str:
    """Fills `wanted.part` and returns its sha256; goes on where an earlier try stopped.

    A cut connection is taken up again at once, as long as each try brings something.  `progress` gets bytes done and in
    all; `need` gets the bytes still to come, before the first of them, and raises if there is no room.  Raises `Refused`,
    Unavailable (`download_failed`, which keeps `part`) and UsageError (`bad_model`, `hash_mismatch`, `bad_spec`).
    """
    fresh = False  # whether all of `part` came from one beginning in this call
    while True:
        offset = _offset(wanted)
        fresh = fresh or offset == 0
        try:
            got = _transfer(wanted, offset, progress, need)
            if wanted.sha256 and got != wanted.sha256:
                raise _Changed
            return got
        except _Changed:
            forget(wanted)
            if fresh and wanted.sha256:
                raise _mismatch(wanted) from None
            if fresh:
                raise failed(wanted.url, "the server takes back what it sent") from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException, httpcore2.ProxyError) as e:
            if _offset(wanted) > offset:
                continue
            raise failed(wanted.url, str(e) or type(e).__name__) from e
        except UsageError as e:
            if e.code == "bad_model":
                forget(wanted)
            raise


def forget(wanted: Wanted) -> None:
    """Removes what was downloaded."""
    wanted.part.unlink(missing_ok=True)
    wanted.note.unlink(missing_ok=True)


def _mismatch(wanted: Wanted) -> UsageError:
    return UsageError(
        f"{redact(wanted.url)} is not the file with sha256 {wanted.sha256}",
        code="hash_mismatch", status=502, hint="the file was replaced or damaged where it lies: take another source",
    )  # fmt: skip


def _offset(wanted: Wanted) -> int:
    """Where to go on: the size of `part`, or 0 where nobody could tell that its beginning still fits."""
    if not wanted.part.exists() or not (wanted.fixed or wanted.sha256 or _noted(wanted)):
        return 0
    return wanted.part.stat().st_size


def _noted(wanted: Wanted) -> str | None:
    try:
        url, etag = json.loads(wanted.note.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return str(etag) if url == wanted.url else None


def _transfer(wanted: Wanted, offset: int, progress: Callable[[int, int], None], need: Callable[[int], None]) -> str:
    """One request; the hash of the whole file."""
    # Ranges count the bytes as they lie on the server.  If-Range: a changed file comes whole (RFC 9110 section 13.1.5).
    asked = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
    if offset and not wanted.fixed and (etag := _noted(wanted)):
        asked["If-Range"] = etag
    with _response(wanted, asked) as r:
        told = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in r.headers}
        if r.status == 416:  # nothing from `offset` on: it may be the end, or another, shorter file
            return _already_whole(wanted, offset, told)
        if r.status not in (200, 206):
            raise Refused(r.status)
        start, total = _span(wanted, r.status, told, offset)
        if wanted.size is not None and total != wanted.size:
            raise bad_weights(f"{redact(wanted.url)} has {total:,} bytes, not {wanted.size:,}")
        if total > MAX_BYTES:
            raise bad_weights(f"{redact(wanted.url)} has {total:,} bytes: more than any model, refused")
        need(total - start)
        return _receive(wanted, start, total, told.get("etag", ""), cast(Iterable[bytes], r.stream), progress)


def _already_whole(wanted: Wanted, offset: int, told: Mapping[str, str]) -> str:
    whole = re.fullmatch(r"bytes \*/(\d+)", told.get("content-range", ""))
    if not offset or (wanted.sha256 is None and not (whole and int(whole[1]) == offset)):
        raise _Changed
    return sha256_of(wanted.part)


def _span(wanted: Wanted, status: int, told: Mapping[str, str], offset: int) -> tuple[int, int]:
    """(position of the body's first byte, size of the whole file).  RFC 9110 section 14.4."""
    if status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", told.get("content-range", ""))
        if match and int(match[1]) == offset:
            return offset, int(match[2])
        raise failed(wanted.url, "the server answers another range than was asked for")
    length = told.get("content-length", "")
    if not length.isdecimal():
        raise bad_weights(f"the server of {redact(wanted.url)} does not say how large the file is")
    return 0, int(length)


def _receive(
    wanted: Wanted, start: int, total: int, etag: str, body: Iterable[bytes], progress: Callable[[int, int], None]
) -> str:
    chunks = iter(body)
    head = b"" if start else _head(chunks, len(wanted.magic))
    if not start and not head.startswith(wanted.magic):
        raise bad_weights(f"{redact(wanted.url)} is not a GGUF file: it begins with {head[:16]!r}")
    digest = hashlib.sha256()
    if start:
        for chunk in read(wanted.part):
            digest.update(chunk)
    done = start
    with open(wanted.part, "ab" if start else "wb") as f:
        if not start and not wanted.fixed:  # a strong validator only; before the bytes, so that no part is without its version
            note = json.dumps([wanted.url, etag]) if etag and not etag.startswith("W/") else ""
            wanted.note.write_text(note, "utf-8")
        for chunk in _with(head, chunks):
            done += len(chunk)
            if done > total:
                raise bad_weights(f"the server of {redact(wanted.url)} sends more than the {total:,} bytes it announced")
            f.write(chunk)
            digest.update(chunk)
            progress(done, total)
        f.flush()
        os.fsync(f.fileno())
    if done < total:
        raise httpcore2.ReadError(f"the connection ended after {done:,} of {total:,} bytes")
    return digest.hexdigest()


def _head(chunks: Iterator[bytes], size: int) -> bytes:
    """The first bytes, `size` at least: enough to tell a GGUF file by."""
    head = b""
    while len(head) < size and (chunk := next(chunks, b"")):
        head += chunk
    return head


def _with(head: bytes, chunks: Iterator[bytes]) -> Iterator[bytes]:
    if head:
        yield head
    yield from chunks


def read(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as f:
        while chunk := f.read(_CHUNK):
            yield chunk


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    for chunk in read(path):
        digest.update(chunk)
    return digest.hexdigest()


# -- where to connect ---------------------------------------------------------------------------------------------------


def origin(url: str) -> tuple[str, str, int | None]:
    """(scheme, host, port) of a URL."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").rstrip("."), parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the open internet, also if it is one inside another.

    >>> [is_public(a) for a in ("1.1.1.1", "10.0.0.1", "169.254.169.254", "::1", "fe80::1%eth0", "::ffff:127.0.0.1")]
    [True, False, False, False, False, False]
    >>> [is_public(a) for a in ("64:ff9b::7f00:1", "2002:7f00:1::", "224.0.0.1", "100.64.0.1", "2606:4700::1111")]
    [False, False, False, False, True]
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64, RFC 6052
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


def _anything(address: str) -> bool:
    return True


def _rule(wanted: Wanted, url: str) -> Callable[[str], bool]:
    """Which addresses `url` may mean.  Raises UsageError for a URL that is not followed at all."""
    first, here = origin(wanted.url), origin(url)
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise refused(url, "it is neither https nor http")
    if wanted.configured and here == first:
        return _anything
    if parts.username or parts.password:
        raise refused(url, "it has credentials in it")
    if parts.scheme == "http":
        if not (is_loopback(here[1]) and is_loopback(first[1])):
            raise refused(url, "plain http is for this machine only")
        return is_loopback
    return _anything if url == wanted.url or is_loopback(first[1]) else is_public


def refused(url: str, why: str) -> UsageError:
    return UsageError(f"{redact(url)} is not followed: {why}", code="bad_spec", hint="give the https address of the file itself")


class _Guard(httpcore2.NetworkBackend):
    """Resolves a name once, and connects to what was checked."""

    def __init__(self, url: str, allowed: Callable[[str], bool]) -> None:
        self._url, self._allowed = url, allowed
        self._real = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as e:
            raise httpcore2.ConnectError(f"no address for {host}: {e}") from e
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        for address in addresses:
            if not self._allowed(address):
                raise refused(self._url, f"{host} is {address}, an address of this machine or a private network")
        problem: Exception = httpcore2.ConnectError(f"no address for {host}")
        for address in addresses:
            try:
                return self._real.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as e:
                problem = e
        raise problem


def _pool(url: str, allowed: Callable[[str], bool]) -> httpcore2.ConnectionPool:
    host = origin(url)[1]
    context = ssl.create_default_context()
    proxy = urllib.request.getproxies().get(urlsplit(url).scheme)
    if not proxy or is_loopback(host) or urllib.request.proxy_bypass(host):
        return httpcore2.ConnectionPool(ssl_context=context, network_backend=_Guard(url, allowed))
    # The proxy looks names up, on its side of the network; an address, in whatever spelling, is an address on ours too.
    if allowed is not _anything and re.search(r":|(^|\.)(\d+|0x[\da-f]*)$", host, re.IGNORECASE) and not _allows(allowed, host):
        raise refused(url, f"{host} is an address of a private network")
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    auth = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
    address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    return httpcore2.ConnectionPool(ssl_context=context, proxy=httpcore2.Proxy(address, auth))


def _allows(allowed: Callable[[str], bool], address: str) -> bool:
    try:
        return allowed(address)
    except ValueError:  # an odd spelling, which nobody needs
        return False


@contextmanager
def _response(wanted: Wanted, asked: Mapping[str, str]) -> Iterator[httpcore2.Response]:
    """The answer to a GET, after redirects."""
    url = wanted.url
    for _ in range(MAX_REDIRECTS + 1):
        allowed = _rule(wanted, url)
        own = wanted.headers if origin(url) == origin(wanted.url) else {}
        headers = [(k, v) for some in (asked, own) for k, v in some.items()]
        with _pool(url, allowed) as pool, pool.stream("GET", url, headers=headers, extensions={"timeout": _TIMEOUT}) as r:
            location = next((v.decode("latin-1") for k, v in r.headers if k.lower() == b"location"), "")
            if r.status not in (301, 302, 303, 307, 308) or not location:
                yield r
                return
        url = urljoin(url, location).partition("#")[0]
    raise failed(wanted.url, f"it redirects more than {MAX_REDIRECTS} times")


def explain(wanted: Wanted, error: Refused) -> LlmDaemonError:
    """What a refusal means to somebody who gave the address of a file."""
    url = redact(wanted.url)
    if error.status in (404, 410):
        return UsageError(f"there is no {url}", code="no_such_file", status=404, hint="check the address")
    if error.status in (401, 403, 407):
        hint = "download the file yourself and give its path; addresses with passwords or signatures are not taken"
        return UsageError(
            f"the server of {url} asks for a login (HTTP {error.status})", code="access_denied", status=403, hint=hint
        )
    return failed(wanted.url, f"HTTP {error.status}")
