"""The fake engine passes the suite that real engines must pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llm_daemon.testing.conformance import EngineConformance


class TestFake(EngineConformance):
    adapter = "llm_daemon.testing.fake_engine:FakeEngine"
    natural = 1.0

    @pytest.fixture
    def model_path(self, fake_model: Callable[..., str]) -> str:
        return fake_model(tokens=3000, token_ms=2, load_seconds=0.05)

    @pytest.fixture
    def broken_model(self, fake_model: Callable[..., str]) -> tuple[str, str]:
        return fake_model(load_seconds=0.05, crash_while_loading="bad model: tensor 7 cannot be read"), "tensor 7"


class TestFakeThatRefusesWhileLoading(TestFake):
    @pytest.fixture
    def model_path(self, fake_model: Callable[..., str]) -> str:
        return fake_model(tokens=3000, token_ms=2, load_seconds=0.1, while_loading="refuse", grandchild=True, silent=True)


class TestFakeThatNoticesOnlyStreams(TestFake):
    """As llama-server under load."""

    @pytest.fixture
    def model_path(self, fake_model: Callable[..., str]) -> str:
        return fake_model(tokens=3000, token_ms=2, ignores_disconnect="nonstream")
