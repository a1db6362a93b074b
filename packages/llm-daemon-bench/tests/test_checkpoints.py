"""Each kind of checkpoint on replies whose right answer is known."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from llm_daemon_bench import suite as suites
from llm_daemon_bench.checkpoints import Call, Piece, View, Watch, evaluate, judge
from llm_daemon_bench.errors import SuiteError
from llm_daemon_bench.records import Reached
from llm_daemon_bench.suite import Case

SCHEMA = {"type": "object", "properties": {"total": {"type": "number"}}, "required": ["total"]}
HEAD = """
[suite]
name = "x"
python_tests = true
[[server]]
id = "s"
attach = "http://127.0.0.1:1"
[[case]]
id = "c"
"""


def case(tmp_path: Path, body: str) -> Case:
    (tmp_path / "schema.json").write_bytes(msgspec.json.encode(SCHEMA))
    return suites.parse(HEAD + body, tmp_path / "suite.toml").cases[0]


def pieces(*texts: str, finish: str = "stop") -> list[Piece]:
    """One piece each 10 ms from 10 ms on, one token each; then the end, 1 ms later."""
    out = [Piece(10.0 * (i + 1), text=text, tok=i + 1) for i, text in enumerate(texts)]
    return [*out, Piece(out[-1].ms + 1 if out else 1.0, tok=len(texts), finish=finish)]


@pytest.mark.parametrize(
    ("point", "texts", "ms"),
    [
        ("chars = 4", ["ab", "cd", "ef"], 20.0),
        ("chars = 7", ["ab", "cd", "ef"], None),
        ("tokens = 3", ["a", "b", "c"], 30.0),
        ("lines = 1", ["a", "b\n", "c"], 20.0),
        ("lines = 1", ["\n", "\n", "c", "\n"], 40.0),
        ("lines = 2", ["a\n", "b"], 21.0),  # the last line is whole when the reply ends
        ("sentences = 1", ["It is 3", ".", "5.", " Yes"], 40.0),
        ("sentences = 1", ["Done", "."], 21.0),
        ('contains = "bc"', ["ab", "cd"], 20.0),
        ("regex = '\\d+%'", ["at 1", "0", "%"], 30.0),
        ("code_block_closed = true", ["```py\n", "x\n", "``", "`\n"], 40.0),
        ("python_parses = true", ["```py\n", "if x:", "\n", " y\n", "```"], 40.0),
        ("python_parses = true", ["no code here,", " but words"], None),
        ('json_path = "$.a[1]"', ['{"a": [1,', " 2", ", 3", "]}"], 30.0),
        ('json_path = "$.a"\nequals = 2'.replace("\n", ", "), ['{"a": 1}'], None),
        ("json_complete = true", ['{"a"', ": 1}", " done"], 20.0),
        ("schema_valid = true", ['{"total": ', "2}"], 20.0),
        ("schema_valid = true", ['{"sum": ', "2}"], None),
        ("stop = true", ["a", "b"], 21.0),
        ('stop = "length"', ["a", "b"], None),
    ],
)
def test_when_each_kind_is_reached(tmp_path: Path, point: str, texts: list[str], ms: float | None) -> None:
    body = 'prompt = "p"\nresponse_schema = "schema.json"\ncheckpoints = [ { id = "x", ' + point + " } ]"
    found, _ = evaluate(case(tmp_path, body), 1, pieces(*texts), {}, 99.0, True)
    assert found["x"].ms == ms
    assert found["x"].censored_ms == (99.0 if ms is None else None)


def test_first_and_settled_differ_when_a_reply_changes_its_mind(tmp_path: Path) -> None:
    body = (
        'prompt = "p"\ncheckpoints = [ { id = "first", regex = "blue$" }, { id = "settled", regex = "blue$", when = "settled" },'
        ' { id = "lost", regex = "red$", when = "settled" } ]'
    )
    found, _ = evaluate(case(tmp_path, body), 1, pieces("blue", " or red", ", no: blue"), {}, 50.0, True)
    assert found == {
        "first": Reached(ms=10.0, tok=1), "settled": Reached(ms=30.0, tok=3), "lost": Reached(ms=None, censored_ms=50.0),
    }  # fmt: skip


def test_events_are_taken_from_the_stream(tmp_path: Path) -> None:
    body = 'prompt = "p"\ncheckpoints = [ { id = "a", event = "first_content" }, { id = "b", event = "done" } ]'
    found, _ = evaluate(case(tmp_path, body), 1, pieces("x", "y"), {"first_content": 20.0}, 30.0, False)
    assert found == {"a": Reached(ms=20.0, tok=2), "b": Reached(ms=None, censored_ms=30.0)}


def test_checkpoints_of_another_turn_are_left_to_it(tmp_path: Path) -> None:
    body = 'turns = ["p", "q"]\ncheckpoints = [ { id = "a", chars = 1 }, { id = "b", turn = 2, chars = 1 } ]'
    one = case(tmp_path, body)
    assert [list(evaluate(one, turn, pieces("x"), {}, 1.0, True)[0]) for turn in (1, 2)] == [["a"], ["b"]]


def test_tool_calls_grow_in_pieces(tmp_path: Path) -> None:
    body = 'prompt = "p"\ncheckpoints = [ { id = "name", tool_name = "find" }, { id = "args", tool_args_complete = true } ]'
    parts = [("", "{"), ("", '"q": 1'), ("", "}")]
    said = [Piece(5.0, calls=((0, Call("find", "", "id1")),))]
    said += [Piece(10.0 * i, calls=((0, Call(name, args)),)) for i, (name, args) in enumerate(parts, 1)]
    found, view = evaluate(case(tmp_path, body), 1, said, {}, 40.0, True)
    assert (found["name"].ms, found["args"].ms) == (5.0, 30.0)
    assert view.calls == {0: Call("find", '{"q": 1}', "id1")}


def test_completed_code_is_judged_with_what_stands_around_it(tmp_path: Path) -> None:
    body = 'kind = "infill"\nprompt = "def f(x):\\n    return "\nsuffix = "\\n\\nf(1)\\n"\n'
    body += 'checkpoints = [ { id = "ok", python_parses = true } ]'
    found, view = evaluate(case(tmp_path, body), 1, pieces("x", " +", " 1"), {}, 99.0, True)
    assert found["ok"].ms == 31.0
    assert view.code() == "def f(x):\n    return x + 1\n\nf(1)\n"


def test_an_early_stop_waits_for_all_but_not_for_more(tmp_path: Path) -> None:
    one = case(tmp_path, 'prompt = "p"\ncheckpoints = [ { id = "a", contains = "x" }, { id = "b", event = "first_content" } ]')
    watch = Watch(one, 1)
    assert [watch.take(p) for p in pieces("a", "x", "b")[:3]] == [False, True, True]
    settled = Watch(case(tmp_path, 'prompt = "p"\ncheckpoints = [ { id = "a", contains = "x", when = "settled" } ]'), 1)
    assert not any(settled.take(p) for p in pieces("a", "x", "b"))


@pytest.mark.parametrize(
    ("check", "text", "why"),
    [
        ('{ contains = "14 March" }', "on 14 March.", None),
        ('{ contains = "14 March" }', "on 15 March.", "not so: contains '14 March'"),
        ('[ { lines = 2 }, { regex = "^b" } ]', "a\nb", "not so: regex '^b'"),
        ('{ python_test = "t.py" }', "```python\ndef f():\n    return 4\n```", None),
        ('{ python_test = "t.py" }', "def f():\n    return 5\n", "python_test: AssertionError"),
        ('{ python_test = "t.py" }', "def f(:\n", "python_test: SyntaxError"),
    ],
)
def test_the_final_text_is_right_or_not(tmp_path: Path, check: str, text: str, why: str | None) -> None:
    (tmp_path / "t.py").write_text("from solution import f\nassert f() == 4\n")
    one = case(tmp_path, f'prompt = "p"\ncheck = {check}')
    found = judge(one, View(text=text, final=True))
    assert found is not None
    assert found.passed == (why is None)
    assert found.why.startswith(why or "")


def test_no_check_is_no_verdict(tmp_path: Path) -> None:
    assert judge(case(tmp_path, 'prompt = "p"'), View(text="x", final=True)) is None


def test_code_that_never_ends_or_takes_all_memory_fails_and_leaves_nothing(tmp_path: Path) -> None:
    from llm_daemon_bench.sandbox import run_test

    assert run_test("while True: pass", "import solution", seconds=0.5) == "python_test: not done after 0.5 s"
    assert run_test("x = bytearray(4 << 30)", "import solution") == "python_test: MemoryError"
    assert run_test("import os; os._exit(3)", "import solution") == "python_test: exit status 3"


def test_a_reply_that_broke_off_settles_nothing(tmp_path: Path) -> None:
    body = 'prompt = "x"\ncheckpoints = [{ id = "a", contains = "blue", when = "settled" }, { id = "b", contains = "blue" }]\n'
    found, _ = evaluate(case(tmp_path, body), 1, pieces("blue"), {}, 50.0, False)
    assert found["a"] == Reached(ms=None, censored_ms=50.0)
    assert found["b"].ms == 10.0


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('check = { event = "done" }', "says nothing of the text"),
        ("body = { day = 2020-01-01 }", "body: Object of type date"),
        ('response_schema = "odd.json"', "is no JSON schema"),
    ],
)
def test_what_would_fail_in_the_middle_is_refused_at_once(tmp_path: Path, body: str, words: str) -> None:
    (tmp_path / "odd.json").write_text('{"type": 5}')
    with pytest.raises(SuiteError, match=words):
        case(tmp_path, f'prompt = "x"\ncheckpoints = [{{ id = "a", chars = 1 }}]\n{body}\n')
