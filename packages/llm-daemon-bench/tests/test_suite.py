"""Suite files: what is wrong is told with file and line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llm_daemon_bench import servers, suite as suites
from llm_daemon_bench.artifacts import Weights
from llm_daemon_bench.errors import SuiteError
from llm_daemon_bench.toml_lines import line_of

GOOD = """\
[suite]
name = "desk"
trials = 6
[[server]]
id = "one"
launch = ["server", "-m", "{artifact}", "--port", "{port}"]
[[server]]
id = "two"
engine = "xllamacpp"
via = "daemon"
[[model]]
id = "small"
params = "1B"
artifacts = { Q4_K_M = "models/small.gguf", Q8_0 = "smollm2-135m" }
[[case]]
id = "chat"
system = "Be brief."
turns = ["a", "b"]
checkpoints = [
  { id = "t2", turn = 2, event = "first_content", slo_ms = 500 },
  { id = "dot", sentences = 1, when = "settled" } ]
[[case]]
id = "code"
kind = "completion"
prompt_file = "code.py"
cache = "warm"
checkpoints = [ { id = "line", lines = 1 } ]
check = [ { regex = 'return\\s' }, { python_parses = true } ]
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "code.py").write_text("def f():\n")
    return tmp_path / "suite.toml"


def test_a_suite_is_read(code: Path) -> None:
    found = suites.parse(GOOD, code)
    assert [t.id for t in found.targets] == ["one/small/Q4_K_M", "one/small/Q8_0", "two/small/Q4_K_M", "two/small/Q8_0"]
    assert found.targets[0].artifact == str(code.parent / "models" / "small.gguf")
    assert found.targets[1].artifact == "smollm2-135m"
    chat, line = found.cases
    assert (chat.turns, chat.table.system, chat.parts) == (("a", "b"), "Be brief.", 2)
    assert (line.turns, len(line.checks), line.table.cache) == (("def f():\n",), 2, "warm")
    point = chat.info().checkpoints[0]
    assert (point.text, point.slo_ms, point.turn) == ("event 'first_content'", 500, 2)


def test_the_hash_covers_the_files_of_the_cases(code: Path) -> None:
    before = suites.parse(GOOD, code).sha256
    assert suites.parse(GOOD, code).sha256 == before
    (code.parent / "code.py").write_text("def g():\n")
    assert suites.parse(GOOD, code).sha256 != before


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("trials = 6", "trails = 6", 3, "unknown key 'trails'"),
        ("trials = 6", "trials = 0", 3, "suite.trials"),
        ("trials = 6", 'trials = "6"', 3, "suite.trials"),
        ('via = "daemon"', 'via = "deamon"', 10, "server.via cannot be 'deamon'"),
        ('params = "1B"', "sizes = 1", 13, "unknown key 'sizes'"),
        ("slo_ms = 500", "slo = 500", 20, "unknown key 'slo'"),
        ("sentences = 1,", "sentences = 1, lines = 2,", 21, "here is lines and sentences"),
        ("sentences = 1,", "", 21, "here is nothing"),
        ("turn = 2,", "turn = 3,", 20, "there is no turn 3"),
        ('id = "dot"', 'id = "t2"', 21, "two checkpoints"),
        ('id = "two"', 'id = "one"', 8, "two of [[server]]"),
        ('engine = "xllamacpp"\n', "", 7, "exactly one of launch, attach and engine"),
        ('"{port}"', '"{prot}"', 6, "unknown {prot}"),
        ('"{port}"', '"80"', 6, "neither {port} nor {socket}"),
        ('"{port}"', '"{{port}}"', 6, "neither {port} nor {socket}"),
        ('"{port}"', "'{\"port\": {port}}'", 6, 'unknown {"port": ...} in launch'),
        ('"{port}"', '"{port"', 6, "expected '}' before end of string in launch"),
        ('"{port}"', '"{port}}"', 6, "single '}' encountered"),
        ('"{port}"', '"{port:d}"', 6, "{port} takes neither : nor !"),
        ('"{port}"', '"{port!r}"', 6, "{port} takes neither : nor !"),
        ('"{port}"', '"{port}", "{}"', 6, "unknown {} in launch"),
        ('"--port", "{port}"]', '"--port", "{port}",\n  "{port.real}"]', 7, "unknown {port.real} in launch"),
        ('"{port}"]', '"{port}"]\nversion = ["x", "{port}"]', 7, "unknown {port} in version"),
        ('"{port}"]', '"{port}"]\nversion = ["x", "}"]', 7, "in version"),
        ('"code.py"', '"nowhere.py"', 25, "cannot read nowhere.py"),
        (r"'return\s'", "'ret('", 28, "regex 'ret('"),
        ("python_parses = true", "python_parses = false", 28, "can only be true"),
        ("python_parses = true", 'json_path = "x.y"', 28, "must begin with $"),
        ("python_parses = true", "schema_valid = true", 28, "needs response_schema"),
        ("python_parses = true", 'python_test = "t.py"', 28, "runs code from replies"),
        ('kind = "completion"', 'kind = "completion"\nsystem = "x"', 25, "system goes with kind = 'chat'"),
        ('cache = "warm"', 'cache = "warm"\nrate = 2.0', 27, "rate needs requests"),
        ('cache = "warm"', 'cache = "warm"\nnonce = "x"', 27, "{nonce}"),
        ('[suite]\nname = "desk"', "[suite]", 1, "suite has no 'name'"),
        ("trials = 6", "trials = ", 3, "not valid TOML"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(code: Path, old: str, new: str, line: int, words: str) -> None:
    assert old in GOOD
    with pytest.raises(SuiteError) as caught:
        suites.parse(GOOD.replace(old, new, 1), code)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert str(code) in message
    assert re.search(rf"line {line}\b", message), message


def test_braces_may_be_written(code: Path) -> None:
    text = GOOD.replace('"{port}"]', """'{{"port": {port}}}']\nversion = ["echo", "{{}}{artifact}"]""")
    weights, target = Weights("w.gguf"), suites.parse(text, code).targets[0]
    argv, _, endpoint, _ = servers.command(target, weights, "folder", {})
    assert servers.version(target, weights) == "{}w.gguf"
    assert argv[-1] == f'{{"port": {endpoint.port}}}' and endpoint.socket is None
    braces = suites.parse(GOOD.replace('"{port}"]', '"{port}", "{{socket}}"]'), code).targets[0]
    argv, _, endpoint, _ = servers.command(braces, weights, "folder", {})
    assert argv[-1] == "{socket}" and endpoint.socket is None


def test_a_near_key_is_offered(code: Path) -> None:
    with pytest.raises(SuiteError) as caught:
        suites.parse(GOOD.replace("slo_ms", "slo_m"), code)
    assert caught.value.hint == "did you mean 'slo_ms'?"


@pytest.mark.parametrize(
    ("old", "new", "hint"),
    [
        ('"first_content"', '"frist_token"', "did you mean 'first_token'?"),
        ('"settled"', '"x"', "it is one of first, settled"),
        ("trials = 6", 'up = "al"', "did you mean 'all'?"),
        ('cache = "warm"', 'cache = "hot"', "it is one of cold, warm, asis"),
        ("python_parses = true", 'event = "frist_token"', "did you mean 'first_token'?"),
    ],
)
def test_a_near_word_or_all_of_them_are_offered(code: Path, old: str, new: str, hint: str) -> None:
    with pytest.raises(SuiteError) as caught:
        suites.parse(GOOD.replace(old, new), code)
    assert caught.value.hint == hint


def test_no_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="cannot read") as caught:
        suites.load(tmp_path / "none.toml")
    assert "init" in caught.value.hint


def test_lines_of_strings_and_comments_do_not_confuse() -> None:
    text = '[[case]]\n# checkpoints = [ { a = 1 } ]\ncheckpoints = [\n  { id = "} , {" }, # {\n  { id = "x" } ]\n'
    assert line_of(text, ["case", 0, "checkpoints", 1, "id"]) == 5
    assert line_of(text, ["case", 0, "nothing"]) == 1
    assert line_of(text, []) == 1
