"""JSON that is still being written, cut anywhere."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, strategies as st

from llm_daemon_bench import partial_json as pj

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
wholes = st.lists(values, max_size=4) | st.dictionaries(st.text(), values, max_size=4)


@given(wholes, st.booleans())
def test_whole_json_is_complete_and_equal(value: Any, ascii_: bool) -> None:
    node = pj.parse("so: " + json.dumps(value, ensure_ascii=ascii_) + " that is all")
    assert node is not None
    assert node.complete
    assert pj.plain(node) == value


@given(wholes, st.data())
def test_no_prefix_is_complete(value: Any, data: st.DataObject) -> None:
    text = json.dumps(value)
    node = pj.parse(text[: data.draw(st.integers(0, len(text) - 1))])
    assert node is None or not node.complete


@given(st.dictionaries(st.text("abc", min_size=1), values, min_size=1), st.data())
def test_what_is_complete_in_a_prefix_has_its_final_value(value: dict[str, Any], data: st.DataObject) -> None:
    text = json.dumps(value)
    node = pj.parse(text[: data.draw(st.integers(1, len(text)))])
    for key, wanted in value.items():
        found = pj.find(node, f"$.{key}")
        if found is not None and found.complete:
            assert pj.plain(found) == wanted


def test_a_number_is_complete_once_something_follows() -> None:
    ends = {text: pj.find(pj.parse(text), "$.a") for text in ('{"a": 12', '{"a": 12 ', '{"a": 12}')}
    assert [node is not None and node.complete for node in ends.values()] == [False, True, True]


def test_what_is_no_json_is_never_complete() -> None:
    for text in ("{a: 1}", '{"a" 1}', "[1 2]", "[01]", '["\n"]', "[1}", "[" * 500 + "]" * 500):
        node = pj.parse(text)
        assert node is not None
        assert not node.complete
    assert pj.parse("no brackets") is None
