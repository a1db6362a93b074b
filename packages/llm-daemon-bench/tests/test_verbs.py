"""The verbs that read results, as a person types them."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import pytest

from llm_daemon.cli import main
from llm_daemon_bench import results
from llm_daemon_bench.cli import VERBS

from .simulate import CHAT, EXTRACT, Speed, simulate

A, B = "llama-server/m/Q4", "xllamacpp/m/Q4"
SPEED = Speed(engine="llama-server")
SLOWER = [
    *(f"chat [warm] {name}" for name in ("first_token", "sentence1", "t2_first")),
    *(f"extract-json [cold] {name}" for name in ("first_token", "total", "complete")),
]
MINE = ("report", "compare", "gate", "aa", "recommend", "export")


@dataclass
class Result:
    status: int
    out: str
    err: str


Bench = Callable[..., Result]


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    """`bench("compare", ...)` in a folder with two sessions; the second one's targets are a tenth slower."""
    cases = (CHAT, replace(EXTRACT, cold_start=False))
    both = {A: SPEED, B: replace(SPEED, prefill=400, engine=None)}
    simulate(tmp_path / "results" / "20261125-1", both, cases, streams=True)
    simulate(tmp_path / "results" / "20261125-2", {k: v.slowed(0.1) for k, v in both.items()}, cases, seed=9)

    def run(*args: str) -> Result:
        status = main.run(["bench", *args])
        return Result(status, *capsys.readouterr())

    return run


@pytest.mark.parametrize("verb", MINE)
def test_help_has_examples_and_the_same_words_as_the_list(bench: Bench, verb: str) -> None:
    command = import_module(f"llm_daemon_bench.cli.{verb}").command
    assert command.help.splitlines()[0] == VERBS[verb]
    assert f"llm-daemon bench {verb}" in bench(verb, "--help").out


def test_report(bench: Bench, tmp_path: Path) -> None:
    newest, named = bench("report"), bench("report", "20261125-1")
    assert newest.status == named.status == 0 and "\x1b" not in named.out
    assert "chat [warm]" in named.out and newest.out != named.out
    assert bench("report", "results/20261125-1", "--html", "r.html", "--markdown", "r.md").err.split() == ["r.html", "r.md"]
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>") and (
        tmp_path / "r.html"
    ).stat().st_mode & 0o444 == 0o444
    assert bench("report", "20261125-1", "--markdown", "-").out == (tmp_path / "r.md").read_text()
    shown = json.loads(bench("report", "--json").out)
    assert shown["session"]["id"] == "20261125-2" and len(shown["cells"]) == 2 * (3 + 3 + 5)
    assert {cell["tail"] for cell in shown["cells"] if cell["case"] == "chat"} == {"max of 18"}
    lost = bench("report", "--html", "no/such/r.html")
    assert lost.status == 3 and "cannot write no/such/r.html" in lost.err and "--out" not in lost.err


def test_compare(bench: Bench) -> None:
    found = bench("compare", A, "xllama", "--in", "20261125-1")
    lines = found.out.splitlines()
    assert found.status == 0 and lines[0] == f"A = 20261125-1:{A}, B = 20261125-1:{B}"
    row = next(line for line in lines if line.startswith("chat [warm] first_token"))
    assert "slower !" in row and row.endswith("slower prefill") and "<0.001" in row
    assert "paired by round" in found.out and "start-up: too few trials to tell (3 and 3, 5 a side are needed)" in found.out
    two = json.loads(bench("compare", "20261125-1", "20261125-2", "--json").out)["comparisons"]
    assert [c["base"].split(":")[1] for c in two] == [A, B] and not two[0]["paired"]
    assert {r["verdict"] for r in two[0]["rows"] if r["cache"] in ("warm", "cold") and r["checkpoint"] != "pass"} == {"slower"}
    one = json.loads(bench("compare", f"20261125-1:{A}", "20261125-2", "--json", "--floor", "20").out)["comparisons"]
    assert one[0]["threshold"] == 0.4 and {r["verdict"] for r in one[0]["rows"]} == {"no difference shown", "too few trials"}


def test_gate(bench: Bench) -> None:
    worse = bench("gate", "20261125-1", "20261125-2", "--max", "5%")
    assert worse.status == 1 and worse.out.startswith(f"FAIL 20261125-2:{A}: chat [warm] first_token: ")
    good = bench("gate", "20261125-1", "20261125-2", "--max", "30%")
    assert (good.status, good.out[:5]) == (0, "pass:")
    assert json.loads(bench("gate", "20261125-2", "20261125-1", "--json").out)["passed"] is True
    assert bench("gate", "20261125-1", "20261125-2", "--max", "much").status == 2


def test_aa(bench: Bench, tmp_path: Path) -> None:
    found = bench("aa", "20261125-1")
    assert found.out.count("nothing called different") == 2 and "noise floor" in found.out
    shown = json.loads(bench("aa", "20261125-1", "--target", "llama-server", "--json").out)["floors"]
    assert len(shown) == 1 and 0 < shown[0]["floor"] < 0.2 and shown[0]["called_different"] == 0
    simulate(tmp_path / "results" / "20261125-3", {A: SPEED, B: SPEED}, (CHAT, replace(EXTRACT, cold_start=False)), seed=3)
    same = bench("aa", "20261125-3", "--target", A, "--twin", B)
    assert (same.status, same.err) == (0, "") and same.out.startswith(f"{A}: noise floor ")
    assert same.out.splitlines()[0].endswith("; nothing called different")
    other = bench("aa", "20261125-1", "--target", A, "--twin", B)  # B is slower: no twin of A, or no quiet machine
    lines = other.out.splitlines()
    assert other.status == 0 and "; calls 6 of 12 cells different" in lines[0]
    assert lines[1:7] == [f"  {name}: slower: the machine was not quiet" for name in SLOWER]
    told = json.loads(bench("aa", "20261125-1", "--target", A, "--twin", B, "--json").out)["floors"]
    assert [f["called_different"] for f in told] == [6]
    assert {r["verdict"] for r in told[0]["comparison"]["rows"] if r["p"] is not None} == {"slower", "no difference shown"}
    assert bench("aa", "20261125-1", "--target", A, "--twin", "nobody").status == 2


def test_recommend_and_apply(bench: Bench, tmp_path: Path) -> None:
    found = bench("recommend", "20261125-1")
    lines = found.out.splitlines()
    assert lines[0].startswith(f"Use {A}: fastest of all") and lines[1] == "  llama-server -m models/m.Q4.gguf"
    assert lines[-1].startswith(f"Rejected {B}: ") and lines[-1].endswith(" > 600.")
    told = json.loads(bench("recommend", "20261125-1", "--slo", "chat.sentence1:p50<=10s", "--max-rss", "1GiB", "--json").out)
    assert told["winner"]["target"] == A and [c["target"] for c in told["ranked"]] == [A, B] and told["applied"] is None
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m.Q4.gguf").write_bytes(b"GGUF")
    before = (tmp_path / "config.toml").read_text()
    done = bench("recommend", "20261125-1", "--apply", "--as", "best")
    config = (tmp_path / "config.toml").read_text()
    assert done.status == 0 and f"best now means {tmp_path}/models/m.Q4.gguf?engine=llama-server" in done.out
    assert 'default_model = "best"' in config and before.strip() in config
    assert json.loads(main_config(bench))["settings"]["default_model"]["value"] == "best"
    for slo, first in (("chat.first_token:p50<=1", "No target"), ("chat.first_token:p95<=100s", "Undecided")):
        none = bench("recommend", "20261125-1", "--slo", slo)
        assert none.status == 1 and none.out.startswith(first)
        assert bench("recommend", "20261125-1", "--slo", slo, "--json").status == 1
    assert bench("recommend", "20261125-1", "--apply", "--as", "").status == 2
    assert (tmp_path / "config.toml").read_text() == config
    for args, said in (
        (["--slo", "chat.first_token:p50<=1", "--apply"], "no winner to apply"), (["--max-rss", "lots"], "no size like 6GiB"),
        (["--slo", "chat"], "cannot read the wish"), (["nowhere"], "nowhere"),
    ):  # fmt: skip
        refused = bench("recommend", *([] if args == ["nowhere"] else ["20261125-1"]), *args)
        assert refused.status == 2 and said in refused.err and "hint:" in refused.err


def main_config(bench: Bench) -> str:
    """`llm-daemon config --json`, read by the daemon's own reader."""
    from llm_daemon.config import Settings, effective

    assert os.environ["LLM_DAEMON_CONFIG"]
    return json.dumps({"settings": effective(Settings.load())}, default=str)


@pytest.mark.parametrize(
    ("text", "mib"), [("6GiB", 6144), ("6g", 6144), ("800MB", 762.94), ("512", 512), ("1kB", 0.00095), ("1.5TiB", 1572864)]
)
def test_sizes(text: str, mib: float) -> None:
    import click

    from llm_daemon_bench.cli.recommend import _mib

    context = click.Context(click.Command("x"))
    assert _mib(context, click.Option(["--max-rss"]), text) == pytest.approx(mib, rel=0.01)


def test_export(bench: Bench) -> None:
    rows = list(csv.DictReader(io.StringIO(bench("export", "csv", "20261125-1").out)))
    points = [r for r in rows if r["target"] == A and r["checkpoint"] == "sentence1"]
    assert len(points) == 21 and [r["warmup"] for r in points].count("True") == 3
    assert {r["cache"] for r in points} == {"warm"} and all(200 < float(r["ms"]) < 500 for r in points)
    assert any(r["checkpoint"] == "event:first_token" for r in rows)
    nothing = bench("export", "csv", "nowhere")
    assert (nothing.status, nothing.out) == (2, "")


def test_a_copied_session_goes_by_its_folder(bench: Bench, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "results" / "20261125-1", tmp_path / "results" / "monday")
    rows = json.loads(bench("list", "--json").out)["sessions"]
    assert {r["id"] for r in rows} == {"20261125-1", "20261125-2", "monday"}
    for name in ("monday", "results/monday"):
        told = json.loads(bench("validate", name, "--json").out)
        assert {line["step"] for line in told["lines"]} == {"V1"}
    assert bench("validate", "tuesday").status == 2


def test_a_damaged_session_is_told(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "results" / "20261125-1"
    trials, whole = folder / "trials.jsonl", (folder / "trials.jsonl").read_bytes()
    held = len({t.key for t in results.load(folder).measured()})
    about = json.loads((folder / "session.json").read_text())
    (folder / "session.json").write_text(json.dumps(about | {"held": held}))
    assert "trials.jsonl" not in bench("show", "20261125-1").out + bench("report", "20261125-1").out
    lines = whole.splitlines(keepends=True)
    for data, said in (
        (b"".join(lines[: len(lines) // 2]), f"of the {held} trials that were measured"),
        (whole[: len(whole) // 2], "what follows its last whole trial cannot be read"),
        (b"", "holds no measured trial"),
        (None, "trials.jsonl is missing"),
    ):
        trials.unlink() if data is None else trials.write_bytes(data)
        for shown in (bench("show", "20261125-1").out, bench("report", "20261125-1").out):
            assert said in shown and "warning: " in shown
        assert said in " ".join(json.loads(bench("show", "20261125-1", "--json").out)["warnings"])
        assert said in bench("report", "20261125-1", "--markdown", "-").out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["compare", "m", A], "may be any of"), (["compare", "nothing", A], "no target 'nothing'"),
        (["compare", "20261125-1", f"20261125-2:{A}x"], "no target"), (["report", "nowhere"], "nowhere"),
    ],
)  # fmt: skip
def test_names_that_mean_nothing(bench: Bench, args: list[str], said: str) -> None:
    refused = bench(*args)
    assert refused.status == 2 and said in refused.err and "hint:" in refused.err
