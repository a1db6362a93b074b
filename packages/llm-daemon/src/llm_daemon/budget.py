"""How much memory all models together may take: the setting `memory_budget` in words, and what this machine has.

Only memory of the host is known here.  What a GPU has, and how much of a model an engine puts there, is not: where one is
seen, a model that does not fit is not refused before its load (daemon/memory.py).
"""

from __future__ import annotations

import os
import re

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
# Of NVIDIA's and AMD's drivers.  Integrated ones share the host's memory, and have other names.
GPUS = ("/dev/nvidiactl", "/dev/kfd")


def budget_bytes(text: str | int, total: int) -> int | None:
    """Bytes of `8GiB`, `6.5 GB`, `8000000000` or `50%` (of `total`); None for `none`: no bound.  ValueError for anything else.

    >>> budget_bytes("50%", 8000), budget_bytes("1.5GiB", 0), budget_bytes(5000, 0), budget_bytes("none", 0)
    (4000, 1610612736, 5000, None)
    """
    words = str(text).strip().upper()
    if words == "NONE":
        return None
    if (share := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", words)) and 0 < float(share[1]) <= 100:
        return int(total * float(share[1]) / 100)
    if (found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|[KMGT]I?)B?", words)) and (amount := float(found[1]) * UNITS[found[2]]) >= 1:
        return int(amount)
    raise ValueError(text)


def host_bytes() -> int:
    """Memory that processes of ours may use at all: what the machine has, or what the cgroups above us allow if that is less."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/self/cgroup") as own, open("/proc/self/mounts") as mounts:
            limits = [limit for path in limit_files(own.read(), mounts.read()) if (limit := _limit(path)) is not None]
    except OSError:  # no Linux
        limits = []
    return min([physical, *limits])


def limit_files(own: str, mounts: str) -> list[str]:
    """Where the memory limits of our cgroup and of those above it stand, by /proc/self/cgroup and mounts; cgroups(7).

    >>> limit_files("0::/user/x\\n", "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\\n")
    ['/sys/fs/cgroup/user/x/memory.max', '/sys/fs/cgroup/user/memory.max', '/sys/fs/cgroup/memory.max']
    >>> limit_files("4:memory:/a\\n0::/\\n", "cgroup /cg/memory cgroup rw,memory 0 0\\n")
    ['/cg/memory/a/memory.limit_in_bytes', '/cg/memory/memory.limit_in_bytes']
    """
    rows = [fields for line in mounts.splitlines() if len(fields := line.split()) > 3]
    found = []
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            roots, name = [row[1] for row in rows if row[2] == "cgroup2"], "memory.max"
        elif "memory" in controllers.split(","):
            roots = [row[1] for row in rows if row[2] == "cgroup" and "memory" in row[3].split(",")]
            name = "memory.limit_in_bytes"
        else:
            continue
        parts = [part for part in path.split("/") if part]
        if roots and ".." not in parts:
            found += ["/".join([roots[0], *parts[:n], name]) for n in range(len(parts), -1, -1)]
    return found


def _limit(path: str) -> int | None:
    try:
        with open(path) as f:
            return int(f.read())
    except (OSError, ValueError):  # there is none ("max"), or not for us
        return None


def has_gpu() -> bool:
    """Whether a GPU with memory of its own is here, as far as its driver tells."""
    return any(os.path.exists(path) for path in GPUS)
