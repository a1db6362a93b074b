"""Nothing that was written is lost, and what a kill left unfinished does not disturb."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import msgspec
import pytest

from llm_daemon_bench import results
from llm_daemon_bench.errors import MachineError, ResultsError
from llm_daemon_bench.records import Launch, Machine, Reached, ServerRef, Session, Stream, Trial
from llm_daemon_bench.results import Writer


def trial(key: str, part: int = 1, parts: int = 1) -> Trial:
    return Trial(
        key=key, session="s", target="a/m/q", server=ServerRef(id="a"), model="m", quant="q", case="c", launch=1, round=1,
        repeat=1, cache="cold", part=part, parts=parts, cp={"x": Reached(ms=1.5, tok=3), "y": Reached(ms=None, censored_ms=9.0)},
    )  # fmt: skip


def launch(key: str) -> Launch:
    return Launch(key=key, session="s", target="a/m/q", server=ServerRef(id="a"), model="m", quant="q", launch=1, round=1)


def session() -> Session:
    return Session(
        id="s", bench_version="1", suite="x", suite_text="", suite_sha256="", began=1.0, trials=1, launches=1, machine=Machine(),
        targets=(), cases=(),
    )  # fmt: skip


def filled(folder: Path) -> Path:
    with Writer(folder) as w:
        w.session(session())
        w.launch(launch("L"))
        w.trial([trial("one")], [Stream.of("one", 1, [(0.5, b"data: 1\n"), (1.25, b"\xff")])])
        w.trial([trial("two", 1, 2), trial("two", 2, 2)])
    return folder


def test_what_was_written_is_read(tmp_path: Path) -> None:
    found = results.load(filled(tmp_path))
    assert [t.key for t in found.trials] == ["one", "two", "two"]
    assert found.trials[0] == trial("one")
    assert found.launches == [launch("L")]
    assert found.keys() == {"L", "one", "two"}
    assert found.broken == 0
    assert [s.chunks() for s in results.read_streams(tmp_path)] == [[(0.5, b"data: 1\n"), (1.25, b"\xff")]]


def test_a_line_is_as_the_design_has_it(tmp_path: Path) -> None:
    line = msgspec.json.decode((filled(tmp_path) / results.TRIALS).read_bytes().splitlines()[1])
    assert (line["type"], line["schema"], line["cp"]["y"]) == ("trial", 1, {"ms": None, "censored_ms": 9.0})
    assert line["cp"]["x"] == {"ms": 1.5, "tok": 3}


def test_cut_anywhere_whole_trials_remain_and_one_can_go_on(tmp_path: Path) -> None:
    whole = (filled(tmp_path / "whole") / results.TRIALS).read_bytes()
    ends = {0: set(), whole.index(b"\n") + 1: {"L"}}
    lines = whole.splitlines(keepends=True)
    ends[len(lines[0] + lines[1])] = {"L", "one"}
    ends[len(whole)] = {"L", "one", "two"}
    folder = filled(tmp_path / "cut")
    for size in range(0, len(whole) + 1, 7):
        (folder / results.TRIALS).write_bytes(whole[:size])
        wanted = ends[max(end for end in ends if end <= size)]
        assert results.load(folder).keys() == wanted
        with Writer(folder) as w:
            assert w.done == wanted
            w.trial([trial("new")])
        found = results.load(folder)
        assert found.keys() == wanted | {"new"}
        assert found.broken == 0


def test_cut_streams_are_read_as_far_as_they_go(tmp_path: Path) -> None:
    folder = filled(tmp_path)
    with Writer(folder) as w:
        w.trial([trial("three")], [Stream.of("three", 1, [(0.5, b"x")])])
    packed = (folder / results.STREAMS).read_bytes()
    for cut in range(1, 30):
        (folder / results.STREAMS).write_bytes(packed[:-cut])
        assert [s.key for s in results.read_streams(folder)] == ["one"]
    with Writer(folder) as w:
        w.trial([trial("four")], [Stream.of("four", 1, [(0.5, b"x")])])
    assert [s.key for s in results.read_streams(folder)] == ["one", "four"]


def test_a_broken_line_in_the_middle_is_told_by_its_number(tmp_path: Path) -> None:
    path = filled(tmp_path) / results.TRIALS
    path.write_bytes(b"{}\n" + path.read_bytes())
    with pytest.raises(ResultsError, match=r"trials\.jsonl line 1: "):
        results.load(tmp_path)


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, write = filled(tmp_path), os.write

    def full(fd: int, data: bytes) -> int:
        if len(data) > 20:
            return write(fd, bytes(data)[:20])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Writer(folder) as w:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(MachineError) as caught:
            w.trial([trial("lost")])
        monkeypatch.undo()
        assert (caught.value.code, caught.value.exit_status) == ("disk_full", 3)
        assert "resume" in caught.value.hint
        w.trial([trial("kept")])
    found = results.load(folder)
    assert found.keys() == {"L", "one", "two", "kept"}


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    with Writer(tmp_path) as w:
        w.session(msgspec.structs.replace(session(), schema=99))
    with pytest.raises(ResultsError, match="newer version"):
        results.load(tmp_path)


def test_no_session_says_so(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="holds no results"):
        results.load(tmp_path / "none")
