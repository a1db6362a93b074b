"""A fault at every point of a life, to each process of it: a client is served all the same, and nothing is left.

The quick form strikes each point with each fault on the process that passes it, and a sample of the rest; the whole
matrix is slow (`MATRIX_TRIALS=50` for the long run).  At the end, orders of steps that break a wrong
protocol, found by the exhaustive model, are driven through the real one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import pytest

from llm_daemon.daemon.supervisor import KEEPER_DEATHS

from .faults import (
    FAULTS,
    LEAVE,
    OWNER,
    POINTS,
    RETIRE,
    START,
    VICTIMS,
    Cell,
    Outcome,
    Stage,
    cells,
    child_of,
    play,
    stage,
    until,
)
from .lifecycle_model import Model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and pidfds")
SIDE_BY_SIDE = 2
SAMPLE = 4


def trials(chosen: list[Cell]) -> list[Outcome]:
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        return list(pool.map(play, chosen))


def test_a_plain_life_passes_every_point() -> None:
    with stage() as s:
        client = s.attach(ask=True)
        assert client.said()["answer"] == "Hello"
        client.end()
        s.wait_empty(20)
        seen = [(pid, point) for pid, point in s.passed() if point in OWNER]
        assert set(POINTS) - {point for _, point in seen} == set(RETIRE)
        daemon = s.pids("renamed")[0]
        alone = [point for point in POINTS if OWNER[point] == "daemon" and point not in RETIRE]
        assert [point for pid, point in seen if pid == daemon] == alone
        assert {point for pid, point in seen if pid == client.pid} == {"start_got", "verdict_read"}
        assert len({pid for pid, point in seen if OWNER[point] == "keeper"}) == 1

        client = s.attach()
        assert "attached" in client.said()
        s.retire()
        assert until(lambda: s.pids("ghost_unlocked") or None, "a ghost") == [s.pids("renamed")[-1]]
        assert s.aftermath(files=False) == []


def test_what_makes_no_sense_is_left_out_by_rule() -> None:
    chosen = cells()
    assert len(POINTS) == len({*START, *LEAVE, *RETIRE}) == 22
    assert {cell.point for cell in chosen if cell.own} == set(POINTS)
    assert len([cell for cell in chosen if cell.own]) == len(POINTS) * len(FAULTS)
    # Of 22 x 4 x 3 places, and the engine's own 4.
    assert len(chosen) == 142


@pytest.mark.parametrize("point", POINTS)
def test_a_fault_of_the_process_at_a_point(point: str) -> None:
    wrong = [out for out in trials([cell for cell in cells() if cell.point == point and cell.own]) if out.wrong]
    assert not wrong, "\n".join(map(str, wrong))


def test_a_sample_of_faults_of_other_processes() -> None:
    seed = random.SystemRandom().randrange(2**32)
    others = [cell for cell in cells() if not cell.own]
    wrong = [out for out in trials(random.Random(seed).sample(others, SAMPLE)) if out.wrong]
    assert not wrong, f"seed {seed}\n" + "\n".join(map(str, wrong))


def test_a_keeper_that_never_lives_is_told() -> None:
    """One that is killed is replaced, and the client hears nothing of it; that goes on for a while, and not for ever."""
    with stage() as s:
        traps = s.traps()
        (traps.folder / "chance").write_text("1 keeper_checked KILL\n")
        s.holder(traps).line()  # who is told an error holds nothing, and the daemon is to stay
        kind, code, message, _ = s.attach(traps).said()["told"]
        assert (kind, code) == ("EngineError", "keeper_died")
        assert "its keeper died" in message
        assert len(s.pids("keeper_checked")) == KEEPER_DEATHS
        (traps.folder / "chance").unlink()
        served_by(s, s.pids("renamed")[0])


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_the_whole_matrix(capsys: pytest.CaptureFixture[str]) -> None:
    count = int(os.environ.get("MATRIX_TRIALS", "2"))
    chosen = cells()
    began = time.monotonic()
    outs: dict[Cell, list[Outcome]] = defaultdict(list)
    for out in trials(chosen * count):
        outs[out.cell].append(out)
    with capsys.disabled():
        print(table(outs))
        print(json.dumps(figures(outs) | {"seconds": round(time.monotonic() - began)}))
    wrong = [out for found in outs.values() for out in found if out.wrong]
    assert not wrong, "\n".join(map(str, wrong))


def table(outs: dict[Cell, list[Outcome]]) -> str:
    rows = [f"\n{'point':16} {'fault':7} {'victim':7} {'trials':>6} {'attached':>8} {'told':>5} {'survivors':>9} {'wrong':>5}"]
    for cell, found in outs.items():
        rows.append(
            f"{cell.point:16} {cell.fault:7} {cell.victim:7} {len(found):6} {sum(out.attached for out in found):8} "
            f"{sum(bool(out.told) for out in found):5} {sum(out.survivors for out in found):9} "
            f"{sum(bool(out.wrong) for out in found):5}"
        )
    return "\n".join(rows)


def figures(outs: dict[Cell, list[Outcome]]) -> dict[str, float]:
    every = [out for found in outs.values() for out in found]
    return {
        "cells": len(outs),
        "left_out": len(POINTS) * len(FAULTS) * len(VICTIMS) - sum(cell.victim in VICTIMS for cell in outs),
        "trials": len(every),
        "attached": sum(out.attached for out in every),
        "told": sum(bool(out.told) for out in every),
        "client_killed": sum(out.cell.victim == "client" and out.cell.fault == "KILL" for out in every),
        "survivors": sum(out.survivors for out in every),
        "wrong": sum(bool(out.wrong) for out in every),
        "slowest_trial_seconds": round(max(out.seconds for out in every), 1),
    }


# Replay: the model's shortest way into each mistake, step by step, with real processes that do not make it. ----------


def breaks(mutant: str, steps: str) -> None:
    """The model can go these steps with the mutant and not without: else the test below drives something else than it says."""
    for mutants in (frozenset({mutant}), frozenset[str]()):
        model = Model(2, 3, mutants)
        worlds = {model.initial}
        for step in steps.split():
            worlds = {after for w in worlds for name, _, after in model.steps(w) if name == step}
        assert bool(worlds) is bool(mutants), steps


def served_by(s: Stage, daemon: int) -> None:
    """One daemon serves, whoever asks."""
    said = s.attach(ask=True).said()
    assert said.get("answer") == "Hello", said
    assert said["attached"][0] == daemon
    assert s.aftermath() == []


def test_replay_a_verdict_is_not_trusted() -> None:
    """M1: READY, and the daemon leaves before its client connects; that client starts another one."""
    breaks("M1", "refused START refused spawn open lock check publish verdict idle close broken")
    with stage() as s:
        mine = s.traps()
        for point in ("verdict_read", "listener_closed"):
            mine.set(point, "WAIT")
        client = s.attach(mine)  # refused START refused spawn open lock check publish verdict
        mine.wait("verdict_read")
        s.come_and_go()  # idle close
        first = mine.wait("listener_closed")
        mine.release("verdict_read")
        second = until(lambda: next((pid for pid in s.pids("lock_tried") if pid != first), None), "another candidate")
        assert second not in s.pids("lock_got")  # LIFE is held, nobody answers: it waits and does not go
        mine.release("listener_closed")
        assert client.said()["attached"][0] == second
        served_by(s, second)


def test_replay_nothing_is_unlinked_after_the_lock_is_free() -> None:
    """M2: a daemon leaves while the next one publishes; nothing that it does at its end may hit its successor's socket."""
    breaks(
        "M2",
        "refused START refused no-START refused spawn open lock check publish verdict idle close "
        "refused spawn exit open lock check publish late-unlink",
    )
    with stage() as s:
        one, two = s.traps(), s.traps()
        one.set("listener_closed", "WAIT")
        two.set("start_got", "WAIT")
        two.set("dir_opened", "WAIT")
        other = s.attach(two)  # refused START
        two.wait("start_got")
        assert s.spawner(one).line() == "READY\n"  # the first one, by a client that goes on without START
        s.come_and_go()  # idle close
        first = one.wait("listener_closed")
        two.release("start_got")  # refused spawn
        second = two.wait("dir_opened")
        two.release("dir_opened")
        # LIFE is free when the first one is gone, and not before: else the next may publish now, and lose its socket.
        until(lambda: s.pids("lock_tried").count(second) > 20 or s.pids("renamed")[1:] or None, "twenty looks at LIFE")
        one.release("listener_closed")  # exit
        assert other.said()["attached"][0] == second != first  # lock check publish
        served_by(s, second)


def test_replay_a_lock_of_a_deleted_folder_is_worth_nothing() -> None:
    """M3: a candidate has opened a folder that is deleted, then locks it; meanwhile another one publishes in the new folder."""
    breaks(
        "M3",  # where the exit itself deletes the folder
        "refused START refused spawn refused no-START refused spawn open lock check publish verdict idle close "
        "refused START refused spawn open exit lock check open lock check publish publish",
    )
    with stage() as s:
        one, two, three = s.traps(), s.traps(), s.traps()
        assert s.spawner(one).line() == "READY\n"
        one.set("listener_closed", "WAIT")
        s.come_and_go()  # idle close
        one.wait("listener_closed")
        two.set("dir_opened", "WAIT")
        late = s.attach(two)  # refused START refused spawn open
        stray = two.wait("dir_opened")
        shutil.rmtree(s.runtime)
        one.release("listener_closed")  # exit
        first = s.attach(three).said()["attached"][0]  # open lock check publish
        two.set("ino_checked", "WAIT")
        two.release("dir_opened")  # lock
        two.wait("ino_checked")
        two.release("ino_checked")  # it sees the new folder, and finds who serves there
        assert late.said()["attached"][0] == first
        assert stray not in s.pids("renamed")
        served_by(s, first)


def test_replay_a_lease_in_the_making_keeps_the_daemon() -> None:
    """M4: the time to leave comes while a client is between accept and WELCOME, and another is still in the queue."""
    breaks("M4", "refused START refused spawn open lock check publish connect accept idle")
    with stage() as s:
        mine = s.traps()
        first = s.attach(mine)
        daemon = first.said()["attached"][0]
        mine.set("hello_read", "WAIT")
        guest = s.holder(mine)  # connect accept
        mine.wait("hello_read")
        queued = s.holder(mine)
        first.end()
        # The daemon stands still while its linger (0.2 s) runs out: one lease ends, two begin, and a timer is due when it
        # goes on.  No event tells that somebody did not leave: the second wait is for one who would.
        time.sleep(0.5)
        mine.release("hello_read")
        assert int(guest.line()) == int(queued.line()) == daemon
        guest.end()
        until(lambda: True if child_of(daemon) is None else None, "the engine's end")
        time.sleep(0.5)
        assert s.pids("idle_decided") == []
        served_by(s, daemon)


@pytest.mark.parametrize("point", ["lock_got", "ino_checked", "listening"])
def test_replay_a_deleted_folder_does_not_let_an_old_candidate_in(point: str) -> None:
    """M6: a candidate with LIFE of a deleted folder publishes after another one did so in the new folder."""
    breaks(
        "M6",
        "refused START refused spawn refused no-START refused spawn open lock check CLEAN open lock check publish publish",
    )
    with stage() as s:
        one, two = s.traps(), s.traps()
        one.set(point, "WAIT")
        late = s.attach(one)  # refused START refused spawn open lock
        stray = one.wait(point)
        shutil.rmtree(s.runtime)  # CLEAN
        said = s.spawner(two)  # no-START refused spawn open lock check publish
        assert said.line() == "READY\n"
        first = s.pids("renamed")[0]
        one.release(point)  # publish?
        assert late.said()["attached"][0] == first
        assert stray not in s.pids("renamed")
        served_by(s, first)
