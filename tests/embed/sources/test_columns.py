"""Columns: dotted names, captions in lists and objects, labels that are none."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_fast.embed.sources.columns import (
    NO_LABEL,
    NO_TEXT,
    NOT_TEXT,
    ParsedRow,
    choose_columns,
    nested_names,
    parse_list,
    parse_row,
    value_of,
)
from lit_fast.embed.sources.interface import Columns

NAMES = st.sampled_from(["a", "b", "a.b", "text"])
VALUES: Any = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=8,
)


@given(st.lists(st.text(max_size=6), max_size=4))
def test_parse_list_inverts_json_and_repr(texts: list[str]) -> None:
    assert parse_list(json.dumps(texts)) == texts
    assert parse_list(json.dumps(texts, ensure_ascii=False)) == texts
    if all(text.isprintable() for text in texts):
        assert parse_list(f" {texts!r}\n") == texts


@pytest.mark.parametrize(
    "text",
    [
        "a dog",
        "[a dog]",
        "['a' 'b']",
        "['a', 3]",
        "[1]",
        '["a", ["b"]]',
        "['a'] and",
        "['a', 'b",
        "[" * 1000,
        "['a', " + "-" * 5000 + "1]",
        "[f'{x}']",
        "[__import__('os')]",
    ],
)
def test_parse_list_of_other_text_is_none(text: str) -> None:
    assert parse_list(text) is None


@given(st.dictionaries(NAMES, VALUES, max_size=3))
def test_nested_names_have_values(row: dict[str, Any]) -> None:
    names = nested_names([row])
    assert names[: len(row)] == list(row)
    for name in names:
        value_of(row, name)  # no name raises
    for name, value in row.items():
        assert value_of(row, name) == value
        if isinstance(value, dict):
            for inner in value:
                if f"{name}.{inner}" not in row and not any(n.startswith(f"{name}.") for n in row):
                    assert f"{name}.{inner}" in names


@pytest.mark.parametrize(
    ("value", "name", "found"),
    [
        ({"json": {"caption": "a"}}, "json.caption", "a"),
        ({"s": {"raw": ["a", "b"], "id": [1, 2]}}, "s.raw", ["a", "b"]),
        ({"s": [{"raw": "a"}, {"raw": "b"}]}, "s.raw", ["a", "b"]),
        ({"s": [{"t": {"raw": "a"}}]}, "s.t.raw", ["a"]),
        ({"a.b": 1, "a": {"b": 2}}, "a.b", 1),
        ({"a.b": {"c": 2}}, "a.b.c", 2),
        ({"meta": '{"caption": "a"}'}, "meta.caption", "a"),
        ({"meta": "{"}, "meta.caption", None),
        ({"a": None}, "a.b", None),
    ],
)
def test_value_of_dotted_name_walks_objects_and_lists(value: dict[str, Any], name: str, found: Any) -> None:
    assert value_of(value, name) == found


@pytest.mark.parametrize(
    ("value", "captions"),
    [
        ({"raw": ["a", "b"], "sentid": [1, 2]}, ("a", "b")),
        ([{"raw": "a", "tokens": ["x"]}, {"raw": "b"}], ("a", "b")),
        ({"caption": ["a", "b"], "caption/tokenized": ["x"]}, ("a", "b")),
        ([["a"], ["b", None]], ("a", "b")),
        ([b"a", "b"], ("a", "b")),
    ],
)
def test_parse_row_captions_in_lists_and_objects_are_found(value: Any, captions: tuple[str, ...]) -> None:
    assert parse_row({"c": value}, Columns((("", "c"),))) == ParsedRow(captions)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (5, NOT_TEXT),
        ([("en", "a")], NOT_TEXT),  # of a map column
        ({"en": "a"}, NOT_TEXT),
        (float("nan"), NO_TEXT),
        (None, NO_TEXT),
        ({"raw": None}, NO_TEXT),
    ],
)
def test_parse_row_captions_that_are_no_text_are_skipped_with_a_reason(value: Any, problem: str) -> None:
    assert parse_row({"c": value}, Columns((("", "c"),))).problem == problem


def test_parse_row_label_that_is_no_number_costs_no_captions() -> None:
    columns = Columns((("", "c"),), label="l")
    assert parse_row({"c": "a", "l": "dog"}, columns) == ParsedRow(("a",), dropped=NO_LABEL)
    assert parse_row({"c": "", "l": "dog"}, columns) == ParsedRow(problem=NO_LABEL)
    assert parse_row({"c": "a", "l": "7"}, columns) == ParsedRow(("a",), label=7)


def test_parse_row_lists_in_cells_must_be_lists() -> None:
    columns = Columns((("", "c"),), lists=True)
    assert parse_row({"c": "['a', \"b's\"]"}, columns) == ParsedRow(("a", "b's"))
    assert "not a list" in parse_row({"c": "['a', 'b"}, columns).problem


@pytest.mark.parametrize(
    ("names", "captions"),
    [
        (["image", "caption_0", "caption_1", "label"], ["caption_0", "caption_1"]),
        (["image", "json", "json.caption", "json.meta.text"], ["json.caption"]),
        (["image", "image.bytes", "image.path", "s", "s.raw"], ["s.raw"]),
    ],
)
def test_choose_columns_guesses_numbered_and_nested_captions(names: list[str], captions: list[str]) -> None:
    assert [name for _, name in choose_columns(Columns(), names, "x").captions] == captions
