"""Adapters of engines that cannot run here: finding them, their files, their command lines, their last words."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from llm_daemon.engines import llamafile, mlc_llm, ollama, openvino, sglang
from llm_daemon.engines._llamafile_zip import Contents, look
from llm_daemon.engines.base import Grant, Location, Missing
from llm_daemon.engines.llamafile import Llamafile
from llm_daemon.engines.mlc_llm import MlcLlm
from llm_daemon.engines.ollama import Ollama
from llm_daemon.engines.openvino import OpenVino
from llm_daemon.engines.sglang import Sglang
from llm_daemon.errors import UsageError
from llm_daemon.spec import Artifact, Spec, Wish
from llm_daemon.testing import replay


def spec(model: str, **options: Any) -> Spec:
    return Spec(Wish(model, **options), Artifact("file", model, model))


def grant(model: str, **changes: Any) -> Grant:
    return Grant(
        **{"model_path": model, "alias": "an alias", "socket": "e.sock", "context": 1000, "parallel": 3, "threads": 5, **changes}
    )


# -- llamafile: what is one --


def make_llamafile(path: Path, weights: dict[str, bytes], args: str = "", begin: bytes = b"MZqFpD='\n'\nexit 0\n") -> str:
    path.write_bytes(begin)
    if weights or args:
        with zipfile.ZipFile(path, "a") as archive:
            for name, data in weights.items():
                archive.writestr(name, data)
            if args:
                archive.writestr(".args", args)
    path.chmod(0o755)
    return str(path)


def test_a_llamafile_is_known_by_its_first_bytes_and_its_zip(tmp_path: Path) -> None:
    ape = make_llamafile(tmp_path / "a.llamafile", {"m.gguf": b"GGUF"})
    elf = make_llamafile(tmp_path / "any-name", {"m.gguf": b"GGUF"}, begin=b"\x7fELF" + bytes(60))
    assert (Llamafile().accepts(ape), Llamafile().accepts(elf)) == (None, None)
    assert look(ape) == Contents(True, "m.gguf", 4, ())
    assert look(elf) == Contents(False, "m.gguf", 4, ())


@pytest.mark.parametrize(
    ("weights", "args", "begin", "reason"),
    [
        ({}, "", b"MZqFpD='\n", "not all of one"),
        ({}, "-c\n9\n", b"MZqFpD='\n", "without weights"),
        ({"m.gguf": b"GGUF"}, "", b"PK\x03\x04", "neither"),
        ({"m.gguf": b"GGUF"}, "-m\n/zip/m.gguf\n--tools\nall\n...\n", b"MZqFpD='\n", "lets requests run programs"),
        ({"m.gguf": b"GGUF"}, "--rpc\nhost:1\n...\n", b"MZqFpD='\n", "reach other machines"),
        ({"m.gguf": b"GGUF"}, "--unsecure\n...\n", b"MZqFpD='\n", "sandbox"),
        ({"m.gguf": b"GGUF"}, "-hf\na/b\n...\n", b"MZqFpD='\n", "offline"),
    ],
)
def test_what_is_not_loaded(tmp_path: Path, weights: dict[str, bytes], args: str, begin: bytes, reason: str) -> None:
    path = make_llamafile(tmp_path / "a.llamafile", weights, args, begin)
    assert reason in str(Llamafile().accepts(path))


def test_usual_arguments_of_an_author_are_no_obstacle(tmp_path: Path) -> None:
    args = "-m\n/zip/a.gguf\n--mmproj\n/zip/b.gguf\n--server\n--host\n0.0.0.0\n-ngl\n9999\n--temp\n0.6\n--no-ui\n...\n"
    path = make_llamafile(tmp_path / "a.llamafile", {"a.gguf": b"GGUF", "b.gguf": b"GGUF larger"}, args)
    assert Llamafile().accepts(path) is None
    contents = look(path)
    assert isinstance(contents, Contents)
    assert (contents.model, contents.model_bytes) == ("a.gguf", 15)  # by its own -m, not the largest


def test_a_llamafile_must_be_executable(tmp_path: Path) -> None:
    path = make_llamafile(tmp_path / "a.llamafile", {"m.gguf": b"GGUF"})
    os.chmod(path, 0o644)
    assert "chmod +x" in str(Llamafile().accepts(path))


def test_a_gguf_file_is_for_the_runtime(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert Llamafile().accepts(str(tmp_path / "m.gguf")) is None
    assert Llamafile().inside(str(tmp_path / "m.gguf")) is None
    assert "No such file" in str(Llamafile().accepts(str(tmp_path / "nowhere.gguf")))


# -- llamafile: finding it, starting it --

SPEAKS = b"""MZqFpD='
'
case "$*" in
--version) echo 'llamafile v%s' ;;
*--help) echo '%s' ;;
esac
exit 0
"""
V10 = "--server --threads-batch N --offline --cache-ram N --cors-origins --metrics --no-slots"
V09 = "--server --nobrowser --threads-batch N"


@pytest.mark.parametrize(
    ("version", "help_", "rest"),
    [
        (
            "0.10.3",
            V10,
            ["--threads-batch", "5", "--offline", "--cache-ram", "256", "--cors-origins", "localhost", "--metrics", "--no-slots"],
        ),
        ("0.9.3", V09, ["--threads-batch", "5", "--nobrowser"]),
    ],
)
def test_it_runs_through_the_shell_with_what_this_version_knows(
    tmp_path: Path, version: str, help_: str, rest: list[str]
) -> None:
    path = make_llamafile(tmp_path / "it", {}, begin=SPEAKS % (version.encode(), help_.encode()))
    where = Llamafile().locate({"path": path})
    assert isinstance(where, Location)
    assert (where.argv, where.version, where.origin) == (("/bin/sh", path), version, "config")

    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF")
    known = llamafile.flags(where.argv, os.stat(path).st_mtime_ns)
    got = llamafile.command(where.argv, grant(str(model), args=("--temp", "0")), "127.0.0.1", "8081", known)
    begin = f"/bin/sh {path} --server -m {model} --host 127.0.0.1 --port 8081 -a".split()
    assert got == [*begin, "an alias", "-c", "3000", "-np", "3", "-t", "5", *rest, "--temp", "0"]


def test_weights_inside_are_named_and_the_file_is_the_engine(tmp_path: Path) -> None:
    path = make_llamafile(tmp_path / "a.llamafile", {"m.gguf": b"GGUF"}, begin=SPEAKS % (b"0.10.3", V10.encode()))
    where = Llamafile().inside(path)
    assert where == Location(("/bin/sh", path), "0.10.3", "the model file itself")
    got = llamafile.command(where.argv, grant(path, gpu_layers=0), "127.0.0.1", "1", frozenset())
    assert got[:5] == ["/bin/sh", path, "--server", "-m", "/zip/m.gguf"]
    assert got[-4:] == ["-ngl", "0", "--gpu", "disable"]


def test_a_llamafile_that_got_lost_is_said_when_it_starts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read it"):
        llamafile.command(["x"], grant(str(tmp_path / "gone.llamafile")), "127.0.0.1", "1", frozenset())


def test_a_silent_program_is_missing(tmp_path: Path) -> None:
    path = make_llamafile(tmp_path / "it", {}, begin=b"MZqFpD='\n'\nexit 1\n")
    missing = Llamafile().locate({"path": path})
    assert isinstance(missing, Missing)
    assert "does not tell its version" in missing.reason


def test_no_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    missing = Llamafile().locate({})
    assert isinstance(missing, Missing)
    assert "install -m 755" in missing.hint
    assert "Apache-2.0" in missing.hint


@pytest.mark.parametrize("flag", ["--cli", "--chat", "--unsecure", "--gpu", "--host", "--tools", "--sleep-idle-seconds"])
def test_llamafile_flags_that_are_refused(flag: str) -> None:
    assert str(Llamafile().refuse([flag, "x"])).startswith(f"{flag} is not passed on")


# -- Python packages --


def test_a_package_is_found_in_a_python_of_the_users(tmp_path: Path) -> None:
    config = replay.install("mlc-llm-78b6cdb", tmp_path)
    where = MlcLlm().locate(config)
    assert where == Location((config["path"], "-m", "mlc_llm", "serve"), "0.20.dev0", "config")


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    missing = MlcLlm().locate({})
    assert isinstance(missing, Missing)
    assert "not installed" in missing.reason
    assert "/docs/install/" in missing.hint


# -- mlc-llm --


def mlc_model(folder: Path, config: str = '{"model_type": "llama"}') -> Path:
    folder.mkdir()
    (folder / "mlc-chat-config.json").write_text(config)
    (folder / "tensor-cache.json").write_text("{}")
    return folder


def test_mlc_folders(tmp_path: Path) -> None:
    model = mlc_model(tmp_path / "m")
    assert MlcLlm().accepts(str(model)) is None
    (model / "tensor-cache.json").rename(model / "ndarray-cache.json")  # its name before 2025
    assert MlcLlm().accepts(str(model)) is None
    (model / "ndarray-cache.json").unlink()
    assert "not all here" in str(MlcLlm().accepts(str(model)))
    assert "cannot be read" in str(MlcLlm().accepts(str(mlc_model(tmp_path / "broken", "{"))))
    assert "mlc-chat-config.json" in str(MlcLlm().accepts(str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "parallel", "args", "mode", "overrides"),
    [
        ({}, 1, (), "interactive", None),
        ({}, 4, (), "local", None),
        ({}, 5, (), "local", "max_num_sequence=5"),
        ({"context": 1000}, 2, (), "local", "context_window_size=1000;max_total_seq_length=2000"),
        ({}, 5, ("--overrides", "gpu_memory_utilization=0.5"), "local", "max_num_sequence=5;gpu_memory_utilization=0.5"),
    ],
)
def test_mlc_command_line(
    options: dict[str, Any], parallel: int, args: tuple[str, ...], mode: str, overrides: str | None
) -> None:
    got = mlc_llm.command(
        ["py", "-m", "mlc_llm", "serve"], spec("/m", **options), grant("/m", parallel=parallel, args=args), "127.0.0.1", "8081"
    )
    wanted = [
        "py",
        "-m",
        "mlc_llm",
        "serve",
        "/m",
        "--mode",
        mode,
        "--host",
        "127.0.0.1",
        "--port",
        "8081",
        "--allow-origins",
        "[]",
    ]
    assert got == wanted + (["--overrides", overrides] if overrides else [])


@pytest.mark.parametrize("flag", ["--api-key", "--enable-debug", "--host", "--allow-origins", "--additional-models", "--mode"])
def test_mlc_flags_that_are_refused(flag: str) -> None:
    assert str(MlcLlm().refuse([flag, "x"])).startswith(f"{flag} is not passed on")


# -- sglang --


def test_sglang_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sglang, "DEVICES", (str(tmp_path / "nvidiactl"),))
    missing = Sglang().locate({})
    assert isinstance(missing, Missing)
    assert "no GPU" in missing.reason
    (tmp_path / "nvidiactl").touch()
    assert Sglang().locate({}) == Location((sys.executable, "-m", "sglang.launch_server"), "unknown", "package sglang unknown")


def test_sglang_models_and_command_line(tmp_path: Path) -> None:
    assert "neither" in str(Sglang().accepts(str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    assert "run code" in str(Sglang().accepts(str(tmp_path)))
    (tmp_path / "model.safetensors").touch()
    assert Sglang().accepts(str(tmp_path)) is None
    got = sglang.command(["py"], spec("/m.gguf", context=1000), grant("/m.gguf"), "127.0.0.1", "1")
    wanted = "py --model-path /m.gguf --served-model-name X --host 127.0.0.1 --port 1 --max-running-requests 3"
    wanted += " --context-length 1000 --load-format gguf"
    assert got == ["an alias" if word == "X" else word for word in wanted.split()]


@pytest.mark.parametrize(
    "flag", ["--trust-remote-code", "--trust", "--api-key", "--host", "--served-model-name", "--log-requests"]
)
def test_sglang_flags_that_are_refused(flag: str) -> None:
    assert str(Sglang().refuse([flag])).startswith(f"{flag} is not passed on")


# -- ollama --


def test_ollama_is_found_where_it_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with replay.serve("ollama-00188139") as url:
        where = Ollama().locate({"url": url + "/"})
    assert where == Location((sys.executable, "-I", "-S", ollama.HOST, url), "unknown", url)
    missing = Ollama().locate({"url": url})
    assert isinstance(missing, Missing)
    assert "no Ollama listens" in missing.reason
    assert "install.sh" in missing.hint
    program = tmp_path / "ollama"
    program.write_text("#!/bin/sh\necho 'ollama version is 0.30.1'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    missing = Ollama().locate({"url": url})
    assert isinstance(missing, Missing)
    assert missing.hint == "ollama serve"
    monkeypatch.setattr(ollama, "listens", lambda port: True)
    found = Ollama().locate({"url": url})
    assert isinstance(found, Location)
    assert found.version == "0.30.1"


@pytest.mark.parametrize("url", ["https://host", "host:1", "http://h:notaport"])
def test_ollama_addresses_that_are_none(url: str) -> None:
    missing = Ollama().locate({"url": url})
    assert isinstance(missing, Missing)
    assert "not an http:// address" in missing.reason


def test_a_listening_port_is_read_in_proc(tmp_path: Path) -> None:
    line = "   0: 0100007F:2CAA 00000000:0000 {} 00000000:00000000 00:00000000 00000000  1000 0 1 1 0 100 0 0 10 0\n"
    assert ollama.listens(11434, str(tmp_path)) is None
    (tmp_path / "tcp").write_text("header\n" + line.format("01"))  # an established connection
    assert ollama.listens(11434, str(tmp_path)) is False
    (tmp_path / "tcp6").write_text("header\n" + line.format("0A"))
    assert ollama.listens(11434, str(tmp_path)) is True


def test_ollama_command_line() -> None:
    model = "llama3.2:1b"
    assert ollama.command(["host", "url"], spec(model), grant(model)) == ["host", "url", "llama3.2:1b", "e.sock"]
    assert ollama.command(["host", "url"], spec(model, context=1000), grant(model))[-1] == "1000"
    assert "variables of its own" in str(Ollama().refuse(["--x"]))
    assert Ollama().refuse([]) is None


# -- openvino --


def test_openvino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/bin:/usr/bin")
    missing = OpenVino().locate({})
    assert isinstance(missing, Missing)
    assert "openvino-genai is a library" in missing.reason
    program = tmp_path / "ovms"
    program.write_text("#!/bin/sh\necho 'OpenVINO Model Server 2026.1.0.abc'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert OpenVino().locate({}) == Location((str(program),), "2026.1.0.abc", "PATH")
    assert "not a folder" in str(OpenVino().accepts(str(tmp_path)))
    (tmp_path / "openvino_model.xml").touch()
    assert "export_model.py" in str(OpenVino().accepts(str(tmp_path)))
    (tmp_path / "graph.pbtxt").touch()
    assert OpenVino().accepts(str(tmp_path)) is None
    got = openvino.command(["ovms"], grant("/m", args=("--rest_workers", "2")), "127.0.0.1", "81", "model")
    assert " ".join(got) == (
        "ovms --model_path /m --model_name model --rest_bind_address 127.0.0.1 --rest_port 81 --grpc_bind_address 127.0.0.1 "
        "--file_system_poll_wait_seconds 0 --log_level INFO --rest_workers 2"
    )
    assert str(OpenVino().refuse(["--cpu_extension", "x.so"])).startswith("--cpu_extension is not passed on")
    program.write_text("#!/bin/sh\necho 'ovms: error while loading shared libraries: libovms.so: no'\nexit 127\n")
    os.utime(program, (1, 1))
    missing = OpenVino().locate({"path": str(program)})
    assert isinstance(missing, Missing)
    assert "libovms.so" in missing.reason


# -- last words --


@pytest.mark.parametrize(
    ("adapter", "status", "words", "kind", "part"),
    [
        (
            MlcLlm,
            1,
            "ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 1): address already in use",
            "address_in_use",
            "bind",
        ),
        (MlcLlm, 2, "----- Error -----\nunrecognized arguments: --bogus", "bad_flag", "--bogus"),
        (MlcLlm, 1, "Traceback\n  File x\nFileNotFoundError: Cannot find model /m, directory does not exist", "bad_model", "/m"),
        (MlcLlm, 1, "RuntimeError: Cannot find compilation output, compilation failed", "bad_model", "compilation"),
        (MlcLlm, 1, "ModuleNotFoundError: No module named 'tvm'", "missing_library", "tvm"),
        (MlcLlm, 1, "[2026-07-20 10:00:00] ERROR x.py:1: Insufficient GPU memory error: 1 MB", "out_of_memory", "Insufficient"),
        (MlcLlm, -9, "loading", "crashed", "memory"),
        (
            MlcLlm,
            1,
            "Traceback\nValueError: Device is not found on your local environment: cuda\n",
            "crashed",
            "ValueError: Device",
        ),
        (
            Sglang,
            1,
            "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.",
            "out_of_memory",
            "Not enough",
        ),
        (Ollama, 5, "ollama host: error: model 'x' not found", "bad_model", "model 'x' not found"),
        (
            Ollama,
            4,
            "ollama host: error: no Ollama answers at http://127.0.0.1:1: Connection refused",
            "crashed",
            "no Ollama answers",
        ),
        (OpenVino, 64, "error parsing options - unmatched arguments: --bogus, ", "bad_flag", "--bogus"),
        (
            Llamafile,
            1,
            "0.00.003 E srv start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 1",
            "address_in_use",
            "couldn't bind",
        ),
        (Llamafile, 1, "run-detectors: unable to find an interpreter for ./it", "bad_model", "binfmt"),
    ],
)
def test_diagnose(adapter: Any, status: int, words: str, kind: str, part: str) -> None:
    found, line = adapter().diagnose(status, words)
    assert (found, part in line) == (kind, True), line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("adapter", "version", "ids"),
    [
        (Llamafile, "0.9.3", ["CVE-2025-53630"]),
        (Llamafile, "0.10.3", []),
        (Ollama, "0.1.28", ["CVE-2024-28224", "CVE-2024-37032", "CVE-2026-7482", "CVE-2026-7020"]),
        (Ollama, "0.20.2", ["CVE-2026-7020"]),
        (Ollama, "0.30.0", []),
        (Ollama, "unknown", []),
    ],
)
def test_weaknesses(adapter: Any, version: str, ids: list[str]) -> None:
    assert [a.id for a in adapter().weaknesses(version)] == ids
