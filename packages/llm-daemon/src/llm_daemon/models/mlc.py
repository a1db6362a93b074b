"""Source `mlc`: a model in MLC-LLM's own format, a whole repository on the Hugging Face hub.  Fetched as `hf` fetches.

`mlc:org/repo` is what the repository has when it is fetched, `mlc:org/repo@COMMIT` what it had at that commit.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..spec import Artifact
from . import hf, snapshot

if TYPE_CHECKING:
    from .delivery import Delivery


def parse(locator: str) -> tuple[str, str | None]:
    """(repository, commit).

    >>> parse("org/repo"), parse("org/repo@" + "0A" * 20)[1]
    (('org/repo', None), '0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a')

    Raises UsageError (`bad_spec`).
    """
    repo, at, commit = locator.strip().partition("@")
    if not hf.is_repository(repo) or (at and not re.fullmatch(r"[0-9a-fA-F]{40}", commit)):
        hint = "write mlc:ORG/REPO, or mlc:ORG/REPO@COMMIT with the 40 digits of a commit"
        raise UsageError(f"mlc:{locator} does not name a repository", code="bad_spec", hint=hint)
    return repo, commit.lower() or None


def resolve(locator: str) -> Artifact:
    """The artifact for `org/repo[@commit]`; its quantization stands in the name by MLC's custom.

    >>> resolve("org/Tiny-q4f16_1-MLC")
    Artifact(source='mlc', locator='org/Tiny-q4f16_1-MLC', key='mlc:org/Tiny-q4f16_1-MLC', quant='q4f16_1', ...)
    """
    repo, commit = parse(locator)
    name = f"{repo}@{commit}" if commit else repo
    quant = re.search(r"-(q\d+f\d+(?:_\w+)?)(?:-|$)", repo)
    return Artifact("mlc", name, f"mlc:{name}", quant=quant[1] if quant else None)


def deliver(delivery: Delivery) -> None:
    """Puts the files into the hub's own cache, and a folder of links to them into the store."""
    from .hub import deliver_from_hub  # brings the hub's client: worker only

    repo, commit = parse(delivery.artifact.locator)
    deliver_from_hub(delivery, repo, lambda sizes: snapshot.mlc(repo, sizes), commit)
