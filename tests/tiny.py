"""Small models with random weights, written as GGUF files: they mean nothing, but engines run them as any other."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *(f"\u2581{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
    "\u2581the",
    "\u2581sky",
]
WIDTH, INNER, HEADS, LAYERS, CONTEXT = 64, 128, 4, 2, 512
RANK = gguf.PoolingType.RANK


def bert(path: Path, pooling: gguf.PoolingType = gguf.PoolingType.MEAN, seed: int = 1) -> Path:
    """An encoder; with the pooling RANK one that gives a score to a pair of texts (a reranker)."""
    rng = np.random.default_rng(seed)
    out = gguf.GGUFWriter(path, "bert")
    out.add_name("Tiny encoder")
    out.add_license("cc0-1.0")
    out.add_context_length(CONTEXT)
    out.add_embedding_length(WIDTH)
    out.add_feed_forward_length(INNER)
    out.add_block_count(LAYERS)
    out.add_head_count(HEADS)
    out.add_layer_norm_eps(1e-12)
    out.add_causal_attention(False)
    out.add_pooling_type(pooling)
    out.add_file_type(gguf.LlamaFileType.ALL_F32)
    out.add_tokenizer_model("bert")
    out.add_token_list(WORDS)
    out.add_token_types([gguf.TokenType.CONTROL] * 5 + [gguf.TokenType.NORMAL] * (len(WORDS) - 5))
    out.add_token_type_count(2)
    for name, number in (("padding", 0), ("unknown", 1), ("bos", 2), ("cls", 2), ("eos", 3), ("seperator", 3), ("mask", 4)):
        out.add_uint32(f"tokenizer.ggml.{name}_token_id", number)  # spelled as in gguf.md

    def tensor(name: str, *shape: int) -> None:
        values = np.ones(shape) if name.endswith("norm.weight") else rng.normal(0, 0.3, shape)
        out.add_tensor(name, values.astype(np.float32))

    def both(name: str, *shape: int) -> None:
        tensor(f"{name}.weight", *shape)
        tensor(f"{name}.bias", shape[0])

    tensor("token_embd.weight", len(WORDS), WIDTH)
    tensor("token_types.weight", 2, WIDTH)
    tensor("position_embd.weight", CONTEXT, WIDTH)
    both("token_embd_norm", WIDTH)
    for n in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            both(f"blk.{n}.{name}", WIDTH, WIDTH)
        both(f"blk.{n}.ffn_up", INNER, WIDTH)
        both(f"blk.{n}.ffn_down", WIDTH, INNER)
        both(f"blk.{n}.attn_output_norm", WIDTH)
        both(f"blk.{n}.layer_output_norm", WIDTH)
    if pooling == RANK:
        both("cls", WIDTH, WIDTH)
        both("cls.output", 1, WIDTH)
    return _written(out, path)


def lora(path: Path, width: int, layers: int, strength: float = 0.5, rank: int = 4) -> Path:
    """An adapter for the query weights of a llama of that embedding width; a strong one makes it say something else."""
    rng = np.random.default_rng(2)
    out = gguf.GGUFWriter(path, "llama")
    out.add_type("adapter")
    out.add_string("adapter.type", "lora")
    out.add_float32("adapter.lora.alpha", float(rank))
    for n in range(layers):
        out.add_tensor(f"blk.{n}.attn_q.weight.lora_a", rng.normal(0, strength, (rank, width)).astype(np.float32))
        out.add_tensor(f"blk.{n}.attn_q.weight.lora_b", rng.normal(0, strength, (width, rank)).astype(np.float32))
    return _written(out, path)


def _written(out: gguf.GGUFWriter, path: Path) -> Path:
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path
