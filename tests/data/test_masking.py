from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oner_fast.data.batch import TokenizedText
from oner_fast.data.block_masks import ASPECTS, aspects
from oner_fast.data.masking import boundaries, draw_masks, mask_words, patch_mask
from oner_fast.data.philox import MASK_BLOCK, philox4x32, split_seed


@dataclass
class Words:
    mask_id: int = 2
    first_word_id: int = 3
    vocab_size: int = 1003


def text_of(words: list[list[int]]) -> TokenizedText:
    """Captions given as the numbers of tokens of their words; ids from 500 up in order."""
    lengths = [sum(caption) for caption in words]
    word_ids = [w for caption in words for w, tokens in enumerate(caption) for _ in range(tokens)]
    return TokenizedText(
        torch.arange(sum(lengths)) % 500 + 500,
        torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        torch.tensor(word_ids, dtype=torch.int32),
    )


def masked_words(text: TokenizedText, target: torch.Tensor, caption: int) -> list[bool]:
    """For each word of a caption whether it is a target; fails where a word is a target in part."""
    part = slice(*text.cu_seqlens[caption : caption + 2].tolist())
    of_word: dict[int, set[bool]] = {}
    for word, hit in zip(text.word_ids[part].tolist(), target[part].tolist(), strict=True):
        of_word.setdefault(word, set()).add(hit)
    assert all(len(hits) == 1 for hits in of_word.values())
    return [hits.pop() for hits in of_word.values()]


@settings(max_examples=40, deadline=None)
@given(cells=st.integers(1, 200), part=st.floats(0, 1), seed=st.integers(0, 2**64 - 1), step=st.integers(0, 2**32 - 1))
def test_patch_masks_hold_the_exact_count(cells, part, seed, step):
    mask = patch_mask(seed, step, torch.arange(7), cells, int(part * cells))
    assert mask.shape == (7, cells) and mask.dtype == torch.bool
    assert (mask.sum(1) == int(part * cells)).all()


def test_patch_masks_are_uniform_over_cells_and_pairs():
    mask = patch_mask(5, 1, torch.arange(20000), 16, 8).double()
    assert (mask.mean(0) - 0.5).abs().max() < 0.02
    together = mask.T @ mask / len(mask)
    off_diagonal = together[~torch.eye(16, dtype=torch.bool)]
    assert (off_diagonal - 8 * 7 / (16 * 15)).abs().max() < 0.02


def test_patch_masks_belong_to_seed_step_sample_and_pass():
    mask = patch_mask(1, 2, torch.arange(64), 64, 32)
    assert torch.equal(patch_mask(1, 2, torch.arange(32, 64), 64, 32), mask[32:])
    for other in (
        patch_mask(2, 2, torch.arange(64), 64, 32),
        patch_mask(1, 3, torch.arange(64), 64, 32),
        patch_mask(1, 2, torch.arange(64), 64, 32, stream=1),
    ):
        assert not (other == mask).all(1).any()


def test_impossible_masks_are_refused():
    with pytest.raises(ValueError, match="masked must be in"):
        patch_mask(0, 0, torch.arange(2), 4, 5)
    with pytest.raises(ValueError, match="masking pass"):
        patch_mask(0, 0, torch.arange(2), 4, 2, stream=12)
    text = text_of([[1], [2]])
    with pytest.raises(ValueError, match="ratio must be in"):
        mask_words(text, 0, 0, torch.arange(2), 0, Words(), ratio=1.5)
    with pytest.raises(ValueError, match="samples must be"):
        mask_words(text, 0, 0, torch.arange(3), 0, Words())


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=12), min_size=1, max_size=20),
    ratio=st.sampled_from([0.0, 0.15, 0.4, 0.5, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_whole_words_in_the_wanted_number(words, ratio, seed):
    text = text_of(words)
    masked = mask_words(text, seed, 3, torch.arange(len(words)), 0, Words(), ratio)
    for caption, lengths in enumerate(words):
        count, exact = sum(masked_words(text, masked.target, caption)), ratio * len(lengths)
        assert int(exact + 1e-6) <= count <= int(np.ceil(exact - 1e-6))
    kept = ~masked.target
    assert torch.equal(masked.input_ids[kept], text.input_ids[kept])


def test_the_mean_is_the_ratio_even_for_single_words():
    for lengths in ([1], [2, 1], [1, 3, 1]):
        text = text_of([lengths] * 40000)
        masked = mask_words(text, 9, 4, torch.arange(40000), 1, Words())
        rate = np.mean([masked_words(text, masked.target, k) for k in range(0, 40000, 10)], axis=0)
        assert np.abs(rate - 0.15).max() < 0.02  # each place alike


def test_eighty_ten_ten_shared_by_a_words_tokens():
    text = text_of([[2, 2, 2, 2]] * 20000)
    masked = mask_words(text, 1, 0, torch.arange(20000), 0, Words(), 0.5)
    ids, original = masked.input_ids.view(-1, 2), text.input_ids.view(-1, 2)
    ids, original = ids[masked.target.view(-1, 2)[:, 0]], original[masked.target.view(-1, 2)[:, 0]]
    is_mask, is_kept = ids == 2, ids == original
    assert (is_mask[:, 0] == is_mask[:, 1]).all()
    is_random = ~is_mask[:, 0] & ~is_kept.all(1)
    assert abs(is_mask[:, 0].double().mean() - 0.8) < 0.01
    assert abs(is_kept.all(1).double().mean() - 0.1) < 0.01
    assert abs(is_random.double().mean() - 0.1) < 0.01
    drawn = ids[is_random]
    assert drawn.min() >= 3 and drawn.max() < 1003
    assert (drawn[:, 0] != drawn[:, 1]).double().mean() > 0.99  # each token's id is its own
    assert abs(drawn.double().mean() - 503) < 15


def test_passes_and_parts_of_a_batch():
    text = text_of([[1, 2], [3], [1, 1, 1], [2, 1]] * 50)
    samples = torch.arange(200)
    whole = mask_words(text, 6, 7, samples, 0, Words(), 0.5)
    parts = [mask_words(part, 6, 7, samples[k * 50 :][:50], 0, Words(), 0.5) for k, part in enumerate(text.split(4))]
    assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)
    assert torch.equal(torch.cat([part.target for part in parts]), whole.target)
    assert not torch.equal(mask_words(text, 6, 7, samples, 1, Words(), 0.5).target, whole.target)
    again = mask_words(text, 6, 7, samples, 0, Words(), 0.5)
    assert torch.equal(again.input_ids, whole.input_ids)


def test_no_caption_no_mask():
    empty = TokenizedText(torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int32), torch.zeros(0).int())
    masked = mask_words(empty, 0, 0, torch.arange(0), 0, Words())
    assert masked.input_ids.numel() == 0 and masked.target.dtype == torch.bool


def test_the_table_of_aspects_is_what_makes_it():
    assert aspects() == ASPECTS and len(ASPECTS) == 64
    assert all(abs(a * b / 2**24 - 1) < 1e-3 for a, b in zip(ASPECTS, reversed(ASPECTS), strict=True))


def plain_blocks(seed: int, step: int, sample: int, height: int, width: int, count: int) -> set[tuple[int, int]]:
    """One sample in plain Python: real square roots, and a list of cells sorted by their draws."""

    def draw(block: int) -> list[int]:
        words = philox4x32((torch.tensor([block]), sample, step, MASK_BLOCK), split_seed(seed))
        return [int(word) for word in words]

    picked: set[tuple[int, int]] = set()
    attempt = failures = 0
    while len(picked) < count and failures < 10:
        words, remaining = draw(attempt), count - len(picked)
        low, high = min(16, remaining), max(16, remaining)
        area = low + words[0] * (high - low + 1) // 2**32
        aspect = words[1] * 64 // 2**32
        tall, wide = (int((area * ASPECTS[k] / 4096) ** 0.5 + 0.5) for k in (aspect, 63 - aspect))
        attempt += 1
        failures += 1
        if tall >= height or wide >= width:
            continue
        top, left = words[2] * (height - tall + 1) // 2**32, words[3] * (width - wide + 1) // 2**32
        block = {(top + y, left + x) for y in range(tall) for x in range(wide)}
        if 1 <= len(block - picked) <= remaining:
            picked |= block
            failures = 0
    draws = [word for block in range((height * width + 3) // 4) for word in draw(2**31 + block)]
    rest = sorted((draws[y * width + x], y, x) for y in range(height) for x in range(width) if (y, x) not in picked)
    return picked | {(y, x) for _, y, x in rest[: count - len(picked)]}


@pytest.mark.parametrize(("height", "width", "count"), [(16, 16, 128), (6, 11, 40), (14, 14, 98), (3, 3, 5)])
def test_blocks_are_those_of_the_plain_loop(height, width, count):
    mask = draw_masks(2**40 + 3, 17, torch.arange(12), (height, width), count, "block").mask.view(-1, height, width)
    for sample in range(12):
        expected = plain_blocks(2**40 + 3, 17, sample, height, width, count)
        assert {(int(y), int(x)) for y, x in mask[sample].nonzero()} == expected


def test_block_masks_have_the_known_statistics():
    """Over 5,000 draws a share has a standard deviation of at most 0.005 (0.003 near the corners), and four cells
    are averaged."""
    for pattern, corner, centre in (("block", 0.05, 0.86), ("reversed_block", 0.95, 0.14)):
        mask = draw_masks(5, 0, torch.arange(5000), (16, 16), 128, pattern).mask.view(-1, 16, 16)
        assert (mask.sum((1, 2)) == 128).all()
        share = mask.double().mean(0)
        assert abs(share[::15, ::15].mean() - corner) < 0.015 and abs(share[7:9, 7:9].mean() - centre) < 0.015
        assert (share - share.flip(0)).abs().max() < 0.05 and (share - share.T).abs().max() < 0.05


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 20), width=st.integers(1, 20), part=st.floats(0, 1), seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**32 - 1), pattern=st.sampled_from(["random", "block", "reversed_block"]),
)  # fmt: skip
def test_exact_counts_and_the_cells_that_are_kept(height, width, part, seed, step, pattern):
    cells = height * width
    masked = int(part * cells)
    mask, kept = draw_masks(seed, step, torch.arange(5), (height, width), masked, pattern)
    assert mask.shape == (5, cells) and mask.dtype == torch.bool and (mask.sum(1) == masked).all()
    assert kept.shape == (5, cells - masked) and kept.dtype == torch.int64 and kept.is_contiguous()
    for row, visible in zip(mask, kept, strict=True):
        assert torch.equal((~row).nonzero().squeeze(1), visible)


def test_reversed_blocks_are_what_stays_visible():
    block, backwards = (draw_masks(1, 2, torch.arange(50), (14, 14), 98, p).mask for p in ("block", "reversed_block"))
    assert torch.equal(block, ~backwards)
    fewer = draw_masks(1, 2, torch.arange(50), (14, 14), 150, "reversed_block").mask
    assert torch.equal(fewer, ~draw_masks(1, 2, torch.arange(50), (14, 14), 46, "block").mask)


def test_block_masks_belong_to_seed_step_sample_and_pass():
    mask = draw_masks(1, 2, torch.arange(64), (8, 8), 32, "block").mask
    assert torch.equal(draw_masks(1, 2, torch.arange(32, 64), (8, 8), 32, "block").mask, mask[32:])
    assert torch.equal(draw_masks(1, torch.tensor(2), torch.arange(64), (8, 8), 32, "block").mask, mask)
    for seed, step, stream in ((2, 2, 0), (1, 3, 0), (1, 2, 1)):
        assert (draw_masks(seed, step, torch.arange(64), (8, 8), 32, "block", stream).mask != mask).any(1).sum() > 60


def test_random_masks_of_a_grid_are_patch_masks():
    mask = draw_masks(3, 4, torch.arange(9), (5, 7), 12, stream=2).mask
    assert torch.equal(mask, patch_mask(3, 4, torch.arange(9), 35, 12, 2))


def test_boundaries_are_cu_seqlens():
    assert boundaries(torch.tensor([3, 0, 2])).tolist() == [0, 3, 3, 5]
    assert boundaries(torch.zeros(0, dtype=torch.int64)).dtype == torch.int32


def test_impossible_grids_and_patterns_are_refused():
    samples = torch.arange(2)
    with pytest.raises(ValueError, match="pattern must be one of random, block, reversed_block, not 'rows'"):
        draw_masks(0, 0, samples, (4, 4), 2, "rows")
    with pytest.raises(ValueError, match="masked must be in"):
        draw_masks(0, 0, samples, (4, 4), 17, "block")
    with pytest.raises(ValueError, match="at most 65536 cells and 512 a side, not 1 x 513"):
        draw_masks(0, 0, samples, (1, 513), 17, "block")
    with pytest.raises(ValueError, match="masking pass"):
        draw_masks(0, 0, samples, (4, 4), 2, "block", 12)
    with pytest.raises(ValueError, match="step must be in"):
        draw_masks(0, 2**32, samples, (4, 4), 2, "block")
    with pytest.raises(ValueError, match="implementation must be triton or reference"):
        draw_masks(0, 0, samples, (4, 4), 2, implementation="cuda")
