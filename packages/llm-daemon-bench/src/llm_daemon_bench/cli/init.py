"""`bench init`: a commented suite out of what is installed here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import click

from llm_daemon.cli import link
from llm_daemon.cli.words import clean, subcommand
from llm_daemon.config import Settings
from llm_daemon.engines.base import Location
from llm_daemon.engines.registry import Registry

from .. import ready
from ..errors import SuiteError

HEAD = """\
# What to measure: every [[server]] x [[model]] x quantization (a target) runs every [[case]].
#   llm-daemon bench run {name}        llm-daemon bench show
# Paths are relative to this file.  Keys that are not known are refused, so a typing error does no harm.

[suite]
name = "my-desk"
trials = 6                 # of each case in one launch; 6 is the least for a 95 % interval of a median
launches = 3               # fresh server processes: memory layout and clock differ from one to the next
interleave = "round"       # each round visits the targets in a fresh random order; "none": as they stand here
warmup = 1                 # of each case, in each launch, with another text
# max_minutes = 60         # stop after that long; `--resume` goes on
# seed = 7                 # makes the random order the same each time
# page_cache = "drop"      # forget the model file before each launch: a cold start from the disk
"""
ENGINE = """
[[server]]
id = "{id}"
engine = "{engine}"{pad}# as llm-daemon would start it ({origin})
context = 4096
"""
VIA = """
[[server]]                 # the same engine through the daemon: the difference is what the daemon costs
id = "daemon"
engine = "{engine}"
via = "daemon"
context = 4096
"""
OTHER = """
# Any other server application.  In braces: {artifact} {port} {socket} {host} {threads} {context} {slots} {alias} {gpu_layers}
# [[server]]
# id = "my-server"
# launch = ["my-server", "--model", "{artifact}", "--port", "{port}", "--threads", "{threads}"]
# ready = "/health"        # answers 200 once the model is loaded
# timings = "llamacpp"     # it is a llama.cpp server: exact token counts with each chunk
# [[server]]               # one that runs already, and is left alone
# id = "elsewhere"
# attach = "http://127.0.0.1:8000/v1"
"""
MODEL = """
[[model]]
id = "{id}"
params = "{params}"
# quantization = file, or a name that llm-daemon knows (`llm-daemon models`); several are several targets
artifacts = {{ {quant} = {artifact} }}
"""
CASES = '''
# A case is what you use a model for; a checkpoint is a moment in its reply that you wait for.
# Kinds: event chars tokens lines sentences contains regex code_block_closed python_parses json_path json_complete schema_valid
#        tool_name tool_args_complete stop.   slo_ms: what is fast enough for you.
# when = "first" (the default) or "settled": true, and true from then on to the end.
[[case]]
id = "code-line"
kind = "completion"        # goes on where the prompt ends; "infill" has a `suffix` too
prompt = """
def binary_search(items: list[int], wanted: int) -> int:
    \\"\\"\\"Index of `wanted` in the sorted list `items`, or -1.\\"\\"\\"
    low, high = 0, len(items) - 1
    while low <= high:
"""
max_tokens = 64
cache = "warm"             # the same text was just processed, as in an editor; "cold": never seen; "asis": as it comes
checkpoints = [
  { id = "first_token", event = "first_token", slo_ms = 300 },
  { id = "one_line", lines = 1, slo_ms = 600 },
  { id = "three_lines", lines = 3 } ]

[[case]]
id = "chat-two-turns"
system = "Answer in one short paragraph."
turns = ["What does mmap do?", "And when is it slower than read()?"]
max_tokens = 96
cold_start = true          # also once per launch as a server's very first request
checkpoints = [
  { id = "first_content", event = "first_content", slo_ms = 1000 },
  { id = "sentence", sentences = 1, slo_ms = 2000 },
  { id = "second_turn", turn = 2, event = "first_content" } ]

[[case]]
id = "extract-json"
prompt = "Invoice 17 of 3 May: two lamps, 49.90 EUR each, total 99.80 EUR. Give number and total as JSON."
response_schema = "invoice.schema.json"
max_tokens = 64
cache = "cold"
checkpoints = [
  { id = "open_brace", contains = "{" },
  { id = "total", json_path = "$.total" },
  { id = "valid", schema_valid = true, slo_ms = 4000 } ]
check = { json_path = "$.total", equals = 99.8 }   # was the reply right?  Counted apart from how fast it was
'''
SCHEMA = {
    "type": "object",
    "properties": {"number": {"type": "integer"}, "total": {"type": "number"}},
    "required": ["number", "total"],
    "additionalProperties": False,
}


@subcommand(
    "init",
    """
    llm-daemon bench init
    llm-daemon bench init cases/desk.toml --model llama3-8b
    llm-daemon bench init editor/editor.toml --suite editor    code completion; its texts are put beside it
    """,
)
@click.argument("file", metavar="[FILE]", type=click.Path(path_type=Path), default=Path("bench.toml"))
@click.option("--model", "models", multiple=True, metavar="MODEL", help="Model to measure, by name or path; may be repeated.")
@click.option(
    "--suite", "ready_suite", type=click.Choice(list(ready.names())), help="Cases of a ready suite (`bench list --suites`)."
)
@click.option("--force", is_flag=True, help="Write over a file that is there.")
def command(file: Path, models: tuple[str, ...], ready_suite: str | None, force: bool) -> None:
    """Write a commented suite to start from, out of what is installed here."""
    texts = ready.texts(ready_suite) if ready_suite else {"invoice.schema.json": json.dumps(SCHEMA, indent=2) + "\n"}
    if file.exists() and not force:
        raise SuiteError(f"{file} is there already", hint="name another file, or --force")
    settings = Settings.load()
    cases = ready.cases(ready_suite) if ready_suite else CASES
    for one in models:
        link.resolve(json.loads(model(one)["artifact"]), settings)  # refuses what nobody knows
    text = suite(file.name, settings, models or (settings.default_model,), cases)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        for name, content in texts.items():
            if force or not (file.parent / name).exists():
                (file.parent / name).write_text(content)
    except OSError as e:
        raise SuiteError(f"cannot write {file}: {e.strerror}") from e
    click.echo(clean(f"{file} is there: look through it, then `llm-daemon bench run {file}`"))


def suite(name: str, settings: Settings, models: Sequence[str], cases: str = CASES) -> str:
    """The suite's text, for the engines that run here."""
    registry = Registry(settings.engines)
    found = {n: where for n in registry.names if isinstance(where := registry.locate(n), Location)}
    parts = [HEAD.format(name=name)]
    for engine, where in found.items():
        pad = " " * max(1, 15 - len(engine) - 1)
        parts.append(ENGINE.format(id=engine, engine=engine, pad=pad, origin=where.origin))
    if found:
        parts.append(VIA.format(engine=next(iter(found))))
    parts.append(OTHER)
    if not found and shutil.which("llama-server") is None:
        parts.append("# No engine was found here: `llm-daemon engines` says how to get one.\n")
    places = [model(m) for m in models]
    ids = [place["id"] for place in places]
    parts += [MODEL.format(**{**p, "id": f"{p['id']}-{p['quant']}" if ids.count(p["id"]) > 1 else p["id"]}) for p in places]
    return "".join(parts) + cases


def model(given: str) -> dict[str, str]:
    """The places of MODEL for a name or a path.

    >>> model("smollm2-135m"), model("/m/Phi 3.Q4_K_M.gguf")["id"]
    ({'id': 'smollm2-135m', 'params': '', 'quant': 'default', 'artifact': '"smollm2-135m"'}, 'Phi-3.Q4_K_M')
    """
    base, _, quant = given.partition("@")
    if ("/" in given or given.endswith(".gguf")) and ":" not in given:
        base, quant, given = Path(given).stem, "", str(Path(given).expanduser().absolute())
    slug = "".join(c if c.isalnum() or c in "._-" else "-" for c in base).strip("-._") or "model"
    return {"id": slug, "params": "", "quant": quant or "default", "artifact": json.dumps(given)}
