"""Apple's mlx-lm: `python -m mlx_lm server`, for safetensors; on Macs with Metal, elsewhere slowly with mlx[cpu].

Facts: mlx_lm/server.py of 0.32.  It says 200 before it has loaded anything, hangs when its port is taken, and hears a hang-up
in streams alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..spec import Spec
from . import _python, _words
from .base import Grant, Location, Missing, Plan, Probe, Tcp

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_ADDRESS = "the daemon owns its address"
_REFUSED = {
    "--host": _ADDRESS,
    "--port": _ADDRESS,
    "--allowed-origins": "the daemon's gateway does this",
    "--trust-remote-code": "it runs programs that come with a model",
    "--adapter-path": "the daemon names the model",
    "--log-level": "the daemon reads its log",
    "-h": "it ends without serving",
    "--help": "it ends without serving",
}


class MlxLm:
    """See base.Adapter."""

    name = "mlx-lm"
    license = "MIT"
    routes = frozenset({CHAT, COMPLETIONS})

    def locate(self, config: Mapping[str, Any]) -> Location | Missing:
        install = (
            'pip install mlx-lm (on Linux also "mlx[cpu]"), about 350 MB; then set path in [engines.mlx-lm] if it is elsewhere'
        )
        return _python.locate(config, "mlx_lm.server", "mlx_lm", ("mlx-lm",), install)

    def accepts(self, path: str) -> str | None:
        return _python.accepts(path)

    def refuse(self, args: Sequence[str]) -> str | None:
        return _python.refuse(args, {"--model": "the model spec"}, _REFUSED)

    def diagnose(self, exit_status: int | None, last_words: str) -> tuple[str, str]:
        return _words.diagnose(exit_status, last_words)

    def plan(self, spec: Spec, where: Location, grant: Grant) -> Plan:
        """Its id for the model is the path, and it would look on the hub for any other.

        It loads in a thread: when that fails, the server lives on and never answers.  Its list of models wants a hub cache.
        """
        argv = (
            *where.argv, "-m", "mlx_lm", "server", "--model", grant.model_path, "--host", grant.host, "--port", str(grant.port),
            "--log-level", "INFO", *grant.args,
        )  # fmt: skip
        first = {"model": grant.model_path, "prompt": "Hi", "max_tokens": 1}
        return Plan(
            argv, Tcp(grant.host, grant.port), env={"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": ".", "PYTHONUNBUFFERED": "1"},
            warm_up=Probe(COMPLETIONS, body=json.dumps(first).encode()), fatal="Exception in thread", served_id=grant.model_path,
            deaf=frozenset({CHAT, COMPLETIONS}), slots=grant.parallel,
        )  # fmt: skip
