"""Source `hf`: a repository on the Hugging Face hub, or on a server that speaks its API (`HF_ENDPOINT`): GGUF files of it,
or the whole of one with safetensors (snapshot.py); as it is when it is fetched, or at a revision: a branch, tag or commit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..spec import Artifact
from . import snapshot

if TYPE_CHECKING:
    from .delivery import Delivery

_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_REPO = rf"{_NAME}/{_NAME}"
_LOCATOR = re.compile(rf"({_REPO})(?:[:/](.+))?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{,250}")
_QUANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_FILE = re.compile(rf"(?:{_NAME}/)*{_NAME}\.gguf", re.IGNORECASE)
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
# What people call a quantization, as it stands in file names: Q4_K_M, iq2_xxs, UD-Q4_K_XL, bf16, fp16, MXFP4_MOE.
_LABEL = re.compile(r"(?:UD-)?I?Q\d\w*|TQ\d\w*|BF16|FP?16|FP?32|MXFP4\w*|NVFP4", re.IGNORECASE)
FOLDER = "SAFETENSORS"  # asked for like a quantization, where a repository has GGUF files too
_LISTED = 40  # names in an error; the largest repositories have some thirty quantizations


def _bad(locator: str) -> UsageError:
    hint = "write hf:ORG/REPO:QUANT, e.g. hf:org/repo:Q4_K_M, or hf:ORG/REPO:FILE.gguf, or hf:ORG/REPO@REVISION:QUANT"
    return UsageError(f"hf:{locator} does not name a repository's model", code="bad_spec", hint=hint)


def parse(locator: str) -> tuple[str, str | None, str]:
    """(repository, revision, quantization or file or empty).

    >>> parse("org/repo:q4_k_m"), parse("org/repo/sub/m.gguf"), parse("org/repo")
    (('org/repo', None, 'Q4_K_M'), ('org/repo', None, 'sub/m.gguf'), ('org/repo', None, ''))
    >>> parse("org/repo@v1:q4_k_m"), parse("org/repo@refs/pr/3"), parse("org/repo@Q4_K_M")  # the last as in catalog names
    (('org/repo', 'v1', 'Q4_K_M'), ('org/repo', 'refs/pr/3', ''), ('org/repo', None, 'Q4_K_M'))

    Raises UsageError (`bad_spec`).
    """
    base, at, rest = locator.strip().partition("@")
    revision, colon, wanted = rest.partition(":")  # git allows no colon in a revision
    if not at:
        match = _LOCATOR.fullmatch(base)
        base, wanted = (match[1], match[2] or "") if match else ("", "")
    elif not colon and (_LABEL.fullmatch(revision) or revision.upper() == FOLDER):
        revision, wanted = "", revision
    elif not _is_revision(revision) or (colon and not wanted):
        raise _bad(locator)
    if not is_repository(base):
        raise _bad(locator)
    is_file = wanted.lower().endswith(".gguf")
    if wanted and not (_FILE if is_file else _QUANT).fullmatch(wanted):
        raise _bad(locator)
    return base, revision or None, wanted if is_file else wanted.upper()


def _is_revision(text: str) -> bool:
    """Whether git, the hub and a folder's name could all be called that."""
    return _REVISION.fullmatch(text) is not None and not re.search(r"\.\.|//|/$|\.lock$", text)


def is_repository(text: str) -> bool:
    """
    >>> is_repository("org/repo"), is_repository("repo"), is_repository("org/../repo")
    (True, False, False)
    """
    return re.fullmatch(_REPO, text) is not None and ".." not in text and "--" not in text


def resolve(locator: str) -> Artifact:
    """The artifact for `org/repo[@revision][:quant-or-file]`; which file that is, is found out when it is fetched."""
    repo, revision, wanted = parse(locator)
    locator = at(repo, revision) + (f":{wanted}" if wanted else "")
    quant = wanted if wanted and not wanted.lower().endswith(".gguf") else None
    return Artifact("hf", locator, f"hf:{locator}", quant=quant)


def at(repo: str, revision: str | None) -> str:
    return f"{repo}@{revision}" if revision else repo


def label(file: str) -> str:
    """The quantization in a file's name, in capitals; empty if there is none.

    >>> label("sub/Llama-3.2-1B-Instruct-Q4_K_M.gguf"), label("phi-3-mini-4k-instruct-q4.gguf"), label("m.gguf")
    ('Q4_K_M', 'Q4', '')
    >>> label("m-UD-Q4_K_XL-00001-of-00003.gguf"), label("m.fp16.gguf")
    ('UD-Q4_K_XL', 'FP16')
    """
    stem = re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", file.rpartition("/")[2], flags=re.IGNORECASE)
    found = [m[0] for m in re.finditer(r"(?<=[-.])UD-[A-Za-z0-9_]+|[A-Za-z0-9_]+", stem) if _LABEL.fullmatch(m[0])]
    return found[-1].upper() if found else ""


def choose(repo: str, sizes: Mapping[str, int | None], wanted: str) -> list[str]:
    """The files, in order, that `wanted` means among a repository's: one, or all the parts of a split model, or those of a
    folder with safetensors: if that is wanted, or if there is no GGUF.

    `sizes` are bytes by file name.  Raises UsageError that lists what there is: `no_gguf`, `ambiguous_model`, `unknown_quant`.
    """
    models = _models(sizes)
    if wanted == FOLDER or not (models or wanted):
        if names := snapshot.safetensors(sizes):
            return names
    if not models:
        raise UsageError(
            f"hf:{repo} has no GGUF files" + ("" if snapshot.safetensors(sizes) else ", and no config.json with safetensors"),
            code="no_gguf",
            status=404,
            hint="look for a repository of the same model whose name ends in -GGUF",
        )
    # A projector for images is not a model: it is found by its name only.
    labels = [label(parts[0]) if "mmproj" not in parts[0].lower() else None for parts in models]
    if wanted.lower().endswith(".gguf"):
        found = [parts for parts in models if wanted in parts]
    else:
        found = [parts for parts, name in zip(models, labels, strict=True) if name is not None and wanted in ("", name)]
    if len(found) == 1:
        return _whole(repo, found[0])
    short = {parts[0]: name for parts, name in zip(models, labels, strict=True) if name and labels.count(name) == 1}
    listed = (_describe(short.get(parts[0], parts[0]), [sizes[p] for p in parts]) for parts in (found or models)[:_LISTED])
    hint = f"write hf:{repo}:NAME with one of these names: " + ", ".join(listed)
    if found:
        which = f"{wanted} means several files" if wanted else f"has {len(found)} models"
        raise UsageError(f"hf:{repo}: {which}, and it is not said which", code="ambiguous_model", hint=hint)
    raise UsageError(f"hf:{repo} has no {wanted}", code="unknown_quant", status=404, hint=hint)


def _models(sizes: Mapping[str, int | None]) -> list[list[str]]:
    """The GGUF files, the parts of one model together."""
    models: dict[tuple[str, str], list[str]] = {}
    for name in sorted(sizes):
        if _FILE.fullmatch(name):  # a name that is not in the grammar is not used as a path
            match = _SHARD.fullmatch(name)
            models.setdefault((match[1], match[3]) if match else (name, ""), []).append(name)
    return list(models.values())


def _whole(repo: str, parts: list[str]) -> list[str]:
    if match := _SHARD.fullmatch(parts[0]):
        if [int(_SHARD.sub(r"\2", p)) for p in parts] != list(range(1, int(match[3]) + 1)):
            raise UsageError(
                f"hf:{repo}: of the {int(match[3])} parts of {parts[0]}, {len(parts)} are there",
                code="bad_model", status=502, hint="take another quantization or repository",
            )  # fmt: skip
    return parts


def _describe(name: str, sizes: list[int | None]) -> str:
    return name + (f" ({sum(s for s in sizes if s) / 1e9:.1f} GB)" if all(sizes) else "")


def deliver(delivery: Delivery) -> None:
    """Puts the files into the hub's own cache, and links to them into the store."""
    from .hub import deliver_from_hub  # brings the hub's client: worker only

    repo, revision, wanted = parse(delivery.artifact.locator)
    deliver_from_hub(delivery, repo, lambda sizes: choose(at(repo, revision), sizes, wanted), revision)
