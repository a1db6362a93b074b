"""The admin app over its real unix socket: routes, the event stream, the dashboard's files, metrics."""

from __future__ import annotations

import asyncio
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llm_daemon import errors
from llm_daemon.core import events as ev
from llm_daemon.daemon.admin import OPEN_PREFIX, PREFIXES, Admin
from llm_daemon.daemon.history import History
from llm_daemon.daemon.journal import Subscription

from .fakes import IN_USE, SPEC, FakeFacts, fetch, frames, load, record

JSON = {"Content_Type": "application/json"}
app: Any = importlib.import_module("llm_daemon.daemon.admin.app")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A socket's path must be short."""
    with tempfile.TemporaryDirectory(prefix="llmd-") as name:
        yield Path(name)


@asynccontextmanager
async def served(folder: Path, facts: FakeFacts) -> AsyncIterator[str]:
    admin = Admin(facts, str(folder / "admin.sock"))
    try:
        yield await admin.socket()
    finally:
        await admin.close()
        if facts.journal.history is not None:
            facts.journal.history.close(5.0)


async def test_it_is_started_once_and_leaves_nothing(folder: Path) -> None:
    admin = Admin(FakeFacts(), str(folder / "admin.sock"))
    first = asyncio.create_task(admin.socket())
    await asyncio.sleep(0)
    first.cancel()  # its client is gone: the others are served
    assert set(await asyncio.gather(admin.socket(), admin.socket())) == {str(folder / "admin.sock")}
    assert (await fetch(admin.path, "/api/status")).status == 200
    await admin.close()
    await admin.close()
    assert list(folder.iterdir()) == []
    await admin.socket()  # and again
    assert (await fetch(admin.path, "/api/status")).status == 200
    await admin.close()


async def test_a_start_that_failed_is_tried_again(folder: Path) -> None:
    admin = Admin(FakeFacts(), str(folder / "later" / "admin.sock"))
    with pytest.raises(OSError, match=r"admin\.sock|No such file"):
        await admin.socket()
    (folder / "later").mkdir()
    assert (await fetch(await admin.socket(), "/api/status")).status == 200
    await admin.close()


async def test_close_while_it_starts_and_while_it_streams(folder: Path) -> None:
    admin = Admin(FakeFacts(), str(folder / "admin.sock"))
    starting = asyncio.create_task(admin.socket())
    await asyncio.sleep(0)
    await admin.close()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await admin.socket()
    async with aclosing(frames(admin.path)) as stream:
        await anext(stream)
        await admin.close()
        with pytest.raises((ValueError, ConnectionError, asyncio.IncompleteReadError)):
            await anext(stream)


def test_a_daemon_that_starts_imports_none_of_it() -> None:
    code = (
        "import sys, llm_daemon.daemon.app, llm_daemon.daemon.gateway; "
        "print(*sorted({'starlette', 'uvicorn', 'prometheus_client', 'sqlite3', 'anyio'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""


# Looking --------------------------------------------------------------------------------------------------------
async def test_status_and_live_tickets(folder: Path) -> None:
    facts = FakeFacts()
    facts.live = [{"ticket": "t-1", "state": "waiting", "total_s": 1.0}]
    async with served(folder, facts) as path:
        answer = await fetch(path, "/api/status")
        assert answer.json == facts.status() and answer.headers["cache-control"] == "no-store"
        assert (await fetch(path, "/api/tickets")).json == {"tickets": facts.live}
        head = await fetch(path, "/api/status", method="HEAD")
        assert (head.status, head.body) == (200, b"")
    assert facts.asked == []


async def test_history_and_explain(folder: Path) -> None:
    facts = FakeFacts(History(str(folder / "h.sqlite"), 100, 0.0))
    async with served(folder, facts) as path:
        load(facts.journal)
        for i in range(30):
            facts.journal.ticket(record(f"t-{i}", model="a" if i % 2 else "b"))
        assert [r["ticket"] for r in (await fetch(path, "/api/history?limit=2")).json["tickets"]] == ["t-29", "t-28"]
        assert len((await fetch(path, "/api/history?model=a")).json["tickets"]) == 15
        told = (await fetch(path, "/api/explain?limit=5")).json
        assert told["ticket"]["ticket"] == "t-29" and told["summary"]["requests"] == 5 and len(told["events"]) == 2
        one = (await fetch(path, "/api/explain/t-3")).json
        assert one["ticket"]["parts"] == {"queue": 0.5, "load": 1.0, "engine": 0.25, "answer": 0.75}
        assert ((await fetch(path, "/api/explain/t-99")).status, (await fetch(path, "/api/history?limit=0")).status) == (404, 400)


async def test_a_broken_history_is_answered_from_memory(folder: Path) -> None:
    facts = FakeFacts(History(str(folder / "no" / "h.sqlite"), 100, 0.0))
    (folder / "no").write_text("")
    async with served(folder, facts) as path:
        facts.journal.ticket(record("t-1"))
        for _ in range(2):  # before and after the failure is known
            assert [r["ticket"] for r in (await fetch(path, "/api/explain")).json["recent"]] == ["t-1"]
        assert [r["ticket"] for r in (await fetch(path, "/api/history")).json["tickets"]] == ["t-1"]


async def test_metrics(folder: Path) -> None:
    facts = FakeFacts()
    load(facts.journal)
    facts.journal.ticket(record())
    facts.journal.ticket(record("t-2", end="shed", lane="interactive", model='odd"name\\\n'))
    async with served(folder, facts) as path:
        answer = await fetch(path, "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = {
        (s.name, *sorted(s.labels.items())): s.value
        for family in text_string_to_metric_families(answer.body.decode())
        for s in family.samples
    }
    model, regular = ("model", "smollm2-135m"), ("lane", "regular")

    def value(name: str, *labels: tuple[str, str]) -> float:
        return found[("llm_daemon_" + name, *sorted(labels))]

    assert value("requests_total", model, regular, ("end", "served")) == 1
    assert value("requests_total", ("model", 'odd"name\\\n'), ("lane", "interactive"), ("end", "shed")) == 1
    assert value("queue_seconds_bucket", model, regular, ("le", "0.25")) == 0
    assert value("queue_seconds_bucket", model, regular, ("le", "0.5")) == 1
    assert value("queue_seconds_count", model, regular) == 1 and value("queue_seconds_sum", model, regular) == 0.5
    assert value("engine_seconds_sum", model, regular) == 0.25 and value("first_byte_seconds_sum", model, regular) == 1.76
    assert (
        value("waiting", model, regular) == 2
        and value("waiting", model, ("lane", "interactive")) == 1
        and value("running", model) == 1
        and value("slots", model) == 2
    )
    assert value("loads_total", model, ("outcome", "ready")) == 1 and value("load_seconds_sum", model) == 2.0
    assert value("tokens_total", model, regular, ("kind", "completion")) == 52
    assert value("models_loaded") == 1 and value("leases") == 1 and value("uptime_seconds") == 60
    assert value("memory_bytes") == 22e6 and value("engine_memory_bytes", model) == 350e6
    assert value("history_lost_total") == 0 and value("info", ("version", "1.2.3")) == 1


async def test_two_instances_of_one_model_are_summed(folder: Path) -> None:
    facts = FakeFacts()
    status = facts.status()
    status["instances"] *= 2
    facts.status = lambda: status  # type: ignore[method-assign]
    async with served(folder, facts) as path:
        text = (await fetch(path, "/metrics")).body.decode()
    assert 'llm_daemon_slots{model="smollm2-135m"} 4.0' in text and "llm_daemon_models_loaded 2.0" in text


# Events ---------------------------------------------------------------------------------------------------------
async def test_events_as_they_come_and_again_from_an_id(folder: Path) -> None:
    facts = FakeFacts()
    facts.journal.ticket(record("before"))
    async with served(folder, facts) as path:
        async with aclosing(frames(path)) as stream:
            assert await anext(stream) == {"": "llm-daemon"}
            facts.journal.saw(ev.Arrived("t-1", SPEC), [ev.Run("t-1", "i1")], 1.0)
            facts.journal.ticket(record("t-1"))
            got = [await anext(stream) for _ in range(3)]
            assert [f["event"] for f in got] == ["arrived", "running", "ticket"]
            assert json.loads(got[2]["data"])["ticket"] == "t-1" and "messages" not in got[2]["data"]
        facts.journal.ticket(record("t-2"))
        async with aclosing(frames(path, Last_Event_ID=got[1]["id"])) as stream:
            await anext(stream)
            again = [json.loads((await anext(stream))["data"])["ticket"] for _ in range(2)]
            assert again == ["t-1", "t-2"]
        async with aclosing(frames(path, Last_Event_ID="another-7")) as stream:
            await anext(stream)
            assert json.loads((await anext(stream))["data"])["ticket"] == "before"


async def test_a_silent_stream_is_pinged_and_forgotten_at_its_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "PING", 0.01)
    closed = asyncio.Event()
    close = Subscription.close

    def noticed(self: Subscription) -> None:
        close(self)
        closed.set()

    monkeypatch.setattr(Subscription, "close", noticed)
    facts = FakeFacts()
    async with served(folder, facts) as path:
        async with aclosing(frames(path)) as stream:
            assert [await anext(stream) for _ in range(3)] == [{"": "llm-daemon"}, {"": "ping"}, {"": "ping"}]
            assert len(facts.journal._readers) == 1
        assert await closed.wait()  # the server's side has noticed
        assert not facts.journal._readers


async def test_a_reader_that_does_not_read_costs_no_memory(folder: Path) -> None:
    facts = FakeFacts()
    async with served(folder, facts) as path:
        async with aclosing(frames(path)) as stream:
            await anext(stream)
            seen, lost, n = 0, 0, 20_000
            for i in range(n):
                facts.journal.ticket(record(f"t-{i}"))
                if i % 500 == 0:
                    await asyncio.sleep(0)
            async for frame in stream:
                data = json.loads(frame["data"])
                seen, lost = seen + (frame["event"] == "ticket"), lost + data.get("count", 0)
                if data.get("ticket") == f"t-{n - 1}":
                    break
            assert seen + lost == n and lost > 0


# Acting ---------------------------------------------------------------------------------------------------------
async def test_what_is_to_be_done_is_done(folder: Path) -> None:
    facts = FakeFacts()
    facts.live = [{"ticket": "t-1", "state": "running", "total_s": 1.0}]
    async with served(folder, facts) as path:
        for target, body in (
            ("/api/load", b'{"model": "m"}'),
            ("/api/unload", b'{"model": "m", "force": true}'),
            ("/api/stop", b""),
        ):
            answer = await fetch(path, target, method="POST", body=body, **JSON)
            assert (answer.status, answer.json) == (200, facts.answer)
        assert (await fetch(path, "/api/cancel/t-1", method="POST", body=b"{}", **JSON)).json == {"cancelled": "t-1"}
        assert (await fetch(path, "/api/cancel/t-2", method="POST", body=b"{}", **JSON)).status == 404
    assert facts.asked == [("load", "m"), ("unload", "m", True), ("stop", False), ("cancel", "t-1"), ("cancel", "t-2")]


@pytest.mark.parametrize(
    ("error", "status", "wait"),
    [(IN_USE, 503, "1"), (errors.UsageError("no", code="unknown_model"), 400, None), (errors.EngineError("dead"), 502, None)],
)
async def test_errors_have_openais_form(folder: Path, error: errors.LlmDaemonError, status: int, wait: str | None) -> None:
    facts = FakeFacts()
    facts.answer = error
    async with served(folder, facts) as path:
        answer = await fetch(path, "/api/unload", method="POST", body=b'{"model": "m"}', **JSON)
    assert answer.status == status and answer.json["error"]["code"] == error.code
    assert answer.headers.get("retry-after") == wait


@pytest.mark.parametrize(
    ("target", "method", "body", "kind", "status"),
    [
        ("/api/load", "POST", b'{"model": "m"}', "text/plain", 415),
        ("/api/cancel/t-1", "POST", b"", "application/x-www-form-urlencoded", 415),
        ("/api/load", "POST", b"[]", "application/json", 400),
        ("/api/load", "POST", b"{", "application/json", 400),
        ("/api/load", "POST", b"\xff", "application/json", 400),
        ("/api/load", "POST", b"{}", "application/json", 400),
        ("/api/load", "POST", b'{"model": 5}', "application/json", 400),
        ("/api/unload", "POST", b'{"model": "m", "force": 1}', "application/json", 400),
        ("/api/stop", "GET", None, "application/json", 405),
        ("/api/load", "GET", None, "application/json", 405),
        ("/api/cancel/t-1", "GET", None, "application/json", 405),
        ("/api/status", "POST", b"{}", "application/json", 405),
        ("/api/nothing", "GET", None, "application/json", 404),
        ("/ui/../app.py", "GET", None, "text/html", 404),
        ("/ui/%2e%2e/app.py", "GET", None, "text/html", 404),
        ("/ui/nothing.js", "GET", None, "text/html", 404),
    ],
)
async def test_what_is_refused_changes_nothing(
    folder: Path, target: str, method: str, body: bytes | None, kind: str, status: int
) -> None:
    facts = FakeFacts()
    facts.live = [{"ticket": "t-1"}]
    async with served(folder, facts) as path:
        answer = await fetch(path, target, method=method, body=body, Content_Type=kind)
    assert answer.status == status and answer.json["error"]["code"]
    assert facts.asked == []


# The dashboard --------------------------------------------------------------------------------------------------
async def test_the_page_is_whole_and_strict(folder: Path) -> None:
    async with served(folder, FakeFacts()) as path:
        door = await fetch(path, "/ui")
        assert (door.status, door.headers["location"]) == (308, OPEN_PREFIX)
        page = await fetch(path, "/ui/")
        policy = page.headers["content-security-policy"]
        assert page.headers["content-type"] == "text/html; charset=utf-8" and "default-src 'none'" in policy
        assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
        files = re.findall(r'(?:src|href)="([^"]+)"', page.body.decode())
        assert sorted(files) == ["app.js", "icon.svg", "style.css"]
        for name in [*files, "draw.js"]:
            file = await fetch(path, f"/ui/{name}")
            assert file.status == 200 and file.headers["x-content-type-options"] == "nosniff"
    assert all(any(route.startswith(p) for p in PREFIXES) for route in ("/metrics", "/api/status", "/ui", "/ui/"))


def test_the_page_asks_nobody_else_and_sets_no_html() -> None:
    texts = {p.name: p.read_text() for p in app.STATIC.iterdir()}
    assert set(texts) == {name for name, _ in app.FILES.values()}
    for name, text in texts.items():
        addresses = set(re.findall(r"https?://[^\s\"'`]+", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}, name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|localStorage", text), name
    assert not re.search(r"\son\w+=|<style|style=|<script(?![^>]*src=)", texts["index.html"])
