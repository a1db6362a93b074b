"""mlx-lm and vLLM: how they are found, what they are started with, what is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llm_daemon.engines.base import Adapter, Grant, Location, Missing, Tcp, Weighs
from llm_daemon.engines.mlx_lm import MlxLm
from llm_daemon.engines.vllm import Vllm
from llm_daemon.spec import Artifact, Spec, Wish

GRANT = Grant("/hf/m", "m", "e.sock", 512, 3, 2, host="127.9.8.7", port=4711, key="k3y")
SPEC = Spec(Wish("m"), Artifact("file", "/hf/m", "m"))
WHERE = Location(("/bin/python",), "1", "config")


def test_mlx_lm_is_asked_for_a_token_first_by_the_path_of_its_model() -> None:
    plan = MlxLm().plan(SPEC, WHERE, GRANT)
    assert plan.argv[:7] == ("/bin/python", "-m", "mlx_lm", "server", "--model", "/hf/m", "--host")
    assert plan.address == Tcp("127.9.8.7", 4711)
    assert plan.served_id == "/hf/m"
    assert plan.warm_up is not None
    assert b'"/hf/m"' in plan.warm_up.body
    assert "/v1/chat/completions" in plan.deaf


def test_vllm_listens_on_a_unix_socket_and_asks_nobody_outside() -> None:
    plan = Vllm().plan(SPEC, WHERE, GRANT)
    argv = list(plan.argv)
    assert argv[argv.index("--uds") + 1] == plan.address == "e.sock"
    assert argv[argv.index("--served-model-name") + 1] == plan.served_id == "m"
    assert plan.env["HF_HUB_OFFLINE"] == "1"
    assert not plan.deaf


def test_vllm_needs_more_than_its_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "model-1.safetensors").write_bytes(b"w" * 300)
    (tmp_path / "model-2.safetensors").write_bytes(b"w" * 400)
    assert isinstance(Vllm(), Weighs)
    need = Vllm().memory(SPEC, replace(GRANT, model_path=str(tmp_path)))
    (tmp_path / "model-2.safetensors").unlink()
    less = Vllm().memory(SPEC, replace(GRANT, model_path=str(tmp_path)))
    assert need is not None and less == need - 400
    assert need > 2**31, "three Python processes and a cache"


VLLM_FAILS = """\
(Worker pid=79) ERROR 11-26 00:51:23 [multiproc_executor.py:953]     with safe_open(st_file, framework="pt") as f:
(Worker pid=79) ERROR 11-26 00:51:23 [multiproc_executor.py:953] {cause}
(EngineCore pid=41) ERROR 11-26 00:51:27 [core.py:1510] EngineCore failed to start.
(EngineCore pid=41) ERROR 11-26 00:51:27 [core.py:1510] Exception: WorkerProc initialization failed due to an exception in a \
background process. See stack trace for root cause.
    raise RuntimeError(
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}
"""


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        ("safetensors._safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata", "bad_model"),
        ("ValueError: no such thing", "crashed"),
    ],
)
def test_vllm_fails_with_the_words_of_the_process_that_knew(cause: str, kind: str) -> None:
    assert Vllm().diagnose(1, VLLM_FAILS.format(cause=cause)) == (kind, cause)
    # It does without some of its parts, and says so.
    noted = '(APIServer pid=7) WARNING 11-26 00:51:23 [interface.py:4] Failed to import: ModuleNotFoundError("No module named x")'
    noted += "\n"
    assert Vllm().diagnose(1, noted + VLLM_FAILS.format(cause=cause)) == (kind, cause)


@pytest.mark.parametrize("adapter", [MlxLm(), Vllm()], ids=lambda a: a.name)
def test_where_and_what(adapter: Adapter, tmp_path: Path) -> None:
    found = adapter.locate({"path": str(tmp_path / "bin" / "python")})
    assert isinstance(found, Missing)
    assert "does not run" in found.reason
    found = adapter.locate({"path": sys.executable})
    assert found.reason.endswith(("no package mlx_lm", "no package vllm")) if isinstance(found, Missing) else found.argv
    assert adapter.accepts(str(tmp_path)) == "the folder has no config.json with safetensors"
    assert adapter.accepts("/m.gguf") == "not a folder with safetensors"
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    assert adapter.accepts(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("adapter", "args", "refused"),
    [
        (MlxLm(), ["--host", "0.0.0.0"], True),
        (MlxLm(), ["--trust-remote"], True),  # argparse takes the beginning of a flag
        (MlxLm(), ["--top-p", "0.9"], False),
        (Vllm(), ["--api-key=x"], True),
        (Vllm(), ["--max-model-len", "9"], True),
        (Vllm(), ["--dtype", "float16", "--enforce-eager"], False),
    ],
)
def test_flags(adapter: Adapter, args: list[str], refused: bool) -> None:
    assert (adapter.refuse(args) is not None) == refused
