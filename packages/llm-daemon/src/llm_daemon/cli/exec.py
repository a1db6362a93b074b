"""`exec`: any program, with a model at hand for exactly as long as it runs."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import signal
import threading
from typing import Any

import click

from .. import errors
from . import link
from .words import load_options, note, quiet_option, subcommand

NOT_FOUND, NOT_EXECUTABLE = 127, 126  # as shells say it
FORWARDED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
SI_KERNEL = 0x80  # <bits/siginfo-consts.h>: sent by the kernel itself, as for a key pressed on the terminal


@subcommand(
    "exec",
    """
    llm-daemon exec --model smollm2-135m -- python my_script.py
    llm-daemon exec -m smollm2-135m -- sh -c 'echo $OPENAI_BASE_URL'
    llm-daemon exec -- aider                             with the default model
    """,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option("--model", "-m", metavar="MODEL", help="The model; the default model if not given.")
@load_options
@quiet_option
@click.argument("cmd", nargs=-1, required=True, type=click.UNPROCESSED)
def command(model: str | None, load: dict[str, Any], quiet: bool, cmd: tuple[str, ...]) -> int:
    """Run a program with a model at hand.

    CMD finds OPENAI_BASE_URL, OPENAI_API_KEY and OPENAI_MODEL in its environment. The model is loaded before it starts and held
    until it ends. Signals are passed on. The exit status is that of CMD, 128+N if signal N ended it, 127 if there is no
    such program, 126 if it cannot be executed. Nobody can catch kill -9 of this command itself: CMD then goes on, and the model
    is held no longer.
    """
    program = _find(cmd[0])
    if isinstance(program, int):
        if program == NOT_FOUND and (how := _meant(cmd)):
            note(f"  hint: {how}")
        return program
    with link.attach(model if model is not None else link.default_model(), quiet, **load) as lease:
        return _run(program, cmd, {**os.environ, **variables(lease)}, lease)


def variables(lease: Any) -> dict[str, str]:
    """What programs for OpenAI's endpoint read."""
    return {"OPENAI_BASE_URL": lease.base_url, "OPENAI_API_KEY": lease.api_key, "OPENAI_MODEL": lease.model}


def _find(name: str) -> str | int:
    """The program's path, or the exit status after having said what is wrong; before a model is loaded for nothing."""
    if found := shutil.which(name):
        return found
    if os.path.dirname(name) and os.path.exists(name):
        return _refuse(name, "is a folder" if os.path.isdir(name) else "is not executable", NOT_EXECUTABLE)
    return _refuse(name, "no such program", NOT_FOUND)


def _meant(cmd: tuple[str, ...]) -> str:
    """What to type in place of `exec MODEL -- PROGRAM`; empty if no model is named so."""
    try:
        link.resolve(cmd[0])
    except errors.LlmDaemonError:
        return ""
    rest = cmd[2:] if cmd[1:2] == ("--",) else cmd[1:]
    return f"a model is named by an option: llm-daemon exec --model {shlex.join([cmd[0], '--', *(rest or ('PROGRAM',))])}"


def _refuse(name: str, why: str, status: int) -> int:
    note(f"llm-daemon: cannot run {name!r}: {why}")
    return status


def _run(program: str, cmd: tuple[str, ...], environ: dict[str, str], lease: Any) -> int:
    """Runs the program in our process group and passes on what reaches us alone."""
    # Blocked, not handled: nothing is lost between two waits, and the thread below cannot be the one that is interrupted.
    watched = FORWARDED | {signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    try:
        # SIGPIPE and SIGXFSZ: Python ignores them, and a program would inherit that.
        pid = os.posix_spawn(program, cmd, environ, setsigmask=before, setsigdef=[signal.SIGPIPE, signal.SIGXFSZ])
    except OSError as e:
        why = "it has no known format (a script without #! ?)" if e.errno == errno.ENOEXEC else str(e.strerror)
        return _refuse(cmd[0], why, NOT_FOUND if e.errno == errno.ENOENT else NOT_EXECUTABLE)
    over = threading.Event()
    threading.Thread(target=link.stay, args=(lease, _tell, over), daemon=True).start()
    try:
        while True:
            number, from_terminal = _next_signal(watched)
            if number == signal.SIGCHLD:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    code = os.waitstatus_to_exitcode(status)
                    return code if code >= 0 else 128 - code
            elif not from_terminal:  # a key on the terminal has reached the program too: it must not count twice
                os.kill(pid, number)
    finally:
        over.set()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _tell(text: str) -> None:
    note(f"llm-daemon: {text}")


def _next_signal(watched: set[signal.Signals]) -> tuple[int, bool]:
    """(number, whether a key on the terminal made it)."""
    if hasattr(signal, "sigwaitinfo"):
        info = signal.sigwaitinfo(watched)
        return info.si_signo, info.si_code == SI_KERNEL
    number = signal.sigwait(watched)  # macOS tells no sender: a key, if we stand in the foreground of a terminal
    return number, number in (signal.SIGINT, signal.SIGQUIT) and _in_foreground()


def _in_foreground() -> bool:
    try:
        fd = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(fd)
