from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from llm_daemon.errors import UsageError
from llm_daemon.models.gguf import _BLOCKS, _QUANTS, MAX_HEADER, header, read_header

Make = Callable[..., bytes]


def refused(path: Path, data: bytes | None = None) -> str:
    """The one-line message with which the file is refused."""
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UsageError) as caught:
        read_header(path)
    assert caught.value.code == "bad_model"
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("version", [2, 3])
def test_reads_the_fields(tmp_path: Path, gguf: Make, version: int) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(version=version))
    info = read_header(path)
    assert (info.version, info.architecture, info.name, info.quant, info.license) == (version, "llama", "Tiny", "Q4_1", "mit")
    assert (info.context_length, info.block_count, info.embedding_length) == (512, 2, 64)
    assert (info.tensor_count, info.tensor_bytes, info.n_params, info.has_chat_template) == (1, 256, 256, True)
    # 2 layers x 2 heads x (16 + 16 numbers) x 2 bytes; a head has 64 / 4 = 16 numbers
    assert info.kv_bytes_per_token == 256


def test_heads_may_differ_by_layer_and_keys_have_a_length_of_their_own(tmp_path: Path, gguf: Make) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf({"llama.attention.head_count_kv": [1, 3], "llama.attention.key_length": 8}))
    assert read_header(path).kv_bytes_per_token == 2 * 4 * (8 + 16)


def test_says_nothing_where_the_header_says_nothing(tmp_path: Path, gguf: Make) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf({"general.architecture": None, "general.file_type": 999, "tokenizer.chat_template": None}))
    info = read_header(path)
    assert (info.architecture, info.context_length, info.quant, info.kv_bytes_per_token) == (None, None, None, None)
    assert not info.has_chat_template


def test_agrees_with_the_gguf_package(tmp_path: Path, gguf: Make) -> None:
    oracle = pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf({"general.alignment": 64}, bytes(range(256))))
    reader, info = oracle.GGUFReader(path), read_header(path)
    assert bytes(reader.tensors[0].data.tobytes()) == bytes(range(256))
    assert info.context_length == int(reader.fields["llama.context_length"].contents())
    assert (info.tensor_bytes, info.n_params) == (int(reader.tensors[0].n_bytes), int(reader.tensors[0].n_elements))


def test_tables_agree_with_the_gguf_package() -> None:
    oracle = pytest.importorskip("gguf")
    sizes = {int(k): v for k, v in oracle.GGML_QUANT_SIZES.items()}
    sizes[9] = (32, 36)  # Q8_1: the package has an old layout, ggml-common.h has two halves and 32 bytes; no file holds it
    assert {k: v for k, v in sizes.items() if k in _BLOCKS} == _BLOCKS
    names = {int(k): k.name.removeprefix("MOSTLY_").removeprefix("ALL_") for k in oracle.LlamaFileType}
    assert {k: v for k, v in names.items() if k in _QUANTS} == _QUANTS


def test_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    oracle, numpy = pytest.importorskip("gguf"), pytest.importorskip("numpy")
    writer = oracle.GGUFWriter(tmp_path / "m.gguf", "qwen2")
    writer.add_block_count(1)
    writer.add_token_list([f"token {i}" for i in range(5000)])
    writer.add_tensor("a", numpy.zeros((32, 64), dtype=numpy.float16))
    writer.add_tensor("b", numpy.zeros(48, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    info = read_header(tmp_path / "m.gguf")
    assert (info.architecture, info.block_count, info.tensor_count) == ("qwen2", 1, 2)
    assert (info.n_params, info.tensor_bytes) == (32 * 64 + 48, 32 * 64 * 2 + 48 * 4)


def test_a_header_larger_than_the_first_read(tmp_path: Path, gguf: Make) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf({"tokenizer.ggml.tokens": ["x" * 5_000_000, "y"], "llama.context_length": 77}))
    assert read_header(path).context_length == 77


def test_refusals_say_what_is_wrong(tmp_path: Path, gguf: Make) -> None:
    path, good = tmp_path / "m.gguf", gguf()
    assert refused(path, b"") == "m.gguf is not a GGUF file"
    assert refused(path, b"PK\x03\x04" + bytes(100)) == "m.gguf is not a GGUF file"
    assert refused(path, good[:-1]) == f"m.gguf is truncated: it needs {len(good):,} bytes and has {len(good) - 1:,}"
    assert "truncated: its header ends after byte 20" in refused(path, good[:20])
    assert "unknown version 1" in refused(path, gguf(version=1))
    assert "big-endian" in refused(path, b"GGUF" + struct.pack(">I", 3) + bytes(100))
    assert "cannot read" in refused(tmp_path)
    assert "No such file" in refused(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("tensors", "keys", "rest", "says"),
    [
        (2**60, 0, b"", "tensors"),
        (0, 2**60, b"", "metadata keys"),
        (0, 1, struct.pack("<Q", 2**63), "a text of"),
        (0, 1, struct.pack("<QcI", 1, b"k", 99), "unknown type 99"),
        (0, 1, struct.pack("<QcIIQ", 1, b"k", 9, 4, 2**62), "an array of"),
        (0, 1, struct.pack("<QcIIQ", 1, b"k", 9, 9, 1), "an array of type 9"),
        (0, 1, struct.pack("<QcIIQQ", 1, b"k", 9, 8, 2, 2**63), "truncated"),
        (0, 2, struct.pack("<QcIB", 1, b"k", 0, 1) * 2, "twice"),
        (1, 0, struct.pack("<QcI", 1, b"t", 2**31), "dimensions"),
        (1, 0, struct.pack("<QcIQIQ", 1, b"t", 1, 4, 24, 5), "odd offset"),
        (1, 0, struct.pack("<QcIQIQ", 1, b"t", 1, 4, 24, 2**40), "truncated: it needs"),
        (1, 0, struct.pack("<QcIQQIQ", 1, b"t", 2, 2**62, 2**62, 0, 0), "impossible size"),
    ],
    ids=range(12),
)
def test_hostile_headers(tmp_path: Path, tensors: int, keys: int, rest: bytes, says: str) -> None:
    data = b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest + bytes(64)
    assert says in refused(tmp_path / "m.gguf", data)


@pytest.mark.parametrize("align", [0, 3, 2**30, "big"])
def test_hostile_alignment(tmp_path: Path, gguf: Make, align: object) -> None:
    assert "alignment" in refused(tmp_path / "m.gguf", gguf({"general.alignment": align}))


def test_memory_is_bounded_whatever_the_file_claims(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<QcIIQ", 1, b"k", 9, 0, 2**34))
    with open(path, "r+b") as f:
        f.truncate(2**35)  # sparse: takes no room
    assert f"larger than {MAX_HEADER:,}" in refused(path)


@given(data=st.data())
def test_broken_files_raise_usage_errors_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, gguf: Make, data: st.DataObject
) -> None:
    raw = bytearray(gguf())
    edits = st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255))
    for position, value in data.draw(st.lists(edits, max_size=6)):
        raw[position] = value
    cut = data.draw(st.integers(0, len(raw)))
    path = tmp_path_factory.getbasetemp() / "broken.gguf"
    path.write_bytes(raw[:cut])
    try:
        info = read_header(path)
    except UsageError as e:
        assert e.code == "bad_model" and "\n" not in e.message
    else:
        assert info.tensor_bytes <= cut


@pytest.mark.real
def test_the_starter_model(starter: Path) -> None:
    info = read_header(starter)
    assert (info.architecture, info.quant, info.context_length, info.block_count) == ("llama", "Q4_1", 8192, 30)
    assert (info.tensor_count, info.n_params, info.tensor_bytes) == (272, 134_515_008, 96_576_768)
    assert (info.has_chat_template, info.license, info.kv_bytes_per_token) == (True, "apache-2.0", 23_040)
    best = min(_seconds(starter) for _ in range(5))
    assert best < 0.2, "some 15 ms are usual; the gguf package takes 2 s"


def _seconds(path: Path) -> float:
    """Of CPU: what else the machine does meanwhile is not ours."""
    begin = time.thread_time()
    read_header(path)
    return time.thread_time() - begin


def test_a_header_is_remembered_as_long_as_the_file_is_the_same(
    tmp_path: Path, gguf: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf())
    read: list[object] = []

    def counted(p: str) -> object:
        read.append(p)
        return read_header(p)

    monkeypatch.setattr("llm_daemon.models.gguf.read_header", counted)
    assert header(path) == header(path) == read_header(path)
    assert len(read) == 1
    path.write_bytes(gguf() + bytes(64))
    header(path)
    assert len(read) == 2
    stored = tmp_path / "store" / "m.gguf"
    stored.parent.mkdir()
    stored.write_bytes(gguf())
    assert header(stored, stored=True) == header(stored, stored=True) == read_header(stored)
    (tmp_path / "store" / "header.json").write_text("{")
    assert header(stored, stored=True) == read_header(stored)
    with pytest.raises(UsageError):
        header(tmp_path / "gone.gguf")
