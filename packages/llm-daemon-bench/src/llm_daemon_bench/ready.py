"""Ready suites that travel in the package: cases and their texts, without servers and models, which `bench init` adds."""

from __future__ import annotations

from pathlib import Path

PLACE = Path(__file__).parent / "suites"
FILE = "suite.toml"


def names() -> dict[str, str]:
    """Each with one line about it.

    >>> "extract" in names()
    True
    """
    return {path.parent.name: _about(path) for path in sorted(PLACE.glob(f"*/{FILE}"))}


def _about(path: Path) -> str:
    return path.read_text("utf-8").partition("\n")[0].removeprefix("# ")


def cases(name: str) -> str:
    """The `[[case]]` tables of a ready suite, as they stand."""
    text = (PLACE / name / FILE).read_text("utf-8")
    return f"\n# {_about(PLACE / name / FILE)}\n" + text[text.index("[[case]]") :]


def texts(name: str) -> dict[str, str]:
    """The files that its cases name."""
    return {path.name: path.read_text("utf-8") for path in sorted((PLACE / name).iterdir()) if path.name != FILE}
