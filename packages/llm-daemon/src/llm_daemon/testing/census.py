"""What a world of tests holds at this moment, read from /proc and the cgroups: processes, zombies, boxes, fds, files.  Linux."""

from __future__ import annotations

import os
from collections.abc import Iterator, Set
from pathlib import Path

from ..daemon import cgroup
from ..daemon.boot import OURS
from ..daemon.keeper import stat_field
from ..daemon.process import GEN_TAG


def processes(runtime: Path, generations: Set[str]) -> dict[int, str]:
    """Daemons, keepers, engines and what they left, by tag, working folder or box: {pid: command}; no zombies."""
    here = f"LLM_DAEMON_RUNTIME_DIR={runtime}".encode()
    tags = {f"{GEN_TAG}={nonce}".encode() for nonce in generations}
    boxed = {pid for box in boxes(generations) for pid in _members(box)}
    found = {}
    for pid in _pids():
        try:
            environ = set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
            folder = os.readlink(f"/proc/{pid}/cwd").removesuffix(" (deleted)")
        except OSError:
            continue  # gone, a zombie, or not ours
        command = _command(pid)
        is_daemon = here in environ and "boot.py" in command
        if command and (
            is_daemon or environ & tags or pid in boxed or folder == str(runtime) or folder.startswith(f"{runtime}/g-")
        ):
            found[pid] = command
    return found


def boxes(generations: Set[str]) -> list[str]:
    """Cgroups of these generations' engines, below our own (a daemon is born into its first client's)."""
    here = cgroup.home()
    if here is None:
        return []
    return [
        os.path.join(here, name)
        for name in os.listdir(here)
        if any(name.startswith(f"{cgroup.PREFIX}{nonce}-") for nonce in generations)
    ]


def zombies() -> list[str]:
    """Ended children that this process has not waited for: `PID NAME`."""
    found = []
    for pid in _pids():
        try:
            head, _, tail = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
        except OSError:
            continue
        state, parent = tail.split()[:2]
        if state == "Z" and int(parent) == os.getpid():
            found.append(f"{pid} {head.partition('(')[2]}")
    return found


def leaked_fds(runtime: Path) -> list[str]:
    """Invariant S7: who but a daemon (or candidate) holds LIFE's folder, a daemon's listener, or a lifeline's write end."""
    try:
        life = _identity(os.stat(runtime))
    except OSError:
        life = (0, 0)
    precious = {life: "LIFE"} if life[1] else {}
    daemons = {pid for pid in _pids() if _is_daemon(pid, runtime)}
    listening = _listening()
    # A pipe that a daemon writes and no keeper, its child, reads is a candidate's for its verdict, or the loop's own.
    keepers = [pid for pid in _pids() if "/keeper." in _command(pid) and stat_field(pid, 4) in daemons]
    kept = {identity for pid in keepers for _, _, identity in _fds(pid)}
    for pid in daemons:
        for fd, link, identity in _fds(pid):
            if link.startswith("socket:") and identity[1] in listening:
                precious[identity] = "listener"
            elif link.startswith("pipe:") and identity in kept and _is_write_end(pid, fd):
                precious[identity] = "lifeline"
    return [
        f"{pid} {_command(pid)}: {precious[identity]}"
        for pid in _pids()
        if pid not in daemons
        for fd, _, identity in _fds(pid)
        if identity in precious and (precious[identity] != "lifeline" or _is_write_end(pid, fd))
    ]


def files(runtime: Path) -> list[str]:
    """Names in the runtime folder that should not stay when all has ended; one empty `g-*` may."""
    try:
        names = set(os.listdir(runtime)) - OURS
    except FileNotFoundError:
        return []
    empty = sorted(name for name in names if name.startswith("g-") and not os.listdir(runtime / name))
    return sorted(names - set(empty[:1]))


def _is_daemon(pid: int, runtime: Path) -> bool:
    try:
        return "boot.py" in _command(pid) and os.readlink(f"/proc/{pid}/cwd").removesuffix(" (deleted)") == str(runtime)
    except OSError:
        return False


def _listening() -> set[int]:
    """Inodes of listening sockets, proc_net(5): SO_ACCEPTCON in unix's flags, state 0A in TCP's."""
    found = set()
    for table in ("unix", "tcp", "tcp6"):
        try:
            rows = [line.split() for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
        except OSError:
            continue
        inode, sign = (6, "00010000") if table == "unix" else (9, "0A")
        found |= {int(row[inode]) for row in rows if row[3] == sign}
    return found


def _fds(pid: int) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """(number, link, (device, inode)) of each open file of a process."""
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return
    for fd in names:
        try:
            path = f"/proc/{pid}/fd/{fd}"
            yield fd, os.readlink(path), _identity(os.stat(path))
        except OSError:
            continue


def _identity(st: os.stat_result) -> tuple[int, int]:
    return st.st_dev, st.st_ino


def _is_write_end(pid: int, fd: str) -> bool:
    try:
        text = Path(f"/proc/{pid}/fdinfo/{fd}").read_text()
    except OSError:
        return False
    return int(text.partition("flags:")[2].split()[0], 8) & os.O_ACCMODE == os.O_WRONLY


def _members(box: str) -> list[int]:
    """Processes in a cgroup or below it."""
    found: list[int] = []
    for folder, _, _ in os.walk(box):
        try:
            found += map(int, Path(folder, "cgroup.procs").read_text().split())
        except OSError:
            continue
    return found


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _command(pid: int) -> str:
    """Empty for a zombie, and when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""
