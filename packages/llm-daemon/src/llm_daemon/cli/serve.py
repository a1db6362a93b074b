"""`serve`: the endpoint stays up for programs that cannot hold a lease."""

from __future__ import annotations

import os
import queue
import signal
import threading
from typing import Any, NoReturn
from urllib.parse import urlsplit

import click

from .. import errors
from . import link
from .words import load_options, note, quiet_option, subcommand


class Presence:
    """A lease without a model: keeps the endpoint up.  The parts of `Lease` that `link.stay` needs."""

    def __init__(self) -> None:
        self._talk: Any = link.sync.connect()

    def refresh(self) -> None:
        self._talk.close()
        self._talk = link.sync.connect()

    def is_open(self) -> bool:
        return bool(self._talk.is_open())

    @property
    def base_url(self) -> str:
        return str(self._talk.welcome["base_url"])


@subcommand(
    "serve",
    """
    llm-daemon serve                                     models load on first request
    llm-daemon serve smollm2-135m gemma3-270m            loads these two now and holds them
    llm-daemon serve --port 8080 smollm2-135m
    """,
)
@click.argument("models", nargs=-1)
@click.option("--port", type=click.IntRange(1, 65535), metavar="N", help="This port and no other.")
@click.option("--show-key", is_flag=True, help="Print the API key too.")
@load_options
@quiet_option
def command(models: tuple[str, ...], port: int | None, show_key: bool, load: dict[str, Any], quiet: bool) -> None:
    """Keep the endpoint up in the foreground.

    For editors and other programs that know only an address. Every model can be asked for; those named here are loaded
    now and held. Ends with Ctrl-C (exit status 130) or SIGTERM (0).
    """
    signal.signal(signal.SIGTERM, _end)
    for model in models:
        link.resolve(model, **load)  # before anything is started
    if port is not None:
        if (talk := link.look()) is not None:
            talk.close()
            _check_port(talk.welcome, port)
        os.environ["LLM_DAEMON_PORT"] = str(port)
    try:
        leases = [link.attach(model, quiet, **load) for model in models] or [Presence()]
    except errors.Unavailable as e:
        if port is not None:  # the variable is how we hand it on
            e.hint = e.hint.replace("environment variable LLM_DAEMON_PORT", "--port")
        raise
    welcome = leases[0]._talk.welcome
    if port is not None:
        _check_port(welcome, port)  # somebody else may have started it meanwhile
    _announce(welcome, [lease.model for lease in leases if models], show_key)
    _keep(leases)


def _end(_number: int, _frame: object) -> NoReturn:
    raise click.exceptions.Exit(0)


def _check_port(welcome: dict[str, Any], port: int) -> None:
    now = urlsplit(welcome["base_url"]).port
    if now != port:
        raise errors.Unavailable(
            f"a daemon (pid {welcome['pid']}) already serves on port {now}, not on {port}",
            code="other_port", hint=f"use port {now}, or end it first: llm-daemon stop",
        )  # fmt: skip


def _announce(welcome: dict[str, Any], models: list[str], show_key: bool) -> None:
    """Where it is and how to use it.  The key is not shown by itself: what is on a screen is soon in a screenshot."""
    click.echo(f"serving at {welcome['base_url']}" + (f" (loaded: {', '.join(models)})" if models else ""))
    if welcome.get("port_note"):
        click.echo(f"  not the usual port: {welcome['port_note']}")
    name = models[0] if models else link.default_model()
    if show_key:
        click.echo(f"  key:    {welcome['api_key']}")
    click.echo(f'  shell:  eval "$(llm-daemon env {name})"   sets OPENAI_BASE_URL, OPENAI_API_KEY, OPENAI_MODEL')
    # The unix socket asks for no key, which has no place in an argument list.
    click.echo(f"  curl:   curl --unix-socket {welcome['http_socket']} http://localhost/v1/chat/completions \\")
    click.echo(
        "            -H 'Content-Type: application/json' \\\n"
        f"""            -d '{{"model": "{name}", "messages": [{{"role": "user", "content": "Hi"}}]}}'"""
    )
    click.echo("Ctrl-C ends this; models close by themselves when nobody uses them.")


def _keep(leases: list[Any]) -> NoReturn:
    """Stays until a signal; says when the daemon had to be looked for again, once for all leases."""
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    over = threading.Event()  # never: a signal ends us
    for lease in leases:
        threading.Thread(target=link.stay, args=(lease, said.put, over), daemon=True).start()
    last = ""
    while True:
        text = said.get()
        if text != last:
            note(f"llm-daemon: {text}")
        last = text
