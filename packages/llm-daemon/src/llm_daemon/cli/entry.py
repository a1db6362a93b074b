"""What the installed scripts call.  Imports nothing, so that Ctrl-C while the rest is imported ends us without a traceback."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
else:
    import _signal as signal  # the C half: the Python half imports enum


def main(argv: list[str] | None = None) -> None:
    """Runs one command and ends the process with its exit status; until all is imported, SIGINT ends it as any other program."""
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else it is ignored, as behind nohup
    if is_usual:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .main import main as front

    try:
        if is_usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        front(argv)
    except KeyboardInterrupt:  # before or after the command itself, which has words for it
        raise SystemExit(130) from None
