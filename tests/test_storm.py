"""Storms: clients that come and go against daemons that leave, and are killed, all the time.

The short form belongs to `make test`; `make soak SECONDS=600` runs the long one and prints its figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from llm_daemon.testing.world import World

WORKERS = 4
WORKER = """
import json, os, random, sys, time
from llm_daemon import attach, connect
seed, seconds, kill, model = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
dice, end = random.Random(seed), time.monotonic() + seconds
out = {"attaches": 0, "models": 0, "kills": 0, "failed": [], "ms": [], "daemons": []}
while time.monotonic() < end:
    began = time.monotonic()
    lease = talk = None
    try:
        if dice.random() < 0.1:
            lease = attach(model, keep_alive=0)
            pid = lease.daemon_pid
            out["models"] += 1
        else:
            talk = connect()
            pid = talk.welcome["pid"]
        out["attaches"] += 1
        out["ms"].append(round((time.monotonic() - began) * 1e3, 2))
        if not out["daemons"] or out["daemons"][-1] != pid:
            out["daemons"].append(pid)
        if dice.random() < kill:
            try:
                fd = os.pidfd_open(pid)  # while our lease stands, the pid is its own
            except ProcessLookupError:
                pass  # another worker was quicker
            else:
                import signal
                still = lease.is_open() if lease else talk.is_open()
                if still:
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                    out["kills"] += 1
                os.close(fd)
        time.sleep(dice.random() * 0.003)
    except Exception as e:
        out["failed"].append(repr(e))
    finally:
        if lease: lease.close()
        if talk: talk.close()
    time.sleep(dice.random() * 0.03)
print(json.dumps(out))
"""


def storm(world: World, seconds: float, kill: float, model: str) -> dict[str, Any]:
    """Runs the workers; returns what happened, with percentiles in milliseconds."""
    world.config.write_text(world.config.read_text().replace("linger = 0.2", "linger = 0.005").replace("ttl = 30", "ttl = 0"))
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(seed), str(seconds), str(kill), model],
            env=world.env, stdout=subprocess.PIPE, text=True,
        )
        for seed in range(WORKERS)
    ]  # fmt: skip
    outs = [json.loads(w.communicate(timeout=seconds + 60)[0]) for w in workers]
    ms = sorted(m for o in outs for m in o["ms"])
    return {
        "attaches": sum(o["attaches"] for o in outs),
        "with_model": sum(o["models"] for o in outs),
        "generations": len({pid for o in outs for pid in o["daemons"]}),
        "kills": sum(o["kills"] for o in outs),
        "failed": [f for o in outs for f in o["failed"]],
        "p50_ms": ms[len(ms) // 2],
        "p99_ms": ms[len(ms) * 99 // 100],
        "max_ms": ms[-1],
    }


def assert_calm(world: World, seen: dict[str, Any]) -> None:
    assert seen["failed"] == []
    assert seen["generations"] > 5, "the storm met no leaving daemon: it proves nothing"
    world.wait_empty(within=15)


@pytest.mark.parametrize("kill", [0.0, 0.05], ids=["leaving", "killed"])
def test_a_short_storm_fails_no_attach(world: World, quick: str, kill: float) -> None:
    assert_calm(world, storm(world, 6, kill, quick))


@pytest.mark.slow
def test_a_long_storm_fails_no_attach(world: World, fake_model: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    seconds = float(os.environ.get("SECONDS", "120"))
    for kill in (0.0, 0.03):
        seen = storm(world, seconds / 2, kill, fake_model(tokens=["x"]))
        with capsys.disabled():
            print(
                "\n"
                + json.dumps({"kill": kill, **{k: v for k, v in seen.items() if k != "failed"}, "failed": len(seen["failed"])})
            )
        assert_calm(world, seen)
