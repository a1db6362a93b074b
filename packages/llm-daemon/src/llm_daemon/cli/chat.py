"""The chat of `run`: questions and answers until Ctrl-D."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import click

from .. import errors, paths
from .ask import ask
from .run import prepared, readable, say, think
from .words import clean, note

HELP = """\
  /clear   forget the conversation
  /help    this text
  /quit    leave (Ctrl-D does too)
Ctrl-C stops an answer and keeps the chat.  Arrow up brings back what you typed."""
HISTORY = 1000  # lines kept


def chat(lease: Any, body: dict[str, Any], system: str | None, templated: bool) -> None:
    """Reads lines and answers them; returns when the person leaves.  An error of one answer does not end the chat."""
    about = "chat" if templated else "a base model: it continues what you type"
    note(f"{lease.model} on {lease.engine}; {about}. /help tells more, Ctrl-D leaves.")
    start = [{"role": "system", "content": readable(system)}] if system else []
    messages = list(start)
    history = _History()
    try:
        while (line := _next_line()) is not None:
            word = line.strip()
            if word in ("/quit", "/exit", "/bye"):
                break
            if word == "/clear":
                messages = list(start)
                note("forgotten")
            elif word in ("/help", "/?"):
                click.echo(HELP)
            elif word.startswith("/") and " " not in word and "/" not in word[1:]:
                note(f"no command {word}; /help lists them")
            elif word and templated:
                _turn(lease, body, messages, readable(line))
            elif word:
                _answer(lease, prepared(body, system, readable(line), False))
    finally:
        history.save()


def _next_line() -> str | None:
    """What the person typed; None at the end."""
    while True:
        try:
            return input(">>> ")
        except EOFError:
            click.echo()
            return None
        except KeyboardInterrupt:
            click.echo()
            note("Ctrl-D or /quit leaves")


def _turn(lease: Any, body: dict[str, Any], messages: list[dict[str, str]], line: str) -> None:
    """One question in a conversation; an answer stopped half-way is remembered as far as it came."""
    messages.append({"role": "user", "content": line})
    text = _answer(lease, {**body, "messages": messages})
    if text is None:
        messages.pop()  # it was never answered: asking again must not ask twice
    else:
        messages.append({"role": "assistant", "content": text})


def _answer(lease: Any, request: dict[str, Any]) -> str | None:
    """Streams an answer; None if there was none at all."""
    pieces: list[str] = []

    def hear(piece: str) -> None:
        pieces.append(piece)
        say(piece)

    try:
        ask(lease, request, hear, think)
    except KeyboardInterrupt:
        click.echo()
        note("stopped")
    except errors.LlmDaemonError as e:
        click.echo()
        click.echo(f"llm-daemon: {clean(e.full(), keep=chr(10))}", err=True)
    else:
        click.echo()
    return "".join(pieces) if pieces else None


class _History:
    """Arrow up, also for what was typed in earlier chats.  Where Python has no readline, there is none."""

    def __init__(self) -> None:
        self._path = os.path.join(paths.state_dir(), "chat_history")
        try:
            import readline
        except ImportError:
            self._readline = None
            return
        self._readline = readline
        readline.set_history_length(HISTORY)
        with suppress(OSError):
            readline.read_history_file(self._path)

    def save(self) -> None:
        if self._readline is not None:
            with suppress(OSError):
                os.makedirs(os.path.dirname(self._path), exist_ok=True)
                os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600))  # readline would make it readable for all
                self._readline.write_history_file(self._path)
