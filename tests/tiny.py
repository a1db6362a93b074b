"""Small models with random weights, written as GGUF files: they mean nothing, but engines run them as any other."""

from __future__ import annotations

import struct
import zlib
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
PATCHES = 4  # of a picture, along each side
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


def projector(path: Path, width: int, inner: int = 32, patches: int = PATCHES, layers: int = 2) -> Path:
    """Eyes for a model of that embedding width (`mmproj`), as LLaVA has them: a square picture becomes `patches`**2 tokens.

    Keys and tensors are those of llama.cpp's tools/mtmd/clip.cpp; of its encoder's layers the last one is not used.
    """
    rng = np.random.default_rng(3)
    side = 8  # pixels of a patch
    out = gguf.GGUFWriter(path, "clip")
    out.add_type("mmproj")
    out.add_name("Tiny eyes")
    out.add_file_type(gguf.LlamaFileType.ALL_F32)
    out.add_string("clip.projector_type", "mlp")
    for name in ("has_vision_encoder", "has_llava_projector", "use_gelu"):
        out.add_bool(f"clip.{name}", True)
    sizes = {"image_size": patches * side, "patch_size": side, "embedding_length": inner, "feed_forward_length": inner * 2,
             "projection_dim": width, "block_count": layers, "attention.head_count": 2}  # fmt: skip
    for name, number in sizes.items():
        out.add_uint32(f"clip.vision.{name}", number)
    out.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    for name in ("mean", "std"):
        out.add_array(f"clip.vision.image_{name}", [0.5, 0.5, 0.5])

    def tensor(name: str, *shape: int) -> None:
        values = np.ones(shape) if ".ln" in name else rng.normal(0, 0.3, shape)
        out.add_tensor(name, values.astype(np.float32))

    tensor("v.patch_embd.weight", inner, 3, side, side)
    tensor("v.position_embd.weight", patches * patches, inner)
    for n in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            tensor(f"v.blk.{n}.{name}.weight", inner, inner)
        for name in ("ln1", "ln2"):
            tensor(f"v.blk.{n}.{name}.weight", inner)
            tensor(f"v.blk.{n}.{name}.bias", inner)
        tensor(f"v.blk.{n}.ffn_up.weight", inner * 2, inner)
        tensor(f"v.blk.{n}.ffn_down.weight", inner, inner * 2)
    for name, rows, columns in (("mm.0", inner, inner), ("mm.2", width, inner)):
        tensor(f"{name}.weight", rows, columns)
        tensor(f"{name}.bias", rows)
    return _written(out, path)


def png(colour: tuple[int, int, int], side: int = 8) -> bytes:
    """A picture of one colour (red, green, blue: 0 to 255), `side` pixels wide and high."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + bytes(colour) * side) * side
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _written(out: gguf.GGUFWriter, path: Path) -> Path:
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path
