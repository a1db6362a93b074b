"""docs/reference/lifecycle.md says what the code says: its diagrams are drawn from it, and what it names is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "packages" / "llm-daemon" / "src" / "llm_daemon"
PAGE = ROOT / "docs" / "reference" / "lifecycle.md"


def test_every_diagram_is_drawn_from_the_code_as_it_is() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "draw_states.py")], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    drawn = dict(re.findall(r"^%% (\w+)\n(.+?)\n$", done.stdout + "\n", re.DOTALL | re.MULTILINE))
    shown = dict(re.findall(r"<!-- states: (\w+) -->\n```mermaid\n(.+?)\n```\n<!-- /states -->", PAGE.read_text(), re.DOTALL))
    assert drawn.keys() == shown.keys()
    assert drawn == shown, "run: python tools/draw_states.py --write"


# `file.py` or `file.py: name, Class.name`
NAMED = re.findall(r"`([\w/-]+\.py)(?:: ([\w., ]+))?`", PAGE.read_text())


@pytest.mark.parametrize("path", sorted({path for path, _ in NAMED}))
def test_what_the_page_names_is_there(path: str) -> None:
    (file,) = (found for base in (ROOT, SOURCE) if (found := base / path).is_file())
    text = file.read_text()
    names = {part for at, names in NAMED if at == path for name in names.split(", ") for part in name.split(".") if part}
    assert [
        name for name in sorted(names) if not re.search(rf"^ *(?:(?:async )?def|class) {name}\b|^{name}\b.* = ", text, re.M)
    ] == []


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", PAGE.read_text()))))
def test_its_links_lead_somewhere(link: str) -> None:
    assert (PAGE.parent / link).is_file()
