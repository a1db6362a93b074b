"""Files of other tools, as they wrote them here, become sessions that our verbs read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_daemon.cli.main import run
from llm_daemon_bench import cells, results
from llm_daemon_bench.foreign import TOOLS, take
from llm_daemon_bench.results import Results

from .suites import own_place as own_place

# What `llama-bench -o json` wrote, shortened: a row for each test.
ROW = {
    "build_commit": "0c1e570", "build_number": 1, "cpu_info": "AMD EPYC", "gpu_info": "", "backends": "CPU",
    "model_filename": "models/smol.gguf", "model_type": "llama 256M Q4_1", "model_size": 96576768, "model_n_params": 134515008,
    "n_threads": 1, "n_prompt": 32, "n_gen": 0, "n_depth": 0, "test_time": "2026-11-26T00:53:07Z", "avg_ns": 550846466,
    "stddev_ns": 57829184, "avg_ts": 58.550341, "stddev_ts": 6.542968, "samples_ns": [484079283, 585136047, 583324070],
    "samples_ts": [66.1049, 54.6881, 54.858],
}  # fmt: skip
GEN = {**ROW, "n_prompt": 0, "n_gen": 8, "n_depth": 16, "samples_ns": [240000000, 250000000, 260000000]}
BOTH = {**ROW, "n_gen": 8, "samples_ns": [900000000]}
# What `llama-benchy --format json` wrote, shortened; `ttfr` is the role's chunk, 200 ms before the first token.
REPORT: dict[str, Any] = {
    "version": "0.4.0", "timestamp": "2026-11-26 00:56:21Z", "latency_mode": "none", "latency_ms": 0.0, "model": "org/steady",
    "prefix_caching_enabled": False, "max_concurrency": 1,
    "benchmarks": [
        {
            "concurrency": 1, "context_size": 0, "prompt_size": 64, "response_size": 32, "is_context_prefill_phase": False,
            "tg_throughput": {"mean": 100.0, "std": 0.1, "values": [100.0, 125.0]},
            "tg_req_throughput": {"mean": 100.0, "std": 0.1, "values": [100.0, 125.0]},
            "ttfr": {"mean": 5.9, "std": 2.2, "values": [3.3, 8.0]},
            "e2e_ttft": {"mean": 204.5, "std": 2.2, "values": [202.5, 207.1]}, "throughput_over_time": None,
        },
        {
            "concurrency": 2, "context_size": 128, "prompt_size": 64, "response_size": 32, "is_context_prefill_phase": True,
            "tg_throughput": {"mean": 180.0, "std": 0.0, "values": [180.0]},
            "tg_req_throughput": {"mean": 90.0, "std": 0.0, "values": [80.0, 100.0]}, "e2e_ttft": None,
        },
    ],
}  # fmt: skip


def taken(tool: str, tmp_path: Path, *rows: Any, lines: bool = False) -> Results:
    path = tmp_path / "told.json"
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(list(rows) if tool == "llama-bench" else rows[0]))
    folder, session = take(tool, path, tmp_path / "results")
    found = results.load(folder)
    assert found.session == session and found.broken == 0
    return found


def medians(found: Results) -> dict[str, float]:
    return {f"{target} {key}": cell.median for (target, key), cell in cells.group(found).items()}


@pytest.mark.parametrize(
    ("text", "quant"),
    [
        ("qwen2 7B Q4_K - Medium", "Q4_K_M"), ("llama 8B Q3_K - Large", "Q3_K_L"), ("llama 7B IQ2_XXS - 2.0625 bpw", "IQ2_XXS"),
        ("llama 1B all F32", "F32"),
    ],
)  # fmt: skip
def test_llama_cpp_has_long_names_for_quantizations(tmp_path: Path, text: str, quant: str) -> None:
    [about] = taken("llama-bench", tmp_path, {**ROW, "model_type": text}).session.targets
    assert about.quant == quant


def test_tokens_behind_different_prompts_are_not_one_case(tmp_path: Path) -> None:
    first = REPORT["benchmarks"][0]
    runs = [{**first, "prompt_size": size, "response_size": out} for size in (128, 256) for out in (32, 64)]
    found = taken("llama-benchy", tmp_path, {**REPORT, "benchmarks": runs})
    assert {case.id for case in found.session.cases} == {
        "pp128",
        "pp256",
        *(f"pp{n}+tg{m}" for n in (128, 256) for m in (32, 64)),
    }
    places = [(t.case, t.round, t.repeat) for t in found.trials]
    assert len(set(places)) == len(places) == len({t.key for t in found.trials}) == 16


@pytest.mark.parametrize("lines", [False, True], ids=["json", "jsonl"])
def test_llama_bench(tmp_path: Path, lines: bool) -> None:
    found = taken("llama-bench", tmp_path, ROW, GEN, BOTH, lines=lines)
    target = "llama-bench/smol/Q4_1"
    assert medians(found) == pytest.approx(
        {
            f"{target} pp32 [cold] prompt": 583.3241, f"{target} tg8-d16 [cold] ms_a_token": 31.25,
            f"{target} pp32+tg8 [cold] done": 900,
        }
    )  # fmt: skip
    [about] = found.session.targets
    assert (about.server.version, about.params, about.artifact and about.artifact.bytes) == ("1 (0c1e570)", "256M", 96576768)
    assert (found.session.machine.cpu, found.session.trials, found.session.notes) == (
        "AMD EPYC", 3, ("measured by llama-bench, imported from told.json",),
    )  # fmt: skip
    assert found.session.began == 1795654387.0 and [t.repeat for t in found.trials] == [1, 2, 3, 1, 2, 3, 1]


def test_settings_that_differ_are_targets_of_their_own(tmp_path: Path) -> None:
    found = taken("llama-bench", tmp_path, ROW, {**ROW, "n_threads": 2}, {**ROW, "n_threads": 2, "model_filename": "big.gguf"})
    assert [t.id for t in found.session.targets] == [
        "llama-bench@n_threads=1/smol/Q4_1", "llama-bench@n_threads=2/smol/Q4_1", "llama-bench@n_threads=2/big/Q4_1",
    ]  # fmt: skip
    assert [c.id for c in found.session.cases] == ["pp32"] and len({t.key for t in found.trials}) == 9


def test_llama_benchy(tmp_path: Path) -> None:
    found = taken("llama-benchy", tmp_path, REPORT)
    target = "llama-benchy/steady/as-served"
    assert medians(found) == pytest.approx(
        {
            f"{target} pp64 [cold] first_token": 204.8, f"{target} tg32 [cold] ms_a_token": 9.0,
            f"{target} ctx-tg32-d128-c2 [cold] ms_a_token": 11.25,
        }
    )  # fmt: skip
    assert found.session.targets[0].server.version == "0.4.0"


def test_the_other_verbs_read_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = {"samples_ns": [100_000_000 + i for i in range(6)]}
    for name, share in (("old", 1), ("new", 2)):
        slower = [{**row, "samples_ns": [n * share for n in many["samples_ns"]]} for row in (ROW, GEN)]
        (tmp_path / f"{name}.json").write_text(json.dumps(slower))
        assert run(["bench", "import", "llama-bench", f"{name}.json"]) == 0
    assert "1 target, 2 cases: pp32, tg8-d16" in capsys.readouterr().out
    old, new = sorted(p.name for p in Path("results").iterdir())
    assert run(["bench", "gate", old, new]) == 1
    said = capsys.readouterr().out
    assert "pp32 [cold] prompt: 100 -> 200 ms" in said and "slower prefill" in said and "slower tokens" in said
    assert run(["bench", "report", new, "--html", "r.html", "--markdown", "-"]) == 0
    assert "ms_a_token: ms for each token" in (tmp_path / "r.html").read_text()
    assert run(["bench", "import", "llama-bench", "new.json", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))
    assert told["cases"] == ["pp32", "tg8-d16"] and Path(told["folder"]).is_dir()


@pytest.mark.parametrize(
    ("tool", "text", "said"),
    [
        ("llama-bench", "build,commit\n", "Expecting value"),
        ("llama-bench", json.dumps(REPORT), "no 'n_prompt'"),
        ("llama-bench", "[]", "holds no measured test"),
        ("llama-bench", "[3]", "is no result of llama-bench"),
        ("llama-benchy", json.dumps([ROW]), "is no result of llama-benchy"),
        ("llama-benchy", json.dumps({**REPORT, "benchmarks": []}), "holds no measured test"),
        ("llama-benchy", json.dumps({**REPORT, "timestamp": "soon"}), "soon"),
    ],
)
def test_what_is_no_result_is_told_and_leaves_nothing(
    tool: str, text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    assert run(["bench", "import", tool, str(path)]) == 2
    err = capsys.readouterr().err
    assert str(path) in err and said in err and f"`{tool} " in err
    assert not Path("results").exists()
    assert set(TOOLS) == {"llama-bench", "llama-benchy"}
