"""Control framing, specs and settings: small pure parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from llm_daemon import errors
from llm_daemon.config import Settings, effective
from llm_daemon.core import control
from llm_daemon.spec import Wish

words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none()), max_size=5), st.integers(1, 50))
def test_messages_survive_any_cutting(bodies: list[dict[str, object]], size: int) -> None:
    sent = [{"op": "X", **{k: v for k, v in b.items() if k != "op"}} for b in bodies]
    wire = b"".join(map(control.encode, sent))
    decoder = control.Decoder()
    got = [m for i in range(0, len(wire), size) for m in decoder.feed(wire[i : i + size])]
    assert got == sent


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(json_values)
def test_our_few_lines_of_json_agree_with_the_json_module(value: object) -> None:
    line = control.encode({"op": "X", "value": value})
    assert json.loads(line) == {"op": "X", "value": value}
    message = {"op": "X", "value": value}
    assert control.Decoder().feed(json.dumps(message).encode() + b"\n") == [message]


@pytest.mark.parametrize("line", [b"nonsense\n", b"[1]\n", b'{"no":"op"}\n', b'{"op":3}\n', b"\xff\n", b"x" * 70000])
def test_rubbish_on_the_control_socket_is_a_protocol_error(line: bytes) -> None:
    with pytest.raises(errors.RemoteProtocolError):
        control.Decoder().feed(line)


@given(
    st.from_regex(r"[a-z][a-z0-9./:-]{0,20}", fullmatch=True),
    st.none() | st.from_regex(r"[A-Za-z0-9_]{1,8}", fullmatch=True),
    st.none() | st.integers(1, 10**6),
    st.lists(words, max_size=3),
)
def test_a_wish_is_what_its_text_says(model: str, quant: str | None, context: int | None, args: list[str]) -> None:
    wish = Wish.of(model, quant=quant, context=context, args=args)
    assert Wish.parse(str(wish)) == wish
    assert Wish.of(**json.loads(json.dumps(wish.to_wire()))) == wish


@pytest.mark.parametrize(
    "text", ["", "  ", "@Q4", "m?context=0", "m?context=x", "m?parallel=-1", "m?colour=red", "m?gpu_layers=1e3"]
)
def test_a_bad_spec_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(errors.UsageError) as caught:
        Wish.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(errors._KINDS))
def test_errors_keep_kind_and_facts_on_the_wire(name: str) -> None:
    error = errors._KINDS[name]("what", hint="try", code="c", retry_after=3)
    back = errors.from_wire(json.loads(json.dumps(error.to_wire())))
    assert (type(back), back.code, back.message, back.hint, back.data) == (type(error), "c", "what", "try", {"retry_after": 3})


def load(tmp_path: Path, text: str, **environ: str) -> Settings:
    file = tmp_path / "config.toml"
    file.write_text(text)
    return Settings.load(environ, str(file))


def test_settings_come_from_file_then_environment_then_flags_and_say_so(tmp_path: Path) -> None:
    s = load(tmp_path, "ttl = 5\nlinger = 2.5\n[catalog]\nmine = '/x.gguf'\n", LLM_DAEMON_TTL="7", LLM_DAEMON_STATE_DIR="/s")
    assert (s.ttl, s.linger, s.catalog) == (7.0, 2.5, {"mine": "/x.gguf"})
    assert s.origin("ttl") == "environment variable LLM_DAEMON_TTL"
    assert s.origin("linger").endswith("config.toml line 2")
    assert s.origin("port") == "default"
    assert Settings.load({}, str(tmp_path / "none"), {"port": 99, "ttl": None}).port == 99


def test_how_long_newcomers_may_go_first_is_a_setting(tmp_path: Path) -> None:
    assert effective(load(tmp_path, ""))["max_overtake"] == {"value": 10.0, "from": "default"}
    assert load(tmp_path, "", LLM_DAEMON_MAX_OVERTAKE="2.5").max_overtake == 2.5


def test_the_memory_of_all_models_is_a_setting(tmp_path: Path) -> None:
    assert effective(load(tmp_path, ""))["memory_budget"] == {"value": "75%", "from": "default"}
    assert load(tmp_path, "memory_budget = 5000000000\n").memory_budget == "5000000000"
    assert load(tmp_path, "", LLM_DAEMON_MEMORY_BUDGET="1.5 GiB").memory_budget == "1.5 GiB"


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("ttl = 5\nlingr = 3\n", 2, "'linger'"),
        ("ttl = 'soon'\n", 1, "seconds"),
        ("# c\n\nport = 70000\n", 3, "65535"),
        ("port = true\n", 1, "65535"),
        ("max_overtake = -1\n", 1, "seconds"),
        ("host = '0.0.0.0'\n", 1, "loopback"),
        ("auth = 'off'\n", 1, "'none'"),
        ("memory_budget = '8 Gigs'\n", 1, "'8GiB'"),
        ("memory_budget = '150%'\n", 1, "'50%'"),
        ("memory_budget = 0.5\n", 1, "'none'"),
        ("[engines.llama-server]\npath = '/x'\npth = '/y'\n", 3, "'path'"),
        ("[engines.llama-server]\npath = 3\n", 2, "must be a text"),
        ("ttl = \n", 1, "TOML"),
    ],
)
def test_a_bad_setting_is_refused_by_name_and_line(tmp_path: Path, text: str, line: int, word: str) -> None:
    with pytest.raises(errors.UsageError) as caught:
        load(tmp_path, text)
    assert f"line {line}" in str(caught.value)
    assert word in str(caught.value) + caught.value.hint
    assert caught.value.exit_status == 2


@pytest.mark.parametrize("text", ["ttl = 'soon'\n", "ttl = \n"])
def test_what_is_wrong_with_settings_sends_to_no_command_that_stops_there(tmp_path: Path, text: str) -> None:
    with pytest.raises(errors.UsageError) as caught:
        load(tmp_path, text)
    assert caught.value.hint == "correct or remove it: every setting has a default"


@pytest.mark.parametrize(("text", "least"), [("m?context=99999999999999", 1), ("m?gpu_layers=-1", 0)])
def test_a_number_out_of_range_is_told_the_range(text: str, least: int) -> None:
    with pytest.raises(errors.UsageError, match=f"a whole number from {least} to 2147483647, not"):
        Wish.parse(text)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[catalog]\nfine = "x"\n"bad name?" = "x"\n', 3),
        ('\n[catalog]\n\n"" = "x"\n', 4),
        ('[catalog."a@b"]\npath = "/x"\n', 1),
        ("ttl = 3\ncatalog.' a' = \"x\"\n", 2),
        ('[catalog]\n"~/m" = "x"\n', 2),
        ('[catalog]\nx = "y"\n"m.gguf" = "x"\n', 3),
        ('[catalog]\n"x?context=5" = "x"\n', 2),
    ],
)
def test_names_that_nobody_can_ask_for_are_refused(tmp_path: Path, text: str, line: int) -> None:
    with pytest.raises(errors.UsageError, match=rf"config\.toml line {line}: catalog: nobody can ask for") as caught:
        load(tmp_path, text)
    assert "\n" not in caught.value.message and "no ? or @" in caught.value.hint


def test_odd_names_that_can_be_asked_for_stay(tmp_path: Path) -> None:
    names = ["my model", "llama3:8b", "Org/Model", "hf:org/repo", "ü"]
    assert [*load(tmp_path, "[catalog]\n" + "".join(f'"{name}" = "x"\n' for name in names)).catalog] == names


def test_a_misspelt_variable_is_refused_too() -> None:
    with pytest.raises(errors.UsageError, match="LLM_DAEMON_LIGNER"):
        Settings.load({"LLM_DAEMON_LIGNER": "1"}, "/nonexistent")
