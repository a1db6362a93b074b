"""The gateway for other machines: over TLS, with a key of the user's own, or not at all (architecture.md 6).

Loopback stays as it is beside it: local clients need neither certificate nor key.
"""

from __future__ import annotations

import os
import socket
import ssl

from ..config import Settings
from ..errors import Unavailable, UsageError

KEY_LENGTH = 24  # characters, at least: who may guess over a network may guess for long


def bind(settings: Settings) -> socket.socket:
    """The bound socket of `tls_host` and `tls_port`.  Raises UsageError for what is missing, Unavailable if the port is taken.

    Everything is looked at here, before the daemon says that it is up.
    """
    context(settings)
    key(settings)
    host, port = str(settings.tls_host), settings.tls_port
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(1024)
    except OSError as e:
        sock.close()
        raise Unavailable(
            f"port {port} on {host} cannot be used: {e.strerror}", code="port_taken",
            hint=f"choose another tls_port (it was set by {settings.origin('tls_port')})", port=port,
        ) from None  # fmt: skip
    return sock


def context(settings: Settings) -> ssl.SSLContext:
    """Raises UsageError (`bad_config`) if certificate or key cannot be used."""
    cert, private = _file(settings, "tls_cert"), _file(settings, "tls_key")
    for name, path in (("tls_cert", cert), ("tls_key", private)):  # OpenSSL does not tell which of the two it is
        try:
            with open(path, "rb") as f:
                mode = os.fstat(f.fileno()).st_mode
        except OSError as e:
            raise _bad(f"{name} {path} cannot be read: {e.strerror}", f"it was set by {settings.origin(name)}") from None
    if mode & 0o007:  # a group may share one, as Debian's ssl-cert does
        raise _bad(f"tls_key {private} can be read by everybody", f"chmod 600 {private}")
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.options |= ssl.OP_NO_RENEGOTIATION  # each costs us more than it costs a client; OpenSSL 3 does so by itself
    try:
        made.load_cert_chain(cert, private, password=lambda: "")  # never ask anybody: a daemon has no terminal
    except (OSError, ValueError) as e:
        raise _bad(
            f"tls_cert and tls_key cannot be used: {getattr(e, 'reason', None) or e}", "both must be PEM, without a password"
        ) from None
    return made


def key(settings: Settings) -> str:
    """The key that remote clients must show.  Raises UsageError (`bad_config`) if others can read it, or guess it."""
    path = _file(settings, "tls_token_file")
    try:
        mode = os.stat(path).st_mode
        with open(path) as f:
            text = f.read().strip()
    except (OSError, UnicodeDecodeError) as e:
        raise _bad(f"tls_token_file {path} cannot be read: {getattr(e, 'strerror', None) or e}") from None
    if mode & 0o077:
        raise _bad(f"tls_token_file {path} can be read by others", f"chmod 600 {path}")
    if len(text) < KEY_LENGTH or len(text.split()) != 1 or not text.isascii():
        raise _bad(
            f"tls_token_file {path} must hold one word of {KEY_LENGTH} ASCII characters or more", f"openssl rand -hex 32 > {path}"
        )
    return text


def _file(settings: Settings, name: str) -> str:
    if not (given := getattr(settings, name)):
        raise _bad(f"tls_host needs {name} too", "tls_cert and tls_key are PEM files, tls_token_file holds a key of your own")
    return os.path.abspath(os.path.expanduser(str(given)))


def _bad(what: str, hint: str = "") -> UsageError:
    return UsageError(what, code="bad_config", hint=hint)
