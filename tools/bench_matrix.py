"""Prepares and runs docs/bench/matrix.toml: three server applications x two models x three quantizations x five cases.

    python tools/bench_matrix.py                    # prepare, run, and write the report into docs/bench/
    python tools/bench_matrix.py --prepare          # only prepare
    python tools/bench_matrix.py --trials 1 --launches 1 --case speed-64    # what follows is for `bench run`

Prepared are: llama-server and llama-quantize (built once), llama-cpp-python with its own server (built once, in an environment
of its own), the two models (fetched once), and their quantizations (.cache/matrix).  Let the machine rest while it runs: about
forty minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script: our folder's name is the package
from tools import build_llama_server as build, quantize  # noqa: E402

MODELS = ("smollm2-135m", "gemma3-270m")
QUANTS = ("Q8_0", "Q5_1", "Q4_0")
PLACE = ROOT / ".cache" / "matrix"
PROGRAMS = PLACE / "bin"
PYTHON_SERVER = PROGRAMS / "llama-cpp-python-server"
SUITE = ROOT / "docs" / "bench" / "matrix.toml"
OWN = Path(sys.executable).parent  # where our own programs are


def main(args: Sequence[str]) -> int:
    """Exit status of `bench run`, or of what could not be prepared."""
    if status := prepare():
        return status
    if "--prepare" in args:
        return 0
    env = {
        **os.environ,
        "PATH": os.pathsep.join([str(build.FOLDER), str(PROGRAMS), os.environ.get("PATH", os.defpath)]),
    }  # its llama-server
    suite, results = (str(path.relative_to(ROOT)) for path in (SUITE, PLACE / "results"))
    run = [str(OWN / "llm-daemon"), "bench", "run", suite, "--out", results, "--json", *args]
    ran = subprocess.run(run, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if ran.stdout:
        publish(ROOT / json.loads(ran.stdout)["folder"])
    return ran.returncode


def prepare() -> int:
    """Everything that the suite names."""
    if status := build.build(["llama-server", "llama-quantize"]):
        return status
    PLACE.mkdir(parents=True, exist_ok=True)
    python_server()
    for model in MODELS:
        weights = fetch(model)
        for quant in QUANTS:
            there = PLACE / f"{model}.{quant}.gguf"
            if not there.exists():
                print(f"quantizing {there.name}", file=sys.stderr)
                link(quantize.quantize(weights, quant), there)
    return 0


def python_server() -> None:
    """llama-cpp-python's `llama_cpp.server` as a program; its library is compiled, which takes some minutes, once."""
    if PYTHON_SERVER.exists():
        return
    print("building llama-cpp-python (some minutes; once)", file=sys.stderr)
    venv = PLACE / "llama-cpp-python"
    subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
    options = " ".join(("-DGGML_NATIVE=ON", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_CURL=OFF"))
    subprocess.run(
        [venv / "bin" / "pip", "install", "--quiet", "--no-binary", build.NAME, f"{build.NAME}[server]=={build.VERSION}"],
        env={**os.environ, "CMAKE_ARGS": options}, check=True,
    )  # fmt: skip
    PROGRAMS.mkdir(exist_ok=True)
    half = PYTHON_SERVER.with_suffix(f".{os.getpid()}")
    half.write_text(f'#!/bin/sh\nexec "{venv}/bin/python" -m llama_cpp.server "$@"\n')
    half.chmod(0o755)
    half.rename(PYTHON_SERVER)


def fetch(model: str) -> Path:
    """Where its weights are."""
    subprocess.run([OWN / "llm-daemon", "models", "pull", model], stdout=subprocess.DEVNULL, check=True)
    told = subprocess.run([OWN / "llm-daemon", "models", "show", model, "--json"], stdout=subprocess.PIPE, check=True)
    return Path(json.loads(told.stdout)["path"])


def link(made: Path, there: Path) -> None:
    """Puts a file there as well; whoever looks meanwhile finds all of it or nothing."""
    half = there.with_suffix(f".{os.getpid()}")
    try:
        half.hardlink_to(made)
    except OSError:  # another file system
        shutil.copyfile(made, half)
    half.replace(there)


def publish(folder: Path) -> None:
    """The session's records, and its report for people, beside the suite; the raw replies stay where they are."""
    target = SUITE.parent / "matrix"
    target.mkdir(exist_ok=True)
    for name in ("session.json", "trials.jsonl"):
        shutil.copyfile(folder / name, target / name)
    pages = ["--html", str(SUITE.with_suffix(".html")), "--markdown", str(SUITE.with_suffix(".md"))]
    subprocess.run([str(OWN / "llm-daemon"), "bench", "report", str(target), *pages], check=True)
    for page in (*target.iterdir(), SUITE.with_suffix(".html"), SUITE.with_suffix(".md")):
        text = page.read_text()
        for ours, shown in ((f"{SUITE.parent}/../../", ""), (f"{ROOT}/", ""), (str(Path.home()), "~")):  # nobody else's folders
            text = text.replace(ours, shown)
        page.write_text(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
