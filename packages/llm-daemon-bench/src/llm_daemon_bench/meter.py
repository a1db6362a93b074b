"""What a trial costs: the server's memory and CPU, the machine's energy, and our own share."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from .machine import MIB, conditions, swapped_in
from .records import Client, Conditions, Resources

RAPL = Path("/sys/class/powercap")
LAG_STEP_S = 0.01


def tree(roots: Sequence[int]) -> list[psutil.Process]:
    """The processes and their descendants; those that have gone are left out."""
    found: dict[int, psutil.Process] = {}
    for root in roots:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(root)
            found |= {p.pid: p for p in (process, *process.children(recursive=True))}
    return list(found.values())


def cpu_seconds(processes: Sequence[psutil.Process]) -> float | None:
    """User and system time so far of all of them; None for none."""
    total, any_ = 0.0, False
    for process in processes:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total, any_ = total + times.user + times.system, True
    return total if any_ else None


def memory_mib(processes: Sequence[psutil.Process]) -> tuple[float | None, float | None]:
    """(resident, proportional) memory; the second counts shared pages by share, and is None where it is not told."""
    rss, pss, known = 0, 0, True
    for process in processes:
        with contextlib.suppress(psutil.Error):
            rss += process.memory_info().rss
            try:
                pss += getattr(process.memory_full_info(), "pss", 0)
            except psutil.Error:
                known = False
    return (round(rss / MIB, 1) if rss else None), (round(pss / MIB, 1) if pss and known else None)


def vram_mib(processes: Sequence[psutil.Process]) -> float | None:
    """GPU memory of these processes; None without an NVIDIA GPU."""
    if not shutil.which("nvidia-smi"):
        return None
    ask = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    pids = {str(p.pid) for p in processes}
    rows = [line.split(", ") for line in done.stdout.splitlines()]
    return sum(float(row[1]) for row in rows if len(row) == 2 and row[0] in pids and row[1].isdigit())


def energy_uj(root: Path = RAPL) -> dict[str, tuple[int, int]]:
    """{zone: (microjoules, where they wrap)} of each CPU package, Linux powercap; empty where we may not read it."""
    out: dict[str, tuple[int, int]] = {}
    for zone in root.glob("intel-rapl:[0-9]*") if root.exists() else ():
        if zone.name.count(":") != 1:
            continue  # a part of a package, counted in it
        with contextlib.suppress(OSError, ValueError):
            out[zone.name] = int((zone / "energy_uj").read_text()), int((zone / "max_energy_range_uj").read_text())
    return out


def joules(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> float | None:
    """
    >>> joules({"p": (900_000, 1_000_000)}, {"p": (100_000, 1_000_000)})
    0.2
    """
    zones = before.keys() & after.keys()
    if not zones:
        return None
    return round(sum((after[z][0] - before[z][0]) % (after[z][1] or 1 << 62) for z in zones) / 1e6, 3)


class Lag:
    """How late this process wakes up, sampled by a thread while in `with`: what its stamps may be late by, too."""

    def __init__(self, step_s: float = LAG_STEP_S) -> None:
        self._step = step_s
        self._late: list[float] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        due = time.perf_counter() + self._step
        while not self._over.wait(max(0.0, due - time.perf_counter())):
            now = time.perf_counter()
            self._late.append((now - due) * 1000)
            due = now + self._step

    def __enter__(self) -> Lag:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def p99_ms(self) -> float | None:
        """Nearest rank; None for a span too short to have been looked at."""
        late = sorted(self._late)
        return round(late[-(-99 * len(late) // 100) - 1], 3) if late else None


@dataclass(slots=True)
class Meter:
    """Around one trial: `begin`, the trial, `end`."""

    roots: Sequence[int]
    _cpu: float | None = None
    _energy: dict[str, tuple[int, int]] | None = None
    _own: float = 0.0
    _swap: int | None = None
    _lag: Lag | None = None
    _at: Conditions | None = None

    def begin(self) -> None:
        self._swap = swapped_in()
        self._at = conditions()
        self._cpu = cpu_seconds(tree(self.roots))
        self._lag = Lag().__enter__()
        self._energy = energy_uj()
        self._own = time.process_time()

    def end(self) -> tuple[Resources, Conditions, Client]:
        own = time.process_time() - self._own
        spent = joules(self._energy or {}, energy_uj())
        assert self._lag is not None and self._at is not None
        self._lag.__exit__()
        processes = tree(self.roots)
        cpu = cpu_seconds(processes)
        rss, pss = memory_mib(processes)
        used = None if cpu is None or self._cpu is None else round(cpu - self._cpu, 3)
        res = Resources(rss_mib=rss, pss_mib=pss, cpu_s=used, vram_mib=vram_mib(processes) if processes else None, energy_j=spent)
        now = swapped_in()
        swapped = None if now is None or self._swap is None else now - self._swap
        at = self._at
        env = Conditions(load1=at.load1, mhz=at.mhz, temp_c=at.temp_c, swap_in=swapped)
        return res, env, Client(cpu_ms=round(own * 1000, 2), lag_p99_ms=self._lag.p99_ms())
