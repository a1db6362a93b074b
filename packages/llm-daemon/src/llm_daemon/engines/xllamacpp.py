"""llama.cpp's HTTP server out of the Python package xllamacpp, in a host process of its own (`_xllamacpp_host.py`).

The package is found, but never imported by the daemon: importing maps 100 MB of native code.
"""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import UsageError
from ..spec import Spec
from . import _llamacpp
from .advisories import Advisory, llama_cpp
from .base import BAD_FLAG, Grant, Location, Missing, Plan
from .llama_server import _cpu_flags

HOST = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_xllamacpp_host.py")

# llama-server's flags that have a counterpart in CommonParams and are safe to pass on: flag -> (attribute, type).
_FLAGS: dict[str, tuple[str, Callable[[str], Any] | None]] = {
    "-b": ("n_batch", int),
    "--batch-size": ("n_batch", int),
    "-ub": ("n_ubatch", int),
    "--ubatch-size": ("n_ubatch", int),
    "--cache-ram": ("cache_ram_mib", int),
    "--cache-reuse": ("n_cache_reuse", int),
    "--chat-template": ("chat_template", str),
    "--context-shift": ("ctx_shift", None),
    "-kvu": ("kv_unified", None),
    "--kv-unified": ("kv_unified", None),
    "--no-mmproj": ("no_mmproj", None),
    "--slots": ("endpoint_slots", None),
    "--swa-full": ("swa_full", None),
}


def _has_libgomp() -> bool:
    """Whether the loader would find OpenMP: by a look into its cache, for `find_library` runs a program to ask it (ld.so(8))."""
    try:
        with open("/etc/ld.so.cache", "rb") as f:
            if b"libgomp.so.1\0" in f.read():
                return True
    except OSError:
        pass
    return ctypes.util.find_library("gomp") is not None


class Xllamacpp:
    """See base.Adapter."""

    name = "xllamacpp"
    license = "MIT"
    routes = _llamacpp.ROUTES
    options = _llamacpp.OPTIONS

    def locate(self, config: Mapping[str, Any]) -> Location | Missing:
        """The package as this Python sees it, unless it could not be loaded on this machine."""
        install = f'{sys.executable} -m pip install "llm-daemon[llamacpp]"'
        found = importlib.util.find_spec("xllamacpp")
        if found is None or not found.origin:
            return Missing("the Python package xllamacpp is not installed", install)
        if sys.platform == "linux" and not _has_libgomp():
            return Missing("the system library libgomp.so.1 is missing", "apt install libgomp1")
        if platform.machine() in ("x86_64", "AMD64") and (flags := _cpu_flags()) and "avx2" not in flags:
            return Missing("the CPU lacks avx2", "build llama-server for this machine and put it on PATH")
        try:
            version = importlib.metadata.version("xllamacpp")
        except importlib.metadata.PackageNotFoundError:
            version = "unknown"
        site = os.path.dirname(os.path.dirname(os.path.abspath(found.origin)))
        return Location((sys.executable, "-I", "-S", HOST, site), version, f"wheel xllamacpp {version}")

    def accepts(self, path: str) -> str | None:
        return _llamacpp.accepts(path)

    def refuse(self, args: Sequence[str]) -> str | None:
        """Only the flags of a short list are understood."""
        if reason := _llamacpp.refuse(args):
            return reason
        try:
            _settings(args)
        except UsageError as e:
            return e.message
        return None

    def diagnose(self, exit_status: int | None, last_words: str) -> tuple[str, str]:
        return _llamacpp.diagnose(exit_status, last_words)

    def weaknesses(self, version: str) -> list[Advisory]:
        return llama_cpp(version)

    def plan(self, spec: Spec, where: Location, grant: Grant) -> Plan:
        """The host gets everything as one JSON object: nothing is left to defaults that may change with a release."""
        saves = _llamacpp.keeps_prompts(grant)
        params: dict[str, Any] = {
            "model": grant.model_path,
            "hostnames": [grant.socket],
            "model_alias": [grant.alias],
            "n_ctx": grant.context * grant.parallel,
            "n_parallel": grant.parallel,
            "threads": grant.threads,
            "n_gpu_layers": grant.gpu_layers,
            "cache_ram_mib": _llamacpp.CACHE_RAM_MIB,
            "cont_batching": True,
            "cors_origins": "localhost",
            "endpoint_metrics": True,
            "endpoint_props": False,
            "endpoint_slots": False,
            "models_autoload": False,
            "offline": True,
            "reuse_port": False,
            "sleep_idle_seconds": -1,
            "ui": True,  # reached through /upstream/{model}/ alone, with the gateway's checks before it
            "ui_mcp_proxy": False,
            "use_jinja": True,
            "verbosity": 3,
            "warmup": True,
            "mode": grant.mode,
            "pooling": _llamacpp.pooling(grant),
            "n_batch": _llamacpp.batch(grant),
            "n_ubatch": _llamacpp.batch(grant),
            "draft": grant.draft,
            "mmproj": grant.mmproj,
            "lora": grant.lora,
            "slot_save_path": os.path.join(str(grant.prompts), "") if saves else None,  # it appends names as they are
            **_settings(grant.args),
        }
        argv = (*where.argv, json.dumps(params, separators=(",", ":")))
        return Plan(
            argv, grant.socket, slots=grant.parallel, assembled=_llamacpp.ASSEMBLED, confirms_hangup=True,
            saved_slots=grant.parallel if saves else 0,
        )  # fmt: skip


def _settings(args: Sequence[str]) -> dict[str, Any]:
    """CommonParams attributes that the flags mean.

    >>> _settings(["--swa-full", "--ubatch-size", "1024"])
    {'swa_full': True, 'n_ubatch': 1024}
    """
    values: dict[str, Any] = {}
    rest = iter(args)
    for arg in rest:
        flag, equals, value = arg.partition("=")
        if flag not in _FLAGS:
            raise UsageError(
                f"xllamacpp does not know {arg!r}", code=BAD_FLAG, hint="the engine llama-server takes more flags than xllamacpp"
            )
        attribute, kind = _FLAGS[flag]
        if kind is None:
            values[attribute] = True
            continue
        try:
            values[attribute] = kind(value if equals else next(rest))
        except (StopIteration, ValueError):
            raise UsageError(f"{flag} needs a value ({kind.__name__})", code=BAD_FLAG) from None
    return values
