"""The suite against the engines that are Python packages of some size, in environments of their own, named by interpreter:

    LLM_DAEMON_TEST_MLX_LM=/mlx/bin/python LLM_DAEMON_TEST_VLLM=/vllm/bin/python \
        .venv/bin/pytest --timeout 600 packages/llm-daemon/tests/engines/test_real_python_engines.py

The model is the starter model, written as safetensors.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_daemon.testing.conformance import EngineConformance

# Read now: the session takes LLM_DAEMON_* variables away.
MLX_LM, VLLM = (os.environ.get(f"LLM_DAEMON_TEST_{name}") for name in ("MLX_LM", "VLLM"))
TOOL = Path(__file__).parents[4] / "tools" / "gguf_to_safetensors.py"
pytestmark = pytest.mark.real


@pytest.fixture(scope="session")
def safetensors(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder."""
    folder = tmp_path_factory.mktemp("safetensors") / "smollm2"
    subprocess.run([sys.executable, str(TOOL), smollm2, str(folder)], stdin=subprocess.DEVNULL, check=True)
    return str(folder)


@pytest.mark.skipif(not MLX_LM, reason="no interpreter with mlx-lm was named")
class TestMlxLm(EngineConformance):
    adapter = "llm_daemon.engines.mlx_lm:MlxLm"
    config = {"path": MLX_LM or ""}  # noqa: RUF012
    patience = 5.0  # on a CPU one token of a new request takes it more than a second

    @pytest.fixture
    def model_path(self, safetensors: str) -> str:
        return safetensors


@pytest.mark.skipif(not VLLM, reason="no interpreter with vLLM was named")
class TestVllm(EngineConformance):
    adapter = "llm_daemon.engines.vllm:Vllm"
    config = {"path": VLLM or ""}  # noqa: RUF012
    soon = 60.0  # its imports alone take 20 s of CPU time
    patience = 5.0  # on a CPU one token of a new request takes it up to a second
    args = ("--enforce-eager", "--dtype", "float32")  # without: minutes of compiling, then numbers that a plain CPU lacks

    @pytest.fixture
    def model_path(self, safetensors: str) -> str:
        return safetensors
