"""Builds a real llama-server for the tests, once: about six minutes on two cores, then it stays in the user's cache.

    python tools/build_llama_server.py           # build if need be, print the path
    python tools/build_llama_server.py --path    # print the path if it is there, else nothing

The source is llama.cpp as it travels in the source package of llama-cpp-python (MIT), pinned by hash and fetched through
the user's own package index configuration.  Needs cmake and a C++ compiler; without them it says so and ends with status 75.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import platformdirs

NAME, VERSION = "llama-cpp-python", "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
BINARY = Path(platformdirs.user_cache_dir("llm-daemon-build", appauthor=False)) / f"llama-server-{VERSION}" / "llama-server"
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF",
)  # fmt: skip


def main() -> int:
    if BINARY.exists() or "--path" in sys.argv:
        print(BINARY if BINARY.exists() else "")
        return 0
    missing = [tool for tool in ("cmake", "c++") if not shutil.which(tool)]
    if missing:
        print(f"no llama-server is built: {' and '.join(missing)} missing (Debian: apt-get install cmake g++)", file=sys.stderr)
        return 75
    print("Building llama-server for the tests (some minutes; once)", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="llm-daemon-build-") as folder:
        source = fetch(Path(folder))
        build = Path(folder) / "build"
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        quietly(["cmake", "-S", str(source), "-B", str(build), *generator, *OPTIONS])
        quietly(["cmake", "--build", str(build), "--target", "llama-server", "-j", str(os.cpu_count() or 1)])
        BINARY.parent.mkdir(parents=True, exist_ok=True)
        half = BINARY.with_suffix(f".{os.getpid()}")
        shutil.copy2(build / "bin" / "llama-server", half)
        half.rename(BINARY)  # whoever looks meanwhile finds all of it or nothing
    print(BINARY)
    return 0


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
