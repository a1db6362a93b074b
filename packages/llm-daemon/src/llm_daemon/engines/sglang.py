"""SGLang's server: `python -m sglang.launch_server` on a folder with a Hugging Face model, or on a GGUF file.

Facts: python/sglang/srt/{server_args.py,entrypoints/http_server.py,managers/tokenizer_manager.py} of SGLang 0.5.23.  It takes a
key only on its command line, where everybody could read it: none is given.  It reserves its memory as a share of the device
(`--mem-fraction-static`), whatever the model needs.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..spec import Spec
from . import _llamacpp, _python, _words
from .base import BAD_MODEL, OUT_OF_MEMORY, Grant, Location, Missing, Plan, Probe, Stop, Tcp

_HINT = (
    "on a machine with an NVIDIA GPU: python -m pip install sglang (with PyTorch for CUDA some 10 GB, Apache-2.0); "
    "or set path in [engines.sglang] to the Python of an environment that has it"
)
# What the drivers of NVIDIA and AMD make; its wheels compute on nothing else.
DEVICES = ("/dev/nvidiactl", "/dev/kfd")
EMBEDDING = frozenset({"/v1/embeddings", "/v1/rerank"})
_SYMPTOMS = (
    (OUT_OF_MEMORY, r"Not enough memory|Please try to increase --mem-fraction-static|out of memory"),
    (
        BAD_MODEL,
        r"is not supported for now|Unrecognized model in|does not appear to have a file named|SafetensorError"
        r"|Cannot find any model weights",
    ),
)
_REFUSED = {
    flag: why
    for why, flags in {
        "the daemon owns its address": "--host --port --fastapi-root-path --nccl-port --dist-init-addr --nnodes --node-rank",
        "the daemon names the model": "--model --model-path --served-model-name",
        "everybody could read it in the list of processes": "--api-key --admin-api-key",
        "use context": "--context-length",
        "use parallel": "--max-running-requests",
        "it runs code that comes with the model": "--trust-remote-code",
        "the daemon says what it is started with": "--config",
        "it writes what clients ask, or where it is told, to disk": "--log-requests --crash-dump-folder --file-storage-path",
        "engines stay offline": "--download-dir --revision",
        "it lets requests run programs or reach other machines": (
            "--tool-server --grpc-mode --remote-instance-weight-loader-seed-instance-ip"
        ),
        "unloading ends the process": "--enable-memory-saver",
    }.items()
    for flag in flags.split()
}


class Sglang:
    """See base.Adapter."""

    name = "sglang"
    license = "Apache-2.0"
    routes = frozenset(
        {
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/embeddings",
            "/v1/responses",
            "/v1/messages",
            "/v1/messages/count_tokens",
            "/v1/rerank",
        }
    )

    def locate(self, config: Mapping[str, Any]) -> Location | Missing:
        found = _python.locate(config, "sglang", "sglang", ("sglang",), _HINT)
        if isinstance(found, Missing):
            return found
        if not any(map(os.path.exists, DEVICES)):
            return Missing(f"sglang {found.version} is here, but no GPU is ({' or '.join(DEVICES)})", _HINT)
        return replace(found, argv=(*found.argv, "-m", "sglang.launch_server"))

    def accepts(self, path: str) -> str | None:
        """A GGUF file, or a folder with config.json and safetensors."""
        if path.lower().endswith(".gguf"):
            return _llamacpp.accepts(path)
        if not os.path.isfile(os.path.join(path, "config.json")):
            return "neither a GGUF file nor a folder with config.json in it"
        if not glob.glob(os.path.join(glob.escape(path), "*.safetensors")):
            return "a folder without *.safetensors: other formats run code when they are read"
        return None

    def refuse(self, args: Sequence[str]) -> str | None:
        """
        >>> Sglang().refuse(["--mem-fraction-static", "0.5"]), Sglang().refuse(["--trust-remote-code"])
        (None, '--trust-remote-code is not passed on: it runs code that comes with the model')
        """
        return _python.refuse(args, {}, _REFUSED)

    def plan(self, spec: Spec, where: Location, grant: Grant) -> Plan:
        """With `--is-embedding` among the user's flags it embeds and ranks, else it generates."""
        embeds = "--is-embedding" in grant.args
        return Plan(
            tuple(command(where.argv, spec, grant, grant.host, str(grant.port))), Tcp(grant.host, grant.port),
            env={"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
            # /health computes a token and takes a second; older releases have no /ready.
            probes=(Probe("/ready"), Probe("/health")),
            # It drains without end, and looks every 5 s whether it was told to stop; killed, it may leave memory on the GPU.
            stop=Stop(grace=8.0, request=Probe("/abort_request", body=b'{"abort_all": true}')), stall=300.0, slots=grant.parallel,
            # It looks for a hang-up each 4 s, for streams at each chunk.
            assembled=frozenset({"/v1/chat/completions", "/v1/completions"}),
            routes=EMBEDDING if embeds else self.routes - EMBEDDING,
        )  # fmt: skip

    def diagnose(self, exit_status: int | None, last_words: str) -> tuple[str, str]:
        return _words.diagnose(exit_status, last_words, _SYMPTOMS)


def command(program: Sequence[str], spec: Spec, grant: Grant, host: str, port: str) -> list[str]:
    """The command line."""
    argv = [*program, "--model-path", grant.model_path, "--served-model-name", grant.alias, "--host", host, "--port", port]
    argv += ["--max-running-requests", str(grant.parallel)]
    if spec.wish.context is not None:  # by default what the model was made for
        argv += ["--context-length", str(grant.context)]
    if grant.model_path.lower().endswith(".gguf"):
        argv += ["--load-format", "gguf"]
    return [*argv, *grant.args]
