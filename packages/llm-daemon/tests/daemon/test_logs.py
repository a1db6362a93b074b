"""Logs: bounded, rotated by rename, and never in the way."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from llm_daemon.daemon.logs import RotatingLog, Tail


def test_appends_to_what_is_there_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "x.log"
    for text in (b"one\n", b"two\n"):
        log = RotatingLog(str(path))
        log.write(text)
        log.close()
    assert path.read_bytes() == b"one\ntwo\n"
    assert path.stat().st_mode & 0o777 == 0o600


def test_rotates_by_rename_and_keeps_three(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    log = RotatingLog(str(path), max_bytes=10, keep=3)
    with_reader = None
    for i in range(6):
        log.write(b"chunk-%d\n" % i)
        if i == 4:
            with_reader = path.open("rb")  # a follower keeps its file
    log.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.log", "x.log.1", "x.log.2", "x.log.3"]
    assert [(tmp_path / n).read_bytes() for n in ("x.log", "x.log.1", "x.log.3")] == [b"chunk-5\n", b"chunk-4\n", b"chunk-2\n"]
    assert with_reader is not None
    with with_reader:
        assert with_reader.read() == b"chunk-4\n"


def test_a_full_file_of_an_earlier_daemon_is_rotated_first(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_bytes(b"old" * 10)
    log = RotatingLog(str(path), max_bytes=20, keep=1)
    log.write(b"new")
    log.close()
    assert (path.read_bytes(), (tmp_path / "x.log.1").read_bytes()) == (b"new", b"old" * 10)


def test_keep_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    log = RotatingLog(str(path), max_bytes=4, keep=0)
    log.write(b"1234")
    log.write(b"5")
    log.close()
    assert [p.name for p in tmp_path.iterdir()] == ["x.log"]
    assert path.read_bytes() == b"5"


def test_a_full_disk_is_counted_and_gets_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    log = RotatingLog(str(tmp_path / "x.log"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        log.write(b"12345")
    assert log.dropped == 5
    log.write(b"again")
    log.close()
    assert (tmp_path / "x.log").read_bytes() == b"again"


def test_a_deleted_folder_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    log = RotatingLog(str(folder / "x.log"), max_bytes=5)
    log.write(b"12345")
    (folder / "x.log").unlink()
    folder.rmdir()
    log.write(b"more")  # rotates: there is nothing to rename
    log.close()
    assert (folder / "x.log").read_bytes() == b"more"


@given(st.lists(st.binary(max_size=12)), st.integers(1, 20))
def test_the_tail_is_a_suffix_in_whole_lines(chunks: list[bytes], limit: int) -> None:
    tail = Tail(limit)
    for chunk in chunks:
        tail.feed(chunk)
    whole, text = b"".join(chunks), tail.text()
    assert whole.decode(errors="replace").strip("\n").endswith(text) or len(whole) > limit
    if len(whole) <= limit:
        assert text == whole.decode(errors="replace").strip("\n")
    elif b"\n" in whole[-limit:-1]:
        assert text == whole[-limit:].partition(b"\n")[2].decode(errors="replace").strip("\n")
