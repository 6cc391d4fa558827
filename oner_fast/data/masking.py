"""Masks of the masked objectives: whole-word masking (MLM) and patch masking (MIM, and UTA's visible tokens).

Every decision is an integer comparison on Philox draws keyed by (seed, step, sample), never by rank or device, so that
one process and many, the CPU and a GPU, a run and its resumption mask alike. Patch masks of samples that lie on a GPU
are drawn there by a Triton kernel, cell for cell those of the definition here. No call waits for the device, but for
block-wise masks on a GPU without Triton.
"""

import importlib
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from oner_fast.data.batch import TokenizedText
from oner_fast.data.block_masks import MAX_CELLS, MAX_SIDE, pick_blocks
from oner_fast.data.philox import (
    MASK_BLOCK,
    MASK_PASSES,
    MASK_PATCH,
    MASK_TEXT,
    check_step,
    philox4x32,
    random_u32,
    split_seed,
)

Pattern = Literal["random", "block", "reversed_block"]

_MASKED_BELOW = (8 << 32) // 10  # 80 % of masked words become [MASK] ...
_RANDOM_BELOW = (9 << 32) // 10  # ... 10 % random ids, and the rest stay


class Vocabulary(Protocol):
    """What word masking needs to know of a tokenizer: ids below `first_word_id` are special."""

    @property
    def mask_id(self) -> int: ...

    @property
    def first_word_id(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...


@dataclass
class MaskedText:
    """A masked caption batch: `input_ids` (T,) int64, some replaced, and `target` (T,) bool, which are to be predicted.

    The ids to predict are those of the text that was masked.
    """

    input_ids: Tensor
    target: Tensor


class PatchMasks(NamedTuple):
    """mask (B, cells) bool, True where masked; kept (B, cells - masked) int64, the other cells in increasing order."""

    mask: Tensor
    kept: Tensor


def draw_masks(
    seed: int,
    step: int | Tensor,
    samples: Tensor,
    grid: tuple[int, int],
    masked: int,
    pattern: Pattern = "random",
    stream: int = 0,
    *,
    implementation: str | None = None,
) -> PatchMasks:
    """Masks of `masked` cells of a grid (height, width), and what they leave visible, on the device of `samples`.

    Args:
        step: a number, or a 0-d int64 tensor on that device, so that a captured graph draws other masks when the
            tensor has changed.
        samples: (B,) int64, the places in the global batch.
        pattern: "random": uniform over all masks of that count. "block": the masked cells are blocks (BEiT).
            "reversed_block": the blocks are what stays visible (UTA). See `oner_fast.data.block_masks`.
        stream: the index of the pass, 0 to 11.
        implementation: "triton" or "reference"; without it Triton serves CUDA tensors. Their masks are the same.

    Raises ValueError where counts, grid, pattern or stream do not fit, RuntimeError where Triton was asked for and
    cannot serve.
    """
    if pattern not in get_args(Pattern):
        raise ValueError(f"pattern must be one of {', '.join(get_args(Pattern))}, not {pattern!r}")
    height, width = grid
    cells = height * width
    if not 0 <= masked <= cells:
        raise ValueError(f"masked must be in [0, cells = {cells}], not {masked}")
    if pattern != "random" and (cells > MAX_CELLS or max(grid) > MAX_SIDE):
        raise ValueError(
            f"blocks need a grid of at most {MAX_CELLS} cells and {MAX_SIDE} a side, not {height} x {width}"
        )
    purpose = _stream(MASK_PATCH if pattern == "random" else MASK_BLOCK, stream)
    check_step(step)
    if kernels := _triton_kernels(samples.device, implementation, cells):
        with _on_gpu_of(samples):
            return PatchMasks(*kernels.draw_masks(split_seed(seed), purpose, step, samples, grid, masked, pattern))
    if pattern == "random":
        mask = _random_mask(seed, purpose, step, samples, cells, masked)
    else:
        reverse = pattern == "reversed_block"
        picked = pick_blocks(seed, purpose, step, samples, grid, cells - masked if reverse else masked)
        mask = picked.flatten(1).logical_not() if reverse else picked.flatten(1)
    return PatchMasks(mask, mask.to(torch.uint8).argsort(dim=1, stable=True)[:, : cells - masked].contiguous())


def patch_mask(
    seed: int,
    step: int | Tensor,
    samples: Tensor,
    cells: int,
    masked: int,
    stream: int = 0,
    *,
    implementation: str | None = None,
) -> Tensor:
    """Uniform patch masks: (B, cells) bool, exactly `masked` True in each row.

    `samples`: (B,) int64, the places in the global batch. `stream` is the index of the pass, 0 to 11. The masked cells
    are the `masked` smallest of the pairs (32-bit draw, cell). Raises ValueError where the counts do not fit.
    """
    if _triton_kernels(samples.device, implementation, cells):
        return draw_masks(seed, step, samples, (1, cells), masked, "random", stream, implementation=implementation).mask
    if not 0 <= masked <= cells:
        raise ValueError(f"masked must be in [0, cells = {cells}], not {masked}")
    return _random_mask(seed, _stream(MASK_PATCH, stream), step, samples, cells, masked)


def _random_mask(seed: int, stream: int, step: int | Tensor, samples: Tensor, cells: int, masked: int) -> Tensor:
    draws = random_u32(seed, stream, step, samples, cells)
    if masked == 0:
        return torch.zeros_like(draws, dtype=torch.bool)
    keys = draws * cells + torch.arange(cells, device=draws.device)  # distinct, so the threshold is exact
    threshold = keys.sort(dim=1).values[:, masked - 1 : masked]
    return keys <= threshold


def boundaries(counts: Tensor, *, implementation: str | None = None) -> Tensor:
    """cu_seqlens (B + 1,) int32 of samples of `counts` (B,) rows each, made on their device."""
    if kernels := _triton_kernels(counts.device, implementation):
        with _on_gpu_of(counts):
            return kernels.boundaries(counts)
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def _on_gpu_of(x: Tensor) -> Any:
    return importlib.import_module("oner_fast.ops.library").on_gpu_of(x)


def _triton_kernels(device: torch.device, implementation: str | None, cells: int = 0) -> Any:
    """The module of the kernels where they serve, else None."""
    if implementation not in (None, "triton", "reference"):
        raise ValueError(f"implementation must be triton or reference, not {implementation!r}")
    if implementation == "reference" or (implementation is None and device.type != "cuda"):
        return None
    reasons = importlib.import_module("oner_fast.ops.library").why_not_triton(device.type)
    if not reasons:
        kernels = importlib.import_module("oner_fast.kernels.masking")
        if cells <= kernels.MAX_CELLS:
            return kernels
        reasons = [f"{cells} cells are more than its {kernels.MAX_CELLS}"]
    if implementation == "triton":
        raise RuntimeError(f"masks: Triton cannot draw them here: {'; '.join(reasons)}")
    return None


def mask_words(
    text: TokenizedText,
    seed: int,
    step: int,
    samples: Tensor,
    stream: int,
    vocabulary: Vocabulary,
    ratio: float = 0.15,
) -> MaskedText:
    """Masks whole words of every caption, BERT's way.

    Of a caption's n words floor(ratio * n + u / 2^32) are chosen, u one 32-bit draw a caption, so that the mean is the
    ratio even for captions of one word. A chosen word becomes [MASK] (80 %), random ids that are not special (10 %), or
    stays (10 %); its tokens share that choice. `samples`: (B,) int64, the places in the global batch; `stream` is the
    index of the pass. Raises ValueError where the ratio is outside [0, 1] or the samples do not match the captions.
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio must be in [0, 1], not {ratio}")
    if samples.shape != (len(text),):
        raise ValueError(f"samples must be ({len(text)},), one a caption, not {tuple(samples.shape)}")
    tokens, device = text.input_ids.numel(), text.input_ids.device
    if tokens == 0:
        return MaskedText(text.input_ids.clone(), torch.zeros(0, dtype=torch.bool, device=device))
    starts = text.cu_seqlens[:-1].long()
    captions = torch.arange(len(text), device=device)
    caption = captions.repeat_interleave(text.lengths.long(), output_size=tokens)
    place = torch.arange(tokens, device=device)
    in_caption = place - starts[caption]

    # The four words of a token's draw: order of its word, 80/10/10, random id, and (first token) rounding of the count.
    counter = (in_caption, samples.to(device)[caption], step, _stream(MASK_TEXT, stream))
    order, choice, replacement, rounding = philox4x32(counter, split_seed(seed))

    previous = text.word_ids.roll(1)
    is_start = (text.word_ids != previous) | (in_caption == 0)
    words_before = torch.nn.functional.pad(is_start.cumsum(0), (1, 0))
    words = words_before[text.cu_seqlens[1:].long()] - words_before[starts]  # (B,)
    wanted = (round(ratio * (1 << 32)) * words + rounding[starts.clamp(max=tokens - 1)]) >> 32

    # Sort a caption's first tokens of words by their draw, ahead of its other tokens: the rank follows from the place.
    by_caption = (caption << 33) | ((~is_start).long() << 32) | order
    permutation = by_caption.sort(stable=True).indices
    rank = torch.empty_like(place).scatter_(0, permutation, place) - starts[caption]
    chosen = is_start & (rank < wanted[caption])

    word_start = torch.where(is_start, place, 0).cummax(0).values
    target, choice = chosen[word_start], choice[word_start]
    words_in_vocabulary = vocabulary.vocab_size - vocabulary.first_word_id
    random_id = vocabulary.first_word_id + ((replacement * words_in_vocabulary) >> 32)
    replaced = torch.where(choice < _RANDOM_BELOW, random_id, text.input_ids)
    replaced = torch.where(choice < _MASKED_BELOW, vocabulary.mask_id, replaced)
    return MaskedText(torch.where(target, replaced, text.input_ids), target)


def _stream(base: int, index: int) -> int:
    if not 0 <= index < MASK_PASSES:
        raise ValueError(f"a masking pass has an index in [0, {MASK_PASSES}), not {index}")
    return base + index
