"""Ids of captions: what is equal, and that they are the same everywhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oner_fast.data.caption_ids import NO_CAPTION, caption_ids, normalised


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a dog", "A Dog"),
        ("a dog", "  a\t\n dog\u00a0"),
        ("caf\u00e9", "cafe\u0301"),
        ("STRASSE", "stra\u00dfe"),
        ("\u0390", "\u1fd3"),
    ],
)
def test_captions_that_differ_in_case_space_or_composition_have_one_id(one: str, other: str) -> None:
    assert normalised(one) == normalised(other)
    first, second = caption_ids([one, other]).tolist()
    assert first == second >= 0


def test_other_captions_have_other_ids() -> None:
    found = caption_ids(["a dog", "a dog.", "adog", "two dogs", "a d\u00f6g", "\ud800"])
    assert found.dtype == torch.int64 and len(found.unique()) == 6


def test_an_id_is_the_same_in_every_process_and_version() -> None:
    """A run that resumes elsewhere must contrast as before."""
    assert caption_ids(["a dog"]).tolist() == [7182415866560184703]


def test_captions_without_a_word_equal_none() -> None:
    assert caption_ids(["", " \n", "\u3000"]).tolist() == [NO_CAPTION] * 3
    assert caption_ids([]).shape == (0,)


@given(st.text())
def test_folding_twice_is_folding_once(caption: str) -> None:
    assert normalised(normalised(caption)) == normalised(caption)
