"""A server application that does as it is told: its "model file" is a scenario, a JSON object in a `*.fake.json`.

In a daemon: `[engines.fake] adapter = "llm_daemon.testing.fake_engine:FakeEngine"`.  Keys of a scenario, all optional:

| key | meaning |
| --- | --- |
| `load_seconds`, `while_loading` | loads that long; meanwhile answers `"503"` (default) or does not listen (`"refuse"`); \
`"ready"`: says it is ready and loads in its first request |
| `load_until` | path of a file: loads until it is there |
| `tcp` | listens on TCP: `true`; `"no reuse"`: without a reuse option; `"port 0"`: at a port that it chooses and tells |
| `port_taken` | `"hang"`: says so and lives on when its address is taken |
| `port_taken_once` | path of a file that the first process makes, which then ends as if its address was taken |
| `last_request` | path that is asked before SIGTERM |
| `guarded` | wants a key with each request |
| `strict_model` | answers 404 to a request whose `model` is not its alias |
| `routes` | list of the only POST routes that it has |
| `silent` | writes no log while loading and serving |
| `load_noise_ms` | a log line every so often while it loads |
| `load_burns_cpu` | computes all the time while it loads |
| `never_ready` | loads for ever |
| `hang` | accepts connections and never answers |
| `crash_while_loading`, `exit_code` | ends after `load_seconds` with this line on stderr and this status (1) |
| `gives_up` | after that line it lives on and never answers |
| `kill_self_while_loading` | ends after `load_seconds` by this signal number |
| `tokens` | what it says: list of strings, or how many to make up |
| `token_ms`, `first_token_ms` | time before each token, and before the first one in addition |
| `tokens_until` | path of a file: between the first token and the second it waits until that is there |
| `token_burns_cpu` | computes in that time |
| `crash_after_tokens` | dies by SIGABRT when a request has had that many |
| `stuck_after_tokens` | a request that has had that many waits for ever; health stays fine |
| `stuck_once` | path of a file that the first process to get stuck makes: no later one does |
| `ignores_disconnect` | goes on for clients that hung up: `true`, or `"nonstream"` as llama-server under load; \
`"deaf"` is the same, and the plan says so instead of asking for streams |
| `ignore_sigterm` | only SIGKILL ends it |
| `stop_seconds` | SIGTERM ends it only after that long; a second SIGTERM at once, with status 1 |
| `grandchild` | leaves its tree with a double-forked, setsid'ed process that ignores SIGTERM; `"scrubbed"`: without environment |
| `error_status` | answers each completion with that HTTP status |
| `echo` | says the words of the last user message or prompt instead of `tokens` |
| `memory_bytes` | the adapter says that it needs so much (not given: it cannot tell) |
| `allocates` | takes so many bytes while loading, and `allocates_later` more with its first request |
| `stall`, `grace` | seconds, for the plan: see `engines.base.Plan` and `Stop` |

Its log on stderr tells what happens, one event a line: `listening`, `ready`, `grandchild PID`, `request N begin PATH`,
`request N slot`, `request N end`, `request N disconnected`, `sigterm`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..engines.base import ADDRESS, BAD_MODEL, CRASHED, OUT_OF_MEMORY, Grant, Location, Missing, Plan, Probe, Stop, Tcp
from ..spec import Spec

SERVER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_fake_server.py")
SUFFIX = ".fake.json"
STREAMS = frozenset({"/v1/chat/completions", "/v1/completions", "/completion", "/infill"})


class FakeEngine:
    """See engines.base.Adapter.  `[engines.fake] path = ...` that does not exist makes it missing."""

    name = "fake"
    license = "Apache-2.0"
    routes = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/completion", "/infill", "/tokenize"})

    def __init__(self, stall: float = 120.0, grace: float = 2.0) -> None:
        self.stall, self.grace = stall, grace

    def locate(self, config: Mapping[str, Any]) -> Location | Missing:
        path = str(config.get("path", SERVER))
        if not os.path.exists(path):
            return Missing(f"{path} does not exist", "nothing helps: this engine is for tests")
        return Location((sys.executable, "-I", "-S", path), "1", "llm_daemon.testing")

    def accepts(self, path: str) -> str | None:
        return None if path.endswith(SUFFIX) else f"not a scenario (*{SUFFIX})"

    def refuse(self, args: Sequence[str]) -> str | None:
        return next((f"{arg} is not passed on: the daemon owns it" for arg in args if arg in ("--socket", "--alias")), None)

    def plan(self, spec: Spec, where: Location, grant: Grant) -> Plan:
        with open(grant.model_path) as f:
            scenario = json.load(f)
        way = scenario.get("tcp")
        address: str | Tcp = grant.socket
        if way:
            told = r"listening on http://[\d.]+:(\d+)" if way == "port 0" else ""
            address = Tcp(grant.host, 0 if told else grant.port, rebinds=way != "no reuse", told=told)
        argv = (
            *where.argv,
            grant.model_path,
            *(("--host", address.host, "--port", str(address.port)) if isinstance(address, Tcp) else ("--socket", address)),
            "--alias",
            grant.alias,
            "--slots",
            str(grant.parallel),
            "--context",
            str(grant.context),
            *grant.args,
        )
        late, guarded = scenario.get("ignores_disconnect"), bool(scenario.get("guarded"))
        chat = Probe("/v1/completions", body=json.dumps({"model": grant.alias, "prompt": "Hi", "max_tokens": 1}).encode())
        only, last = scenario.get("routes"), scenario.get("last_request")
        return Plan(
            argv, address, slots=grant.parallel, stall=scenario.get("stall", self.stall),
            env={"FAKE_ENGINE_KEY": grant.key} if guarded else {},
            headers=(("Authorization", f"Bearer {grant.key}"),) if guarded else (),
            fatal="(?m)^error: " if scenario.get("gives_up") else "", probes=(Probe(guarded=guarded),),
            warm_up=chat if scenario.get("while_loading") == "ready" else None,
            stop=Stop(scenario.get("grace", self.grace), Probe(last) if last else None),
            assembled=STREAMS if late == "nonstream" else frozenset(),
            deaf=STREAMS if late == "deaf" else frozenset(), confirms_hangup=late is not True,
            served_id=grant.alias if scenario.get("strict_model") else None, routes=None if only is None else frozenset(only),
        )  # fmt: skip

    def memory(self, spec: Spec, grant: Grant) -> int | None:
        with open(grant.model_path) as f:
            told: int | None = json.load(f).get("memory_bytes")
        return told

    def diagnose(self, exit_status: int | None, last_words: str) -> tuple[str, str]:
        lines = [line for line in last_words.splitlines() if line.startswith("error: ")]
        line = lines[-1].removeprefix("error: ") if lines else f"ended with {exit_status}"
        for kind, sign in ((ADDRESS, "address in use"), (BAD_MODEL, "bad model"), (OUT_OF_MEMORY, "out of memory")):
            if sign in line.lower():
                return kind, line
        return CRASHED, line
