"""Models that are a folder: which files of a repository an engine needs, and whether they are all there.

Data only: never a program (`*.py`), never a pickle (`*.bin`, `*.pt`), which is one too.  Folders in a repository hold the same
weights in other formats, as a rule: nothing in them is fetched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from ..errors import UsageError

MLC_CONFIG = "mlc-chat-config.json"
_LISTS = ("tensor-cache.json", "ndarray-cache.json")  # of MLC's weights; the second is the older name
_INDEX = "model.safetensors.index.json"  # of weights in several files
_BESIDE = re.compile(r"[A-Za-z0-9_][\w.-]*\.(?:json|jinja|model|tiktoken)|merges\.txt|vocab\.txt", re.ASCII)
_SAFETENSORS = re.compile(r"[A-Za-z0-9_][\w.-]*\.safetensors", re.ASCII)
_SHARD = re.compile(r"params_shard_\d+\.bin")  # raw numbers, no pickle


def safetensors(names: Collection[str]) -> list[str]:
    """The files of a model in safetensors, as the hub has them; none if it is not whole enough to be one.

    >>> safetensors(["README.md", "config.json", "model.safetensors", "model.py", "pytorch_model.bin", "onnx/config.json"])
    ['config.json', 'model.safetensors']
    >>> safetensors(["config.json", "consolidated.safetensors", "model.safetensors"])  # the same weights in another layout
    ['config.json', 'model.safetensors']
    >>> safetensors(["model.safetensors"])
    []
    """
    weights = [name for name in names if _SAFETENSORS.fullmatch(name)]
    own = [name for name in weights if not name.startswith("consolidated")]
    if not weights or "config.json" not in names:
        return []
    return sorted([*(own or weights), *(name for name in names if _BESIDE.fullmatch(name))])


def mlc(repo: str, names: Collection[str]) -> list[str]:
    """The files of a model in MLC's format.  Raises UsageError (`no_mlc`) if the repository `repo` has none."""
    lacking = MLC_CONFIG if MLC_CONFIG not in names else "" if any(name in names for name in _LISTS) else _LISTS[0]
    if lacking:
        raise UsageError(
            f"mlc:{repo} has no {lacking}: it is not a model in MLC's format",
            code="no_mlc", status=404, hint="look for a repository of the same model whose name ends in -MLC",
        )  # fmt: skip
    return sorted(name for name in names if _BESIDE.fullmatch(name) or _SHARD.fullmatch(name))


def lacking(paths: Iterable[Path]) -> list[str]:
    """The names of weights that the lists among `paths` speak of, and that are not there.

    Raises ValueError for a list that is none.
    """
    here = {path.name: path for path in paths}
    named: set[str] = set()
    for name in (_INDEX, *_LISTS):
        if name not in here:
            continue
        try:
            told = json.loads(here[name].read_bytes())
            named.update(told["weight_map"].values() if name == _INDEX else (r["dataPath"] for r in told["records"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{name} is not a list of weights") from None
    return sorted(named - here.keys())
