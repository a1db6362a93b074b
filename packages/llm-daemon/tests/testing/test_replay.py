"""Recordings and their stand-ins: what is in them says where it is from, and they are as strict as what they stand for."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from llm_daemon.engines.registry import Registry
from llm_daemon.testing import replay


@pytest.mark.parametrize("name", replay.names())
def test_every_part_names_its_source(name: str) -> None:
    recording = replay.load(name)
    assert recording["engine"] in Registry({}).names
    assert name.startswith(recording["engine"] + "-")
    assert isinstance(recording["unknown"], list)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": 2}, "format"),
        ({"stop": {"exit": 0}}, "stop does not say"),
        ({"exchanges": [{"request": {}, "source": {"kind": "guess", "where": "x"}}]}, "exchanges 0 does not say"),
    ],
)
def test_a_recording_without_a_source_is_refused(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    path = tmp_path / "x-1.json"
    path.write_text(json.dumps({**replay.load("mlc-llm-78b6cdb"), **change}))
    with pytest.raises(ValueError, match=complaint):
        replay.load(str(path))


def serve(folder: Path, *argv: str) -> subprocess.Popen[str]:
    python = replay.install("mlc-llm-78b6cdb", folder)["path"]
    return subprocess.Popen([python, "-m", "mlc_llm", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["serve", "/m", "--bogus"], 2, "unrecognized arguments: --bogus"),
        (["serve", "/m", "--mode", "bogus"], 2, "argument --mode: invalid choice: 'bogus'"),
        (["serve", "/m", "--port"], 2, "argument --port: expected one argument"),
        (["serve", "/m", "/n"], 2, "unrecognized arguments: /n"),
        (["chat", "/m"], 2, "unrecognized arguments: chat"),
        (
            ["serve", "/no/such/folder", "--port", "0"],
            1,
            "FileNotFoundError: Cannot find model /no/such/folder, directory does not exist",
        ),
    ],
)
def test_a_stand_in_is_as_strict_as_the_program(tmp_path: Path, argv: list[str], status: int, words: str) -> None:
    with serve(tmp_path, *argv) as program:
        _, said = program.communicate(timeout=20)
    assert (program.returncode, words in said) == (status, True), said


def test_a_model_that_is_not_whole(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with serve(tmp_path, "serve", str(tmp_path / "model"), "--port", "0") as program:
        _, said = program.communicate(timeout=20)
    assert (program.returncode, "ValidationError" in said) == (1, True), said


def test_sigterm_waits_for_an_answer_and_then_ends_as_recorded(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("whole\n")
    with serve(tmp_path, "serve", str(tmp_path / "model"), "--port", "0") as program:
        assert program.stderr is not None
        line = next(line for line in program.stderr if "Uvicorn running on" in line)
        connection = http.client.HTTPConnection(line.split("http://")[1].split()[0], timeout=20)
        body = json.dumps({"messages": [], "stream": True, "max_tokens": 600, "stream_options": {"include_usage": True}})
        connection.request("POST", "/v1/chat/completions", body)
        response = connection.getresponse()
        response.readline()
        program.terminate()
        began = time.monotonic()
        rest = response.read().decode()
        connection.close()
        assert time.monotonic() - began > 0.1  # of 1.2 s in all
        assert rest.endswith("data: [DONE]\n\n")
        usage = json.loads(rest.split("\n\n")[-3].removeprefix("data: "))["usage"]
        assert (usage["completion_tokens"], usage["total_tokens"]) == (600, 603)
        assert program.wait(timeout=20) == -15


def test_a_running_server_keeps_what_is_loaded() -> None:
    def call(method: str, path: str, body: object = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(address, timeout=20)
        connection.request(method, path, None if body is None else json.dumps(body))
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, json.loads(text) if text.startswith("{") else text

    before = dict(os.environ)
    with replay.serve("ollama-00188139") as url:
        address = url.removeprefix("http://")
        assert call("GET", "/") == (200, "Ollama is running")
        assert call("GET", "/api/ps") == (200, {"models": []})
        assert call("POST", "/api/generate", {"model": "m"})[1]["done_reason"] == "load"
        assert call("GET", "/api/ps")[1]["models"][0]["name"] == "m"
        assert call("POST", "/api/generate", {"model": "m", "keep_alive": 0})[1]["done_reason"] == "unload"
        assert call("GET", "/api/ps") == (200, {"models": []})
        assert call("POST", "/api/delete", {"model": "m"}) == (404, "404 page not found")
    assert dict(os.environ) == before
