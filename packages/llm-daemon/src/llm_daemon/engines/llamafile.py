"""llamafile: llama.cpp's server in one file for all systems, weights inside or beside it.

Facts: docs/cli_arguments.md, docs/security.md and llamafile/{main,args}.cpp of llamafile 0.10.3.  Without `--server` it opens
a chat in the terminal.  A file in APE format is started by /bin/sh: execve(2) does not know it (ENOEXEC).
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UsageError
from ..spec import Spec
from . import _llamacpp
from ._llamafile_zip import APE, Contents, look, runnable
from .advisories import Advisory, fitting, number
from .base import BAD_MODEL, Grant, Location, Missing, Plan, Probe, Tcp

_HINT = (
    "a .llamafile with weights in it needs nothing more: llm-daemon run /path/to/it.llamafile; for GGUF files get the runtime "
    "(some 300 MB, Apache-2.0) from https://github.com/mozilla-ai/llamafile/releases: "
    "install -m 755 llamafile-* ~/.local/bin/llamafile"
)
_OLD = (
    Advisory(
        "CVE-2025-53630",
        "0.9 and earlier carry a llama.cpp of 2025 or before, whose GGUF reader a crafted file can make overwrite memory",
        fixed=(0, 10),
        blunted="GGUF headers are checked before, those inside a llamafile are not",
    ),
)
# Reasons of _llamacpp.refuse that an author's own arguments may have: the daemon's come after them and win.
_HARMLESS = ("the daemon owns its address", "the daemon names the model", "set by the daemon", "web page")
_WRAPPER = {
    "--chat": "it opens a chat in the terminal",
    "--cli": "it answers once and ends",
    "--unsecure": "it takes the engine's sandbox away",
    "--server": "the daemon passes it",
    "--gpu": "use gpu_layers=0 for the CPU alone",
    "--v2": "the server of llamafile 0.9 under that name has other flags and routes",
}


class Llamafile:
    """See base.Adapter."""

    name = "llamafile"
    license = "Apache-2.0"
    routes = _llamacpp.ROUTES

    def locate(self, config: Mapping[str, Any]) -> Location | Missing:
        """The runtime, for GGUF files: the configured path, or PATH.  What a model file brings along, `inside` finds."""
        if given := config.get("path"):
            path = os.path.abspath(os.path.expanduser(str(given)))
            if not os.path.isfile(path):
                return Missing(f"{path} is not a file", "correct path in [engines.llamafile]")
            return _located(path, "config")
        if found := shutil.which("llamafile"):
            return _located(os.path.abspath(found), "PATH")
        return Missing("no llamafile on PATH to load GGUF files with", _HINT)

    def inside(self, path: str, asks: bool = True) -> Location | None:
        """The engine that a model file carries itself; None if it carries none.  It is run for its version if it may be asked."""
        try:
            contents = look(path)
        except OSError:
            return None
        if isinstance(contents, str) or contents.model is None:
            return None
        if not asks:
            return Location((path,), "unknown", "the model file itself")
        where = _located(path, "the model file itself", contents)
        return where if isinstance(where, Location) else None

    def accepts(self, path: str) -> str | None:
        """A GGUF file, or a llamafile that has weights in it, may be executed, and adds no dangerous argument."""
        reason = _llamacpp.accepts(path)
        if reason is None or reason.startswith(("cannot read", "a later part")):
            return reason
        contents = look(path)
        if isinstance(contents, str):
            return f"neither a GGUF file nor a llamafile: {contents}"
        if contents.model is None:
            return "a llamafile without weights in it: name it as path in [engines.llamafile], and a .gguf file as the model"
        return runnable(path) or _dangerous(contents.args)

    def refuse(self, args: Sequence[str]) -> str | None:
        for arg in args:
            if reason := _WRAPPER.get(arg.partition("=")[0]):
                return f"{arg.partition('=')[0]} is not passed on: {reason}"
        return _llamacpp.refuse(args)

    def diagnose(self, exit_status: int | None, last_words: str) -> tuple[str, str]:
        """As llama.cpp's; and /bin/sh's own complaints about a file it cannot start."""
        if found := re.search(
            r"^.*(run-detectors: unable|Exec format error|cannot execute binary file).*$", last_words, re.MULTILINE
        ):
            return BAD_MODEL, f"{found[0].strip()} (APE files need no binfmt handler, or Cosmopolitan's own)"
        return _llamacpp.diagnose(exit_status, last_words)

    def plan(self, spec: Spec, where: Location, grant: Grant) -> Plan:
        """From 0.10 on it checks a key; before, there is nothing but the port that nobody else was told."""
        keyed = number(where.version) >= (0, 10)
        known = flags(where.argv, _mtime(where.argv[-1]))
        return Plan(
            tuple(command(where.argv, grant, grant.host, str(grant.port), known)), Tcp(grant.host, grant.port),
            # Its own configuration file is looked for below XDG_CONFIG_HOME: in the private folder there is none.
            env={"XDG_CONFIG_HOME": ".", **({"LLAMA_API_KEY": grant.key} if keyed else {})},
            headers=(("Authorization", f"Bearer {grant.key}"),) if keyed else (),
            # /health is open to everybody, so it would not show that the key is checked.
            probes=(Probe("/v1/models", guarded=True) if keyed else Probe(),),
            slots=grant.parallel, assembled=_llamacpp.ASSEMBLED,
        )  # fmt: skip

    def weaknesses(self, version: str) -> list[Advisory]:
        return fitting(_OLD, number(version))


def command(program: Sequence[str], grant: Grant, host: str, port: str, known: frozenset[str]) -> list[str]:
    """The command line.  `known` are the long flags of this build: 0.9 lacks some, 0.10 has no --nobrowser."""
    contents = None if _llamacpp.accepts(grant.model_path) is None else look(grant.model_path)
    if isinstance(contents, str):
        raise UsageError(contents, code=BAD_MODEL)
    # Given always: arguments that come without `...` are dropped as soon as there are others.
    model = grant.model_path if contents is None else f"/zip/{contents.model}"
    argv = [*program, "--server", "-m", model, "--host", host, "--port", port, "-a", grant.alias]
    argv += ["-c", str(grant.context * grant.parallel), "-np", str(grant.parallel), "-t", str(grant.threads)]
    if grant.gpu_layers is not None:
        argv += ["-ngl", str(grant.gpu_layers)]
    if grant.gpu_layers == 0:
        argv += ["--gpu", "disable"]  # with a GPU's library loaded, it goes without its sandbox (docs/security.md)
    for flag, value in (
        ("--threads-batch", str(grant.threads)),
        ("--nobrowser", None),
        ("--offline", None),
        ("--cache-ram", str(_llamacpp.CACHE_RAM_MIB)),
        ("--cors-origins", "localhost"),
        ("--metrics", None),
        ("--no-slots", None),
    ):
        if flag in known:
            argv += [flag] if value is None else [flag, value]
    return [*argv, *grant.args]


def _dangerous(args: Sequence[str]) -> str | None:
    """Why the arguments inside a llamafile are not run, or None."""
    if "--unsecure" in args:
        return "its own arguments have --unsecure: it would run without its sandbox"
    for arg in args:
        reason = _llamacpp.refuse([arg])
        if reason and not any(harmless in reason for harmless in _HARMLESS):
            return f"its own arguments: {reason}"
    return None


def _located(path: str, origin: str, contents: Contents | None = None) -> Location | Missing:
    try:
        with open(path, "rb") as f:
            ape = contents.ape if contents else f.read(len(APE)) == APE
    except OSError as e:
        return Missing(f"{path} cannot be read: {e.strerror}", _HINT)
    argv = ("/bin/sh", path) if ape else (path,)
    mtime = _mtime(path)
    version = _version(argv, mtime)
    if version is None:
        return Missing(f"{path} does not tell its version within 5 s", f"try it: {' '.join(argv)} --version; {_HINT}")
    flags(argv, mtime)  # remembered for `plan`, which must not block
    return Location(argv, version, origin)


def _mtime(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


@functools.lru_cache(maxsize=64)
def _version(argv: tuple[str, ...], mtime: int) -> str | None:
    found = re.search(r"llamafile v?(\d+\.\d+\.\d+\S*)", _ask(argv, "--version"))
    return found[1] if found else None


@functools.lru_cache(maxsize=64)
def flags(argv: tuple[str, ...], mtime: int) -> frozenset[str]:
    """The long flags this build knows in its server mode."""
    return frozenset(re.findall(r"--[a-z][a-z0-9-]+", _ask(argv, "--server", "--help")))


def _ask(argv: tuple[str, ...], *flags: str) -> str:
    """What it says; empty if it does not end within 5 s or cannot be run."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LLAMA_", "LLAMAFILE_"))}
    try:
        done = subprocess.run(
            [*argv, *flags],
            env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=5, text=True, errors="replace", check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
