"""Writes a llama GGUF model (the starter model) as a folder of safetensors, for engines that load nothing else.

    .venv/bin/python tools/gguf_to_safetensors.py MODEL.gguf FOLDER

Weights become float16; the rows of q and k go back to the order that Hugging Face's llama has (llama.cpp's
convert_hf_to_gguf.py, `permute`, the other way round).  Needs gguf and numpy, no torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
}  # fmt: skip
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
CONTROL = 3  # token type: never made of text


def convert(source: str, target: Path) -> None:
    """`target` is made, with config.json, model.safetensors and the tokenizer's files."""
    reader = GGUFReader(source)
    fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    target.mkdir(parents=True)
    config = _config(fields)
    tensors = dict(_tensors(reader, config))
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    _write(target / "model.safetensors", tensors)
    special = [
        t for t, kind in zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL
    ]
    named = {key: fields["tokenizer.ggml.tokens"][config[f"{key}_token_id"]] for key in ("bos", "eos")}
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": named["bos"], "eos_token": named["eos"],
        "chat_template": fields.get("tokenizer.chat_template"), "model_max_length": config["max_position_embeddings"],
    }  # fmt: skip
    for name, value in (("config", config), ("tokenizer", _tokenizer(fields, special)), ("tokenizer_config", about)):
        (target / f"{name}.json").write_text(json.dumps(value))


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    get = lambda name: fields[f"llama.{name}"]  # noqa: E731
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16", "hidden_act": "silu",
        "hidden_size": get("embedding_length"), "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"), "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv"), "rms_norm_eps": float(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": float(get("rope.freq_base")), "max_position_embeddings": get("context_length"),
        "vocab_size": len(fields["tokenizer.ggml.tokens"]), "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }  # fmt: skip


def _tensors(reader: GGUFReader, config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in reader.tensors:
        *layer, part, _ = tensor.name.split(".")  # blk.3.attn_q.weight, token_embd.weight
        data = dequantize(tensor.data, tensor.tensor_type).astype(np.float16)
        if count := heads.get(part):
            rows, columns = data.shape
            data = data.reshape(count, rows // count // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        yield (f"model.layers.{layer[1]}." if layer else "") + NAMES[part] + ".weight", data


def _write(path: Path, tensors: dict[str, Any]) -> None:
    """The format's description is in the safetensors project's README: 8 bytes of length, JSON, data."""
    header, at = {}, 0
    for name, data in tensors.items():
        header[name] = {"dtype": "F16", "shape": list(data.shape), "data_offsets": [at, at + data.nbytes]}
        at += data.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for data in tensors.values():
            f.write(np.ascontiguousarray(data).tobytes())


def _tokenizer(fields: dict[str, Any], special: list[str]) -> dict[str, Any]:
    """SmolLM's: bytes as letters, digits one by one (llama.cpp calls it `smollm`)."""
    tokens = fields["tokenizer.ggml.tokens"]
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": tokens.index(t), "content": t, "special": True, **dict.fromkeys(_FLAGS, False)} for t in special],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, bytes_]},
        "decoder": bytes_,
        "model": {
            "type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "ignore_merges": False,
            "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]],
        },
    }  # fmt: skip


if __name__ == "__main__":
    convert(sys.argv[1], Path(sys.argv[2]))
