import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oner_fast.data.sources.concepts import STOP_WORDS, caption_of_name, concept, percentile, singular, split_of


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("Arrow Down", "arrow down"),
        ("down arrow", "arrow down"),
        ("batteries 10", "battery"),
        ("battery 20", "battery"),
        ("movies", "movie"),
        ("movie", "movie"),
        ("grannies", "granny"),
        ("grannie", "granny"),
        ("pies", "pie"),
        ("flies", "fly"),
        ("cafe\u0301", "caf\u00e9"),
        ("battery charging 100", "battery charging"),
        ("the cats and the dog", "cat dog"),
        ("glass of milk", "glass milk"),
        ("bus", "bus"),
        ("woman\u2019s hat", "hat woman"),
        ("4k", "k"),
        ("24", "24"),
        ("to", "to"),
        ("caf\u00e9s", "caf\u00e9"),
    ],
)
def test_concept(caption: str, expected: str) -> None:
    assert concept(caption) == expected


@given(st.lists(st.sampled_from(["red", "cats", "the", "42", "glass", "of", "arrows"]), min_size=1, max_size=6))
def test_concept_ignores_order_case_and_digits(words: list[str]) -> None:
    known = [word for word in words if word not in STOP_WORDS and not word.isdigit()]
    if known:
        assert concept(" ".join(words)) == concept(" ".join(reversed(known)).upper() + " 7")
        assert concept(concept(" ".join(words))) == concept(" ".join(words))


def test_singular_leaves_short_words_and_double_s() -> None:
    assert [singular(word) for word in ("cats", "gas", "glass", "s")] == ["cat", "gas", "glass", "s"]


def test_split_is_the_hash_of_the_concept() -> None:
    things = ("cat", "boat", "tower", "lamp", "key", "bird")
    captions = [f"{adjective} {thing}" for adjective in ("red", "old", "tiny", "round") for thing in things]
    for caption in captions:
        number = int(hashlib.sha1(concept(caption).encode()).hexdigest(), 16) % 100
        assert percentile(concept(caption)) == number
        assert split_of(caption) == ("val" if number < 8 else "train")
        assert split_of(caption, 0) == "train" and split_of(caption, 100) == "val"


def test_caption_of_name() -> None:
    assert caption_of_name("arrow-down_bold-Circle") == "arrow down bold circle"
    assert caption_of_name("arrowDown") == "arrow down"
    assert caption_of_name("flag: Albania") == "flag albania"
