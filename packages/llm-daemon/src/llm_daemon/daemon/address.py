"""Where an engine listens: a unix socket in its own folder, or a TCP port that is kept for it and proved to be its own.

An address is a text: the path of a unix socket, or `tcp://HOST:PORT`.  Unix sockets come first wherever an engine can do them
(ADR 4); what makes TCP as good is said in ADR 17.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TypeVar

TCP = "tcp://"
TRIES = 3  # starts of an engine whose port somebody else has

P = TypeVar("P", bound=asyncio.BaseProtocol)


def reserve() -> socket.socket:
    """A loopback port for one engine: bound and never listening, so that nobody can have it by chance.

    The kernel gives it to nobody who asks for any port, and refuses it to whoever sets no reuse option; the engine, which
    sets SO_REUSEADDR or SO_REUSEPORT, can bind and listen beside it, socket(7).  On Linux the whole of 127.0.0.0/8 is
    loopback, so the host is a random one: two engines do not even share an address.
    """
    a, b, c = os.urandom(3)
    hosts = ([f"127.{a}.{b}.{c % 254 + 1}"] if sys.platform == "linux" else []) + ["127.0.0.1"]
    sock = socket.socket()
    try:
        for option in (socket.SO_REUSEADDR, getattr(socket, "SO_REUSEPORT", None)):
            if option is not None:
                sock.setsockopt(socket.SOL_SOCKET, option, 1)
        for host in hosts:
            try:
                sock.bind((host, 0))
                break
            except OSError:  # a machine whose loopback is one address
                if host == hosts[-1]:
                    raise
    except BaseException:
        sock.close()
        raise
    return sock


def tcp(address: str) -> tuple[str, int] | None:
    """Host and port, or None for a unix socket.

    >>> tcp("tcp://127.8.9.10:4711"), tcp("g-1/engine.sock")
    (('127.8.9.10', 4711), None)
    """
    if not address.startswith(TCP):
        return None
    host, _, port = address.removeprefix(TCP).rpartition(":")
    return host, int(port)


async def connect(address: str, make: Callable[[], P]) -> tuple[asyncio.Transport, P]:
    """A connection, with the protocol that `make` makes.  Raises OSError."""
    loop = asyncio.get_running_loop()
    if (place := tcp(address)) is None:
        return await loop.create_unix_connection(make, address)
    return await loop.create_connection(make, *place)


async def connect_tcp(place: tuple[str, int]) -> socket.socket:
    """A connected socket that sends small pieces at once.  Raises OSError."""
    sock = socket.socket()
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(sock, place)
    except BaseException:
        sock.close()
        raise
    return sock


def listeners(host: str, port: int) -> dict[int, bool]:
    """Sockets that may get a connection to `host` and `port`: inode -> whether it listens on every interface.

    From /proc/net/tcp and tcp6, proc(5); empty where there is no /proc.
    """
    found: dict[int, bool] = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError), open(table) as f:
            next(f)
            for line in f:
                row = line.split()
                where, _, number = row[1].rpartition(":")
                if row[3] != "0A" or int(number, 16) != port:  # TCP_LISTEN
                    continue
                ip = _ip(where)
                if ip.is_unspecified or str(ip) == host:
                    found[int(row[9])] = ip.is_unspecified
    return found


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An address as these tables write it: 32-bit words of the machine's own byte order.

    >>> _ip(f"{struct.unpack('=I', bytes([127, 0, 0, 1]))[0]:08X}")
    IPv4Address('127.0.0.1')
    """
    words = [int(text[i : i + 8], 16) for i in range(0, len(text), 8)]
    raw = struct.pack(f"={len(words)}I", *words)
    if len(raw) == 4:
        return ipaddress.IPv4Address(raw)
    six = ipaddress.IPv6Address(raw)
    return six.ipv4_mapped or six


def tree(pid: int) -> Iterator[int]:
    """A process and all below it, as /proc shows them now."""
    todo = [pid]
    while todo:
        pid = todo.pop()
        yield pid
        with suppress(OSError):  # it ended
            for task in os.listdir(f"/proc/{pid}/task"):
                # Each by itself: a thread that ends must not hide the others' children.
                with suppress(OSError), open(f"/proc/{pid}/task/{task}/children") as f:
                    todo += map(int, f.read().split())


def holds(pid: int, inodes: set[int]) -> set[int]:
    """Which of these sockets are open files of a process of the tree below `pid`."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: set[int] = set()
    for one in tree(pid):
        with suppress(OSError):
            for fd in os.listdir(f"/proc/{one}/fd"):
                with suppress(OSError):
                    if (inode := wanted.get(os.readlink(f"/proc/{one}/fd/{fd}"))) is not None:
                        found.add(inode)
        if len(found) == len(inodes):
            break
    return found
