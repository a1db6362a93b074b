"""Makes another quantization of a GGUF model, for tests and benchmarks; made once, then it stays in the user's cache.

    python tools/quantize.py MODEL.gguf Q2_K             # prints the path in the cache
    python tools/quantize.py MODEL.gguf Q2_K OUT.gguf    # and puts it there as well (a hard link where that works)

From Python: `tools.quantize.quantize(model, "Q2_K")`.  Needs llama-quantize, which build_llama_server.py builds (status 75
without a compiler).
A model that is quantized already is quantized anew, which loses quality: good for measuring and testing, not for use.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: our folder's name is the package
from tools import build_llama_server as build

THREADS = "2"


def quantize(model: Path, quant: str) -> Path:
    """The path of `model` in quantization `quant` (a name llama-quantize knows, e.g. Q4_K_M), made now if need be.

    Raises RuntimeError with llama-quantize's last words, FileNotFoundError where it is not built.
    """
    program = build.FOLDER / "llama-quantize"
    made = build.FOLDER / "models" / f"{model.stem}-{_identity(model)}-{quant}.gguf"
    if made.exists():
        return made
    if not program.exists():
        raise FileNotFoundError(f"no llama-quantize: run {build.__file__}")
    made.parent.mkdir(parents=True, exist_ok=True)
    half = made.with_suffix(f".{os.getpid()}")
    try:
        done = subprocess.run(
            [str(program), "--allow-requantize", str(model), str(half), quant, THREADS],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"llama-quantize {quant} ended with status {done.returncode}: {done.stdout[-1000:]}")
        half.rename(made)  # whoever looks meanwhile finds all of it or nothing; two who make it make the same
    finally:
        half.unlink(missing_ok=True)
    return made


def _identity(model: Path) -> str:
    """A few letters that change with the file's bytes: its size, its first and its last megabyte."""
    size = model.stat().st_size
    with open(model, "rb") as f:
        head = f.read(2**20)
        f.seek(max(0, size - 2**20))
        return hashlib.sha256(b"%d" % size + head + f.read(2**20)).hexdigest()[:12]


def main() -> int:
    if len(sys.argv) not in (3, 4):
        print(__doc__, file=sys.stderr)
        return 2
    if status := build.build(["llama-quantize"]):
        return status
    made = quantize(Path(sys.argv[1]), sys.argv[2])
    if len(sys.argv) == 4:
        out = Path(sys.argv[3])
        half = out.with_name(f"{out.name}.{os.getpid()}")
        try:
            half.hardlink_to(made)
        except OSError:  # another file system
            shutil.copyfile(made, half)
        half.replace(out)
        made = out
    print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
