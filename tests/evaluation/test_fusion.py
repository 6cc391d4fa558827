import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from oner_fast.evaluation import fusion
from oner_fast.evaluation.composed import ComposedQuery
from oner_fast.evaluation.fusion import (
    composed_figures,
    fused_figures,
    halves,
    probe_captions,
    standardised,
    word_shifts,
)

THINGS, MORE = 6, 5


def embedding(thing: int, added: int | None = None) -> Tensor:
    """A thing is one direction, and an attribute another."""
    found = torch.zeros(THINGS + MORE)
    if thing >= 0:
        found[thing] = 1.0
    if added is not None:
        found[THINGS + added] = 1.0
    return F.normalize(found, dim=0)


def every_query() -> tuple[Tensor, list[ComposedQuery]]:
    """Gallery: each thing alone and with each attribute; queries: a thing alone and an attribute."""
    gallery = [embedding(thing) for thing in range(THINGS)]
    queries = []
    for thing in range(THINGS):
        for added in range(MORE):
            queries.append(ComposedQuery(thing, f"w{added}", [len(gallery)]))
            gallery.append(embedding(thing, added))
    return torch.stack(gallery), queries


def test_an_image_and_words_find_what_neither_finds_alone() -> None:
    gallery, queries = every_query()
    image = torch.stack([embedding(query.image) for query in queries])
    text = torch.stack([embedding(-1, int(query.word[1:])) for query in queries])
    asked_for = [str(query.targets) for query in queries]
    found = composed_figures(image, text, image, gallery, queries, asked_for, shift=text)
    assert found["image_only"]["R@1"] == found["text_only"]["R@1"] == found["R@1"] == 0.0
    fusions = found["fusions"]
    assert {name: fusions[name]["R@1"] for name in fusions} == dict.fromkeys(fusions, 1.0) | {"sum": 1.0}
    assert set(fusions) == {"mean", "sum", "standardised", "weighted", "shift", "weighted_shift"}
    assert all(part["chance@1"] == pytest.approx(1 / (len(gallery) - 1)) for part in fusions.values())
    for weights in fusions["weighted"]["weights"]:
        assert math.isclose(sum(weights), 1) and weights[1] > 0
    without = fused_figures(image, text, image, gallery, queries, asked_for)
    assert set(without) == set(fusions) - {"shift", "weighted_shift"}


def test_weights_are_chosen_on_the_other_half() -> None:
    gallery, queries = every_query()
    asked_for = [str(query.targets) for query in queries]
    half = halves(asked_for)
    assert 5 < int(half.sum()) < 25 and bool((half == halves(asked_for)).all())
    # Scores that are right for one half alone: each half is told to take those of the other, and finds nothing.
    right = torch.zeros(len(queries), len(gallery)).double()
    right[torch.arange(len(queries)), [query.targets[0] for query in queries]] = 1.0
    tried = [([1.0], right * half[:, None]), ([2.0], right * ~half[:, None])]
    found = fusion._chosen(tried, queries, half)
    assert found["weights"] == [[2.0], [1.0]] and found["R@10"] == 0.0
    assert fusion._chosen([([3.0], right), *tried], queries, half)["R@1"] == 1.0


def test_standardised_scores_ignore_what_is_closed() -> None:
    scores = torch.tensor([[1.0, 3.0, -torch.inf], [2.0, 2.0, 2.0]], dtype=torch.float64)
    assert standardised(scores).tolist() == [[-1.0, 1.0, -math.inf], [0.0, 0.0, 0.0]]


class Adder:
    """Embed a text as the sum of its words' directions."""

    def encode_text(self, texts: list[str]) -> Tensor:
        return torch.stack([sum((embedding(int(word)) for word in text.split()), torch.zeros(11)) for text in texts])


def test_the_shift_of_a_word_is_what_it_adds_to_captions() -> None:
    shifts = word_shifts(Adder(), ["2", "3", "2"], ["0", "0 1", "1 4"], batch_size=2)  # type: ignore[arg-type]
    assert shifts is not None and torch.equal(shifts, torch.stack([embedding(2), embedding(3), embedding(2)]))
    assert word_shifts(Adder(), ["2"], []) is None  # type: ignore[arg-type]
    many = [f"caption {number}" for number in range(100)]
    assert probe_captions(many, count=5) == probe_captions(reversed([*many, *many]), count=5)
    assert len(set(probe_captions(many))) == 32
