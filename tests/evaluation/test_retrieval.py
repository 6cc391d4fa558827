"""Retrieval against the plain formula, in both directions, with several matches; chance; ties; chunks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from oner_fast.evaluation import retrieval as module
from oner_fast.evaluation.retrieval import Matches, caption_gallery, chance, match_ranks, recall, retrieval, top_matches


def unit(rows: int, width: int = 16, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def plain_recall(query: torch.Tensor, gallery: torch.Tensor, right: list[set[int]], k: int) -> float:
    """Compute recall by its definition: sort all scores and look at the first k."""
    hits = 0
    for row, items in zip(query.double(), right, strict=True):
        order = sorted(range(len(gallery)), key=lambda item: -float(row @ gallery[item].double()))
        hits += bool(items & set(order[:k]))
    return hits / len(query)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 10_000))
def test_recall_equals_its_definition_with_many_to_many_matches(images: int, texts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    relation = torch.rand(images, texts, generator=generator) < 0.15
    relation[torch.arange(images), torch.randint(texts, (images,), generator=generator)] = True
    relation[torch.randint(images, (texts,), generator=generator), torch.arange(texts)] = True
    image_row, text_row = relation.nonzero(as_tuple=True)
    image, text = unit(images, seed=seed), unit(texts, seed=seed + 1)
    result = retrieval(image, text, Matches(image_row, text_row, images, texts))
    of_image = [set(row.nonzero().flatten().tolist()) for row in relation]
    of_text = [set(row.nonzero().flatten().tolist()) for row in relation.T]
    for k in (1, 5, 10):
        assert result["image_to_text"][f"R@{k}"] == plain_recall(image, text, of_image, k)
        assert result["text_to_image"][f"R@{k}"] == plain_recall(text, image, of_text, k)


def test_several_captions_and_several_images() -> None:
    gallery = caption_gallery([["a cat", "Cat"], ["A  CAT"], ["dog"]])
    assert gallery.texts == ["a cat", "Cat", "dog"]
    pairs = set(zip(gallery.matches.image.tolist(), gallery.matches.text.tolist(), strict=True))
    assert pairs == {(0, 0), (0, 1), (1, 0), (2, 2)}


def test_further_captions_match_but_add_no_row() -> None:
    gallery = caption_gallery([["chain"], ["link"]], also=[["Link", "unknown"], []])
    assert gallery.texts == ["chain", "link"]
    assert set(zip(gallery.matches.image.tolist(), gallery.matches.text.tolist(), strict=True)) == {
        (0, 0),
        (0, 1),
        (1, 1),
    }


def test_captions_may_keep_rows_of_their_own() -> None:
    own = caption_gallery([["x", "y"], ["X"]], distinct=False, equal_captions_match=False)
    assert own.texts == ["x", "y", "X"]
    assert set(zip(own.matches.image.tolist(), own.matches.text.tolist(), strict=True)) == {(0, 0), (0, 1), (1, 2)}
    shared = caption_gallery([["x", "y"], ["X"]], distinct=False)
    assert {(0, 2), (1, 0)} <= set(zip(shared.matches.image.tolist(), shared.matches.text.tolist(), strict=True))
    with pytest.raises(ValueError, match="equal_captions_match"):
        caption_gallery([["x"]], equal_captions_match=False)
    with pytest.raises(ValueError, match="image 1 has no caption"):
        caption_gallery([["x"], []])


@pytest.mark.parametrize(("positives", "gallery", "k"), [(1, 20, 1), (3, 20, 5), (7, 12, 10), (12, 12, 1), (2, 6, 10)])
def test_chance_is_exact_and_agrees_with_simulation(positives: int, gallery: int, k: int) -> None:
    exact = 1 - math.comb(gallery - positives, min(k, gallery)) / math.comb(gallery, min(k, gallery))
    found = chance(torch.tensor([positives]), gallery, k)
    assert found == pytest.approx(exact, abs=1e-12)
    order = torch.rand(20_000, gallery, generator=torch.Generator().manual_seed(0)).argsort(1)
    simulated = float((order[:, :k] < positives).any(1).double().mean())
    assert found == pytest.approx(simulated, abs=0.015)


def test_chance_is_the_mean_over_queries() -> None:
    each = [chance(torch.tensor([p]), 30, 5) for p in (1, 1, 4)]
    assert chance(torch.tensor([1, 1, 4]), 30, 5) == pytest.approx(sum(each) / 3, abs=1e-12)


@pytest.mark.parametrize("noise", [0.0, 1e-12])
def test_a_collapsed_model_scores_zero(noise: float) -> None:
    rows = F.normalize(torch.ones(50, 8, dtype=torch.float64) + noise * torch.randn(50, 8).double(), dim=1)
    own = torch.arange(50)
    result = retrieval(rows, rows, Matches(own, own, 50, 50))
    assert result["image_to_text"]["R@10"] == 0.0
    assert result["text_to_image"]["R@10"] == 0.0


def test_a_tie_with_one_wrong_item_is_a_miss() -> None:
    query = torch.tensor([[1.0, 0.0]])
    gallery = torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.0, 1.0]])
    for right in (0, 1):
        assert match_ranks(query, gallery, torch.tensor([0]), torch.tensor([right])).tolist() == [1]
    both = match_ranks(query, gallery, torch.tensor([0, 0]), torch.tensor([0, 1]))
    assert both.tolist() == [0]  # two right items may tie with each other


@pytest.mark.parametrize("held", [1, 40, 97, 1 << 20])
def test_the_chunk_size_changes_nothing(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    query, gallery = unit(37), unit(23, seed=1)
    rows, columns = torch.arange(37).repeat(2), torch.cat([torch.arange(37) % 23, (torch.arange(37) + 5) % 23])
    whole = match_ranks(query, gallery, rows, columns)
    top = top_matches(query, gallery, 5)
    shuffled = torch.randperm(74)
    monkeypatch.setattr(module, "CHUNK_SCORES", held)
    assert torch.equal(match_ranks(query, gallery, rows[shuffled], columns[shuffled]), whole)
    chunked = top_matches(query, gallery, 5)
    assert torch.equal(chunked[1], top[1])
    torch.testing.assert_close(chunked[0], top[0], rtol=0, atol=1e-12)


def test_a_part_of_the_queries_searches_the_whole_gallery() -> None:
    image, text, own = unit(30), unit(30, seed=1), torch.arange(30)
    asked = torch.tensor([3, 7, 8])
    part = retrieval(image, text, Matches(own, own, 30, 30), image_queries=asked, text_queries=asked)
    whole = match_ranks(image, text, own, own)
    assert part["image_to_text"]["R@5"] == int((whole[asked] < 5).sum()) / 3
    assert part["image_to_text"]["queries"] == 3
    assert part["image_to_text"]["gallery"] == 30
    assert part["image_to_text"]["chance@5"] == pytest.approx(5 / 30)


def test_top_matches_breaks_ties_by_row() -> None:
    _, rows = top_matches(torch.ones(1, 2), torch.ones(6, 2), 4)
    assert rows.tolist() == [[0, 1, 2, 3]]


def test_bad_input_is_named() -> None:
    query, row = unit(2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="query 1 has no match"):
        match_ranks(query, query, torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(ValueError, match="NaN"):
        match_ranks(query * float("nan"), query, row, row)
    with pytest.raises(ValueError, match=r"\(2, 16\), \(2, 8\)"):
        match_ranks(query, unit(2, 8), row, row)
    with pytest.raises(ValueError, match="text rows need to be in"):
        Matches(row, torch.tensor([0, 2]), 2, 2)
    with pytest.raises(ValueError, match="3 images"):
        retrieval(query, query, Matches(row, row, 3, 2))


def test_median_rank_counts_from_one() -> None:
    eye = torch.eye(5)
    assert recall(eye, eye, torch.arange(5), torch.arange(5))["median_rank"] == 1
