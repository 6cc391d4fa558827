"""Test that JSON from elsewhere is read within bounds or refused in one sentence."""

import json

import pytest

from oner_fast.bounded_json import load_object, loads


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, True]}, [], "é", "\U0001f600", {"k": {"l": ["m"]}}])
def test_what_json_can_say_is_read(value: object) -> None:
    text = json.dumps(value)
    assert loads(text, "x") == loads(text.encode(), "x") == loads(b"\xef\xbb\xbf" + text.encode(), "x") == value
    assert loads("\ufeff" + text, "x") == value


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"[" * 100_000, "nested deeper"),
        (b"[" * 100_000 + b"]" * 100_000, "nested deeper"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested deeper"),
        (b"[" * 65 + b"1" + b"]" * 65, "nested deeper than 64"),
        (b"\xff\xfe", "not UTF-8"),
        (b'"\\ud800"', "surrogate"),
        (b'{"\\ud800": 1}', "surrogate"),
        (b"9" * 5000, "cannot be read"),
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"<!doctype html>", "cannot be read"),
        (b"\x00" * 512, "cannot be read"),
    ],
)
def test_other_texts_are_refused_by_name(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=f"^some file: .*{why}"):
        loads(data, "some file")


def test_the_depth_counts_objects_and_arrays() -> None:
    assert loads(b"[[[1]]]", "x", max_depth=3) == [[[1]]]
    with pytest.raises(ValueError, match="deeper than 2"):
        loads(b"[[[1]]]", "x", max_depth=2)


def test_long_texts_are_refused_before_they_are_parsed() -> None:
    with pytest.raises(ValueError, match="x: its JSON has 12 bytes, and at most 10 are read"):
        loads(b"[1, 2, 3, 4]", "x", max_bytes=10)


@pytest.mark.parametrize("data", [b"[]", b"1", b"null", b'"a"'])
def test_an_object_is_asked_for(data: bytes) -> None:
    with pytest.raises(ValueError, match="x: its JSON is a .*, and an object is needed"):
        load_object(data, "x")
    assert load_object(b'{"a": 1}', "x") == {"a": 1}
