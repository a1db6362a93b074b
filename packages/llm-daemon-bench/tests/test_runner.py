"""Whole runs on scripted servers: every cell is there once, whatever goes wrong with some of them."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from llm_daemon.cli.main import run
from llm_daemon_bench import records, results
from llm_daemon_bench.results import Results

from .suites import CASE, Write

TWO = CASE.format(id="hello", cache="asis") + CASE.format(id="other", cache="cold")


def bench(path: Path, *args: str) -> tuple[int, list[Results]]:
    """(exit status, sessions) after `bench run` in this process."""
    status = run(["bench", "run", str(path), "--plain", *args])
    return status, [results.load(p.parent) for p in sorted(Path("results").glob("*/session.json"))]


def cells(found: Results) -> Counter[tuple[Any, ...]]:
    return Counter((t.target, t.case, t.launch, t.repeat, t.cache, t.part, t.warmup) for t in found.trials)


def test_every_cell_is_there_once(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write({"a": {}, "b": {"first_token_ms": 30}}, suite="trials = 2\nlaunches = 2", cases=TWO)
    status, (found,) = bench(path)
    assert status == 0
    wanted = {
        (target, case, launch, repeat, "cold" if case == "other" else "asis", 1, False)
        for target in ("a/m0/q", "b/m1/q") for case in ("hello", "other") for launch in (1, 2) for repeat in (1, 2)
    }  # fmt: skip
    seen = cells(found)
    assert {cell for cell in seen if not cell[-1]} == wanted
    assert set(seen.values()) == {1}
    assert len(found.trials) == 16 + 8  # and one warm-up of each case in each launch
    assert [sorted(x.cp) for x in found.launches] == [sorted(records.LIFECYCLE)] * 4
    assert all(x.error is None and x.process for x in found.launches)
    assert len({x.process for x in found.launches}) == 4
    assert found.session.ended is not None
    assert "16 trials" in capsys.readouterr().out
    assert len({t.said for t in found.measured()}) == 1 and all(t.said for t in found.trials)  # the same words from all of them


def test_what_a_trial_tells(write: Write) -> None:
    path = write({"a": {"first_token_ms": 40, "token_ms": 5}}, suite="trials = 1\nlaunches = 1")
    _, (found,) = bench(path)
    (trial,) = found.measured()
    assert list(trial.t_ms) == ["connect", "headers", "first_event", "first_token", "first_content", "last_token", "done"]
    assert trial.t_ms["first_token"] >= 40
    assert trial.t_ms["last_token"] >= 40 + 25  # from t0: a client that was late for the first token sees a smaller difference
    reached = trial.cp["from"]
    assert reached.ms is not None
    assert reached.tok == 2
    assert reached.ms >= trial.t_ms["first_token"]
    assert trial.cp["never"].ms is None
    assert (trial.cp["never"].censored_ms or 0) >= trial.t_ms["last_token"]
    assert trial.check == records.Check(passed=True)
    assert (trial.tokens.prompt, trial.tokens.out, trial.tokens.source) == (3, 6, "usage")
    assert trial.decode_ms_per_tok is not None
    assert trial.decode_ms_per_tok > 0
    assert (trial.finish, trial.error) == ("stop", None)
    assert (trial.res.rss_mib or 0) > 1
    (raw,) = [s for s in results.read_streams(found.folder) if s.key == trial.key]
    assert raw.chunks()[-1][0] == pytest.approx(trial.t_ms["done"], abs=1000)
    assert b"Hello" in b"".join(data for _, data in raw.chunks())


def test_rounds_visit_the_targets_in_an_order_of_their_own(write: Write) -> None:
    path = write({n: {} for n in "abc"}, suite="trials = 1\nlaunches = 4\nwarmup = 0")
    _, (found,) = bench(path)
    rounds = [[x.target for x in found.launches if x.launch == n] for n in (1, 2, 3, 4)]
    assert all(sorted(r) == ["a/m0/q", "b/m1/q", "c/m2/q"] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1
    first_seen = [x.target for x in found.launches]
    _, sessions = bench(path)
    assert [x.target for x in sessions[1].launches] == first_seen  # the suite's seed makes it the same again


def test_all_servers_up_at_once_take_turns_trial_by_trial(write: Write) -> None:
    path = write({"a": {}, "b": {}}, suite='trials = 3\nlaunches = 1\nup = "all"\nwarmup = 0')
    _, (found,) = bench(path)
    assert [t.round for t in found.trials] == [1, 1, 2, 2, 3, 3]
    assert all({a.target, b.target} == {"a/m0/q", "b/m1/q"} for a, b in zip(found.trials[::2], found.trials[1::2], strict=True))
    assert len({t.process for t in found.trials}) == 2


@pytest.mark.parametrize(
    ("scenario", "suite", "words"),
    [
        ({"never_ready": True}, "ready_s = 3.0", "was not ready after 3 s: /health answers 503"),
        ({"crash_while_loading": "bad model", "load_seconds": 0.1}, "", "(exit status 1); it said: error: bad model"),
        ({"kill_self_while_loading": 9}, "", "killed by SIGKILL"),
    ],
)  # fmt: skip
def test_a_server_that_never_gets_ready_stops_nobody_else(
    write: Write, capsys: pytest.CaptureFixture[str], scenario: dict[str, Any], suite: str, words: str
) -> None:
    path = write({"bad": scenario, "good": {}}, suite=f"trials = 1\nlaunches = 3\n{suite}")
    status, (found,) = bench(path)
    said = capsys.readouterr().err.splitlines()
    assert status == 3
    assert {t.target for t in found.measured()} == {"good/m1/q"}
    assert len(found.measured()) == 3
    failed = [x for x in found.launches if x.error]
    assert [x.target for x in failed] == ["bad/m0/q"] * 2  # twice in a row is enough
    assert all(x.last_words for x in failed)
    assert sum(words in line for line in said) == 2
    assert any("bad/m0/q is not complete" in note for note in found.session.notes)


def test_a_server_that_dies_over_a_case_is_started_again(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    deadly = CASE.format(id="deadly", cache="asis").replace("say something", "x") + "servers = ['bad']\n"
    # It dies after the third token: a reply of two tokens is served.
    short = '[[case]]\nid = "short"\nprompt = "p"\nmax_tokens = 2\ncheckpoints = [ { id = "c", chars = 1 } ]\n'
    path = write(
        {"bad": {"crash_after_tokens": 3, "token_ms": 30}, "good": {}},
        suite="trials = 2\nlaunches = 1\nwarmup = 0",
        cases=short + deadly,
    )
    status, (found,) = bench(path)
    died = [t for t in found.measured() if t.case == "deadly"]
    assert len(died) == 2
    assert all((t.error or "").startswith("the server died (killed by SIGABRT): the answer broke off") for t in died)
    assert [t.cp["from"].ms is not None for t in died] == [True, True]  # what was reached before is kept
    assert [t.error for t in found.measured() if t.case == "short"] == [None] * 4
    assert status == 0
    assert capsys.readouterr().err.count("died over deadly (killed by SIGABRT); it is started again") == 2


def test_a_server_that_always_dies_is_given_up(write: Write) -> None:
    path = write({"bad": {"crash_after_tokens": 1}, "good": {}}, suite="trials = 5\nlaunches = 1\nwarmup = 0")
    status, (found,) = bench(path)
    assert status == 3
    assert [x.error for x in found.launches if x.target == "bad/m0/q"] == ["the server died after a hang-up (killed by SIGABRT)"]
    assert len([t for t in found.measured() if t.target == "bad/m0/q"]) == 2  # the third death is the last
    assert len([t for t in found.measured() if t.target == "good/m1/q"]) == 5


def test_a_reply_that_stalls_is_kept_as_such(write: Write) -> None:
    path = write({"a": {"stuck_after_tokens": 3, "token_ms": 30}}, suite="trials = 1\nlaunches = 1\nwarmup = 0\nstall_s = 1.5")
    _, (found,) = bench(path)
    (trial,) = found.measured()
    assert (trial.finish, trial.error) == ("stall", "nothing came for 1.5 s")
    assert trial.cp["from"].ms is not None
    assert trial.check is not None
    assert not trial.check.passed


def test_a_program_or_model_that_is_missing_is_told_before_anything_runs(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write({"a": {}, "b": {}}, suite="trials = 1\nlaunches = 1")
    Path("s-b.fake.json").unlink()
    status, (found,) = bench(path)
    assert status == 3
    assert {t.target for t in found.trials} == {"a/m0/q"}
    assert "b/m1/q: " in capsys.readouterr().err
    Path("s-a.fake.json").unlink()
    status = run(["bench", "run", str(path)])
    assert status == 3
    assert "no target can be run" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_what_was_measured_stays(
    write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import errno

    path, append = write({"a": {}}, suite="trials = 3\nlaunches = 1\nwarmup = 0"), results.Writer.trial
    count = 0

    def full(self: results.Writer, *args: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise results.unwritable(self.folder / "trials.jsonl", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        append(self, *args)

    monkeypatch.setattr(results.Writer, "trial", full)
    status, (found,) = bench(path)
    assert status == 3
    assert len(found.trials) == 2
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(path.parent)
    status, (found,) = bench(path, "--resume")
    assert (status, len(found.trials)) == (0, 3)


def test_cold_starts_are_cells_of_their_own(write: Write) -> None:
    cases = (
        CASE.format(id="one", cache="asis") + "cold_start = true\n" + CASE.format(id="two", cache="asis") + "cold_start = true\n"
    )
    path = write({"a": {"load_seconds": 0.2}}, suite="trials = 1\nlaunches = 2\nwarmup = 0", cases=cases)
    _, (found,) = bench(path)
    starts = [t for t in found.trials if t.cache == "start"]
    assert Counter((t.case, t.launch) for t in starts) == Counter({("one", 1): 1, ("one", 2): 1, ("two", 1): 1, ("two", 2): 1})
    assert all((t.since_spawn_ms or 0) > 200 for t in starts)
    assert len({t.process for t in starts}) == 4  # each was the first request of a process of its own
    assert sorted((x.launch, x.start, x.first) for x in found.launches) == [
        (1, 1, "one"),
        (1, 2, "two"),
        (2, 1, "one"),
        (2, 2, "two"),
    ]
    by_process = {t.process: t for t in starts}
    for launch in found.launches:
        first = by_process[launch.process]
        assert launch.cp["first_token"].ms == pytest.approx((first.since_spawn_ms or 0) + first.t_ms["first_token"], abs=0.01)


def test_a_conversation_and_tools(write: Write) -> None:
    cases = """
[[case]]
id = "talk"
turns = ["one two", "three four five"]
checkpoints = [ { id = "t1", contains = "two" }, { id = "t2", turn = 2, contains = "five" } ]
check = { contains = "five" }
[[case]]
id = "agent"
turns = ["call it", { tools = { find = "42" } }]
checkpoints = [ { id = "t2", turn = 2, chars = 1 } ]
check = { contains = "42" }
"""
    path = write({"a": {"echo": True}}, suite="trials = 1\nlaunches = 1\nwarmup = 0", cases=cases)
    _, (found,) = bench(path)
    talk = [t for t in found.measured() if t.case == "talk"]
    assert [(t.turn, t.part, t.parts, list(t.cp)) for t in talk] == [(1, 1, 2, ["t1"]), (2, 2, 2, ["t2"])]
    assert all(r.ms is not None for t in talk for r in t.cp.values())
    assert [t.check for t in talk] == [None, records.Check(passed=True)]
    agent = [t for t in found.measured() if t.case == "agent"]
    assert [t.error for t in agent] == [None, "this turn gives a tool's result, and the reply before called no tool"]
    assert agent[1].check is not None
    assert not agent[1].check.passed


def test_loads_open_and_closed(write: Write) -> None:
    cases = """
[[case]]
id = "three"
prompt = "p"
concurrency = 3
[[case]]
id = "rate"
prompt = "p"
rate = 50.0
arrivals = "constant"
requests = 5
"""
    path = write({"a": {"first_token_ms": 100}}, suite="trials = 1\nlaunches = 1\nwarmup = 0", cases=cases)
    _, (found,) = bench(path)
    three = [t for t in found.measured() if t.case == "three"]
    rate = [t for t in found.measured() if t.case == "rate"]
    assert [t.stream for t in three] == [1, 2, 3]
    assert [(t.stream, t.parts) for t in rate] == [(n, 5) for n in range(1, 6)]
    assert all(t.late_ms is not None and t.late_ms >= 0 for t in rate)
    # One slot serves one after the other: from the intended time on, each waits for all before it.
    firsts = [t.t_ms["first_token"] for t in rate]
    assert max(firsts) > 300
    assert firsts != sorted(firsts, reverse=True)


def test_code_is_completed_and_filled_in(write: Write) -> None:
    cases = """
[[case]]
id = "line"
kind = "completion"
prompt = "x = "
checkpoints = [ { id = "c", contains = "fake" } ]
[[case]]
id = "middle"
kind = "infill"
prompt = "a "
suffix = " z"
checkpoints = [ { id = "c", tokens = 6 }, { id = "done", event = "done" } ]
"""
    path = write({"a": {}}, suite="trials = 1\nlaunches = 1\nwarmup = 0", cases=cases)
    _, (found,) = bench(path)
    assert sorted((t.case, t.error, t.finish, t.tokens.out) for t in found.measured()) == [
        ("line", None, "stop", 6), ("middle", None, "stop", 6),
    ]  # fmt: skip
    assert all(r.ms is not None for t in found.measured() for r in t.cp.values())


def test_the_time_budget_ends_a_run_that_can_go_on(
    write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each trial takes three minutes of ten, by the runner's clock alone."""
    path, append = write({"a": {}}, suite="trials = 20\nlaunches = 1\nwarmup = 0\nmax_minutes = 10"), results.Writer.trial
    held = 0

    def held_one(self: results.Writer, *args: Any) -> None:
        nonlocal held
        append(self, *args)
        held += 1

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 180 * held, time=time.time, sleep=time.sleep)
    monkeypatch.setattr(results.Writer, "trial", held_one)
    monkeypatch.setattr("llm_daemon_bench.runner.time", clock)
    status, (found,) = bench(path)
    assert status == 0
    assert len(found.trials) == 4
    assert found.session.ended is None
    assert "time budget was used up" in capsys.readouterr().err


def test_early_stop_hangs_up_at_the_last_checkpoint(write: Write) -> None:
    cases = (
        '[[case]]\nid = "c"\nprompt = "p"\nmax_tokens = 400\nearly_stop = true\ncheckpoints = [ { id = "x", contains = "t3" } ]\n'
    )
    path = write({"a": {"tokens": 400, "token_ms": 20}}, suite="trials = 1\nlaunches = 1\nwarmup = 0", cases=cases)
    _, (found,) = bench(path)
    (trial,) = found.measured()
    assert (trial.finish, trial.error) == ("early", None)
    assert trial.cp["x"].ms is not None
    assert trial.t_ms["last_token"] < 4000


def test_engines_bare_and_through_the_daemon_run_the_same_thing(write: Write, tmp_path: Path) -> None:
    model = tmp_path / "m.fake.json"
    model.write_text(json.dumps({"token_ms": 2}))
    path = tmp_path / "both.toml"
    path.write_text(
        '[suite]\nname = "x"\ntrials = 1\nlaunches = 1\n[[server]]\nid = "bare"\nengine = "fake"\n'
        '[[server]]\nid = "daemon"\nengine = "fake"\nvia = "daemon"\n'
        f'[[model]]\nid = "m"\nartifacts = {{ q = "{model}" }}\n' + CASE.format(id="hello", cache="warm")
    )
    status, (found,) = bench(path)
    assert status == 0
    assert {t.target: t.error for t in found.measured()} == {"bare/m/q": None, "daemon/m/q": None}
    argv = {x.via: x.argv for x in found.launches}
    assert argv["direct"] == argv["daemon"]
    daemon = next(x for x in found.launches if x.via == "daemon")
    assert {"ready", "first_token", "slot_free"} <= set(daemon.cp)
    left = [p for p in psutil.process_iter(["cmdline"]) if str(model) in (p.info["cmdline"] or [])]
    assert psutil.wait_procs(left, timeout=20)[1] == []  # a keeper's last step comes after its engine's end was told


def test_two_daemons_may_be_up_at_once(tmp_path: Path) -> None:
    servers = "".join(f'[[server]]\nid = "{n}"\nengine = "fake"\nvia = "daemon"\n' for n in "ab")
    (tmp_path / "m.fake.json").write_text("{}")
    path = tmp_path / "two.toml"
    path.write_text(
        f'[suite]\nname = "x"\ntrials = 2\nlaunches = 1\nup = "all"\n{servers}[[model]]\nid = "m"\n'
        'artifacts = { q = "./m.fake.json" }\n' + CASE.format(id="hello", cache="asis")
    )
    status, (found,) = bench(path)
    assert (status, [t.error for t in found.measured()]) == (0, [None] * 4)
    assert len({t.process for t in found.measured()}) == 2


def test_an_attached_server_that_is_not_there_is_told(write: Write, tmp_path: Path) -> None:
    path = tmp_path / "gone.toml"
    path.write_text(
        '[suite]\nname = "x"\ntrials = 1\nlaunches = 1\nready_s = 0.2\n[[server]]\nid = "s"\nattach = "http://127.0.0.1:9/v1"\n'
        + CASE.format(id="hello", cache="asis")
    )
    status, (found,) = bench(path)
    assert status == 3
    assert [x.error for x in found.launches] == ["s was not ready after 0.2 s: it does not listen"]
