"""A box for each engine where Linux lets us have one: a cgroup below our own, which the engine cannot leave unseen.

What escaped the process tree *and* scrubbed its environment is still in the box, and `cgroup.kill` (Linux 5.14, Control
Group v2 in the kernel's documentation) ends all of it at once.  The engine is born inside (keeper.py).  Whoever survives
empties and removes the box: keeper, else daemon, else the next daemon's sweep, which finds it by a note: a symbolic link
`g-NONCE/NAME.cgroup`, made before the box and removed after it.

Where there is no cgroup2, where it is read-only or not ours (most containers, some login sessions), we do without.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path

from .keeper import unbox

PREFIX, NOTE = "llmd-", ".cgroup"


@cache
def home() -> str | None:
    """The folder of our own cgroup; None where there is none.  Raises OSError, and may then be asked again."""
    if sys.platform != "linux":
        return None
    with open("/proc/self/cgroup", "rb") as own, open("/proc/self/mounts", "rb") as mounts:
        return find(os.fsdecode(own.read()), os.fsdecode(mounts.read()))


def find(own: str, mounts: str) -> str | None:
    """The folder that /proc/self/cgroup and /proc/self/mounts name, cgroups(7); one with `..` is outside of our namespace.

    >>> find("4:memory:/a\\n0::/user.slice/x.scope\\n", "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\\n")
    '/sys/fs/cgroup/unified/user.slice/x.scope'
    """
    path = next((line[3:] for line in own.splitlines() if line.startswith("0::/")), "/..")
    roots = [fields[1] for line in mounts.splitlines() if (fields := line.split())[2] == "cgroup2"]
    return roots[0] + path.rstrip("/") if roots and not path.startswith("/..") else None


def make(folder: str, generation: str) -> str | None:
    """A box for the engine that runs in `folder`, with its note beside that folder; None where we must do without."""
    try:
        here = home()
        if here is None or not os.access(here, os.W_OK):
            return None
        box = os.path.join(here, f"{PREFIX}{generation}-{os.path.basename(folder)}")
        os.symlink(box, folder + NOTE)
    except OSError:
        return None
    try:
        os.mkdir(box)
    except OSError:
        forget(folder)
        return None
    if os.access(box + "/cgroup.kill", os.W_OK):
        return box
    remove(box, folder)
    return None


def forget(folder: str) -> None:
    try:
        os.unlink(folder + NOTE)
    except OSError:
        pass  # the runtime folder was deleted


def remove(box: str, folder: str, within: float = 0.0) -> bool:
    """Ends all in the box that `make` made for `folder`, removes box and note.  False if some is left after `within` s."""
    if not unbox(box, within):
        return False
    forget(folder)
    return True


def sweep(generation_folder: Path) -> bool:
    """`remove` for each box of a dead generation, a second for each at most; False if one is still not empty."""
    mine = f"{PREFIX}{generation_folder.name.removeprefix('g-')}-"
    clean = True
    for note in generation_folder.glob("*" + NOTE):
        # Any process of our user may write there: only what is named like a box of that generation is one.
        if note.is_symlink() and os.path.basename(box := os.readlink(note)).startswith(mine):
            clean &= remove(box, str(note).removesuffix(NOTE), within=1.0)
    return clean
