"""MLC-LLM's server: `python -m mlc_llm serve` on a folder with mlc-chat-config.json.

Facts: python/mlc_llm/{cli,interface}/serve.py, serve/entrypoints, serve/engine_base.py and support/ of mlc-llm at 78b6cdb
(2026).  It listens only when the model is loaded, and compiles the model's library the first time, which takes minutes.
It takes a key only on its command line, where everybody could read it: none is given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..spec import Spec
from . import _python, _words
from .base import BAD_MODEL, OUT_OF_MEMORY, Grant, Location, Missing, Plan, Probe, Stop, Tcp

CONFIG = "mlc-chat-config.json"
# Names of the wheels on MLC's own index; what other indexes have under these names is empty.
_WHEELS = ("mlc-llm", "mlc-llm-cpu", "mlc-llm-nightly-cpu", "mlc-llm-cu128", "mlc-llm-nightly-cu128", "mlc-llm-rocm62")
_HINT = (
    "install MLC-LLM's own wheels, for CPU or CUDA, as https://llm.mlc.ai/docs/install/mlc_llm.html says (some GB, Apache-2.0); "
    "or set path in [engines.mlc-llm] to the Python of an environment that has it"
)
_LOCAL_BATCH = 4  # requests at once in its mode `local`, without compiling anew
_SYMPTOMS = (
    (BAD_MODEL, r"Cannot find model |Cannot find .*mlc-chat-config\.json|`model_lib` you passed in is not a file"),
    (BAD_MODEL, r"Cannot find compilation output|tensor-cache\.json|ndarray-cache\.json|ValidationError"),
    (OUT_OF_MEMORY, r"Insufficient GPU memory"),
)
_REFUSED = {
    flag: why
    for why, flags in {
        "the daemon owns its address": "--host --port",
        "everybody could read it in the list of processes": "--api-key",
        "the daemon's gateway does this": "--allow-credentials --allow-origins --allow-methods --allow-headers",
        "it opens routes that stop the engine and read its memory": "--enable-debug --enable-tracing",
        "one engine process serves one model": "--additional-models --embedding-model --embedding-model-lib",
        "use parallel": "--mode",
    }.items()
    for flag in flags.split()
}
_OWNED = {"max_num_sequence": "parallel", "context_window_size": "context", "max_total_seq_length": "context and parallel"}


class MlcLlm:
    """See base.Adapter."""

    name = "mlc-llm"
    license = "Apache-2.0"
    routes = frozenset({"/v1/chat/completions", "/v1/completions"})

    def locate(self, config: Mapping[str, Any]) -> Location | Missing:
        found = _python.locate(config, "mlc_llm", "mlc_llm", _WHEELS, _HINT)
        return found if isinstance(found, Missing) else replace(found, argv=(*found.argv, "-m", "mlc_llm", "serve"))

    def accepts(self, path: str) -> str | None:
        """A folder with MLC's configuration and at least one list of its weights."""
        if not os.path.isfile(os.path.join(path, CONFIG)):
            return f"not a folder with {CONFIG} in it"
        try:
            with open(os.path.join(path, CONFIG), "rb") as f:
                json.load(f)
        except (OSError, ValueError) as e:
            return f"its {CONFIG} cannot be read: {e}"
        if not any(os.path.isfile(os.path.join(path, name)) for name in ("tensor-cache.json", "ndarray-cache.json")):
            return "its tensor-cache.json is missing: the weights are not all here"
        return None

    def refuse(self, args: Sequence[str]) -> str | None:
        """
        >>> MlcLlm().refuse(["--device", "cuda:0"]), MlcLlm().refuse(["--overrides=context_window_size=8192"])
        (None, 'context_window_size is set by the daemon: use context')
        """
        if reason := _python.refuse(args, {}, _REFUSED):
            return reason
        for override in _overrides(args)[0]:
            if option := _OWNED.get(override.partition("=")[0]):
                return f"{override.partition('=')[0]} is set by the daemon: use {option}"
        return None

    def plan(self, spec: Spec, where: Location, grant: Grant) -> Plan:
        return Plan(
            tuple(command(where.argv, spec, grant, grant.host, str(grant.port))), Tcp(grant.host, grant.port),
            env={"MLC_DOWNLOAD_CACHE_POLICY": "OFF"},  # engines stay offline
            probes=(Probe("/v1/models"),),  # it has no /health
            # uvicorn waits for open answers without end, and takes a second SIGTERM for the first.
            stop=Stop(grace=0.9), stall=300.0, slots=grant.parallel,
            served_id=grant.model_path,  # it has no other name, and puts into answers whatever was asked for
            drop=frozenset({"user"}),  # it takes this for the request's id: two of one user would be one
        )  # fmt: skip

    def diagnose(self, exit_status: int | None, last_words: str) -> tuple[str, str]:
        return _words.diagnose(exit_status, last_words, _SYMPTOMS)


def command(program: Sequence[str], spec: Spec, grant: Grant, host: str, port: str) -> list[str]:
    """The command line.

    Every override of a size that is part of the compiled library makes it compile anew, so one is given only where somebody
    asked for more than the model's own values.
    """
    own, args = _overrides(grant.args)
    sizes = []
    if grant.parallel > _LOCAL_BATCH:
        sizes.append(f"max_num_sequence={grant.parallel}")
    if spec.wish.context is not None:
        sizes += [f"context_window_size={grant.context}", f"max_total_seq_length={grant.context * grant.parallel}"]
    argv = [*program, grant.model_path, "--mode", "interactive" if grant.parallel == 1 else "local"]
    argv += ["--host", host, "--port", port, "--allow-origins", "[]"]  # its default is "*"
    if overrides := ";".join(sizes + own):
        argv += ["--overrides", overrides]
    return argv + args


def _overrides(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the user's overrides, the other arguments).

    >>> _overrides(["--opt", "O3", "--overrides", "gpu_memory_utilization=0.5;prefill_chunk_size=1024"])
    (['gpu_memory_utilization=0.5', 'prefill_chunk_size=1024'], ['--opt', 'O3'])
    """
    overrides: list[str] = []
    rest: list[str] = []
    given = iter(args)
    for arg in given:
        flag, equals, value = arg.partition("=")
        if flag == "--overrides":
            overrides += filter(None, (value if equals else next(given, "")).split(";"))
        else:
            rest.append(arg)
    return overrides, rest
