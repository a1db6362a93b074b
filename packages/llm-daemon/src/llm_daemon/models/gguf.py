"""Reads what a GGUF header says, and refuses a file that an engine could not load.

Own scanner, for two reasons: it must be fast (the large arrays of a tokenizer are skipped, never built), and it looks
at files nobody has checked yet.  Every count, length and offset is held against the bytes there are before it is used.
Format: the GGUF specification in ggml's `docs/gguf.md`; block sizes as in ggml's `ggml-common.h`.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import struct
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import msgspec

from ..errors import UsageError
from ..spec import EMBEDDING, GENERATE, RERANK

# The largest headers known (262k tokens with scores and merges) take about 16 MiB; nobody may make us hold more than this.
MAX_HEADER = 64 * 2**20
_FIRST_READ = 4 * 2**20
_MAX_KEYS, _MAX_TENSORS, _MAX_DIMS = 65_536, 100_000, 4

# Metadata value types: number -> struct code of a scalar; strings and arrays are handled apart.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Arrays of numbers up to this length are kept (heads per layer); longer ones belong to the tokenizer.
_KEPT_ARRAY = 1024

# Tensor type -> (weights in a block, bytes of a block).
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74),
    18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2),
    26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
    40: (64, 36), 41: (128, 18),
}  # fmt: skip
# general.file_type -> the name people use for the quantization.
_QUANTS = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4", 40: "Q1_0",
}  # fmt: skip
# general.architecture of models that only ever embed; {arch}.pooling_type (llama.h) says it of others.
_ENCODERS = frozenset(
    {
        "bert",
        "modern-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "neo-bert",
        "jina-bert-v2",
        "jina-bert-v3",
        "eurobert",
        "gemma-embedding",
    }
)
_POOLED, _RANKED = (1, 2, 3), 4
_FIRST_LOOK = 65_536  # bytes: what describes the model comes before its tokenizer
_TEMPLATE = "tokenizer.chat_template"
_GUESSED = 1024  # flag in general.file_type: the writer was not sure


@dataclass(frozen=True, slots=True)
class GgufInfo:
    """What a header says; None where it says nothing (or nonsense).

    `tensor_bytes` is the weights' size in memory, `n_params` the number of weights in this file.
    `kv_bytes_per_token` is the cache one token of context needs with 16-bit keys and values in every layer: an upper
    bound for models with sliding windows or recurrent layers.  `split_count` is above 1 for the first of several files.
    `vocabulary`: the number of tokens it knows.
    A chat template is a program: it is known by its hash here, and never run.
    """

    version: int
    architecture: str | None
    name: str | None
    context_length: int | None
    block_count: int | None
    embedding_length: int | None
    quant: str | None
    license: str | None
    has_chat_template: bool
    tensor_count: int
    tensor_bytes: int
    n_params: int
    kv_bytes_per_token: int | None
    split_count: int
    chat_template_sha256: str | None = None
    vocabulary: int | None = None


class _Short(Exception):
    """The header goes on past the bytes we have read."""


class _Corrupt(Exception):
    """The header contradicts itself; the text says how."""


def header(path: str | os.PathLike[str], *, stored: bool = False) -> GgufInfo:
    """`read_header`, remembered by the file's identity; of a `stored` file (whose bytes never change) beside it on disk."""
    beside = Path(path).with_name("header.json")
    if stored:
        with suppress(OSError, msgspec.MsgspecError):
            return msgspec.json.decode(beside.read_bytes(), type=GgufInfo)
    try:
        st = os.stat(path)
    except OSError:
        return read_header(path)  # says what is wrong
    found = _remembered(os.fspath(path), st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns)
    if stored:
        with suppress(OSError):  # a full or read-only disk: read it again the next time
            half = beside.with_suffix(f".{os.getpid()}")
            half.write_bytes(msgspec.json.encode(found))
            half.rename(beside)
    return found


@lru_cache(maxsize=16)
def _remembered(path: str, *identity: int) -> GgufInfo:
    return _with_parts(Path(path), read_header(path))


def _with_parts(first: Path, info: GgufInfo) -> GgufInfo:
    """`info` of the first file of a split model, with the counts of all.  Raises UsageError if a part is not there."""
    match = re.fullmatch(r"(.+)-00001-of-(\d{5})\.gguf", first.name)
    if not match or info.split_count != int(match[2]):
        return info
    more = [read_header(first.with_name(f"{match[1]}-{n:05}-of-{match[2]}.gguf")) for n in range(2, info.split_count + 1)]
    return replace(
        info,
        tensor_count=info.tensor_count + sum(part.tensor_count for part in more),
        tensor_bytes=info.tensor_bytes + sum(part.tensor_bytes for part in more),
        n_params=info.n_params + sum(part.n_params for part in more),
    )


def chat_template(path: str | os.PathLike[str]) -> str | None:
    """The text of the chat template.  It is a program in the language Jinja: show it, never run it.  Raises as `read_header`."""
    text: list[str] = []
    read_header(path, text)
    return text[-1] if text else None


def read_header(path: str | os.PathLike[str], text: list[str] | None = None) -> GgufInfo:
    """Reads and checks the header of the file at `path`; blocks for some 5 to 60 ms, by size of the vocabulary.

    Raises UsageError (`bad_model`) in one line: not a GGUF file, truncated (needs N bytes, has M), corrupt (how), or
    unreadable.  The weights themselves are not looked at.  The chat template goes into `text`.
    """
    name = Path(path).name
    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            data, limit = b"", _FIRST_READ
            while True:
                # Plain reads, no mmap: a file cut short under a map would kill this process with SIGBUS.
                data += f.read(limit - len(data))
                try:
                    return _scan(data, size, text)
                except _Short:
                    if len(data) < limit:
                        raise _bad(f"{name} is truncated: its header ends after byte {size:,}", "fetch the file again") from None
                if limit >= MAX_HEADER:
                    raise _bad(f"{name} is corrupt: its header is larger than {MAX_HEADER:,} bytes")
                limit *= 4
    except _Corrupt as e:
        raise _bad(f"{name} {e}") from None
    except OSError as e:
        raise _bad(f"cannot read {path}: {e.strerror}", "") from e


@lru_cache(maxsize=64)
def purpose(path: str, identity: str = "") -> str:
    """What the model at `path` is made for, one of spec.MODES, by the first bytes of its header; of any other file "generate".

    Takes less than a millisecond and never raises; remembered for as long as `identity` is the same.
    """
    meta: dict[str, object] = {}
    with suppress(OSError, _Short, _Corrupt), open(path, "rb") as f:
        data, size = f.read(_FIRST_LOOK), os.fstat(f.fileno()).st_size
        if data[:4] != b"GGUF":
            return GENERATE
        pos = 24
        for _ in range(min(_MAX_KEYS, *_unpack("<Q", data, 16))):
            key, pos = _string(data, pos, size)
            meta[key], pos = _value(data, pos, size)
    arch = meta.get("general.architecture")
    pooling = meta.get(f"{arch}.pooling_type")
    if pooling == _RANKED:
        return RERANK
    return EMBEDDING if arch in _ENCODERS or pooling in _POOLED else GENERATE


def _bad(message: str, hint: str = "take the file from its source again, or another model") -> UsageError:
    return UsageError(message, code="bad_model", hint=hint)


def _scan(data: bytes, size: int, text: list[str] | None = None) -> GgufInfo:
    """The header in `data`, the first bytes of a file of `size` bytes.  Raises _Short or _Corrupt.

    The chat template is put into `text`.
    """
    if data[:4] != b"GGUF":
        raise _Corrupt("is not a GGUF file")
    version, tensors, keys, pos = *_unpack("<IQQ", data, 4), 24
    if version not in (2, 3):
        swapped = version & 0xFFFF == 0 and version != 0
        raise _Corrupt("is a big-endian GGUF file" if swapped else f"is a GGUF file of unknown version {version}")
    if keys > _MAX_KEYS or tensors > _MAX_TENSORS:
        raise _Corrupt(f"is corrupt: it claims {keys:,} metadata keys and {tensors:,} tensors")
    meta: dict[str, object] = {}
    for _ in range(keys):
        key, pos = _string(data, pos, size)
        if key in meta:
            raise _Corrupt(f"is corrupt: metadata key {key[:80]!r} comes twice")
        meta[key], pos = _value(data, pos, size)
    if text is not None and isinstance(template := meta.get(_TEMPLATE), str):
        text.append(template)
    return _describe(meta, version, tensors, *_tensors(data, pos, size, tensors, _alignment(meta)))


def _unpack(code: str, data: bytes, pos: int) -> tuple[int, ...]:
    try:
        return struct.unpack_from(code, data, pos)
    except struct.error:
        raise _Short from None


def _string(data: bytes, pos: int, size: int) -> tuple[str, int]:
    length = _unpack("<Q", data, pos)[0]
    start, end = pos + 8, pos + 8 + length
    if end > size:
        raise _Corrupt(f"is corrupt or truncated: a text of {length:,} bytes at byte {pos:,} of {size:,}")
    if end > len(data):
        raise _Short
    return data[start:end].decode("utf-8", "replace"), end


def _value(data: bytes, pos: int, size: int) -> tuple[object, int]:
    """(value, position after it) of a metadata value; None stands for an array too long to be of interest."""
    kind = _unpack("<I", data, pos)[0]
    pos += 4
    if code := _SCALARS.get(kind):
        return _unpack("<" + code, data, pos)[0], pos + struct.calcsize(code)
    if kind == _STRING:
        return _string(data, pos, size)
    if kind == _ARRAY:
        return _array(data, pos, size)
    raise _Corrupt(f"is corrupt: metadata of unknown type {kind} at byte {pos:,}")


def _array(data: bytes, pos: int, size: int) -> tuple[object, int]:
    kind, count = _unpack("<IQ", data, pos)
    pos += 12
    width = 8 if kind == _STRING else struct.calcsize(_SCALARS.get(kind, "x"))
    if kind != _STRING and kind not in _SCALARS:  # arrays of arrays: in the format, but no engine takes them
        raise _Corrupt(f"is corrupt: an array of type {kind} at byte {pos:,}")
    if count * width > size - pos:
        raise _Corrupt(f"is corrupt or truncated: an array of {count:,} values at byte {pos:,} of {size:,}")
    if kind == _STRING:
        return None, _skip_strings(data, pos, count)
    end = pos + count * width
    if end > len(data):
        raise _Short
    return (struct.unpack_from(f"<{count}{_SCALARS[kind]}", data, pos) if count <= _KEPT_ARRAY else None), end


def _skip_strings(data: bytes, pos: int, count: int) -> int:
    # The hot loop (some 300,000 rounds for a large vocabulary).  Positions only grow, so a hostile length is caught by
    # the next read or by the check after the loop.
    read = struct.Struct("<Q").unpack_from
    try:
        for _ in range(count):
            pos += 8 + read(data, pos)[0]
    except (struct.error, OverflowError):  # beyond the buffer, or beyond any buffer
        raise _Short from None
    if pos > len(data):
        raise _Short
    return pos


def _alignment(meta: dict[str, object]) -> int:
    align = meta.get("general.alignment", 32)
    if not isinstance(align, int) or not 1 <= align <= 2**20 or align & (align - 1):
        raise _Corrupt(f"is corrupt: alignment {align!r:.40}")
    return align


def _tensors(data: bytes, pos: int, size: int, count: int, align: int) -> tuple[int, int, int | None]:
    """(bytes, weights, rows of the token embedding) of all tensors, each checked to lie inside the file."""
    spans: list[tuple[int, int]] = []
    params, rows = 0, None
    for _ in range(count):
        name, pos = _string(data, pos, size)
        dims = _unpack("<I", data, pos)[0]
        if dims > _MAX_DIMS:
            raise _Corrupt(f"is corrupt: tensor {name[:80]!r} has {dims:,} dimensions")
        *shape, kind, offset = _unpack(f"<{dims}QIQ", data, pos + 4)
        pos += 4 + 8 * dims + 12
        weights = math.prod(shape)
        if name == "token_embd.weight" and len(shape) == 2:
            rows = shape[1]
        if offset % align:
            raise _Corrupt(f"is corrupt: tensor {name[:80]!r} lies at the odd offset {offset:,}")
        # A type newer than this table still has an offset to check; its length is taken as nothing.
        per, width = _BLOCKS.get(kind, (1, 0))
        spans.append((offset, -(-weights // per) * width))
        params += weights
    start = -(-pos // align) * align
    need = start + max((offset + length for offset, length in spans), default=0)
    if need > 2**62:
        raise _Corrupt("is corrupt: a tensor of impossible size")
    if need > size:
        raise _Corrupt(f"is truncated: it needs {need:,} bytes and has {size:,}")
    known = all(length for _, length in spans)
    return (sum(length for _, length in spans) if known else max(0, size - start)), params, rows


def _describe(meta: dict[str, object], version: int, tensors: int, tensor_bytes: int, params: int, rows: int | None) -> GgufInfo:
    def text(key: str) -> str | None:
        value = meta.get(key)
        return value[:200] if isinstance(value, str) else None

    def number(key: str) -> int | None:
        value = meta.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40 else None

    arch = text("general.architecture")
    kind = number("general.file_type")
    template = meta.get(_TEMPLATE)
    return GgufInfo(
        version=version,
        architecture=arch,
        name=text("general.name"),
        context_length=number(f"{arch}.context_length"),
        block_count=number(f"{arch}.block_count"),
        embedding_length=number(f"{arch}.embedding_length"),
        quant=None if kind is None else _QUANTS.get(kind & ~_GUESSED),
        license=text("general.license"),
        has_chat_template=_TEMPLATE in meta,
        tensor_count=tensors,
        tensor_bytes=tensor_bytes,
        n_params=params,
        kv_bytes_per_token=_kv_bytes(meta, f"{arch}."),
        split_count=number("split.count") or 1,
        chat_template_sha256=hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None,
        vocabulary=rows,
    )


def _kv_bytes(meta: dict[str, object], prefix: str) -> int | None:
    """Keys and values of 16 bits: the heads of all layers times the length of one key and one value."""

    def per_layer(key: str) -> tuple[object, ...]:
        value = meta.get(prefix + key)
        return value if isinstance(value, tuple) else (value,) * count

    layers, width = meta.get(prefix + "block_count"), meta.get(prefix + "embedding_length")
    count = layers if isinstance(layers, int) else 0
    if not isinstance(layers, int) or not isinstance(width, int) or not 0 < layers <= _KEPT_ARRAY:
        return None
    heads = per_layer("attention.head_count")
    kv_heads = per_layer("attention.head_count_kv" if prefix + "attention.head_count_kv" in meta else "attention.head_count")
    most = max((h for h in heads if isinstance(h, int)), default=0)
    if most <= 0 or not all(isinstance(h, int) and 0 <= h < 2**20 for h in kv_heads):
        return None
    key, value = (meta.get(prefix + f"attention.{which}_length", width // most) for which in ("key", "value"))
    if not isinstance(key, int) or not isinstance(value, int) or not (0 < key < 2**20 and 0 < value < 2**20):
        return None
    return 2 * sum(h for h in kv_heads if isinstance(h, int)) * (key + value)
