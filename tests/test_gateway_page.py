"""docs/reference/gateway.md says what the code says: its routes, lanes, codes and limits; and each test it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llm_daemon.core import firewall
from llm_daemon.core.routes import ANSWERED, RELAYED
from llm_daemon.daemon import connection, http1

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "packages" / "llm-daemon" / "src" / "llm_daemon"
TESTS = ROOT / "packages" / "llm-daemon" / "tests"
PAGE = ROOT / "docs" / "reference" / "gateway.md"
TEXT = PAGE.read_text()
NAMED = re.findall(r"`([\w/-]+\.py)(?:: ([\w, ]+))?`", TEXT)  # `file.py` or `file.py: name, name`


def section(title: str) -> str:
    return TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("path", sorted({path for path, _ in NAMED}))
def test_what_the_page_names_is_there(path: str) -> None:
    (file,) = (found for base in (ROOT, SOURCE, TESTS) if (found := base / path).is_file())
    text = file.read_text()
    names = {name for at, given in NAMED if at == path for name in given.split(", ") if name}
    assert [name for name in sorted(names) if not re.search(rf"^(?:async )?def {name}\b", text, re.MULTILINE)] == []


def test_every_row_has_a_test() -> None:
    rows = [line for line in section("What hurt elsewhere, and the test for each").splitlines() if line.startswith("| ")]
    bare = [row for row in rows if ".py: test_" not in row and not row.startswith(("| ---", "| what went wrong"))]
    assert len(rows) > 30 and bare == []


def test_every_route_and_its_lane() -> None:
    told: dict[str, str] = {}
    for paths, lane in re.findall(r"^\| (`/.*?`) \| ([\w ]+) \|", section("Routes"), re.MULTILINE):
        told |= dict.fromkeys(re.findall(r"`(/[^`]+)`", paths), lane)
    assert {path: lane for path, lane in told.items() if path in RELAYED} == {p: str(r.lane) for p, r in RELAYED.items()}
    assert {*ANSWERED, "/metrics", "/api/...", "/ui/", "/v1/models/{id}"} <= told.keys()
    assert set(told) <= {*RELAYED, *ANSWERED, "/metrics", "/api/...", "/ui/", "/v1/models/{id}"}


def test_every_error_code_of_the_gateway() -> None:
    told = set(re.findall(r"`([a-z_]+)`", section("Errors"))) - {"hint"}
    files = [*(SOURCE / "daemon").glob("*.py"), *(SOURCE / "core").glob("*.py"), *(SOURCE / "daemon" / "admin").glob("*.py")]
    known = {code for file in files for code in re.findall(r'"([a-z]+(?:_[a-z]+)*)"', file.read_text())} | {"bug"}
    assert told - known == set()
    gates = [SOURCE / "core" / f"{name}.py" for name in ("firewall", "openai", "machine")]
    gates += [SOURCE / "daemon" / f"{name}.py" for name in ("gateway", "exchange", "connection", "guard", "http1")]
    used = {code for file in gates for code in re.findall(r'code="([a-z_]+)"', file.read_text())}
    assert used - told == set()
    assert connection.FINAL == set(re.findall(r"`(\w+)`", TEXT.partition("`X-Should-Retry: false` | with")[2].partition(":")[0]))


def test_the_limits() -> None:
    limits = section("Limits")
    for number in (http1.HEAD_LIMIT, http1.URL_LIMIT, firewall.GRAMMAR_BYTES, firewall.SCHEMA_BYTES):
        assert f"{number // 1024} KiB" in limits
    assert f"{firewall.DEPTH} levels" in limits and f"| {firewall.CHOICES}, {firewall.LOGPROBS} |" in limits


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", TEXT))))
def test_its_links_lead_somewhere(link: str) -> None:
    assert (PAGE.parent / link).is_file()
