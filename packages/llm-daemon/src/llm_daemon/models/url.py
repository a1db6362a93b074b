"""Sources `https` and `http`: a `.gguf` at an address.  Plain http is for this machine only."""

from __future__ import annotations

import ipaddress
import os
import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from ..errors import UsageError
from ..spec import Artifact

if TYPE_CHECKING:
    from .delivery import Delivery

_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


def _bad(message: str, hint: str) -> UsageError:
    return UsageError(message, code="bad_spec", hint=hint)


def resolve(locator: str) -> Artifact:
    """The artifact for the whole address of a file, with `#sha256=HEX` at its end where somebody knows the hash.

    >>> resolve("HTTPS://Example.org/a/m.gguf#sha256=" + "0" * 64).key[:12]
    'sha256:00000'

    Raises UsageError (`bad_spec`); never repeats a password.
    """
    try:
        parts = urlsplit(locator.strip())
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        raise _bad("this is not an address of a file", "write https://HOST/PATH/FILE.gguf") from None
    if parts.username is not None or parts.password is not None:
        raise _bad(
            f"the address on {host} has credentials in it", "they would show in lists and logs: download the file yourself"
        )
    if parts.query:
        raise _bad(f"the address on {host} has a query (?...)", "it may hold a signature, which would show in logs: leave it out")
    if not host or not parts.path.lower().endswith(".gguf") or re.search(r"[\s\x00-\x1f]", parts.path):
        raise _bad(f"{locator[:200]!r} is not the address of a .gguf file", "write https://HOST/PATH/FILE.gguf")
    if _PART.search(parts.path):
        raise _bad(
            "this is one of several parts of a model", "download all of them into one folder and give the path of the first"
        )
    if parts.scheme == "http" and not is_loopback(host):
        raise _bad(f"plain http is for this machine only, not for {host}", f"write https://{host}{parts.path}")
    shown = f"[{host}]" if ":" in host else host
    url = urlunsplit((parts.scheme, shown + (f":{port}" if port else ""), parts.path, "", ""))
    sha256 = _pin(parts.fragment)
    return Artifact(parts.scheme, url, f"sha256:{sha256}" if sha256 else url, sha256=sha256)


def is_loopback(host: str) -> bool:
    """Whether a host, as written, can only be this machine.

    >>> [is_loopback(h) for h in ("localhost", "127.0.0.9", "::1", "127.0.0.1.example", "10.0.0.1")]
    [True, True, True, False, False]
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _pin(fragment: str) -> str | None:
    if not fragment:
        return None
    if not (match := re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)):
        raise _bad(f"#{fragment[:80]} is not a hash", "write #sha256= and 64 hexadecimal digits, or leave it out")
    return match[1].lower()


def deliver(delivery: Delivery) -> None:
    """Downloads the file."""
    from . import download as http  # brings the HTTP client: worker only

    artifact = delivery.artifact
    wanted = http.Wanted(artifact.locator, delivery.folder / "weights.part", artifact.size, artifact.sha256)
    delivery.report("resolve", 0, 0, "asking the server")
    name = os.path.basename(urlsplit(artifact.locator).path)
    try:
        got = http.download(wanted, lambda done, total: delivery.report("download", done, total, name), delivery.need)
    except http.Refused as e:
        raise http.explain(wanted, e) from e
    delivery.take(wanted.part, got)
