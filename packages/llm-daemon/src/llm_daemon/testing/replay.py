"""Recorded engines: what a real one said and did, played back by a program with its own command line.

For engines that cannot run where the tests do.  A recording is one file `recordings/ENGINE-VERSION.json`; the stand-in made from
it is started by the engine's real adapter, and passes the conformance suite (`conformance.py`).  Nothing in a recording is
invented: each part says under `source` where it is from, and `unknown` lists what nobody has seen, which the stand-in then
answers by the nearest thing that is known.

Its keys; `source` in each part is `{"kind", "version", "where"}`, where kind is `run` (it was seen) or `read` (in the source).

- `format`, `engine`, `version`: 1, the adapter's name, the engine's version
- `program`: how it is started: `{"form": "module", "module", "distribution", "version"}`, `"command"` or `"ape"` with a `name`,
  or `"server"` for one that daemons find running
- `questions`: command lines that it answers and ends: `argv`, `exit`, `stdout`
- `command`: `lead` words, `positional` arguments, `flags` (values taken: 0, 1, or a list of the allowed ones), and how it ends
  for an `unknown`, `incomplete` or `wrong` one
- `address`: the flags of host and `port`, or `env`, a variable HOST:PORT; `taken`: how it ends when somebody has it
- `model`, `alias`, `slots`: by which `flag` or `positional` each is given (`slots` with a `default`, or `values` for
  each value of the flag); `absent`, `broken`: how it ends for such a model
- `key`: `env`, the variable that it is given in; `open` paths that do not want it; `status` and `body` for those without it
- `answers_as`: `alias` or `request`, whose name of the model stands in answers
- `loading`, `ready`: whether it listens while loading, with what `status` and `body`; lines on stderr
- `hangup`: `stream`, `plain`: seconds until it notices; null if it does not
- `stop`: SIGTERM: `exit` or `signal`, lines, and whether it `waits_for_requests` first
- `exchanges`: `request` (`method`, `path`, `json` it must have, `needs` keys, model `loaded` or not), `status`, `headers`,
  `body`, `effect` on what is loaded; for generated text `chunks` (`headers`, `begin`, `each`, `last`, `usage`, `done`)
- `not_found`: the answer to everything else

A model is whole, for a stand-in, if its file, or the largest one in its folder, ends in `whole` and a line feed.

In bodies `"=name"` stands for a value: `model`, `alias`, `text`, `created`, `id`, `finish`, `prompt_tokens`, `completion_tokens`,
`total_tokens`, `loaded`, `embeddings` (a list of objects); in texts `{name}` does.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("recordings")
SERVER = Path(__file__).with_name("_replay_server.py")
FORMAT = 1
# The parts that must name their source.
SOURCED = ("program", "key", "questions", "command", "address", "model", "loading", "hangup", "stop", "exchanges", "not_found")


def names() -> list[str]:
    """The recordings there are, e.g. `mlc-llm-78b6cdb`."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load(name: str) -> dict[str, Any]:
    """The recording of that name, or at that path.  ValueError if it is of another format or a part names no source."""
    path = Path(name) if os.sep in name else FOLDER / f"{name}.json"
    recording: dict[str, Any] = json.loads(path.read_text("utf-8"))
    if recording.get("format") != FORMAT:
        raise ValueError(f"{path.name}: its format is {recording.get('format')!r}, this version reads {FORMAT}")
    for where, part in _parts(recording):
        source = part.get("source")
        if not isinstance(source, dict) or source.get("kind") not in ("run", "read") or not source.get("where"):
            raise ValueError(f"{path.name}: {where} does not say where it is from")
    return recording


def _parts(recording: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for key in SOURCED:
        part = recording.get(key)
        for number, entry in enumerate(part if isinstance(part, list) else [part] if part else []):
            yield (f"{key} {number}" if isinstance(part, list) else key), entry


def install(name: str, folder: Path) -> dict[str, str]:
    """Makes the stand-in of a recording in `folder`, which must exist.

    Returns what the adapter's table of the configuration needs to find it: `path`, or `python`.
    """
    recording, path = load(name), FOLDER / f"{name}.json"
    program = recording["program"]
    if program["form"] == "module":
        return {"python": _environment(folder, program, path)}
    target = folder / program["name"]
    run = shlex.join([sys.executable, "-I", "-S", str(SERVER), str(path)])
    # An APE file is also a shell script: its magic begins an assignment that ends after the binary header.
    begin = "MZqFpD='\n'\n" if program["form"] == "ape" else "#!/bin/sh\n"
    target.write_text(f'{begin}REPLAY_PROGRAM="$0" exec {run} "$@"\n')
    target.chmod(0o755)
    return {"path": str(target)}


@contextlib.contextmanager
def serve(name: str, port: int = 0) -> Iterator[str]:
    """Runs a recorded server that daemons find running; its address, `http://127.0.0.1:PORT`.  Ended at the end."""
    where = load(name)["address"]["env"]
    lead = load(name)["command"]["lead"]
    server = subprocess.Popen(
        [sys.executable, "-I", "-S", str(SERVER), str(FOLDER / f"{name}.json"), *lead],
        env={**os.environ, where: f"127.0.0.1:{port}"}, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stderr is not None
        found = next((m for line in server.stderr if (m := re.search(r"127\.0\.0\.1:(\d+)", line))), None)
        if found is None:
            raise RuntimeError(f"the recorded {name} ended with {server.wait()}")
        yield f"http://127.0.0.1:{found[1]}"
    finally:
        server.kill()
        server.wait()
        assert server.stderr is not None
        server.stderr.close()


def _environment(folder: Path, program: dict[str, Any], recording: Path) -> str:
    """A virtual environment with one package in it, whose module is the stand-in; the path of its Python."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    package, _, module = program["module"].partition(".")
    (site / package).mkdir(parents=True)
    (folder / "bin").mkdir()
    base = sysconfig.get_config_var("BINDIR") or os.path.dirname(os.path.realpath(sys.executable))
    (folder / "pyvenv.cfg").write_text(f"home = {base}\ninclude-system-site-packages = false\n")
    python = folder / "bin" / "python"
    python.symlink_to(os.path.realpath(sys.executable))
    (site / package / "__init__.py").write_text("")
    run = [sys.executable, "-I", "-S", str(SERVER), str(recording)]
    body = f"import os, sys\nrun = {run!r}\nos.execv(run[0], run + sys.argv[1:])\n"
    (site / package / f"{module or '__main__'}.py").write_text(body)
    info = site / f"{program['distribution'].replace('-', '_')}-{program['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {program['distribution']}\nVersion: {program['version']}\n")
    return str(python)
