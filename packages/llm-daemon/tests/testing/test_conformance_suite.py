"""The conformance suite notices engines that do not conform."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

SUITE = """
from dataclasses import replace

import pytest
from llm_daemon.testing.conformance import EngineConformance

class Flawed(EngineConformance):
    adapter = "llm_daemon.testing.fake_engine:FakeEngine"
    natural, slack = 0.6, 1.0

class TestDeaf(Flawed):
    @pytest.fixture
    def model_path(self, fake_model):
        return fake_model(tokens=600, token_ms=5, ignores_disconnect=True)

    @pytest.fixture
    def broken_model(self, fake_model):
        return fake_model(crash_while_loading="something else"), "load"

class TestLiar(TestDeaf):  # it declares what it does not do
    def planned(self, *args, **options):
        return replace(super().planned(*args, **options), confirms_hangup=True)

class TestMute(Flawed):
    @pytest.fixture
    def model_path(self, fake_model):
        return fake_model(error_status=500)

class TestStubborn(Flawed):
    @pytest.fixture
    def model_path(self, fake_model):
        return fake_model(tokens=3000, token_ms=2, ignore_sigterm=True, grace=0.9)
"""


def test_flaws_are_found(tmp_path: Path) -> None:
    (tmp_path / "test_flawed.py").write_text(SUITE)
    wanted = "hang_up_frees or broken_model or ready_then or stop_idle or two_at_once"
    wanted = f"({wanted}) and not Liar or slot_free and (Liar or Deaf)"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "llm_daemon.testing.plugin",
            "-c",
            os.devnull,
            "--rootdir",
            ".",
            "-q",
            "-rA",
            "-k",
            wanted,
            *(f"--deselect=test_flawed.py::{name}::test_hang_up_to_slot_free[2]" for name in ("TestDeaf", "TestLiar")),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        check=False,
    )
    failed = set(re.findall(r"^FAILED test_flawed\.py::(\w+)::test_(\w+)", done.stdout, re.MULTILINE))
    assert {
        ("TestDeaf", "hang_up_frees_the_slot"),
        ("TestDeaf", "broken_model_is_reported_in_the_engines_own_words"),
        ("TestLiar", "hang_up_to_slot_free"),
        ("TestMute", "ready_then_answers_in_its_alias"),
        ("TestMute", "two_at_once"),
        ("TestStubborn", "stop_idle"),
    } <= failed, done.stdout
    passed = set(re.findall(r"^PASSED test_flawed\.py::(\w+)::test_(\w+)", done.stdout, re.MULTILINE))
    assert {
        ("TestDeaf", "hang_up_to_slot_free"),  # declares nothing
        ("TestDeaf", "stop_idle"),
        ("TestMute", "stop_idle"),
        ("TestStubborn", "hang_up_frees_the_slot"),
    } <= passed, done.stdout
