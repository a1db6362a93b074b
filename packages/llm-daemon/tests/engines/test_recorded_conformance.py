"""The suite that every engine adapter must pass, against recordings of engines that cannot run here."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_daemon.engines.base import Plan
from llm_daemon.engines.registry import Registry
from llm_daemon.testing import replay
from llm_daemon.testing.conformance import EngineConformance

WHOLE = b"\0" * 4096 + b"whole\n"


class Recorded(EngineConformance):
    recording = ""
    natural, slack = 1.6, 2.0

    def test_hang_up_frees_the_slot(self, model_path: str) -> None:
        self.long_request = {**self.long_request, "max_tokens": 3000}  # six seconds: twice the limit
        super().test_hang_up_frees_the_slot(model_path)

    @pytest.fixture
    def engine_config(self, tmp_path: Path) -> dict[str, str]:
        folder = tmp_path / "program"
        folder.mkdir()
        return replay.install(self.recording, folder)


class TestMlcLlm(Recorded):
    adapter = "llm_daemon.engines.mlc_llm:MlcLlm"
    recording = "mlc-llm-78b6cdb"

    @pytest.fixture
    def model_path(self, tmp_path: Path) -> str:
        folder = tmp_path / "Model-q4f16_1-MLC"
        folder.mkdir()
        (folder / "mlc-chat-config.json").write_text("{}")
        (folder / "tensor-cache.json").write_text('{"records": []}')
        (folder / "params_shard_0.bin").write_bytes(WHOLE)
        return str(folder)

    @pytest.mark.parametrize("slots", [1])  # asked for two it would serve four: more than that would be compiled anew
    def test_hang_up_to_slot_free(self, model_path: str, slots: int, record_property: Callable[[str, object], None]) -> None:
        super().test_hang_up_to_slot_free(model_path, slots, record_property)


class TestSglang(Recorded):
    adapter = "llm_daemon.engines.sglang:Sglang"
    recording = "sglang-0.5.23"

    @pytest.fixture
    def engine_config(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
        folder = tmp_path / "program"
        folder.mkdir()
        monkeypatch.setattr("llm_daemon.engines.sglang.DEVICES", (str(folder),))
        return replay.install(self.recording, folder)

    @pytest.fixture
    def model_path(self, tmp_path: Path) -> str:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(WHOLE)
        return str(folder)

    def test_daemon_killed_leaves_nothing(self, model_path: str) -> None:
        pytest.skip("the process in the daemon's place would look for a GPU")


class TestLlamafileWithGguf(Recorded):
    adapter = "llm_daemon.engines.llamafile:Llamafile"
    recording = "llamafile-0.10.3"

    @pytest.fixture
    def model_path(self, tmp_path: Path) -> str:
        path = tmp_path / "model.gguf"
        path.write_bytes(b"GGUF" + WHOLE)
        return str(path)


class TestLlamafileWithWeightsInside(Recorded):
    """The model file is the engine; the registry finds it there."""

    adapter = "llm_daemon.engines.llamafile:Llamafile"
    recording = "llamafile-0.10.3"

    @pytest.fixture
    def engine_config(self, tmp_path: Path) -> dict[str, str]:
        return {"path": self.bundle(tmp_path / "whole", WHOLE)}

    def bundle(self, folder: Path, weights: bytes) -> str:
        folder.mkdir()
        path = Path(replay.install(self.recording, folder)["path"]).rename(folder / "model.llamafile")
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("weights.gguf", b"GGUF" + weights)
            archive.writestr(".args", "-m\n/zip/weights.gguf\n--temp\n0.6\n...\n")
        return str(path)

    @pytest.fixture
    def model_path(self, engine_config: dict[str, str]) -> str:
        return engine_config["path"]

    @pytest.fixture
    def broken_model(self, tmp_path: Path) -> tuple[str, str]:
        return self.bundle(tmp_path / "broken", WHOLE[:-3]), "not within the file bounds"

    def planned(self, model: str, **options: Any) -> Plan:
        _, self.where = Registry({}).choose(model)
        assert self.where.origin == "the model file itself"
        return super().planned(model, **options)


class TestOllama(Recorded):
    """Its instance is the real host process; what it finds running is the recording."""

    adapter = "llm_daemon.engines.ollama:Ollama"
    recording = "ollama-00188139"

    @pytest.fixture
    def engine_config(self) -> Iterator[dict[str, str]]:
        with replay.serve(self.recording) as url:
            yield {"url": url}

    @pytest.fixture
    def model_path(self) -> str:
        return "smollm2:135m"

    @pytest.fixture
    def broken_model(self) -> tuple[str, str]:
        return "no-such-model", "not found"

    @pytest.mark.parametrize("slots", [1])  # how many it serves at once is its own choice: OLLAMA_NUM_PARALLEL
    def test_hang_up_to_slot_free(self, model_path: str, slots: int, record_property: Callable[[str, object], None]) -> None:
        super().test_hang_up_to_slot_free(model_path, slots, record_property)
