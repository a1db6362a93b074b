"""What the verbs say: of themselves, of sessions, of this machine."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

import llm_daemon_bench
from llm_daemon.cli import main as front
from llm_daemon.cli.main import run
from llm_daemon_bench import results, suite as suites
from llm_daemon_bench.cli import VERBS, command, doctor
from llm_daemon_bench.cli.doctor import Finding

from .suites import Write

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "packages" / "llm-daemon-bench"


def verb(name: str) -> click.Command:
    found = command.get_command(click.Context(command), name)
    assert found is not None
    return found


@pytest.mark.parametrize("name", list(VERBS))
def test_each_verb_says_what_the_list_says_and_its_examples_parse(name: str) -> None:
    one = verb(name)
    assert (one.help or "").strip().splitlines()[0] == VERBS[name]
    text = one.get_help(click.Context(one, info_name=name, terminal_width=120))
    lines = text.partition("Examples:\n")[2].partition("\n\n")[0].splitlines()
    assert lines
    for line in lines:
        words = shlex.split(re.split(r"\s{3,}| \| ", line.strip())[0])
        assert words[:3] == ["llm-daemon", "bench", name]
        one.make_context(name, words[3:])


def test_bench_is_a_command_of_the_daemon_and_a_script_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    front.added.cache_clear()
    assert run(["--help"]) == 0
    assert re.search(r"^  bench +Measure which server", capsys.readouterr().out, re.M)
    assert run(["bench", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\S", said, re.M) for name in VERBS)
    script = Path(sys.executable).with_name("llm-daemon-bench")
    done = subprocess.run([script, "list"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "no session in results\n"


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["run"], 2, "missing argument"),
        (["run", "none.toml"], 2, "cannot read none.toml"),
        (["run", "s.toml", "--resume", "--trials", "2"], 2, "leave out --trials"),
        (["run", "s.toml", "--resume"], 2, "no unfinished session of this suite in results"),
        (["run", "s.toml", "--target", "x/*"], 2, "no target 'x/*' in this suite"),
        (["run", "s.toml", "--case", "nothing"], 2, "no case 'nothing' in this suite"),
        (["run", "s.toml", "--out", "s.toml/x"], 3, "cannot write"),
        (["init", "x.toml", "--model", "nope"], 2, "unknown model 'nope'"),
        (["init", "x.toml", "--model", "smollm2-135m", "--model", "./state"], 2, "no model file"),
        (["init", "x.toml", "--model", "."], 2, "is a folder without a model"),
        (["show"], 2, "no session in results"),
        (["show", "20000101-1"], 2, "no session '20000101-1' in results"),
    ],
)
def test_wrong_use_is_one_line_and_a_hint(
    write: Write, capsys: pytest.CaptureFixture[str], args: list[str], status: int, words: str
) -> None:
    write()
    assert run(["bench", *args]) == status
    said = capsys.readouterr().err
    assert re.fullmatch(r"llm-daemon: [^\n]+\n  hint: [^\n]+\n", said), said
    assert words in said and not Path("x.toml").exists()


def test_run_list_and_show_speak_to_people_and_scripts(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write({"a": {}}, suite="trials = 2\nlaunches = 1")
    assert run(["bench", "run", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["trials"], told["errors"], told["lost"]) == (2, 0, {})
    assert results.load(told["folder"]).session.held == 2
    assert run(["bench", "list", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["sessions"]
    assert (row["id"], row["trials"], row["targets"], row["cases"]) == (told["session"], 2, ["a/m0/q"], ["hello"])
    assert run(["bench", "list"]) == 0
    assert told["session"] in capsys.readouterr().out
    assert run(["bench", "show", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    (cell,) = shown["cells"]
    assert (cell["n"], cell["failed"], cell["passed"], cell["checked"]) == (2, 0, 2, 2)
    assert cell["median_ms"]["never"] is None
    assert cell["median_ms"]["first"] > 0
    assert shown["session"]["suite_text"] == path.read_text()
    assert shown["session"]["machine"]["python"]
    assert shown["session"]["targets"][0]["argv"][-2:] == ["--alias", "m0"]
    assert len(shown["session"]["targets"][0]["artifact"]["sha256"]) == 64
    assert run(["bench", "show", told["session"]]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^a/m0/q +asis +2 +[\d.]+ +[\d.]+ +- +2/2$", said, re.M)
    assert re.search(r"^a/m0/q +1( +[\d.]+){5}$", said, re.M)


def test_run_and_report_tell_once_that_the_machine_was_busy(
    write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.getloadavg", lambda: (99999.0, 1.0, 1.0))
    path = write({"a": {}}, suite="trials = 1\nlaunches = 1\nwarmup = 0")
    assert run(["bench", "run", str(path)]) == 0
    assert capsys.readouterr().err.count("the machine was busy: before 1 of 1 trials") == 1
    assert run(["bench", "report", "--markdown", "-"]) == 0
    assert capsys.readouterr().out.count("the machine was busy") == 1


def test_show_names_what_went_wrong(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write({"a": {"error_status": 500}}, suite="trials = 1\nlaunches = 1\nwarmup = 0")
    assert run(["bench", "run", str(path), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert run(["bench", "show"]) == 0
    assert "hello 1 on a/m0/q, launch 1: HTTP status 500: as the scenario wants" in capsys.readouterr().out


def test_init_writes_a_suite_that_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    Path("other.gguf").write_bytes(b"GGUF")
    assert run(["bench", "init", "desk/mine.toml", "--model", "smollm2-135m", "--model", "./other.gguf"]) == 0
    found = suites.load("desk/mine.toml")
    assert [c.id for c in found.cases] == ["code-line", "chat-two-turns", "extract-json"]
    assert {t.model.id for t in found.targets} == {"smollm2-135m", "other"}
    assert all(len(c.table.checkpoints) == 3 for c in found.cases)
    assert '"""Index of `wanted`' in str(found.cases[0].turns[0])
    assert "desk/mine.toml is there" in capsys.readouterr().out
    assert run(["bench", "init", "desk/mine.toml"]) == 2
    assert "is there already" in capsys.readouterr().err


def test_doctor_tells_its_findings(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Finding("clock", "warn", "governor powersave", "change it"), Finding("power", "good", "mains", "none")]
    monkeypatch.setattr(doctor, "look", lambda out: found)
    assert run(["bench", "doctor"]) == 0
    assert capsys.readouterr().out == "warn clock: governor powersave\n     hint: change it\nok   power: mains\n"
    found.append(Finding("load", "bad", "busy"))
    assert run(["bench", "doctor", "--json"]) == 3
    assert [f["state"] for f in json.loads(capsys.readouterr().out)["findings"]] == ["warn", "good", "bad"]


def test_doctor_looks_at_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LOOK_S", 0.2)
    found = {f.what: f for f in doctor.look(tmp_path / "not" / "there")}
    assert set(found) == {"cores", "clock", "load", "memory", "power", "disk", "client", "energy"}
    assert all(f.said for f in found.values())


def test_doctor_names_who_can_be_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[str, float, list[str] | None]] = [("kdamond.0", 90, []), ("browser", 50, ["browser"]), ("hidden", 60, None)]
    found = [
        SimpleNamespace(info={"name": name, "cpu_times": SimpleNamespace(user=used, system=1.0), "cmdline": line})
        for name, used, line in rows
    ]
    monkeypatch.setattr("psutil.process_iter", lambda attrs: found)
    assert doctor.load(0.9).hint.endswith("most CPU time so far: hidden, browser")
    for n, said in ((2, "get 1 thread,"), (4, "get 3 threads,")):
        monkeypatch.setattr(doctor, "usable_cores", lambda n=n: n)
        assert said in doctor.cores().said


def test_doctor_knows_good_from_bad() -> None:
    assert [doctor.governor(g).state for g in ("", "performance", "powersave")] == ["good", "good", "warn"]
    assert [doctor.power(p).state for p in ("", "mains", "battery")] == ["good", "good", "bad"]
    assert [doctor.client(ms).state for ms in (0.1, 5.0)] == ["good", "warn"]
    assert [doctor.load(n).state for n in (0.0, 0.3, 0.9)] == ["good", "warn", "bad"]


def test_the_package_is_this_one_typed_and_versioned() -> None:
    assert Path(llm_daemon_bench.__file__ or "").parent == PACKAGE / "src" / "llm_daemon_bench"
    assert (PACKAGE / "src" / "llm_daemon_bench" / "py.typed").exists()
    assert (PACKAGE / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert metadata.version("llm-daemon-bench") == metadata.version("llm-daemon")
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    (point,) = [p for p in metadata.entry_points(group="llm_daemon.commands") if p.value.startswith("llm_daemon_bench")]
    assert {point.name: point.value} == project["entry-points"]["llm_daemon.commands"]
