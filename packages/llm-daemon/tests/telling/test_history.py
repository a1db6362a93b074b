"""The history's file: bounded, shared, silent about prompts, and never in the way."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from llm_daemon import errors
from llm_daemon.daemon import history as module
from llm_daemon.daemon.history import BODY_LIMIT, History, Row, read_events, read_tickets
from llm_daemon.daemon.journal import Journal

from .fakes import load, record

Make = Callable[..., History]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[History] = []

    def make(limit: int = 100, path: Path = tmp_path / "state" / "history.sqlite", pause: float = 0.0) -> History:
        made.append(History(str(path), limit, pause))
        return made[-1]

    yield make
    for history in made:
        history.close(5.0)
        assert history._thread is None or not history._thread.is_alive()


def row(ticket: str, model: str = "m", body: bytes | None = None) -> Row:
    return "tickets", 1.0, ticket, model, {"ticket": ticket}, body


def names(history: History, **where: Any) -> list[str]:
    assert history.flush(10.0)
    return [one["ticket"] for one in read_tickets(history.path, **where)]


def test_what_is_put_can_be_read(make: Make) -> None:
    history = make()
    history.put(row("a"))
    history.put(row("b", "other"))
    history.put(("events", 5.0, "ready", "m", {"kind": "ready", "text": "it is"}, None))
    assert names(history) == ["b", "a"]
    assert names(history, model="other") == ["b"] and names(history, ticket="a") == ["a"]
    assert read_events(history.path) == [{"time": 5.0, "kind": "ready", "text": "it is"}]
    assert read_events(history.path, until=4.0) == read_events(history.path, model="x") == []


def test_a_file_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_tickets(str(tmp_path / "none")) == []
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_made_before_the_first_row(make: Make, tmp_path: Path) -> None:
    history = make()
    assert history.flush(0.0) and history._thread is None and list(tmp_path.iterdir()) == []
    history.put(row("a"))
    assert history.flush(10.0)
    assert (tmp_path / "state" / "history.sqlite").stat().st_mode & 0o777 == 0o600


def test_the_oldest_go(make: Make) -> None:
    history = make(limit=5)
    for i in range(2 * module.BATCH + 3):
        history.put(row(str(i)))
    assert names(history) == [str(2 * module.BATCH + 2 - i) for i in range(5)]
    for i in range(50):
        history.put(row(f"later-{i}"))
        assert history.flush(10.0)
    assert names(history) == [f"later-{49 - i}" for i in range(5)]


def test_a_smaller_limit_holds_for_a_file_that_was_larger(make: Make) -> None:
    large, small = make(limit=50), make(limit=2)
    for i in range(20):
        large.put(row(str(i)))
    assert len(names(large)) == 20
    small.put(row("last"))
    assert names(small) == ["last", "19"]


def test_two_daemons_share_the_file(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUSY", 60.0)  # one that holds the lock may not get to run for long
    histories = [make(limit=10_000), make(limit=10_000)]
    for i in range(300):
        for name, history in zip("ab", histories, strict=True):
            history.put(row(f"{name}{i}"))
    assert all(history.flush(30.0) for history in histories)
    found = [one["ticket"] for one in read_tickets(histories[0].path, 10_000)]
    assert sorted(found) == sorted(f"{name}{i}" for name in "ab" for i in range(300))
    assert [history.lost for history in histories] == [0, 0]


def test_the_file_of_a_daemon_that_ended_goes_on(make: Make) -> None:
    first = make()
    first.put(row("a"))
    first.close(5.0)
    second = make()
    second.put(row("b"))
    assert names(second) == ["b", "a"]


def everything(folder: Path) -> bytes:
    return b"".join(p.read_bytes() for p in folder.iterdir())


def test_no_text_of_a_request_is_in_the_file(make: Make, tmp_path: Path) -> None:
    journal = Journal(history := make())
    assert not journal.keeps_bodies
    journal.ticket(record(), b'{"messages": "MY SECRET"}')
    assert names(history) == ["t-1"]
    assert b"smollm2-135m" in everything(tmp_path / "state")
    assert b"SECRET" not in everything(tmp_path / "state")


def test_bodies_are_kept_when_asked_for_and_only_so_much_of_them(make: Make) -> None:
    journal = Journal(history := make(limit=1), keeps_bodies=True)
    assert journal.keeps_bodies
    journal.ticket(record(), b"MY SECRET" + b"x" * 2 * BODY_LIMIT)
    assert names(history) == ["t-1"]
    with closing(sqlite3.connect(history.path)) as db:
        [(body,)] = db.execute("select body from tickets").fetchall()
    assert body.startswith(b"MY SECRET") and len(body) == BODY_LIMIT
    journal.ticket(record("t-2"))
    assert names(history) == ["t-2"]
    history.close(5.0)
    assert b"SECRET" not in Path(history.path).read_bytes()  # not in a page that is free now, either


def test_models_come_and_go_into_the_file(make: Make) -> None:
    journal = Journal(history := make())
    load(journal)
    journal.flush(10.0)
    assert [(e["kind"], e["model"]) for e in read_events(history.path)] == [
        ("ready", "smollm2-135m"),
        ("loading", "smollm2-135m"),
    ]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if "history" in r.message]


def test_a_folder_that_cannot_be_written(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "state").write_text("a file where the folder should be")
    history = make()
    with caplog.at_level(logging.WARNING, "llm_daemon"):
        for i in range(3):
            history.put(row(str(i)))
            assert history.flush(10.0)
    assert history.lost == 3 and history.is_failing and len(warnings(caplog)) == 1
    (tmp_path / "state").unlink()
    history.put(row("again"))
    assert names(history) == ["again"] and not history.is_failing


def test_a_full_disk(make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETUP", [*module.SETUP, "max_page_count = 12"])
    history = make()
    with caplog.at_level(logging.WARNING, "llm_daemon"):
        for i in range(5):
            history.put(row(str(i), body=b"x" * 30_000))
            assert history.flush(10.0)
    assert history.lost >= 3 and len(warnings(caplog)) == 1 and "full" in warnings(caplog)[0]
    assert read_tickets(history.path)  # what fitted is still there


@pytest.mark.parametrize("rest", [b"", b"-wal"])
def test_a_corrupt_file_is_put_aside(make: Make, tmp_path: Path, rest: bytes, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "history.sqlite").write_bytes(b"this is no database" * 1000)
    if rest:
        (folder / "history.sqlite-wal").write_bytes(b"nor is this a log" * 1000)
    with pytest.raises(errors.Unavailable, match="cannot read the request history"):
        read_tickets(str(folder / "history.sqlite"))
    history = make()
    with caplog.at_level(logging.WARNING, "llm_daemon"):
        history.put(row("lost"))
        assert history.flush(10.0)
        history.put(row("kept"))
        assert names(history) == ["kept"]
    assert len(warnings(caplog)) == 1
    assert (folder / "history.sqlite.broken").read_bytes().startswith(b"this is no")


def test_a_newer_file_is_left_alone(make: Make, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    path = tmp_path / "state" / "history.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.executescript(f"create table t (x); pragma user_version = {module.FORMAT + 1}")
    before = path.read_bytes()
    history = make()
    history.put(row("a"))
    assert history.flush(10.0) and history.lost == 1
    assert path.read_bytes() == before


def test_a_locked_file_loses_rows_and_no_time_of_ours(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUSY", 0.01)
    history = make()
    history.put(row("a"))
    assert names(history) == ["a"]
    with closing(sqlite3.connect(history.path, isolation_level=None)) as other:
        other.execute("begin immediate")
        fresh = make()
        fresh.put(row("b"))
        assert fresh.flush(10.0) and fresh.lost == 1
        other.execute("rollback")
    fresh.put(row("c"))
    assert names(fresh) == ["c", "a"]


def test_a_slow_disk_does_not_fill_the_memory(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PENDING", 3)
    begun, go = threading.Event(), threading.Event()

    def slow(self: History, rows: list[Row]) -> None:
        begun.set()
        assert go.wait(10.0)

    monkeypatch.setattr(History, "_store", slow)
    history = make()
    history.put(row("first"))
    assert begun.wait(10.0)
    for i in range(5):
        history.put(row(str(i)))
    assert history.lost == 2
    go.set()


def test_flush_does_not_wait_for_ever_and_close_neither(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    monkeypatch.setattr(History, "_store", lambda self, rows: go.wait(10.0))
    history = make()
    history.put(row("a"))
    assert not history.flush(0.01)
    history.close(0.01)
    history.put(row("too late"))
    assert history.lost == 1
    go.set()


def test_flush_hurries_a_batch_that_waits_for_more(make: Make) -> None:
    history = make(pause=3600.0)
    history.put(row("a"))
    assert names(history) == ["a"]
    history.put(row("b"))  # and so does close


def test_an_idle_thread_sleeps(make: Make) -> None:
    if not os.path.exists("/proc/self/task"):
        pytest.skip("no /proc")
    history = make(pause=0.001)
    history.put(row("a"))
    assert names(history) == ["a"] and history._thread is not None
    status = Path(f"/proc/self/task/{history._thread.native_id}/status")

    def switches() -> int:
        return sum(int(line.split()[1]) for line in status.read_text().splitlines() if "ctxt_switches" in line)

    for _ in range(50):  # until it has gone to sleep, for which it may have to wait its turn
        before = switches()
        threading.Event().wait(0.2)  # so long nothing must happen: there is no event to wait for
        if switches() == before:
            return
    pytest.fail("it never sleeps for long")
