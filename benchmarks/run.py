"""Our own speed, beside what it could be: each number next to a baseline that was measured in the same run.

    python benchmarks/run.py [--quick] [--json FILE] [--only NAME,...] [--llama-server PATH]

Private folders and loopback only; everything it starts ends with it.  Linux.  A machine that does something else at the
time makes the numbers worthless: the tables say so.  Targets are those of the architecture.  Exit status 0 if everything
was measured, whether or not the targets were met; 75 if something could not be, or the time was over.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # run as a script: our folder's name is the package

from benchmarks import congestion, gateway, growth, hangup, many, peers, prompt_cache, real, scripted  # noqa: E402
from benchmarks.lab import FULL, QUICK, TINY, Effort, own_environment  # noqa: E402
from benchmarks.report import Section, busy_percent, machine, program_version, show, show_machine  # noqa: E402
from rich.console import Console  # noqa: E402

from llm_daemon.engines.base import Location  # noqa: E402
from llm_daemon.errors import LlmDaemonError  # noqa: E402

LIMIT = 900  # seconds for everything
STOPS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)  # wait outside of measurements, so that what was measured is shown
Measure = Callable[[Effort, Section], None]


def sections(llama_server: str | None = None, model: str = "smollm2-135m") -> dict[str, tuple[str, Measure]]:
    """By name: title, and what fills the section."""
    return {
        "attach": ("1a. Attach to a warm daemon, scripted model by path", scripted.attach_warm),
        "named": (
            "1b. Attach to a warm daemon, starter model by name",
            functools.partial(real.attach_named, llama_server=llama_server, model=model),
        ),
        "process": ("2. A whole process that attaches", scripted.whole_process),
        "cold": ("3. Cold start, starter model", functools.partial(real.cold_start, llama_server=llama_server, model=model)),
        "ready": ("4. Readiness noticed", scripted.readiness),
        "relay": ("5a. Relay, stub engine", gateway.relay),
        "requests": ("5b. Gateway, whole daemon", functools.partial(real.requests, llama_server=llama_server, model=model)),
        "idle": ("6. Memory, and doing nothing", scripted.idleness),
        "growth": ("7. A crowd: tickets that wait, connections that are idle", growth.growth),
        "congestion": (
            "8. Congestion: five times more arrives than is served",
            functools.partial(congestion.congestion, llama_server=llama_server, model=model),
        ),
        "many": ("8b. Six models in memory for two", functools.partial(many.many, llama_server=llama_server, model=model)),
        "prompt-cache": (
            "8c. A long conversation after an unload",
            functools.partial(prompt_cache.prompt_cache, llama_server=llama_server, model=model),
        ),
        # The longest is the last: it is the one cut short where the time is over.
        "hangup": (
            "9. Hang-up until the slot is free", functools.partial(hangup.hangup, llama_server=llama_server, model=model),
        ),
    }  # fmt: skip


class Cut(BaseException):
    """No more is measured, for a `reason`.  No Exception: no measurement may take it for a failure of its own."""

    def __init__(self, reason: str, is_overdue: bool) -> None:
        super().__init__(reason)
        self.is_overdue = is_overdue


def fill(section: Section, measure: Measure, effort: Effort, deadline: float) -> bool:
    """Measures; what cannot be measured here, or not until `deadline` (monotonic seconds), is a note, and the others go on.

    False: we were told to stop, so that they do not.
    """
    began, goes_on = time.monotonic(), True
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        signal.setitimer(signal.ITIMER_REAL, max(0.001, deadline - began))
        section.busy = busy_percent(effort.pause)
        measure(effort, section)
        section.busy = max(section.busy, busy_percent(effort.pause))
    except Cut as e:
        section.failed = True
        section.notes.append(f"not measured in full: {e}")
        goes_on = e.is_overdue
    except (LlmDaemonError, RuntimeError, OSError) as e:
        section.failed = True
        section.notes.append(f"not measured in full: {e.full() if isinstance(e, LlmDaemonError) else e}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    section.seconds = time.monotonic() - began
    return goes_on


def facts(effort: Effort, llama_server: str | None) -> dict[str, Any]:
    busy = busy_percent(effort.pause)
    out = machine()
    out["busy_percent"] = round(busy, 1)
    if nginx := peers.nginx_program():
        out["versions"]["nginx"] = program_version([nginx, "-v"]).rpartition("/")[2]
    where = real.engines(llama_server)["llama-server"]
    out["versions"]["llama-server"] = where.version if isinstance(where, Location) else "not found"
    return out


def give_up(number: int, frame: object) -> NoReturn:
    """A signal becomes an exception, so that everything is cleared away, and what was measured is shown."""
    if number == signal.SIGALRM:
        raise Cut(f"the time is over, {LIMIT} s for everything", is_overdue=True)
    raise Cut(f"stopped by {signal.Signals(number).name}", is_overdue=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON")
    parser.add_argument("--quick", action="store_true", help="a few samples of each: shows that it runs, proves little")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # for tests: one sample of each
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"some sections: {', '.join(sections())}")
    parser.add_argument(
        "--llama-server", metavar="PATH", help="a llama-server to measure too (default: LLM_DAEMON_TEST_LLAMA_SERVER, else PATH)"
    )
    parser.add_argument("--model", default="smollm2-135m", help="for real engines (%(default)s)")
    options = parser.parse_args(argv)
    only = [name for word in options.only or () for name in word.split(",")]
    if unknown := set(only) - set(sections()):
        parser.error(f"no section {', '.join(sorted(unknown))}: there are {', '.join(sections())}")
    llama_server = options.llama_server or os.environ.get("LLM_DAEMON_TEST_LLAMA_SERVER")
    effort = TINY if options.tiny else QUICK if options.quick else FULL
    own_environment()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    for number in (signal.SIGALRM, *STOPS):
        signal.signal(number, give_up)
    deadline = time.monotonic() + LIMIT

    console = Console(width=None if sys.stdout.isatty() else 150)
    about = facts(effort, llama_server)
    show_machine(console, about)
    done = []
    for name, (title, measure) in sections(llama_server, options.model).items():
        if only and name not in only:
            continue
        section = Section(name, title)
        goes_on = fill(section, measure, effort, deadline)
        show(console, section)
        done.append(section)
        if not goes_on:
            break
    judged = [row.met for section in done for row in section.rows if row.met is not None]
    console.print(f"{sum(judged)} of {len(judged)} targets met")
    if options.json:
        kind = "tiny" if options.tiny else "quick" if options.quick else "full"
        result = {"machine": about, "effort": kind, "sections": [section.wire() for section in done]}
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    return 75 if any(section.failed for section in done) else 0


if __name__ == "__main__":
    sys.exit(main())
