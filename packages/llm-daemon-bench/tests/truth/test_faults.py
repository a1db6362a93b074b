"""What goes wrong with some targets, by way of the real command: one clear line each, and the others go on."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from llm_daemon_bench import results
from llm_daemon_bench.testing.script import Script

PROGRAM = Path(sys.executable).parent / "llm-daemon"
SERVER = """
[[server]]
id = "{id}"
launch = [{python}, "-m", "llm_daemon_bench.testing.scripted", "{{port}}", "{{artifact}}", "{health}"]
version = ["true"]
models = ["{id}"]
stop_s = 1
[[model]]
id = "{id}"
artifacts = {{ q = {path} }}
"""
CASE = """
[[case]]
id = "{id}"
prompt = "So?"
max_tokens = 8
checkpoints = [ {{ id = "fox", contains = "fox" }} ]
"""
GOOD = Script(prefill_ms=2, token_ms=1)


def suite(
    folder: Path, servers: dict[str, tuple[Script, int]], cases: tuple[str, ...] = ("one",), trials: int = 2, ready_s: int = 60
) -> Path:
    """Writes one: server applications by name, each with its script and the status of its /health."""
    parts = [f'[suite]\nname = "faults"\nlaunches = 2\ntrials = {trials}\nwarmup = 0\nseed = 3\n']
    parts.append(f"ready_s = {ready_s}\nstall_s = 20\n")
    for name, (script, health) in servers.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps({name: script.to_json()}))
        parts.append(SERVER.format(id=name, python=json.dumps(sys.executable), health=health, path=json.dumps(str(path))))
    out = folder / "faults.toml"
    out.write_text("".join([*parts, *(CASE.format(id=c) for c in cases)]))
    return out


def bench(*args: str, most_bytes: int | None = None) -> tuple[int, str, list[str]]:
    """(exit status, stdout, lines of stderr) of the command in a process of its own, which may write files up to a size."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes or 0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    done = subprocess.run(
        [PROGRAM, "bench", *args], capture_output=True, text=True, timeout=110, check=False,
        preexec_fn=limit if most_bytes else None,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr.splitlines()


def cells(folder: Path) -> Counter[tuple[str, str, int, int]]:
    return Counter((t.target, t.case, t.launch, t.repeat) for t in results.load(folder).measured())


def session() -> Path:
    (path,) = Path("results").glob("*/session.json")
    return path.parent


def test_one_never_ready_one_dying_and_one_good(tmp_path: Path) -> None:
    servers = {"mute": (GOOD, 503), "mortal": (Script(token_ms=1, die_after=4), 200), "good": (GOOD, 200)}
    path = suite(tmp_path, servers, ready_s=4)  # so long the good one may take to start
    status, _, said = bench("run", str(path), "--plain")
    assert status == 3
    mute = [line for line in said if line.startswith("mute/") and "not ready after 4 s: /health answers 503" in line]
    assert len(mute) == 2, said
    mortal = [line for line in said if line.startswith("mortal/mortal/q: the server died over one")]
    assert mortal and all("134" in line for line in mortal), said
    assert not [line for line in said if "Traceback" in line]
    found = results.load(session())
    good = [t for t in found.measured() if t.target == "good/good/q"]
    assert len(good) == 4 and not [t for t in good if t.error]
    assert all(t.cp["fox"].ms is not None for t in good)
    dead = [t for t in found.measured() if t.target == "mortal/mortal/q"]
    assert dead and all(t.error and "died" in t.error for t in dead)
    assert not [t for t in found.measured() if t.target == "mute/mute/q"]
    assert [x.error is not None for x in found.launches if x.target == "mute/mute/q"] == [True, True]


def test_a_disk_that_fills_ends_it_in_one_line_and_the_rest_is_resumed(tmp_path: Path) -> None:
    path = suite(tmp_path, {"a": (GOOD, 200), "b": (GOOD, 200)}, ("one", "two"), trials=4)
    status, _, said = bench("run", str(path), "--plain", most_bytes=12_000)
    assert status == 3
    (line,) = [line for line in said if line.startswith("llm-daemon:")]
    assert "cannot write" in line and "File too large" in line
    assert any("resume" in line for line in said if line.startswith("  hint:"))
    folder = session()
    before = cells(folder)
    assert 0 < sum(before.values()) < 32  # else this test proves nothing
    status, _, said = bench("run", str(path), "--plain", "--resume")
    assert (status, folder) == (0, session()), said
    after = cells(folder)
    assert len(after) == 2 * 2 * 2 * 4 and set(after.values()) == {1}
    assert before.keys() <= after.keys()


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("trials = 2", "trails = 2", 4, "unknown key 'trails'"),
        ("trials = 2", 'trials = "two"', 4, "trials"),
        ("max_tokens = 8", "max_tokens = 0", None, "max_tokens"),
        ('prompt = "So?"', 'prompt_file = "gone.txt"', None, "cannot read gone.txt"),
        ('contains = "fox"', 'regex = "("', None, "regex '('"),
        ('contains = "fox"', 'contians = "fox"', None, "unknown key 'contians'"),
        ("{port}", "{prot}", None, "unknown {prot}"),
        ("[[case]]", "[[case]", None, "not valid TOML"),
    ],
)
def test_a_bad_suite_is_one_line_with_its_number(tmp_path: Path, old: str, new: str, line: int | None, says: str) -> None:
    path = suite(tmp_path, {"a": (GOOD, 200)})
    text = path.read_text()
    assert old in text
    number = line or text[: text.index(old)].count("\n") + 1
    path.write_text(text.replace(old, new))
    status, out, said = bench("run", str(path))
    assert (status, out) == (2, "")
    (told,) = [x for x in said if not x.startswith("  hint:")]
    assert told.startswith("llm-daemon: ") and says in told and "faults.toml" in told
    assert f"line {number}" in told
    assert not Path("results").exists()
