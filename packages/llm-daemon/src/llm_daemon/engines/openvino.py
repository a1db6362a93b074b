"""OpenVINO Model Server, `ovms`: a folder with a model in OpenVINO's form and a graph.pbtxt that says how to serve it.

Facts: src/cli_parser.cpp, docs/llm/{quickstart,reference}.md and docs/parameters.md of OVMS (2025/26).  It takes no context:
the graph says how much cache it has.  By default it listens on all interfaces.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from ..spec import Spec
from . import _words
from .base import ADDRESS, BAD_FLAG, BAD_MODEL, MISSING_LIBRARY, OUT_OF_MEMORY, Grant, Location, Missing, Plan, Probe, Tcp

GRAPH = "graph.pbtxt"
MODEL = "model"  # what it calls the one that it serves
_HINT = (
    "curl -L https://github.com/openvinotoolkit/model_server/releases/latest/download/ovms_ubuntu24.tar.gz | tar xz, "
    "then put ovms/bin on PATH and ovms/lib on LD_LIBRARY_PATH (some 500 MB, Apache-2.0); "
    "models: ovms --pull, or its export_model.py"
)
_SYMPTOMS = (
    (BAD_FLAG, r"error parsing options"),
    (ADDRESS, r"at port .* (in use|cannot|failed)|[Aa]ddress already in use|Failed to start REST server|cannot bind"),
    (MISSING_LIBRARY, r"error while loading shared libraries|cannot open shared object file"),
    (OUT_OF_MEMORY, r"out of memory|bad_alloc|[Cc]annot allocate memory"),
    (
        BAD_MODEL,
        r"LLM node|[Gg]raph .*(failed|invalid|error)|Cannot (open|read|create)|LOADING_PRECONDITION_FAILED"
        r"|[Mm]odel .*(failed|not exist)",
    ),
)
_REFUSED = {
    flag: why
    for why, flags in {
        "the daemon owns its address": "--port --grpc_bind_address --rest_port --rest_bind_address --grpc_channel_arguments",
        "the daemon names the model": "--model_name --model_path --config_path",
        "the daemon's gateway does this": (
            "--allow_credentials --allowed_origins --allowed_methods --allowed_headers --api_key_file"
        ),
        "the daemon fetches models, engines stay offline": (
            "--pull --source_model --model_repository_path --gguf_filename --task --overwrite_models"
        ),
        "it loads a program into the engine": "--cpu_extension",
        "it lets requests read files": "--allowed_local_media_path",
        "it takes the log away": "--log_path --trace_path",
        "it ends without serving": "--help --version --list_models --add_to_config --remove_from_config",
    }.items()
    for flag in flags.split()
}


class OpenVino:
    """See base.Adapter."""

    name = "openvino"
    license = "Apache-2.0"
    routes = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/rerank"})

    def locate(self, config: Mapping[str, Any]) -> Location | Missing:
        given = config.get("path")
        path = os.path.abspath(os.path.expanduser(str(given))) if given else shutil.which("ovms")
        if path is None:
            return Missing(
                "no ovms (OpenVINO Model Server) on PATH; the Python package openvino-genai is a library without a server", _HINT
            )
        if not (os.path.isfile(path) and os.access(path, os.X_OK)):
            return Missing(f"{path} is not an executable file", "correct path in [engines.openvino]")
        version, error = _version(path, os.stat(path).st_mtime_ns)
        if error:
            return Missing(f"{path} does not run: {error}", _HINT)
        return Location((path,), version, "config" if given else "PATH")

    def accepts(self, path: str) -> str | None:
        if os.path.isfile(os.path.join(path, GRAPH)):
            return None
        if os.path.isfile(os.path.join(path, "openvino_model.xml")):
            return f"a model for OpenVINO without {GRAPH}: `ovms --pull` or export_model.py of OVMS writes it"
        return f"not a folder with {GRAPH} in it"

    def refuse(self, args: Sequence[str]) -> str | None:
        for flag in (arg.partition("=")[0] for arg in args if arg.startswith("-")):
            if reason := _REFUSED.get(flag):
                return f"{flag} is not passed on: {reason}"
        return None

    def plan(self, spec: Spec, where: Location, grant: Grant) -> Plan:
        return Plan(
            tuple(command(where.argv, grant, grant.host, str(grant.port), MODEL)),
            Tcp(grant.host, grant.port, rebinds=False),  # not known: the port is let go of right before the start
            probes=(Probe("/v2/health/ready"),), stall=300.0, slots=grant.parallel, served_id=MODEL,
            paths={route: "/v3" + route.removeprefix("/v1") for route in self.routes},
        )  # fmt: skip

    def diagnose(self, exit_status: int | None, last_words: str) -> tuple[str, str]:
        return _words.diagnose(exit_status, last_words, _SYMPTOMS)


def command(program: Sequence[str], grant: Grant, host: str, port: str, name: str) -> list[str]:
    """The command line.  `name`: what it calls the model; its own names may not have every character that an alias has."""
    return [
        *program, "--model_path", grant.model_path, "--model_name", name, "--rest_bind_address", host, "--rest_port", port,
        "--grpc_bind_address", host, "--file_system_poll_wait_seconds", "0", "--log_level", "INFO", *grant.args,
    ]  # fmt: skip


@functools.lru_cache(maxsize=8)
def _version(path: str, mtime: int) -> tuple[str, str]:
    """(version, "") or ("", why it does not even tell its version)."""
    try:
        done = subprocess.run(
            [path, "--version"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=5, text=True, errors="replace", check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "", "no answer to --version within 5 s"
    except OSError as e:
        return "", e.strerror or str(e)
    if done.returncode:
        return "", _words.diagnose(done.returncode, done.stdout, _SYMPTOMS)[1]
    found = re.search(r"OpenVINO Model Server (\S+)", done.stdout)
    return (found[1] if found else "unknown"), ""
