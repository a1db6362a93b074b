"""The report: what it shows, that it escapes what others wrote, that it is the same every time, and how it looks."""

from __future__ import annotations

import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from llm_daemon_bench import results
from llm_daemon_bench.records import Conditions, Stream
from llm_daemon_bench.report import text
from llm_daemon_bench.report.html import counted, html
from llm_daemon_bench.report.tables import View, case_table, environment, summary
from llm_daemon_bench.results import Results

from .simulate import CASES, EXTRACT, Speed, simulate

GOOD, LATE, DEAD = "llama-server/m/Q4", "llama-server/m/Q8", "xllamacpp/m/Q4"
EVIL = "<script>alert(1)</script>&\"'"


@pytest.fixture
def made(tmp_path: Path) -> Results:
    speeds = {
        GOOD: Speed(right=0.8),
        LATE: Speed(prefill=500, stall=0.1, heat=0.2),
        DEAD: Speed(never={"total": 0.5}, dies_in=3, load=2500),
    }
    return simulate(tmp_path / "20261125-1", speeds, CASES, streams=True)


class Page(HTMLParser):
    """What a browser would find: open elements must be closed in turn, and nothing is loaded from anywhere."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_needs_nothing_else(made: Results) -> None:
    page = html(View.of(made))
    found = Page(page)
    assert [tag for tag, attrs in found.seen if {"src", "href"} & attrs.keys()] == []
    assert "url(" not in page and "@import" not in page
    assert [a["role"] for tag, a in found.seen if tag == "svg"].count("img") == page.count("<svg ")
    assert all(a.get("aria-label") for tag, a in found.seen if tag == "svg" or a.get("role") == "region")
    assert len([1 for tag, _ in found.seen if tag == "script"]) == 1
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_pictures_are_well_formed_and_inside_their_frame(made: Results) -> None:
    page = html(View.of(made))
    pictures = re.findall(r"<svg .*?</svg>", page, re.S)
    assert len(pictures) == 1 + 3 * 2 + 1 + 3 + 1  # Pareto; bars and dots of three (case, cache), a second turn; timelines; drift
    for picture in pictures:
        root = ET.fromstring(picture)
        width, height = (float(x) for x in root.attrib["viewBox"].split()[2:])
        for node in root.iter():
            for name, value in node.attrib.items():
                if name in ("x", "x1", "x2", "cx"):
                    assert -1 <= float(value) <= width + 1
                if name in ("y", "y1", "y2", "cy"):
                    assert -1 <= float(value) <= height + 1
            assert "nan" not in str(node.attrib) and "inf" not in str(node.attrib.get("points", ""))


def test_every_trial_is_a_dot(made: Results) -> None:
    view = View.of(made)
    page = html(view)
    strips = re.findall(r"<svg [^>]*every trial.*?</svg>", page, re.S)
    dots = sum(strip.count('class="dot ') for strip in strips)
    cells = [cell for (_, key), cell in view.cells.items() if key.case != "start-up"]
    assert dots == sum(cell.reached for cell in cells)
    nevers = [int(n) for strip in strips for n in re.findall(r"× (\d+)", strip)]
    assert sum(nevers) == sum(cell.n - cell.reached for cell in cells) > 0
    assert sum(strip.count('class="dot miss') for strip in strips) == sum(
        ms > cell.slo_ms for cell in cells if cell.slo_ms for ms in cell.finite
    )
    assert "severe outlier" in page and 'class="slo"' in page


def test_the_same_session_gives_the_same_bytes(made: Results) -> None:
    again = results.load(made.folder)
    assert html(View.of(made)) == html(View.of(again))
    assert text.markdown(View.of(made)) == text.markdown(View.of(again))


def test_what_others_wrote_is_escaped(made: Results) -> None:
    def evil(target: str) -> str:
        return f"{target}{EVIL}"

    session = msgspec.structs.replace(
        made.session,
        suite=EVIL,
        suite_text=EVIL,
        machine=msgspec.structs.replace(made.session.machine, cpu=EVIL),
        targets=tuple(msgspec.structs.replace(t, id=evil(t.id), command=EVIL) for t in made.session.targets),
    )
    trials = [msgspec.structs.replace(t, target=evil(t.target), error=EVIL if t.error else None) for t in made.trials]
    launches = [msgspec.structs.replace(x, target=evil(x.target), error=EVIL) for x in made.launches]
    view = View.of(replace(made, session=session, trials=trials, launches=launches))
    page = html(view)
    Page(page)
    assert "<script>alert" not in page and page.count("<script>") == 1
    assert "&lt;script&gt;alert(1)" in page
    marked = text.markdown(view)
    assert "<script>" not in re.sub(r"\\.|`[^`]*`", "", marked)
    loud = replace(made, session=msgspec.structs.replace(made.session, suite="a\x1b[31mb"))
    assert "\x1b" not in text.terminal(View.of(loud), colour=False)


def test_terminal_and_markdown_say_the_same(made: Results) -> None:
    view = View.of(made)
    plain, marked = text.terminal(view, colour=False), text.markdown(view)
    coloured = re.sub(r"\x1b\[[0-9;]*m", "", text.terminal(view, colour=True, width=200))
    for words in ("extract-json [start]", GOOD, "misses a limit", "Rejected " + LATE):
        assert words in plain and words in coloured
        assert words.replace("[", "\\[").replace("]", "\\]") in marked
    assert "ended in an error" in plain and "## Environment" in marked and "Scripted CPU" in marked
    rows = [line for line in marked.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows[:5]} == {7}


def test_case_table_shows_reach_and_limits(made: Results) -> None:
    view = View.of(made)
    table = case_table(view, "extract-json", "cold")
    assert table.head == ("target", "first_token", "total <= 600", "complete <= 900", "right", "MiB", "ready")
    good, late, dead = table.rows
    assert good[2].mark == "good" and late[2].mark == "bad"
    assert re.fullmatch(r"\(\d+\.\.\d+\)", good[2].detail)
    assert re.search(r"\d+/18$", dead[2].detail) and "reached by" in dead[2].hint
    start = case_table(view, "extract-json", "start").rows[0][1]
    assert start.detail.endswith(", n=3)")  # too few for an interval of 95 %
    assert [row[0].text for row in summary(view).rows] == [GOOD, LATE, DEAD]
    assert dict(environment(view))["began"] == "2026-09-21 14:13 UTC"


def test_a_busy_machine_is_told(tmp_path: Path) -> None:
    made = simulate(tmp_path / "s", {GOOD: Speed()}, (EXTRACT,))
    assert not [line for line in View.of(made).warnings if "busy" in line]
    n, crowd = len(made.measured()), Conditions(load1=3.1)

    def after(quiet: int) -> Results:
        trials = [t if t.warmup or i < quiet else msgspec.structs.replace(t, env=crowd) for i, t in enumerate(made.trials)]
        return replace(made, trials=trials)

    crowded = View.of(after(0))
    line = next(line for line in crowded.warnings if "busy" in line)
    assert f"before {n} of {n} trials the load was above its 2 cores, at most 3.1; end other work" in line
    for shown in (text.terminal(crowded, colour=False), html(crowded), text.markdown(crowded)):
        assert shown.count("the machine was busy") == 1
    assert not [line for line in View.of(after(len(made.trials) - 2)).warnings if "busy" in line]


def test_a_session_with_nothing_in_it(tmp_path: Path) -> None:
    empty = replace(simulate(tmp_path / "s", {GOOD: Speed()}, (EXTRACT,)), trials=[], launches=[])
    view = View.of(empty)
    Page(html(view))
    assert view.advice is None and "targets" in text.terminal(view, colour=False) and text.markdown(view)


def test_one_trial_and_one_target(tmp_path: Path) -> None:
    view = View.of(simulate(tmp_path / "s", {GOOD: Speed()}, (EXTRACT,), launches=1, trials=1))
    page = html(view)
    Page(page)
    assert "Undecided, run 5 more trials" in page and "Speed against" not in re.sub(
        "<figcaption>.*", "", page.split("Targets")[0]
    )


def test_tokens_over_time_come_from_the_raw_reply() -> None:
    event = b'data: {"choices":[{"delta":{"content":"a b"}}]}\n\n'
    role = b'data: {"choices":[{"delta":{"role":"assistant","content":null}}]}\n\n'
    stream = Stream.of("k", 1, [(1.0, role), (5.0, event[:20]), (6.0, event[20:]), (9.0, event + b"data: [DONE]\n\n")])
    assert counted(stream, 4) == [(6.0, 2.0), (9.0, 4.0)]
    exact = b'data: {"choices":[{"delta":{"content":"x"}}],"timings":{"predicted_n":3}}\n\n'
    assert counted(Stream.of("k", 1, [(2.0, exact)]), 7) == [(2.0, 3.0)]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.slow
def test_page_sorts_and_draws_in_a_browser(made: Results, tmp_path: Path) -> None:
    page = html(View.of(made))
    probe = "<script>const b=document.querySelectorAll('th button')[1];b.click();b.click();document.title=" + (
        "[...document.querySelector('tbody').rows].map(r=>r.cells[0].textContent).join()"
        "+' '+b.parentNode.getAttribute('aria-sort')"
    )
    loose = re.sub(r"<meta http-equiv[^>]*>", "", page)  # the page's own policy would stop the probe
    (tmp_path / "page.html").write_text(loose.replace("</body>", probe + "</script></body>"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'chrome'}", "--dump-dom"]
    done = subprocess.run([*command, f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=90, check=True)
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title and title[1].endswith(" descending") and title[1].index(GOOD) > title[1].index(LATE)
