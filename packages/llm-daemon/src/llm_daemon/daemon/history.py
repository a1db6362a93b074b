"""The history of requests: a bounded sqlite file in the state folder, written by one thread of its own, read by `explain`.

The loop's thread only appends to a list.  Whatever goes wrong with the file - a full disk, a lock, bytes that are no database -
costs history and nothing else: it is said once in the log, and the next batch tries again.  Several daemons may share the file.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import msgspec

from ..errors import Unavailable

if TYPE_CHECKING:
    import sqlite3  # imported by those who use it: a daemon that serves its first model does not wait for it

log = logging.getLogger("llm_daemon")
FORMAT = 1  # of the tables; a file of a newer one is left alone
PAUSE = 0.5  # seconds from the first row of a batch to its writing
BATCH = 500  # rows of one transaction: another daemon gets its turn between two
PENDING = 10_000  # rows that wait for a slow disk
BUSY = 5.0  # seconds we wait for another daemon's transaction
BODY_LIMIT = 64 * 1024  # bytes of a request's body that are kept, if at all
# secure_delete: what was asked does not stay in free pages.  cache_size in KiB: the thread looks at no row twice.
SETUP = ["secure_delete = on", "synchronous = normal", "cache_size = -256", "journal_size_limit = 4194304"]
TABLES = f"""
create table if not exists tickets (n integer primary key, time real, ticket text, model text, record text, body blob);
create index if not exists by_ticket on tickets (ticket);
create table if not exists events (n integer primary key, time real, kind text, model text, record text);
pragma user_version = {FORMAT};
"""
Row = tuple[str, float, str, str, Any, bytes | None]  # table, wall time, ticket or kind, model, what becomes JSON, body


class History:
    """Keeps the last `limit` rows of each table in the file `path`; folder and file are made when the first row comes.

    `put` is for one thread, the loop's; `flush` and `close` may be called from any.  `lost` counts rows that were not kept,
    `is_failing` says whether the last ones were among them.
    """

    def __init__(self, path: str, limit: int, pause: float = PAUSE) -> None:
        self.path, self.limit, self.lost, self.is_failing = path, limit, 0, False
        self._pause = pause
        self._pending: deque[Row | threading.Event] = deque()  # an event is set when all before it is written
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._db: sqlite3.Connection | None = None

    def put(self, row: Row) -> None:
        """Takes a row; never waits, never raises."""
        if len(self._pending) >= PENDING or self._closing:
            self.lost += 1
            return
        self._pending.append(row)
        if not self._wake.is_set():
            self._wake.set()
            if self._thread is None:
                self._begin()

    def flush(self, timeout: float) -> bool:
        """Waits until what was put before is written, or lost; False after `timeout` seconds."""
        if self._thread is None or not self._thread.is_alive():
            return True
        done = threading.Event()
        self._pending.append(done)
        self._hurry.set()
        self._wake.set()
        return done.wait(timeout)

    def close(self, timeout: float) -> None:
        """Writes what is left and ends the thread, within `timeout` seconds or not at all: a process may leave any time."""
        self._closing = True
        self._hurry.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)

    def _begin(self) -> None:
        try:
            self._thread = threading.Thread(target=self._run, name="history", daemon=True)
            self._thread.start()
        except RuntimeError:  # no more threads for us
            self._thread, self._closing = None, True
            self.lost += len(self._pending)
            log.warning("no request history: no thread could be started")

    # The thread -----------------------------------------------------------------------------------------------
    def _run(self) -> None:
        """Blocks while there is nothing to write: an idle daemon sleeps."""
        over = False
        while not over:
            self._wake.wait()
            if not self._closing:
                self._hurry.wait(self._pause)
            over = self._closing
            self._hurry.clear()
            self._wake.clear()  # before the list is taken: what comes later wakes us again
            batch = [self._pending.popleft() for _ in range(len(self._pending))]
            self._write([row for row in batch if not isinstance(row, threading.Event)])
            if over and self._db is not None:
                self._db.close()
            for done in batch:
                if isinstance(done, threading.Event):
                    done.set()

    def _write(self, rows: list[Row]) -> None:
        import sqlite3

        while rows:
            part, rows = rows[:BATCH], rows[BATCH:]
            try:
                self._store(part)
            except (sqlite3.Error, OSError, ValueError) as e:
                self.lost += len(part)
                self._forget()
                if _is_broken(e):
                    self._move_aside()
                if not self.is_failing:
                    self.is_failing = True
                    log.warning("request history is lost: %s: %s", self.path, e)
            else:
                self.is_failing = False

    def _store(self, rows: list[Row]) -> None:
        if self._db is None:
            self._db = self._open()
        encode = msgspec.json.encode
        # Not lists: sqlite lets the loop's thread go on between two rows, and making hundreds of them at once does not.
        tickets = (
            (t, key, model, encode(what).decode(), body) for table, t, key, model, what, body in rows if table == "tickets"
        )
        events = ((t, key, model, encode(what).decode()) for table, t, key, model, what, _ in rows if table == "events")
        with self._db as db:  # one transaction
            db.executemany("insert into tickets (time, ticket, model, record, body) values (?, ?, ?, ?, ?)", tickets)
            db.executemany("insert into events (time, kind, model, record) values (?, ?, ?, ?)", events)
            for table in ("tickets", "events"):
                db.execute(f"delete from {table} where n <= (select max(n) from {table}) - ?", (self.limit,))

    def _open(self) -> sqlite3.Connection:
        import sqlite3

        from .boot import network_filesystem

        folder = os.path.dirname(self.path)
        os.makedirs(folder, mode=0o700, exist_ok=True)
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        db = sqlite3.connect(self.path, timeout=BUSY)
        try:
            found = db.execute("pragma user_version").fetchone()[0]
            if found > FORMAT:
                raise ValueError(f"it was written by a newer version (format {found})")
            # A write-ahead log needs memory shared by all who have the file, which two machines do not have.
            mode = "truncate" if network_filesystem(folder) else "wal"
            with suppress(sqlite3.OperationalError):  # another daemon is just doing it
                db.execute(f"pragma journal_mode = {mode}")
            for line in SETUP:
                db.execute(f"pragma {line}")
            if found < FORMAT:
                db.executescript(TABLES)
        except BaseException:
            db.close()
            raise
        return db

    def _forget(self) -> None:
        import sqlite3

        if self._db is not None:
            with suppress(sqlite3.Error):
                self._db.close()
            self._db = None

    def _move_aside(self) -> None:
        """What is no database stays beside the new one, for whoever wants to look."""
        with suppress(OSError):
            os.replace(self.path, self.path + ".broken")
        for end in ("-wal", "-shm"):  # they belong to the old one, and would break the new one
            with suppress(OSError):
                os.unlink(self.path + end)


def read_tickets(path: str, limit: int = 100, model: str | None = None, ticket: str | None = None) -> list[dict[str, Any]]:
    """Records of the last `limit` requests, newest first, of one model or ticket alone if named; [] if there is no file.

    From any thread.  Raises Unavailable (`history`) for a file that cannot be read.
    """
    return list(_read(path, "tickets", {"model": model, "ticket": ticket}, limit))


def read_events(path: str, limit: int = 100, model: str | None = None, until: float | None = None) -> list[dict[str, Any]]:
    """What became of the models (journal.py), newest first; `until` is wall time in seconds.  Else as `read_tickets`."""
    return list(_read(path, "events", {"model": model}, limit, until))


def _read(
    path: str, table: str, where: dict[str, str | None], limit: int, until: float | None = None
) -> Iterator[dict[str, Any]]:
    import sqlite3
    from urllib.parse import quote

    if not os.path.exists(path):
        return
    given = {key: value for key, value in where.items() if value is not None}
    conditions = [f"{key} = :{key}" for key in given] + (["time <= :until"] if until is not None else [])
    text = f"select time, record from {table}" + (" where " + " and ".join(conditions) if conditions else "")
    try:
        # Not mode=ro: a reader of a write-ahead log has to make the shared memory file if it is the first.
        with closing(sqlite3.connect(f"file:{quote(path)}?mode=rw", uri=True, timeout=BUSY)) as db:
            db.execute("pragma query_only = on")
            rows = db.execute(text + " order by n desc limit :limit", {**given, "until": until, "limit": limit}).fetchall()
    except sqlite3.Error as e:
        hint = f"the next use of a model puts it aside, as {os.path.basename(path)}.broken, and begins a new one"
        hint = hint if _is_broken(e) else ""
        raise Unavailable(f"cannot read the request history {path}: {e}", code="history", hint=hint) from e
    for time, record in rows:
        with suppress(msgspec.DecodeError):
            yield {"time": time, **msgspec.json.decode(record)}


def _is_broken(error: Exception) -> bool:
    return getattr(error, "sqlite_errorname", "").startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB"))
