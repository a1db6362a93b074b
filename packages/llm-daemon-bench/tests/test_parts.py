"""Small parts: order, pace, meters, what a machine tells, and servers' processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest

from llm_daemon.models.catalog import Catalog
from llm_daemon.spec import Wish
from llm_daemon_bench import machine, meter, plan, servers, suite as suites
from llm_daemon_bench.artifacts import Finder, Weights, drop_from_page_cache
from llm_daemon_bench.client import Endpoint
from llm_daemon_bench.display import Display, Pace
from llm_daemon_bench.process import Died, Process
from llm_daemon_bench.requests import Conversation, fresh_nonce
from llm_daemon_bench.suite import Suite

TEXT = """
[suite]
name = "x"
trials = 3
launches = 2
{more}
[[server]]
id = "s"
launch = ["x", "{{artifact}}", "{{port}}"]
timings = "llamacpp"
[[model]]
id = "m"
artifacts = {{ a = "./a.gguf", b = "./b.gguf", c = "./c.gguf" }}
[[case]]
id = "one"
system = "Be brief."
turns = ["Hi", "And?"]
cache = "cold"
[[case]]
id = "two"
kind = "infill"
prompt = "a = "
suffix = "\\nb = 2"
trials = 1
stop = ["\\n"]
ignore_eos = true
body = {{ top_k = 1 }}
"""


def suite(tmp_path: Path, more: str = "") -> Suite:
    return suites.parse(TEXT.format(more=more), tmp_path / "s.toml")


@pytest.mark.parametrize("more", ["", 'interleave = "none"', 'up = "all"'])
def test_every_cell_is_planned_once_in_the_same_order_each_time(tmp_path: Path, more: str) -> None:
    one = suite(tmp_path, more)
    groups = list(plan.visits(one, 7))
    assert groups == list(plan.visits(one, 7))
    jobs = [(v.target.id, j.case.id, j.launch, j.repeat) for g in groups for v in g for j in plan.jobs(one, v, 7)]
    each = [("one", 1), ("one", 2), ("one", 3), ("two", 1)]
    wanted = {(f"s/m/{quant}", case, launch, repeat) for quant in "abc" for launch in (1, 2) for case, repeat in each}
    assert Counter(jobs) == Counter(wanted)
    assert sum(plan.total(one, t) for t in one.targets) == len(jobs)
    assert len({j.key("i") for g in groups for v in g for j in plan.jobs(one, v, 7) if v.target.id == "s/m/a"}) == 8


def test_without_interleaving_targets_come_as_they_stand(tmp_path: Path) -> None:
    order = [(v.target.quant, v.launch) for g in plan.visits(suite(tmp_path, 'interleave = "none"'), 7) for v in g]
    assert order == [("a", 1), ("a", 2), ("b", 1), ("b", 2), ("c", 1), ("c", 2)]


def test_chat_bodies(tmp_path: Path) -> None:
    one = suite(tmp_path)
    talk = Conversation(one.cases[0], one.targets[0].server, "name", "123")
    path, body = talk.next(1)
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "system", "content": "[123] Be brief."}, {"role": "user", "content": "Hi"}]
    assert (body["stream"], body["timings_per_token"], body["model"]) == (True, True, "name")
    assert body["stream_options"] == {"include_usage": True}


def test_infill_bodies_native_and_openai(tmp_path: Path) -> None:
    one = suite(tmp_path)
    path, body = Conversation(one.cases[1], one.targets[0].server, "name", "123").next(1)
    assert (path, body["input_prefix"], body["input_suffix"]) == ("/infill", "# 123\na = ", "\nb = 2")
    assert (body["n_predict"], body["stop"], body["ignore_eos"], body["top_k"]) == (256, ["\n"], True, 1)
    other = suites.parse(TEXT.format(more="").replace('timings = "llamacpp"', 'infill = "suffix"'), tmp_path / "s.toml")
    path, body = Conversation(other.cases[1], other.targets[0].server, "name").next(1)
    assert (path, body["prompt"], body["suffix"]) == ("/v1/completions", "a = ", "\nb = 2")
    assert "timings_per_token" not in body


def test_nonces_differ_and_are_as_long() -> None:
    nonces = {fresh_nonce() for _ in range(100)}
    assert len(nonces) == 100
    assert all(len(n) == 12 and n.isdigit() for n in nonces)


def test_time_left_is_told_from_what_a_target_took() -> None:
    pace = Pace()
    pace.plan({"a": 3, "b": 2})
    assert pace.seconds_left("a") is None
    pace.busy("a", 100.0)
    pace.did("a", 110.0)
    assert (pace.seconds_left("a"), pace.seconds_left("b"), pace.all_left()) == (20.0, 20.0, 40.0)
    pace.busy("b", 110.0)
    pace.did("b", 112.0)
    assert (pace.seconds_left("b"), pace.all_left()) == (2.0, 22.0)
    pace.did("b", 114.0)
    assert pace.seconds_left("b") == 0.0


def test_bars_are_drawn_where_a_person_watches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("llm_daemon_bench.display.is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", "150")
    with Display() as display:
        display.planned({"a/m/q": 2, "b/m/q": 1})
        display.doing("a/m/q", "launch 1")
        display.did("a/m/q", "hello 1")
        display.problem("b/m/q", "it\x1b[31m broke")
    said = capsys.readouterr().err
    assert "b/m/q: it?[31m broke" in said
    assert "1/2" in said
    assert "1/3" in said


def test_energy_is_read_from_whole_packages(tmp_path: Path) -> None:
    for name, uj in (("intel-rapl:0", 5), ("intel-rapl:0:0", 3), ("intel-rapl:1", 7)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{uj}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("1000\n")
    assert meter.energy_uj(tmp_path) == {"intel-rapl:0": (5, 1000), "intel-rapl:1": (7, 1000)}
    assert meter.energy_uj(tmp_path / "none") == {}
    assert meter.joules({}, {}) is None


def test_a_trial_s_costs_are_those_of_the_whole_tree() -> None:
    inner = "print(flush=True); input()"  # the inner one speaks, when it has taken what it needs
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {inner!r}], stdin=0).wait()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert len(meter.tree([child.pid])) == 2
        one = meter.Meter([child.pid])
        one.begin()
        sum(range(1_000_000))
        res, env, client = one.end()
        child.communicate(b"\n")
    assert (res.rss_mib or 0) > 5
    assert res.pss_mib is None or res.pss_mib <= (res.rss_mib or 0)
    assert res.cpu_s is not None
    assert (client.cpu_ms or 0) > 1
    assert env.load1 is not None
    assert meter.tree([child.pid]) == []
    assert meter.cpu_seconds([]) is None


def test_this_machine_is_described() -> None:
    found = machine.describe()
    assert found.os
    assert found.kernel
    assert (found.ram_mib or 0) > 100
    assert 1 <= (found.usable_cores or 0) <= (found.cores or 0)
    if sys.platform == "linux":
        assert found.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def test_git_state_tells_changes(tmp_path: Path) -> None:
    folder = tmp_path / "checkout"
    folder.mkdir()
    assert machine.git_state(folder) == ""
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    clean = machine.git_state(folder)
    assert len(clean) == 12
    (folder / "f").touch()
    assert machine.git_state(folder) == clean + "+"


def test_hashes_are_remembered_until_a_file_changes(tmp_path: Path) -> None:
    told: list[str] = []
    path, finder = tmp_path / "m", Finder(tmp_path / "out" / "h.json", told.append)
    path.write_bytes(b"abc")
    first = finder.sha256(str(path))
    assert first == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert (finder.sha256(str(path)), told) == (first, ["hashing m"])
    path.write_bytes(b"abcd")
    assert finder.sha256(str(path)) != first
    drop_from_page_cache(str(path))
    assert path.read_bytes() == b"abcd"


def test_weights_are_called_by_what_the_catalog_resolves() -> None:
    spec = Catalog.load({"mine": "smollm2-135m?context=512"}).resolve(Wish.of("mine", engine="llama-server"))
    assert (Weights("/w.gguf", spec=spec).name, Weights("").name) == ("smollm2-135m", "")


def test_a_program_that_cannot_run_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Died, match="cannot run /no/such: No such file or directory"):
        Process(["/no/such"], str(tmp_path), dict(os.environ), tmp_path / "log", 1.0)


def lives(process: psutil.Process) -> bool:
    """One that has ended may not be waited for yet, and may be at any moment."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_process_is_stopped_with_its_tree(tmp_path: Path) -> None:
    code = (
        "import os, signal, subprocess, sys\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "c = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'], start_new_session=True)\n"
        "open('child', 'w').write(str(c.pid)); os.rename('child', 'pid'); print('words'); sys.stdout.flush(); signal.pause()\n"
    )
    process = Process([sys.executable, "-c", code], str(tmp_path), dict(os.environ), tmp_path / "log", 0.2)
    assert process.running_ms > 0
    while not (tmp_path / "pid").exists():
        assert process.exit(0.02) is None
    tree = [psutil.Process(process.pid), psutil.Process(int((tmp_path / "pid").read_text()))]
    process.stop()
    assert not [p for p in tree if lives(p)]
    assert process.exit() == "stopped"
    assert process.last_words() == "words"
    process.stop()


def test_how_a_process_ended_is_told(tmp_path: Path) -> None:
    for code, how in (("raise SystemExit(3)", "exit status 3"), ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL")):
        process = Process([sys.executable, "-c", code], str(tmp_path), dict(os.environ), tmp_path / "log", 0.2)
        assert process.exit(20) == how
        process.stop()


def test_a_killed_keeper_takes_the_server_along(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "import signal; signal.pause()"]
    process = Process(argv, str(tmp_path), dict(os.environ), tmp_path / "log", 0.2)
    server = psutil.Process(process.pid)
    os.kill(server.ppid(), signal.SIGKILL)
    assert process.exit(20) == "killed with its keeper"
    process.stop()
    psutil.wait_procs([server], timeout=20)
    assert not server.is_running()


def test_folders_of_killed_runs_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    names = [f"{servers.SCRATCH}{gone.pid}-x", f"{servers.SCRATCH}{os.getpid()}-x", f"{servers.SCRATCH}other"]
    for name in names:
        (tmp_path / name).mkdir()
    servers.sweep()
    assert [(tmp_path / name).exists() for name in names] == [False, True, True]


def test_a_port_answered_by_a_stranger_is_refused() -> None:
    import socket

    with socket.socket() as mine, subprocess.Popen([sys.executable, "-c", LISTENER], stdin=-1, stdout=-1, text=True) as other:
        mine.bind(("127.0.0.1", 0))
        mine.listen()
        assert other.stdout is not None
        port = int(other.stdout.readline())
        servers._owned(other.pid, Endpoint(port=port))
        with pytest.raises(servers.NotReady, match="answered by another process"):
            servers._owned(other.pid, Endpoint(port=mine.getsockname()[1]))
        other.communicate("\n")


LISTENER = (
    "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); print(s.getsockname()[1], flush=True); input()"
)
