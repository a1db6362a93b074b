"""`doctor`: looks for whatever could go wrong here, and says what to do about it."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import click

from .. import errors, paths
from ..config import DEFAULT_PORT, Settings
from ..daemon.boot import network_filesystem
from ..daemon.identity import port_holder
from ..daemon.status import shown
from . import link
from .words import as_json, clean, json_option, say_styled, size, subcommand

OK, WARN, FAIL = "ok", "warn", "fail"
SCARCE, TOO_LITTLE = 5e9, 200e6  # bytes free for models: less than one of usual size; less than the starter model needs
FULL = 10e6  # bytes free for logs and history: some days of them
SLOW = 0.25  # seconds for an answer of the daemon; it takes one or two thousandths


@dataclass(frozen=True, slots=True)
class Finding:
    """One line.  `state` is ok, warn (it works, but) or fail; `hint` is what to do."""

    name: str
    state: str
    text: str
    hint: str = ""


@subcommand(
    "doctor",
    """
    llm-daemon doctor
    llm-daemon doctor --json | jq '.findings[] | select(.state != "ok")'
    """,
)
@json_option
@click.pass_context
def command(ctx: click.Context, json_: bool) -> None:
    """Look for whatever could go wrong here.

    Changes nothing and starts nothing. Exit status 0 if nothing fails, else 1.
    """
    findings = list(examine())
    failed = any(f.state == FAIL for f in findings)
    if json_:
        as_json({"ok": not failed, "findings": [asdict(f) for f in findings]})
    else:
        for f in findings:
            say_styled(f"{f.state:<5}", sys.stdout, fg={OK: "green", WARN: "yellow", FAIL: "red"}[f.state])
            click.echo(f"{f.name}: {clean(f.text)}")
            if f.hint:
                click.echo(f"     hint: {clean(f.hint)}")
    ctx.exit(1 if failed else 0)


def examine() -> Iterator[Finding]:
    """All findings; a check that is refused is a finding too."""
    settings = Settings()
    for name, check in CHECKS.items():
        try:
            result = check(settings)
            found = [] if isinstance(result, Settings) else list(result)
        except errors.LlmDaemonError as e:
            yield Finding(name, FAIL, e.message, "" if "llm-daemon doctor" in e.hint else e.hint)  # who asks us knows that
            continue
        if isinstance(result, Settings):
            settings, path = result, paths.config_file()
            yield Finding(name, OK, path if os.path.exists(path) else f"{path} (none, defaults hold)")
        else:
            for state, text, hint in found:
                yield Finding(name, state, text, hint)


Found = Iterator[tuple[str, str, str]]


def _python(_: Settings) -> Found:
    text = ".".join(map(str, sys.version_info[:3])) + f" at {sys.executable or 'unknown place'}"
    usable = sys.executable or os.environ.get("LLM_DAEMON_PYTHON")
    yield (OK, text, "") if usable else (FAIL, text, "set LLM_DAEMON_PYTHON to a Python that has llm-daemon installed")


def _config(_: Settings) -> Settings:
    from ..daemon.settings import catalog_and_engines

    settings = Settings.load()
    catalog_and_engines(settings)
    return settings


def _runtime(_: Settings) -> Found:
    path = paths.runtime_dir()
    try:
        st = os.lstat(path)
    except FileNotFoundError:
        yield _writable(path, "(made when needed)")
        return
    except OSError as e:
        yield FAIL, f"{path}: {e.strerror}", "set LLM_DAEMON_RUNTIME_DIR to a folder of yours on a local disk"
        return
    elsewhere = "set LLM_DAEMON_RUNTIME_DIR to a folder of yours on a local disk"
    if not stat.S_ISDIR(st.st_mode):
        yield FAIL, f"{path} is not a folder", f"remove it, or {elsewhere}"
    elif st.st_uid != os.geteuid():
        yield FAIL, f"{path} belongs to user id {st.st_uid}", elsewhere
    elif kind := network_filesystem(path):
        yield FAIL, f"{path} is on {kind}, where locks and sockets are not safe", elsewhere
    elif not os.access(path, os.W_OK | os.X_OK):
        yield FAIL, f"{path} cannot be written", f"chmod 700 {path}"
    elif st.st_mode & 0o077:
        yield WARN, f"{path} is open to others (mode {st.st_mode & 0o777:03o})", f"chmod 700 {path} (the next daemon does it too)"
    else:
        yield OK, f"{path} (yours alone)", ""


def _writable(path: str, remark: str = "") -> tuple[str, str, str]:
    """Whether a folder can be written, or made; nothing is."""
    there = Path(path)
    while not there.exists() and there != there.parent:
        there = there.parent
    text = " ".join(filter(None, [path, remark]))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return FAIL, f"{path}: {there} cannot be written", f"make {there} writable for you"
    return OK, text, ""


def _state(_: Settings) -> Found:
    path = paths.state_dir()
    state, text, _hint = _writable(path)
    if state == FAIL:  # logs then go to the runtime folder
        yield WARN, f"{text}: logs go to {paths.log_dirs()[-1]}", "set LLM_DAEMON_STATE_DIR to a folder that you can write"
        return
    free = _free(path)
    if free < FULL:
        yield WARN, f"{text}, {size(free)} free: logs and the request history are lost", "free some space on its disk"
    else:
        yield OK, text, ""


def _free(path: str) -> int:
    """Bytes on the disk of a folder that may be still to be made."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free


def _cache(_: Settings) -> Found:
    path = paths.cache_dir()
    state, text, _hint = _writable(path)
    if state == FAIL:
        yield FAIL, text, "set LLM_DAEMON_CACHE_DIR to a folder that you can write"
        return
    free = _free(path)
    text += f", {size(free)} free"
    if free < SCARCE:
        hint = "`llm-daemon models` shows what can go; LLM_DAEMON_CACHE_DIR names another disk"
        yield FAIL if free < TOO_LITTLE else WARN, text, hint
    else:
        yield OK, text, ""


def _daemon(_: Settings) -> Found:
    began = monotonic()
    talk = link.look()
    if talk is None:
        yield OK, "none runs; it starts when somebody asks", ""
        return
    try:
        state = link.call(talk, "status", timeout=5.0)["daemon"]
    finally:
        talk.close()
    took, ours = monotonic() - began, _version()
    text = f"pid {state['pid']}, {state['base_url']}, answered in {1000 * took:.0f} ms"
    yield (WARN, text + ", which is slow", "is the machine busy?") if took > SLOW else (OK, text, "")
    if state["version"] != ours:
        yield WARN, f"it is version {state['version']}, this command {ours}", "llm-daemon stop; the next use starts the new one"
    if old := _kept(state.get("settings", {})):
        yield WARN, f"it was started with other settings: {old}", "llm-daemon stop; the next use starts one that reads them anew"


def _kept(theirs: dict[str, Any]) -> str:
    """Settings of the daemon that are not what file and environment say now; none if these cannot be read: told above."""
    try:
        ours = json.loads(json.dumps(shown(Settings.load())))
    except errors.UsageError:
        return ""
    changed = [(k, theirs[k], v) for k, v in ours.items() if k in theirs and theirs[k] != v]
    return ", ".join(f"{k} = {json.dumps(was)} (now {json.dumps(now)})" for k, was, now in changed)


def _version() -> str:
    from importlib import metadata

    return metadata.version("llm-daemon")


def _port(settings: Settings) -> Found:
    talk = link.look()
    if talk is not None:
        used, noted = talk.welcome["base_url"], talk.welcome.get("port_note")
        talk.close()
        yield (WARN, f"{used}: {noted}", "set `port` to one that is free") if noted else (OK, f"{used} is the daemon's", "")
        return
    port = settings.port or DEFAULT_PORT
    host = "127.0.0.1" if settings.host == "localhost" else settings.host
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError as e:
            text = f"{host}:{port} cannot be used: {e.strerror}, by {port_holder(port)}"
            if settings.port:
                yield FAIL, text, f"end that process, or choose another port (it was set by {settings.origin('port')})"
            else:
                yield WARN, text, "the daemon takes the next free one; set `port` to choose one"
            return
    yield OK, f"{host}:{port} is free", ""


def _other_machines(settings: Settings) -> Found:
    """Nothing, unless they are let in."""
    if settings.tls_host:
        from ..daemon import remote

        remote.context(settings)
        remote.key(settings)
        yield OK, f"they are let in at {settings.tls_host} port {settings.tls_port}, with TLS and a key", ""


def _engines(settings: Settings) -> Found:
    from .engines import look

    found = [e for e in look(settings.engines) if not e.get("library")]
    for e in found:
        if e["runs"]:
            yield OK, f"{e['name']} {e['version']} ({e['origin']})", ""
    runs = any(e["runs"] for e in found)
    for e in found:
        if not e["runs"] and runs:
            yield OK, f"{e['name']} is not here, and not needed: {e['reason']}", ""
        elif not e["runs"]:
            yield FAIL, f"{e['name']} cannot run: {e['reason']}", e["hint"]
    if not found:
        yield FAIL, "none is installed", "install llm-daemon[llamacpp]"


def _weaknesses(settings: Settings) -> Found:
    """Published holes in the versions found; what each adapter knows of."""
    from .engines import look

    running = [e for e in look(settings.engines) if e["runs"]]
    for e in running:
        for weak in e["weaknesses"]:
            fixed = ".".join(map(str, weak["fixed"]))
            text = f"{e['name']} {e['version']} ({e['origin']}) has {weak['id']}: {weak['text']}"
            if weak["blunted"]:
                text += f" (here {weak['blunted']})"
            yield WARN, text, f"install {e['name']} {fixed} or later"
    if not any(e["weaknesses"] for e in running):
        unknown = [e["name"] for e in running if not any(c.isdigit() for c in e["version"])]
        text = "no published one fits the versions found"
        yield OK, text + (f" (version not known: {', '.join(unknown)})" if unknown else ""), ""


def _openmp(_: Settings) -> Found:
    """Prebuilt llama-servers are often linked to it, and slim container images do not have it."""
    if sys.platform != "linux":
        return
    try:
        ctypes.CDLL("libgomp.so.1")
    except OSError:
        yield WARN, "libgomp.so.1 is missing: some builds of llama-server cannot start", "apt-get install libgomp1"
    else:
        yield OK, "libgomp.so.1 is there", ""


CHECKS: dict[str, Callable[[Settings], Any]] = {
    "python": _python,
    "config": _config,
    "runtime folder": _runtime,
    "state folder": _state,
    "cache folder": _cache,
    "daemon": _daemon,
    "port": _port,
    "other machines": _other_machines,
    "engine": _engines,
    "engine weaknesses": _weaknesses,
    "openmp": _openmp,
}
