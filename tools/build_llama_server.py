"""Builds llama.cpp's programs for tests and benchmarks, once: about six minutes on two cores, then they stay in the user's cache.

    python tools/build_llama_server.py                        # build what is missing, print the path of llama-server
    python tools/build_llama_server.py --path                 # print that path if it is there, else nothing
    python tools/build_llama_server.py --path llama-quantize  # the same for another of them
    python tools/build_llama_server.py llama-quantize         # build this one alone, print its path

They are llama-server, llama-quantize and llama-bench.  The source is llama.cpp as it travels in the source package of
llama-cpp-python (MIT), pinned by hash and fetched through the user's own package index configuration.  Needs cmake and a
C++ compiler; without them it says so and ends with status 75.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import platformdirs

NAME, VERSION = "llama-cpp-python", "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
FOLDER = Path(platformdirs.user_cache_dir("llm-daemon-build", appauthor=False)) / f"llama-server-{VERSION}"
BINARY = FOLDER / "llama-server"
PROGRAMS = ("llama-server", "llama-quantize", "llama-bench")
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds llama.cpp's programs for tests and benchmarks, once.")
    parser.add_argument("--path", action="store_true", help="build nothing: print the path if it is there, else an empty line")
    parser.add_argument("program", nargs="?", choices=PROGRAMS, help="this one alone (without: all, and llama-server's path)")
    given = parser.parse_args()
    path = FOLDER / (given.program or PROGRAMS[0])
    if given.path:
        print(path if path.exists() else "")
        return 0
    if status := build([given.program] if given.program else PROGRAMS):
        return status
    print(path)
    return 0


def build(names: Sequence[str]) -> int:
    """Builds those of `names` that are missing; 0, or the exit status when something is missing for that."""
    if all((FOLDER / name).exists() for name in names):
        return 0
    tools = [tool for tool in ("cmake", "c++") if not shutil.which(tool)]
    if tools:
        print(
            f"{', '.join(names)}: not built, {' and '.join(tools)} missing (Debian: apt-get install cmake g++)", file=sys.stderr
        )
        return 75
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / ".lock", "w") as lock, tempfile.TemporaryDirectory(prefix="llm-daemon-build-") as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second call waits for the first, and finds all it wants
        if missing := [name for name in names if not (FOLDER / name).exists()]:
            print(f"Building {', '.join(missing)} (some minutes; once)", file=sys.stderr)
            compile_in(Path(folder), missing)
    return 0


def compile_in(folder: Path, names: Sequence[str]) -> None:
    """Fetches the source into `folder`, builds `names` there and puts them into FOLDER."""
    source, tree = fetch(folder), folder / "build"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    quietly(["cmake", "-S", str(source), "-B", str(tree), *generator, *OPTIONS])
    quietly(["cmake", "--build", str(tree), "--target", *names, "-j", str(os.cpu_count() or 1)])
    for name in names:
        half = FOLDER / f"{name}.{os.getpid()}"
        shutil.copy2(tree / "bin" / name, half)
        half.rename(FOLDER / name)  # whoever looks meanwhile finds all of it or nothing


def fetch(folder: Path) -> Path:
    """Downloads and unpacks the source package; returns the folder of llama.cpp."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{NAME}=={VERSION} --hash=sha256:{SHA256}\n")
    quietly(
        [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", NAME, "--require-hashes",
         "--dest", str(folder), "-r", str(wanted)]
    )  # fmt: skip
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):  # from Python 3.11.4 on; the archive's hash is pinned anyway
            tar.extraction_filter = tarfile.data_filter
        tar.extractall(folder)
    return folder / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"


def quietly(command: list[str]) -> None:
    """Runs a command; shows what it said only if it failed."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        print(done.stdout[-4000:], file=sys.stderr)
        sys.exit(f"failed with status {done.returncode}: {' '.join(command[:4])} ...")


if __name__ == "__main__":
    sys.exit(main())
