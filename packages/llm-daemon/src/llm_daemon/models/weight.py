"""What a model needs of the memory before it is loaded: weights, cache for its conversations, room to compute.

Checked against what llama.cpp says it takes (SmolLM2-135M: 92 MB of weights, 23 kB of cache a token, 19 MB to compute).  The
cache is an upper bound for models with sliding windows (gguf.py); what a prompt cache takes is learned once it is filled.
"""

from __future__ import annotations

from dataclasses import dataclass

from .gguf import GgufInfo

BATCH = 512  # tokens that llama.cpp computes at once
LAYERS_AT_ONCE = 8  # rows of the width of an embedding that are alive for each of them
OUTPUTS = 16  # rows of the width of the vocabulary, rounded up
PROCESS = 60_000_000  # bytes of a server without a model: program, libraries, buffers


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes, by what they are for."""

    weights: int
    cache: int = 0
    compute: int = 0
    process: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.compute + self.process


def estimate(info: GgufInfo, context: int, parallel: int) -> Need:
    """For `parallel` conversations of `context` tokens each, everything in the host's memory.

    >>> said = {"tensor_bytes": 92_100_000, "kv_bytes_per_token": 23_040, "embedding_length": 576, "vocabulary": 49_152}
    >>> smollm2 = GgufInfo(**{**dict.fromkeys(GgufInfo.__dataclass_fields__), **said})
    >>> need = estimate(smollm2, 4096, 1)
    >>> need.weights, need.cache, need.compute, need.total
    (92100000, 94371840, 12582912, 259054752)
    """
    compute = 4 * (BATCH * LAYERS_AT_ONCE * (info.embedding_length or 0) + OUTPUTS * (info.vocabulary or 0))
    return Need(info.tensor_bytes, (info.kv_bytes_per_token or 0) * context * parallel, compute, PROCESS)
