"""Many models and little memory, with real processes: waits, evictions, what is learned, and what `plan` foretells."""

from __future__ import annotations

import concurrent.futures
import json
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_daemon import attach, errors
from llm_daemon.client import sync
from llm_daemon.testing.world import World

MB = 1_000_000
Fake = Callable[..., str]


def budget(world: World, text: str) -> None:
    world.config.write_text(f"memory_budget = '{text}'\nmax_overtake = 2\n" + world.config.read_text())


def ask(llm: Any, model: str, words: str = "one two three") -> str:
    """What the model says, whole."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": words}], "max_tokens": 8}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {llm.api_key}"}
    with urllib.request.urlopen(urllib.request.Request(f"{llm.base_url}/chat/completions", body, headers), timeout=60) as answer:
        said: str = json.load(answer)["choices"][0]["message"]["content"]
        return said


def status() -> dict[str, Any]:
    talk = sync.connect(start_daemon=False, lease=False)
    assert talk is not None
    try:
        found: dict[str, Any] = talk.ask("CALL", 10, method="status")["result"]
        return found
    finally:
        talk.close()


def until(is_so: Callable[[], bool], within: float = 30.0) -> None:
    """Looks again and again: what it waits for happens by time alone, and nobody tells of it."""
    end = time.monotonic() + within
    while not is_so():
        assert time.monotonic() < end


def states(model: str) -> list[str]:
    return [i["state"] for i in status()["instances"] if i["model"] == model]


def story(world: World) -> list[dict[str, Any]]:
    """What became of the models, oldest first."""
    done = world.llm_daemon("explain", "--last", "1000", "--json")
    assert done.returncode == 0, done.stderr
    return list(reversed(json.loads(done.stdout)["events"]))


def test_many_clients_of_six_models_in_memory_for_two(world: World, fake_model: Fake) -> None:
    budget(world, "100MB")
    models = [fake_model(memory_bytes=45 * MB, allocates=30 * MB, echo=True, token_ms=2) for _ in range(6)]

    def client(number: int) -> int:
        with attach(models[number % 6]) as llm:
            for n in range(8):
                words = f"client {number} asks {n}"
                assert ask(llm, models[(number * 5 + n * n) % 6], words) == words
            return 8

    with concurrent.futures.ThreadPoolExecutor(8) as pool, attach(models[0]):
        assert sum(pool.map(client, range(8))) == 64
        events = story(world)
    alive: set[str] = set()
    for event in events:
        if event["kind"] == "loading":
            alive.add(event["instance"])
            assert len(alive) <= 2
        elif event["kind"] == "closed":
            alive.discard(event["instance"])
            assert event["why"] == "evicted" and re.search(r"needs its memory$", event["text"])
    loads = [event["model"] for event in events if event["kind"] == "loading"]
    assert set(loads) == set(models)
    assert any(event["kind"] == "queued" and "waits for memory" in event["text"] for event in events)


def test_what_can_never_fit_is_refused_at_once(world: World, fake_model: Fake) -> None:
    budget(world, "100MB")
    large = fake_model(memory_bytes=3_000 * MB)
    with pytest.raises(errors.UsageError, match=r"needs about 3\.0 GB of memory, all models together may have 100 MB") as caught:
        attach(large)
    assert caught.value.code == "too_large" and "memory_budget and `llm-daemon stop`" in caught.value.hint
    with attach(fake_model()) as llm:
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(llm, large)
        with refused.value:
            assert refused.value.code == 400
            assert json.load(refused.value)["error"]["code"] == "too_large"
    done = world.llm_daemon("load", large)
    assert (done.returncode, done.stdout) == (2, "") and "3.0 GB" in done.stderr


def test_an_idle_leased_model_leaves_and_comes_back_unnoticed(world: World, fake_model: Fake) -> None:
    budget(world, "50MB")
    one, other = (fake_model(memory_bytes=45 * MB, echo=True) for _ in range(2))
    with attach(one) as first, attach(other) as second:
        assert ask(second, other) == ask(first, one) == "one two three"
        assert [lease["instances"] for lease in status()["leases"]] == [["i1"], ["i2"]]
    closed = [(event["model"], event["why"]) for event in story(world) if event["kind"] == "closed"]
    assert closed[:2] == [(one, "evicted"), (other, "evicted")]


def test_who_waits_hears_for_whom(world: World, fake_model: Fake) -> None:
    budget(world, "50MB")
    gate = world.base / "gate"
    slow, other = fake_model(memory_bytes=45 * MB, load_until=str(gate)), fake_model(memory_bytes=40 * MB)
    said: list[Any] = []

    def heard(progress: sync.Progress) -> None:
        said.append(progress)
        if progress.phase == "wait":
            gate.touch()

    with concurrent.futures.ThreadPoolExecutor(1) as pool, attach(fake_model()):
        first = pool.submit(attach, slow)
        until(lambda: states(slow) == ["starting"])
        with attach(other, on_progress=heard):
            first.result().close()
    waits = [p.message for p in said if p.phase == "wait" and "memory" in p.message]
    assert waits == [f"{other} waits for memory: it needs 40 MB; in the 50 MB there are: {slow} (loading, 45 MB)"]


def test_what_an_engine_really_takes_is_learned_and_counts(world: World, fake_model: Fake) -> None:
    budget(world, "150MB")
    idle = fake_model(memory_bytes=45 * MB, allocates=20 * MB)
    grows = fake_model(memory_bytes=30 * MB, allocates=120 * MB, echo=True)
    with attach(idle) as llm, attach(grows):
        until(lambda: "ready" not in states(idle))  # once it has been there for its moment: the other one took more than it said
        (it,) = [i for i in status()["instances"] if i["model"] == grows]
        assert it["state"] == "ready" and 120 * MB < it["need_bytes"] < 150 * MB
        assert it["memory_peak_bytes"] == it["need_bytes"]
        assert ask(llm, grows) == "one two three"
    known = json.loads((world.state / "memory.json").read_text())
    assert [120 * MB < n < 150 * MB for n in known.values() if n > 100 * MB] == [True]
    plan = json.loads(world.llm_daemon("plan", grows, "--json").stdout)
    assert plan["memory"]["basis"] == "learned" and plan["memory"]["need_bytes"] in known.values()
    closed = [event for event in story(world) if event["kind"] == "closed" and event["model"] == idle]
    assert closed[0]["why"] == "evicted" and "memory_budget" in closed[0]["text"]


def test_plan_runs_nothing_and_says_who_would_leave(world: World, fake_model: Fake) -> None:
    budget(world, "100MB")
    one, other = (fake_model(memory_bytes=n * MB) for n in (60, 45))
    alone = json.loads(world.llm_daemon("plan", one, "--json").stdout)
    assert alone["daemon"] is False and not world.processes()
    assert alone["outcome"] == {
        "budget_bytes": 100 * MB,
        "promised_bytes": 0,
        "does": "starts",
        "models": [],
        "text": "it starts at once",
    }
    assert alone["memory"]["need_bytes"] == 60 * MB and alone["artifact"]["path"] == one and one in alone["argv"]
    with attach(one):
        shared = json.loads(world.llm_daemon("plan", one, "--json").stdout)
        assert (shared["daemon"], shared["outcome"]["does"]) == (True, "shares")
        until(lambda: "nobody uses it now" in world.llm_daemon("plan", other).stdout)  # a moment after it became ready
        evicts = world.llm_daemon("plan", other)
        assert f"outcome:  it starts when {one} has left: nobody uses it now" in evicts.stdout
        assert "memory:   45 MB (estimated: weights 45 MB)" in evicts.stdout
        assert "budget:   60 MB of 100 MB are kept for models now" in evicts.stdout
        refused = json.loads(world.llm_daemon("plan", fake_model(memory_bytes=200 * MB), "--json").stdout)
        assert refused["outcome"]["does"] == "refused"
        assert [i["model"] for i in status()["instances"]] == [one]
    ps = world.llm_daemon("plan", "no-such-model")
    assert ps.returncode == 2 and "no-such-model" in ps.stderr


@pytest.mark.real
def test_two_context_sizes_share_one_engine_when_the_larger_covers_both(world: World, smollm2: str) -> None:
    with attach(smollm2, context=1024) as large, attach(smollm2, context=512) as small:
        assert large.pid == small.pid and large.instance == small.instance
        said = ask(small, small.model), ask(large, large.model)
        assert all(said)
        (it,) = status()["instances"]
        assert (it["context"], len(it["leases"])) == (1024, 2)


@pytest.mark.real
def test_contexts_that_cannot_be_reconciled_get_what_they_asked_for_or_a_clear_refusal(
    world: World, smollm2: str, tmp_path: Path
) -> None:
    # A file of its own: of one that engines of other tests have mapped too, ours would be found to need only its share.
    smollm2 = shutil.copy(smollm2, str(tmp_path / "own.gguf"))
    with attach(smollm2, context=256, parallel=1) as one:
        need = json.loads(world.llm_daemon("plan", f"{smollm2}?context=512&parallel=1", "--json").stdout)["memory"]["need_bytes"]
        assert 100 * MB < need < 400 * MB
        with attach(smollm2, context=512, parallel=1) as two:  # there is room: one each
            assert one.pid != two.pid
            assert sorted(i["context"] for i in status()["instances"]) == [256, 512]
            assert ask(one, one.model) and ask(two, two.model)
        assert world.llm_daemon("stop", "--force").returncode == 0
    budget(world, str(need + 20 * MB))
    with attach(smollm2, context=256, parallel=1) as one, attach(smollm2, context=512, parallel=1) as two:
        # No room for both: the larger one takes over, and serves the smaller wish too.
        assert ask(one, one.model) and ask(two, two.model)
        assert [(i["context"], i["state"]) for i in status()["instances"] if i["state"] == "ready"] == [(512, "ready")]
        with pytest.raises(errors.UsageError, match=r"needs about .* of memory, all models together may have") as caught:
            attach(smollm2, context=8192, parallel=4)
        assert caught.value.code == "too_large"
