"""Results of other tools as a session of ours, so that `report`, `compare`, `gate` and `export` read them.

Each of their repetitions is a trial; what they measure is named as they name it: case `pp512` with the checkpoint `prompt` or
`first_token`, case `tg128` with `ms_a_token`, `pp512+tg128` with `done`; `-d` is the depth, `-c` the requests at once.
Read: llama-bench (llama.cpp tools/llama-bench, `-o json` and `-o jsonl`), llama-benchy (`--format json`; its
schemas/benchmark_report_schema.json).
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from . import sessions
from .errors import ResultsError
from .plan import digest
from .records import (
    Artifact,
    CaseInfo,
    CheckpointInfo,
    Machine,
    Reached,
    ServerRef,
    ServerTimes,
    Session,
    TargetInfo,
    Tokens,
    Trial,
)
from .results import Writer

TEXTS = {
    "prompt": "the whole prompt is processed",
    "first_token": "first token, from the request on",
    "ms_a_token": "ms for each token",
    "done": "prompt and tokens",
}


@dataclass(frozen=True, slots=True)
class Measured:
    """One line of a tool's table: `ms` of each repetition until `point`, or for each token."""

    target: TargetInfo
    case: str
    point: str
    ms: tuple[float, ...]
    prompt: int | None = None
    out: int | None = None
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Read:
    """A whole file."""

    tests: list[Measured]
    machine: Machine
    began: float


def take(tool: str, path: Path, out: Path) -> tuple[Path, Session]:
    """Makes a session below `out` of a file that `tool` (of TOOLS) wrote.  Raises ResultsError, which names the file."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise ResultsError(f"cannot read {path}: {e.strerror}") from None
    try:
        found = TOOLS[tool](_objects(data.decode()))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        what = f"no {e}" if isinstance(e, KeyError) else str(e)
        raise ResultsError(f"{path} is no result of {tool}: {what}", hint=HINTS[tool]) from None
    if not found.tests:
        raise ResultsError(f"{path} holds no measured test", hint=HINTS[tool])
    folder = sessions.make(out)
    session = Session(
        id=folder.name, bench_version=metadata.version("llm-daemon-bench"), suite=f"{tool} {path.name}", suite_text="",
        suite_sha256=hashlib.sha256(data).hexdigest(), command=tuple(sessions.invoked()), began=found.began, ended=time.time(),
        trials=max(len(test.ms) for test in found.tests), launches=1, interleave="none", warmup=0, machine=found.machine,
        targets=tuple({t.target.id: t.target for t in found.tests}.values()), cases=tuple(_cases(found.tests)),
        notes=(f"measured by {tool}, imported from {path.name}",),
    )  # fmt: skip
    with Writer(folder) as writer:
        numbers: Counter[tuple[str, str]] = Counter()  # a tool may measure one thing again beside another
        for test in found.tests:
            for ms in test.ms:
                numbers[test.target.id, test.case] += 1
                writer.trial([_trial(session, test, numbers[test.target.id, test.case], ms)])
        writer.session(session)  # last: a folder without it is no session
    return folder, session


def _objects(text: str) -> Any:
    """A JSON value, or the list of those of JSON lines."""
    try:
        return json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]


def _cases(tests: list[Measured]) -> Iterator[CaseInfo]:
    for case, point in {test.case: test.point for test in tests}.items():
        yield CaseInfo(
            id=case, kind="completion", cache="cold", checkpoints=(CheckpointInfo(id=point, kind="event", text=TEXTS[point]),)
        )


def _trial(session: Session, test: Measured, number: int, ms: float) -> Trial:
    """`ms_a_token` counts from the first token on; all else from the beginning."""
    each, t, ms = test.point == "ms_a_token", test.target, round(ms, 4)
    return Trial(
        key=digest(session.id, t.id, test.case, number), session=session.id, target=t.id, server=t.server, model=t.model,
        params=t.params, quant=t.quant, case=test.case, launch=1, round=number, repeat=number, process=t.server.id,
        at=test.at + number / 1e3,  # nobody tells when each began: for their order only
        cache="cold", t_ms={"first_token": 0.0 if each else ms} if test.point != "done" else {"done": ms},
        cp={test.point: Reached(ms=ms, tok=1 if each else None)}, tokens=Tokens(prompt=test.prompt, out=test.out),
        server_ms=ServerTimes(prompt=ms if test.point == "prompt" else None), decode_ms_per_tok=ms if each else None,
    )  # fmt: skip


def _name(prompt: int, out: int, depth: int, at_once: int = 1) -> str:
    """
    >>> _name(512, 0, 0), _name(0, 128, 512), _name(512, 128, 0, 4)
    ('pp512', 'tg128-d512', 'pp512+tg128-c4')
    """
    words = "+".join(f"{kind}{n}" for kind, n in (("pp", prompt), ("tg", out)) if n)
    return words + (f"-d{depth}" if depth else "") + (f"-c{at_once}" if at_once > 1 else "")


# -- llama-bench ---------------------------------------------------------------------------------------------------------

_TEST = ("n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "samples_ts")


def llama_bench(rows: Any) -> Read:
    """Its rows.  What differs between them beside test and model goes into the target's name: `llama-bench@n_threads=4`."""
    rows = rows if isinstance(rows, list) else [rows]
    settings = [k for k in (rows[0] if rows else ()) if k not in _TEST and not k.startswith("model_")]
    varied = [k for k in settings if len({str(row.get(k)) for row in rows}) > 1]
    tests = []
    for row in rows:
        prompt, out, ns = int(row["n_prompt"]), int(row["n_gen"]), [float(x) for x in row["samples_ns"]]
        point = "done" if prompt and out else "prompt" if prompt else "ms_a_token"
        ms = tuple(x / 1e6 / (out if point == "ms_a_token" else 1) for x in ns)
        case = _name(prompt, out, int(row.get("n_depth", 0)))
        tests.append(
            Measured(_llama_bench_target(row, varied), case, point, ms, prompt or None, out or None, _unix(row["test_time"]))
        )
    first = rows[0] if rows else {}
    machine = Machine(cpu=first.get("cpu_info", ""), gpu=tuple(x for x in [first.get("gpu_info")] if x))
    return Read(tests, machine, min((test.at for test in tests), default=0.0))


def _llama_bench_target(row: dict[str, Any], varied: list[str]) -> TargetInfo:
    # Architecture, size, quantization, as in `llama 256M Q4_1`, `qwen2 7B Q4_K - Medium` or `llama 7B IQ2_XXS - 2.0625 bpw`.
    words = re.sub(r" - ([SML])(?:mall|edium|arge)$", r"_\1", str(row["model_type"])).partition(" - ")[0].split()
    server = "@".join(["llama-bench", *([",".join(f"{k}={row.get(k)}" for k in varied)] if varied else [])])
    file = Path(row["model_filename"])
    version, quant = f"{row['build_number']} ({row['build_commit']})", words[-1]
    return TargetInfo(
        id=f"{server}/{file.stem}/{quant}", server=ServerRef(id=server, version=version), model=file.stem,
        params=words[1] if len(words) > 2 else "", quant=quant,
        artifact=Artifact(path=str(file), bytes=row.get("model_size")), command=f"llama-bench -m {file}",
    )  # fmt: skip


def _unix(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


# -- llama-benchy --------------------------------------------------------------------------------------------------------


def llama_benchy(report: Any) -> Read:
    """Its first token is `e2e_ttft`, for `ttfr` may be the role's chunk; of several requests at once each one's rate counts."""
    model = str(report["model"]).rstrip("/").rsplit("/", 1)[-1]
    server = ServerRef(id="llama-benchy", version=str(report["version"]))
    target = TargetInfo(id=f"llama-benchy/{model}/as-served", server=server, model=model, quant="as-served")
    tests: list[Measured] = []
    at = _unix(str(report["timestamp"]))
    many = (
        len({int(run["prompt_size"]) for run in report["benchmarks"]}) > 1
    )  # tokens behind one prompt are not those behind another
    for run in report["benchmarks"]:
        depth, at_once = int(run["context_size"]), int(run["concurrency"])
        prompt, out = int(run["prompt_size"]), int(run["response_size"])
        context = "ctx-" if run["is_context_prefill_phase"] else ""
        first = (run.get("e2e_ttft") or {}).get("values", [])
        rates = (run.get("tg_req_throughput" if at_once > 1 else "tg_throughput") or {}).get("values", [])
        if first:
            tests.append(Measured(target, context + _name(prompt, 0, depth, at_once), "first_token", tuple(first), prompt, at=at))
        if rates:
            each = tuple(1e3 / rate for rate in rates if rate > 0)
            case = context + _name(prompt if many else 0, out, depth, at_once)
            tests.append(Measured(target, case, "ms_a_token", each, out=out, at=at))
    return Read(tests, Machine(), at)


TOOLS: dict[str, Callable[[Any], Read]] = {"llama-bench": llama_bench, "llama-benchy": llama_benchy}
HINTS = {
    "llama-bench": "`llama-bench -o json > FILE` writes one (or jsonl)",
    "llama-benchy": "`llama-benchy --format json --save-result FILE` writes one",
}
