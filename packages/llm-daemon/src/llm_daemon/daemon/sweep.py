"""What dead generations left behind: engines that escaped while daemon and keeper were killed together, boxes and folders.

Only the holder of LIFE calls this, before its first engine starts.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from . import cgroup
from .process import GEN_TAG, kill_tagged


def sweep(runtime: Path, own: str) -> int:
    """Ends the processes and removes the folders of every dead generation below `runtime`; returns how many it ended by tag.

    A generation whose folder is still locked lives (a ghost that serves its last leases) and is left alone.  One whose
    processes are still dying after a second keeps its folder, for the next sweep.
    """
    ended = 0
    for folder in runtime.glob("g-*"):
        nonce = folder.name.removeprefix("g-")
        if nonce == own or not _is_dead(folder):
            continue
        # An empty folder proves nothing: whoever cleared it may have been killed before an escaped child was.
        ended += kill_tagged(GEN_TAG, nonce)
        if not cgroup.sweep(folder):
            continue
        shutil.rmtree(folder, ignore_errors=True)
    for stale in runtime.glob("[sh].????????????????"):
        if stale.name[2:] != own:
            stale.unlink(missing_ok=True)
    return ended


def _is_dead(folder: Path) -> bool:
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
