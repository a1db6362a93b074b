"""The product with one known mistake in it: the storm must see each of them, or it proves nothing.

Each mistake is a list of exact replacements in a copy of the installed package; one that no longer applies is an error.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

MUTANTS = {
    "original": "as its Rust ancestor: no START, the verdict is trusted, and a busy lock means leaving",
    "M1": "the verdict is trusted, and a busy lock means leaving",
    "M2": "the socket is unlinked after the lock is gone",
    "M3": "the lock is a file, unlinked at exit, and its inode not looked at again",
    "M4": "the decision to leave is not one with the look at the leases",
    "M6": "names are looked up by path once more before publishing",
}
LEAVE = '            fp("listener_closed")\n            log.info("nobody needs us: leaving")\n'
PATCHES: dict[str, list[tuple[str, str, str]]] = {
    "newer": [("core/control.py", "PROTO = 1 ", "PROTO = 2 ")],
    "M1": [
        ("core/rendezvous.py", "        if served:\n            return ALREADY\n", "        return ALREADY\n"),
        (
            "core/rendezvous.py",
            '        if words == "ALREADY":',
            '        self.told = True\n        if words == "ALREADY":',
        ),
        (
            "core/rendezvous.py",
            '        return SPAWN if self.holds_start else TAKE_START\n',
            '        if hasattr(self, "told"):\n            raise errors.Unavailable("told that it is up, and nobody is there")\n'
            "        return SPAWN if self.holds_start else TAKE_START\n",
        ),
    ],
    "M2": [
        (
            "daemon/app.py",
            LEAVE,
            LEAVE + '            fcntl.flock(self.born.life_fd, fcntl.LOCK_UN)\n            fp("ghost_unlocked")\n'
            '            os.unlink("sock")\n',
        )
    ],
    "M3": [
        (
            "daemon/boot.py",
            '    fp("dir_opened")\n    while True:\n',
            '    fp("dir_opened")\n    fd = os.open("life", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)\n    while True:\n',
        ),
        (
            "daemon/boot.py",
            "            same = os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))\n",
            "            same = True\n",
        ),
        (
            "daemon/app.py",
            "os.path.samestat(os.stat(self.born.runtime_dir, follow_symlinks=False), os.fstat(self.born.life_fd))\n",
            "True\n",
        ),
        ("daemon/app.py", LEAVE, LEAVE + '            os.unlink("life")\n'),
    ],
    "M4": [
        (
            "daemon/app.py",
            "        try:\n            fp(\"idle_decided\")\n",
            "        asyncio.get_running_loop().call_later(0.003, self._gone)\n\n    def _gone(self) -> None:\n"
            "        try:\n            fp(\"idle_decided\")\n",
        )
    ],
    "M6": [
        (
            "daemon/boot.py",
            "            same = os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))\n",
            "            same = True\n",
        ),
        ("daemon/boot.py", '    nonce = os.urandom(8).hex()\n', '    os.chdir(path)\n    nonce = os.urandom(8).hex()\n'),
    ],
}  # fmt: skip


PATCHES["original"] = [
    *PATCHES["M1"][:2],
    (*PATCHES["M1"][2][:2], PATCHES["M1"][2][2].replace("SPAWN if self.holds_start else TAKE_START", "SPAWN")),
]


def patched(package: Path, folder: Path, name: str) -> Path:
    """A copy of `package` below `folder` with that mistake in it; returns what to put on sys.path."""
    copy = folder / package.name
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for file, old, new in PATCHES[name]:
        text = (copy / file).read_text()
        assert text.count(old) == 1, f"{name} does not apply to {file} any more: {old!r} is there {text.count(old)} times"
        (copy / file).write_text(text.replace(old, new))
    return folder


def hunt(names: list[str], seconds: float) -> list[dict[str, Any]]:
    """Each mistake, until it is seen or `seconds` are over, and the product itself under the same scenario."""
    import tempfile

    from . import chaos
    from .harness import BY_NAME, INSTALLED, LEAVING, Scenario, Storm, chances

    # Windows that are microseconds wide in the product, and as wide as a cold start here.
    seldom = Scenario("", models=0.0, http=0.0, workers=10, lingers="0.02 0.05", rest=1.0)
    slow_end = chances(0.5, "listener_closed", "PAUSE 0.3")
    late_end = chances(0.5, "ghost_unlocked", "PAUSE 0.6")
    slow_start = chances(0.3, "lock_got ino_checked", "PAUSE 0.2")
    start_is_lost = ((chaos.lose_start, 0.005, 0.03), (chaos.kill_client, 0.2, 0.6))
    scenarios = {
        "original": BY_NAME["leaving"],
        "M1": replace(BY_NAME["leaving"], name="slow to leave", chances=slow_end),
        "M2": replace(seldom, name="late unlink", rest=0.3, lingers=LEAVING, chances=late_end, patience=5),
        "M3": replace(seldom, name="START is lost", chances=slow_end + slow_start, acts=start_is_lost, patience=15),
        "M4": BY_NAME["leaving"],
        "M6": replace(
            seldom, name="deleted often", chances=slow_start, acts=((chaos.delete, 0.2, 1.0), *start_is_lost[1:]), may_lose=True,
            http_may_fail=True, patience=15,
        ),
    }  # fmt: skip
    out = []
    for name in names:
        with tempfile.TemporaryDirectory(prefix="llmd-") as folder:
            copy = patched(INSTALLED, Path(folder), name)
            if name == "original":  # for its rate: one look would do
                seen = Storm(scenarios[name], min(seconds, 10.0), copy).run()
            else:
                seen = Storm(scenarios[name], seconds, copy, until_caught=True).run()
        ours = Storm(scenarios[name], min(seconds, max(5.0, 2 * seen["seconds"]))).run()
        evidence = seen["broken"] + seen["failed"]
        print(f"{name}: {len(evidence)} found", file=sys.stderr, flush=True)
        out.append({"mutant": name, "what": MUTANTS[name], "scenario": seen["scenario"], "evidence": evidence[:1]} | {
            f"{who} {key}": len(value) if isinstance(value, list) else round(value, 1)
            for who, part in (("mutant", seen), ("product", ours))
            for key, value in part.items() if key in ("attaches", "seconds", "generations", "failed", "broken")
        })  # fmt: skip
    return out


def table(found: list[dict[str, Any]]) -> str:
    lines = []
    for one in found:
        lines.append(f"{one['mutant']}, {one['what']} (scenario: {one['scenario']})")
        for who in ("mutant", "product"):
            n, failed = one[f"{who} attaches"], one[f"{who} failed"]
            rate = f"{failed} of {n + failed} attaches failed ({100 * failed / max(1, n + failed):.1f} %)"
            lines.append(f"    {who:8}{rate}, {one[f'{who} broken']} broken promises, in {one[f'{who} seconds']} s")
        lines += ["    caught by: " + what[:300] for what in one["evidence"]] or ["    NOT CAUGHT"]
    return "\n".join(lines)
