"""Splitting captions by vocabulary, and queries of an image with a word."""

import pytest
import torch

from oner_fast.evaluation.composed import composed_queries, composed_recall, composed_scores
from oner_fast.evaluation.splits import split_by_words, vocabulary, words


def test_words() -> None:
    assert words("Arrow-Down, bold (2) don't über_x!") == ["arrow", "down", "bold", "2", "don't", "über", "x"]
    assert words("...") == []


def test_split_by_words() -> None:
    seen = vocabulary(["Red square", "blue circle"])
    assert seen == {"red", "square", "blue", "circle"}
    assert split_by_words(["BLUE square", "green square", "red, red", "circles"], seen) == ([0, 2], [1, 3])


def test_composed_queries_add_a_word_that_gives_another_caption() -> None:
    captions = ["arrow", "arrow up", "up arrow", "bold arrow up", "clock", "clock 2"]
    found = {(one.image, one.word, tuple(one.targets)) for one in composed_queries(captions)}
    assert found == {(0, "up", (1, 2)), (1, "bold", (3,)), (2, "bold", (3,))}


def test_composed_queries_are_fixed_by_the_seed() -> None:
    captions = [f"a{i}" for i in range(20)] + [f"a{i} b{j}" for i in range(20) for j in range(3)]
    first = composed_queries(captions, limit=10, seed=1)
    assert first == composed_queries(captions, limit=10, seed=1)
    assert first != composed_queries(captions, limit=10, seed=2)
    assert len(first) == 10


def test_composed_recall_leaves_the_querys_image_out() -> None:
    queries = composed_queries(["arrow", "arrow up", "clock", "clock up"])
    gallery = torch.eye(4)
    asked = gallery[[one.image for one in queries]] * 0.8 + gallery[[one.targets[0] for one in queries]] * 0.6
    assert composed_recall(asked, gallery, queries)["R@1"] == 1.0
    assert composed_recall(asked, gallery, queries)["chance@1"] == pytest.approx(1 / 3)
    assert composed_recall(torch.ones(2, 4), torch.ones(4, 4), queries)["R@1"] == 0.0
    scores = composed_scores(asked, gallery, queries)
    assert all(scores[row, one.image] == -torch.inf for row, one in enumerate(queries))
    with pytest.raises(ValueError, match="one embedding for each"):
        composed_recall(asked[:1], gallery, queries)
