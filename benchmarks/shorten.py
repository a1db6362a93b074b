"""Writes a model with only its first blocks: it talks nonsense, at a few milliseconds a token, with the real tokenizer.

    python benchmarks/shorten.py MODEL.gguf OUT.gguf BLOCKS

For `run.py --only hangup`: an engine notices a hang-up between two steps, so that with a model that is slow on this machine
the length of its steps is measured and little else.  Keys and tensors as in GGUF's gguf.md; quantized tensors stay as they are.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import gguf


def shorten(model: Path, out: Path, blocks: int) -> None:
    """Everything of `model` but the tensors of block number `blocks` and those behind it."""
    whole = gguf.GGUFReader(model)
    arch = whole.fields[gguf.Keys.General.ARCHITECTURE].contents()
    short = gguf.GGUFWriter(out, arch)
    for name, it in whole.fields.items():
        if name.startswith("GGUF.") or name == gguf.Keys.General.ARCHITECTURE:  # the writer's own
            continue
        value = blocks if name == f"{arch}.block_count" else it.contents()
        is_list = it.types[0] == gguf.GGUFValueType.ARRAY
        short.add_key_value(name, value, it.types[0], sub_type=it.types[-1] if is_list else None)
    for tensor in whole.tensors:
        number = re.match(r"blk\.(\d+)\.", tensor.name)
        if number is None or int(number[1]) < blocks:
            short.add_tensor(tensor.name, tensor.data, raw_shape=tensor.data.shape, raw_dtype=tensor.tensor_type)
    short.write_header_to_file()
    short.write_kv_data_to_file()
    short.write_tensors_to_file()
    short.close()


if __name__ == "__main__":
    shorten(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
