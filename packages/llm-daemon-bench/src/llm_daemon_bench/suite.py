"""What is to be measured: a suite file (TOML) as frozen values.

Unknown keys and wrong types are refused with file and line.  Paths are relative to the suite file.  Times in the file carry
their unit in the key (`slo_ms`, `stall_s`, `max_minutes`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import msgspec

from llm_daemon.client.sync import is_path

from .errors import SuiteError
from .records import CaseInfo, CheckpointInfo
from .suite_tables import KINDS, CaseTable, Check, Checkpoint, File, ModelTable, Predicate, ServerTable, SuiteTable, ToolTurn
from .templates import PLACES, TOLD, named
from .toml_lines import line_of


class Case(msgspec.Struct, frozen=True):
    """A case with its files read.  `turns`: what is said, in order; for completion and infill one text."""

    table: CaseTable
    turns: tuple[str | ToolTurn, ...]
    suffix: str = ""
    schema: dict[str, Any] | None = None
    tools: tuple[dict[str, Any], ...] = ()
    checks: tuple[Check, ...] = ()
    python_tests: Mapping[str, str] = {}

    @property
    def id(self) -> str:
        return self.table.id

    @property
    def streams(self) -> int:
        """Requests of one trial: 1, or those of its load."""
        return self.table.requests or self.table.concurrency or 1

    @property
    def parts(self) -> int:
        """Lines of one trial in the results."""
        return self.streams * len(self.turns)

    def info(self) -> CaseInfo:
        t = self.table
        points = tuple(
            CheckpointInfo(id=c.id, kind=c.kind, text=str(c), turn=c.turn, when=c.when, slo_ms=c.slo_ms) for c in t.checkpoints
        )
        return CaseInfo(
            id=t.id, kind=t.kind, cache=t.cache, turns=len(self.turns), cold_start=t.cold_start, streams=self.streams,
            rate=t.rate, checked=bool(self.checks), checkpoints=points,
        )  # fmt: skip


class Target(msgspec.Struct, frozen=True):
    """server x model x quantization.  `artifact`: a path, a name that llm-daemon knows, or "" for an attached server."""

    server: ServerTable
    model: ModelTable
    quant: str
    artifact: str

    @property
    def id(self) -> str:
        return f"{self.server.id}/{self.model.id}/{self.quant}"


class Suite(msgspec.Struct, frozen=True):
    """A whole suite.  `text` and `sha256` are the file's, with the texts of the cases in the hash."""

    path: Path
    text: str
    sha256: str
    table: SuiteTable
    targets: tuple[Target, ...]
    cases: tuple[Case, ...]

    def cases_for(self, target: Target) -> tuple[Case, ...]:
        return tuple(c for c in self.cases if c.table.servers is None or target.server.id in c.table.servers)


def load(path: str | Path) -> Suite:
    """Reads and checks a suite file.  Raises SuiteError with file and line."""
    path = Path(path)
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        hint = "`llm-daemon bench init` writes one to start from"
        raise SuiteError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}", hint=hint) from None
    return parse(text, path)


def parse(text: str, path: Path) -> Suite:
    """`load` for a text; `path` is where it would stand."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise SuiteError(f"{path}: not valid TOML: {e}") from None
    try:
        file = msgspec.convert(data, File)
    except msgspec.ValidationError as e:
        raise _invalid(str(e), text, path) from None
    reading = _Reading(path, text)
    return reading.suite(file)


_KEYS: dict[str, type[msgspec.Struct]] = {
    "suite": SuiteTable, "server": ServerTable, "model": ModelTable, "case": CaseTable, "checkpoints": Checkpoint, "check": Check,
}  # fmt: skip


def _invalid(message: str, text: str, path: Path) -> SuiteError:
    """msgspec's words and `$.case[0].x` as ours, with a line."""
    what, _, where = message.partition(" - at `")
    steps: list[str | int] = [
        int(n) if n else k for k, n in re.findall(r"\.([\w-]+)|\[(\d+|\.\.\.)\]", where.rstrip("`")) if n != "..."
    ]
    if unknown := re.search(r"contains unknown field `(.*)`", what):
        key = unknown[1]
        table = next((_KEYS[s] for s in reversed(steps) if isinstance(s, str) and s in _KEYS), File)
        known = table.__struct_fields__
        near = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else "keys are " + ", ".join(known)
        return SuiteError(f"{path} line {line_of(text, [*steps, key])}: unknown key {key!r}", hint=hint)
    if missing := re.search(r"missing required field `(.*)`", what):
        return SuiteError(f"{path} line {line_of(text, steps)}: {_named(steps)} has no {missing[1]!r}")
    place = f"{path} line {line_of(text, steps)}: {_named(steps)}"
    if wrong := re.match(r"Invalid enum value '(.*)'", what):
        return SuiteError(f"{place} cannot be {wrong[1]!r}", hint=_choices(steps, wrong[1]))
    return SuiteError(f"{place}: {what[:1].lower() + what[1:]}")


def _choices(steps: list[str | int], given: str) -> str:
    """What may stand in a key that takes one of a few words."""
    table = next((_KEYS[s] for s in reversed(steps[:-1]) if isinstance(s, str) and s in _KEYS), File)
    kind = get_type_hints(table).get(str(steps[-1]))
    known = [str(word) for part in (kind, *get_args(kind)) if get_origin(part) is Literal for word in get_args(part)]
    near = difflib.get_close_matches(given, known, 1)
    return f"did you mean {near[0]!r}?" if near else "it is one of " + ", ".join(known)


def _named(steps: list[str | int]) -> str:
    return ".".join(str(s) for s in steps if isinstance(s, str)) or "the file"


class _Reading:
    """Files beside the suite, and what must hold between its parts."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text = path, text
        self.hash = hashlib.sha256(text.encode())

    def bad(self, message: str, *steps: str | int, hint: str = "") -> SuiteError:
        return SuiteError(f"{self.path} line {line_of(self.text, steps)}: {message}", hint=hint)

    def suite(self, file: File) -> Suite:
        for name, tables in (("server", file.server), ("model", file.model), ("case", file.case)):
            self.distinct(name, [t.id for t in tables])
        for i, server in enumerate(file.server):
            self.server(i, server, [m.id for m in file.model])
        cases = tuple(self.case(i, case, file) for i, case in enumerate(file.case))
        targets = tuple(t for server in file.server for t in self.targets(server, file.model))
        if not targets:
            raise self.bad("no target: no server has a model to run", "server", 0, hint="[[model]] needs artifacts")
        return Suite(self.path, self.text, self.hash.hexdigest(), file.suite, targets, cases)

    def distinct(self, name: str, ids: list[str]) -> None:
        for i, one in enumerate(ids):
            if one in ids[:i]:
                raise self.bad(f"two of [[{name}]] have the id {one!r}", name, i, "id")

    def server(self, i: int, server: ServerTable, models: list[str]) -> None:
        given = [k for k in ("launch", "attach", "engine") if getattr(server, k) is not None]
        if len(given) != 1:
            raise self.bad(f"server {server.id!r} needs exactly one of launch, attach and engine", "server", i)
        if server.attach is not None and not _is_http(server.attach):
            raise self.bad(f"attach must be http://HOST:PORT, not {server.attach!r}", "server", i, "attach")
        if server.via == "daemon" and server.engine is None:
            raise self.bad('via = "daemon" needs engine', "server", i, "via", hint="`llm-daemon engines` lists them")
        self.template(i, "version", server.version or (), TOLD)
        if server.launch is not None and not self.template(i, "launch", server.launch, PLACES) & {"port", "socket"}:
            raise self.bad("launch names neither {port} nor {socket}", "server", i, "launch")
        for name in server.models or ():
            if name not in models:
                raise self.bad(f"no [[model]] {name!r}", "server", i, "models")

    def template(self, i: int, key: str, argv: tuple[str, ...], known: tuple[str, ...]) -> set[str]:
        """The names in braces in a command of server `i`."""
        found: set[str] = set()
        for n, part in enumerate(argv):
            try:
                found |= named(part, known)
            except ValueError as e:
                hint = "known are " + ", ".join(known) + "; write {{ and }} for braces"
                raise self.bad(f"{e} in {key}", "server", i, key, n, hint=hint) from None
        return found

    def targets(self, server: ServerTable, models: tuple[ModelTable, ...]) -> list[Target]:
        out = []
        for model in models:
            if server.models is not None and model.id not in server.models:
                continue
            pairs = model.artifacts or ({"as-served": ""} if server.attach else {})
            for quant, artifact in pairs.items():
                if server.quants is None or quant in server.quants:
                    out.append(Target(server, model, quant, self.artifact(artifact)))
        if not models and server.attach:
            out.append(Target(server, ModelTable(id="served"), "as-served", ""))
        return out

    def artifact(self, text: str) -> str:
        if not text or not (is_path(text) or ("/" in text and ":" not in text)):
            return text
        return str(self.beside(text))

    def beside(self, name: str) -> Path:
        return (self.path.parent / Path(name).expanduser()).absolute()

    def case(self, i: int, case: CaseTable, file: File) -> Case:
        where = ("case", i)
        for name in case.servers or ():
            if name not in [s.id for s in file.server]:
                raise self.bad(f"no [[server]] {name!r}", *where, "servers")
        turns = self.turns(case, where)
        suffix = case.suffix or (self.read(case.suffix_file, *where, "suffix_file") if case.suffix_file else "")
        schema = self.json(case.response_schema, dict, *where, "response_schema") if case.response_schema else None
        if schema is not None:
            self.schema(case.response_schema or "", schema, where)
        try:
            json.dumps(case.body)
        except (TypeError, ValueError) as e:
            raise self.bad(f"body: {e}", *where, "body") from None
        tools = self.json(case.tools, list, *where, "tools") if case.tools else ()
        checks = case.check if isinstance(case.check, tuple) else (case.check,)
        self.load_of(case, turns, where)
        self.distinct_points(case, where)
        for n, point in enumerate(case.checkpoints):
            self.predicate(point, case, *where, "checkpoints", n)
            if point.turn > len(turns):
                raise self.bad(f"checkpoint {point.id!r}: there is no turn {point.turn}", *where, "checkpoints", n, "turn")
        tests = {}
        for n, check in enumerate(checks):
            self.predicate(check, case, *where, "check", *((n,) if isinstance(case.check, tuple) else ()))
            if check.event is not None:
                raise self.bad("an event is no check: it says nothing of the text", *where, "check")
            if check.python_test:
                if not file.suite.python_tests:
                    raise self.bad(
                        "python_test runs code from replies", *where, "check",
                        hint="allow it with python_tests = true in [suite]; it runs under limits, not in a prison",
                    )  # fmt: skip
                tests[check.python_test] = self.read(check.python_test, *where, "check")
        return Case(case, turns, suffix, schema, tuple(tools), checks, tests)

    def schema(self, name: str, schema: dict[str, Any], where: tuple[str, int]) -> None:
        from jsonschema import validators
        from jsonschema.exceptions import SchemaError

        try:
            validators.validator_for(schema).check_schema(schema)
        except SchemaError as e:
            raise self.bad(f"{name} is no JSON schema: {e.message}", *where, "response_schema") from None

    def turns(self, case: CaseTable, where: tuple[str, int]) -> tuple[str | ToolTurn, ...]:
        given = [k for k in ("prompt", "prompt_file", "turns") if getattr(case, k) not in (None, ())]
        if len(given) != 1:
            raise self.bad(f"case {case.id!r} needs exactly one of prompt, prompt_file and turns", *where)
        if case.kind != "chat":
            for key in ("turns", "system", "tools", "response_schema"):
                if getattr(case, key) not in (None, ()):
                    raise self.bad(f"{key} goes with kind = 'chat' only", *where, key)
        if case.kind != "infill" and (case.suffix or case.suffix_file):
            raise self.bad("suffix goes with kind = 'infill' only", *where, "suffix")
        if case.turns:
            if isinstance(case.turns[0], ToolTurn):
                raise self.bad("the first turn must be a text", *where, "turns", 0)
            return case.turns
        text = case.prompt if case.prompt is not None else self.read(case.prompt_file or "", *where, "prompt_file")
        return (text,)

    def load_of(self, case: CaseTable, turns: tuple[Any, ...], where: tuple[str, int]) -> None:
        if case.concurrency and case.rate:
            raise self.bad("concurrency and rate exclude each other", *where, "rate")
        if case.requests and not (case.concurrency or case.rate):
            raise self.bad("requests goes with concurrency or rate", *where, "requests")
        if case.rate and not case.requests:
            raise self.bad("rate needs requests: how many in all", *where, "rate")
        if (case.concurrency or case.rate) and len(turns) > 1:
            raise self.bad("a load has one turn", *where, "turns")
        if case.nonce is not None and "{nonce}" not in case.nonce:
            raise self.bad("nonce must have {nonce} in it", *where, "nonce")

    def distinct_points(self, case: CaseTable, where: tuple[str, int]) -> None:
        ids = [c.id for c in case.checkpoints]
        for n, one in enumerate(ids):
            if one in ids[:n]:
                raise self.bad(f"two checkpoints have the id {one!r}", *where, "checkpoints", n, "id")

    def predicate(self, p: Predicate, case: CaseTable, *where: str | int) -> None:
        given = [k for k in KINDS if getattr(p, k, None) is not None]
        if len(given) != 1:
            what = " and ".join(given) if given else "nothing"
            raise self.bad(f"one kind of checkpoint each, here is {what}", *where, hint="kinds are " + ", ".join(KINDS))
        if p.value is False:
            raise self.bad(f"{p.kind} can only be true", *where, p.kind, hint="leave it out instead")
        if p.regex is not None:
            try:
                re.compile(p.regex)
            except re.error as e:
                raise self.bad(f"regex {p.regex!r}: {e}", *where, "regex") from None
        if p.json_path is not None:
            from .partial_json import steps

            try:
                steps(p.json_path)
            except ValueError as e:
                raise self.bad(str(e), *where, "json_path") from None
        elif p.equals is not None:
            raise self.bad("equals goes with json_path", *where, "equals")
        if p.schema_valid and not case.response_schema:
            raise self.bad("schema_valid needs response_schema in the case", *where)

    def read(self, name: str, *where: str | int) -> str:
        try:
            text = self.beside(name).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise self.bad(f"cannot read {name}: {getattr(e, 'strerror', None) or e}", *where) from None
        self.hash.update(b"\0" + name.encode() + b"\0" + text.encode())
        return text

    def json(self, name: str, kind: type, *where: str | int) -> Any:
        try:
            found = msgspec.json.decode(self.read(name, *where))
        except msgspec.MsgspecError as e:
            raise self.bad(f"{name}: {e}", *where) from None
        if not isinstance(found, kind):
            raise self.bad(f"{name}: must hold a JSON {'object' if kind is dict else 'array'}", *where)
        return found


def _is_http(address: str) -> bool:
    """Whether it is one that we can speak to: http, for a key must not go out in the clear where https was meant.

    >>> _is_http("http://127.0.0.1:8080/v1"), _is_http("https://host/v1"), _is_http("http://h:99999")
    (True, False, False)
    """
    try:
        place = urlsplit(address)
        return place.scheme == "http" and bool(place.hostname) and place.port != 0
    except ValueError:
        return False
