"""What holds for the tree as a whole: who may import what, and what no file may say."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import llm_daemon

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "packages" / "llm-daemon"
SOURCE = PACKAGE / "src" / "llm_daemon"

# All that the core may see of the standard library: data, types and arithmetic.  (_json: the C half of json, for a quick start.)
PURE = frozenset(
    "__future__ _json abc bisect collections dataclasses enum functools hashlib heapq itertools json math operator re string "
    "struct types typing".split()
)
CORE_PACKAGES = frozenset({"msgspec"})
CLIENT_FORBIDDEN = frozenset({"daemon", "engines", "models", "cli", "testing"})


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(absolute dotted name, line) of each import in a file of our package, wherever in the file it stands."""
    package = ["llm_daemon", *path.relative_to(SOURCE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            head = ".".join([*base, *filter(None, [node.module])])
            if node.module and not (node.level and head == "llm_daemon"):
                yield head, node.lineno
            else:
                for alias in node.names:
                    yield f"{head}.{alias.name}", node.lineno


def pure(name: str) -> bool:
    top, _, rest = name.partition(".")
    if top == "llm_daemon":
        return rest.split(".")[0] in ("core", "errors", "spec")
    return top in PURE | CORE_PACKAGES


@pytest.mark.parametrize("path", sorted([*(SOURCE / "core").glob("*.py"), SOURCE / "errors.py"]), ids=lambda p: p.stem)
def test_core_touches_nothing_of_the_world(path: Path) -> None:
    assert [f"{path.name}:{line} imports {name}" for name, line in imports(path) if not pure(name)] == []


@pytest.mark.parametrize("path", sorted((SOURCE / "client").glob("*.py")), ids=lambda p: p.stem)
def test_client_is_made_of_the_standard_library(path: Path) -> None:
    allowed = sys.stdlib_module_names | {"llm_daemon", "openai"}  # openai: Lease.openai() alone, when called
    names = list(imports(path))
    assert [f"{path.name}:{line} imports {name}" for name, line in names if name.split(".")[0] not in allowed] == []
    if path.stem != "start":  # it alone may name the daemon that it launches
        assert [
            n
            for n, _ in names
            if n.split(".")[:1] == ["llm_daemon"] and n.split(".")[1:2] and n.split(".")[1] in CLIENT_FORBIDDEN
        ] == []


def tracked() -> list[Path]:
    """Files that are, or would be, in the repository."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"], capture_output=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [p for name in listed.stdout.decode().split("\0") if name and (p := ROOT / name).is_file()]


def test_no_file_names_a_package_registry_or_this_machine() -> None:
    # pip knows the registry's names, so that we need not write them.
    from pip._internal.models.index import PyPI

    host = urlsplit(PyPI.url).hostname
    assert host and PyPI.file_storage_domain
    folders = [str(f) for f in (ROOT, Path.home()) if f.parent != f]
    # A folder counts where a path begins: a checkout in /src must not object to packages/llm-daemon/src/.
    pattern = "|".join([re.escape(host), re.escape(PyPI.file_storage_domain), *(rf"(?<![\w.-]){re.escape(f)}/" for f in folders)])
    said = [(p.relative_to(ROOT), m.group().decode()) for p in tracked() if (m := re.search(pattern.encode(), p.read_bytes()))]
    assert said == []


def test_installed_package_is_this_one_typed_and_versioned() -> None:
    assert Path(llm_daemon.__file__ or "").parent == SOURCE
    assert (SOURCE / "py.typed").exists()
    assert (PACKAGE / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()  # a wheel takes only what lies in its package
    assert metadata.version("llm-daemon")[0].isdigit()


def test_every_entry_point_and_script_leads_somewhere() -> None:
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    found = {e.name: e.load() for e in metadata.entry_points(group="llm_daemon.engines")}
    assert {name: engine.name for name, engine in found.items()} == {
        name: name for name in project["entry-points"]["llm_daemon.engines"]
    }
    scripts = {e.name: e for e in metadata.entry_points(group="console_scripts") if e.value.startswith("llm_daemon.")}
    assert set(scripts) == {"llm-daemon", "llmd"}
    assert all(callable(s.load()) for s in scripts.values())


def test_pins_name_no_address_and_hash_everything() -> None:
    pins = (ROOT / "requirements" / "dev.txt").read_text()
    assert "://" not in pins
    requirements = pins.replace("\\\n", " ").splitlines()
    assert [line for line in requirements if line[:1].isalnum() and ("==" not in line or "--hash=sha256:" not in line)] == []
