"""Any OpenAI-compatible server, described in the configuration: no line of Python is needed for it.

    [engines.mine]
    command = ["/opt/mine/serve", "--model", "{model}", "--host", "{host}", "--port", "{port}", "--name", "{alias}"]

What else may stand there is in `KEYS`; docs/how-to/add-an-engine.md has examples.  `check` is asked by config.py, so that a
mistake is told by file and line.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import string
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.routes import RELAYED
from ..errors import UsageError
from ..spec import Spec
from . import _words
from .base import Grant, Location, Missing, Plan, Probe, Stop, Tcp

KEYS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "command": (list, "a list of texts: the program and its flags, with placeholders"),
    "ready": ((str, list), "a path, or a list of them: the first that exists is asked until it answers 200"),
    "warm_up": (bool, "true: it says it is ready before it is, so ask it for one token first"),
    "routes": (list, "a list of the routes it serves"),
    "model_id": (str, "the `model` it insists on in a request, with placeholders; without it, any will do"),
    "cancel": (str, "what a hang-up ends: close, stream or as-stream"),
    "accepts": (list, "what it loads: endings (.gguf), a file in a folder (config.json), or engine"),
    "slots": (int, "how many requests it serves at once, where it is not told by {parallel}"),
    "drop": (list, "a list of request fields that it must not see"),
    "base_path": (str, "what it has in place of /v1"),
    "rebinds": (bool, "false: it cannot bind beside a reserved port"),
    "port_from_log": (str, "a pattern for its log whose group is the port it took, with --port 0"),
    "grace": ((int, float), "seconds between SIGTERM and SIGKILL, twice"),
    "stall": ((int, float), "seconds without a sign of life until it counts as stuck"),
    "license": (str, "a text"),
    "version": (str, "a text"),
    "hint": (str, "how to get it"),
}
PLACES = ("model", "alias", "host", "port", "socket", "context", "total_context", "parallel", "threads", "key")
CANCEL = ("close", "stream", "as-stream")
READY = ("/health", "/v1/models")
COMPLETING = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/completion", "/infill"})
ROUTES = ("/v1/chat/completions", "/v1/completions")
_ASKS = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"


def check(table: Mapping[str, Any]) -> tuple[str, str] | None:
    """(key, what is wrong with it) in a table whose values have the right types; None if nothing is.

    >>> check({"command": ["serve", "--port", "{prot}"]})
    ('command', "there is no placeholder {prot}; there are {model} {alias} {host} {port} {socket} {context} {total_context} \
{parallel} {threads} {key}")
    >>> check({"command": ["serve", "--port", "{port}"]}) is None
    True
    """
    command = table.get("command", [])
    if not command:
        return "command", "command must name a program"
    if "args" in table or "path" in table:
        return "args" if "args" in table else "path", "it belongs into command"
    env = table.get("env", {})
    for key, texts in (("command", command), ("env", env.values()), ("model_id", [table.get("model_id", "")])):
        for text in texts:
            if problem := _misplaced(text):
                return key, problem
    used = _used(command) | _used(env.values())
    if "key" in _used(command):
        return "command", "everybody may read a command line: put {key} into env"
    if "port_from_log" in table and "port" in used:
        return "port_from_log", "with {port} the port is known: write 0 in its place"
    if len(used & {"port", "socket"}) + ("port_from_log" in table) != 1:
        return "command", "say where it listens, once: {port} (and {host}) or {socket}"
    return _odd(table)


def _misplaced(text: str) -> str | None:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as e:
        return f"{text!r}: {e} (a brace of its own is written twice)"
    known = " ".join(f"{{{place}}}" for place in PLACES)
    return next((f"there is no placeholder {{{name}}}; there are {known}" for name in names if name not in PLACES), None)


def _used(texts: Any) -> set[str]:
    return {name for text in texts for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def _odd(table: Mapping[str, Any]) -> tuple[str, str] | None:
    """Values that cannot be."""
    if table.get("cancel", "stream") not in CANCEL:
        return "cancel", "must be " + " or ".join(CANCEL)
    for route in table.get("routes", ()):
        if route not in RELAYED:
            return "routes", f"{route} is not a route of the gateway; those are " + ", ".join(sorted(RELAYED))
    for path in (*_list(table.get("ready", ())), table.get("base_path", "/")):
        if not path.startswith("/") or not path.isascii() or not path.isprintable() or " " in path:
            return "ready" if "ready" in table else "base_path", f"{path!r} is not a path"
    for key, least in (("slots", 1), ("grace", 0.01), ("stall", 1)):
        if key in table and not least <= table[key] <= 10**6:
            return key, f"must be {least} or more"
    try:
        if re.compile(table.get("port_from_log", "()")).groups != 1:
            return "port_from_log", "it needs one group, for the port"
    except re.error as e:
        return "port_from_log", f"not a pattern: {e}"
    return None


def _list(value: str | Sequence[str]) -> Sequence[str]:
    return [value] if isinstance(value, str) else value


class Command:
    """See base.Adapter: the engine `name`, as `table` of the configuration describes it."""

    def __init__(self, name: str, table: Mapping[str, Any]) -> None:
        if wrong := check(table):
            raise UsageError(f"engines.{name}.{wrong[0]}: {wrong[1]}", code="bad_config")
        self.name, self.table = name, table
        self.license = str(table.get("license", "unknown"))
        self.routes = frozenset(table.get("routes", ROUTES))

    def locate(self, config: Mapping[str, Any]) -> Location | Missing:
        """The program by its whole path or on PATH; of `python -m MODULE`, the module as well."""
        program, *rest = self.table["command"]
        hint = str(self.table.get("hint") or f"correct command in [engines.{self.name}]")
        program = os.path.expanduser(program)
        if os.sep in program and not os.path.isabs(program):
            return Missing(f"{program} is not a whole path", hint)
        if (found := shutil.which(program)) is None:
            return Missing(f"there is no program {program}" + ("" if os.sep in program else " on PATH"), hint)
        if rest[:1] == ["-m"] and len(rest) > 1 and "python" in os.path.basename(found):
            module = rest[1].partition(".")[0]
            try:
                lacks = subprocess.run(
                    [found, "-c", _ASKS, module], stdin=subprocess.DEVNULL, capture_output=True, timeout=5
                ).returncode
            except (OSError, subprocess.TimeoutExpired) as e:
                return Missing(f"{found} does not run: {e}", hint)
            if lacks:
                return Missing(f"{found} has no module {module}", hint)
        return Location((found,), str(self.table.get("version", "unknown")), "config")

    def accepts(self, path: str) -> str | None:
        wanted = self.table.get("accepts", [".gguf"])
        if not path.startswith("/"):
            return None if "engine" in wanted else "it has no models of its own"
        if os.path.isdir(path):
            fits = any(os.path.exists(os.path.join(path, name)) for name in wanted if not name.startswith("."))
        else:
            fits = path.lower().endswith(tuple(name.lower() for name in wanted if name.startswith(".")))
        return None if fits else f"it loads {', '.join(wanted) or 'nothing'}"

    def refuse(self, args: Sequence[str]) -> str | None:
        """Flags come with requests too, and nobody knows what these would do."""
        return f"{args[0]} is not passed on: flags of {self.name} belong into its command" if args else None

    def diagnose(self, exit_status: int | None, last_words: str) -> tuple[str, str]:
        return _words.diagnose(exit_status, last_words)

    def plan(self, spec: Spec, where: Location, grant: Grant) -> Plan:
        table, command = self.table, self.table["command"]
        used = _used(command) | _used(table.get("env", {}).values())
        host = grant.host if "host" in used else "127.0.0.1"
        values = {
            "model": grant.model_path, "alias": grant.alias, "host": host, "port": grant.port, "socket": grant.socket,
            "context": grant.context, "total_context": grant.context * grant.parallel, "parallel": grant.parallel,
            "threads": grant.threads, "key": grant.key,
        }  # fmt: skip
        told = str(table.get("port_from_log", ""))
        address = grant.socket if "socket" in used else Tcp(host, 0 if told else grant.port, table.get("rebinds", True), told)
        model_id = table.get("model_id", "{alias}" if "alias" in used else None)
        served = None if model_id is None else model_id.format(**values)
        base, cancel = str(table.get("base_path", "/v1")).rstrip("/"), table.get("cancel", "stream")
        hears_late = self.routes & COMPLETING
        return Plan(
            (*where.argv, *(text.format(**values) for text in command[1:])),
            address,
            env={name: text.format(**values) for name, text in table.get("env", {}).items()},
            probes=tuple(Probe(path, guarded=False) for path in _list(table.get("ready", READY))),
            warm_up=self._first_request(served or grant.alias, base) if table.get("warm_up") else None,
            stop=Stop(float(table.get("grace", 2.0))),
            stall=float(table.get("stall", 120.0)),
            slots=table.get("slots", grant.parallel if "parallel" in used else 1),
            routes=self.routes,
            served_id=served,
            drop=frozenset(table.get("drop", ())),
            paths={} if base == "/v1" else {route: base + route[3:] for route in self.routes if route.startswith("/v1/")},
            headers=(("Authorization", f"Bearer {grant.key}"),) if "key" in used else (),
            assembled=hears_late if cancel == "as-stream" else frozenset(),
            deaf=hears_late if cancel == "stream" else frozenset(),
        )

    def _first_request(self, model: str, base: str) -> Probe | None:
        bodies: dict[str, dict[str, object]] = {
            "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
            "/v1/completions": {"prompt": "Hi", "max_tokens": 1},
            "/v1/embeddings": {"input": "Hi"},
        }
        route = next((route for route in bodies if route in self.routes), None)
        if route is None:
            return None
        return Probe(base + route[3:], body=json.dumps({"model": model, **bodies[route]}).encode())
