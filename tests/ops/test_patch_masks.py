"""Patch masks: their statistics, their keys, and the reference implementation against plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oner_fast.block_masks import ASPECTS, aspects
from oner_fast.ops import implementations
from oner_fast.ops.patch_masks import boundaries, draw_masks, patch_mask
from oner_fast.philox import MASK_BLOCK, philox4x32, split_seed


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


def test_patch_masks_depend_on_seed_step_sample_and_pass_alone():
    mask = patch_mask(1, 2, torch.arange(64), 64, 32)
    assert torch.equal(patch_mask(1, 2, torch.arange(32, 64), 64, 32), mask[32:])
    for other in (
        patch_mask(2, 2, torch.arange(64), 64, 32),
        patch_mask(1, 3, torch.arange(64), 64, 32),
        patch_mask(1, 2, torch.arange(64), 64, 32, stream=1),
    ):
        assert not (other == mask).all(1).any()


def test_counts_and_passes_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="masked must be in"):
        patch_mask(0, 0, torch.arange(2), 4, 5)
    with pytest.raises(ValueError, match="masking pass"):
        patch_mask(0, 0, torch.arange(2), 4, 2, stream=12)
    with pytest.raises(ValueError, match="step must be in"):
        patch_mask(0, 2**32, torch.arange(2), 4, 2)


def test_the_table_of_aspects_agrees_with_its_formula():
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
def test_block_masks_agree_with_a_plain_python_loop(height, width, count):
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
def test_counts_are_exact_and_kept_lists_the_visible_cells(height, width, part, seed, step, pattern):
    cells = height * width
    masked = int(part * cells)
    mask, kept = draw_masks(seed, step, torch.arange(5), (height, width), masked, pattern)
    assert mask.shape == (5, cells) and mask.dtype == torch.bool and (mask.sum(1) == masked).all()
    assert kept.shape == (5, cells - masked) and kept.dtype == torch.int64 and kept.is_contiguous()
    for row, visible in zip(mask, kept, strict=True):
        assert torch.equal((~row).nonzero().squeeze(1), visible)


def test_reversed_blocks_stay_visible():
    block, backwards = (draw_masks(1, 2, torch.arange(50), (14, 14), 98, p).mask for p in ("block", "reversed_block"))
    assert torch.equal(block, ~backwards)
    fewer = draw_masks(1, 2, torch.arange(50), (14, 14), 150, "reversed_block").mask
    assert torch.equal(fewer, ~draw_masks(1, 2, torch.arange(50), (14, 14), 46, "block").mask)


def test_block_masks_depend_on_seed_step_sample_and_pass_alone():
    mask = draw_masks(1, 2, torch.arange(64), (8, 8), 32, "block").mask
    assert torch.equal(draw_masks(1, 2, torch.arange(32, 64), (8, 8), 32, "block").mask, mask[32:])
    assert torch.equal(draw_masks(1, torch.tensor(2), torch.arange(64), (8, 8), 32, "block").mask, mask)
    for seed, step, stream in ((2, 2, 0), (1, 3, 0), (1, 2, 1)):
        assert (draw_masks(seed, step, torch.arange(64), (8, 8), 32, "block", stream).mask != mask).any(1).sum() > 60


def test_random_masks_of_a_grid_agree_with_patch_mask():
    mask = draw_masks(3, 4, torch.arange(9), (5, 7), 12, stream=2).mask
    assert torch.equal(mask, patch_mask(3, 4, torch.arange(9), 35, 12, 2))


def test_boundaries_are_cumulative_counts():
    assert boundaries(torch.tensor([3, 0, 2])).tolist() == [0, 3, 3, 5]
    assert boundaries(torch.zeros(0, dtype=torch.int64)).dtype == torch.int32
    assert boundaries(torch.tensor([2**31 - 1, 0])).tolist() == [0, 2**31 - 1, 2**31 - 1]


def test_counts_that_no_boundaries_hold_are_refused():
    for counts, got in (([2**31 - 1, 5], 2**31 + 4), ([2**40], 2**40)):
        with pytest.raises(ValueError, match=rf"add up to fewer than 2\^31 rows, which int32 holds, got {got}"):
            boundaries(torch.tensor(counts))
    with pytest.raises(ValueError, match="counts must be at least 0, got -5"):
        boundaries(torch.tensor([3, -5]))
    with pytest.raises(ValueError, match=r"at most 2\^31 cells"):
        patch_mask(1, 2, torch.arange(2), 2**62, 1)


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
    with pytest.raises(ValueError, match="no implementation 'cuda' .*known ones: triton, reference"):
        draw_masks(0, 0, samples, (4, 4), 2, implementation="cuda")


def test_the_variable_forces_every_function_of_the_op(monkeypatch):
    monkeypatch.setenv("ONER_FAST_PATCH_MASKS_IMPLEMENTATION", "nonsense")
    for call in (
        lambda: draw_masks(0, 0, torch.arange(2), (4, 4), 2),
        lambda: patch_mask(0, 0, torch.arange(2), 4, 2),
        lambda: boundaries(torch.tensor([1, 2])),
    ):
        with pytest.raises(ValueError, match="patch_masks has no implementation 'nonsense'"):
            call()


def test_large_grids_on_a_gpu_are_left_to_the_reference_implementation():
    assert implementations.choose("patch_masks", "cuda", cells=1 << 14).name == "triton"
    assert implementations.choose("patch_masks", "cuda", cells=(1 << 14) + 1).name == "reference"
