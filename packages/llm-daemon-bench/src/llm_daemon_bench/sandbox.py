"""Runs a reply's code under limits: another process, a folder of its own, little time and memory, no environment.

It keeps accidents in, not attackers: it is off unless the suite says `python_tests = true`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 10
MEMORY = 1 << 30  # bytes of address space
FILE = 1 << 20  # bytes of any file it writes
# Sets its own limits, dies with us (prctl(2), PR_SET_PDEATHSIG), and goes on as the test.  A preexec_fn would run Python
# between fork and exec of a process with threads.
_BEFORE = f"""
import ctypes, resource, runpy, signal, sys
for name, most in (("CPU", {SECONDS}), ("AS", {MEMORY}), ("FSIZE", {FILE}), ("CORE", 0), ("NOFILE", 64)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
sys.path.insert(0, ".")
runpy.run_path("test.py", run_name="__main__")
"""


def run_test(code: str, test: str, seconds: float = SECONDS) -> str:
    """ "" if `test` (a Python program that may `import solution`) ends with status 0, else one line saying why not."""
    with tempfile.TemporaryDirectory(prefix="llmd-bench-") as folder:
        Path(folder, "solution.py").write_text(code)
        Path(folder, "test.py").write_text(test)
        with open(Path(folder, "out"), "w+b") as out:
            child = subprocess.Popen(
                [sys.executable, "-I", "-B", "-c", _BEFORE], cwd=folder, env={"PATH": os.defpath, "HOME": folder},
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
            try:
                status = child.wait(seconds)
            except subprocess.TimeoutExpired:
                return f"python_test: not done after {seconds:g} s"
            finally:
                _end(child)
            if status == 0:
                return ""
            out.seek(0)
            said = out.read(FILE).decode(errors="replace").strip().splitlines()
            return f"python_test: {said[-1][:200] if said else f'exit status {status}'}"


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends what it started, too: all of its session that did not leave it."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all gone
    child.wait()
