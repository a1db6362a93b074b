"""What llama.cpp's server is like, whether as a program (`llama_server.py`) or as a library (`xllamacpp.py`)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..models.gguf import purpose
from ..spec import EMBEDDING, GENERATE, RERANK, SPECIAL
from ._words import SIGNALS
from .base import ADDRESS, BAD_FLAG, BAD_MODEL, CRASHED, MISSING_LIBRARY, OUT_OF_MEMORY, Grant

# tools/server/README.md; routes for another kind of model (embeddings, rerank, audio) answer 501.
ROUTES = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/rerank",
        "/v1/audio/transcriptions",
        "/completion",
        "/infill",
        "/tokenize",
        "/detokenize",
        "/apply-template",
    }
)

# It looks for a hang-up when a result of this request comes, or when a second passed without any request's result
# (server-queue.cpp): so only streams are let go of at once.
ASSEMBLED = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/completion", "/infill"})

OPTIONS = SPECIAL

# An input to be embedded or ranked must fit into one physical batch (server-context.cpp); the server's own is 512 tokens.
MOST_BATCH = 4096


def batch(grant: Grant) -> int | None:
    """Tokens in one batch where that has to be said."""
    return None if grant.mode == GENERATE else min(grant.context, MOST_BATCH)


def pooling(grant: Grant) -> str | None:
    """How the vectors of all tokens become one, where the model does not say it itself: one that writes has no such thing."""
    if grant.mode == RERANK:
        return "rank"
    return "mean" if grant.mode == EMBEDDING and purpose(grant.model_path) == GENERATE else None


def keeps_prompts(grant: Grant) -> bool:
    """Whether its slots can be saved: of a text model alone (the server refuses it beside a projector)."""
    return grant.prompts is not None and grant.mode == GENERATE and not grant.mmproj


# MiB of host memory for prompts of past conversations; the server's own default of 8192 would be taken silently.
CACHE_RAM_MIB = 256

_SYMPTOMS = (
    (ADDRESS, r"couldn't bind HTTP server socket|[Aa]ddress already in use"),
    (MISSING_LIBRARY, r"error while loading shared libraries|cannot open shared object file|version `\w+' not found"),
    (MISSING_LIBRARY, r"ModuleNotFoundError"),
    (BAD_FLAG, r"error: invalid argument|error while handling argument|error: unknown argument|expected value for argument"),
    (OUT_OF_MEMORY, r"insufficient memory|out of memory|failed to allocate|unable to allocate|std::bad_alloc|OutOfDeviceMemory"),
    (BAD_MODEL, r"error loading model|gguf_init_\w+: .*(invalid|failed|bad)"),
    (BAD_MODEL, r"failed to load model|failed to open GGUF|failed to open .*gguf|exiting due to model loading error"),
)
_PREFIX = re.compile(r"^(?:\d+\.\d+\.\d+\.\d+ [A-Z] )?")


def accepts(path: str) -> str | None:
    """None for a GGUF file, else the reason; split files are given by their first part."""
    try:
        with open(path, "rb") as f:
            magic = f.read(4)
    except OSError as e:
        return f"cannot read it: {e.strerror}"
    if magic != b"GGUF":
        return "not a GGUF file"
    if (part := re.search(r"-(\d{5})-of-\d{5}\.gguf$", path)) and part[1] != "00001":
        return "a later part of a split model: name its first part"
    return None


def diagnose(exit_status: int | None, last_words: str) -> tuple[str, str]:
    """See base.Adapter.

    >>> diagnose(1, "0.00.036.291 E llama_model_load: error loading model: tensor is not within the file bounds\\nbye")
    ('bad_model', 'llama_model_load: error loading model: tensor is not within the file bounds')
    >>> diagnose(-4, "loading")[0]
    'crashed'
    """
    lines = [_PREFIX.sub("", line).strip() for line in last_words.splitlines() if line.strip()]
    for kind, pattern in _SYMPTOMS:
        for line in lines:  # the first line that fits is nearest to the cause; what follows only passes it on
            if re.search(pattern, line):
                return kind, re.sub(r"\s{2,}", " ", line)
    if exit_status in SIGNALS:
        return CRASHED, SIGNALS[exit_status]
    complaint = next((line for line in lines if re.search(r"\berror\b|GGML_ASSERT|what\(\)", line, re.IGNORECASE)), None)
    return CRASHED, complaint or (lines[-1] if lines else "it said nothing")


# Flags that the daemon sets itself, and the option that does the same.
_OWNED = {
    "-c": "context",
    "--ctx-size": "context",
    "-np": "parallel",
    "--parallel": "parallel",
    "-ngl": "gpu_layers",
    "--gpu-layers": "gpu_layers",
    "--n-gpu-layers": "gpu_layers",
    "-m": "the model spec",
    "--model": "the model spec",
    "-t": "the setting threads",
    "--threads": "the setting threads",
    "-tb": "the setting threads",
    "--threads-batch": "the setting threads",
    "--embedding": "mode=embedding",
    "--embeddings": "mode=embedding",
    "--rerank": "mode=rerank",
    "--reranking": "mode=rerank",
    "-md": "draft",
    "--model-draft": "draft",
    "--spec-draft-model": "draft",
    "--lora": "lora",
    "--lora-scaled": "lora",
    "-mm": "mmproj",
    "--mmproj": "mmproj",
    "--slot-save-path": "the setting prompt_cache_limit",
}
# Flags that change whom it answers, what it downloads, runs, writes, or when it lives.
_REFUSED = {
    flag: why
    for why, flags in {
        "the daemon owns its address": "--host --port --reuse-port --api-prefix --path -to --timeout",
        "the daemon names the model": "-a --alias --tags",
        "the daemon fetches models, engines stay offline": (
            "-mu --model-url -dr --docker-repo -hf -hfr --hf-repo -hff --hf-file -hft --hf-token -hfd -hfrd --hf-repo-draft"
            " --spec-draft-hf -hfv -hfrv --hf-repo-v -hffv --hf-file-v -mmu --mmproj-url --mmproj-auto"
        ),
        "the daemon's gateway does this": "--api-key --api-key-file --ssl-key-file --ssl-cert-file",
        "it lets requests run programs or reach other machines": (
            "--rpc --tools --tools-runtime -ag --agent -no-ag --no-agent --video-ffmpeg-dir"
        ),
        "the daemon decides when a model rests and how it is shared": (
            "--sleep-idle-seconds -cb --cont-batching -nocb --no-cont-batching"
        ),
        "it writes or opens files on request, or takes the log away": (
            "--log-file --log-disable --log-prompts-dir --media-path -lcd --lookup-cache-dynamic --props"
        ),
        "it ends without serving": "-h --help --usage --version -cl --cache-list --completion-bash --list-devices",
    }.items()
    for flag in flags.split()
}
_REFUSED_FAMILIES = (
    (r"--(mcp|ui|webui|no-ui|no-webui|cors|no-cors)(-.*)?", "the engine's own web page and its proxies stay closed"),
    (r"--models-.*|--no-models-.*", "one engine process serves one model"),
    (r"--(fim|gpt-oss|vision|embd|tts|spec)-.*-(default|spec)", "it downloads models"),
)


def refuse(args: Sequence[str]) -> str | None:
    """See base.Adapter.  Spelling variants that llama.cpp itself accepts (`--api_key`, `--port=1`) are the same flag.

    >>> refuse(["--flash-attn", "on"]), refuse(["--api_key=x"])
    (None, "--api_key is not passed on: the daemon's gateway does this")
    """
    for arg in args:
        given = arg.partition("=")[0]
        flag = given.replace("_", "-") if given.startswith("--") else given
        if not flag.startswith("-"):
            continue
        if option := _OWNED.get(flag):
            return f"{given} is set by the daemon: use {option}"
        reason = _REFUSED.get(flag) or next((why for pattern, why in _REFUSED_FAMILIES if re.fullmatch(pattern, flag)), None)
        if reason:
            return f"{given} is not passed on: {reason}"
    return None
