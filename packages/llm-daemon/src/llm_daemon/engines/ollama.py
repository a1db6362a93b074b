"""A model of a running Ollama, `ollama:NAME`: loaded when somebody wants it, unloaded through Ollama's own API when nobody does.

The engine process is `_ollama_host.py`; Ollama itself is not started, stopped or configured.  Facts: server/routes.go,
middleware/openai.go and server/sched.go of Ollama (2026).  How many tokens of context a model gets is Ollama's choice
(OLLAMA_CONTEXT_LENGTH, or the Modelfile): its OpenAI routes cannot say it, and load the model anew when it differs.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from ..spec import Spec
from . import _words
from .advisories import Advisory, fitting, number
from .base import ADDRESS, BAD_MODEL, CRASHED, OUT_OF_MEMORY, Grant, Location, Missing, Plan, Stop

HOST = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_ollama_host.py")
DEFAULT = "http://127.0.0.1:11434"
_INSTALL = "curl -fsSL https://ollama.com/install.sh | sh (some 2 GB with its GPU libraries, MIT), then: ollama serve"
_WEAKNESSES = (
    Advisory("CVE-2024-28224", "web pages reach its whole API by DNS rebinding", fixed=(0, 1, 29)),
    Advisory("CVE-2024-37032", "a crafted model name writes files anywhere, up to running code", fixed=(0, 1, 34)),
    Advisory("CVE-2026-7482", "a crafted GGUF file makes it read beyond its memory, and push what it read", fixed=(0, 17, 1)),
    Advisory("CVE-2026-7020", "digests that leave its folder", fixed=(0, 20, 3)),
)
_SYMPTOMS = (
    (ADDRESS, r"cannot listen on .*(in use|exists)"),
    (OUT_OF_MEMORY, r"requires more system memory|out of memory|insufficient memory"),
    (BAD_MODEL, r"error: model '.*' not found|not found, try pulling it|may be incompatible|unsupported|tokens of context"),
    (CRASHED, r"no Ollama answers|broke off|is no Ollama"),
)


class Ollama:
    """See base.Adapter.  `[engines.ollama] url` is where it answers, if not at 127.0.0.1:11434."""

    name = "ollama"
    license = "MIT"
    routes = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages"})

    def locate(self, config: Mapping[str, Any]) -> Location | Missing:
        """A server that listens; on this machine that is read in /proc, a foreign one is believed in."""
        url = str(config.get("url", DEFAULT)).rstrip("/")
        parts = urlsplit(url)
        try:
            host, port = parts.hostname, parts.port or 11434
        except ValueError:
            host, port = None, 0
        if parts.scheme != "http" or not host:
            return Missing(f"url {url!r} is not an http:// address", "correct url in [engines.ollama]")
        program = shutil.which("ollama")
        if host in ("127.0.0.1", "::1", "localhost") and listens(port) is False:
            return Missing(f"no Ollama listens at {url}", "ollama serve" if program else _INSTALL)
        version = _version(program, os.stat(program).st_mtime_ns) if program else "unknown"
        return Location((sys.executable, "-I", "-S", HOST, url), version, url)

    def accepts(self, path: str) -> str | None:
        """
        >>> Ollama().accepts("llama3.2:1b"), Ollama().accepts("/m.gguf")
        (None, 'not a model of Ollama (ollama:NAME)')
        """
        return None if _NAME.fullmatch(path) else "not a model of Ollama (ollama:NAME)"

    def refuse(self, args: Sequence[str]) -> str | None:
        return f"{args[0]} is not passed on: Ollama takes its settings from variables of its own" if args else None

    def plan(self, spec: Spec, where: Location, grant: Grant) -> Plan:
        """`slots` is how many requests are passed on at once; what Ollama itself serves at once is OLLAMA_NUM_PARALLEL."""
        argv = tuple(command(where.argv, spec, grant))
        return Plan(argv, grant.socket, stop=Stop(grace=4.0), stall=300.0, slots=grant.parallel, served_id=grant.model_path)

    def diagnose(self, exit_status: int | None, last_words: str) -> tuple[str, str]:
        """What the host says, without its name."""
        said = "\n".join(line.removeprefix("ollama host: ") for line in last_words.splitlines())
        kind, line = _words.diagnose(exit_status, said, _SYMPTOMS)
        return kind, line.removeprefix("error: ")

    def weaknesses(self, version: str) -> list[Advisory]:
        return fitting(_WEAKNESSES, number(version))


# registry/namespace/model:tag, of which only the model must be there (types/model/name.go).
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(?:/[\w][\w.-]*){0,3}(?::[\w][\w.-]*)?")


def command(program: Sequence[str], spec: Spec, grant: Grant) -> list[str]:
    """The host's command line; a context is asked for only where somebody wished for one."""
    argv = [*program, grant.model_path, grant.socket]
    return argv if spec.wish.context is None else [*argv, str(grant.context)]


def listens(port: int, proc: str = "/proc/net") -> bool | None:
    """Whether anybody listens on that TCP port, as /proc/net/tcp{,6} says (proc(5)); None where it does not say."""
    known = None
    for name in ("tcp", "tcp6"):
        try:
            with open(os.path.join(proc, name)) as f:
                lines = [line.split() for line in f]
        except OSError:
            continue
        known = False
        for words in lines[1:]:
            if len(words) > 3 and words[3] == "0A" and words[1].endswith(f":{port:04X}"):
                return True
    return known


@functools.lru_cache(maxsize=8)
def _version(program: str, mtime: int) -> str:
    """Of the running server, if the program reached it, else of the program (cmd/cmd.go, versionHandler)."""
    try:
        done = subprocess.run(
            [program, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=5,
            text=True,
            errors="replace",
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    found = re.search(r"ollama version is (\S+)", done.stdout) or re.search(r"client version is (\S+)", done.stdout)
    return found[1] if found else "unknown"
