"""What no client may make an engine do: the fields that have hurt engines, and what they would fetch for anybody."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from llm_daemon.core import firewall
from llm_daemon.core.openai import read_form, read_wanted
from llm_daemon.errors import UsageError

NEAR = "data:image/png;base64,iVBORw0KGgo="


def code(body: bytes | dict[str, Any], remote_media: bool = False) -> str:
    """The code it is refused with, empty if it passes."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        firewall.check(read_wanted(raw), raw, remote_media)
    except UsageError as e:
        return e.code
    return ""


def chat(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("n_discard", [0, 1, 2**31 - 1, None], [-1, -(2**40), 2**31, "-1", True, [], {}]),
        ("id_slot", [-1, None], [0, 1, -2, "0", 0.5, True]),
        ("n", [0, 1, 16, None, 2.0], [17, -1, 10**300, "2", True, False]),
        ("n_cmpl", [1, None], [17, -1]),
        ("n_probs", [0, 100, None, False], [101, -1, True]),
        ("top_logprobs", [0, 5, None], [101, -5, "9"]),
    ],
)
def test_numbers_have_bounds(field: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert code({"model": "m", field: value}) == "", value
    for value in bad:
        assert code({"model": "m", field: value}) == "refused_parameter", value


def test_the_refusal_names_the_field_and_its_bound() -> None:
    body = b'{"n": 99}'
    with pytest.raises(UsageError, match=r"^n must be a number from 0 to 16, not 99$"):
        firewall.check(read_wanted(body), body)


@pytest.mark.parametrize(
    "body",
    [b'{"n_discard":1,"n_discard":-1}', b'{"n\\u005fdiscard":-1}', b'{"n_discard" : -1.0e0}', b'{"model":"m","n_discard":-0.5}'],
)
def test_the_engine_reads_the_last_of_two_and_escaped_keys(body: bytes) -> None:
    assert code(body) == "refused_parameter"


@pytest.mark.parametrize(
    "body",
    [
        b'{"n":1e400}', b'{"n_discard":NaN}', b'{"n_discard":-Infinity}', b'{"grammar":"\xff"}', b'{"grammar":"\\ud800"}',
        b'{"x":"image \xff"}', b'{"\xff":"image"}', b'{"image":1e999}', b'\xef\xbb\xbf{"n":-1}',
        b'{"x":' + b"[" * 5000 + b'"image"' + b"]" * 5000 + b"}",
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_bad_json_and_never_a_bug(body: bytes) -> None:
    assert code(body) == "bad_json"


def form_code(*parts: bytes) -> str:
    """The code that a form with these parts, heads and values, is refused with; empty if it passes."""
    body = b"".join(b"--x\r\nContent-Disposition: form-data; %b\r\n" % part for part in parts) + b"--x--\r\n"
    try:
        firewall.check_form(read_form(body, b"multipart/form-data; boundary=x")[1])
    except UsageError as e:
        return e.code
    return ""


DEEP = b"[" * 100


@pytest.mark.parametrize(
    "part",
    [
        b'name="n_discard"\r\n\r\n-1', b'name="n_discard"\r\n\r\n"-1"', b'name="n_discard"\r\n\r\nmany',
        b"name=n_discard\r\n\r\n -1 ", b'NAME = "id_slot"\r\n\r\n0', b'name="n"\r\n\r\n', b"name*=n\r\n\r\n99",
        b'name="n"\r\n\r\n1\r\n--x\r\nContent-Disposition: form-data; name="n"\r\n\r\n99',
        b'filename="a; name=n_discard"\r\n\r\n-1', b'name="n_discard"; filename="a"\r\n\r\n-1',
        b'name="grammar"\r\n\r\n' + b"(" * 100, b'name="json_schema"\r\n\r\n ' + DEEP,
        b'name="tools"\r\n\r\n{"pattern":"' + DEEP + b'"}',
        b'name="image_url"\r\n\r\nhttp://10.0.0.1/', b'name="file"\r\n\r\n file:///etc/passwd',
    ],
)  # fmt: skip
def test_a_form_says_no_more_than_a_body_may(part: bytes) -> None:
    good = b'name="model"\r\n\r\nm\r\n'
    assert form_code(good, part + b"\r\n") == "refused_parameter"


def test_what_forms_usually_say_passes() -> None:
    usual = {"model": "m", "response_format": "verbose_json", "temperature": "0.2", "n": "1", "prompt": "see http://a.example/b.png",
             "timestamp_granularities[]": "word", "language": "en", "file": "x.wav"}  # fmt: skip
    parts = [f'name="{name}"\r\n\r\n{value}\r\n'.encode() for name, value in usual.items()]
    sound = b'name="file"; filename="http://a.example/n_discard"\r\nContent-Type: audio/wav\r\n\r\nhttp://a.example/\xff\r\n'
    assert form_code(*parts, sound) == ""
    assert form_code(*parts * 200) == "bad_form"


@given(st.binary(max_size=60), st.sampled_from(["n", "n_discard", "grammar", "tools", "image", "x"]))
def test_no_body_makes_it_stumble(junk: bytes, field: str) -> None:
    assert code(b'{"%b":%b,"media":"\\u0041"}' % (field.encode(), junk)) in ("", "bad_json", "refused_parameter")


NESTED = 'root ::= "(" ws "[" [^"(\\\\] ( "x" ( "y" | [0-9]{1,3} )* )? # ((((\nws ::= [ \\t\\n]*'


def test_grammars_are_bounded_in_size_and_depth() -> None:
    assert code({"grammar": NESTED}) == ""
    assert code({"grammar": None}) == ""
    assert code({"grammar": "root ::= " + '"("' * 1000}) == "", "brackets in literals nest nothing"
    deep = "(" * 65 + '"x"' + ")" * 65
    for text in (
        "root ::= " + deep,
        "root ::= " + ")" * 100 + deep,
        "root ::= " + '( ")" ' * 65 + '"x"' + ")" * 65,  # literals that seem to close
        "root ::= " + "( [)] " * 65 + '"x"' + ")" * 65,
        "root ::= " + "( # )\n" * 65 + '"x"' + ")" * 65,
        'root ::= "' + " (" * 65,  # never closed
        "x" * firewall.GRAMMAR_BYTES,
    ):
        assert code({"grammar": text}) == "refused_parameter", text[:40]
    escaped = b'{"grammar":"root ::= %b"}' % (b"\\u0028" * 65)
    assert code(escaped) == "refused_parameter"


def nested(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "wrap",
    [
        lambda schema: {"json_schema": schema},
        lambda schema: {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        lambda schema: {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]},
        lambda schema: {"text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}},
        lambda schema: {"output_format": {"type": "json_schema", "schema": schema}},
        lambda schema: {"output_config": {"format": {"type": "json_schema", "schema": schema}}},
    ],
)
def test_schemas_are_bounded_wherever_they_are_named(wrap: Any) -> None:
    assert code(wrap(nested(20))) == ""
    assert code(wrap(nested(firewall.DEPTH + 1))) == "refused_parameter"
    assert code(wrap({"enum": ["x" * firewall.SCHEMA_BYTES]})) == "refused_parameter"
    assert code(wrap({"pattern": "^" + "(" * 65 + "a" + ")" * 65 + "$"})) == "refused_parameter"
    assert code(wrap({"pattern": "^(a|(b|c))[(]+$", "description": '\\" ((( "}}}'})) == ""
    hidden = json.dumps(wrap(nested(firewall.DEPTH + 1))).encode()
    assert code(hidden.replace(b'{"type": "string"}', b'{"type": "str\\"ing]]]]]]]]]"}')) == "refused_parameter"


def test_a_text_of_its_own_is_no_schema() -> None:
    assert code({"text": "(" * 1000, "tools": None, "response_format": None}) == ""


REMOTE = [
    "http://169.254.169.254/latest", "https://x/y.png", "HTTP://X/", "  http://x", "\n\thttps://x", "http :// x", "file:///etc/passwd",
    "File:/etc/passwd", "//x/y.png", " //x", "ftp://x", "s3://b/k", "gopher://x",
]  # fmt: skip


@pytest.mark.parametrize("url", REMOTE)
def test_nothing_is_fetched_for_anybody(url: str) -> None:
    bodies: list[dict[str, Any]] = [
        chat({"type": "image_url", "image_url": {"url": url}}),
        chat({"type": "image_url", "image_url": url}),
        chat({"type": "input_image", "image_url": url}),
        chat({"type": "input_audio", "input_audio": {"data": url}}),
        chat({"type": "video_url", "video_url": {"url": url}}),
        chat({"type": "image", "source": {"type": "url", "url": url}}),  # as /v1/messages has it
        chat({"type": "tool_result", "content": [{"type": "image", "source": {"type": "url", "url": url}}]}),
        chat({"type": "text", "text": "look"}, {"type": "input_file", "file_url": url}),
        {"prompt": "x", "media": [[{"a": url}]]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]},
    ]
    for body in bodies:
        assert code(body) == "refused_parameter", body
        assert code(body, remote_media=True) == ""


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages":[{"content":[{"image\\u005furl":{"url":"http://x"}}]}]}',
        b'{"messages":[{"content":[{"\\u0069mage_url":"\\u0068ttp://x"}]}]}',
        b'{"messages":[{"content":[{"image_url":{"url":"http:\\/\\/x"}}]}]}',
        b'{"messages":[{"content":[{"type":"im\\u0061ge","source":{"url":"http://x"}}]}]}',
        b'{"messages":[{"content":[{"image_url":{"url":"data:,"},"image_url":{"url":"http://x"}}]}]}',
    ],
)
def test_escapes_hide_nothing(body: bytes) -> None:
    assert code(body) == "refused_parameter"


@pytest.mark.parametrize(
    "body",
    [
        chat({"type": "image_url", "image_url": {"url": NEAR, "detail": "low"}}),
        chat({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}),
        chat({"type": "text", "text": "http://x/image.png shows what?"}),
        {"messages": [{"role": "user", "content": "https://x/y.png is an image file"}]},
        {"prompt": "// a comment about images\nhttp://x"},
        {"messages": [], "tools": [{"function": {"name": "image", "description": "http://x", "image": "https://x"}}]},
        {"messages": [], "metadata": {"image": "http://x"}},
        {"input_prefix": "", "input_extra": [{"filename": "file:///home/me/image.py", "text": "http://x"}]},
    ],
)  # fmt: skip
def test_data_and_texts_pass(body: dict[str, Any]) -> None:
    assert code(body) == ""
