"""The engine host: xllamacpp's server in a process of its own.

Run as `python -I -S _xllamacpp_host.py SITE PARAMS`: the folder that holds the package, and a JSON object of
CommonParams attributes (`model` is a path, `threads` goes to both thread pools, None leaves a value alone).
Ends with 3 if the package cannot be loaded, 4 if it does not take a parameter, 5 if the server did not start (its own
log says why).  No signal handler on purpose: SIGTERM ends it at once, also in the middle of a generation.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import Any, NoReturn

# Without one of these it would listen elsewhere, serve something else, or reach out; the others only tune.
VITAL = ("hostnames", "model_alias", "n_ctx", "n_parallel", "offline")


def fail(code: int, text: str) -> NoReturn:
    print(f"xllamacpp host: error: {text}", file=sys.stderr, flush=True)
    sys.exit(code)


def choose(common: Any, params: dict[str, Any]) -> None:
    """What it is loaded for, and with: parts that are objects of their own."""
    import xllamacpp

    common.embedding = params.pop("mode", "generate") != "generate"
    if pooling := params.pop("pooling", None):
        common.pooling_type = getattr(xllamacpp.llama_pooling_type, f"LLAMA_POOLING_TYPE_{pooling.upper()}")
    if mmproj := params.pop("mmproj", None):
        common.mmproj.path = mmproj
    if draft := params.pop("draft", None):
        common.speculative.draft.mparams.path = draft
        common.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
    if lora := params.pop("lora", None):
        common.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, scale) for path, scale in lora]


def configure(common: Any, params: dict[str, Any]) -> None:
    """Sets each parameter; one that this release lacks is only noted, unless it is vital."""
    common.model.path = params.pop("model")
    threads = params.pop("threads")
    # Read-modify-write: the getters may hand out copies.
    for name in ("cpuparams", "cpuparams_batch"):
        pool = getattr(common, name)
        pool.n_threads = threads
        setattr(common, name, pool)
    try:
        choose(common, params)
    except (AttributeError, TypeError, ValueError) as e:
        fail(4, f"this xllamacpp cannot load the model so: {e}")
    params["model_alias"] = set(params["model_alias"])
    for name, value in params.items():
        if value is None:
            continue
        try:
            setattr(common, name, value)
        except (AttributeError, TypeError, ValueError) as e:
            if name in VITAL:
                fail(4, f"this xllamacpp does not take {name}={value!r}: {e}")
            print(f"xllamacpp host: {name} is not known to this release", file=sys.stderr, flush=True)


def main(site: str, text: str) -> None:
    sys.path.append(site)
    try:
        import xllamacpp
    except Exception as e:
        fail(3, f"{type(e).__name__}: {e}")
    common = xllamacpp.CommonParams()
    configure(common, json.loads(text))
    try:
        server = xllamacpp.Server(common)  # returns when the model is loaded
    except Exception as e:
        fail(5, str(e))
    while server:  # it works in threads of its own; keep it and its parameters alive
        signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
