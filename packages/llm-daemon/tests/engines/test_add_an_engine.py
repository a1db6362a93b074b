"""The how-to page's own example passes the suite, and its description is one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from llm_daemon.engines.command import KEYS, PLACES, Command

PAGE = (Path(__file__).parents[4] / "docs" / "how-to" / "add-an-engine.md").read_text()
BUSY = """
from llm_daemon.testing.conformance import EngineConformance

EngineConformance.slack = 3.0  # other tests run meanwhile
"""


def test_the_example_conforms(tmp_path: Path) -> None:
    files = re.findall(r"^```python (\w+\.py)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in files] == ["tiny_server.py", "tiny_engine.py", "test_tiny.py"]
    for name, text in files:
        (tmp_path / name).write_text(text)
    (tmp_path / "conftest.py").write_text(BUSY)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider", "test_tiny.py"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) >= 10


def test_the_description_is_one_and_every_key_is_told() -> None:
    [table] = [tomllib.loads(text) for text in re.findall(r"^```toml\n(\[engines.*?)^```", PAGE, re.MULTILINE | re.DOTALL)]
    assert Command("tiny", table["engines"]["tiny"]).routes == {"/v1/embeddings"}
    assert not [key for key in KEYS if f"`{key}`" not in PAGE]
    assert not [place for place in PLACES if f"`{{{place}}}`" not in PAGE]
