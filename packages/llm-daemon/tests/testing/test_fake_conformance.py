"""The fake engine passes the suite that real engines must pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from llm_daemon.testing.conformance import EngineConformance


class TestFake(EngineConformance):
    adapter = "llm_daemon.testing.fake_engine:FakeEngine"
    long_request: Mapping[str, Any] = {**EngineConformance.long_request, "max_tokens": 5000}  # ten seconds
    natural, slack = 1.6, 3.0

    @pytest.fixture
    def model_path(self, fake_model: Callable[..., str]) -> str:
        return fake_model(tokens=5000, token_ms=2, load_seconds=0.05)

    @pytest.fixture
    def broken_model(self, fake_model: Callable[..., str]) -> tuple[str, str]:
        return fake_model(load_seconds=0.05, crash_while_loading="bad model: tensor 7 cannot be read"), "tensor 7"


class TestFakeThatRefusesWhileLoading(TestFake):
    @pytest.fixture
    def model_path(self, fake_model: Callable[..., str]) -> str:
        return fake_model(tokens=5000, token_ms=2, load_seconds=0.1, while_loading="refuse", grandchild=True, silent=True)


class TestFakeThatNoticesOnlyStreams(TestFake):
    """As llama-server under load."""

    @pytest.fixture
    def model_path(self, fake_model: Callable[..., str]) -> str:
        return fake_model(tokens=5000, token_ms=2, ignores_disconnect="nonstream")


class TestFakeOnTcp(TestFake):
    """As mlc_llm: silent until it has loaded, strict about the model's id; and it hangs when its port is taken, as mlx_lm."""

    scenario: Mapping[str, object] = {
        "tcp": True, "while_loading": "refuse", "port_taken": "hang", "guarded": True, "strict_model": True,
    }  # fmt: skip

    @pytest.fixture
    def model_path(self, fake_model: Callable[..., str]) -> str:
        return fake_model(tokens=5000, token_ms=2, load_seconds=0.1, **self.scenario)

    @pytest.fixture
    def broken_model(self, fake_model: Callable[..., str]) -> tuple[str, str]:
        return fake_model(**self.scenario, crash_while_loading="bad model: tensor 7 cannot be read"), "tensor 7"


class TestFakeThatIsReadyTooSoon(TestFakeOnTcp):
    """As mlx_lm, which says 200 before it has loaded; one that cannot bind beside a reservation."""

    scenario = {"tcp": "no reuse", "while_loading": "ready", "ignores_disconnect": "deaf", "gives_up": True}  # noqa: RUF012


class TestFakeThatChoosesItsPort(TestFakeOnTcp):
    scenario = {"tcp": "port 0"}  # noqa: RUF012


class TestFakeForEmbeddings(TestFakeOnTcp):
    """One that can do nothing else."""

    scenario = {"tcp": True, "routes": ["/v1/embeddings"]}  # noqa: RUF012
