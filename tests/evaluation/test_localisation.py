"""Word-patch scores, their enlargement, and the overlay."""

import pytest
import torch
from torch.nn import functional as F

from oner_fast.evaluation.localisation import heat_map, overlay, patch_scores


def test_scores_are_the_softmax_of_cosines() -> None:
    patches, text = torch.randn(9, 6), torch.randn(6)
    cosine = torch.stack([F.cosine_similarity(patch.double(), text.double(), dim=0) for patch in patches])
    expected = torch.softmax(cosine / 0.5, dim=0)
    found = patch_scores(patches * 3, text, temperature=0.5)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    several = patch_scores(patches.expand(4, 9, 6), torch.randn(4, 6))
    assert several.shape == (4, 9)
    torch.testing.assert_close(several.sum(1), torch.ones(4))


def test_a_map_has_the_images_size_and_spans_zero_to_one() -> None:
    scores = torch.softmax(torch.randn(2, 16), dim=1)
    maps = heat_map(scores, (40, 56))
    assert maps.shape == (2, 40, 56)
    torch.testing.assert_close(maps.amin((1, 2)), torch.zeros(2))
    torch.testing.assert_close(maps.amax((1, 2)), torch.ones(2))


def test_rows_and_columns_of_the_grid_keep_their_places() -> None:
    scores = torch.zeros(6)
    scores[5] = 1.0  # the second row's third and last column
    heat = heat_map(scores, (20, 30), grid=(2, 3))
    row, column = divmod(int(heat.argmax()), 30)
    assert row >= 10
    assert column >= 20


def test_equal_scores_give_an_empty_map() -> None:
    assert heat_map(torch.full((16,), 1 / 16), (8, 8)).abs().max() == 0


def test_overlay() -> None:
    image = torch.randint(0, 256, (3, 10, 12), dtype=torch.uint8)
    plain = overlay(image, torch.zeros(10, 12), fade=0.0)
    assert torch.equal(plain, image)
    hot = overlay(image, torch.ones(10, 12))
    assert hot.shape == image.shape
    assert hot.dtype == torch.uint8
    assert hot[0].float().mean() > hot[1].float().mean() + 50  # red


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="2 x 2 does not hold 6"):
        heat_map(torch.rand(6), (8, 8))
    with pytest.raises(ValueError, match="temperature"):
        patch_scores(torch.rand(4, 2), torch.rand(2), temperature=0)
    with pytest.raises(ValueError, match="patches need shape"):
        patch_scores(torch.rand(4, 2), torch.rand(3))
    with pytest.raises(ValueError, match="uint8"):
        overlay(torch.rand(3, 4, 4), torch.rand(4, 4))
