"""Who is on the other side: peer credentials of unix sockets, holders of TCP ports, facts about processes.

Pids are for messages only; nothing here is ever used to decide whom to signal.
"""

from __future__ import annotations

import os
import socket
import struct


def peer(sock: socket.socket) -> tuple[int, int]:
    """(pid, uid) of whoever called connect or listen on the other end; pid 0 where the system does not tell.

    Linux: SO_PEERCRED, unix(7).  macOS: LOCAL_PEERCRED, unix(4) (no pid).
    """
    if hasattr(socket, "SO_PEERCRED"):
        pid, uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return pid, uid
    # struct xucred of <sys/ucred.h>: version, uid, ngroups, 16 groups; SOL_LOCAL is 0, LOCAL_PEERCRED 1.
    raw = sock.getsockopt(0, 1, 76)
    return 0, struct.unpack_from("=2I", raw)[1]


def program(pid: int) -> str:
    """What a process was started as, shortened for people; empty if it is gone or not ours to see."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as f:
            words = f.read().split(b"\0")
    except OSError:
        return ""
    return b" ".join(w for w in words[:4] if w).decode(errors="replace")[:120]


def memory_bytes(pid: int) -> int | None:
    """Proportional share of memory (PSS) of one process, in bytes; None where the system does not tell."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as f:
            for line in f:
                if line.startswith("Pss:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def port_holder(port: int) -> str:
    """Names the process that listens on TCP `port` as well as we may see it, e.g. `python3 (pid 4711)`."""
    inodes, uid = set(), None
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            with open(table) as f:
                rows = [line.split() for line in f.readlines()[1:]]
        except OSError:
            continue
        for row in rows:
            if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port:  # 0A = TCP_LISTEN, proc(5)
                inodes.add(f"socket:[{row[9]}]")
                uid = int(row[7])
    if not inodes:
        return "another process"
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if any(os.readlink(f"/proc/{pid}/fd/{fd}") in inodes for fd in os.listdir(f"/proc/{pid}/fd")):
                with open(f"/proc/{pid}/comm") as f:
                    return f"{f.read().strip()} (pid {pid})"
        except OSError:
            continue
    return f"a process of user id {uid}"
