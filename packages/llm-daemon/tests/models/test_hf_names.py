"""Which file of a hub's repository is meant."""

from __future__ import annotations

import pytest

from llm_daemon.errors import UsageError
from llm_daemon.models import hf


@pytest.mark.parametrize(
    "locator",
    [
        "",
        "repo",
        "a/b:",
        "a/b:..",
        "../b",
        "a/..",
        "a/b:../x.gguf",
        "a/b:c/../x.gguf",
        "a/b:Q4 K",
        "a--b/c",
        "a/b:-x",
        "a/b@",
        "a/b@v1:",
        "a/b@../x",
        "a/b@v1/",
        "a/b@-x",
        "a@v1/b",
        "a/b@v 1",
        "a/b:Q4_0@v1",
        "a/b/m.gguf@v1",
    ],
)
def test_names_that_are_refused(locator: str) -> None:
    with pytest.raises(UsageError, match="does not name") as caught:
        hf.resolve(locator)
    assert caught.value.code == "bad_spec" and "hf:ORG/REPO:QUANT" in caught.value.hint


def test_one_name_in_several_spellings() -> None:
    assert hf.resolve("org/repo:q4_k_m") == hf.resolve("org/repo:Q4_K_M")
    assert hf.resolve("org/repo/m.gguf") == hf.resolve("org/repo:m.gguf")
    assert hf.resolve("org/repo@q4_k_m") == hf.resolve("org/repo:Q4_K_M") != hf.resolve("org/repo@v1:Q4_K_M")
    assert hf.resolve("org/repo:q4_k_m").quant == "Q4_K_M" and hf.resolve("org/repo:m.gguf").quant is None


MANY: dict[str, int | None] = {
    "README.md": 1,
    "m-Q4_K_M.gguf": 4_000_000_000,
    "m-q8_0.gguf": None,
    "m.fp16-00002-of-00002.gguf": 2,
    "m.fp16-00001-of-00002.gguf": 1,
    "mmproj-m-Q8_0.gguf": 3,
    "a/../../evil-Q2_K.gguf": 1,
}


@pytest.mark.parametrize(
    ("wanted", "files"),
    [
        ("Q4_K_M", ["m-Q4_K_M.gguf"]),
        ("Q8_0", ["m-q8_0.gguf"]),
        ("FP16", ["m.fp16-00001-of-00002.gguf", "m.fp16-00002-of-00002.gguf"]),
        ("m.fp16-00001-of-00002.gguf", ["m.fp16-00001-of-00002.gguf", "m.fp16-00002-of-00002.gguf"]),
        ("mmproj-m-Q8_0.gguf", ["mmproj-m-Q8_0.gguf"]),
    ],
)
def test_the_file_that_is_meant(wanted: str, files: list[str]) -> None:
    assert hf.choose("o/r", MANY, wanted) == files


@pytest.mark.parametrize(("wanted", "code"), [("", "ambiguous_model"), ("Q2_K", "unknown_quant"), ("x.gguf", "unknown_quant")])
def test_an_error_lists_what_there_is(wanted: str, code: str) -> None:
    with pytest.raises(UsageError) as caught:
        hf.choose("o/r", MANY, wanted)
    assert caught.value.code == code
    assert all(name in caught.value.hint for name in ("Q4_K_M (4.0 GB)", "Q8_0,", "FP16 (0.0 GB)"))
    assert "evil" not in caught.value.hint


def test_repositories_without_a_choice() -> None:
    assert hf.choose("o/r", {"a/only.gguf": 1, "mmproj.gguf": 1}, "") == ["a/only.gguf"]
    with pytest.raises(UsageError, match="no GGUF files") as caught:
        hf.choose("o/r", {"model.safetensors": 1}, "")
    assert caught.value.code == "no_gguf"
    with pytest.raises(UsageError, match="several files"):
        hf.choose("o/r", {"a-Q8_0.gguf": 1, "b-Q8_0.gguf": 1}, "Q8_0")
    with pytest.raises(UsageError, match=r"of the 3 parts of .*, 2 are there"):
        hf.choose("o/r", {"a-00001-of-00003.gguf": 1, "a-00003-of-00003.gguf": 1}, "")
