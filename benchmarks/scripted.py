"""What the daemon costs, with a scripted engine so that no model's noise is in it: attach, processes, readiness, idleness."""

from __future__ import annotations

import functools
import os
import socket
import sys
import time
from pathlib import Path

import psutil
from benchmarks.lab import HERE, Effort, child, cpu_ms, fake_model, interleaved, run_program, switches, world
from benchmarks.report import Row, Section, iqr, percentile

from llm_daemon import attach, connect, paths
from llm_daemon.core import control


def attach_warm(effort: Effort, out: Section, model: str = "", config: str = "") -> None:
    """`attach` in a running process, with daemon and model there, against one bare round trip on a unix socket.

    `model` is the scripted one by default.
    """
    with world(config) as here, child(str(HERE / "echo.py"), str(here.base / "echo.sock")):
        model, echo = model or fake_model(here), str(here.base / "echo.sock")
        # As many bytes as an attach says; it hears some more.
        message = control.encode({"op": "HELLO", "proto": control.PROTO})
        message += control.encode({"op": "ENSURE", "id": 1, "wish": {"model": model}, "keep_alive": None})

        def attached() -> float:
            began = time.perf_counter()
            lease = attach(model)
            took = time.perf_counter() - began
            lease.close()
            return took * 1e3

        def echoed() -> float:
            began = time.perf_counter()
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(echo)
                sock.sendall(message)
                sock.recv(65536)
                took = time.perf_counter() - began
            return took * 1e3

        with attach(model):
            interleaved({"attach": attached, "echo": echoed}, min(20, effort.attaches))  # warm
            found = interleaved({"attach": attached, "echo": echoed}, effort.attaches)
    ours, base = found["attach"], found["echo"]
    against = "connect + echo"
    out.rows.append(Row.of("attach, p50", "ms", ours, base, against=against, target=0.5))
    out.rows.append(
        Row("attach, p99", "ms", percentile(ours, 99), len(ours), iqr(ours), percentile(base, 99), against=f"{against}, p99")
    )


def whole_process(effort: Effort, out: Section) -> None:
    """A fresh interpreter that attaches to a warm daemon, against one that does nothing."""
    wall: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    with world() as here:
        model = fake_model(here)
        programs = {
            "bare": "pass",
            "import": "import llm_daemon",
            "attach": f"from llm_daemon import attach; attach({model!r})",
        }

        def timed(name: str, code: str) -> float:
            real, used = run_program(sys.executable, "-c", code)
            cpu.setdefault(name, []).append(used)
            return real

        with attach(model):
            ways = {name: functools.partial(timed, name, code) for name, code in programs.items()}
            interleaved(ways, 2)  # warm: byte code is written, files are in memory
            cpu.clear()
            wall = interleaved(ways, effort.processes)
    bare, used = wall["bare"], cpu["bare"]
    against = "python -c pass"
    out.rows += [
        Row.of("import llm_daemon", "ms", wall["import"], bare, against=against, target=15.0, judged="difference"),
        Row.of("attach, whole process", "ms", wall["attach"], bare, against=against, target=20.0, judged="difference"),
        Row.of("import llm_daemon, CPU", "ms", cpu["import"], used, against=against),
        Row.of("attach, CPU of the process", "ms", cpu["attach"], used, against=against),
    ]
    out.notes.append("CPU time depends less than wall clock on what else the machine does; the daemon's own is not in it.")


def readiness(effort: Effort, out: Section) -> None:
    """From the engine's own word that it is ready to the client's return from `attach`."""
    late = []
    with world() as here:
        with attach(fake_model(here)):
            for n in range(effort.loads):
                # Other lengths each time: readiness falls anywhere between two probes.
                model = fake_model(here, load_seconds=0.2 + 0.007 * n)
                log = paths.engine_log(str(here.state / "logs"), model)
                lease = attach(model)
                now = time.time()
                # The engine's last word is `ready`, and the file's time is when the daemon wrote it down.
                late.append((now - os.stat(log).st_mtime) * 1e3)
                lease.close()
                if not Path(log).read_text().endswith("ready\n"):
                    raise RuntimeError(f"the scripted engine said something else: {log}")
    out.rows.append(Row.of("ready until attach returns, median", "ms", late, target=25.0))
    out.rows.append(Row("ready until attach returns, worst", "ms", max(late), len(late), target=25.0))
    out.notes.append("The engine's moment is a file's time, in the kernel's steps of up to 4 ms: rather too long than too short.")


def idleness(effort: Effort, out: Section) -> None:
    """Memory of the daemon, and what it does while a lease is held and nothing happens."""
    with world() as here, child("-c", "import sys; print(flush=True); sys.stdin.read()") as bare:
        model = fake_model(here)
        first = connect()
        assert first is not None
        first.ask("CALL", 10, method="status")  # answered once the engines are located: from then on the start is over
        daemon = int(first.welcome["pid"])
        base = psutil.Process(bare.pid).memory_full_info()
        started = psutil.Process(daemon).memory_full_info()
        with attach(model) as lease:
            keeper = psutil.Process(lease.pid).ppid()
            loaded = psutil.Process(daemon).memory_full_info()
            above = psutil.Process(keeper).memory_full_info()
            time.sleep(min(1.0, effort.idle))  # for the tail of the start to be over
            pids = {"daemon": daemon, "keeper": keeper}
            before = {name: (switches(pid), cpu_ms(pid)) for name, pid in pids.items()}
            began = time.monotonic()
            time.sleep(effort.idle)
            seconds = time.monotonic() - began
            after = {name: (switches(pid), cpu_ms(pid)) for name, pid in pids.items()}
        first.close()
    against = "python -c pass"
    for what, memory, most in (
        ("daemon after start", started, 35.0), ("daemon after an attach", loaded, 35.0), ("keeper", above, None),
    ):  # fmt: skip
        out.rows.append(Row(f"{what}, RSS", "MB", memory.rss / 1e6, 1, baseline=base.rss / 1e6, against=against, target=most))
        out.rows.append(Row(f"{what}, PSS", "MB", memory.pss / 1e6, 1, baseline=base.pss / 1e6, against=against))
    for name in pids:
        woken, spent = (b - a for a, b in zip(before[name], after[name], strict=True))
        # Loop and watchdog look at each other every 10 s: that is not nothing, but a machine can sleep between.
        most = 0.5 if name == "daemon" else 0.0
        out.rows.append(Row(f"{name} idle, wake-ups a second", "/s", woken / seconds, 1, target=most))
        out.rows.append(Row(f"{name} idle, CPU a minute", "ms", spent * 60 / seconds, 1))
    out.notes.append(f"Idle for {seconds:.0f} s with a lease held; wake-ups are context switches of all threads.")
    out.extra["idle_seconds"] = seconds
