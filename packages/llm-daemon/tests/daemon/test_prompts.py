"""What conversations leave on disk: kept whole or not at all, within its limit, and never given to another model."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_daemon.daemon import prompts
from llm_daemon.daemon.prompts import PromptCache, identity

BYTES = 10_000


class Slots:
    """Plays the engine: slots with some tokens in each, saved and restored as llama.cpp does."""

    def __init__(self, *tokens: int) -> None:
        self.tokens, self.folder, self.status, self.hangs = list(tokens), Path(), 200, False
        self.restored: list[int] = []
        self.written: int | None = None  # bytes it claims to have written

    async def post(self, process: Any, path: str, body: dict[str, str]) -> tuple[int, dict[str, Any]]:
        if self.hangs:
            await asyncio.get_running_loop().create_future()
        number, action = path.removeprefix("/slots/").split("?action=")
        tokens, file = self.tokens[int(number)], self.folder / body["filename"]
        if self.status != 200:
            return self.status, {"error": {"message": "no"}}
        if action == "save":
            file.write_bytes(number.encode() * BYTES)
            return 200, {"n_saved": tokens, "n_written": BYTES if self.written is None else self.written}
        assert file.read_bytes() == number.encode() * BYTES
        self.restored.append(int(number))
        return 200, {"n_restored": tokens}


Engine = Callable[..., Slots]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    def make(*tokens: int) -> Slots:
        slots = Slots(*tokens)
        monkeypatch.setattr(prompts, "post", slots.post)
        return slots

    return make


class Kept:
    """One entry of a cache, and the engine that uses it."""

    def __init__(self, cache: PromptCache, slots: Slots, key: str = "k") -> None:
        folder = cache.folder(key)
        assert folder
        self.cache, self.slots, self.folder = cache, slots, folder
        slots.folder = Path(folder)

    def save(self) -> list[str]:
        asyncio.run(self.cache.save(None, self.folder, len(self.slots.tokens), "m"))  # type: ignore[arg-type]
        return sorted(os.listdir(self.folder)) if os.path.isdir(self.folder) else []

    def restore(self) -> int:
        return asyncio.run(self.cache.restore(None, self.folder, "m"))  # type: ignore[arg-type]


def test_it_comes_back_once(tmp_path: Path, engine: Engine) -> None:
    slots = engine(1000, 3, 500)
    kept = Kept(PromptCache(str(tmp_path / "p"), 10**6), slots)
    assert kept.restore() == 0
    assert kept.save() == ["index.json", "slot-0.bin", "slot-2.bin"]  # three tokens are not worth it
    assert kept.restore() == 1500 and slots.restored == [0, 2]
    assert os.listdir(kept.folder) == [] and kept.restore() == 0


def test_nobody_else_may_read_it(tmp_path: Path, engine: Engine) -> None:
    before = os.umask(0)
    try:
        kept = Kept(PromptCache(str(tmp_path / "p"), 10**6), engine(100))
        names = kept.save()
        assert {stat.S_IMODE(os.stat(os.path.join(kept.folder, name)).st_mode) for name in names} == {0o600}
        assert {stat.S_IMODE(os.stat(path).st_mode) for path in (kept.folder, kept.cache.root)} == {0o700}
    finally:
        os.umask(before)


def damage_cut(file: Path) -> None:
    os.truncate(file, BYTES - 1)


def damage_flip(file: Path) -> None:
    file.write_bytes(b"x" + file.read_bytes()[1:])


def damage_lose(file: Path) -> None:
    file.unlink()


def damage_index(file: Path) -> None:
    file.with_name("index.json").write_text("{")


def damage_index_form(file: Path) -> None:
    file.with_name("index.json").write_text('{"files": [3]}')


@pytest.mark.parametrize("damage", [damage_cut, damage_flip, damage_lose, damage_index, damage_index_form])
def test_what_is_damaged_is_left_out(tmp_path: Path, engine: Engine, damage: Callable[[Path], None]) -> None:
    slots = engine(100)
    kept = Kept(PromptCache(str(tmp_path / "p"), 10**6), slots)
    kept.save()
    damage(Path(kept.folder) / "slot-0.bin")
    assert kept.restore() == 0 and slots.restored == [] and os.listdir(kept.folder) == []


def test_what_the_engine_did_not_write_whole_is_not_kept(tmp_path: Path, engine: Engine) -> None:
    slots = engine(100)
    kept = Kept(PromptCache(str(tmp_path / "p"), 10**6), slots)
    slots.written = BYTES + 1
    assert "index.json" not in kept.save()
    assert kept.restore() == 0 and slots.restored == []


@pytest.mark.parametrize("how", ["status", "hangs"])
def test_an_engine_that_cannot_costs_nothing_but_time(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    slots = engine(100)
    kept = Kept(PromptCache(str(tmp_path / "p"), 10**6), slots)
    kept.save()
    monkeypatch.setattr(prompts, "SAVE_WAIT", 0.05)
    monkeypatch.setattr(prompts, "RESTORE_WAIT", 0.05)
    setattr(slots, how, {"status": 501, "hangs": True}[how])
    assert kept.restore() == 0 and os.listdir(kept.folder) == []
    assert kept.save() == []


def test_the_longest_unused_goes_first(tmp_path: Path, engine: Engine) -> None:
    cache = PromptCache(str(tmp_path / "p"), 2 * BYTES + 2000)
    entries = [Kept(cache, engine(100), name) for name in "abc"]
    for age, kept in enumerate(entries[:2]):
        kept.slots = engine(100)
        kept.slots.folder = Path(kept.folder)
        assert kept.save()
        os.utime(os.path.join(kept.folder, "index.json"), (age, age))
    entries[2].save()
    assert sorted(os.listdir(cache.root)) == ["b", "c"]


def test_more_than_the_limit_is_not_kept_and_an_unfinished_one_is_cleared(tmp_path: Path, engine: Engine) -> None:
    root = tmp_path / "p"
    unfinished = root / "u"
    unfinished.mkdir(parents=True)
    (unfinished / "slot-0.bin").write_bytes(b"half")
    kept = Kept(PromptCache(str(root), BYTES - 1), engine(100))
    assert kept.save() == [] and os.listdir(root) == []


def test_what_is_being_written_is_not_cleared(tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = engine(100)
    cache = PromptCache(str(tmp_path / "p"), 10**6)
    kept = Kept(cache, slots)
    seen = []

    async def post(process: Any, path: str, body: dict[str, str]) -> tuple[int, dict[str, Any]]:
        answer = await slots.post(process, path, body)
        cache.trim()
        seen.append(os.listdir(kept.folder))
        return answer

    monkeypatch.setattr(prompts, "post", post)
    assert kept.save() == ["index.json", "slot-0.bin"] and seen == [["slot-0.bin"]]


@pytest.mark.parametrize("odd", [None, "many", [1]])
def test_an_engine_that_answers_nonsense_is_only_not_kept(
    tmp_path: Path, engine: Engine, odd: object, caplog: pytest.LogCaptureFixture
) -> None:
    slots = engine(100)
    kept = Kept(PromptCache(str(tmp_path), 10**6), slots)
    slots.tokens[0] = odd  # type: ignore[call-overload]
    kept.save()
    assert "could not be kept" in caplog.text


def test_the_empty_folder_of_an_engine_that_starts_stays(tmp_path: Path) -> None:
    cache = PromptCache(str(tmp_path), 10**6)
    folder = cache.folder("starting")
    assert folder is not None
    cache.trim()
    assert os.path.isdir(folder)
    PromptCache(str(tmp_path), 10**6).trim()  # another daemon, later
    assert not os.path.exists(folder)


def test_a_limit_of_nothing_keeps_nothing(tmp_path: Path, engine: Engine) -> None:
    root = tmp_path / "p"
    Kept(PromptCache(str(root), 10**6), engine(100)).save()
    off = PromptCache(str(root), 0)
    assert off.folder("k") is None
    off.trim()
    assert os.listdir(root) == []


def test_a_nearly_full_disk_gets_nothing_more(tmp_path: Path, engine: Engine) -> None:
    assert Kept(PromptCache(str(tmp_path / "p"), 2**62), engine(100)).save() == []


def test_a_folder_that_cannot_be_made_is_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert PromptCache(str(tmp_path / "file" / "p"), 10**6).folder("k") is None


def test_only_the_very_same_thing_has_the_same_key(tmp_path: Path) -> None:
    model, other, program = tmp_path / "m.gguf", tmp_path / "n.gguf", tmp_path / "engine"
    for path in (model, other, program):
        path.write_bytes(b"12345")
    key = identity([str(model)], str(program), {"context": 1})
    assert key == identity([str(model)], str(program), {"context": 1})
    keys = {
        key,
        identity([str(model)], str(program), {"context": 2}),
        identity([str(other)], str(program), {"context": 1}),
        identity([str(model), str(other)], str(program), {"context": 1}),
        identity([str(model)], "a-name-on-PATH", {"context": 1}),
    }
    assert len(keys) == 5
    model.write_bytes(b"54321")
    os.utime(model, ns=(1, 1))
    assert identity([str(model)], str(program), {"context": 1}) not in keys
