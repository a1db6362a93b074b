"""What models need of the memory: estimates, what is learned, and what a process tree takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_daemon import budget as module, errors
from llm_daemon.config import Settings
from llm_daemon.daemon import memory
from llm_daemon.daemon.address import tree
from llm_daemon.daemon.memory import Learned, Memory, key, peak_bytes
from llm_daemon.engines.registry import Registry
from llm_daemon.models.catalog import Catalog
from llm_daemon.models.weight import PROCESS
from llm_daemon.spec import Artifact, Spec, Wish

MB = 1_000_000
FAKE = {"fake": {"adapter": "llm_daemon.testing.fake_engine:FakeEngine"}}


def scales(tmp_path: Path, budget: str = "1GB") -> Memory:
    settings = Settings(memory_budget=budget, engines=FAKE, context=512, parallel=1)
    return Memory(settings, Registry(FAKE), str(tmp_path / "state" / "memory.json"))


def resolved(text: str) -> Spec:
    spec = Catalog.load({}).resolve(Wish.parse(text))
    return Spec(spec.wish, spec.artifact, spec.wish)


def test_an_adapter_tells_until_its_engine_has_shown(tmp_path: Path, fake_model: Callable[..., str]) -> None:
    it, spec = scales(tmp_path), resolved(fake_model(memory_bytes=30 * MB))
    weight = it.weigh(spec)
    assert (weight.need, weight.basis, weight.learned) == (30 * MB, "estimated", None)
    it.learn(spec, 40 * MB, is_over=False)
    weight = scales(tmp_path).weigh(spec)  # another daemon, later
    assert (weight.need, weight.basis, weight.learned) == (40 * MB, "learned", 40 * MB)
    assert weight.parts is not None and weight.parts.total == 30 * MB


def test_what_nobody_tells_counts_by_its_size_at_first(tmp_path: Path, fake_model: Callable[..., str]) -> None:
    it = scales(tmp_path)
    model = fake_model()
    weight = it.weigh(resolved(model))
    assert (weight.basis, weight.need) == ("size", os.path.getsize(model) + PROCESS)
    there = Spec(Wish("x"), Artifact("https", "https://h/x.gguf", "k"))
    assert (it.weigh(there).need, it.weigh(there).basis) == (0, "unknown")
    sized = Spec(Wish("x"), Artifact("https", "https://h/x.gguf", "k", size=100 * MB))
    assert it.weigh(sized).basis == "size" and 100 * MB < it.weigh(sized).need < 200 * MB


def test_one_that_fits_by_estimate_and_took_more_than_all_may_have_all(tmp_path: Path, fake_model: Callable[..., str]) -> None:
    it, fits, never = scales(tmp_path), resolved(fake_model(memory_bytes=900 * MB)), resolved(fake_model(memory_bytes=2000 * MB))
    it.learn(fits, 1500 * MB, is_over=True)
    assert (it.weigh(fits).need, it.weigh(fits).note) == (1000 * MB, "it took more than the budget: it runs alone")
    assert it.weigh(never).need == 2000 * MB


def test_where_a_gpu_is_seen_the_first_load_is_not_refused(
    tmp_path: Path, fake_model: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GPUS", (str(tmp_path),))
    it, path = scales(tmp_path), fake_model(memory_bytes=2000 * MB)
    assert it.weigh(resolved(path)).need == 1000 * MB and "GPU" in it.weigh(resolved(path)).note
    assert it.weigh(resolved(path + "?gpu_layers=0")).need == 2000 * MB
    assert it.weigh(resolved(fake_model(memory_bytes=10 * it.host))).need == 10 * it.host


def test_without_a_budget_only_the_impossible_is_refused(tmp_path: Path, fake_model: Callable[..., str]) -> None:
    it, path = scales(tmp_path, "none"), fake_model(memory_bytes=10**16)
    assert it.budget is None
    with pytest.raises(errors.UsageError, match="would need some 10,000,000 GB") as caught:
        it.check(resolved(path), path)
    assert caught.value.code == "too_large"
    it.check(resolved(small := fake_model(memory_bytes=MB)), small)


def test_options_that_change_the_need_are_learned_apart() -> None:
    artifact = Artifact("file", "/m", "key:m")
    specs = [Spec(Wish("m"), artifact, Wish("m", context=c, args=a)) for c, a in ((1, ()), (2, ()), (1, ("--x",)))]
    assert len({key(spec) for spec in specs}) == 3
    assert key(Spec(Wish("other name"), artifact, Wish("m", context=1))) == key(specs[0])


def test_more_is_believed_at_once_less_at_the_end_and_little_by_little(tmp_path: Path) -> None:
    it = Learned(str(tmp_path / "m.json"))
    steps = [(100, False, 100), (150, False, 150), (151, False, 150), (50, False, 150), (50, True, 130), (129, True, 130)]
    for used, is_over, known in steps:
        it.note("a", used, is_over)
        assert it.get("a") == known
    assert json.loads((tmp_path / "m.json").read_text()) == {"a": 130}


def test_the_file_stays_small_and_keeps_what_was_used_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "KEPT", 3)
    it = Learned(str(tmp_path / "m.json"))
    for n, name in enumerate("abcad"):
        it.note(name, 1000 * (n + 1), False)
    assert json.loads((tmp_path / "m.json").read_text()) == {"c": 3000, "a": 4000, "d": 5000}


def test_two_daemons_share_the_file(tmp_path: Path) -> None:
    one, other = (Learned(str(tmp_path / "m.json")) for _ in range(2))
    assert one.get("a") is None and other.get("a") is None
    one.note("a", 1000, False)
    other.note("b", 2000, False)
    assert json.loads((tmp_path / "m.json").read_text()) == {"a": 1000, "b": 2000}


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": "x", "b": -1, "c": 1.5}', '{"a": null}'])
def test_a_broken_file_costs_only_what_was_learned(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.json").write_text(text)
    it = Learned(str(tmp_path / "m.json"))
    assert [it.get(name) for name in "abc"] == [None] * 3
    it.note("a", 1000, False)
    assert it.get("a") == 1000


def test_a_folder_that_cannot_be_written_costs_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    it = Learned(str(tmp_path / "file" / "m.json"))
    it.note("a", 1000, False)
    assert it.get("a") == 1000 and "is not remembered" in caplog.text


def test_many_threads_lose_nothing(tmp_path: Path) -> None:
    it = Learned(str(tmp_path / "m.json"))
    threads = [threading.Thread(target=it.note, args=(f"m{n}", 1000 + n, False)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads((tmp_path / "m.json").read_text()) == {f"m{n}": 1000 + n for n in range(8)}


GROWN = """
import subprocess, sys
big = bytearray(80_000_000); del big
child = [sys.executable, "-S", "-c", "b = bytearray(30_000_000); print('x', flush=True); input()"]
with subprocess.Popen(child, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as p:
    p.stdout.readline(); print(p.pid, flush=True); input(); p.stdin.close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_tree_s_peak_is_what_it_once_took() -> None:
    with subprocess.Popen(
        [sys.executable, "-S", "-c", GROWN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        child = int(parent.stdout.readline())
        assert list(tree(parent.pid)) == [parent.pid, child]
        peak = peak_bytes(parent.pid)
        assert peak is not None and 110 * MB < peak < 160 * MB
        parent.stdin.close()
    assert peak_bytes(parent.pid) is None


def test_the_host_has_some_memory_and_never_more_than_the_machine() -> None:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < module.host_bytes() <= physical


@pytest.mark.parametrize("text", ["0", "-1", "0%", "101%", "8GG", "GB", "nan", "1e9", "50 %%"])
def test_nonsense_is_no_amount(text: str) -> None:
    with pytest.raises(ValueError):
        module.budget_bytes(text, 1000)
