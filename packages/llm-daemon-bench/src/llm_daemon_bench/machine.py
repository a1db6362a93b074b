"""What machine this is, and in which state: for `session.json`, for each trial, and for `doctor`.  Unknown stays None or ""."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from llm_daemon.engines.base import usable_cores

from .records import Conditions, Machine

CPU = Path("/sys/devices/system/cpu")
MIB = 1 << 20


def read(path: str | Path) -> str:
    """A small file of /proc or /sys; "" if it cannot be read."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def describe() -> Machine:
    return Machine(
        os=os_name(), kernel=platform.release(), python=platform.python_version(), cpu=cpu_name(), cpu_flags=cpu_flags(),
        cores=os.cpu_count(), usable_cores=usable_cores(), governor=governor(), ram_mib=psutil.virtual_memory().total // MIB,
        swap_mib=psutil.swap_memory().total // MIB, gpu=gpus(), boot_id=boot_id(), power=power(),
    )  # fmt: skip


def os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return f"{platform.system()} {platform.mac_ver()[0]}".strip()


def cpu_name() -> str:
    for line in read("/proc/cpuinfo").splitlines():
        if line.startswith(("model name", "Model\t")):
            return line.partition(":")[2].strip()
    return _ask("sysctl", "-n", "machdep.cpu.brand_string") if sys.platform == "darwin" else platform.machine()


def cpu_flags() -> tuple[str, ...]:
    """The CPU features that matter for speed of inference."""
    wanted = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512", "avx_vnni", "amx", "asimddp", "i8mm", "sve", "bf16")
    for line in read("/proc/cpuinfo").splitlines():
        if line.startswith(("flags", "Features")):
            return tuple(sorted(flag for flag in line.partition(":")[2].split() if flag.startswith(wanted)))
    return ()


def governor() -> str:
    """How the clock is steered: the governors of all cores, e.g. `powersave`."""
    return " ".join(sorted({read(path) for path in CPU.glob("cpu[0-9]*/cpufreq/scaling_governor")} - {""}))


def gpus() -> tuple[str, ...]:
    """Name, driver and memory of each NVIDIA GPU (those that nvidia-smi knows)."""
    if not shutil.which("nvidia-smi"):
        return ()
    return tuple(_ask("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader").splitlines())


def boot_id() -> str:
    return read("/proc/sys/kernel/random/boot_id")


def power() -> str:
    """`mains`, `battery`, or "" where there is no battery."""
    try:
        battery = psutil.sensors_battery()
    except (AttributeError, OSError):
        battery = None
    return "" if battery is None else "mains" if battery.power_plugged else "battery"


def conditions() -> Conditions:
    """Right now; `swap_in` is for whoever looks twice."""
    load = psutil.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return Conditions(load1=None if load is None else round(load, 2), mhz=mhz(), temp_c=temperature())


def mhz() -> float | None:
    """Mean clock of the cores."""
    found: Any = None  # None on some machines, whatever the stubs say
    try:
        found = psutil.cpu_freq()
    except (OSError, NotImplementedError, RuntimeError):
        return None
    return round(found.current) if found and found.current else None


def temperature() -> float | None:
    """The hottest sensor of the CPU, degrees Celsius."""
    if not hasattr(psutil, "sensors_temperatures"):
        return None
    try:
        found = psutil.sensors_temperatures()
    except OSError:
        return None
    values = [s.current for name in ("coretemp", "k10temp", "zenpower", "cpu_thermal", "acpitz") for s in found.get(name, ())]
    return max(values, default=None)


def swapped_in() -> int | None:
    """Pages swapped in since boot, proc_vmstat(5)."""
    for line in read("/proc/vmstat").splitlines():
        if line.startswith("pswpin "):
            return int(line.split()[1])
    return None


def git_state(folder: Path) -> str:
    """Commit of the checkout that `folder` is in, with `+` if something below it is changed; "" outside of one."""
    head = _ask("git", "-C", str(folder), "rev-parse", "--short=12", "HEAD")
    return head + ("+" if head and _ask("git", "-C", str(folder), "status", "--porcelain", ".") else "")


def _ask(*argv: str) -> str:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False)
        if done.returncode == 0:
            return done.stdout.decode(errors="replace").strip()
    return ""
