"""Published weaknesses of engines, and which of them a version found here has.

An adapter offers its own as `weaknesses(version) -> list[Advisory]`; `llm-daemon doctor` asks each one that has it.  What is
listed was read in advisories or reports of them; a weakness whose first safe version nobody names is not here, for nothing
could be compared.  What the daemon does against each class of them is in docs/reference/engines.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

Version = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Advisory:
    """One weakness: versions from `since` on (the first ones by default) and before `fixed`.

    `text` says what can be done with it, `blunted` what here keeps it from being reached (empty: nothing does).
    """

    id: str
    text: str
    fixed: Version
    since: Version = ()
    blunted: str = ""


def number(version: str) -> Version:
    """The first dotted number in a version text; empty if there is none.

    >>> number("llamafile v0.10.3"), number("0.17.1-rc2"), number("unknown")
    ((0, 10, 3), (0, 17, 1), ())
    """
    found = re.search(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def fitting(advisories: Iterable[Advisory], version: Version) -> list[Advisory]:
    """Those that this version has; none if the version is not known.

    >>> old = Advisory("CVE-1", "reads memory", fixed=(0, 17, 1))
    >>> fitting([old], (0, 17)) == [old], fitting([old], (0, 17, 1)), fitting([old], ())
    (True, [], [])
    """
    return [a for a in advisories if version and a.since <= version < a.fixed]


# llama.cpp counts its builds; the first member of its versions is the build here.
_LLAMA_CPP = (
    Advisory(
        "CVE-2026-43631, CVE-2026-43632",
        "use after free with --sleep-idle-seconds: whoever reaches its port may run code",
        since=(7492,),
        fixed=(9061,),
        blunted="that flag is never passed, and refused in args",
    ),
    Advisory(
        "CVE-2026-27940", "a crafted GGUF file overwrites memory (the mending of CVE-2025-53630 was not enough)", fixed=(8146,)
    ),
)


def llama_cpp(version: str) -> list[Advisory]:
    """Of llama.cpp, by what `llama-server --version` or the package xllamacpp calls itself.

    >>> [a.id for a in llama_cpp("1 (build 8000, abc)")]
    ['CVE-2026-43631, CVE-2026-43632', 'CVE-2026-27940']
    >>> llama_cpp("11434 (5d3a7b8)"), llama_cpp("2026.10.11549"), llama_cpp("0.5.0-dev (build 1, commit 0c1e570)")
    ([], [], [])
    """
    named = (
        re.search(r"build (\d{4,})", version)
        or re.fullmatch(r"\d{4}\.\d+\.(\d{4,})", version)
        or re.match(r"b?(\d{4,})\b", version)
    )
    return fitting(_LLAMA_CPP, (int(named[1]),) if named else ())
